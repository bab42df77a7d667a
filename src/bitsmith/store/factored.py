"""Weights kept as factors, as bitsmith writes them (`quant_method` "bitsmith"); nothing else loads them.

A weight (`out in`) is a product of two factors, codes on an integer grid, or both: `W = A B + Q`, on the rows
and columns that are kept; the others are zero. With a `kernel` the product makes up the first rows and Q the
others. Or it is a Tensor-Train of three cores, or a product of two of them.
`store.factored_reader` reads them.

A matrix of numbers is stored as F32, as F16, or as codes of 8 or 4 bits in 32-bit words, the first lowest,
rows padded to whole words, with F16 scales beside them for a row or for each group of columns.
The config's `modules` say for each module what it is: `form`, `shape` and the fields of that form.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from bitsmith.formats.format import Float32
from bitsmith.formats.integer import GRIDS, GridFormat, grid_named
from bitsmith.numerics.modes import Modes
from bitsmith.store.compressed_tensors import words

METHOD, VERSION = "bitsmith", 1
WHOLE, LEFT, RIGHT, REST = "weight", "weight_left", "weight_right", "weight_rest"
CORES = ("_core_0", "_core_1", "_core_2")
ROW_SCALE, COLUMN_SCALE = "_row_scale", "_column_scale"
SCALE = "_scale"
"""Suffixes of a module's stored tensors: a matrix's, those of a train (`weight_left_core_0`), of scales."""

FLOAT_CODES = {"f32": "F32", "f16": "F16"}
CODES = (*FLOAT_CODES, *(name for name in GRIDS if re.fullmatch(r"int[48](_g\d+)?", name)))
"""Ways of storing a matrix of numbers; `int4_g32` has a scale for every 32 columns."""

_INNER_BYTES = 1 << 24

StoredPart = tuple[str, str, tuple[int, ...]]
"""Suffix, dtype and shape of a stored tensor."""


def code_grid(code: str) -> GridFormat | None:
    """Return the grid of a code, None for floats."""
    return None if code in FLOAT_CODES else grid_named(code)


def code_parts(code: str, suffix: str, shape: tuple[int, int]) -> list[StoredPart]:
    """Return the stored tensors of a matrix of numbers of `shape` (`rows columns`)."""
    grid = code_grid(code)
    if grid is None:
        return [(suffix, FLOAT_CODES[code], shape)]
    rows, columns = shape
    return [
        (suffix, "I32", (rows, words(columns, grid.bits))),
        (suffix + SCALE, "F16", (rows, grid.groups(columns))),
    ]


@dataclass(frozen=True)
class Blocks:
    """Which of an axis's blocks of `size` rows or columns are kept, ascending; the others are zero."""

    size: int
    kept: tuple[int, ...]

    @property
    def length(self) -> int:
        """Number of rows or columns that are kept."""
        return self.size * len(self.kept)

    @property
    def index(self) -> NDArray[np.intp]:
        """Rows or columns that are kept, ascending."""
        starts = np.asarray(self.kept, np.intp) * self.size
        return (starts[:, None] + np.arange(self.size)).reshape(-1)

    def fits(self, axis: int) -> bool:
        """Tell whether an axis of that length consists of such blocks and has the kept ones."""
        ascending = all(a < b for a, b in zip(self.kept, self.kept[1:], strict=False))
        inside = bool(self.kept) and self.kept[0] >= 0 and (self.kept[-1] + 1) * self.size <= axis
        return self.size > 0 and axis % self.size == 0 and ascending and inside


