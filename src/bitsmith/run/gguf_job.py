"""One GGUF being written: read once, encoded by all threads meanwhile, written where it stays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import TypeAdapter

from bitsmith.errors import BitsmithError, OutputError
from bitsmith.formats import Format, format_named
from bitsmith.numerics.threads import ahead, in_order
from bitsmith.progress import Progress
from bitsmith.run.encode import (
    Coded,
    Piece,
    Rounder,
    Rounding,
    Sums,
    TensorEncoder,
    Written,
    blocks_in,
    written,
)
from bitsmith.run.guide import rounding_key
from bitsmith.run.mixes import mix_named
from bitsmith.run.plan import TRANSFORMS_DIGEST_KEY, Plan, PlanRow, Source
from bitsmith.store import TensorInfo
from bitsmith.store.atomic import Finish
from bitsmith.store.checkpoint import Bytes, ComputedTensor, Rows, TensorRef
from bitsmith.store.gguf_writer import gguf_layout
from bitsmith.store.in_place import InPlace
from bitsmith.store.statistics import Statistics

KEPT_BYTES = 32 << 20
"""Whenever so many bytes of the output were written, they are kept for the next run should this one die."""

_AHEAD, _WAITING = 3, 3
"""Pieces that are read, and that wait to be written, before they are needed; the disk takes its time."""

_WRITTEN = TypeAdapter(Written)


class GgufJob:
    """A GGUF on its way onto the disk, and the records of its tensors.

    Tensors that statistics guide come first, in the statistics' order, and are kept one by one.
    """

    def __init__(
        self,
        source: Source,
        todo: Plan,
        out: Path,
        statistics: Statistics | None,
        rounder: Rounder,
        progress: Progress,
        *,
        follows: bool = False,
    ) -> None:
        self._source, self._plan, self._out = source, todo, out
        self._statistics, self._rounder, self._follows = statistics, rounder, follows
        self._encoder = TensorEncoder(statistics, rounder, source.checkpoint.path)
        self._tensors = {tensor.gguf_name: tensor for tensor in source.tensors}
        self._written: dict[str, Written] = {}
        self._progress, self._done = progress, 0
        infos = [TensorInfo(row.gguf_name, row.shape, row.type) for row in todo.rows]
        self._layout = gguf_layout(source.metadata_for(mix_named(todo.type)), infos)
        self.resumed = 0

    @property
    def written(self) -> tuple[Written, ...]:
        """The records of all tensors, in the file's order."""
        return tuple(self._written[row.gguf_name] for row in self._plan.rows)

    @property
    def digest(self) -> str:
        """The SHA-256 of the file, once it is whole."""
        return self._file.digest()

    def write(self, overwrite: bool, finish: Finish) -> None:
        """Encode and write everything; `finish` is told before the file appears.

        Raises OutputError as `InPlace` does, and for what a killed run made of other weights.
        """
        checkpoint = self._source.checkpoint
        sources = checkpoint.files
        size = self._layout.nbytes
        with InPlace(self._out, self._key(), size, overwrite=overwrite, sources=sources) as self._file:
            self._take_up(overwrite)
            self._file.write_last(0, self._layout.header)
            for row in self._ordered([row for row in self._plan.rows if self._is_guided(row)]):
                self._guided(row)
            self._stream([row for row in self._plan.rows if row.gguf_name not in self._written])
            self._file.publish(finish)

    def _key(self) -> dict[str, Any]:
        """Return what finished tensors depend on, all but the weights that they are made of.

        Statistics that follow the encoded layers depend on all weights, and not every checkpoint can tell
        what was read of it: the digest of all is in the key then.
        """
        checkpoint = self._source.checkpoint
        hashes = checkpoint.hash_reads()
        content = checkpoint.identity if hashes and not self._follows else checkpoint.source_digest
        statistics = None if self._statistics is None else self._statistics.digest
        return {
            **rounding_key(content, self._plan.digest, statistics, self._rounder),
            "transforms": self._source.metadata.get(TRANSFORMS_DIGEST_KEY),
            "header bytes": len(self._layout.header),
        }

    def _take_up(self, overwrite: bool) -> None:
        """Go on behind the tensors that a killed run finished, of weights that are still the same."""
        kept: dict[str, str] = {}
        for value in self._file.finished.values():
            kept |= value["sources"]
        for done, (name, sha256) in enumerate(kept.items()):
            self._progress("check", done, len(kept))
            if self._source.checkpoint.sha256_of(name) == sha256:
                continue
            if overwrite:
                self._file.forget()
                break
            raise OutputError(
                "has finished pieces of a run with another source, in which this tensor was different; "
                "run that again to go on, or pass --overwrite to begin anew",
                path=self._file.path,
                tensor=name,
            )
        self._source.checkpoint.digests_of_read()
        self.resumed = self._file.resumed
        for value in self._file.finished.values():
            self._note(_WRITTEN.validate_python(value["written"]))

    def _is_guided(self, row: PlanRow) -> bool:
        return self._encoder.is_guided(self._tensors[row.gguf_name], row)

    def _ordered(self, guided: Sequence[PlanRow]) -> list[PlanRow]:
        """Return `guided` in the statistics' order, and tell them of the tensors that nothing guides."""
        if self._statistics is None:
            return list(guided)
        named = {row.gguf_name for row in guided}
        for row in self._plan.rows:
            tensor = self._tensors[row.gguf_name]
            if row.gguf_name not in named and row.type != "F32":
                self._statistics.encoded(tensor.spec, _rounded(tensor.ref, format_named(row.type)))
        place = self._statistics.place
        return sorted(guided, key=lambda row: place(self._tensors[row.gguf_name].spec))

    def _guided(self, row: PlanRow) -> None:
        """Encode and keep a tensor that statistics guide, unless a killed run did, and tell them of it."""
        name, tensor, first = row.gguf_name, self._tensors[row.gguf_name], self._layout.offsets[row.gguf_name]

        def write(blocks: Iterable[Bytes]) -> None:
            done = 0
            for part in blocks:
                done += self._file.write(first + done, part)
                self._report(done)
            self._check_size(row, done)

        if name not in self._written:
            made = self._encoder.encode_guided(tensor, row, write)
            self._file.keep({name: _kept(made, self._source.checkpoint.digests_of_read())})
            self._note(made)
        if self._statistics is not None:
            stored = blocks_in(self._file.path, name, row.shape, format_named(row.type), first)
            self._statistics.encoded(tensor.spec, stored)

    def _stream(self, rows: Sequence[PlanRow]) -> None:
        """Encode all tensors that nothing guides, in the order of the file."""
        pieces = ahead(self._pieces(rows), _AHEAD)
        with closing(in_order(self._coded, pieces, spare=_WAITING, overlaps=True)) as stream:
            self._taken(stream)

    def _taken(self, stream: Iterable[tuple[Coded, dict[str, str]]]) -> None:
        unkept, unkept_bytes = dict[str, Any](), 0
        total, seconds, done = Sums(), 0.0, 0
        for coded, sources in stream:
            row = coded.piece.row
            done += self._file.write_last(self._layout.offsets[row.gguf_name] + done, coded.blocks)
            total, seconds = total.plus(coded.sums), seconds + coded.seconds
            self._report(done)
            if not coded.piece.is_last:
                continue
            self._check_size(row, done)
            made = written(row, total, seconds, Rounding("nearest"))
            self._note(made)
            unkept[row.gguf_name], unkept_bytes = _kept(made, sources), unkept_bytes + done
            total, seconds, done = Sums(), 0.0, 0
            if unkept_bytes >= KEPT_BYTES:
                self._file.keep(unkept)
                unkept, unkept_bytes = {}, 0

    def _pieces(self, rows: Sequence[PlanRow]) -> Iterator[_Read]:
        checkpoint = self._source.checkpoint
        for row in rows:
            for piece in self._encoder.pieces(self._tensors[row.gguf_name], row):
                yield _Read(piece, checkpoint.digests_of_read() if piece.is_last else {})
        _ = checkpoint.source_digest  # what went into no tensor is read for it, while others are encoded

    def _coded(self, read: _Read) -> tuple[Coded, dict[str, str]]:
        return self._encoder.coded(read.piece), read.sources

    def _check_size(self, row: PlanRow, nbytes: int) -> None:
        if nbytes != row.nbytes:
            raise BitsmithError(
                f"was encoded to {nbytes} bytes, expected {row.nbytes}",
                path=self._out,
                tensor=row.gguf_name,
            )

    def _note(self, made: Written) -> None:
        self._written[made.gguf_name] = made
        self._done += made.nbytes
        self._report(0)

    def _report(self, more_bytes: int) -> None:
        self._progress("compress", self._done + more_bytes, self._plan.tensor_bytes)


class _Read(NamedTuple):
    """A piece that was read, and if it is its tensor's last the digests of what the tensor is made of."""

    piece: Piece
    sources: dict[str, str]


def _kept(made: Written, sources: Mapping[str, str]) -> dict[str, Any]:
    """Return what the journal says of a finished tensor."""
    return {"written": asdict(made), "sources": dict(sources)}


def _rounded(ref: TensorRef, form: Format) -> TensorRef:
    """Return `ref` as `form` holds it by the plain search, computed on read."""

    def read(start: int, stop: int) -> Rows:
        rows = np.ascontiguousarray(ref.read(start, stop), np.float32)
        flat = rows.reshape(-1, rows.shape[-1])
        return form.decode(form.encode(flat)).reshape(rows.shape)

    return ComputedTensor(ref.name, ref.shape, form.name, read)
