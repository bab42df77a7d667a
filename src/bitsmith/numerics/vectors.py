"""Vectors of fixed length inside compiled loops: the compiler's own vector values, on any processor.

For loops that numba's compiler does not vectorise by itself: short ones, and sums. `load` 8 to 64 neighbours
of a contiguous array, combine them with `+ - * / & | >> <<`, comparisons (which give masks) and the functions
below, `store` them. The number right of an operator is spread over all lanes. Lengths are those of the code,
and the processor's registers hold them in parts. Every operation rounds as the scalar one does and sums run
in the order that is written, so that results do not depend on the processor. Nothing checks bounds.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.typing.templates import AbstractTemplate, infer_global
from numba.extending import intrinsic, lower_builtin, models, register_model

_compiled: Any = intrinsic  # whose own types do not know that the compiler passes the context
_typed: Any = infer_global
_lowered: Any = lower_builtin
_unliteral: Any = types.unliteral
_WORD = ir.IntType(32)
_ELEMENTS = {
    types.float32: ir.FloatType(), types.float64: ir.DoubleType(), types.boolean: ir.IntType(1),
    types.uint8: ir.IntType(8), types.int8: ir.IntType(8), types.int16: ir.IntType(16),
    types.int32: _WORD, types.uint32: _WORD, types.uint64: ir.IntType(64),
}  # fmt: skip


class Vector(types.Type):
    """The compiled type of `lanes` values of a numba scalar type."""

    def __init__(self, element: Any, lanes: int) -> None:
        self.element, self.lanes = element, lanes
        self.real = isinstance(element, types.Float)
        self.signed = self.real or bool(getattr(element, "signed", False))
        self.compiled = ir.VectorType(_ELEMENTS[element], lanes)
        super().__init__(name=f"Vector({element}, {lanes})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, found: Vector) -> None:
        super().__init__(manager, found, found.compiled)  # type: ignore[no-untyped-call]


def _shuffled(builder: Any, first: Any, second: Any, order: Sequence[int]) -> Any:
    mask = ir.Constant(ir.VectorType(_WORD, len(order)), list(order))
    return builder.shuffle_vector(first, second, mask)


def _spread(builder: Any, value: Any, lanes: int) -> Any:
    empty = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    single = builder.insert_element(empty, value, _WORD(0))
    return _shuffled(builder, single, single, [0] * lanes)


def _register(symbol: Any, emit: Callable[[Any, Vector, Any, Any], Any], *, mask: bool) -> None:
    """Define a binary operator by what it emits for two vectors."""

    class _Template(AbstractTemplate):
        key = symbol

        def generic(self, args: Any, kws: Any) -> Any:
            left, right = args
            if not isinstance(left, Vector) or not (right == left or isinstance(right, types.Number)):
                return None
            found = Vector(types.boolean, left.lanes) if mask else left
            return found(left, left if right == left else left.element)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        left, right = sig.args
        second = args[1] if isinstance(right, Vector) else _spread(builder, args[1], left.lanes)
        return emit(builder, left, args[0], second)

    _typed(symbol)(_Template)
    _lowered(symbol, Vector, Vector)(lower)
    _lowered(symbol, Vector, types.Number)(lower)


def _instruction(real: str, signed: str, unsigned: str) -> Callable[[Any, Vector, Any, Any], Any]:
    def emit(builder: Any, kind: Vector, first: Any, second: Any) -> Any:
        name = real if kind.real else signed if kind.signed else unsigned
        return getattr(builder, name)(first, second)

    return emit


def _comparison(sign: str) -> Callable[[Any, Vector, Any, Any], Any]:
    def emit(builder: Any, kind: Vector, first: Any, second: Any) -> Any:
        if kind.real:
            return builder.fcmp_ordered(sign, first, second)
        return (builder.icmp_signed if kind.signed else builder.icmp_unsigned)(sign, first, second)

    return emit


for _symbol, _names in {
    operator.add: ("fadd", "add", "add"),
    operator.sub: ("fsub", "sub", "sub"),
    operator.mul: ("fmul", "mul", "mul"),
    operator.truediv: ("fdiv", "fdiv", "fdiv"),
    operator.and_: ("and_", "and_", "and_"),
    operator.or_: ("or_", "or_", "or_"),
    operator.rshift: ("ashr", "ashr", "lshr"),
    operator.lshift: ("shl", "shl", "shl"),
}.items():
    _register(_symbol, _instruction(*_names), mask=False)
for _symbol, _sign in {operator.lt: "<", operator.gt: ">", operator.ge: ">=", operator.eq: "=="}.items():
    _register(_symbol, _comparison(_sign), mask=True)


def _place(context: Any, builder: Any, array: Any, values: Any, at: Any, kind: Vector) -> Any:
    data = context.make_array(array)(context, builder, values).data
    return builder.bitcast(builder.gep(data, [at]), kind.compiled.as_pointer())


@_compiled(prefer_literal=True)  # type: ignore[untyped-decorator]
def load(typing: Any, array: Any, at: Any, lanes: Any) -> Any:
    """Return `lanes` (a literal) neighbours of a contiguous `array`, from flat index `at` on."""
    kind = Vector(array.dtype, lanes.literal_value)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        place = _place(context, builder, sig.args[0], args[0], args[1], kind)
        return builder.load(place, align=array.dtype.bitwidth // 8)

    return kind(array, types.intp, lanes), emit


@_compiled  # type: ignore[untyped-decorator]
def store(typing: Any, array: Any, at: Any, vector: Any) -> Any:
    """Write a vector to a contiguous `array`, from flat index `at` on."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        place = _place(context, builder, sig.args[0], args[0], args[1], vector)
        builder.store(args[2], place, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), emit


