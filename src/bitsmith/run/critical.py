"""Which linears of a model are critical: by their spectra, by measured KL divergence, or at random.

The published recipe ("Singularity Principle Index", Qwen3.5-4B) keeps 129 "critical cognitive layers" in 16
bits, found by the "power-law spectral decay (alpha) of weight matrices". It says neither how alpha is
measured, nor which end of it is critical, nor where the line lies. So each of the measures that its words
allow is offered with both ends, and beside them what it was never held against: a random choice, and one by
measured KL divergence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from bitsmith.archs import TensorSpec, claim
from bitsmith.errors import BitsmithError, printable
from bitsmith.log import event
from bitsmith.numerics.power_law import fit_tail, log_slope
from bitsmith.numerics.spectrum import describe, singular_values
from bitsmith.progress import Progress, silent
from bitsmith.run.budget import parse_target
from bitsmith.store import open_checkpoint
from bitsmith.store.checkpoint import Checkpoint, TensorRef
from bitsmith.store.journal import Journal

Measure = Literal["alpha", "tail", "r90", "kld", "random"]
End = Literal["high", "low"]

SEED_COUNT, SEED_LINEARS = 129, 248
"""Linears that the published recipe keeps, and those of its model's text layers."""
DEFAULT_BY = "alpha-high"
CTX_TOKENS, CHUNKS = 512, 16
"""Calibration text of `kld`: tokens per chunk, and chunks."""

_SPECTRAL: tuple[Measure, ...] = ("alpha", "tail", "r90")
_RULES: dict[str, tuple[Measure, End]] = {
    **{f"{measure}-{end}": (measure, end) for measure in (*_SPECTRAL, "kld") for end in get_args(End)},
    "kld": ("kld", "high"),
    "random": ("random", "high"),
}
BY = tuple(_RULES)
"""How linears are ranked; `kld` is `kld-high`."""

_MEANING = {
    "alpha": "α, the decay of log σ over log i",
    "tail": "the power-law exponent of the tail of σ²",
    "r90": "r90, the share of singular values that holds 90 % of their sum",
    "kld": "mean KLD with that matrix alone in NF4",
}
_THRESHOLD = re.compile(r"\s*([a-z0-9]+)\s*([<>])\s*([-+]?[0-9.]+(?:e[-+]?[0-9]+)?)\s*", re.ASCII)
_COUNT = re.compile(r"\s*([0-9]{1,9})\s*", re.ASCII)
_MAX_ASSAY_BYTES = 1 << 30

Scores = Mapping[str, float | None]
"""What a measure says of each linear; None where it is undefined."""


@dataclass(frozen=True)
class Amount:
    """How much is kept: `count` linears, at most `budget_bytes` of them, or those beyond a `threshold`.

    Exactly one is set; `by` is the ranking that a threshold such as `alpha>0.8` implies.
    """

    count: int | None = None
    budget_bytes: int | None = None
    threshold: float | None = None
    by: str | None = None

    def __str__(self) -> str:
        if self.count is not None:
            return f"{self.count} linears"
        if self.budget_bytes is not None:
            return f"at most {self.budget_bytes:,} bytes"
        measure, end = rule_named(self.by or DEFAULT_BY)
        return f"{measure} {'>' if end == 'high' else '<'} {self.threshold:g}"


@dataclass(frozen=True)
class Linear:
    """A linear layer of the text model's blocks (`out in`), with its bytes as stored."""

    name: str
    role: str
    layer: int
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Selection:
    """Which linears are kept, and why; `scores` is None for a random choice.

    `protocol` says what the scores were measured on where that needed a text.
    """

    by: str
    amount: Amount
    seed: int
    linears: tuple[Linear, ...]
    scores: Scores | None
    names: tuple[str, ...]
    protocol: str | None = None

    @property
    def kept_bytes(self) -> int:
        """Bytes of the kept linears as stored."""
        kept = set(self.names)
        return sum(linear.nbytes for linear in self.linears if linear.name in kept)

    @property
    def rule(self) -> str:
        """The choice in one sentence."""
        measure, end = rule_named(self.by)
        if measure == "random":
            order = f"at random (seed {self.seed})"
        else:
            order = f"by {_MEANING[measure]}, {'largest' if end == 'high' else 'smallest'} first"
        return f"{len(self.names)} of {len(self.linears)} linears {order}; asked for {self.amount}"

    def to_json(self) -> dict[str, Any]:
        """Return the selection as plain values."""
        return {**asdict(self), "kept_bytes": self.kept_bytes, "rule": self.rule}


