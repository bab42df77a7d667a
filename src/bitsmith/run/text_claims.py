"""Claims that a forward over a text decides: perplexity, divergence, coherence, states."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp

import numpy as np
from scipy.special import ndtri

from bitsmith.numerics.divergence import Estimate
from bitsmith.numerics.resampling import difference_of_ratios, ratio_of_sums
from bitsmith.run.claim_evidence import BELOW_INT4, ArtifactRow, Evidence
from bitsmith.run.coherence import rule as coherence_rule
from bitsmith.run.evaluate import Measure, Protocol
from bitsmith.run.format_rows import ClaimCheck
from bitsmith.run.seed_claims import (
    CELLM,
    OVER_CHUNKS,
    SAHC,
    SBGQ,
    SPI,
    TRUNK,
    Judged,
    LackingError,
    SeedClaim,
    above,
    measured,
    opposite,
    outcome_of,
    within,
)
from bitsmith.run.spi_claims import GAIN
from bitsmith.run.spi_rows import RULES
from bitsmith.run.tiers import TierRow, tier_sizes

NOTHING_SHARE = 0.95
"""A transform that leaves more than this share of the mean KLD adds nothing."""
TRUNK_SHARES = 0.845, 0.905
"""What rounds to 85 % and to 90 %."""
_ROUNDING = 1e-6
"""Shares of energy nearer than this are the same: two ways to one subspace differ by less."""


class Int4Ceiling(SeedClaim):
    """Nothing smaller than int4 is as good."""

    name = "int4-ceiling"
    seed = SAHC
    words = (
        "“standard int4 is optimal under realistic quality constraints for this model”; “~4x (int4) is the "
        "practical ceiling for post-hoc, quality-preserving LLM weight compression”"
    )
    test = (
        "mean KLD of every matrix in a smaller type (Q3_K, Q2_K; error feedback with statistics) over that "
        "of int4 with a scale per row of every matrix, the write-up's final method; the lower of the two. "
        "Nothing else is tried: pruning and vector codes may do better still"
    )
    rule = (
        "NOT HELD if a smaller one's whole interval is below 1, HELD if every one's is above; without "
        "statistics only the first can be found"
    )
    needs = ("statistics", "row int4", "Q3_K", "Q2_K")

    def judge(self, evidence: Evidence) -> Judged:
        """Judge types of fewer bits per weight than the int4 artifact has."""
        base = evidence.row_int4()
        rows = [row for name in BELOW_INT4 if (row := evidence.below_int4(name)).bpw < base.bpw]
        if not rows:
            raise LackingError(f"no type here takes fewer bits than int4's {base.bpw:.3f}")
        ratios = [_kld_ratio(row, base, evidence) for row in rows]
        sides = [above(ratio, 1.0) for ratio in ratios]
        held = False if False in sides else True if set(sides) == {True} and evidence.has_statistics else None
        how = "error feedback" if evidence.has_statistics else "nearest rounding, as no statistics were given"
        said = "; ".join(
            f"{row.name} {row.bpw:.3f} bpw ({16 / row.bpw:.2f}×) {row.measures['mean_kld'].value:.5f} nats, "
            f"ratio {ratio.value:.3f}"
            for row, ratio in zip(rows, ratios, strict=True)
        )
        if held is None and not evidence.has_statistics:
            said += "; HELD needs statistics, with which smaller types do better"
        return Judged(
            outcome_of(held),
            f"int4 {base.bpw:.3f} bpw ({16 / base.bpw:.2f}×) {base.measures['mean_kld'].value:.5f} nats, PPL "
            f"ratio {base.measures['ppl_ratio'].value:.4f}; by {how}: {said}",
            min(ratios, key=lambda ratio: ratio.value),
            protocol_words(evidence.protocol),
        )


class SpiBeatsOriginal(SeedClaim):
    """A hybrid of NF4 and 16 bits has a lower perplexity than the original."""

    name = "spi-beats-fp16"
    seed = SPI
    words = (
        "“a mixed-precision hybrid model that … actually achieves a lower Perplexity (6.74) than the "
        "original FP16 baseline (7.79)”"
    )
    test = (
        "lowest perplexity over the original's among the four readings of the rule (α or tail exponent, "
        "either end), at equal counts and equal bytes, as folders written and read back; as the lowest of up "
        "to eight is chosen, its interval is that of 95 % for all of them (Bonferroni)"
    )
    rule = "HELD if its whole interval is below 1, NOT HELD if it is at or above"
    needs = ("spi",)

    def judge(self, evidence: Evidence) -> Judged:
        """Judge the figure of the SPI study."""
        return _lowest(evidence, "a hybrid has a lower perplexity", 1.0)


class SpiGain(SeedClaim):
    """The hybrid is 13 % better."""

    name = "spi-13-percent"
    seed = SPI
    words = "“7.79 (FP16) -> 8.13 (Pure 4-bit) -> 6.74 (SPI Hybrid, 13.4% Boost)”"
    test = SpiBeatsOriginal.test
    rule = f"HELD if the whole interval is at or below {1 - GAIN:.3f}, NOT HELD if it is above"
    needs = ("spi",)

    def judge(self, evidence: Evidence) -> Judged:
        """Judge the figure of the SPI study."""
        return _lowest(evidence, "SPI's hybrid beats", 1 - GAIN + _ROUNDING)


class SbgqAddsNothing(SeedClaim):
    """Gauges and rotation add nothing to importance rounding at 4 bits."""

    name = "sbgq-adds-nothing"
    seed = SBGQ
    words = (
        "“SBGQ did not improve PPL beyond what iMatrix alone achieved … SBGQ and iMatrix solve the same "
        "problem and iMatrix gets there first”"
    )
    test = (
        "mean KLD of the recipe (IQ4_XS, its table of types, rounding weighed by E[x²]) with its rotation "
        "and exact gauges over that without, same types and bytes; perplexity, which the card speaks of, "
        "beside it: between two files of one model it is mostly noise"
    )
    rule = (
        f"HELD if the whole interval is above {NOTHING_SHARE} (less than a twentieth is nothing: ours), NOT "
        "HELD if it is below 1 and reaches lower; neither if the interval of perplexity says the contrary"
    )
    needs = ("statistics", "SBGQ 4", "plain 4")

    def judge(self, evidence: Evidence) -> Judged:
        """Judge the 4-bit pair."""
        with_it, without = _pair(evidence, 4)
        ratio, perplexity = _kld_ratio(with_it, without, evidence), ppl_ratio(with_it, without, evidence)
        held, worse = _adds_nothing(ratio), above(perplexity, 1.0)
        found = _pair_words(with_it, without, perplexity)
        if held is not None and worse is not None and held is not worse:
            held, found = None, f"{found}, which says the contrary"
        return Judged(outcome_of(held), found, ratio, protocol_words(evidence.protocol))


class GainsAtLowBits(SeedClaim):
    """The transforms gain more at 2 to 3 bits."""

    name = "gains-at-2-to-3-bits"
    seed = SBGQ
    words = (
        "“SBGQ is expected to show larger gains at lower bit-widths (IQ2/IQ3) where iMatrix alone is "
        "insufficient”"
    )
    test = (
        "as sbgq-adds-nothing with Q3_K and with Q2_K in IQ4_XS's place (IQ3 and IQ2 are not written here): "
        "mean KLD with the transforms over that without, less the same at 4 bits; the figure is that of the "
        "width that decides, else the lower one; the ratio where its own interval leaves it open"
    )
    rule = (
        "HELD if at 2 or at 3 bits the ratio's interval is below 1 and its difference's below 0, NOT HELD if "
        "at both widths either lies at or above"
    )
    needs = ("statistics", "SBGQ 4", "plain 4", "SBGQ 3", "plain 3", "SBGQ 2", "plain 2")

    def judge(self, evidence: Evidence) -> Judged:
        """Judge both widths against the 4-bit pair."""
        base = _pair(evidence, 4)
        pairs = {bits: _pair(evidence, bits) for bits in (3, 2)}
        ratios = {bits: _kld_ratio(*pair, evidence) for bits, pair in pairs.items()}
        differences = {bits: _difference(pair, base, evidence) for bits, pair in pairs.items()}
        sides = [larger_gain(ratios[bits], differences[bits]) for bits in pairs]
        held = True if True in sides else False if set(sides) == {False} else None
        said = "; ".join(
            f"{bits} bits: {_interval(ratios[bits])}, perplexity {_interval(ppl_ratio(*pair, evidence))}"
            for bits, pair in pairs.items()
        )
        winners = [bits for bits, side in zip(pairs, sides, strict=True) if side]
        best = min(winners or pairs, key=lambda bits: differences[bits].value)
        sure = above(differences[best], 0.0) is False  # then what is open is whether it gains at all
        return Judged(
            outcome_of(held),
            f"4 bits: {_interval(_kld_ratio(*base, evidence))}; {said}",
            ratios[best] if held is None and sure else differences[best],
            protocol_words(evidence.protocol),
        )


class Int2Incoherent(SeedClaim):
    """int2 writes garbage."""

    name = "int2-incoherent"
    seed = CELLM
    words = "“int2 | 836 MB | 1.9x | Incoherent. Random tokens and characters.”"
    test = (
        "the published encoding (a scale per row, layers only): NLL of its sampled text over the original's"
    )
    rule = (
        "HELD if it is incoherent or repetitive, NOT HELD if coherent, NOT TESTED if undecided: "
        f"{coherence_rule()}"
    )
    needs = ("formats",)

    def judge(self, evidence: Evidence) -> Judged:
        """Take the outcome of the formats study."""
        return _published(evidence, evidence.formats.claims, "int2 is garbage")


class OneBitIncoherent(SeedClaim):
    """1 bit writes garbage."""

    name = "1-bit-incoherent"
    seed = CELLM
    words = "“1-bit | 200 MB | 8x | Incoherent. Degenerate loops and nonsense.”"
    test = "the published encoding (a scale per 128 weights): NLL of its sampled text over the original's"
    rule = Int2Incoherent.rule
    needs = ("formats",)

    def judge(self, evidence: Evidence) -> Judged:
        """Take the outcome of the formats study."""
        return _published(evidence, evidence.formats.claims, "1 bit is garbage")


class TwoTier(SeedClaim):
    """A trunk and a compressed residual keep more than plain SVD."""

    name = "two-tier-beats-svd"
    seed = TRUNK
    words = (
        "“1024 trunk / 1024 residual at every layer … Better than 2048 pure SVD because we treat "
        "high-variance and low-variance dims differently”"
    )
    test = (
        "share of held-out energy of the states entering every layer kept by the split (1/5 of the width as "
        "trunk, the rest 4:1), less that kept by plain SVD of the same width; the better of two readings: "
        "the code's (SVD of the rest) and the words' (four directions share a slot). One model shows the "
        "basis alone; what merging into a student makes of it is not tested here"
    )
    rule = f"HELD if the whole interval is above {_ROUNDING:g}, NOT HELD if it is not"
    needs = ("tiers",)

    def judge(self, evidence: Evidence) -> Judged:
        """Judge the better reading."""
        rows = evidence.tiers
        readings = {
            "as in its code": _over_layers(rows, [_less(row.kept_two_tier, row.kept_svd) for row in rows]),
            "as in its words": _over_layers(rows, [_less(row.kept_folded, row.kept_svd) for row in rows]),
        }
        name = max(readings, key=lambda one: readings[one].value)
        said = ", ".join(f"{key} {one.value:+.2e}" for key, one in readings.items())
        svd = _over_layers(rows, [row.kept_svd for row in rows])
        first = rows[0]
        return Judged(
            outcome_of(above(readings[name], _ROUNDING)),
            f"{said}; plain SVD of {first.trunk + first.slots} of {first.width} keeps {svd.value:.4f}; what "
            "its code keeps of the rest are the next directions of the same SVD, so both span one space",
            readings[name],
            _tier_words(evidence, rows),
        )


class TrunkShare(SeedClaim):
    """The trunk holds 85 to 90 % of the variance."""

    name = "trunk-variance"
    seed = TRUNK
    words = "“Top 1024 SVD components of the 32B's activations. Captures ~85-90% of total variance”"
    test = (
        f"share of held-out energy that a fifth of the directions ({tier_sizes(5120)[0]:,} of 5,120) keep of "
        "the states entering each layer, mean over layers"
    )
    rule = (
        f"HELD if the whole interval is within {TRUNK_SHARES[0]:.1%} to {TRUNK_SHARES[1]:.1%} (“~85-90%”), "
        "NOT HELD if all of it is outside"
    )
    needs = ("tiers",)

    def judge(self, evidence: Evidence) -> Judged:
        """Judge the mean over layers."""
        rows = evidence.tiers
        measure = _over_layers(rows, [row.kept_trunk for row in rows])
        by_layer = [float(np.mean(row.kept_trunk)) for row in rows]
        more = _over_layers(rows, [_less(row.kept_two_tier, row.kept_trunk) for row in rows])
        return Judged(
            outcome_of(within(measure, *TRUNK_SHARES)),
            f"{min(by_layer):.3f} to {max(by_layer):.3f} over {len(rows)} places; the residual adds "
            f"{more.value:.3f} (published: .05 to .10)",
            measure,
            _tier_words(evidence, rows),
        )


def larger_gain(ratio: Measure, difference: Measure) -> bool | None:
    """Return whether a width gains, and more than 4 bits do: None where an interval leaves it open."""
    gains, more = opposite(above(ratio, 1.0)), opposite(above(difference, 0.0))
    if gains is False or more is False:
        return False
    return True if gains and more else None


def protocol_words(p: Protocol) -> str:
    """Return how a text was measured on, in a line."""
    return (
        f"held-out text, context {p.ctx_tokens} tokens, {p.chunks} of {p.chunks_available} chunks, "
        f"{p.scored_tokens:,} scored tokens"
    )


def _published(evidence: Evidence, claims: Sequence[ClaimCheck], start: str) -> Judged:
    """Return the outcome of a claim that a study of its own has judged."""
    one = next(one for one in claims if one.claim.startswith(start))
    return Judged(one.outcome, one.found, one.measure, protocol_words(evidence.protocol))


def _lowest(evidence: Evidence, start: str, limit: float) -> Judged:
    """Return whether the lowest perplexity of the SPI study's readings is surely below a limit."""
    study = evidence.spi
    found = _published(evidence, study.claims, start)
    kept = {row.names for table in study.tables for rule in RULES if (row := table.row(rule)) is not None}
    if found.measure is None:
        return found
    measure = lowest_of(len(kept), found.measure)
    said = found.found.replace("; the interval is on both sides of 1", "")
    held = opposite(above(measure, limit))
    return found._replace(outcome=outcome_of(held), found=said, measure=measure)


