"""The trunk and residual split of residual states beside plain SVD of the same width, on one model.

With V (`d d`) the right singular vectors of the states entering a layer (`N d`), the trunk is `V[:, :t]`. The
write-up's code takes the states along the other directions, `X V[:, t:]`, and keeps the leading right
singular vectors of those (`svd`); its words have each slot shared by four directions (`fold`: the sum of
four over 2, which keeps columns orthonormal). Plain SVD of the same width is `V[:, :t+s]`. What a basis B
keeps of held-out states is Σ |x B|² / Σ |x|².
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitsmith.errors import BitsmithError
from bitsmith.progress import Progress, silent
from bitsmith.run.forward import TextModel, observe

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

SEED_TRUNK, SEED_WIDTH = 1024, 5120
SHARED = 4
"""Directions per slot of the residual."""
_NOTHING = 1e-12


@dataclass(frozen=True)
class TierRow:
    """The states entering one layer: shares of their held-out energy, one entry per held-out chunk."""

    layer: int
    width: int
    trunk: int
    slots: int
    kept_trunk: tuple[float, ...]
    kept_svd: tuple[float, ...]
    kept_two_tier: tuple[float, ...]
    kept_folded: tuple[float, ...]


def tier_sizes(width: int) -> tuple[int, int]:
    """Return (trunk, slots) in the write-up's proportion, 1024 and (5120 - 1024) / 4 of 5120.

    >>> tier_sizes(5120)
    (1024, 1024)
    """
    trunk = max(1, round(width * SEED_TRUNK / SEED_WIDTH))
    return trunk, (width - trunk) // SHARED


def measure_tiers(
    model: TextModel, fit: NDArray[np.int64], held: NDArray[np.int64], progress: Progress = silent
) -> tuple[TierRow, ...]:
    """Find both bases on the tokens `fit` (`chunks T`) and measure them on `held`, layer by layer.

    One forward; memory holds one layer's states and `8 d²` bytes a few times over. Raises BitsmithError for
    states narrower than a split allows and as `observe` does.
    """
    watcher = _Watcher(len(fit))
    observe(model, np.concatenate([fit, held]), watcher, progress, "tiers")
    return watcher.rows()


class _Watcher:
    """Keeps the states of one layer until the next begins."""

    def __init__(self, fit_chunks: int) -> None:
        self._fit_chunks = fit_chunks
        self._states: list[Float32] = []
        self._layer = 0
        self._rows: list[TierRow] = []

    def entering(self, layer: int, states: Float32) -> None:
        if layer != self._layer:
            self._finish()
        self._layer = layer
        self._states.append(states.copy())

    def cached(self, layer: int, keys: Float32, values: Float32) -> None:
        pass

    def rows(self) -> tuple[TierRow, ...]:
        self._finish()
        return tuple(self._rows)

    def _finish(self) -> None:
        states = np.concatenate(self._states)
        self._states.clear()
        self._rows.append(tier_row(self._layer, states[: self._fit_chunks], states[self._fit_chunks :]))


def tier_row(layer: int, fit: Float32, held: Float32) -> TierRow:
    """Return one layer's row from states (`chunks T d`). Raises BitsmithError where `d` is too small."""
    width = fit.shape[-1]
    trunk, slots = tier_sizes(width)
    if slots < 1:
        raise BitsmithError(f"states of {width} values leave no residual beside a trunk of {trunk}")
    moment = _moment(fit)
    directions = _leading(moment)
    first, rest = directions[:, :trunk], directions[:, trunk:]
    # as the write-up's code does it: an SVD of the states along the remaining directions
    again = rest @ _leading(rest.T @ moment @ rest)[:, :slots]
    folded = _folded(rest, slots)
    bases = (first, directions[:, : trunk + slots], np.hstack([first, again]), np.hstack([first, folded]))
    return TierRow(layer, width, trunk, slots, *(_kept(held, basis) for basis in bases))


def _moment(states: Float32) -> Float64:
    rows = states.reshape(-1, states.shape[-1]).astype(np.float64)
    moment: Float64 = rows.T @ rows
    return moment


def _leading(moment: Float64) -> Float64:
    """Return eigenvectors as columns, the largest eigenvalue's first; those of no energy are any, so none."""
    values, vectors = np.linalg.eigh(moment)
    seen = values > _NOTHING * values.max(initial=0.0)
    return np.ascontiguousarray(vectors[:, seen][:, ::-1], dtype=np.float64)


def _folded(rest: Float64, slots: int) -> Float64:
    """Return the sums of every `SHARED` directions (`d slots`) at unit length; missing ones are zeros."""
    room = np.zeros((len(rest), SHARED * slots))
    count = min(rest.shape[1], SHARED * slots)
    room[:, :count] = rest[:, :count]
    sums = room.reshape(len(rest), SHARED, slots).sum(axis=1)
    length = np.linalg.norm(sums, axis=0)
    unit: Float64 = np.divide(sums, length, out=np.zeros_like(sums), where=length > 0)
    return unit


def _kept(held: Float32, basis: Float64) -> tuple[float, ...]:
    """Return the share of each chunk's energy that a basis with orthonormal columns keeps."""
    wide = held.astype(np.float64)
    total = np.square(wide).sum(axis=(1, 2))
    inside = np.square(wide @ basis).sum(axis=(1, 2))
    shares: list[float] = np.divide(inside, total, out=np.zeros_like(total), where=total > 0).tolist()
    return tuple(shares)
