"""Products of a matrix with values that lie side by side in lanes, summed down each lane in a fixed order.

The loop over what is summed keeps its sums in registers, vectors of eight lanes with fused multiply-adds
(numba's own loops store and load them again at every step). A lane's result does not depend on the other
lanes, on their number of rows or on the processor; a BLAS's depends on where in the matrix the lane lies.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

LANES = 64
_VECTOR = 8
_DEPTH = 64  # values summed at a time: their lanes stay in the cache
_WORD = ir.IntType(64)


class _Emitter:
    """Writes the loop `out[r, lane] += sum_k matrix[r, k] values[k, lane]` over rows and vectors of lanes."""

    def __init__(self, builder: Any, scalar: Any, rows: int, vectors: int) -> None:
        self.builder, self.scalar, self.rows, self.vectors = builder, scalar, rows, vectors
        self.vector = ir.VectorType(scalar, _VECTOR)
        name = f"llvm.fma.v{_VECTOR}f{32 if isinstance(scalar, ir.FloatType) else 64}"
        kind = ir.FunctionType(self.vector, [self.vector] * 3)
        self.fma = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)

    def place(self, base: Any, row: Any, lane: Any, vector: int) -> Any:
        """Return where a vector of lanes of a row lies."""
        at = self.builder.add(self.builder.mul(row, _WORD(LANES)), lane)
        pointer = self.builder.gep(base, [self.builder.add(at, _WORD(_VECTOR * vector))])
        return self.builder.bitcast(pointer, self.vector.as_pointer())

    def broadcast(self, matrix: Any, at: Any) -> Any:
        """Return an entry of the matrix in every lane of a vector."""
        entry = self.builder.load(self.builder.gep(matrix, [at]))
        undefined = ir.Constant(self.vector, ir.Undefined)
        first = self.builder.insert_element(undefined, entry, ir.IntType(32)(0))
        same = ir.Constant(ir.VectorType(ir.IntType(32), _VECTOR), [0] * _VECTOR)
        return self.builder.shuffle_vector(first, undefined, same)

    def loop(
        self, out: Any, out_row: Any, matrix: Any, at: Any, width: Any, values: Any, first: Any, count: Any,
        lane: Any,
    ) -> None:  # fmt: skip
        """Write the loop over `count` values from row `first` on; `at` is the first entry of the matrix."""
        builder, align = self.builder, 4 if isinstance(self.scalar, ir.FloatType) else 8
        cells = [
            self.place(out, builder.add(out_row, _WORD(row)), lane, vector)
            for row in range(self.rows)
            for vector in range(self.vectors)
        ]
        before = [builder.load(cell, align=align) for cell in cells]
        entry, body = builder.block, builder.append_basic_block("sum")
        done = builder.append_basic_block("summed")
        builder.branch(body)
        builder.position_at_end(body)
        step = builder.phi(_WORD)
        sums = [builder.phi(self.vector) for _ in cells]
        there = builder.add(first, step)
        lanes = [builder.load(self.place(values, there, lane, v), align=align) for v in range(self.vectors)]
        after = []
        for row in range(self.rows):
            place = builder.add(builder.add(at, builder.mul(_WORD(row), width)), step)
            factor = self.broadcast(matrix, place)
            after += [
                builder.call(self.fma, [factor, lanes[v], sums[row * self.vectors + v]])
                for v in range(self.vectors)
            ]
        following = builder.add(step, _WORD(1))
        for phi, start, back in zip([step, *sums], [_WORD(0), *before], [following, *after], strict=True):
            phi.add_incoming(start, entry)
            phi.add_incoming(back, body)
        builder.cbranch(builder.icmp_signed("<", following, count), body, done)
        builder.position_at_end(done)
        for cell, total in zip(cells, after, strict=True):
            builder.store(total, cell, align=align)


def _kernel(rows: int, vectors: int) -> Any:
    """Return the intrinsic that adds products to `rows` rows and `vectors` vectors of lanes."""

    @intrinsic
    def add(typing: Any, out: Any, row: Any, matrix: Any, at: Any, width: Any, values: Any, first: Any,
            count: Any, lane: Any) -> Any:  # fmt: skip
        signature = types.void(out, row, matrix, at, width, values, first, count, lane)

        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            kinds = signature.args
            data = {
                index: context.make_array(kinds[index])(context, builder, given[index]).data
                for index in (0, 2, 5)
            }
            scalar = context.get_value_type(kinds[0].dtype)
            _Emitter(builder, scalar, rows, vectors).loop(
                *(data.get(i, value) for i, value in enumerate(given))
            )
            return context.get_dummy_value()

        return signature, generate

    return add


_four_rows = _kernel(4, 2)
_one_row = _kernel(1, 8)


@njit(nogil=True, cache=True, error_model="numpy")
def add_products(
    matrix: NDArray[Any],
    row: int,
    column: int,
    values: NDArray[Any],
    first: int,
    last: int,
    out: NDArray[Any],
) -> None:
    """Add `sum_k M[row + c, column + k] * values[k, lane]` over `k` in `first`…`last` to `out[c, lane]`.

    `values` and `out` are `rows LANES`; all arrays are contiguous and of one type.
    """
    width = matrix.shape[1]
    rows = out.shape[0] // 4 * 4
    for start in range(first, last, _DEPTH):
        count = min(_DEPTH, last - start)
        for c in range(0, rows, 4):
            at = (row + c) * width + column + start
            for lane in range(0, LANES, 2 * _VECTOR):
                _four_rows(out, c, matrix, at, width, values, start, count, lane)
        for c in range(rows, out.shape[0]):
            at = (row + c) * width + column + start
            _one_row(out, c, matrix, at, width, values, start, count, 0)


@njit(nogil=True, cache=True, error_model="numpy")
def add_four(
    matrix: NDArray[Any], row: int, column: int, values: NDArray[Any], first: int, last: int,
    out: NDArray[Any], out_row: int,
) -> None:  # fmt: skip
    """As `add_products` for four rows of `out` from `out_row` on."""
    if first < last:
        width = matrix.shape[1]
        at = row * width + column + first
        for lane in range(0, LANES, 2 * _VECTOR):
            _four_rows(out, out_row, matrix, at, width, values, first, last - first, lane)
