"""Score two models' logits on a device of torch, where they are made; see `numerics.divergence`."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from bitsmith.numerics.divergence import TokenScores

Tensor = torch.Tensor


class _Softmax:
    """The log-sum-exp, the argmax and the target's logit of `T` rows, gathered over vocabulary slices."""

    def __init__(self, n_tokens: int, device: torch.device) -> None:
        self.top_logit = torch.full((n_tokens,), -torch.inf, dtype=torch.float64, device=device)
        self.top = torch.zeros(n_tokens, dtype=torch.int64, device=device)
        self.sum = torch.zeros(n_tokens, dtype=torch.float64, device=device)
        self.target_logit = torch.full((n_tokens,), torch.nan, dtype=torch.float64, device=device)

    def absorb(self, rows: slice, first: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Add `logits` (`rows slice`); return exp(logits - running max) and the factor for old sums."""
        slice_top, best = logits.max(dim=1)
        before = self.top_logit[rows]
        now = torch.maximum(before, slice_top)
        rescale, weights = torch.exp(before - now), torch.exp(logits - now[:, None])
        self.top[rows] = torch.where(slice_top > before, first + best, self.top[rows])
        self.sum[rows] = self.sum[rows] * rescale + weights.sum(1)
        self.top_logit[rows] = now
        return weights, rescale

    def log_sum_exp(self) -> Tensor:
        return self.top_logit + torch.log(self.sum)


class DeviceDivergence:
    """Does as `DivergenceAccumulator` with logits that are tensors of `device`."""

    def __init__(self, targets: NDArray[np.int64], device: torch.device) -> None:
        self._targets = torch.from_numpy(targets).to(device)
        self._ref, self._cand = (_Softmax(len(targets), device) for _ in range(2))
        self._gap = torch.zeros(len(targets), dtype=torch.float64, device=device)

    def update(self, rows: slice, first: int, ref: Tensor, cand: Tensor) -> None:
        """Add both models' logits (`rows slice`) of the tokens from `first` on, for `rows` of the targets."""
        wide_ref, wide_cand = ref.double(), cand.double()
        self._cand.absorb(rows, first, wide_cand)
        weights, rescale = self._ref.absorb(rows, first, wide_ref)
        self._gap[rows] = self._gap[rows] * rescale + (weights * (wide_ref - wide_cand)).sum(1)
        local = self._targets[rows] - first
        here = (local >= 0) & (local < ref.shape[1])
        place = local.clamp(0, ref.shape[1] - 1)[:, None]
        for softmax, logits in ((self._ref, wide_ref), (self._cand, wide_cand)):
            found = logits.gather(1, place)[:, 0]
            softmax.target_logit[rows] = torch.where(here, found, softmax.target_logit[rows])

    def scores(self) -> TokenScores:
        """Return the scores of every target; NaN where a logit was NaN or infinite."""
        lse_ref, lse_cand = self._ref.log_sum_exp(), self._cand.log_sum_exp()
        kld = lse_cand - lse_ref + self._gap / self._ref.sum
        kld = torch.where(kld.isfinite(), kld, torch.nan)
        return TokenScores(
            nll_ref=(lse_ref - self._ref.target_logit).cpu().numpy(),
            nll_cand=(lse_cand - self._cand.target_logit).cpu().numpy(),
            kld=kld.clamp(min=0.0).cpu().numpy(),
            same_top=(self._ref.top == self._cand.top).cpu().numpy(),
        )
