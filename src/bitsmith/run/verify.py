"""Verify an output: its files against their digests, every tensor against what it was made of."""

from __future__ import annotations

import math
import os
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bitsmith.errors import BitsmithError, DamagedFileError, printable
from bitsmith.log import event
from bitsmith.progress import Progress, silent
from bitsmith.run.decoded import gguf_sources, relative_error
from bitsmith.run.encode import in_memory
from bitsmith.run.plan import SourceTensor
from bitsmith.run.record import MODELS
from bitsmith.run.transforms import read_sidecar
from bitsmith.store import open_checkpoint
from bitsmith.store.atomic import files_in
from bitsmith.store.checkpoint import Checkpoint, TensorRef
from bitsmith.store.factored import METHOD as FACTORED
from bitsmith.store.gguf import GgufCheckpoint
from bitsmith.store.hub import local
from bitsmith.store.manifest import Fault, check_manifest, read_record, record_of
from bitsmith.store.packed import UnpackedView
from bitsmith.store.stored import StoredTensor

MODEL = "model"
"""The source in a record that tensors are compared with."""

SAME, COMPUTED = 1e-9, 1e-6
"""How far a figure may be from the recorded one, as a share of it: of stored codes, of computed products."""

_LEAST = 1e-13  # squared rounding of float32, where the recorded error is next to none


class RecordedTensor(BaseModel):
    """A tensor in the record."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)
    name: str
    source: str = ""
    type: str
    shape: list[int]
    relative_error: float | None = Field(default=None, ge=0)


class RecordedSource(BaseModel):
    """A model in the record."""

    model_config = ConfigDict(strict=True, extra="ignore")
    name: str = ""
    path: str | None = None
    hub: str | None = None
    sha256: str


class Recorded(BaseModel):
    """What `verify` reads of a record."""

    model_config = ConfigDict(strict=True, extra="ignore")
    output: str
    kind: str
    bitsmith: str
    sources: dict[str, RecordedSource] = {}
    tensors: list[RecordedTensor] = []


@dataclass(frozen=True)
class TensorCheck:
    """A tensor read back: its error now and as recorded (`relative_error` of `run.decoded`)."""

    name: str
    type: str
    relative_error: float | None
    recorded: float | None
    agrees: bool

    def to_json(self) -> dict[str, Any]:
        """Return the check as plain values; an error that is not finite is None."""
        error = self.relative_error
        known = error is not None and math.isfinite(error)
        return {**asdict(self), "relative_error": error if known else None}


@dataclass(frozen=True)
class Verification:
    """What `verify` found. `skipped` says why tensors were not compared, empty where they were."""

    out: Path
    kind: str
    files: int
    faults: tuple[Fault, ...]
    tensors: tuple[TensorCheck, ...] = ()
    source: str = ""
    skipped: str = ""
    digests_only: bool = False

    @property
    def passed(self) -> bool:
        """Whether everything is as it was written, as far as was asked."""
        return not self.faults and (self.digests_only or not self.skipped)

    def refuse(self) -> None:
        """Raise DamagedFileError or BitsmithError that names the first thing that is wrong, if any is."""
        if self.faults:
            raise self.faults[0].error(len(self.faults) - 1)
        if not self.passed:
            raise BitsmithError(self.skipped, path=self.out)

    def to_json(self) -> dict[str, Any]:
        """Return the verification as plain values."""
        faults = [{"path": str(one.path), "tensor": one.tensor, "what": one.what} for one in self.faults]
        return {
            "kind": "verification",
            "out": str(self.out),
            "output_kind": self.kind,
            "passed": self.passed,
            "files": self.files,
            "faults": faults,
            "source": self.source,
            "skipped": self.skipped,
            "digests_only": self.digests_only,
            "tensors": [one.to_json() for one in self.tensors],
        }


def verify(
    out: Path, source: Path | None = None, *, digests_only: bool = False, progress: Progress = silent
) -> Verification:
    """Hold an output against its manifest, and every tensor of it against the model that it was made of.

    Each tensor is decoded again and its error, in the coordinates of the output (transforms are done to the
    source's tensors as the file's vectors say), held against the recorded one. `source` is where the model
    lies now; None: where the record says. Without it, or with one that has changed since, the output has not
    passed, unless only digests were asked for.

    Raises BitsmithError where there is no manifest or no record, DamagedFileError for one that is broken.
    """
    faults = list(check_manifest(out))
    record = _recorded(out)
    found = _Findings(out, record, faults)
    if not digests_only and record.kind in MODELS:
        try:
            with ExitStack() as stack:
                found.compare(stack, source, progress)
        except BitsmithError as error:
            found.add(error.path or out, error.message, error.tensor)
    return found.result(digests_only)


class _Findings:
    """What was found so far."""

    def __init__(self, out: Path, record: Recorded, faults: list[Fault]) -> None:
        self._out, self._record, self._faults = out, record, faults
        self._files = len(files_in(out)) if out.exists() else 0
        self._tensors: list[TensorCheck] = []
        self._source = self._skipped = ""

    def add(self, path: Path, what: str, tensor: str | None = None) -> None:
        """Note that a file or a tensor is not as it was written."""
        self._faults.append(Fault(path, what, tensor))

    def result(self, digests_only: bool) -> Verification:
        """Return what was found."""
        return Verification(
            self._out,
            self._record.kind,
            self._files,
            tuple(self._faults),
            tuple(self._tensors),
            self._source,
            self._skipped,
            digests_only,
        )

    def compare(self, stack: ExitStack, source: Path | None, progress: Progress) -> None:
        """Open both models and compare every tensor; the model's digest is taken from what that reads."""
        facts = self._record.sources.get(MODEL)
        if facts is None:
            raise DamagedFileError("names no model that the output was made of", path=record_of(self._out))
        model = self._opened(stack, source, facts)
        if model is None:
            return
        model.hash_reads()
        faults = list(self._faults)
        try:
            self._compare(stack, model, progress)
        except BitsmithError:
            if model.source_digest == facts.sha256:
                raise
        if model.source_digest != facts.sha256:  # what was found is about another model
            self._faults, self._tensors = faults, []
            digests = f"digest {model.source_digest[:16]}…, recorded {facts.sha256[:16]}…"
            other = "is not the model that this was made of, or has changed since"
            self._skipped = f"tensors are not compared: {printable(self._source)} {other} ({digests})"

    def _compare(self, stack: ExitStack, model: Checkpoint, progress: Progress) -> None:
        """Compare every tensor with its source."""
        stored = stack.enter_context(open_checkpoint(self._out))
        sources = _sources(model, stored)
        recorded = {one.name: one for one in self._record.tensors}
        for name in stored:
            if name not in recorded:
                self.add(self._out, "is not in the record", name)
        for done, (name, one) in enumerate(recorded.items()):
            progress("verify", done, len(recorded))
            event("verify", file=str(self._out), tensor=name)
            if name not in stored:
                self.add(self._out, "is in the record, not in the file", name)
            else:
                self._check(one, sources.get(name), stored[name])
        progress("verify", len(recorded), len(recorded))

    def _opened(self, stack: ExitStack, source: Path | None, facts: RecordedSource) -> Checkpoint | None:
        """Return the model that the output was made of, None where it cannot be had."""
        try:
            path = _place(facts, self._out) if source is None else local(source)
            model = stack.enter_context(open_checkpoint(path))
        except BitsmithError as error:
            self._skipped = f"tensors are not compared: {error}; pass --source MODEL, or --digests-only"
            return None
        self._source = str(path)
        return model

    def _check(self, recorded: RecordedTensor, source: _Source | None, ref: TensorRef) -> None:
        """Hold one tensor against its source and the record."""
        agrees = _same_type(recorded.type, ref) and recorded.shape == list(ref.shape)
        if not agrees:
            wanted = f"{printable(recorded.type)} {recorded.shape}"
            self.add(self._out, f"is {ref.dtype} {list(ref.shape)}, the record says {wanted}", ref.name)
        error = None
        if recorded.relative_error is None and self._record.kind != "merge":  # which may add a head
            self.add(record_of(self._out), "tells no error", ref.name)
        elif recorded.relative_error is not None and agrees:
            if source is None:
                self.add(self._out, f"is made of no tensor of {self._source}", ref.name)
            else:
                with source.held():
                    error = relative_error(source.ref, ref)
                agrees = _close(error, recorded.relative_error, COMPUTED if source.is_computed else SAME)
                if not agrees:
                    said = (
                        f"has a relative error of {error:.12g}, recorded were {recorded.relative_error:.12g}"
                    )
                    self.add(self._out, said, ref.name)
        agrees = agrees and (error is None) == (recorded.relative_error is None)
        self._tensors.append(TensorCheck(ref.name, recorded.type, error, recorded.relative_error, agrees))