@dataclass(frozen=True)
class FactoredForm:
    """`W = A B + Q` on the kept rows and columns of a matrix of `shape` (`out in`).

    A (`out r`) and B (`r in`) are stored by the code `factors`, Q by `rest`; None where there is none. With a
    `kernel` A has so many rows, the first, and Q the others.
    """

    form: ClassVar[str] = "factored"
    shape: tuple[int, int]
    rank: int = 0
    factors: str | None = None
    rest: str | None = None
    kernel: int | None = None
    rows: Blocks | None = None
    columns: Blocks | None = None

    @property
    def kept(self) -> tuple[int, int]:
        """Number of rows and columns that are kept."""
        rows, columns = (axis.length if axis else None for axis in (self.rows, self.columns))
        return rows or self.shape[0], columns or self.shape[1]

    @property
    def name(self) -> str:
        """What is stored, in short: `rank 64 int8_g32 + int4_g128`."""
        product = f"rank {self.rank} {self.factors}" if self.factors else None
        parts = " + ".join(part for part in (product, self.rest) if part)
        return parts if self.kept == self.shape else f"{parts} of {self.kept[0]}x{self.kept[1]}"

    @property
    def product_rows(self) -> int:
        """Rows of A."""
        return self.kept[0] if self.kernel is None else self.kernel

    @property
    def first_rest(self) -> int:
        """Where the rows of Q begin."""
        return self.kernel or 0

    def code_of(self, suffix: str) -> str:
        """Return the code that a part is stored by."""
        return (self.rest if suffix == REST else self.factors) or ""

    def parts(self) -> list[StoredPart]:
        """Return the stored tensors, codes before scales."""
        (out, columns), found = self.kept, list[StoredPart]()
        if self.factors is not None:
            found += code_parts(self.factors, LEFT, (self.product_rows, self.rank))
            found += code_parts(self.factors, RIGHT, (self.rank, columns))
        if self.rest is not None:
            found += code_parts(self.rest, REST, (out - self.first_rest, columns))
        return sorted(found, key=lambda part: part[0].endswith(SCALE))

    def wrong(self) -> str | None:
        """Return what cannot be, None for a sound form."""
        for axis, length, name in (
            (self.rows, self.shape[0], "rows"),
            (self.columns, self.shape[1], "columns"),
        ):
            if axis is not None and not axis.fits(length):
                return (
                    f"{name} keeps blocks {list(axis.kept)[:8]} of {axis.size}, which {length} does not have"
                )
        if self.factors is None and self.rest is None:
            return "has neither factors nor rest"
        if (self.factors is not None) != (1 <= self.rank <= min(self.kept)):
            return f"has rank {self.rank} for {self.kept[0]}x{self.kept[1]} and factors {self.factors}"
        split = self.kernel is not None
        if split and not (self.factors and self.rest and 0 < self.first_rest < self.kept[0]):
            return (
                f"has a kernel of {self.kernel} rows of {self.kept[0]}, without factors, rest or other rows"
            )
        return None

    def to_json(self) -> dict[str, Any]:
        """Return the settings of a module: what is not there is left out."""
        return {"form": self.form} | {key: value for key, value in asdict(self).items() if value}


@dataclass(frozen=True)
class TrainForm:
    """A Tensor-Train of three cores (`numerics.tensor_train`) of a matrix of `shape` (`out in`).

    `modes` are the row and column factors, `ranks` `1, r1, r2, 1`, `cores` the code they are stored by: as
    matrices `p1 r1`, `(r1 p2) r2` and `r2 p3`. With `scales` what the cores make is multiplied by a factor
    for each row and one for each column.
    """

    form: ClassVar[str] = "train"
    shape: tuple[int, int]
    modes: tuple[tuple[int, ...], tuple[int, ...]]
    ranks: tuple[int, ...]
    cores: str
    scales: bool = False

    @property
    def name(self) -> str:
        """What is stored, in short: `TT 1,64,64,1 int8`."""
        scaled = " scaled" if self.scales else ""
        return f"TT {','.join(map(str, self.ranks))} {self.cores}{scaled}"

    @property
    def core_shapes(self) -> list[tuple[int, int]]:
        """Shapes of the cores as matrices."""
        p1, p2, p3 = Modes(*self.modes).sizes
        _, r1, r2, _ = self.ranks
        return [(p1, r1), (r1 * p2, r2), (r2, p3)]

    @property
    def trains(self) -> dict[str, TrainForm]:
        """The train, by what the names of its parts begin with."""
        return {WHOLE: self}

    def code_of(self, suffix: str) -> str:
        """Return the code that a part is stored by."""
        return "f16" if suffix.endswith((ROW_SCALE, COLUMN_SCALE)) else self.cores

    def parts(self, begin: str = WHOLE) -> list[StoredPart]:
        """Return the stored tensors, codes before scales."""
        shapes = zip(CORES, self.core_shapes, strict=True)
        found = [part for suffix, shape in shapes for part in code_parts(self.cores, begin + suffix, shape)]
        if self.scales:
            axes = zip((ROW_SCALE, COLUMN_SCALE), self.shape, strict=True)
            found += [(begin + suffix, "F16", (length,)) for suffix, length in axes]
        return sorted(found, key=lambda part: part[0].endswith(SCALE))

    def wrong(self) -> str | None:
        """Return what cannot be, None for a sound form."""
        if [len(self.modes), *map(len, self.modes), len(self.ranks)] != [2, 3, 3, 4]:
            return "has no three cores"
        if min(*self.ranks, *self.modes[0], *self.modes[1]) < 1 or (self.ranks[0], self.ranks[-1]) != (1, 1):
            return f"has ranks {list(self.ranks)}"
        held = [prod(factors) for factors in self.modes]
        if any(not axis <= found < 2 * axis + 64 for axis, found in zip(self.shape, held, strict=True)):
            return f"has modes for {held[0]}x{held[1]}"
        return None

    def to_json(self) -> dict[str, Any]:
        """Return the settings of a module: what is not there is left out."""
        return {"form": self.form} | {key: value for key, value in asdict(self).items() if value}


