"""The claims of the published SPI recipe (Qwen3.5-4B), held against one study and against real shapes.

It says neither which measure α is nor which end of it is critical. So a claim about quality counts as held if
one of the four readings in `RULES` bears it out, and says which.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

from bitsmith.archs import Qwen35
from bitsmith.archs.published import published_config
from bitsmith.run.critical import SEED_COUNT, Linear, inverse, is_text_linear
from bitsmith.run.evaluation import Measure
from bitsmith.run.folder_layout import PACKERS
from bitsmith.run.format_rows import ClaimCheck, Outcome
from bitsmith.run.packer import Assigned
from bitsmith.run.spi import SCHEME
from bitsmith.run.spi_figures import ALONE, below
from bitsmith.run.spi_rows import PURE, RULES, Against, Comparison, SpiRow, SpiStudy
from bitsmith.store import TensorData

PPL_ORIGINAL, PPL_NF4, PPL_HYBRID = 7.79, 8.13, 6.74
"""Published perplexities; text and protocol are not."""
GAIN = 0.134
SEED_KEPT_BYTES, SEED_ORIGINAL_BYTES, SEED_HYBRID_BYTES = 3.9e9, 16e9, 6.4e9
SEED_REST = 0.9
"""The share of the model that is said to be quantized."""

_NEAR = 0.05  # relative: published sizes have two digits


@dataclass(frozen=True)
class SeedSizes:
    """What follows from the published model's shapes; bytes are those in BF16.

    `least_kept`, `mean_kept` and `most_kept` are of 129 linears; `nf4_bpw` the bits per weight of linears in
    NF4, scales included.
    """

    parameters: int
    linears: int
    original: int
    text: int
    linear_bytes: int
    least_kept: int
    mean_kept: float
    most_kept: int
    nf4_bpw: float

    def hybrid(self, kept_bytes: float) -> tuple[float, float]:
        """Return the bytes with so many bytes of linears kept: of the text model alone, and of everything."""
        saved = (self.linear_bytes - kept_bytes) * (1 - self.nf4_bpw / 16)
        return self.text - saved, self.original - saved


def seed_linears() -> tuple[Linear, ...]:
    """Return the linears of the published model's text layers, in BF16."""
    return tuple(
        Linear(spec.name, spec.role, spec.layer, spec.shape, 2 * prod(spec.shape))
        for spec in Qwen35(published_config("4B")).specs()
        if is_text_linear(spec) and spec.layer is not None
    )


def seed_sizes() -> SeedSizes:
    """Return what the published model's shapes allow."""
    specs, linears = Qwen35(published_config("4B")).specs(), seed_linears()
    parameters = dict.fromkeys(("text", "mtp", "vision"), 0)
    for spec in specs:
        parameters[spec.component] += prod(spec.shape)
    sizes = sorted(linear.nbytes for linear in linears)
    return SeedSizes(
        parameters=sum(parameters.values()),
        linears=len(sizes),
        original=2 * sum(parameters.values()),
        text=2 * parameters["text"],
        linear_bytes=sum(sizes),
        least_kept=sum(sizes[:SEED_COUNT]),
        mean_kept=SEED_COUNT / len(sizes) * sum(sizes),
        most_kept=sum(sizes[-SEED_COUNT:]),
        nf4_bpw=16 * sum(map(_nf4_bytes, linears)) / sum(sizes),
    )


def _nf4_bytes(linear: Linear) -> int:
    packer = next(packer for packer in PACKERS if SCHEME in packer.schemes)
    row = Assigned(linear.name, linear.shape, "BF16", SCHEME, packer.group(SCHEME, None, linear.shape) or 0)
    return sum(TensorData(part.suffix, part.dtype, part.shape, ()).nbytes for part in packer.parts(row))


def with_claims(study: SpiStudy) -> SpiStudy:
    """Return the study with every claim's outcome; what it lacks for one makes that NOT TESTED."""
    return replace(study, claims=tuple(_checks(study)))


def _checks(study: SpiStudy) -> Iterator[ClaimCheck]:
    yield _lower_perplexity(study)
    yield _gain(study)
    yield _pure(study)
    yield _better(study, "random", "α picks better than random")
    yield _inverse(study)
    yield _better(study, "measured", "α picks as well as measured KLD")
    yield _predicts(study)
    yield from _size_checks(seed_sizes())
    yield _claim(
        "no calibration data is needed",
        "HELD",
        "α and tail exponent come from the weights alone, NF4's codes from nearest rounding",
    )
    yield from _untested()


