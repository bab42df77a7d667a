"""Weights kept as factors, as bitsmith writes them (`quant_method` "bitsmith"); nothing else loads them.

A weight (`out in`) is a product of two factors, codes on an integer grid, or both: `W = A B + Q`, on the rows
and columns that are kept; the others are zero. With a `kernel` the product makes up the first rows and Q the
others. Or it is a Tensor-Train of three cores. Everything is computed for the rows that are asked for.

A matrix of numbers is stored as F32, as F16, or as codes of 8 or 4 bits in 32-bit words, the first lowest,
rows padded to whole words, with F16 scales beside them for a row or for each group of columns.
The config's `modules` say for each module what it is: `form`, `shape` and the fields of that form.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import numpy as np
from numpy.typing import NDArray

from bitsmith.errors import BitsmithError, DamagedFileError, UnsupportedError, printable
from bitsmith.formats.format import Float32
from bitsmith.formats.integer import GRIDS, Coded, GridFormat, grid_named, unpack_codes
from bitsmith.numerics.tensor_train import Modes
from bitsmith.store.checkpoint import Checkpoint, Rows, TensorRef
from bitsmith.store.compressed_tensors import words
from bitsmith.store.packed import PackedTensor
from bitsmith.store.stored import StoredTensor

METHOD, VERSION = "bitsmith", 1
LEFT, RIGHT, REST = "weight_left", "weight_right", "weight_rest"
CORES = ("weight_core_0", "weight_core_1", "weight_core_2")
SCALE = "_scale"
"""Suffixes of a module's stored tensors; `SCALE` is added for the scales of one."""

FLOAT_CODES = {"f32": "F32", "f16": "F16"}
CODES = (*FLOAT_CODES, *(name for name in GRIDS if re.fullmatch(r"int[48](_g\d+)?", name)))
"""Ways of storing a matrix of numbers; `int4_g32` has a scale for every 32 columns."""