@dataclass(frozen=True)
class TrainsForm:
    """A product `A B` whose factors (`out r`, `r in`) are Tensor-Trains: r is the rank of the SVD between."""

    form: ClassVar[str] = "trains"
    left: TrainForm
    right: TrainForm

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def name(self) -> str:
        """What is stored, in short: `rank 64 TT 1,8,8,1 int8, TT 1,8,8,1 int8`."""
        return f"rank {self.left.shape[1]} {self.left.name}, {self.right.name}"

    @property
    def trains(self) -> dict[str, TrainForm]:
        """The trains, by what the names of their parts begin with."""
        return {LEFT: self.left, RIGHT: self.right}

    def code_of(self, suffix: str) -> str:
        """Return the code that a part is stored by."""
        return (self.left if suffix.startswith(LEFT) else self.right).code_of(suffix)

    def parts(self) -> list[StoredPart]:
        """Return the stored tensors, codes before scales."""
        found = [part for begin, train in self.trains.items() for part in train.parts(begin)]
        return sorted(found, key=lambda part: part[0].endswith(SCALE))

    def wrong(self) -> str | None:
        """Return what cannot be, None for a sound form."""
        if self.left.shape[1] != self.right.shape[0]:
            return f"multiplies {list(self.left.shape)} by {list(self.right.shape)}"
        return self.left.wrong() or self.right.wrong()

    def to_json(self) -> dict[str, Any]:
        """Return the settings of a module."""
        return {"form": self.form, LEFT: self.left.to_json(), RIGHT: self.right.to_json()}


Form = FactoredForm | TrainForm | TrainsForm


def form_bytes(form: Form) -> int:
    """Return the bytes of all parts as stored."""
    sizes = {"F32": 4, "I32": 4, "F16": 2}
    return sum(sizes[dtype] * prod(shape) for _, dtype, shape in form.parts())


def train_rows(
    form: TrainForm,
    cores: Sequence[Float32],
    start: int,
    stop: int,
    scales: tuple[Float32, Float32] | None = None,
) -> Float32:
    """Return rows `[start, stop)` of a Tensor-Train: `cores` of `core_shapes`, `scales` of all its axes."""
    (_, m2, m3), (n1, n2, n3) = form.modes
    _, r1, r2, _ = form.ranks
    first = cores[0].reshape(-1, n1, r1)
    middle = cores[1].reshape(r1, m2, n2, r2)
    last = cores[2].reshape(r2, m3, n3)
    rows = np.empty((stop - start, form.shape[1]), np.float32)
    step = max(1, _INNER_BYTES // (4 * n2 * max(r2, m3 * n3)))  # of n1 at once: small cores can span much
    for block in range(start // m3, -(-stop // m3)):
        i1, i2 = divmod(block, m2)
        begin, end = max(start, block * m3), min(stop, (block + 1) * m3)
        ends = last[:, begin - block * m3 : end - block * m3].reshape(r2, -1)
        for at in range(0, n1, step):
            inner = np.tensordot(first[i1, at : at + step], middle[:, i2], axes=1).reshape(-1, r2)
            apart = (inner @ ends).reshape(len(inner), end - begin, n3).transpose(1, 0, 2)
            columns = slice(at * n2 * n3, min(form.shape[1], (at + step) * n2 * n3))
            kept = apart.reshape(end - begin, -1)[:, : max(0, columns.stop - columns.start)]
            rows[begin - start : end - start, columns] = kept
    if scales is not None:
        rows *= scales[0][start:stop, None] * scales[1]
    return rows
