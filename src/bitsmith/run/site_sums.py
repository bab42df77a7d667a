"""Second moments, means and a held-out sample of what enters one activation site."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from bitsmith.errors import BitsmithError
from bitsmith.run.device import CPU
from bitsmith.run.turns import Turn
from bitsmith.store.statistics import SiteStatistics

Float32 = NDArray[np.float32]

_STRIPE = 256
_BATCH_TOKENS = 512
_NEAR_TOKENS = 8192  # summed in float32 before they are added in float64


def _at_once(_: str) -> AbstractContextManager[object]:
    return nullcontext()


class _Triangle:
    """The upper triangle of Σ x xᵀ (`b b`) in stripes: sums of few tokens in float32, of all in float64."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self._near = {
            start: torch.zeros((min(_STRIPE, columns - start), columns - start), device=device)
            for start in range(0, columns, _STRIPE)
        }
        self._far: dict[int, torch.Tensor] = {}
        self._tokens = dict.fromkeys(self._near, 0)

    def add(self, rows: torch.Tensor, name: str, turn: Turn) -> None:
        """Add `rows` (`N b`), each stripe in its own turn."""
        for start, near in self._near.items():
            with turn(f"{name}.{start}"):
                for some in _batches(rows):
                    if self._tokens[start] + len(some) > _NEAR_TOKENS:
                        self._flush(start)
                    near.addmm_(some[:, start : start + _STRIPE].T, some[:, start:])
                    self._tokens[start] += len(some)

    def _flush(self, start: int) -> None:
        near = self._near[start]
        far = self._far.setdefault(start, torch.zeros_like(near, dtype=torch.float64))
        far += near
        near.zero_()
        self._tokens[start] = 0

    def mean(self, weight: float, whole: Float32) -> None:
        """Put the whole matrix over `weight` into `whole` (`b b`), and forget the sums."""
        for start in list(self._near):
            near, far = self._near.pop(start), self._far.pop(start, None)
            sums = near.double() if far is None else far.add_(near)
            stop = start + len(sums)
            whole[start:stop, start:] = _float32(sums.div_(weight))
            whole[stop:, start:stop] = whole[start:stop, stop:].T
            square = whole[start:stop, start:stop]
            square[...] = np.triu(square) + np.triu(square, 1).T


class SiteSums:
    """Σ s x xᵀ in diagonal blocks of `block` (none if 0), Σ x² and Σ x in float64, and a held-out sample.

    s is a token's saliency, 1 where none is given; held-out inputs are kept as √s x, so that `|E x|²` weighs
    them the same. Products are taken and summed in float32 over at most 8,192 tokens, those sums in float64,
    on the device that the inputs are on.
    """

    def __init__(self, columns: int, block: int, device: torch.device = CPU) -> None:
        self._block = block
        self._moments = [_Triangle(block, device) for _ in range(columns // block if block else 0)]
        zeros = torch.zeros((3, columns), dtype=torch.float64, device=device)
        self._squares, self._sum, self._held_squares = zeros
        self._tokens = self._held_tokens = 0
        self._weight = 0.0
        self._held: list[Float32] = []

    def fit(self, rows: torch.Tensor, saliency: torch.Tensor | None = None, turn: Turn = _at_once) -> None:
        """Add `rows` (`N in`) of `saliency` (`N`), each part of the sums in its `turn`, also where N is 0."""
        with turn("vectors"):
            self._tokens += len(rows)
            self._squares += (rows * rows).sum(0, dtype=torch.float64)
            self._sum += rows.sum(0, dtype=torch.float64)
            self._weight += len(rows) if saliency is None else float(saliency.sum(dtype=torch.float64))
        scaled = _scaled(rows, saliency)
        for number, moment in enumerate(self._moments):
            first = number * self._block
            moment.add(scaled[:, first : first + self._block], f"{number}", turn)

    def hold(
        self, rows: torch.Tensor, positions: NDArray[np.int64], saliency: torch.Tensor | None = None
    ) -> None:
        """Add a held-out chunk's `rows` (`T in`) of `saliency` (`T`), those at `positions` to the sample."""
        self._held_tokens += len(rows)
        self._held_squares += (rows * rows).sum(0, dtype=torch.float64)
        self._held.append(_at(_scaled(rows, saliency), positions))

    def result(self, site: str, unit: float = 1.0) -> SiteStatistics:
        """Return the means over the tokens; saliency was given in multiples of `unit`."""
        if self._tokens == 0:
            raise BitsmithError(f"nothing entered {site}: the forward does not reach it")
        diagonal, mean = _float32(self._squares / self._tokens), _float32(self._sum / self._tokens)
        found = SiteStatistics(site, self._tokens, diagonal, mean, self._moment())
        if not self._held_tokens:
            return found
        return replace(
            found,
            held=np.concatenate(self._held) / np.float32(math.sqrt(unit)),
            held_tokens=self._held_tokens,
            held_diagonal=_float32(self._held_squares / self._held_tokens),
        )

    def _moment(self) -> Float32 | None:
        if not self._moments:
            return None
        found = np.empty((len(self._moments), self._block, self._block), np.float32)
        for moment, whole in zip(self._moments, found, strict=True):
            moment.mean(self._weight or 1.0, whole)
        return found[0] if len(found) == 1 else found


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