def lowest_of(count: int, measure: Measure) -> Measure:
    """Return a ratio that was chosen as the lowest of `count` with an interval for all of them.

    The logarithm's interval grows by the quotient of the normal quantiles of 1 - .025 / count and .975.
    """
    if measure.low is None or measure.high is None or count < 2:
        return measure
    grown = float(ndtri(1 - 0.025 / count) / ndtri(0.975))
    low, high = (measure.value * (end / measure.value) ** grown for end in (measure.low, measure.high))
    return Measure(measure.value, measure.unit, low, high, f"{OVER_CHUNKS}, for the lowest of {count}")


def _pair(evidence: Evidence, bits: int) -> tuple[ArtifactRow, ArtifactRow]:
    return evidence.sbgq(bits, transforms=True), evidence.sbgq(bits, transforms=False)


def _pair_words(with_it: ArtifactRow, without: ArtifactRow, perplexity: Measure) -> str:
    klds = " and ".join(f"{row.measures['mean_kld'].value:.5f}" for row in (with_it, without))
    size = f"at {without.bpw:.3f} bpw"
    return f"mean KLD {klds} nats with and without {size}; perplexity × {_interval(perplexity)}"


def ppl_ratio(row: ArtifactRow, base: ArtifactRow, evidence: Evidence) -> Measure:
    """Return the perplexity of `row` over that of `base`, paired by chunk."""
    p, ones = evidence.protocol, np.ones(len(row.chunk_nll_nats))
    one, other = (row.chunk_nll_nats, ones), (base.chunk_nll_nats, ones)
    found = _known(difference_of_ratios(one, other, p.resamples, p.seed), base.name)
    logs = (found.value, found.low, found.high)
    value, low, high = (None if log is None else exp(log) for log in logs)
    return measured(Estimate(value or 0.0, low, high), "× perplexity", OVER_CHUNKS)