def rule_named(by: str) -> tuple[Measure, End]:
    """Return the measure, and the end of it that is kept, of a ranking of `BY`.

    Raises BitsmithError for another name.
    """
    if by not in _RULES:
        raise BitsmithError(f"ranking {printable(by)!r} is not known; known: {', '.join(BY)}")
    return _RULES[by]


def inverse(by: str) -> str:
    """Return the ranking that keeps the other end.

    >>> inverse("alpha-high")
    'alpha-low'
    """
    measure, end = rule_named(by)
    if measure == "random":
        raise BitsmithError("a random ranking has no other end; choose another seed")
    return f"{measure}-{'low' if end == 'high' else 'high'}"


def parse_critical(text: str) -> Amount:
    """Return what `--critical` asks for: `129`, `3.9GB` or `alpha>0.8` (`<`: the other end; also `tail`, …).

    Raises BitsmithError for anything else.
    """
    shown = printable(text, 64)
    if found := _COUNT.fullmatch(text):
        return Amount(count=int(found[1]))
    if found := _THRESHOLD.fullmatch(text):
        by = f"{found[1]}-{'high' if found[2] == '>' else 'low'}"
        try:
            return Amount(threshold=float(found[3]), by=by if rule_named(by) else None)
        except (ValueError, BitsmithError):
            pass
    else:
        try:
            target = parse_target(text)
        except BitsmithError:
            target = None
        if target is not None and target.kind == "file":
            return Amount(budget_bytes=int(target.amount))
    raise BitsmithError(f"critical {shown!r} is not understood; expected 129, 3.9GB or alpha>0.8")


def default_amount(linears: Sequence[Linear]) -> Amount:
    """Return the published recipe's share, 129 of 248, of this model's linears."""
    return Amount(count=round(SEED_COUNT / SEED_LINEARS * len(linears)))


def linears_of(pairs: Sequence[tuple[TensorSpec, TensorRef]]) -> tuple[Linear, ...]:
    """Return the linears of the text model's blocks: no embedding, head, MTP or vision tensor."""
    return tuple(
        Linear(spec.name, spec.role, spec.layer, ref.shape, ref.nbytes)
        for spec, ref in pairs
        if is_text_linear(spec) and spec.layer is not None
    )


def is_text_linear(spec: TensorSpec) -> bool:
    """Tell whether a tensor is a linear of one of the text model's blocks."""
    return spec.component == "text" and spec.layer is not None and len(spec.shape) == 2


def critical_linears(
    model: Path,
    *,
    by: str | None = None,
    amount: Amount | None = None,
    seed: int = 0,
    assay: Path | None = None,
    text: Path | None = None,
    ctx_tokens: int = CTX_TOKENS,
    chunks: int = CHUNKS,
    progress: Progress = silent,
) -> Selection:
    """Choose the linears of a Hugging Face checkpoint that the recipe keeps; nothing is written.

    `by` is one of `BY` (default: what a threshold implies, else `alpha-high`), `amount` how many (default:
    129/248 of them). Spectra are computed matrix by matrix unless `assay` (an assay.json of this model) has
    them; `kld` needs a calibration `text`, of which `chunks` chunks of `ctx_tokens` are used.

    Raises BitsmithError for options that do not fit together, an assay of another model, and as `claim` does.
    """
    by = _ranking(by, amount, text)
    with open_checkpoint(model) as checkpoint:
        linears = linears_of(claim(checkpoint))
        amount = checked_amount(amount, linears)
        measure, _ = rule_named(by)
        scores: Scores | None = None
        protocol: str | None = None
        if measure == "kld" and text is not None:
            from bitsmith.run.spi_kld import alone_in_nf4  # noqa: PLC0415 (loads torch)

            found = alone_in_nf4(model, linears, text, ctx_tokens, chunks, progress)
            scores, protocol = found.nats, found.protocol
        elif measure in _SPECTRAL:
            table = spectral_scores(checkpoint, linears, assay, progress)
            scores = {name: row[measure] for name, row in table.items()}
        return choose(linears, scores, by=by, amount=amount, seed=seed, protocol=protocol)