_OURS = re.compile(rf"\.({LEFT}|{RIGHT}|{REST}|{'|'.join(CORES)})({SCALE})?$")
_LONGEST = 1 << 26  # rows or columns of a weight: beyond any model

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
    matrices `p1 r1`, `(r1 p2) r2` and `r2 p3`.
    """

    form: ClassVar[str] = "train"
    shape: tuple[int, int]
    modes: tuple[tuple[int, ...], tuple[int, ...]]
    ranks: tuple[int, ...]
    cores: str

    @property
    def name(self) -> str:
        """What is stored, in short: `TT 1,64,64,1 int8`."""
        return f"TT {','.join(map(str, self.ranks))} {self.cores}"

    @property
    def core_shapes(self) -> list[tuple[int, int]]:
        """Shapes of the cores as matrices."""
        p1, p2, p3 = Modes(*self.modes).sizes
        _, r1, r2, _ = self.ranks
        return [(p1, r1), (r1 * p2, r2), (r2, p3)]

    def code_of(self, suffix: str) -> str:
        """Return the code that a part is stored by."""
        del suffix
        return self.cores

    def parts(self) -> list[StoredPart]:
        """Return the stored tensors, codes before scales."""
        shapes = zip(CORES, self.core_shapes, strict=True)
        found = [part for suffix, shape in shapes for part in code_parts(self.cores, suffix, shape)]
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
        """Return the settings of a module."""
        return {"form": self.form, **asdict(self)}


Form = FactoredForm | TrainForm


def form_bytes(form: Form) -> int:
    """Return the bytes of all parts as stored."""
    sizes = {"F32": 4, "I32": 4, "F16": 2}
    return sum(sizes[dtype] * prod(shape) for _, dtype, shape in form.parts())


def train_rows(form: TrainForm, cores: Sequence[Float32], start: int, stop: int) -> Float32:
    """Return rows `[start, stop)` of a Tensor-Train; `cores` are those of `core_shapes`."""
    (_, m2, m3), (n1, n2, n3) = form.modes
    _, r1, r2, _ = form.ranks
    first = cores[0].reshape(-1, n1, r1)
    middle = cores[1].reshape(r1, m2, n2, r2)
    last = cores[2].reshape(r2, m3, n3)
    rows = np.empty((stop - start, form.shape[1]), np.float32)
    for block in range(start // m3, -(-stop // m3)):
        i1, i2 = divmod(block, m2)
        begin, end = max(start, block * m3), min(stop, (block + 1) * m3)
        inner = np.tensordot(first[i1], middle[:, i2], axes=1).reshape(n1 * n2, r2)
        part = inner @ last[:, begin - block * m3 : end - block * m3].reshape(r2, -1)
        apart = part.reshape(n1 * n2, end - begin, n3).transpose(1, 0, 2)
        rows[begin - start : end - start] = apart.reshape(end - begin, -1)[:, : form.shape[1]]
    return rows


def read_factored(stored: Checkpoint, settings: Mapping[str, Any]) -> dict[str, TensorRef]:
    """Return all tensors, factored weights computed row by row and under their plain names.

    `settings` is the `quantization_config`. Raises UnsupportedError for a version that is not known,
    DamagedFileError for settings that make no sense and for parts that are missing, left over or do not fit.
    """
    if settings.get("version") != VERSION:
        said = printable(str(settings.get("version")))
        raise UnsupportedError(
            f"config.json: factors of version {said} cannot be read; known: {VERSION}", path=stored.path
        )
    modules = settings.get("modules")
    if not isinstance(modules, Mapping):
        _refuse(stored, "modules is no map")
    tensors: dict[str, TensorRef] = {}
    taken: set[str] = set()
    recent = _Recent()
    for module, said in modules.items():
        weight = _Weight(stored, str(module), _form_of(stored, str(module), said), recent)
        taken.update(part.name for part in weight.parts)
        tensors[weight.name] = PackedTensor(
            weight.name, weight.form.shape, weight.form.name, weight.parts, weight.decode
        )
    for name, ref in stored.items():
        if name in tensors or (name not in taken and _OURS.search(name)):
            what = "is stored plainly and as factors" if name in tensors else "belongs to no factored weight"
            raise DamagedFileError(what, path=_file(ref, stored), tensor=name)
        if name not in taken:
            tensors[name] = ref
    return tensors


class _Recent:
    """The decoded factors of the weight that was read last: rows of embeddings are read a few at a time."""

    def __init__(self) -> None:
        self._held: tuple[str, dict[str, Float32]] = ("", {})

    def of(self, name: str) -> dict[str, Float32]:
        """Return the factors of a weight by suffix; those of another are let go."""
        held = self._held
        if held[0] != name:
            held = self._held = name, {}
        return held[1]


class _Weight:
    """One factored weight: its stored tensors, checked against its form."""

    def __init__(self, stored: Checkpoint, module: str, form: Form, recent: _Recent) -> None:
        self.name, self.form, self._recent = f"{module}.weight", form, recent
        self._by_suffix: dict[str, TensorRef] = {}
        for suffix, dtype, shape in form.parts():
            name = f"{module}.{suffix}"
            if name not in stored:
                raise DamagedFileError(f"is missing, {form.name} needs it", path=stored.path, tensor=name)
            ref = stored[name]
            if ref.dtype != dtype or ref.shape != shape:
                said = f"is {ref.dtype} {list(ref.shape)}, expected {dtype} {list(shape)}"
                raise DamagedFileError(said, path=_file(ref, stored), tensor=name)
            self._by_suffix[suffix] = ref

    @property
    def parts(self) -> list[TensorRef]:
        """The stored tensors."""
        return list(self._by_suffix.values())

    def decode(self, start: int, stop: int) -> Rows:
        """Return rows `[start, stop)`."""
        form = self.form
        if isinstance(form, TrainForm):
            cores = [
                self._whole(form.cores, suffix, shape)
                for suffix, shape in zip(CORES, form.core_shapes, strict=True)
            ]
            return train_rows(form, cores, start, stop)
        first, last, at = start, stop, np.arange(stop - start)
        if form.rows is not None:
            index = form.rows.index
            first, last = map(int, np.searchsorted(index, (start, stop)))
            at = index[first:last] - start
        kept = self._kept_rows(form, first, last)
        if form.kept == form.shape:
            return kept
        rows = np.zeros((stop - start, form.shape[1]), np.float32)
        columns = np.arange(form.shape[1]) if form.columns is None else form.columns.index
        rows[at[:, None], columns] = kept
        return rows

    def _kept_rows(self, form: FactoredForm, start: int, stop: int) -> Float32:
        """Return rows `[start, stop)` of those that are kept, the kept columns alone."""
        rows = np.zeros((stop - start, form.kept[1]), np.float32)
        end, first = min(stop, form.product_rows), max(start, form.first_rest)
        if form.factors is not None and start < end:
            left = self._numbers(form.factors, LEFT, (form.product_rows, form.rank), start, end)
            right = self._whole(form.factors, RIGHT, (form.rank, form.kept[1]))
            rows[: end - start] = left @ right
        if form.rest is not None and first < stop:
            shape = form.kept[0] - form.first_rest, form.kept[1]
            rest = self._numbers(form.rest, REST, shape, first - form.first_rest, stop - form.first_rest)
            rows[first - start :] += rest
        return rows

    def _whole(self, code: str, suffix: str, shape: tuple[int, int]) -> Float32:
        """Return all of a factor, decoded once while rows of the same weight are read."""
        held = self._recent.of(self.name)
        if suffix not in held:
            held[suffix] = self._numbers(code, suffix, shape, 0, shape[0])
        return held[suffix]

    def _numbers(self, code: str, suffix: str, shape: tuple[int, int], start: int, stop: int) -> Float32:
        """Return rows of a stored matrix of numbers of `shape`."""
        grid, ref = code_grid(code), self._by_suffix[suffix]
        if grid is None:
            return np.asarray(ref.read(start, stop), np.float32)
        raw = ref.raw(start, stop).reshape(stop - start, -1)
        scales = np.asarray(self._by_suffix[suffix + SCALE].read(start, stop), np.float32)
        return grid.dequantize(Coded(unpack_codes(raw, grid.bits, shape[1]), scales))


def _form_of(stored: Checkpoint, module: str, said: Any) -> Form:
    """Return a module's form from its settings."""
    try:
        form = _parsed(said)
        wrong = form.wrong()
    except (BitsmithError, KeyError, TypeError, ValueError) as error:
        _refuse(stored, f"{printable(module)}: {printable(str(error), 80)}")
    if wrong is not None:
        _refuse(stored, f"{printable(module)}: {wrong}")
    return form


