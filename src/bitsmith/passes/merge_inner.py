"""The inner axes of a pair of layers, heads and neurons, matched from the moments of what writers read."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bitsmith.archs import Architecture
from bitsmith.errors import BitsmithError
from bitsmith.passes.axes import Layer
from bitsmith.passes.merge_axes import AxisMap, diagonal_of
from bitsmith.passes.merge_ffn import matched_neurons
from bitsmith.passes.merge_heads import (
    DeltaMap,
    Groups,
    HeadMap,
    head_likeness,
    head_power,
    selected_delta_heads,
    selected_heads,
)

Float64 = NDArray[np.float64]


class Moments(Protocol):
    """E[t tᵀ], E[s sᵀ] (whole, in blocks or as diagonals) and E[t sᵀ] of a place in two layers."""

    @property
    def tt(self) -> Float64:
        """The teacher's."""

    @property
    def ss(self) -> Float64:
        """The student's."""

    @property
    def ts(self) -> Float64:
        """Both, `D_t D_s`."""


def groups_of(layer: Layer, arch: Architecture) -> Groups:
    """Return a layer's query heads by KV head, or its DeltaNet's V heads by K head."""
    if layer.has("attn.o"):
        return Groups(layer.heads.query, layer.heads.shared)
    return Groups(layer.delta_heads.query, arch.number("linear_num_key_heads", 16))


def matched_mixer(
    teacher: tuple[Layer, Architecture],
    student: tuple[Layer, Architecture],
    mixer: Moments,
    *,
    turn: bool = False,
) -> HeadMap | DeltaMap:
    """Return the teacher's heads for the student's, by the moments of what o_proj or out_proj reads.

    With `turn` heads count as alike whose values differ by a rotation (`merge_heads.with_turned_values` then
    undoes it). Raises BitsmithError for layers of different kinds, other head sizes, and heads that do not
    fit.
    """
    (theirs, _), (ours, _) = teacher, student
    norm = "norm.q" if ours.has("attn.o") else "norm.delta"
    if not theirs.has(*ours.specs) or theirs.specs[norm].shape != ours.specs[norm].shape:
        raise BitsmithError(f"{theirs.instance} and {ours.instance} are of different kinds or head sizes")
    dim = ours.specs[norm].shape[0]
    likeness = head_likeness(mixer.ts, head_power(mixer.tt, dim), head_power(mixer.ss, dim), dim, turn=turn)
    groups = groups_of(*teacher), groups_of(*student)
    if norm == "norm.q":
        return selected_heads(likeness, *groups, dim, gated=ours.specs["attn.q"].axes[0] != "head.q")
    key_dims = [model.number("linear_key_head_dim", 128) for _, model in (teacher, student)]
    if key_dims[0] != key_dims[1]:
        raise BitsmithError(f"{theirs.instance} and {ours.instance} have key heads of {key_dims}")
    return selected_delta_heads(likeness, *groups, key_dims[1], dim)


def matched_ffn(ffn: Moments) -> AxisMap:
    """Return the teacher's neurons for the student's, by the moments of what down_proj reads."""
    return matched_neurons(ffn.ts, diagonal_of(ffn.tt), diagonal_of(ffn.ss))