def _hybrids(study: SpiStudy) -> dict[str, SpiRow]:
    return {
        f"{rule} at equal {table.equal}": row
        for table in study.tables
        for rule in RULES
        if (row := table.row(rule)) is not None
    }


def _lower_perplexity(study: SpiStudy) -> ClaimCheck:
    label, row = _best(study)
    ratio = row.measures["ppl_ratio"]
    side = below(ratio, 1.0)
    outcome: Outcome = "HELD" if side else "NOT TESTED" if side is None else "NOT HELD"
    found = f"lowest perplexity over the original's among all readings: {label}"
    if side is None:
        found += "; the interval is on both sides of 1"
    found += _by_chance(study)
    return _claim("a hybrid has a lower perplexity than the original", outcome, found, ratio)


def _by_chance(study: SpiStudy) -> str:
    """Return how many random choices lie below the original's perplexity: what a lower one is worth."""
    ratios = [row.measures["ppl_ratio"] for table in study.tables for row in table.random]
    if not ratios:
        return ""
    lower = sum(ratio.value < 1 for ratio in ratios)
    surely = sum(below(ratio, 1.0) is True for ratio in ratios)
    return f"; of {len(ratios)} random choices {lower} are lower too, {surely} with the whole interval"


def _gain(study: SpiStudy) -> ClaimCheck:
    label, row = _best(study)
    ratio, claimed = row.measures["ppl_ratio"], PPL_HYBRID / PPL_ORIGINAL
    outcome: Outcome = "NOT TESTED" if ratio.low is None else _held(ratio.low <= 1 - GAIN)
    claim = f"SPI's hybrid beats the FP16 baseline's perplexity by {GAIN:.1%}"
    said = f"published {PPL_ORIGINAL} → {PPL_HYBRID}, a ratio of {claimed:.3f}; here {label}"
    return _claim(claim, outcome, said, ratio)


def _best(study: SpiStudy) -> tuple[str, SpiRow]:
    return min(_hybrids(study).items(), key=lambda item: item[1].measures["ppl_ratio"].value)


def _pure(study: SpiStudy) -> ClaimCheck:
    claimed = PPL_NF4 / PPL_ORIGINAL
    claim = f"NF4 alone is {claimed - 1:.1%} worse in perplexity"
    row = study.tables[0].row(PURE)
    if row is None:
        return _claim(claim, "NOT TESTED", "the study has no such row")
    ratio = row.measures["ppl_ratio"]
    side = below(ratio, claimed)
    outcome: Outcome = "NOT TESTED" if ratio.low is None else _held(side is None)
    said = {None: "the interval holds it", True: "here it is better than that", False: "here it is worse"}
    return _claim(claim, outcome, f"published a ratio of {claimed:.4f}; {said[side]}", ratio)


def _compared(study: SpiStudy, against: Against) -> list[Comparison]:
    """Return a control's comparisons at equal bytes: equal counts favour who keeps the larger matrices."""
    return [one for one in study.comparisons if one.against == against and one.equal == "bytes"]


def _better(study: SpiStudy, against: Against, claim: str) -> ClaimCheck:
    """Judge by the reading that bears the claim out best; random is to be beaten, measured KLD equalled."""
    found = _compared(study, against)
    if not found:
        why = "no random choices" if against == "random" else "no calibration text"
        return _claim(claim, "NOT TESTED", f"{why} in this study")
    best = min(found, key=lambda one: one.measure.value)
    if best.measure.low is None:
        outcome: Outcome = "NOT TESTED"
    elif against == "measured":
        outcome = "NOT HELD" if all(one.better is False for one in found) else "HELD"
    elif best.better:
        outcome = "HELD"
    else:
        outcome = "NOT TESTED" if best.rank == 1 else "NOT HELD"
    said = ", ".join(_said(one) for one in found)
    return _claim(claim, outcome, f"at equal bytes {said}; the figure is {best.rule}'s", best.measure)


def _said(one: Comparison) -> str:
    if one.against == "random":
        return f"{one.rule} ranks {one.rank} of {one.of}"
    word = {True: "better", False: "worse", None: "no different"}[one.better]
    return f"{one.rule} {word} than {one.control}"