def spectral_scores(
    checkpoint: Checkpoint,
    linears: Sequence[Linear],
    assay: Path | None = None,
    progress: Progress = silent,
    journal: Journal | None = None,
) -> dict[str, dict[str, float | None]]:
    """Return α, tail exponent and r90 of every linear, from an assay.json or by computing their spectra.

    `alpha` is minus the least-squares slope of ln σ_i over ln i, `tail` 1 + n/Σ ln(λ_i/λ_min) of λ = σ² with
    λ_min by Kolmogorov-Smirnov, `r90` min k: Σ_{i≤k} σ ≥ 0.9 Σσ over the number of σ. Undefined under 10
    positive σ. Memory holds one matrix's slice and its Gram matrix. Finished spectra are kept in `journal`.
    """
    if assay is not None:
        return _from_assay(assay, linears)
    kept = {} if journal is None else journal.entries
    done, total = 0, sum(prod(linear.shape) for linear in linears)
    table: dict[str, dict[str, float | None]] = {}
    for linear in linears:
        progress("spectra", done, total)
        entry = f"spectrum {linear.name}"
        found = kept.get(entry)
        if found is None:
            event("spectrum", tensor=linear.name)
            found = _spectral(checkpoint[linear.name], checkpoint.path)
            if journal is not None:
                journal.add(entry, found)
        table[linear.name] = found
        done += prod(linear.shape)
    progress("spectra", total, total)
    return table


def _spectral(ref: TensorRef, path: Path) -> dict[str, float | None]:
    """Return one matrix's α, tail exponent and r90."""
    try:
        spectrum = singular_values(ref)
    except BitsmithError as error:
        raise type(error)(error.message, path=path, tensor=ref.name) from error
    known = spectrum.sigma[: spectrum.rank]
    slope, tail = log_slope(known), fit_tail(np.square(known), resamples=0)
    return {
        "alpha": None if slope is None else -slope.slope,
        "tail": None if tail is None else tail.alpha,
        "r90": describe(spectrum).r90 / len(spectrum.sigma) if spectrum.rank else None,
    }


def choose(
    linears: Sequence[Linear],
    scores: Scores | None,
    *,
    by: str = DEFAULT_BY,
    amount: Amount | None = None,
    seed: int = 0,
    protocol: str | None = None,
) -> Selection:
    """Keep the linears that rank first.

    Ties go by the model's order, linears without a score come last at either end. A budget is filled in that
    order, passing over what no longer fits, so it is never exceeded; `kld` then ranks by KLD per byte, since
    that buys most. Raises BitsmithError where nothing or more than everything would be kept.
    """
    amount = checked_amount(amount, linears)
    _, end = rule_named(by)
    ranked = _ranked(linears, scores, amount, by, seed)
    if amount.count is not None:
        kept = {linear.name for linear in ranked[: amount.count]}
    elif amount.budget_bytes is not None:
        kept = _filled(ranked, amount.budget_bytes)
    elif scores is not None and amount.threshold is not None:
        kept = _beyond(linears, scores, amount.threshold, end)
    else:
        raise BitsmithError("a random ranking has no threshold; give a count or a size")
    if not kept:
        raise BitsmithError(f"{amount} keeps nothing")
    names = tuple(linear.name for linear in linears if linear.name in kept)
    return Selection(by, amount, seed, tuple(linears), scores, names, protocol)


