"""Weights kept as factors (`store.factored`), read: computed for the rows that are asked for."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from bitsmith.errors import BitsmithError, DamagedFileError, UnsupportedError, printable
from bitsmith.formats.format import Float32
from bitsmith.formats.integer import Coded, unpack_codes
from bitsmith.store.checkpoint import Checkpoint, Rows, TensorRef
from bitsmith.store.factored import (
    CODES,
    COLUMN_SCALE,
    CORES,
    LEFT,
    REST,
    RIGHT,
    ROW_SCALE,
    SCALE,
    VERSION,
    WHOLE,
    Blocks,
    FactoredForm,
    Form,
    TrainForm,
    TrainsForm,
    code_grid,
    train_rows,
)
from bitsmith.store.packed import PackedTensor
from bitsmith.store.stored import StoredTensor

_OURS = re.compile(
    rf"\.(({LEFT}|{RIGHT}|{REST})|({WHOLE}|{LEFT}|{RIGHT})({'|'.join(CORES)}|{ROW_SCALE}|{COLUMN_SCALE}))({SCALE})?$"
)
_LONGEST = 1 << 22  # rows or columns of a weight: beyond any model, and a row of them is 16 MiB
_HELD_BYTES = 1 << 25  # of a decoded factor that is kept; small files can hold trains of any size


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
            return self._train(form, WHOLE, start, stop)
        if isinstance(form, TrainsForm):
            return self._product(form, start, stop)
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

    def _product(self, form: TrainsForm, start: int, stop: int) -> Float32:
        """Return rows `[start, stop)` of the product of two trains, of whose right one not all is held."""
        rank, columns = form.right.shape
        left = self._train(form.left, LEFT, start, stop)
        step = max(1, _HELD_BYTES // (4 * columns))
        if rank <= step:
            held = self._recent.of(self.name)
            if RIGHT not in held:
                held[RIGHT] = self._train(form.right, RIGHT, 0, rank)
            return left @ held[RIGHT]
        rows = np.zeros((stop - start, columns), np.float32)
        for first in range(0, rank, step):
            last = min(first + step, rank)
            rows += left[:, first:last] @ self._train(form.right, RIGHT, first, last)
        return rows

    def _train(self, form: TrainForm, begin: str, start: int, stop: int) -> Float32:
        """Return rows `[start, stop)` of a train."""
        shapes = zip(CORES, form.core_shapes, strict=True)
        cores = [self._whole(form.cores, begin + suffix, shape) for suffix, shape in shapes]
        scales = None
        if form.scales:
            by_row, by_column = (
                self._whole("f16", begin + suffix, (length,))
                for suffix, length in zip((ROW_SCALE, COLUMN_SCALE), form.shape, strict=True)
            )
            scales = by_row, by_column
        return train_rows(form, cores, start, stop, scales)

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

    def _whole(self, code: str, suffix: str, shape: tuple[int, ...]) -> Float32:
        """Return all of a factor, decoded once while rows of the same weight are read."""
        held = self._recent.of(self.name)
        if suffix not in held:
            held[suffix] = self._numbers(code, suffix, shape, 0, shape[0])
        return held[suffix]

    def _numbers(self, code: str, suffix: str, shape: tuple[int, ...], start: int, stop: int) -> Float32:
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
    kinds: dict[Any, Callable[[dict[str, Any]], Form]] = {
        FactoredForm.form: _factored,
        TrainForm.form: _train,
        TrainsForm.form: _trains,
    }
    if said.get("form") not in kinds:
        raise ValueError(f"form is {printable(str(said.get('form')))}, known: {', '.join(kinds)}")
    return kinds[said["form"]](fields)


def _trains(fields: dict[str, Any]) -> TrainsForm:
    sides = []
    for side in (LEFT, RIGHT):
        said = fields.pop(side)
        if not isinstance(said, Mapping) or said.get("form") != TrainForm.form:
            raise ValueError(f"{side} is no train")
        sides.append(_train({key: value for key, value in said.items() if key != "form"}))
    return TrainsForm(*sides, **fields)


def _train(fields: dict[str, Any]) -> TrainForm:
    _common(fields, "cores")
    fields["modes"] = tuple(_integers(part, _LONGEST) for part in fields["modes"])
    fields["ranks"] = _integers(fields["ranks"], _LONGEST)
    if type(fields.get("scales", True)) is not bool:
        raise TypeError(f"scales is {printable(str(fields['scales']), 40)}")
    return TrainForm(**fields)


def _factored(fields: dict[str, Any]) -> FactoredForm:
    _common(fields, "factors", "rest")
    for key in ("rank", "kernel"):
        if fields.get(key) is not None:
            [fields[key]] = _integers([fields[key]], _LONGEST)
    for key in ("rows", "columns"):
        if fields.get(key) is not None:
            blocks = fields[key]
            [size] = _integers([blocks["size"]], _LONGEST)
            fields[key] = Blocks(size, _integers(blocks["kept"], _LONGEST))
    return FactoredForm(**fields)


def _common(fields: dict[str, Any], *codes: str) -> None:
    """Check the shape and the codes, which all forms have."""
    fields["shape"] = _integers(fields["shape"], _LONGEST)
    if len(fields["shape"]) != 2 or min(fields["shape"]) < 1:
        raise ValueError(f"shape is {fields['shape']}, expected out and in")
    for key in codes:
        if fields.get(key) is not None and fields[key] not in CODES:
            raise ValueError(f"{key} is {printable(str(fields[key]))}, known: {' '.join(CODES)}")


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
