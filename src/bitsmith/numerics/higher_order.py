"""What second moments cannot tell of two sets of activations, by channel: kurtosis, mutual information.

Activations are `chunks T D`; chunks are what is drawn for an interval, as tokens within one depend on each
other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitsmith.errors import BitsmithError
from bitsmith.numerics.divergence import Estimate
from bitsmith.numerics.resampling import interval_about, ratio_of_sums, resampled

Float64 = NDArray[np.float64]

NULL_SHIFTS = 20
"""How often the tokens are shifted against each other to see what unrelated channels give."""

_ORDERS = np.arange(5)
_FLAT = 1e-20  # a variance as a share of the mean square, below which a channel is constant
_TOKENS_PER_CELL = 5
_FEWEST_BINS, _MOST_BINS = 2, 16


@dataclass(frozen=True)
class Information:
    """Mean mutual information of channels with an interval, and what unrelated channels give, in nats.

    `null_low` … `null_high` is the 95 % band of shifted tokens, corrected as the value is, so about 0.
    """

    estimate: Estimate
    null_low: float
    null_high: float
    bins: int


def excess_kurtosis(values: NDArray[Any]) -> Float64:
    """Return each channel's `m₄ / m₂² - 3` (`D`) over all tokens (`chunks T D`); NaN for a constant one.

    0 for a normal distribution, -1.2 for a uniform, 3 for a Laplace.
    """
    found: Float64 = _kurtosis(_power_sums(values).sum(0)[None])[0]
    return found


def kurtosis_gap(mapped: NDArray[Any], aim: NDArray[Any], resamples: int = 2000) -> Estimate | None:
    """Return the median over channels of `mapped`'s excess kurtosis less that of `aim` (`chunks T D` each).

    Below 0 the mapped channels are nearer to normal, as mixtures of many are. Channels that are constant in
    one do not count; None where all are. The interval is a bootstrap over chunks. Raises BitsmithError for
    other shapes.
    """
    _expect_alike(mapped, aim)
    sums = [_power_sums(part) for part in (mapped, aim)]
    vary = ~np.isnan(sum(_kurtosis(part.sum(0)[None])[0] for part in sums))
    if not vary.any():
        return None
    kept = [part[..., vary] for part in sums]

    def gap(draws: Float64) -> Float64:
        ours, theirs = (_kurtosis(np.tensordot(draws, part, 1)) for part in kept)
        return np.asarray(np.median(ours - theirs, axis=1))

    drawn = resampled(gap, len(aim), resamples)
    known = None if drawn is None else drawn[~np.isnan(drawn)]
    return interval_about(float(gap(np.ones((1, len(aim))))[0]), known)


def pairwise_information(
    first: NDArray[Any], second: NDArray[Any], *, resamples: int = 2000, seed: int = 0
) -> Information:
    """Return the mean mutual information of channel j of one with channel j of the other (`chunks T D` each).

    `I = E ln(p(a, b) / p(a) p(b))` over bins of equal counts, so that no monotone change of a channel
    matters; a lower bound, as bins lose what is within them. Its bias, and what tokens near each other in a
    text have in common, is the mean over shifts of one's tokens against the other's, and is taken off. The
    interval draws chunks, with the logarithm of every pair of bins kept: I's first order in the shares, which
    few chunks do not bias. Raises BitsmithError for other shapes.
    """
    _expect_alike(first, second)
    chunks, tokens, channels = first.shape
    bins = bins_for(chunks * tokens)
    shifts = _shifts(chunks, tokens, seed)
    pointwise, null = np.zeros(chunks), np.zeros(len(shifts))
    weight = np.arange(chunks * tokens + 1) * np.log(np.arange(chunks * tokens + 1).clip(1))
    for one, other in zip(_binned(first, bins), _binned(second, bins), strict=True):
        cells = one * bins + other
        pointwise += _logarithms(cells, bins)[cells].reshape(chunks, tokens).sum(1)
        null += _shifted(one, other, shifts, weight)
    null /= channels
    found = ratio_of_sums(pointwise, np.full(chunks, tokens * channels), resamples, seed)
    bias = float(null.mean())
    low, high = np.quantile(null - bias, (0.025, 0.975))
    return Information(_less(found or Estimate(0.0, None, None), bias), float(low), float(high), bins)


def bins_for(tokens: int) -> int:
    """Return into how many bins of equal counts each channel goes, for about five tokens in every cell."""
    return int(np.clip(np.sqrt(tokens / _TOKENS_PER_CELL), _FEWEST_BINS, _MOST_BINS))


def _power_sums(values: NDArray[Any]) -> Float64:
    """Return the sums of powers 0 … 4 (`chunks 5 D`) of channels about their means over all, scaled alike."""
    flat = values.reshape(-1, values.shape[-1]).astype(np.float64)
    centred = flat - flat.mean(0)
    variance, power = (centred**2).mean(0), (flat**2).mean(0)
    centred *= np.divide(
        1.0, np.sqrt(variance), out=np.zeros_like(variance), where=variance > _FLAT * np.maximum(power, _FLAT)
    )
    by_chunk = centred.reshape(len(values), -1, values.shape[-1])
    return np.stack([(by_chunk**order).sum(1) for order in _ORDERS], axis=1)


def _kurtosis(sums: Float64) -> Float64:
    """Return the excess kurtosis (`R D`) of power sums (`R 5 D`); NaN where nothing varies."""
    count = sums[:, 0]
    first, second, third, fourth = (sums[:, order] / count for order in _ORDERS[1:])
    m2 = second - first**2
    m4 = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
    varies = m2 > 1e-12
    found: Float64 = np.divide(m4, m2**2, out=np.full_like(m4, np.nan), where=varies) - 3.0
    return found


def _binned(values: NDArray[Any], bins: int) -> NDArray[np.intp]:
    """Return the bin of each channel's tokens (`D N`); equal values share a bin."""
    flat = values.reshape(-1, values.shape[-1])
    edges = np.quantile(flat, np.arange(1, bins) / bins, axis=0)
    return np.stack([np.searchsorted(edges[:, d], flat[:, d]) for d in range(flat.shape[1])])


