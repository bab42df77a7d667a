"""The seeds' claims that can be checked, checked on one model: held, not held, or not tested, and why."""

from __future__ import annotations

import time
from collections.abc import Sequence
from math import prod
from pathlib import Path

from bitsmith.errors import BitsmithError, OutputError, printable
from bitsmith.progress import Progress, silent
from bitsmith.run import matrix_claims, text_claims
from bitsmith.run.claim_evidence import (
    CALIBRATION_CHUNKS,
    FORMATS,
    RANDOM_SEEDS,
    Evidence,
    Setting,
    check_setting,
    sha256_of,
)
from bitsmith.run.seed_claims import (
    ClaimsStudy,
    Cost,
    Judged,
    SeedClaim,
    TestedClaim,
    chosen_claims,
    undecided,
)
from bitsmith.run.spi_rows import RULES
from bitsmith.run.study_formats import PROMPT_TOKENS, PROMPTS, WRITTEN_TOKENS
from bitsmith.store import open_checkpoint
from bitsmith.store.journal import result_folder, write_result

RESULT_NAME = "claims.json"
JOURNAL_NAME = ".claims.journal"
CHUNKS = 8
CLAIM_MODULES = (matrix_claims, text_claims)
"""Importing these registers their claims; a new file of claims goes here."""

_WITHOUT_TEXT = ("assay", "factors", "trains")


def study_claims(
    model: Path,
    out: Path,
    *,
    text: Path | None = None,
    statistics: Path | None = None,
    calibration: Path | None = None,
    only: Sequence[str] | None = None,
    ctx_tokens: int = 512,
    chunks: int = CHUNKS,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress = silent,
) -> ClaimsStudy:
    """Test every claim of `SEED_CLAIMS`, or those called `only`, on `model` (a Hugging Face folder).

    Without a UTF-8 `text` weights alone are read, and claims that need a forward are not tested. Claims about
    importance read `statistics` (of `calibrate`, or an imatrix), or those of the text `calibration`, on which
    the bases of the trunk are found too. What a claim lacks, or what this model does not allow, makes it NOT
    TESTED and says why. `claims.json` in the folder `out` gets the result, `out/evidence` what the assay and
    the studies of SPI and of formats found. A killed run goes on with the pieces it had finished.
    `claims_cost` says beforehand what this takes.

    Raises BitsmithError for an unknown claim, options that make no sense, a model that cannot be opened and
    texts that cannot be read; OutputError where `out` holds a result without `overwrite` or cannot be
    written.
    """
    started = time.monotonic()
    chosen = chosen_claims(only)
    if chunks < 1:
        raise BitsmithError(f"{chunks} chunks leave nothing to measure")
    setting = Setting(model, text, calibration, statistics, ctx_tokens, chunks, seed)
    check_setting(setting)
    result_folder(out, RESULT_NAME, overwrite, [model])
    with Evidence(setting, out, JOURNAL_NAME, progress, overwrite=overwrite) as evidence:
        tested = []
        for done, one in enumerate(chosen):
            progress("claims", done, len(chosen))
            tested.append(_tested(one, evidence))
        progress("claims", len(chosen), len(chosen))
        result = ClaimsStudy(
            model=printable(str(model)),
            text=_named(text),
            text_sha256=sha256_of(text),
            calibration=_named(calibration),
            statistics=_named(statistics),
            ctx_tokens=ctx_tokens,
            chunks=chunks,
            seed=seed,
            cost=claims_cost(
                model,
                only=only,
                text=text,
                calibration=calibration if statistics is None else None,
                ctx_tokens=ctx_tokens,
                chunks=chunks,
            ),
            claims=tuple(tested),
            resumed=evidence.resumed,
            seconds=time.monotonic() - started,
        )
        write_result(out / RESULT_NAME, result.to_json())
        evidence.journal.remove()
    return result


