"""Formats side by side on one model: size, divergence from the original, coherence; claims checked."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from bitsmith.archs import claim
from bitsmith.errors import BitsmithError, OutputError, UnsupportedError, printable
from bitsmith.progress import Progress, silent
from bitsmith.run.calibrate import calibrate
from bitsmith.run.coherence import Coherence, Prompts, measure_coherence, prompts_of
from bitsmith.run.evaluate import Reference, open_model
from bitsmith.run.format_claims import with_claims
from bitsmith.run.format_rows import ORIGINAL, FormatRow, FormatsStudy
from bitsmith.run.studied_formats import StudiedFormat, studied
from bitsmith.run.vocabulary import Vocabulary
from bitsmith.store import GgufCheckpoint, open_checkpoint
from bitsmith.store.atomic import remove
from bitsmith.store.checkpoint import Checkpoint
from bitsmith.store.journal import Journal, content_key, result_folder, write_result
from bitsmith.store.manifest import remove_output
from bitsmith.store.packed import refuse_rounded
from bitsmith.store.statistics import open_statistics
from bitsmith.store.stored import FLOATS

RESULT_NAME = "formats.json"
PROMPTS = 8
PROMPT_TOKENS = 32
WRITTEN_TOKENS = 64

_JOURNAL_NAME = ".formats.journal"
_WORK_NAME = ".formats.work"
_LEARNED = ".formats.statistics"  # the folder, and its entry in the journal
_KEPT = {
    "linear_attn": (".linear_attn.",),
    "embedding and head": ("embed_tokens", "lm_head"),
    "vision": ("visual.", "vision"),
    "MTP": ("mtp.",),
}


def study_formats(
    model: Path,
    text: Path,
    out: Path,
    *,
    formats: Sequence[str] | None = None,
    statistics: Path | None = None,
    calibration: Path | None = None,
    prompts: Sequence[str] | None = None,
    written_tokens: int = WRITTEN_TOKENS,
    ctx_tokens: int = 512,
    chunks: int | None = None,
    seed: int = 0,
    keep: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
) -> FormatsStudy:
    """Write `model` (a Hugging Face folder) in every format of `STUDIED`, or in `formats`, and measure each.

    Divergence is measured on the UTF-8 `text` as `evaluate` does, coherence as `run.coherence` says, after
    `prompts` (default: the first 32 tokens of 8 chunks, evenly spread). Rows of error feedback need
    `statistics` (of `calibrate`), or the text `calibration` to collect them on; without either they are
    unmeasured, as is any format that refuses the model. `formats.json` in the folder `out` gets the result.
    Artifacts are deleted once measured; with `keep` they stay in `out`, under the row's name. A killed run
    goes on with the rows it had finished.

    Raises BitsmithError for an unknown format and as `evaluate` does, UnsupportedError for a GGUF or packed
    weights, OutputError where `out` holds a result without `overwrite` or cannot be written.
    """
    started = time.monotonic()
    chosen = studied(formats)
    result_folder(out, RESULT_NAME, overwrite, [model])
    with Reference(model, text, ctx_tokens, chunks, seed, progress) as reference:
        _refuse_source(reference.model.source)
        task = _Task(reference, prompts, written_tokens, progress)
        learned = calibration if statistics is None else statistics
        key = _key(task, learned, statistics is None)
        journal = Journal(out / _JOURNAL_NAME, key, overwrite=overwrite)
        with journal, _work_folder(out) as work:
            resumed = len(set(journal.entries) - {_LEARNED})
            known = _statistics(model, out, statistics, calibration, journal, progress)
            run = _Study(task, model, out, work, known, keep, journal)
            result = with_claims(
                FormatsStudy(
                    model=printable(str(model)),
                    rows=(run.original(), *(run.row(one) for one in chosen)),
                    protocol=reference.protocol,
                    prompts=task.prompt_texts,
                    prompt_tokens=max(map(len, task.prompts.tokens)),
                    written_tokens=written_tokens,
                    statistics=None if learned is None else printable(str(learned)),
                    resumed=resumed,
                    seconds=time.monotonic() - started,
                )
            )
            write_result(out / RESULT_NAME, result.to_json())
            journal.remove()  # before what it speaks of
            if known is not None and statistics is None and not keep:
                remove_output(known)
    return result


class _Task:
    """The original, the text and the prompts: what every row is measured against."""

    def __init__(
        self,
        reference: Reference,
        prompts: Sequence[str] | None,
        written_tokens: int,
        progress: Progress,
    ) -> None:
        self.reference, self.progress = reference, progress
        vocabulary, protocol = Vocabulary(reference.model), reference.protocol
        path = reference.model.checkpoint.path
        if written_tokens < 1:
            raise BitsmithError(f"{written_tokens} tokens after a prompt leave nothing to measure", path=path)
        if prompts is None:
            length = min(PROMPT_TOKENS, protocol.ctx_tokens)
            self.prompts = prompts_of(reference.tokens, PROMPTS, length, written_tokens, protocol.seed)
        else:
            found = tuple(tuple(vocabulary.encode(prompt)) for prompt in prompts)
            self.prompts = Prompts(found, written_tokens, protocol.seed)
        if not self.prompts.tokens or not all(self.prompts.tokens):
            raise BitsmithError("a prompt has no tokens to continue", path=path)
        self.prompt_texts = tuple(vocabulary.tokenizer.decode(list(one)) for one in self.prompts.tokens)

    def coherence(self, path: Path, own: Coherence | None) -> Coherence:
        """Return how the model at `path` continues the prompts, beside the original's own way."""
        with open_model(path) as model:
            return measure_coherence(model, self.reference.model, self.prompts, own, self.progress)