def _logarithms(cells: NDArray[np.intp], bins: int) -> Float64:
    """Return `ln(p(a, b) / p(a) p(b))` by cell (`bins²`) of tokens' cells (`N`); 0 in empty ones."""
    joint = np.bincount(cells, minlength=bins * bins).reshape(bins, bins) / len(cells)
    apart = np.outer(joint.sum(1), joint.sum(0))
    found: Float64 = np.log(np.divide(joint, apart, out=np.ones_like(joint), where=joint > 0))
    return found.reshape(-1)


def _shifted(one: NDArray[np.intp], other: NDArray[np.intp], shifts: list[int], weight: Float64) -> Float64:
    """Return the information of bins (`N`) at each shift of `other`; `weight[n]` is `n ln n`.

    `I = ln N + (Σ n_ab ln n_ab - Σ n_a ln n_a - Σ n_b ln n_b) / N`.
    """
    count, bins = len(one), int(max(one.max(), other.max())) + 1
    alone = sum(float(weight[np.bincount(part)].sum()) for part in (one, other))
    rows, twice = one * bins, np.concatenate([other, other])
    starts = [count - shift % count for shift in shifts]
    joint = np.array([weight[np.bincount(rows + twice[at : at + count])].sum() for at in starts])
    found: Float64 = np.log(count) + (joint - alone) / count
    return found


def _less(estimate: Estimate, bias: float) -> Estimate:
    low, high = (None if end is None else end - bias for end in (estimate.low, estimate.high))
    return Estimate(estimate.value - bias, low, high)


def _shifts(chunks: int, tokens: int, seed: int) -> list[int]:
    """Return shifts of the tokens in a row by a chunk or more; of a single chunk by a quarter or more."""
    total = chunks * tokens
    nearest = max(1, tokens if chunks > 1 else tokens // 4)
    farthest = max(nearest, total - nearest)
    drawn = np.random.default_rng(seed).integers(nearest, farthest + 1, NULL_SHIFTS)
    return [int(shift) for shift in drawn]


def _expect_alike(first: NDArray[Any], second: NDArray[Any]) -> None:
    if first.shape != second.shape or first.ndim != 3 or not first.size:
        raise BitsmithError(
            f"activations have shapes {first.shape} and {second.shape}, expected one, chunks T D"
        )
