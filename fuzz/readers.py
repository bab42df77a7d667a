"""What is fuzzed: one reader each, with what any input may do to it: open, or be refused in one line.

`read` takes an input, puts it where the reader looks for it, opens it and touches all that it gives: names,
shapes, types, sizes and a bounded part of every tensor. What comes out of it as another exception than
BitsmithError, or breaks an `_expect`, is a fault.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from bitsmith.errors import BitsmithError
from bitsmith.run.inspect import inspect
from bitsmith.run.plan import Source, open_source
from bitsmith.run.plan_file import read_plan, read_transforms
from bitsmith.run.study_file import load_study
from bitsmith.store import Checkpoint, open_cellm, open_checkpoint, open_gguf, open_safetensors
from bitsmith.store.imatrix import read_imatrix
from bitsmith.store.paired import PLACES, open_paired
from bitsmith.store.statistics import open_statistics

SLICE_BYTES = 1 << 16
"""Of a tensor as float32 that is read at once: the first and the last slice of so many, at least a row."""

DIGEST_EVERY = 16
"""Of inputs whose size is a multiple of it every byte is read, of the others parts."""

FOLDER_FILES = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.gguf",
)
MODEL_FILES = ("config.json", "model.safetensors", "model.gguf", "tokenizer.json", "tokenizer_config.json")
STATISTICS_FILES = ("statistics.json", "tokens.safetensors", "saliency.safetensors", "layer.000.safetensors")
PAIRED_FILES = (
    "paired.json",
    "tokens.safetensors",
    "embed.safetensors",
    "final.safetensors",
    "pair.000.safetensors",
    "teacher.000.safetensors",
    "teacher.001.safetensors",
    "student.000.safetensors",
    "student.001.safetensors",
)


class FaultError(Exception):
    """A reader gave something that cannot be."""


@dataclass(frozen=True)
class Reader:
    """A reader: `parts` are the names of the files of an input, one file without them."""

    name: str
    read: Callable[[Path], None]
    parts: tuple[str, ...] = ()
    file: str = "input"
    is_binary: bool = True
    is_yaml: bool = False

    def __call__(self, data: bytes, folder: Path) -> bool:
        """Read `data` by way of `folder`; tell whether it was taken. Raises what is a fault."""
        path = folder / self.file
        if self.parts:
            _unpack(data, self.parts, path)
        else:
            _write(path, data)
        try:
            self.read(path)
        except BitsmithError as error:
            _check_refusal(error, path)
            return False
        return True


def pack(files: Mapping[str, bytes], parts: tuple[str, ...]) -> bytes:
    """Return files as one input: for each the place of its name in `parts`, its length, its bytes."""
    return b"".join(
        bytes([parts.index(name)]) + len(data).to_bytes(4, "little") + data for name, data in files.items()
    )


def split(data: bytes, parts: tuple[str, ...]) -> dict[str, bytes]:
    """Return the files of an input; any bytes are some."""
    files: dict[str, bytes] = {}
    at = 0
    while at + 5 <= len(data):
        end = at + 5 + int.from_bytes(data[at + 1 : at + 5], "little")
        files[parts[data[at] % len(parts)]] = data[at + 5 : end]
        at = end
    return files


def scratch() -> Path:
    """Return a new folder for inputs, in memory where there is such a place."""
    memory = Path("/dev/shm")  # noqa: S108 (a folder of its own is made in it)
    return Path(tempfile.mkdtemp(prefix="bitsmith-fuzz-", dir=memory if os.access(memory, os.W_OK) else None))


def _unpack(data: bytes, parts: tuple[str, ...], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    files = split(data, parts)
    for name in parts:
        if name in files:
            _write(folder / name, files[name])
        else:
            (folder / name).unlink(missing_ok=True)


def _write(path: Path, data: bytes) -> None:
    """Write a file; pathlib takes as long over it as a reader over the header."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)


def _expect(sound: bool, what: str) -> None:
    if not sound:
        raise FaultError(what)


def _check_refusal(error: BitsmithError, path: Path) -> None:
    """Expect one printable line that names the file; memory that ran out is no bad input."""
    said = str(error)
    _expect(str(path) in said, f"a refusal does not name the file: {said!r}")
    _expect("\n" not in said and said.isprintable(), f"a refusal is no printable line: {said!r}")
    _expect(len(said) < 20_000, f"a refusal has {len(said)} characters")
    cause: BaseException | None = error
    while cause is not None:
        _expect(not isinstance(cause, MemoryError), f"memory ran out behind: {said!r}")
        cause = cause.__cause__ or cause.__context__


def _touch(opened: Checkpoint, stored_bytes: int) -> None:
    """Look at everything of a checkpoint, and read a part of every tensor."""
    with opened, np.errstate(all="ignore"):  # any bytes are floats, and some of those overflow
        _expect(all(isinstance(key, str) for key in opened.metadata), "metadata without a name")
        for name, ref in opened.items():
            _expect(ref.name == name, f"{name!r} calls itself {ref.name!r}")
            _expect(all(type(length) is int and length >= 0 for length in ref.shape), f"shape {ref.shape}")
            _expect(ref.nbytes >= 0, f"{name!r} has {ref.nbytes} bytes")
            slices = ref.slices(SLICE_BYTES)
            first = next(slices, None)
            last = None if first is None else (max(first[0], ref.n_rows - (first[1] - first[0])), ref.n_rows)
            for bounds in {first, last} - {None}:
                _read(ref, *bounds)
        if stored_bytes % DIGEST_EVERY == 0:
            _read_all(opened, stored_bytes)


