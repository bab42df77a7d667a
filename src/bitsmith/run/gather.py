"""What calibrate keeps of the inputs of a model's sites: which chunks are held out, sums of one step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bitsmith.archs import TensorSpec
from bitsmith.errors import BitsmithError
from bitsmith.run.forward import Tokens
from bitsmith.run.saliency import Saliency, normalised
from bitsmith.run.site_sums import SiteSums
from bitsmith.run.turns import Turn
from bitsmith.store.statistics import SiteStatistics, site_widths

Float32 = NDArray[np.float32]

HELD_EVERY = 8
"""Every so many chunks one is held out; of two to seven chunks the last."""
HELD_ROWS = 2048
WIDEST_BLOCK = 4096
_BLOCK_MULTIPLE = 256
_USABLE = 2.0**-64, 2.0**64  # mean weights that neither vanish nor overflow beside squares in float32


def held_out(chunks: int) -> list[int]:
    """Return which of `chunks` are held out: every eighth, at least one of two."""
    return list(range(HELD_EVERY - 1, chunks, HELD_EVERY)) or list(range(1, chunks))[-1:]


def block_columns(columns: int, block: int | None) -> int:
    """Return the size of the diagonal blocks kept of `columns` × `columns` second moments.

    Raises BitsmithError for a `block` that does not divide `columns`.
    """
    if block is not None:
        if block < 1 or (columns > block and columns % block):
            raise BitsmithError(f"blocks of {block} do not divide {columns} columns")
        return min(block, columns)
    if columns <= WIDEST_BLOCK:
        return columns
    divisors = [size for size in range(1, WIDEST_BLOCK + 1) if columns % size == 0]
    return max(divisors, key=lambda size: (size % _BLOCK_MULTIPLE == 0, size))


class Kept:
    """What is kept of which tokens: diagonal blocks by site, chunks held out, positions of the sample."""

    def __init__(
        self, specs: Sequence[TensorSpec], tokens: Tokens, block: int | None, seed: int, *, moments: bool
    ) -> None:
        self.shape = tokens.shape
        self.widths = site_widths(specs)
        self.blocks = {
            site: block_columns(width, block) if moments else 0 for site, width in self.widths.items()
        }
        self.held = held_out(len(tokens))
        self.sample = _sample(self.held, tokens.shape[1], seed)

    @property
    def nbytes(self) -> int:
        """Bytes of the statistics, nearly."""
        held = min(HELD_ROWS, len(self.held) * self.shape[1])
        return sum(4 * width * (self.blocks[site] + held + 3) for site, width in self.widths.items())

    def split(self, chunks: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return the chunks of the fit, and those held out."""
        fit = np.setdiff1d(np.arange(len(chunks)), self.held)
        return chunks[fit], chunks[self.held]


class Gather:
    """Sums over the tokens of one step's sites; `known` weights replace those that come with the inputs.

    Weights come up to a factor of the site, which the means are freed of at the end.
    """

    def __init__(
        self, kept: Kept, sites: Sequence[str], device: torch.device, known: Saliency | None = None
    ) -> None:
        self._kept, self._known = kept, known or {}
        self._weights: dict[str, Float32] = {}
        self._adopted = set[str]()
        self._sums = {site: SiteSums(kept.widths[site], kept.blocks[site], device) for site in sites}
        self._is_held = np.zeros(kept.shape[0], bool)
        self._is_held[kept.held] = True

    def take(
        self, site: str, first: int, inputs: torch.Tensor, turn: Turn, weights: torch.Tensor | None = None
    ) -> None:
        """Add `inputs` (`B T in`) of the chunks from `first` on, with the weights of their tokens (`B T`)."""
        if site not in self._sums:
            return
        sums, chunks = self._sums[site], slice(first, first + len(inputs))
        if site in self._known:
            weights = torch.from_numpy(self._known[site][chunks]).to(inputs.device)
        elif weights is not None:
            with turn("weights"):
                kept = self._weights.setdefault(site, np.zeros(self._kept.shape, np.float32))
                kept[chunks] = weights.cpu().numpy()
        held = self._is_held[chunks]
        fit = torch.from_numpy(~held).to(inputs.device)
        sums.fit(inputs[fit].flatten(0, 1), None if weights is None else weights[fit].flatten(), turn)
        with turn("held"):
            for chunk in np.flatnonzero(held):
                positions = self._kept.sample.get(first + int(chunk), np.empty(0, np.int64))
                positions = positions[positions < inputs.shape[1]]
                sums.hold(inputs[chunk], positions, None if weights is None else weights[chunk])

    @property
    def sites(self) -> list[str]:
        """The sites whose results have not been taken yet."""
        return list(self._sums)

    @property
    def weights(self) -> Saliency:
        """The weights of the sites' tokens (`chunks T`), 1 on average."""
        return {site: normalised(found) for site, found in self._weights.items()}

    @property
    def spoilt(self) -> Saliency:
        """Weights, 1 on average, of the sites whose sums had weights too small, too large, or not finite."""
        means = {site: float(found.mean(dtype=np.float64)) for site, found in self._weights.items()}
        least, most = _USABLE
        return {site: found for site, found in self.weights.items() if not least < means[site] < most}

    def adopt(self, again: Gather) -> None:
        """Let the sums of `again` take the place of those of its sites, whose weights are 1 on average."""
        self._sums |= again._sums
        self._adopted = set(again._sums)

    def results(self, path: Path) -> Iterator[SiteStatistics]:
        """Yield what was gathered, site by site.

        Raises BitsmithError that names the model at `path` for a site that was not reached, or whose squares
        leave float32.
        """
        for site in self.sites:
            found = self._sums.pop(site).result(site, self._unit(site))
            parts = (found.diagonal, found.moment, found.held_diagonal)
            if not all(part is None or np.isfinite(part).all() for part in parts):
                raise BitsmithError(
                    f"what enters {site} is not finite, or its squares are beyond float32", path=path
                )
            yield found

    def _unit(self, site: str) -> float:
        weights = self._weights.get(site)
        return 1.0 if weights is None or site in self._adopted else float(weights.mean(dtype=np.float64))


def _sample(held: Sequence[int], ctx: int, seed: int) -> Mapping[int, NDArray[np.int64]]:
    """Draw up to 2048 positions of the held-out chunks; return those of each chunk in their order."""
    total = len(held) * ctx
    drawn = np.random.default_rng(seed).permutation(total)[:HELD_ROWS]
    return {chunk: np.sort(drawn[drawn // ctx == n] % ctx) for n, chunk in enumerate(held)}
