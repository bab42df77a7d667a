"""How far two next-token distributions are apart: KL divergence, perplexity and agreement, with intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from bitsmith.errors import BitsmithError
from bitsmith.numerics.exponential import decay

Float64 = NDArray[np.float64]

KLD_QUANTILES = {"median_kld": 0.5, "kld_99": 0.99, "kld_99_9": 0.999, "max_kld": 1.0}
MIN_CHUNKS = 2  # resampling a single chunk always gives that chunk
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class TokenScores:
    """What each scored token says about two models; every array has the same shape (`T` or `chunks tokens`).

    `nll_ref`, `nll_cand` and `kld` = KL(ref‖cand) are in nats; `same_top` is whether both models rank the
    same token first.
    """

    nll_ref: Float64
    nll_cand: Float64
    kld: Float64
    same_top: NDArray[np.bool_]

    def reshape(self, chunks: int) -> TokenScores:
        """Return the scores as `chunks tokens`."""
        shape = (chunks, -1)
        return TokenScores(
            self.nll_ref.reshape(shape),
            self.nll_cand.reshape(shape),
            self.kld.reshape(shape),
            self.same_top.reshape(shape),
        )


class _Softmax:
    """The log-sum-exp, the argmax and the target's logit of `T` rows, gathered over vocabulary slices."""

    def __init__(self, n_tokens: int) -> None:
        self.top_logit = np.full(n_tokens, -np.inf)
        self.top = np.zeros(n_tokens, dtype=np.int64)
        self.sum = np.zeros(n_tokens)
        self.target_logit = np.full(n_tokens, np.nan)

    def raise_top(self, rows: slice, first: int, logits: NDArray[np.floating]) -> Float64:
        """Take the maxima of `logits` (`rows slice`) into account; return the factor for old sums."""
        best = logits.argmax(axis=1)
        slice_top = logits[np.arange(len(logits)), best].astype(np.float64)
        before = self.top_logit[rows]
        now = np.maximum(before, slice_top)
        rescale: Float64 = np.exp(before - now)
        self.top[rows] = np.where(slice_top > before, first + best, self.top[rows])
        self.top_logit[rows] = now
        return rescale

    def log_sum_exp(self) -> Float64:
        return self.top_logit + np.log(self.sum)


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc"})
def _weigh(
    ref: NDArray[np.floating], cand: NDArray[np.floating], tops: tuple[Float64, Float64], sums: Float64
) -> None:
    """Put `Σ e^(r-top_r)`, `Σ e^(c-top_c)` and `Σ e^(r-top_r) (r-c)` of each row into `sums` (`3 rows`)."""
    for row in range(ref.shape[0]):
        of_ref, of_cand = ref[row], cand[row]
        top_ref, top_cand = tops[0][row], tops[1][row]
        total_ref = total_cand = gap = 0.0
        for token in range(of_ref.size):
            r, c = np.float64(of_ref[token]), np.float64(of_cand[token])
            weight = decay(r - top_ref)
            total_ref += weight
            total_cand += decay(c - top_cand)
            gap += weight * (r - c)
        sums[0, row], sums[1, row], sums[2, row] = total_ref, total_cand, gap


class DivergenceAccumulator:
    """Compares two models' logits for `targets` (`T`) slice by slice of the vocabulary, in float64.

    With logits r and c and p = softmax(r): KL(ref‖cand) = lse(c) - lse(r) + sum_v p_v (r_v - c_v). The
    running maximum is subtracted before every exponential, so no slice overflows. Every row must see the
    whole vocabulary exactly once, in any split.
    """

    def __init__(self, targets: NDArray[np.int64]) -> None:
        self._targets = targets
        self._ref = _Softmax(len(targets))
        self._cand = _Softmax(len(targets))
        self._gap = np.zeros(len(targets))

    def update(self, rows: slice, first: int, ref: NDArray[np.floating], cand: NDArray[np.floating]) -> None:
        """Add both models' logits (`rows slice`) of the tokens from `first` on, for `rows` of the targets."""
        if ref.shape != cand.shape:
            raise BitsmithError(f"logits differ in shape: reference {ref.shape}, candidate {cand.shape}")
        ref, cand, sums = np.ascontiguousarray(ref), np.ascontiguousarray(cand), np.empty((3, len(ref)))
        with np.errstate(invalid="ignore"):  # NaN and Inf logits show up in the scores
            by_ref = self._ref.raise_top(rows, first, ref)
            by_cand = self._cand.raise_top(rows, first, cand)
            _weigh(ref, cand, (self._ref.top_logit[rows], self._cand.top_logit[rows]), sums)
            self._ref.sum[rows] = self._ref.sum[rows] * by_ref + sums[0]
            self._cand.sum[rows] = self._cand.sum[rows] * by_cand + sums[1]
            self._gap[rows] = self._gap[rows] * by_ref + sums[2]
        local = self._targets[rows] - first
        here = np.flatnonzero((local >= 0) & (local < ref.shape[1]))
        where = np.arange(len(self._targets))[rows][here]
        self._ref.target_logit[where] = ref[here, local[here]]
        self._cand.target_logit[where] = cand[here, local[here]]

    def scores(self) -> TokenScores:
        """Return the scores of every target; NaN where a logit was NaN or infinite."""
        with np.errstate(invalid="ignore", divide="ignore"):
            lse_ref, lse_cand = self._ref.log_sum_exp(), self._cand.log_sum_exp()
            kld = lse_cand - lse_ref + self._gap / self._ref.sum
            kld[~np.isfinite(kld)] = np.nan
            return TokenScores(
                nll_ref=lse_ref - self._ref.target_logit,
                nll_cand=lse_cand - self._cand.target_logit,
                kld=np.maximum(kld, 0.0),  # rounding leaves about -1e-16 where the models agree
                same_top=self._ref.top == self._cand.top,
            )


