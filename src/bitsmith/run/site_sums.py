"""Second moments, means and a held-out sample of what enters one activation site."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from bitsmith.errors import BitsmithError
from bitsmith.run.device import CPU
from bitsmith.store.statistics import SiteStatistics

Float32 = NDArray[np.float32]

_STRIPE = 512
_BATCH_TOKENS = 512


class SiteSums:
    """Σ s x xᵀ in diagonal blocks of `block` (none if 0), Σ x² and Σ x in float64, and a held-out sample.

    s is a token's saliency, 1 where none is given; held-out inputs are kept as √s x, so that `|E x|²` weighs
    them the same. Products of a batch are taken in float32 over at most 512 tokens, their sums in float64,
    on the device that the inputs are on.
    """

    def __init__(self, columns: int, block: int, device: torch.device = CPU) -> None:
        self._block = block
        shape = (columns // block, block, block) if block else (0, 0, 0)
        self._moment = torch.zeros(shape, dtype=torch.float64, device=device)
        zeros = torch.zeros((3, columns), dtype=torch.float64, device=device)
        self._squares, self._sum, self._held_squares = zeros
        self._tokens = self._held_tokens = 0
        self._weight = 0.0
        self._held: list[Float32] = []

    def fit(self, rows: torch.Tensor, saliency: torch.Tensor | None = None) -> None:
        """Add `rows` (`N in`) of `saliency` (`N`); of the moment the upper triangle is summed, in stripes."""
        if not len(rows):
            return
        self._tokens += len(rows)
        self._squares += (rows * rows).sum(0, dtype=torch.float64)
        self._sum += rows.sum(0, dtype=torch.float64)
        self._weight += len(rows) if saliency is None else float(saliency.sum(dtype=torch.float64))
        for some in _batches(_scaled(rows, saliency)):
            for number, moment in enumerate(self._moment):
                part = some[:, number * self._block : (number + 1) * self._block]
                for start in range(0, self._block, _STRIPE):
                    stop = start + _STRIPE
                    moment[start:stop, start:] += part[:, start:stop].T @ part[:, start:]

    def hold(
        self, rows: torch.Tensor, positions: NDArray[np.int64], saliency: torch.Tensor | None = None
    ) -> None:
        """Add a held-out chunk's `rows` (`T in`) of `saliency` (`T`), those at `positions` to the sample."""
        self._held_tokens += len(rows)
        self._held_squares += (rows * rows).sum(0, dtype=torch.float64)
        self._held.append(_at(_scaled(rows, saliency), positions))

    def result(self, site: str) -> SiteStatistics:
        """Return the means over the tokens."""
        if self._tokens == 0:
            raise BitsmithError(f"nothing entered {site}: the forward does not reach it")
        diagonal, mean = _float32(self._squares / self._tokens), _float32(self._sum / self._tokens)
        found = SiteStatistics(site, self._tokens, diagonal, mean, self._moments())
        if not self._held_tokens:
            return found
        return replace(
            found,
            held=np.concatenate(self._held),
            held_tokens=self._held_tokens,
            held_diagonal=_float32(self._held_squares / self._held_tokens),
        )

    def _moments(self) -> Float32 | None:
        if not self._block:
            return None
        self._moment /= self._weight or 1.0
        moment = _float32(self._moment)
        self._moment = torch.zeros((0, 0, 0), dtype=torch.float64)
        for block in moment:
            for start in range(0, len(block), _STRIPE):
                stop = start + _STRIPE
                block[stop:, start:stop] = block[start:stop, stop:].T
                square = block[start:stop, start:stop]
                square[...] = np.triu(square) + np.triu(square, 1).T
        return moment[0] if len(moment) == 1 else moment


class CrossSums:
    """Σ s x x̂ᵀ in diagonal blocks of `block`, and held-out x; x is the original input, x̂ the compressed."""

    def __init__(self, columns: int, block: int, device: torch.device = CPU) -> None:
        self._block = block
        shape = columns // block, block, block
        self._cross = torch.zeros(shape, dtype=torch.float64, device=device)
        self._weight = 0.0
        self._held: list[Float32] = []

    def fit(self, original: torch.Tensor, rows: torch.Tensor, saliency: torch.Tensor | None = None) -> None:
        """Add pairs (`N in` each) of `saliency` (`N`)."""
        if not len(rows):
            return
        self._weight += len(rows) if saliency is None else float(saliency.sum(dtype=torch.float64))
        left, right = _scaled(original, saliency), _scaled(rows, saliency)
        for some, other in zip(_batches(left), _batches(right), strict=True):
            for number, cross in enumerate(self._cross):
                part = slice(number * self._block, (number + 1) * self._block)
                for start in range(0, self._block, _STRIPE):
                    stop = start + _STRIPE
                    cross[start:stop] += some[:, part][:, start:stop].T @ other[:, part]

    def hold(
        self, original: torch.Tensor, positions: NDArray[np.int64], saliency: torch.Tensor | None = None
    ) -> None:
        """Add a held-out chunk's `original` (`T in`) at `positions` to the sample."""
        self._held.append(_at(_scaled(original, saliency), positions))

    def added_to(self, found: SiteStatistics) -> SiteStatistics:
        """Return `found`, the compressed inputs' statistics, with the means over the pairs."""
        cross = _float32(self._cross / (self._weight or 1.0))
        held = np.concatenate(self._held) if self._held else None
        return replace(found, cross=cross[0] if len(cross) == 1 else cross, held_original=held)


def _batches(rows: torch.Tensor) -> list[torch.Tensor]:
    return [rows[start : start + _BATCH_TOKENS] for start in range(0, len(rows), _BATCH_TOKENS)]


def _at(rows: torch.Tensor, positions: NDArray[np.int64]) -> Float32:
    found: Float32 = rows[torch.from_numpy(positions).to(rows.device)].cpu().numpy().copy()
    return found


def _scaled(rows: torch.Tensor, saliency: torch.Tensor | None) -> torch.Tensor:
    return rows if saliency is None else rows * saliency.sqrt()[:, None]


def _float32(sums: torch.Tensor) -> Float32:
    with np.errstate(over="ignore"):
        narrow: Float32 = sums.to(torch.float32).cpu().numpy()
    return narrow
