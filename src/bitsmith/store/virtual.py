"""Checkpoints without weights on the disk: `planted.json` says how every tensor is computed when it is read.

They read as the folder of safetensors does that holds the same tensors, and have its digest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from bitsmith.errors import BitsmithError, DamagedFileError, printable
from bitsmith.formats import format_named
from bitsmith.numerics.planted import Planted, check_planted, planted_rows, pool_values
from bitsmith.store.checkpoint import Bytes, Checkpoint, Rows, TensorRef
from bitsmith.store.content import HashedTensor
from bitsmith.store.safetensors import ITEM_BYTES, load_json, read_config, side_file
from bitsmith.store.stored import plain_decoder

PLAN_NAME = "planted.json"
PLAN_SCHEMA = 1
_DTYPES = ("F32", "F16", "BF16")
_MAX_SIZE = 1 << 40
_PLACED = ("rows", "columns")  # of a plan, given by the shape


@dataclass(frozen=True)
class Normal:
    """Normal values of a mean and a deviation, from place `first` on of the seed's long sequence."""

    mean: float
    deviation: float
    first: int
    seed: int


class VirtualTensor(HashedTensor):
    """A tensor computed on read, as if it were stored in its dtype: F32, F16 or BF16."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: str, plan: Planted | Normal) -> None:
        self.name = name
        self.shape = shape
        self.dtype = dtype
        self.plan = plan
        self._decode = plain_decoder(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes as if stored."""
        return ITEM_BYTES[self.dtype] * self.size

    def read(self, start: int = 0, stop: int | None = None) -> Rows:
        """Return rows `[start, stop)`, rounded to the tensor's dtype."""
        stop = self.n_rows if stop is None else stop
        return self._decode(self.raw(start, stop)).reshape(stop - start, *self.shape[1:])

    def raw(self, start: int = 0, stop: int | None = None) -> Bytes:
        """Return the bytes that would be stored of rows `[start, stop)`, flat."""
        stop = self.n_rows if stop is None else stop
        width = self.nbytes // self.n_rows
        return self._hashed(start * width, self.stored(start * width, stop * width))

    def _load(self, first: int, last: int) -> Bytes:
        width = self.nbytes // self.n_rows
        start = first // width
        return self._computed(start, -(-last // width))[first - start * width : last - start * width]

    def _computed(self, start: int, stop: int) -> Bytes:
        if isinstance(self.plan, Planted):
            rows = planted_rows(self.plan, start, stop)
        else:
            width = prod(self.shape[1:])
            plan = self.plan
            count = (stop - start) * width
            rows = pool_values(plan.seed, plan.first + start * width, count, plan.mean, plan.deviation)
        encoded: Bytes = format_named(self.dtype).encode(rows.reshape(1, -1)).reshape(-1).view(np.uint8)
        return encoded

    def facts(self) -> dict[str, Any]:
        """Return the tensor's entry in `planted.json`."""
        kind = "planted" if isinstance(self.plan, Planted) else "normal"
        plan = {
            one.name: getattr(self.plan, one.name) for one in fields(self.plan) if one.name not in _PLACED
        }
        return {"dtype": self.dtype, "shape": list(self.shape), kind: plan}


class VirtualCheckpoint(Checkpoint):
    """A checkpoint whose tensors are computed; its digest covers the bytes that would be stored."""

    def __init__(self, path: Path, tensors: Mapping[str, TensorRef], config: dict[str, Any]) -> None:
        super().__init__(path, tensors)
        self.config = config
        self.files = (path / PLAN_NAME,)
        self._identity = config


def is_virtual(folder: Path) -> bool:
    """Tell whether a folder holds a plan and no weights: shards that were lost are not made up for."""
    if not (folder / PLAN_NAME).exists() or any(folder.glob("*.safetensors*")):
        return False
    return _plan(folder).get("virtual") is True


def open_virtual(folder: Path) -> VirtualCheckpoint:
    """Open a folder with `config.json` and `planted.json`.

    Raises DamagedFileError naming the tensor, what was found and what was expected.
    """
    plan, path = _plan(folder), folder / PLAN_NAME
    if plan.get("schema") != PLAN_SCHEMA:
        said = printable(repr(plan.get("schema")), 40)
        raise DamagedFileError(f"has schema {said}, expected {PLAN_SCHEMA}", path=path)
    entries = plan.get("tensors")
    if not isinstance(entries, dict) or not entries:
        raise DamagedFileError("has no tensors", path=path)
    tensors = {}
    for name, entry in entries.items():
        try:
            tensors[name] = _tensor(name, entry)
        except BitsmithError as error:
            raise DamagedFileError(error.message, path=path, tensor=name) from error
    return VirtualCheckpoint(folder, tensors, read_config(folder))


def _plan(folder: Path) -> dict[str, Any]:
    return load_json(side_file(folder, PLAN_NAME) or b"", folder / PLAN_NAME, "plan")


def _tensor(name: str, entry: Any) -> VirtualTensor:
    if not isinstance(entry, dict) or entry.get("dtype") not in _DTYPES:
        raise BitsmithError(f"expected a dtype of {', '.join(_DTYPES)}, a shape and a plan")
    shape = entry.get("shape")
    if not isinstance(shape, list) or not shape or not all(type(n) is int and n > 0 for n in shape):
        raise BitsmithError(f"has shape {printable(repr(shape), 80)}, expected positive lengths")
    if prod(shape) > _MAX_SIZE:
        raise BitsmithError(f"has shape {printable(repr(shape), 80)}: too large")
    if "planted" in entry:
        planted = _values(Planted, entry["planted"], rows=shape[0], columns=prod(shape[1:]))
        check_planted(planted)
        return VirtualTensor(name, tuple(shape), entry["dtype"], planted)
    normal = _values(Normal, entry.get("normal"))
    if min(normal.first, normal.seed) < 0 or not max(abs(normal.mean), abs(normal.deviation)) < 1e6:
        raise BitsmithError("expected a seed and a place from 0, and a mean and a deviation below 1e6")
    return VirtualTensor(name, tuple(shape), entry["dtype"], normal)


def _values(kind: type[Any], given: Any, **placed: int) -> Any:
    """Return a plan of a kind from its entry: every field, each a number of its type."""
    wanted = {one.name: float if one.type == "float" else int for one in fields(kind)}
    expected = wanted.keys() - placed.keys()
    if not isinstance(given, dict) or given.keys() != expected:
        raise BitsmithError(
            f"is planned by {printable(repr(given), 80)}, expected {', '.join(sorted(expected))}"
        )
    for key, value in given.items():
        if type(value) not in ((float, int) if wanted[key] is float else (int,)) or not abs(value) < 1 << 63:
            raise BitsmithError(f"has {key} {printable(repr(value), 40)}, expected a number")
    return kind(**{key: wanted[key](value) for key, value in given.items()}, **placed)
