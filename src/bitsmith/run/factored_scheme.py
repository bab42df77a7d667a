"""What matrices become under schemes of factors: low rank, remainders, pruned blocks, Tensor-Trains.

A scheme is a kind and options, parted by colons; upper and lower case are alike:

- `SVD` (a product A B), `SVD+INT4` and `SVD+INT8` (a product and the remainder in codes), `INT4` and `INT8`
  (codes alone), `TT` (a Tensor-Train of three cores, also of an embedding);
- `r=64` is the rank (TT: both inner ranks), `bpw=4.5` the largest whose parts take at most so many bits per
  weight of the whole matrix;
- `int4`, `int8`, `f16` or `f32` is how factors and cores are stored (default int8; int4 for SVD);
- `rows=64x0.2.3` keeps the blocks 0, 2 and 3 of 64 rows, the others are zero; `cols=` keeps columns;
- `kernel=512` (with SVD+INT4 or SVD+INT8): the first 512 of the kept rows are the product, the others codes.

`SVD:bpw=4`, `SVD:r=512:int8`, `SVD+INT4:r=32`, `INT4:cols=64x0.1.3`, `TT:r=64`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from bitsmith.errors import BitsmithError, printable
from bitsmith.numerics.tensor_train import balanced_modes, possible_ranks
from bitsmith.store.factored import (
    FLOAT_CODES,
    Blocks,
    FactoredForm,
    Form,
    TrainForm,
    form_bytes,
)

GROUPS = (0, 32, 64, 128)
"""Columns that may share a scale; 0 is a whole row."""

_RESTS = {"SVD": None, "SVD+INT4": "int4", "SVD+INT8": "int8", "INT4": "int4", "INT8": "int8"}
KINDS = (*_RESTS, "TT")
"""What a scheme may begin with."""

_PLAIN = ("INT4", "INT8")
_STORED = ("int4", "int8", *FLOAT_CODES)


@dataclass(frozen=True)
class Scheme:
    """A scheme string, taken apart: `rank` or `bpw` is set wherever there are factors."""

    text: str
    kind: str
    rank: int | None = None
    bpw: float | None = None
    code: str = "int8"
    kernel: int | None = None
    rows: Blocks | None = None
    columns: Blocks | None = None


def parse_scheme(text: str) -> Scheme:
    """Return a scheme string taken apart.

    Raises BitsmithError for an unknown kind or option, a value that is none, and options that do not go
    together.
    """
    kind, *options = text.upper().split(":")
    if kind not in KINDS:
        _refuse(text, f"unknown kind {printable(kind)!r}; known: {', '.join(KINDS)}")
    scheme = Scheme(text, kind, code="int4" if kind == "SVD" else "int8")
    for option in options:
        scheme = replace(scheme, **_option(text, option))
    factors = kind not in _PLAIN
    if factors != (scheme.rank is not None or scheme.bpw is not None) or (scheme.rank and scheme.bpw):
        _refuse(text, "needs one of r= and bpw=" if factors else "has no factors, and so no r= and bpw=")
    if kind == "TT" and (scheme.rows or scheme.columns):
        _refuse(text, "a Tensor-Train keeps all rows and columns")
    if scheme.kernel is not None and not kind.startswith("SVD+"):
        _refuse(text, "kernel= needs codes for the other rows: SVD+INT4 or SVD+INT8")
    if _RESTS.get(kind) and factors and scheme.code == "f16":
        _refuse(text, "beside codes factors are int4, int8 or f32")
    return scheme


def form_of(scheme: Scheme, shape: tuple[int, ...], group: int) -> Form:
    """Return what a matrix of `shape` (`out in`) becomes; ranks are clipped to what it can have.

    Raises BitsmithError for blocks and kernels that the matrix does not have, and for a `bpw` that does not
    suffice for rank 1.
    """
    out, columns = shape
    if scheme.kind == "TT":
        most = max(balanced_modes(out, columns).sizes) * min(shape)
        return _ranked(
            scheme, min(most, out * columns), lambda rank: _train(scheme, (out, columns), group, rank)
        )
    rest = _RESTS[scheme.kind]
    form = FactoredForm(
        (out, columns),
        rest=None if rest is None else _code(rest, group),
        kernel=scheme.kernel,
        rows=scheme.rows,
        columns=scheme.columns,
    )
    if scheme.kind not in _PLAIN:
        form = replace(form, rank=1, factors=_code(scheme.code, group))
    if (wrong := form.wrong()) is not None:
        _refuse(scheme.text, wrong)
    if form.factors is None:
        return form
    return _ranked(scheme, min(form.product_rows, form.kept[1]), lambda rank: replace(form, rank=rank))


def _train(scheme: Scheme, shape: tuple[int, int], group: int, rank: int) -> TrainForm:
    modes = balanced_modes(*shape)
    ranks = possible_ranks(modes.sizes, (1, rank, rank, 1))
    return TrainForm(shape, (modes.rows, modes.columns), ranks, _code(scheme.code, group))


def _code(name: str, group: int) -> str:
    return f"{name}_g{group}" if group and name not in FLOAT_CODES else name


def _ranked(scheme: Scheme, most: int, formed: Callable[[int], Form]) -> Form:
    """Return the form of the rank that is asked for, or of the largest that the bytes allow."""
    if scheme.rank is not None:
        return formed(min(scheme.rank, most))
    out, columns = formed(1).shape
    budget = math.floor((scheme.bpw or 0.0) * out * columns / 8)
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if form_bytes(formed(middle)) <= budget else (low, middle - 1)
    if low == 0:
        least = 8 * form_bytes(formed(1)) / (out * columns)
        _refuse(scheme.text, f"rank 1 of a {out}x{columns} matrix takes {least:.2f} bpw already")
    return formed(low)


def _option(text: str, option: str) -> dict[str, Any]:
    """Return an option as a field of `Scheme`."""
    key, equals, value = option.partition("=")
    if not equals and key.lower() in _STORED:
        return {"code": key.lower()}
    readers = {"R": _rank, "BPW": _bpw, "KERNEL": _rank, "ROWS": _blocks, "COLS": _blocks}
    if key not in readers:
        known = ", ".join([*(f"{name.lower()}=" for name in readers), *_STORED])
        _refuse(text, f"unknown option {printable(option)!r}; known: {known}")
    names = {"R": "rank", "COLS": "columns"}
    try:
        return {names.get(key, key.lower()): readers[key](value)}
    except ValueError:
        _refuse(text, f"{printable(option)!r} has no value that {key.lower()}= could have")


def _rank(value: str) -> int:
    if (found := int(value)) < 1:
        raise ValueError(value)
    return found


def _bpw(value: str) -> float:
    found = float(value)
    if not 0 < found < math.inf:
        raise ValueError(value)
    return found


def _blocks(value: str) -> Blocks:
    size, _, kept = value.partition("X")
    return Blocks(_rank(size), tuple(int(block) for block in kept.split(".")))


def _refuse(text: str, said: str) -> NoReturn:
    raise BitsmithError(f"{printable(text, 60)}: {said}")