def _inverse(study: SpiStudy) -> ClaimCheck:
    """Judge α-high, the words' plainest reading; one end always beats the other where they differ."""
    claim = "the critical end of α is the one to keep (α-high against its inverse)"
    found = [one for one in _compared(study, "inverse") if one.rule == RULES[0]]
    if not found:
        return _claim(claim, "NOT TESTED", f"no row {inverse(RULES[0])} in this study")
    one = found[0]
    outcome: Outcome = "HELD" if one.better else "NOT TESTED" if one.better is None else "NOT HELD"
    said = ", ".join(map(_said, _compared(study, "inverse")))
    found_text = f"at equal bytes {said}; which end is meant was not published"
    return _claim(claim, outcome, found_text, one.measure)


def _predicts(study: SpiStudy) -> ClaimCheck:
    """Say whether α ranks linears as their measured sensitivity does, in whichever direction."""
    claim = "α tells which layers suffer from NF4"
    known = {one.other: one for one in study.correlations if one.one == "alpha"}
    found = known.pop(ALONE, None)
    if found is None or found.measure.low is None:
        return _claim(claim, "NOT TESTED", "no calibration text in this study")
    beside = "".join(f"; with {name} {one.measure.value:+.2f}" for name, one in known.items())
    said = f"rank correlation of α with {ALONE} over {found.linears} linears{beside}"
    return _claim(claim, _held(below(found.measure, 0.0) is not None), said, found.measure)


def _size_checks(sizes: SeedSizes) -> Iterator[ClaimCheck]:
    share = SEED_KEPT_BYTES / 2 / sizes.parameters
    kept = (
        f"of {sizes.linears} text linears of Qwen3.5-4B, {SEED_COUNT} take {_gb(sizes.least_kept)} to "
        f"{_gb(sizes.most_kept)} in 16 bits, on average {_gb(sizes.mean_kept)}"
    )
    possible = sizes.least_kept <= SEED_KEPT_BYTES <= sizes.most_kept
    yield _claim(f"{SEED_COUNT} layers take {_gb(SEED_KEPT_BYTES)} in 16 bits", _held(possible), kept)
    yield _claim(
        f"the rest, {SEED_REST:.0%} of the model, is quantized",
        _held(abs(1 - share - SEED_REST) <= _NEAR),
        f"{_gb(SEED_KEPT_BYTES)} are {share:.0%} of {sizes.parameters:,} parameters, so at most "
        f"{1 - share:.0%} are; as embedding, vision and MTP stay too, {_rest(sizes):.0%}",
    )
    original = abs(sizes.original / SEED_ORIGINAL_BYTES - 1) <= _NEAR
    yield _claim(
        f"the original takes {_gb(SEED_ORIGINAL_BYTES)} of memory",
        _held(original),
        f"{sizes.parameters:,} parameters take {_gb(sizes.original)} in 16 bits, "
        f"{_gb(2 * sizes.original)} in 32",
    )
    text, whole = sizes.hybrid(SEED_KEPT_BYTES)
    yield _claim(
        f"the hybrid takes {_gb(SEED_HYBRID_BYTES)} of memory",
        _held(text <= SEED_HYBRID_BYTES <= whole),
        f"its tensors take {_gb(text)} (text model alone) to {_gb(whole)} (with vision and MTP in 16 bits), "
        f"other linears at {sizes.nf4_bpw:.3f} bpw; what running it takes besides is unmeasured",
    )


def _rest(sizes: SeedSizes) -> float:
    return (sizes.linear_bytes - SEED_KEPT_BYTES) / 2 / sizes.parameters


def _untested() -> Iterator[ClaimCheck]:
    yield _claim(
        "9.85 tokens/s on a T4, without overhead of dequantization",
        "NOT TESTED",
        "needs that GPU; NF4 matrices are dequantized at every use, only the kept ones are not",
    )
    yield _claim(
        "the baseline's 7.79 is the model's own perplexity",
        "NOT TESTED",
        "FP16 arithmetic on a T4 may overflow where BF16 does not, which would make the baseline worse than "
        "the model; that needs the model and such a GPU. Text and protocol were not published",
    )


def _claim(claim: str, outcome: Outcome, found: str, measure: Measure | None = None) -> ClaimCheck:
    return ClaimCheck(claim, "published", outcome, found, measure)


def _held(held: bool) -> Outcome:
    return "HELD" if held else "NOT HELD"


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB"