def claims_cost(
    model: Path,
    *,
    only: Sequence[str] | None = None,
    text: Path | None = None,
    calibration: Path | None = None,
    ctx_tokens: int = 512,
    chunks: int = CHUNKS,
) -> tuple[Cost, ...]:
    """Return what the claims take, a row per piece of evidence, before anything is done.

    `multiply_adds` counts weights times tokens of forwards, for spectra rows × columns × the shorter side,
    and for Tensor-Trains what projecting on their outer cores takes; encoding comes on top. Every matrix is
    measured; what codings leave on at most 4,096 rows of each. Pieces that need a text are left out without
    one; `calibration` is meant where there are no statistics. Raises as `study_claims` does for names and
    models.
    """
    chosen = chosen_claims(only)
    with open_checkpoint(model) as checkpoint:
        shapes = [ref.shape for ref in checkpoint.values()]
    counted = _Counted(shapes, ctx_tokens, chunks)
    readers: dict[str, list[str]] = {}
    for one in chosen:
        for piece in one.needs:
            if piece in _WITHOUT_TEXT or text is not None:
                readers.setdefault(piece, []).append(one.name)
    if any(piece not in _WITHOUT_TEXT for piece in readers):
        readers["original"] = []
    if calibration is None:
        readers.pop("statistics", None)
    return tuple(Cost(piece, tuple(names), *counted.cost(piece)) for piece, names in readers.items())


class _Counted:
    """Work of each piece, from the shapes of a model and the tokens of a text."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], ctx_tokens: int, chunks: int) -> None:
        self._matrices = [(shape[0], prod(shape[1:])) for shape in shapes if len(shape) > 1]
        self._weights = float(sum(map(prod, shapes)))
        self._tokens, self._said = ctx_tokens * chunks, f"{chunks} × {ctx_tokens} tokens"

    def cost(self, piece: str) -> tuple[str, float]:
        """Return a piece's work in words, and its multiply-adds."""
        if piece in _WITHOUT_TEXT:
            return self._of_weights(piece)
        said, forward = self._said, self._weights * self._tokens
        folders = 2 * (1 + len(RULES) + len(RANDOM_SEEDS))
        files, written = 1 + len(FORMATS), 4 * PROMPTS * (PROMPT_TOKENS + WRITTEN_TOKENS)
        known = {
            "original": (f"a forward over {said}, shared by all that is measured against it", forward),
            "spi": (f"{folders} folders, written and run over {said}", folders * forward),
            "formats": (
                f"{files} files, run over {said}, and {written:,} tokens written and judged of each",
                files * (forward + self._weights * written),
            ),
            "statistics": (
                f"a forward and a backward over at most {CALIBRATION_CHUNKS} × 512 tokens",
                5 * self._weights * 512 * CALIBRATION_CHUNKS,
            ),
            "tiers": (f"a forward over twice {said}", 2 * forward),
        }
        return known.get(piece, (f"a file, written and run over {said}", forward))

    def _of_weights(self, piece: str) -> tuple[str, float]:
        work = float(sum(rows * columns * min(rows, columns) for rows, columns in self._matrices))
        if piece == "assay":
            return f"spectra and codings of {len(self._matrices)} matrices", work
        if piece == "factors":
            largest = max(map(prod, self._matrices), default=0)  # an embedding or a head
            layers = [one for one in self._matrices if prod(one) < largest]
            return "the FFN's matrices once more, in factors", float(sum(prod(m) * min(m) for m in layers))
        size = max(map(prod, self._matrices), default=0)
        return "searches over ranks of embedding and head", 64.0 * size * round(size ** (1 / 3))


def _tested(one: SeedClaim, evidence: Evidence) -> TestedClaim:
    started = time.monotonic()
    try:
        found = one.judge(evidence)
        if found.outcome == "NOT TESTED":
            found = found._replace(found=undecided(found.measure) + found.found)
    except OutputError:
        raise
    except BitsmithError as error:
        found = Judged("NOT TESTED", printable(str(error.message), 500))
    return TestedClaim(
        one.name,
        one.seed,
        one.words,
        one.test,
        one.rule,
        *found,
        seconds=time.monotonic() - started,
    )


def _named(path: Path | None) -> str | None:
    return None if path is None else printable(str(path))