def _read_all(opened: Checkpoint, stored_bytes: int) -> None:
    """Read every stored byte, through the digest and tensor by tensor."""
    _expect(len(opened.source_digest) == 64, "no digest")
    _expect(sum(file.stat().st_size for file in opened.files) <= stored_bytes, "files of others")
    for name, ref in opened.items():
        stored = getattr(ref, "_nbytes", None)
        found = None if stored is None else ref.raw().size
        _expect(found == stored, f"{name!r} has {found} bytes, says {stored}")


def _read(ref: Any, start: int, stop: int) -> None:
    try:
        rows = ref.read(start, stop)
    except BitsmithError as error:
        _expect("\n" not in str(error), f"not one line: {error}")
        return
    expected = (stop - start, *ref.shape[1:]) if ref.shape else ()
    _expect(rows.shape == expected, f"{ref.name!r} gave {rows.shape}, expected {expected}")


def _checkpoint(opener: Callable[[Path], Checkpoint]) -> Callable[[Path], None]:
    def read(path: Path) -> None:
        size = path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.iterdir())
        _touch(opener(path), size)

    return read


def _inspect(path: Path) -> None:
    """Describe a model: what its config or its GGUF's metadata say is believed, or refused."""
    found = inspect(path)
    _expect(found.parameters >= 0 and found.stored_bytes >= 0, "less than nothing")
    json.dumps(found.to_json())


def _imatrix(path: Path) -> None:
    found = read_imatrix(path)
    for name, (sums, count) in found.entries.items():
        _expect(bool(name) and sums.ndim == 1 and sums.dtype == np.float32, f"{name!r}: {sums.dtype}")
        _expect(bool(np.isfinite(sums).all()) and bool((sums >= 0).all()), f"{name!r} has unsound sums")
        _expect(count > 0, f"{name!r} counts {count}")
    _expect(all(isinstance(text, str) for text in found.datasets), "a text without a name")
    _expect(len(found.sha256) == 64, "no digest")


@dataclass(frozen=True)
class Site:
    """A matrix that the fuzzed statistics are of."""

    name: str
    site: str | None
    shape: tuple[int, ...]
    role: str = "linear"
    column_steps: tuple[Any, ...] = ()

    @property
    def gguf_name(self) -> str:
        """Its name in a GGUF."""
        return self.name

    @staticmethod
    def importance_from_gguf(vector: Any) -> Any:
        """Take the columns as they are."""
        return vector


SITES = (
    Site("blk.0.attn_q.weight", "layers.0.mixer.in", (4, 4)),
    Site("blk.0.ffn_down.weight", "layers.0.down.in", (4, 6)),
    Site("output.weight", "head.in", (5, 4), "head"),
)


def _statistics(path: Path) -> None:
    opened = open_statistics(path, SITES)
    with np.errstate(all="ignore"):
        opened.tokens()
        for site in SITES:
            _ = opened.knows(site), opened.place(site)
            found = opened.of(site)
            _expect(found is None or found.diagonal.shape == site.shape[1:], f"{site.name}: wrong width")
            opened.saliency(site.site)


def _paired(path: Path) -> None:
    opened = open_paired(path)
    opened.tokens()
    moments = [opened.embedded(), opened.final(), opened.normed()]
    for pair in range(len(opened.layer_map)):
        moments += [getattr(opened, place)(pair) for place in PLACES]
    for one in moments:
        _expect(one.ts.shape == (len(one.mean_t), len(one.mean_s)), "moments of several widths")
    for side, model in (("teacher", opened.manifest.teacher), ("student", opened.manifest.student)):
        for layer in range(model.layers):
            opened.samples(side, layer)
            opened.samples_between(side, layer)


@cache
def model_source() -> Source:
    """Return the bundled model that plans are read for."""
    from bitsmith.lab import models

    return open_source(open_checkpoint(Path(next(iter(models.__path__))) / "qwen3-student"))


def _plan(path: Path) -> None:
    transforms = read_transforms(path)
    _expect(all(str(transform) for transform in transforms), "a transform without a name")
    plan = read_plan(path, model_source())
    _expect(plan.file_bytes > 0 and len(plan.rows) > 0, "an empty plan")


def _study(path: Path) -> None:
    study = load_study(path)
    _expect(bool(study.models), "no models")
    for name in study.models:
        study.model(name)
    for name in study.merges:
        study.teacher(name)
    _ = study.rows, [study.text(name) for name in study.texts]


def _listed(readers: Iterable[Reader]) -> dict[str, Reader]:
    return {reader.name: reader for reader in readers}


READERS = _listed(
    [
        Reader("safetensors", _checkpoint(open_safetensors), file="model.safetensors"),
        Reader("gguf", _checkpoint(open_gguf), file="model.gguf"),
        Reader("cellm", _checkpoint(open_cellm), file="model.cellm"),
        Reader("imatrix", _imatrix, file="imatrix.gguf"),
        Reader("imatrix_dat", _imatrix, file="imatrix.dat"),
        Reader("folder", _checkpoint(open_checkpoint), FOLDER_FILES, "model"),
        Reader("model", _inspect, MODEL_FILES, "model"),
        Reader("statistics", _statistics, STATISTICS_FILES, "statistics"),
        Reader("paired", _paired, PAIRED_FILES, "paired"),
        Reader("plan", _plan, file="plan.yaml", is_binary=False, is_yaml=True),
        Reader("study", _study, file="study.yaml", is_binary=False, is_yaml=True),
    ]
)