def token_scores(
    ref: NDArray[np.floating], cand: NDArray[np.floating], targets: NDArray[np.int64]
) -> TokenScores:
    """Score whole logits (`T V`) of two models for `targets` (`T`)."""
    accumulator = DivergenceAccumulator(targets)
    accumulator.update(slice(0, len(targets)), 0, ref, cand)
    return accumulator.scores()


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval; `low` and `high` are None where it is unmeasured."""

    value: float
    low: float | None
    high: float | None


def estimates(scores: TokenScores, resamples: int = 2000, seed: int = 0) -> dict[str, Estimate]:
    """Return every measure of `scores` (`chunks tokens`) with its paired bootstrap interval over chunks.

    Chunks are drawn with replacement `resamples` times, the same draw for both models; the interval is the
    2.5 % to 97.5 % percentile range of the resampled measure. Fewer than two chunks give no interval. The
    intervals of `kld_99_9` and `max_kld` can only reach values that were seen.

    Keys: `ppl_ref ppl_cand ppl_ratio ppl_difference mean_kld median_kld kld_99 kld_99_9 max_kld
    top1_agreement`.
    """
    chunks = len(scores.kld)
    values = _measures(scores, np.ones((1, chunks), dtype=np.int64))
    if chunks < MIN_CHUNKS:
        return {name: Estimate(float(value[0]), None, None) for name, value in values.items()}
    draws = np.random.default_rng(seed).multinomial(chunks, np.full(chunks, 1 / chunks), size=resamples)
    tail = (1 - _CONFIDENCE) / 2
    result = {}
    for name, resampled in _measures(scores, draws).items():
        low, high = np.quantile(resampled, (tail, 1 - tail))
        result[name] = Estimate(float(values[name][0]), float(low), float(high))
    return result


def _measures(scores: TokenScores, draws: NDArray[np.int64]) -> dict[str, Float64]:
    """Return each measure (`resamples`) of samples that hold chunk `c` `draws[r, c]` times."""
    share = draws / draws.sum(axis=1, keepdims=True)

    def mean(per_token: NDArray[np.floating] | NDArray[np.bool_]) -> Float64:
        return np.asarray(share @ per_token.mean(axis=1))

    nll_ref, nll_cand = mean(scores.nll_ref), mean(scores.nll_cand)
    ppl_ref, ppl_cand = np.exp(nll_ref), np.exp(nll_cand)
    quantiles = resampled_quantiles(scores.kld, draws, np.array(list(KLD_QUANTILES.values())))
    return {
        "ppl_ref": ppl_ref,
        "ppl_cand": ppl_cand,
        "ppl_ratio": np.exp(nll_cand - nll_ref),
        "ppl_difference": ppl_cand - ppl_ref,
        "mean_kld": mean(scores.kld),
        **dict(zip(KLD_QUANTILES, quantiles.T, strict=True)),
        "top1_agreement": mean(scores.same_top),
    }


def resampled_quantiles(values: Float64, draws: NDArray[np.int64], fractions: Float64) -> Float64:
    """Return quantiles (`resamples fractions`) of `values` (`chunks tokens`), resampled by chunk.

    Equal to `np.quantile` (linear) of the values with chunk `c` repeated `draws[r, c]` times, from one sort:
    a sample's value at rank k is the first sorted value whose cumulated count exceeds k.
    """
    tokens = values.shape[1]
    order = np.argsort(values, axis=None, kind="stable")
    ordered = values.reshape(-1)[order]
    chunk_of = order // tokens
    result = np.empty((len(draws), len(fractions)))
    for row, counts in enumerate(draws):
        cumulated = np.cumsum(counts[chunk_of])
        rank = fractions * (cumulated[-1] - 1)
        below = np.floor(rank)
        low = ordered[np.searchsorted(cumulated, below, side="right")]
        high = ordered[np.searchsorted(cumulated, np.ceil(rank), side="right")]
        result[row] = low + (rank - below) * (high - low)
    return result