class _Source(NamedTuple):
    """What a tensor was made of; `is_computed` where products of floats are in between."""

    ref: TensorRef
    is_computed: bool
    tensor: SourceTensor | None = None

    def held(self) -> AbstractContextManager[None]:
        """Hold in memory what would else be read more than once, as compress does."""
        return nullcontext() if self.tensor is None else in_memory(self.tensor)


def _sources(model: Checkpoint, stored: Checkpoint) -> dict[str, _Source]:
    """Return what the tensors of an output were made of, by their names in it."""
    if not isinstance(stored, GgufCheckpoint):
        factored = isinstance(stored, UnpackedView) and stored.packing == FACTORED
        return {name: _Source(ref, factored) for name, ref in model.items()}
    found = read_sidecar(stored)
    return {
        name: _Source(tensor.ref, bool(tensor.spec.transforms), tensor)
        for name, tensor in gguf_sources(model, found).items()
    }


def _recorded(out: Path) -> Recorded:
    try:
        return Recorded.model_validate(read_record(out))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DamagedFileError(f"{printable(where)}: {first['msg']}", path=record_of(out)) from error


def _place(facts: RecordedSource, out: Path) -> Path:
    """Return where the model lies that a record names; raises BitsmithError if it is not there."""
    if facts.path:
        path = Path(os.path.normpath(out.absolute().parent / facts.path))
        if path.exists() or not facts.hub:
            return path
    if facts.hub is None:
        raise BitsmithError(f"tells no place of {printable(facts.name)}", path=record_of(out))
    return local(facts.hub)


def _same_type(recorded: str, ref: TensorRef) -> bool:
    """Tell whether a tensor has the recorded type; packed ones are known by their scheme there."""
    return not isinstance(ref, StoredTensor) or recorded.casefold() == ref.dtype.casefold()


def _close(error: float, recorded: float, share: float) -> bool:
    return abs(error - recorded) <= max(_LEAST, share * recorded)
