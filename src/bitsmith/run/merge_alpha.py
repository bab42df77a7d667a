"""The teacher's share by rule: how certain the map is, how much it keeps, how alike heads and neurons are.

`α = α_max · clip((c - 0.5) / 0.3, 0, 1)`, and 0 where the map keeps less than 0.95 of the teacher's variance;
c is the lower end of the 95 % interval of the mean cosine between mapped and own states on held-out tokens.
A mixer's share is that times each group's likeness of its heads' outputs, an FFN's times its neurons'. A head
that is solved for takes α_max times the share of the teacher's final states that the student's explain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitsmith.numerics.divergence import Estimate
from bitsmith.numerics.resampling import ratio_of_sums
from bitsmith.numerics.threads import one_blas_thread
from bitsmith.passes.merge_fold import LayerAlpha
from bitsmith.passes.merge_maps import ResidualMap, SolvedReading

Float64 = NDArray[np.float64]

LEAST_COSINE = 0.5
FULL_COSINE = 0.8
LEAST_VARIANCE_KEPT = 0.95


@dataclass(frozen=True)
class PlaceFacts:
    """What is seen of the map at one place: cosine of mapped and own states, and variance kept."""

    cosine: Estimate
    variance_kept: float

    @property
    def certainty(self) -> float:
        """The lower end of the cosine's interval; 0 where it is unmeasured."""
        return 0.0 if self.cosine.low is None else self.cosine.low

    def to_json(self) -> dict[str, Any]:
        """Return the facts as plain values."""
        return {"cosine": vars(self.cosine), "variance_kept": self.variance_kept}


@dataclass(frozen=True)
class LayerFacts:
    """What the rule saw of a layer: its map in front and behind, likeness of groups and of neurons."""

    before: PlaceFacts
    after: PlaceFacts
    groups: tuple[float, ...]
    neurons: float

    def to_json(self) -> dict[str, Any]:
        """Return the facts as plain values."""
        return {
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "group_likeness": list(self.groups),
            "neuron_likeness": self.neurons,
        }


@one_blas_thread()
def cosine_of(mapping: ResidualMap, teacher: NDArray[Any], student: NDArray[Any]) -> Estimate:
    """Return the mean cosine of `x_t A` and `x_s` over tokens, with its interval over pieces.

    `teacher` and `student` are `n T D_t` and `n T D_s`; pieces are drawn with replacement. The interval is
    unmeasured for fewer than two.
    """
    mapped, aim = teacher.astype(np.float64) @ mapping.forward, student.astype(np.float64)
    sizes = np.linalg.norm(mapped, axis=-1) * np.linalg.norm(aim, axis=-1)
    cosines = np.divide((mapped * aim).sum(-1), sizes, out=np.zeros_like(sizes), where=sizes > 0)
    found = ratio_of_sums(cosines.sum(-1), np.full(len(cosines), cosines.shape[1]))
    return found or Estimate(0.0, None, None)


@one_blas_thread()
def explained(reading: SolvedReading, teacher: NDArray[Any], student: NDArray[Any]) -> Estimate:
    """Return the share of the teacher's final states that the student's explain, with its interval.

    `1 - Σ |x̂_t - x̂_s theirsᵀ|² / Σ |x̂_t|²`, `x̂ = x / rms(x)` of held-out states (`n T D_t`, `n T D_s`);
    pieces are drawn.
    """
    aim, known = (_normed(rows) for rows in (teacher, student))
    missed = ((aim - known @ reading.theirs.T) ** 2).sum((-1, -2))
    found = ratio_of_sums(missed, (aim**2).sum((-1, -2)))
    if found is None or found.low is None or found.high is None:
        return Estimate(0.0 if found is None else 1 - found.value, None, None)
    return Estimate(1 - found.value, 1 - found.high, 1 - found.low)


def head_share(fit: Estimate, alpha_max: float) -> float:
    """Return the rule's share of a head that is solved for: the lower end of what is explained."""
    return alpha_max * _clipped(fit.low or 0.0)


def share_of(facts: Sequence[PlaceFacts], alpha_max: float) -> float:
    """Return the rule's share for what reads or writes at several places: that of the worst one."""
    return min(
        alpha_max
        * min(max((one.certainty - LEAST_COSINE) / (FULL_COSINE - LEAST_COSINE), 0.0), 1.0)
        * (one.variance_kept >= LEAST_VARIANCE_KEPT)
        for one in facts
    )


def layer_share(facts: LayerFacts, alpha_max: float) -> LayerAlpha:
    """Return the rule's shares in a layer, by group and of the FFN."""
    share = share_of((facts.before, facts.after), alpha_max)
    return LayerAlpha(tuple(share * _clipped(one) for one in facts.groups), share * _clipped(facts.neurons))


def _normed(rows: NDArray[Any]) -> Float64:
    wide = rows.astype(np.float64)
    sizes = np.sqrt((wide**2).mean(-1, keepdims=True))
    normed: Float64 = np.divide(wide, sizes, out=np.zeros_like(wide), where=sizes > 0)
    return normed


def _clipped(value: float) -> float:
    return min(max(value, 0.0), 1.0)