def _kld_ratio(row: ArtifactRow, base: ArtifactRow, evidence: Evidence) -> Measure:
    p = evidence.protocol
    found = ratio_of_sums(row.chunk_kld_nats, base.chunk_kld_nats, p.resamples, p.seed)
    return measured(_known(found, base.name), "× mean KLD", OVER_CHUNKS)


def _difference(
    pair: tuple[ArtifactRow, ArtifactRow], base: tuple[ArtifactRow, ArtifactRow], evidence: Evidence
) -> Measure:
    p = evidence.protocol
    one, other = ((top.chunk_kld_nats, bottom.chunk_kld_nats) for top, bottom in (pair, base))
    found = difference_of_ratios(one, other, p.resamples, p.seed)
    return measured(_known(found, base[1].name), "difference of ratios", OVER_CHUNKS)


def _known(found: Estimate | None, name: str) -> Estimate:
    if found is None:
        raise LackingError(f"{name} does not diverge from the original")
    return found


def _adds_nothing(ratio: Measure) -> bool | None:
    """Return whether a ratio is near 1 or above; None where its interval leaves that open."""
    if ratio.low is None or ratio.high is None:
        return None
    if ratio.low > NOTHING_SHARE:
        return True
    return False if ratio.high < 1 else None


def _interval(measure: Measure) -> str:
    if measure.low is None or measure.high is None:
        return f"{measure.value:.4g} (interval unmeasured)"
    return f"{measure.value:.4g} ({measure.low:.4g} … {measure.high:.4g})"


def _less(one: Sequence[float], other: Sequence[float]) -> tuple[float, ...]:
    return tuple(a - b for a, b in zip(one, other, strict=True))


def _over_layers(rows: Sequence[TierRow], shares: Sequence[Sequence[float]]) -> Measure:
    """Return the mean of shares (`layers chunks`) over layers, with the interval over chunks."""
    sums = np.asarray(shares).sum(axis=0)
    found = ratio_of_sums(sums, np.full(len(sums), float(len(rows))))
    return measured(_known(found, "the split"), "of the energy", "95 % bootstrap over held-out chunks")


def _tier_words(evidence: Evidence, rows: Sequence[TierRow]) -> str:
    learned = "the calibration text" if evidence.setting.calibration is not None else "every other chunk"
    ctx = evidence.protocol.ctx_tokens
    return f"bases of {learned}, measured on {len(rows[0].kept_svd)} other chunks of {ctx} tokens"
