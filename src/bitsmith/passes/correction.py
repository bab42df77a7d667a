"""Aim a matrix at its original outputs when what enters it has changed."""

from __future__ import annotations

import numpy as np

from bitsmith.formats.format import Float32
from bitsmith.numerics.input_metric import DAMPING, target_change

STRENGTHS = (0.0, 0.5, 1.0)
"""How much of the correction is tried."""


class Correction:
    """The change of a matrix W that makes up for inputs x̂ in the place of x, as far as x̂ tells of x.

    `W' = W + strength W D` with `D = (E[x x̂ᵀ] - E[x̂ x̂ᵀ]) (E[x̂ x̂ᵀ] + λI)⁻¹`, see `corrected_target` (GPTAQ of
    Li et al. 2025, Qronos of Zhang et al. 2025). `cross` and `moment` are `in in` or diagonal blocks `n b b`,
    each of which is corrected by itself.
    """

    def __init__(self, cross: Float32, moment: Float32, damping: float = DAMPING) -> None:
        width = cross.shape[-1]
        pairs = zip(cross.reshape(-1, width, width), moment.reshape(-1, width, width), strict=True)
        self._changes = [target_change(*pair, damping).astype(np.float32) for pair in pairs]

    def target(self, rows: Float32, strength: float) -> Float32:
        """Return the rows (`out in`) to encode in the place of `rows`."""
        if strength == 0:
            return rows
        parts, at = [], 0
        for change in self._changes:
            part = rows[:, at : at + len(change)]
            parts.append(part + np.float32(strength) * (part @ change))
            at += len(change)
        return np.concatenate(parts, axis=1)

    def best(self, rows: Float32, held: Float32, original: Float32) -> float:
        """Return the strength whose target gives on held-out x̂ (`held`) most nearly what `rows` do on x.

        `held` and `original` hold the same tokens (`tokens in`); without any the strength is 0.
        """
        if not len(held):
            return 0.0
        errors = {
            strength: paired_error(rows, self.target(rows, strength), original, held)
            for strength in STRENGTHS
        }
        return min(errors, key=lambda strength: errors[strength])


def paired_error(rows: Float32, coded: Float32, original: Float32, held: Float32) -> float:
    """Return the mean over held-out tokens of `|W x - Q x̂|²`: `rows` W on x, `coded` Q on x̂ (`tokens in`)."""
    left = original @ rows.T
    left -= held @ coded.T
    return float(np.einsum("ij,ij->", left, left, dtype=np.float64)) / max(1, len(held))