@_compiled(prefer_literal=True)  # type: ignore[untyped-decorator]
def spread(typing: Any, value: Any, lanes: Any) -> Any:
    """Return a vector of `lanes` (a literal) times `value`."""
    scalar = _unliteral(value)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _spread(builder, args[0], lanes.literal_value)

    return Vector(scalar, lanes.literal_value)(scalar, lanes), emit


@_compiled  # type: ignore[untyped-decorator]
def where(typing: Any, mask: Any, first: Any, second: Any) -> Any:
    """Return the values of `first` where the mask is set, else those of `second` (vectors)."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.select(*args)

    return first(mask, first, second), emit


@_compiled  # type: ignore[untyped-decorator]
def smaller(typing: Any, first: Any, second: Any) -> Any:
    """Return the lesser values of two vectors, those of the first where either is NaN."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.select(_comparison("<")(builder, first, args[1], args[0]), args[1], args[0])

    return first(first, first), emit


@_compiled  # type: ignore[untyped-decorator]
def larger(typing: Any, first: Any, second: Any) -> Any:
    """Return the greater values of two vectors, those of the first where either is NaN."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.select(_comparison(">")(builder, first, args[1], args[0]), args[1], args[0])

    return first(first, first), emit


def _called(name: str) -> Any:
    def function(typing: Any, vector: Any) -> Any:
        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            full = f"{name}.v{vector.lanes}f{vector.element.bitwidth}"
            known = builder.module.globals.get(full)
            kind = ir.FunctionType(vector.compiled, [vector.compiled])
            return builder.call(known or ir.Function(builder.module, kind, full), args)

        return vector(vector), emit

    return _compiled(function)


magnitude = _called("llvm.fabs")
"""Return the magnitudes of a vector of floats."""
nearest = _called("llvm.rint")
"""Return a vector's floats rounded to whole numbers, halves to the even one."""
downwards = _called("llvm.floor")
"""Return a vector's floats rounded down to whole numbers."""


@_compiled(prefer_literal=True)  # type: ignore[untyped-decorator]
def converted(typing: Any, vector: Any, name: Any) -> Any:
    """Return a vector's values as the type called `name` (a literal); floats are cut to whole numbers."""
    found = Vector(getattr(types, name.literal_value), vector.lanes)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _converted(builder, vector, found, args[0])

    return found(vector, name), emit


