"""What the rows of an SPI study say of each other: comparisons with controls, rank correlations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit
from scipy.stats import rankdata

from bitsmith.numerics.divergence import MIN_CHUNKS
from bitsmith.numerics.resampling import difference_of_ratios
from bitsmith.run.critical import inverse, rule_named
from bitsmith.run.evaluation import INTERVAL, RESAMPLES, Measure
from bitsmith.run.spi_rows import (
    MEASURED,
    RULES,
    Against,
    Comparison,
    Correlation,
    LinearRow,
    SpiRow,
    SpiTable,
)

RANDOM_LEVEL = 1 - 0.05 / len(RULES)
"""Confidence against random choices: all rules together are wrong in 5 % (Bonferroni)."""
RANDOM_INTERVAL = (
    f"{RANDOM_LEVEL:.2%} prediction interval of a random choice (Student t of log KLD; {len(RULES)} rules)"
)
OVER_LINEARS = "95 % bootstrap over linears"

Float64 = NDArray[np.float64]
_LEAST_NATS = 1e-12
_FEWEST = 4  # linears, for a correlation


def comparisons(tables: Sequence[SpiTable]) -> tuple[Comparison, ...]:
    """Return every rule beside random choices, the other end of its ranking, and measured KLD."""
    return tuple(one for table in tables for rule in RULES for one in _of_rule(table, rule))


def _of_rule(table: SpiTable, rule: str) -> Iterator[Comparison]:
    row = table.row(rule)
    if row is None:
        return
    if len(table.random) >= MIN_CHUNKS:
        yield _with_random(table, row)
    controls: dict[Against, str] = {"inverse": inverse(rule), "measured": MEASURED}
    if rule_named(rule)[1] == "low":
        del controls["inverse"]  # said already of the other end
    for against, name in controls.items():
        control = table.row(name)
        if control is not None:
            measure = difference(row, control)
            yield Comparison(table.equal, rule, against, name, measure, below(measure, 0.0))


def difference(row: SpiRow, control: SpiRow) -> Measure:
    """Return the mean KLD of `row` less that of `control` in nats, paired by chunk."""
    one, other = row.chunk_kld_nats, control.chunk_kld_nats
    ones = np.ones(len(one))
    found = difference_of_ratios((one, ones), (other, ones), RESAMPLES)
    if found is None or found.low is None:
        return Measure(float(np.mean(one) - np.mean(other)), "nats", None, None, None)
    return Measure(found.value, "nats", found.low, found.high, INTERVAL)


def below(measure: Measure, limit: float) -> bool | None:
    """Tell whether a whole interval lies below a limit; None where it does not lie on one side."""
    if measure.low is None or measure.high is None or measure.low <= limit <= measure.high:
        return None
    return measure.high < limit


def _with_random(table: SpiTable, row: SpiRow) -> Comparison:
    """Compare with random choices: mean log KLD, and the spread that a further choice would have."""
    logs = np.log([max(one.measures["mean_kld"].value, _LEAST_NATS) for one in table.random])
    own = row.measures["mean_kld"].value
    count, apart = len(logs), float(np.log(max(own, _LEAST_NATS)) - logs.mean())
    reach = float(stdtrit(count - 1, (1 + RANDOM_LEVEL) / 2) * logs.std(ddof=1) * np.sqrt(1 + 1 / count))
    low, high = (float(np.exp(apart + side * reach)) for side in (-1, 1))
    measure = Measure(float(np.exp(apart)), "ratio", low, high, RANDOM_INTERVAL)
    rank = 1 + sum(one.measures["mean_kld"].value <= own for one in table.random)
    control = f"{count} random choices"
    return Comparison(table.equal, row.name, "random", control, measure, below(measure, 1.0), rank, count + 1)


ALONE, PER_BYTE, SHAPE = "KLD alone in NF4", "KLD per byte", "short over long side"
_FIGURES: dict[str, Callable[[LinearRow], float | None]] = {
    "alpha": lambda linear: linear.alpha,
    "tail": lambda linear: linear.tail,
    "r90": lambda linear: linear.r90,
    ALONE: lambda linear: linear.kld_nats,
    PER_BYTE: lambda linear: None if linear.kld_nats is None else linear.kld_nats / linear.nbytes,
    SHAPE: lambda linear: min(linear.shape) / max(linear.shape),
}
_PAIRS = (
    *((one, other) for one in ("alpha", "tail", "r90") for other in (ALONE, PER_BYTE)),
    *((one, SHAPE) for one in ("alpha", "tail", "r90")),
)


def correlations(linears: Sequence[LinearRow], seed: int = 0) -> tuple[Correlation, ...]:
    """Return how the spectral measures rank linears beside measured KLD, and beside their mere shape."""
    return tuple(found for one, other in _PAIRS if (found := _correlation(linears, one, other, seed)))


def _correlation(linears: Sequence[LinearRow], one: str, other: str, seed: int) -> Correlation | None:
    pairs = [(_FIGURES[one](linear), _FIGURES[other](linear)) for linear in linears]
    known = np.array([pair for pair in pairs if None not in pair], np.float64)
    if len(known) < _FEWEST:
        return None
    draws = np.random.default_rng(seed).integers(0, len(known), (RESAMPLES, len(known)))
    value = _spearman(known[None])[0]
    if np.isnan(value):
        return None
    resampled = _spearman(known[draws])
    low, high = np.nanquantile(resampled, (0.025, 0.975))
    measure = Measure(float(value), "rank correlation", float(low), float(high), OVER_LINEARS)
    return Correlation(one, other, len(known), measure)


def _spearman(samples: Float64) -> Float64:
    """Return the rank correlation of each sample (`samples n 2`), NaN where one side is constant."""
    ranks = rankdata(samples, axis=1)
    centred = ranks - ranks.mean(axis=1, keepdims=True)
    product = np.sum(centred[..., 0] * centred[..., 1], axis=1)
    norm = np.sqrt(np.prod(np.sum(np.square(centred), axis=1), axis=-1))
    found: Float64 = np.divide(product, norm, out=np.full(len(samples), np.nan), where=norm > 0)
    return found