class _Study:
    """The rows of one study, each taken from the journal where it is there."""

    def __init__(
        self,
        task: _Task,
        model: Path,
        out: Path,
        work: Path,
        statistics: Path | None,
        keep: bool,
        journal: Journal,
    ) -> None:
        self._task, self._model, self._statistics = task, model, statistics
        self._folder, self._keep, self._journal = out if keep else work, keep, journal
        self._own: Coherence | None = None

    def original(self) -> FormatRow:
        """Return the original's row, the yardstick of all others."""
        row = self._kept(ORIGINAL)
        if row is None:
            row = self._done(self._measured(FormatRow(ORIGINAL, "original", "as stored"), self._model))
        self._own = row.coherence
        return row

    def row(self, one: StudiedFormat) -> FormatRow:
        """Return the row of `one`, made and measured now unless that was done before."""
        path = self._folder / f"{one.name}{one.suffix}"
        row = self._kept(one.name)
        if row is not None and (not self._keep or row.file_bytes is None or path.exists()):
            return row
        row = FormatRow(one.name, one.family, one.what)
        if one.guided and self._statistics is None:
            return replace(row, unmeasured="no statistics of activations were given")
        started = time.monotonic()
        try:
            statistics = self._statistics if one.guided else None
            rounding = one.make(self._model, path, statistics, self._task.progress)
        except OutputError:
            raise
        except BitsmithError as error:
            return self._done(replace(row, unmeasured=printable(error.message, 500)))
        row = self._measured(replace(row, rounding=rounding), path)
        if not self._keep:
            for left in self._folder.iterdir():  # writers may put files beside the artifact
                remove(left)
        return self._done(replace(row, seconds=time.monotonic() - started))

    def _measured(self, row: FormatRow, path: Path) -> FormatRow:
        with open_checkpoint(path) as stored:
            row = replace(
                row,
                file_bytes=sum(file.stat().st_size for file in stored.files),
                weights=sum(ref.size for ref in stored.values()),
                float_bytes={} if isinstance(stored, GgufCheckpoint) else _float_bytes(stored),
            )
        try:
            found, scores = self._task.reference.measure(path)
            chunk_kld = tuple(scores.kld.mean(axis=1).tolist())
            row = replace(row, measures=found.measures, chunk_kld_nats=chunk_kld)
            if row.name != ORIGINAL and self._own is None:
                return replace(row, unmeasured="coherence: the original's own was not measured")
            row = replace(row, coherence=self._task.coherence(path, self._own))
        except BitsmithError as error:
            row = replace(row, unmeasured=printable(error.message, 500))
        return row

    def _kept(self, name: str) -> FormatRow | None:
        found = self._journal.entries.get(name)
        return None if found is None else TypeAdapter(FormatRow).validate_python(found)

    def _done(self, row: FormatRow) -> FormatRow:
        self._journal.add(row.name, asdict(row))
        return row


def _float_bytes(stored: Checkpoint) -> dict[str, int]:
    """Return the bytes of the matrices that are stored as floats, by part of the model."""
    found: dict[str, int] = {}
    for name, ref in stored.items():
        if ref.dtype in FLOATS and len(ref.shape) == 2 and min(ref.shape) > 1:
            part = next(
                (part for part, words in _KEPT.items() if any(word in name for word in words)), "other"
            )
            found[part] = found.get(part, 0) + ref.nbytes
    return found


def _refuse_source(stored: Checkpoint) -> None:
    if isinstance(stored, GgufCheckpoint):
        raise UnsupportedError("is a GGUF file, expected a Hugging Face folder", path=stored.path)
    for ref in stored.values():
        refuse_rounded(ref, stored.path)


@contextmanager
def _work_folder(out: Path) -> Iterator[Path]:
    """Yield an empty folder in `out` that is gone at the end, however that comes."""
    work = out / _WORK_NAME
    remove(work)
    work.mkdir()
    try:
        yield work
    finally:
        remove(work)


def _statistics(
    model: Path,
    out: Path,
    statistics: Path | None,
    calibration: Path | None,
    journal: Journal,
    progress: Progress,
) -> Path | None:
    """Return the statistics that were given, or those of `calibration`, collected now or by a killed run."""
    if statistics is not None or calibration is None:
        return statistics
    path = out / _LEARNED
    if _LEARNED not in journal.entries:
        collected = calibrate(model, calibration, path, overwrite=True, progress=progress)
        journal.add(_LEARNED, collected.text_sha256)
    return path


def _key(task: _Task, learned: Path | None, is_text: bool) -> dict[str, Any]:
    """Return what the rows depend on: source, text, prompts, statistics, options."""
    checkpoint = task.reference.model.source
    digest: str | None = None
    if learned is not None and is_text:
        with suppress(OSError):  # calibrate tells what is wrong
            digest = hashlib.sha256(learned.read_bytes()).hexdigest()
    elif learned is not None:
        digest = open_statistics(learned, [spec for spec, _ in claim(checkpoint)]).digest
    said = {**asdict(task.reference.protocol), "prompts": asdict(task.prompts)}
    return content_key(checkpoint, {**said, "calibration" if is_text else "statistics": digest})
