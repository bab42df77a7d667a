"""The SPI recipe against its controls on one model: perplexity and divergence at equal counts and bytes."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter

from bitsmith.archs import claim
from bitsmith.errors import BitsmithError, printable
from bitsmith.progress import Progress, silent
from bitsmith.run.critical import (
    CHUNKS,
    Amount,
    Linear,
    Scores,
    checked_amount,
    choose,
    default_amount,
    inverse,
    linears_of,
    parse_critical,
    rule_named,
    spectral_scores,
)
from bitsmith.run.evaluate import Reference
from bitsmith.run.folder import write_folder
from bitsmith.run.spi import SCHEME, tensor_types
from bitsmith.run.spi_claims import with_claims
from bitsmith.run.spi_figures import comparisons, correlations
from bitsmith.run.spi_kld import Alone, alone_in_nf4
from bitsmith.run.spi_rows import MEASURED, PURE, RULES, Equal, LinearRow, SpiRow, SpiStudy, SpiTable
from bitsmith.store.hub import local
from bitsmith.store.journal import Journal, content_key, result_folder, write_result
from bitsmith.store.manifest import remove_output

RESULT_NAME = "spi.json"
JOURNAL_NAME = ".spi.journal"
RANDOM_SEEDS = (0, 1, 2, 3, 4)


def study_spi(
    model: Path,
    text: Path,
    out: Path,
    *,
    calibration: Path | None = None,
    critical: str | None = None,
    random_seeds: Sequence[int] = RANDOM_SEEDS,
    ctx_tokens: int = 512,
    chunks: int | None = None,
    calibration_chunks: int = CHUNKS,
    assay: Path | None = None,
    seed: int = 0,
    keep: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
) -> SpiStudy:
    """Write `model` (a Hugging Face folder) by the recipe and by its controls, and measure each on `text`.

    Rows: all linears NF4; those kept by α and by the tail exponent, both ends (each the other's inverse);
    random choices, one per seed; and with a `calibration` text those whose KLD alone in NF4 is largest and,
    for comparison, smallest. They are made twice: at equal counts (`critical`: a number of linears; default
    129/248 of them), and at equal bytes (a size; default what α-high keeps at that count). Every row is
    written, read back, measured as `evaluate` does and deleted, unless `keep` (equal choices are kept once).
    `spi.json` in the folder `out` gets the result. A killed run goes on with the spectra, sensitivities and
    rows it had finished.

    Raises BitsmithError for options that make no sense and as `evaluate` and `write_folder` do, OutputError
    where `out` holds a result without `overwrite` or cannot be written.
    """
    started = time.monotonic()
    amount = None if critical is None else _amount(critical)
    if len(set(random_seeds)) != len(random_seeds):
        raise BitsmithError("a random seed is given twice")
    model = local(model, progress)
    result_folder(out, RESULT_NAME, overwrite, [model])
    with Reference(model, text, ctx_tokens, chunks, seed, progress) as reference:
        checkpoint = reference.model.checkpoint
        linears = linears_of(claim(checkpoint))
        checked_amount(amount, linears)
        options = {
            **asdict(reference.protocol),
            "calibration": _digest(calibration),
            "calibration chunks": calibration_chunks,
            "assay": _digest(assay),
        }
        key = content_key(checkpoint, options)
        with Journal(out / JOURNAL_NAME, key, overwrite=overwrite) as journal:
            resumed = len(journal.entries)
            run = _Run(reference, linears, model, out, journal, keep, progress)
            spectra = spectral_scores(checkpoint, linears, assay, progress, journal)
            alone = None
            if calibration is not None:
                alone = alone_in_nf4(
                    model, linears, calibration, ctx_tokens, calibration_chunks, progress, journal
                )
            tables = run.tables(_choices(linears, spectra, alone, amount, random_seeds))
            figures = _linear_rows(linears, spectra, alone)
            result = with_claims(
                SpiStudy(
                    model=printable(str(model)),
                    original=reference.artifact,
                    protocol=reference.protocol,
                    calibration=None if alone is None else alone.protocol,
                    linears=figures,
                    tables=tables,
                    comparisons=comparisons(tables),
                    correlations=correlations(figures, seed),
                    resumed=resumed,
                    seconds=time.monotonic() - started,
                )
            )
            write_result(out / RESULT_NAME, result.to_json())
            journal.remove()
    return result


class _Run:
    """Rows made and measured one by one, each taken from the journal where it is there."""

    def __init__(
        self,
        reference: Reference,
        linears: Sequence[Linear],
        model: Path,
        out: Path,
        journal: Journal,
        keep: bool,
        progress: Progress,
    ) -> None:
        self._reference, self._linears = reference, linears
        self._model, self._out, self._journal, self._keep = model, out, journal, keep
        self._progress = progress

    def tables(self, choices: Sequence[_Choices]) -> tuple[SpiTable, ...]:
        """Return every choice as measured."""
        total, done, tables = sum(len(one.kept) for one in choices), 0, []
        for one in choices:
            rows = []
            for name, kept in one.kept:
                self._progress("rows", done, total)
                rows.append(self._row(f"{one.equal}-{name.replace(' ', '-')}", name, kept))
                done += 1
            tables.append(SpiTable(one.equal, one.asked, tuple(rows)))
        self._progress("rows", total, total)
        return tuple(tables)

    def _row(self, label: str, name: str, kept: tuple[str, ...]) -> SpiRow:
        """Return the row of a choice; equal choices are made once."""
        entry = "row " + hashlib.sha256("\n".join(kept).encode()).hexdigest()
        made = self._journal.entries.get(entry)
        if made is None or (self._keep and not (self._out / made["name"]).exists()):
            self._journal.add(entry, asdict(self._made(label, kept)))
        row = TypeAdapter(SpiRow).validate_python(self._journal.entries[entry])
        return replace(row, name=name)

    def _made(self, label: str, kept: tuple[str, ...]) -> SpiRow:
        path = self._out / (label if self._keep else ".spi.work")
        try:
            write_folder(
                self._model,
                path,
                SCHEME,
                tensor_types=tensor_types(self._linears, kept),
                rounder="nearest",
                overwrite=True,
                progress=self._progress,
            )
            found, scores = self._reference.measure(path)
        finally:
            if not self._keep:
                remove_output(path)
        return SpiRow(
            name=label,
            names=kept,
            kept_bytes=sum(linear.nbytes for linear in self._linears if linear.name in kept),
            file_bytes=found.candidate.file_bytes,
            bpw=found.candidate.bpw,
            measures=found.measures,
            chunk_kld_nats=tuple(scores.kld.mean(axis=1).tolist()),
        )


@dataclass(frozen=True)
class _Choices:
    """What one table holds: names of rows, and the linears each keeps."""

    equal: Equal
    asked: str
    kept: tuple[tuple[str, tuple[str, ...]], ...]


def _choices(
    linears: Sequence[Linear],
    spectra: Mapping[str, Mapping[str, float | None]],
    alone: Alone | None,
    amount: Amount | None,
    seeds: Sequence[int],
) -> tuple[_Choices, _Choices]:
    """Return both tables' choices: equal counts, then equal bytes."""
    scores: dict[str, Scores] = {
        measure: {name: row[measure] for name, row in spectra.items()} for measure in ("alpha", "tail")
    }
    if alone is not None:
        scores["kld"] = alone.nats
    count = amount if amount is not None and amount.count is not None else default_amount(linears)
    budget = amount if amount is not None and amount.budget_bytes is not None else None
    if budget is None:
        first = choose(linears, scores["alpha"], by=RULES[0], amount=count)
        budget = Amount(budget_bytes=first.kept_bytes)

    measured = (MEASURED, inverse(MEASURED)) if alone is not None else ()

    def table(equal: Equal, asked: Amount) -> _Choices:
        found: dict[str, tuple[str, ...]] = {PURE: ()}
        for by in (*RULES, *measured):
            found[by] = choose(linears, scores[rule_named(by)[0]], by=by, amount=asked).names
        for seed in seeds:
            found[f"random {seed}"] = choose(linears, None, by="random", amount=asked, seed=seed).names
        return _Choices(equal, str(asked), tuple(found.items()))

    return table("count", count), table("bytes", budget)


def _linear_rows(
    linears: Sequence[Linear], spectra: Mapping[str, Mapping[str, float | None]], alone: Alone | None
) -> tuple[LinearRow, ...]:
    return tuple(
        LinearRow(
            linear.name,
            linear.role,
            linear.layer,
            linear.shape,
            linear.nbytes,
            **spectra[linear.name],
            kld_nats=None if alone is None else alone.nats[linear.name],
        )
        for linear in linears
    )


def _amount(critical: str) -> Amount:
    amount = parse_critical(critical)
    if amount.threshold is not None:
        raise BitsmithError(f"{amount} differs from rule to rule; a study compares equal counts or bytes")
    return amount


def _digest(path: Path | None) -> str | None:
    """Return a file's SHA-256. Raises BitsmithError if it cannot be read."""
    try:
        return None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise BitsmithError(f"cannot be read: {error.strerror or error}", path=path) from error