def _parsed(said: Any) -> Form:
    """Return settings as a form. Raises KeyError, TypeError and ValueError for what is none."""
    if not isinstance(said, Mapping):
        raise TypeError("is no map")
    fields = {key: value for key, value in said.items() if key != "form"}
    fields["shape"] = _integers(fields["shape"], _LONGEST)
    if len(fields["shape"]) != 2 or min(fields["shape"]) < 1:
        raise ValueError(f"shape is {fields['shape']}, expected out and in")
    for key in ("factors", "rest", "cores"):
        if fields.get(key) is not None and fields[key] not in CODES:
            raise ValueError(f"{key} is {printable(str(fields[key]))}, known: {' '.join(CODES)}")
    if said.get("form") == TrainForm.form:
        fields["modes"] = tuple(_integers(part, _LONGEST) for part in fields["modes"])
        fields["ranks"] = _integers(fields["ranks"], _LONGEST)
        return TrainForm(**fields)
    if said.get("form") != FactoredForm.form:
        raise ValueError(f"form is {printable(str(said.get('form')))}, known: factored, train")
    for key in ("rank", "kernel"):
        if fields.get(key) is not None:
            [fields[key]] = _integers([fields[key]], _LONGEST)
    for key in ("rows", "columns"):
        if fields.get(key) is not None:
            blocks = fields[key]
            [size] = _integers([blocks["size"]], _LONGEST)
            fields[key] = Blocks(size, _integers(blocks["kept"], _LONGEST))
    return FactoredForm(**fields)


def _integers(values: Any, most: int) -> tuple[int, ...]:
    if not isinstance(values, list | tuple) or not all(type(value) is int for value in values):
        raise TypeError(f"{printable(str(values), 40)} is no list of integers")
    if any(not 0 <= value <= most for value in values):
        raise ValueError(f"{printable(str(values), 40)} is not within 0..{most}")
    return tuple(values)


def _refuse(stored: Checkpoint, said: str) -> NoReturn:
    raise DamagedFileError(f"config.json: quantization_config: {said}", path=stored.path)


def _file(ref: TensorRef, stored: Checkpoint) -> Path:
    return ref.file.path if isinstance(ref, StoredTensor) else stored.path