def _converted(builder: Any, old: Vector, new: Vector, value: Any) -> Any:
    if old.real and new.real:
        wider = new.element.bitwidth > old.element.bitwidth
        return (builder.fpext if wider else builder.fptrunc)(value, new.compiled)
    if old.real:
        return builder.fptosi(value, new.compiled)
    if new.real:
        return (builder.sitofp if old.signed else builder.uitofp)(value, new.compiled)
    if new.element.bitwidth < old.element.bitwidth:
        return builder.trunc(value, new.compiled)
    if new.element.bitwidth == old.element.bitwidth:
        return value
    return (builder.sext if old.signed else builder.zext)(value, new.compiled)


@_compiled(prefer_literal=True)  # type: ignore[untyped-decorator]
def reread(typing: Any, vector: Any, name: Any) -> Any:
    """Return the bits of a vector's values read as the type of the same size called `name` (a literal)."""
    found = Vector(getattr(types, name.literal_value), vector.lanes)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.bitcast(args[0], found.compiled)

    return found(vector, name), emit


@_compiled  # type: ignore[untyped-decorator]
def mask_bits(typing: Any, mask: Any) -> Any:
    """Return a mask of 32 lanes as a word, lane 0 its lowest bit."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.bitcast(args[0], _WORD)

    return types.uint32(mask), emit


@_compiled(prefer_literal=True)  # type: ignore[untyped-decorator]
def part(typing: Any, vector: Any, first: Any, lanes: Any) -> Any:
    """Return `lanes` lanes of a vector from lane `first` on (literals)."""
    found = Vector(vector.element, lanes.literal_value)
    order = range(first.literal_value, first.literal_value + lanes.literal_value)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _shuffled(builder, args[0], args[0], order)

    return found(vector, first, lanes), emit


@_compiled  # type: ignore[untyped-decorator]
def joined(typing: Any, first: Any, second: Any) -> Any:
    """Return the lanes of two vectors, one after the other."""
    found = Vector(first.element, 2 * first.lanes)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _shuffled(builder, args[0], args[1], range(2 * first.lanes))

    return found(first, first), emit


@_compiled  # type: ignore[untyped-decorator]
def turn(typing: Any, source: Any, at: Any, stride: Any, target: Any, to: Any, width: Any) -> Any:
    """Write 8 x 8 values of contiguous `source` (from `at`, rows `stride` apart) transposed into `target`.

    There they lie from `to` on in rows `width` apart.
    """
    kind = Vector(source.dtype, 8)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        def place(array: int, start: int, step: int, row: int) -> Any:
            index = builder.add(args[start], builder.mul(args[step], args[step].type(row)))
            return _place(context, builder, sig.args[array], args[array], index, kind)

        align = source.dtype.bitwidth // 8
        rows = [builder.load(place(0, 1, 2, row), align=align) for row in range(8)]
        for half in (4, 2, 1):  # rows r and r + half exchange the columns whose bit `half` differs
            low = [c if not c & half else 8 + c - half for c in range(8)]
            high = [c + half if not c & half else 8 + c for c in range(8)]
            found = list(rows)
            for row in (r for r in range(8) if not r & half):
                found[row] = _shuffled(builder, rows[row], rows[row + half], low)
                found[row + half] = _shuffled(builder, rows[row], rows[row + half], high)
            rows = found
        for row in range(8):
            builder.store(rows[row], place(3, 4, 5, row), align=align)
        return context.get_dummy_value()

    return types.void(source, types.intp, types.intp, target, types.intp, types.intp), emit


@_compiled  # type: ignore[untyped-decorator]
def total(typing: Any, vector: Any) -> Any:
    """Return the sum of all lanes: halves are added until one is left."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        (value,), lanes = args, vector.lanes
        while lanes > 1:
            lanes //= 2
            low = _shuffled(builder, value, value, range(lanes))
            high = _shuffled(builder, value, value, range(lanes, 2 * lanes))
            value = (builder.fadd if vector.real else builder.add)(low, high)
        return builder.extract_element(value, _WORD(0))

    return vector.element(vector), emit