def checked_amount(amount: Amount | None, linears: Sequence[Linear]) -> Amount:
    """Return the amount, the default for None; refuse one that no ranking can keep."""
    amount = amount or default_amount(linears)
    if amount.count is not None and not 0 < amount.count <= len(linears):
        raise BitsmithError(f"{amount.count} linears cannot be kept of {len(linears)}")
    least = min((linear.nbytes for linear in linears), default=0)
    if amount.budget_bytes is not None and amount.budget_bytes < least:
        raise BitsmithError(f"{amount} keeps nothing: the smallest linear has {least:,}")
    return amount


def _ranked(
    linears: Sequence[Linear], scores: Scores | None, amount: Amount, by: str, seed: int
) -> list[Linear]:
    measure, end = rule_named(by)
    if measure == "random":
        order = np.random.default_rng(seed).permutation(len(linears))
        return [linears[place] for place in order]
    if scores is None:
        raise BitsmithError(f"ranking by {measure} needs its scores")
    per_byte = measure == "kld" and amount.budget_bytes is not None
    sign = -1.0 if end == "high" else 1.0

    def place(linear: Linear) -> tuple[bool, float]:
        score = scores[linear.name]
        if score is None:
            return True, 0.0
        return False, sign * (score / linear.nbytes if per_byte else score)

    return sorted(linears, key=place)


def _filled(ranked: Sequence[Linear], budget_bytes: int) -> set[str]:
    kept, left = set(), budget_bytes
    for linear in ranked:
        if linear.nbytes <= left:
            kept.add(linear.name)
            left -= linear.nbytes
    return kept


def _beyond(linears: Sequence[Linear], scores: Scores, threshold: float, end: End) -> set[str]:
    found = {linear.name: scores[linear.name] for linear in linears}
    return {
        name
        for name, score in found.items()
        if score is not None and (score > threshold if end == "high" else score < threshold)
    }


def _ranking(by: str | None, amount: Amount | None, text: Path | None) -> str:
    """Return the ranking that is meant, refusing options that contradict each other."""
    implied = amount.by if amount is not None else None
    chosen = by or implied or DEFAULT_BY
    rule = rule_named(chosen)
    if amount is not None and amount.threshold is not None and rule != rule_named(implied or chosen):
        raise BitsmithError(f"{amount} ranks by {implied}, not by {chosen}; leave one of the two out")
    if rule[0] == "kld" and text is None:
        raise BitsmithError("ranking by kld measures on a calibration text; give one")
    return chosen


def _from_assay(path: Path, linears: Sequence[Linear]) -> dict[str, dict[str, float | None]]:
    found = _assayed(path)
    missing = [linear.name for linear in linears if linear.name not in found]
    if missing:
        raise BitsmithError(f"has {len(missing)} of the linears not", path=path, tensor=missing[0])
    return {linear.name: _assay_row(path, linear, found[linear.name]) for linear in linears}


def _assayed(path: Path) -> dict[str, Any]:
    """Return the matrices of an assay.json by name."""
    try:
        if path.stat().st_size > _MAX_ASSAY_BYTES:
            raise BitsmithError("is too large for an assay", path=path)
        matrices = json.loads(path.read_bytes())["matrices"]
        return {str(matrix["name"]): matrix for matrix in matrices}
    except OSError as error:
        raise BitsmithError(f"cannot be read: {error.strerror or error}", path=path) from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BitsmithError("is no assay.json", path=path) from error


def _assay_row(path: Path, linear: Linear, matrix: Any) -> dict[str, float | None]:
    try:
        shape, law, spectrum = tuple(matrix["shape"]), matrix["power_law"] or {}, matrix["spectrum"]
        slope, tail = law.get("slope"), law.get("alpha")
        row = {
            "alpha": None if slope is None else -float(slope),
            "tail": None if tail is None else float(tail),
            "r90": None if spectrum is None else float(spectrum["r90"]) / min(linear.shape),
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BitsmithError("is no assay.json", path=path, tensor=linear.name) from error
    if shape != linear.shape:
        raise BitsmithError(
            f"was assayed as {shape}, the model has {linear.shape}", path=path, tensor=linear.name
        )
    return row
