"""The inner axes of a pair of layers, heads and neurons: what they are compared by, and their maps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from bitsmith.archs import Architecture
from bitsmith.errors import BitsmithError
from bitsmith.numerics.threads import one_blas_thread
from bitsmith.passes.axes import Layer
from bitsmith.passes.merge_axes import AxisMap, correlations, diagonal_of, is_selection, regression
from bitsmith.passes.merge_ffn import matched_neurons, strongest_neurons, with_rest_solved, with_rest_tied
from bitsmith.passes.merge_heads import (
    DeltaMap,
    Groups,
    HeadMap,
    head_importance,
    head_likeness,
    head_power,
    head_traces,
    key_cross,
    paired_heads,
    pruned_heads,
    selected_delta_heads,
    selected_heads,
    with_frozen_kv,
    with_turned_values,
)
from bitsmith.passes.merge_maps import ResidualMap
from bitsmith.passes.transform import Model

Float64 = NDArray[np.float64]
Side = tuple[Layer, Model]
HeadMethod = Literal["match", "pair", "prune", "turn", "frozen-kv", "regress"]
FfnMethod = Literal["match", "strongest", "solve", "tie", "regress"]

RIDGE = 1e-4
"""What regression adds to a moment's diagonal, as a share of the diagonal's mean."""


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


@dataclass(frozen=True)
class HeadsSeen:
    """What heads are compared by: `likeness` (`H_t H_s`) as they are and `turned_likeness` up to a rotation.

    `cross` is E[o_t o_sᵀ] (`H_t·d H_s·d`), `traces` E[o_h · o_h'] of the teacher (`H_t H_t`), `cross_traces`
    of both (`H_t H_s`), `importance` what a teacher's head adds to the stream (`H_t`), `student_power`
    the student's E|o|² (`H_s`), `student_moment` its E[o oᵀ], None where it is not known.
    """

    likeness: Float64
    turned_likeness: Float64
    cross: Float64
    traces: Float64
    cross_traces: Float64
    importance: Float64
    student_power: Float64
    student_moment: Float64 | None


@dataclass(frozen=True)
class NeuronsSeen:
    """What neurons are compared by: `cross` (`n_t n_s`) over the root of both powers (`n_t`, `n_s`).

    `importance` is what a teacher's neuron adds to the stream (`n_t`), `moment` the teacher's E[h hᵀ],
    `student_moment` the student's, None where they are not known.
    """

    cross: Float64
    teacher_power: Float64
    student_power: Float64
    importance: Float64
    moment: Float64 | None
    student_moment: Float64 | None


def groups_of(layer: Layer, arch: Architecture) -> Groups:
    """Return a layer's query heads by KV head, or its DeltaNet's V heads by K head."""
    if layer.has("attn.o"):
        return Groups(layer.heads.query, layer.heads.shared)
    return Groups(layer.delta_heads.query, arch.number("linear_num_key_heads", 16))


def most_alike(
    teacher: tuple[Layer, Architecture], student: tuple[Layer, Architecture], likeness: Float64
) -> HeadMap | DeltaMap:
    """Return the teacher's heads that are most like the student's (`likeness`, `H_t H_s`).

    Raises BitsmithError for layers of different kinds, other head sizes, and heads that do not fit.
    """
    (theirs, _), (ours, _) = teacher, student
    dim = _head_dim(theirs, ours)
    groups = groups_of(*teacher), groups_of(*student)
    if ours.has("attn.o"):
        return selected_heads(likeness, *groups, dim, gated=_is_gated(ours))
    key_dims = [model.number("linear_key_head_dim", 128) for _, model in (teacher, student)]
    if key_dims[0] != key_dims[1]:
        raise BitsmithError(f"{theirs.instance} and {ours.instance} have key heads of {key_dims}")
    return selected_delta_heads(likeness, *groups, key_dims[1], dim)


def heads_by_activations(teacher: Side, student: Side, mixer: Moments) -> HeadsSeen:
    """Return what heads are compared by: the moments of what o_proj or out_proj reads.

    Raises BitsmithError for layers of different kinds or head sizes.
    """
    dim = _head_dim(teacher[0], student[0])
    powers = head_power(mixer.tt, dim), head_power(mixer.ss, dim)
    writer = _weights(teacher, "attn.o" if teacher[0].has("attn.o") else "delta.out")
    return HeadsSeen(
        likeness=head_likeness(mixer.ts, *powers, dim),
        turned_likeness=head_likeness(mixer.ts, *powers, dim, turn=True),
        cross=mixer.ts,
        traces=head_traces(mixer.tt, dim),
        cross_traces=head_traces(mixer.ts, dim),
        importance=head_importance(writer, mixer.tt, len(powers[0])),
        student_power=powers[1],
        student_moment=mixer.ss,
    )


def neurons_by_activations(teacher: Side, ffn: Moments) -> NeuronsSeen:
    """Return what neurons are compared by: the moments of what down_proj reads."""
    power = diagonal_of(ffn.tt)
    adds = power * (_weights(teacher, "ffn.down") ** 2).sum(0)
    return NeuronsSeen(ffn.ts, power, diagonal_of(ffn.ss), adds, ffn.tt, ffn.ss)


@one_blas_thread()
def heads_by_weights(teacher: Side, student: Side, mapping: ResidualMap) -> HeadsSeen:
    """Return what heads are compared by without activations: what a head writes of a state it attends to.

    `O_h V_h` (`D_s D_s`, by the map) stands for a head's output, `tr((O_t V_t)ᵀ O_s V_s)` for the moment of
    two, which turning a head's channels does not change; `cross` is `V_t V_sᵀ`. Raises BitsmithError for
    layers of different kinds or head sizes.
    """
    dim = _head_dim(teacher[0], student[0])
    (o_t, v_t), ours = (_outputs_and_values(side, dim) for side in (teacher, student))
    theirs = np.swapaxes(np.swapaxes(o_t, 1, 2) @ mapping.forward, 1, 2), v_t @ mapping.backward
    traces, cross = _inner_products(theirs, theirs), _inner_products(theirs, ours)
    power = np.diagonal(traces).copy()
    student_power = np.diagonal(_inner_products(ours, ours)).copy()
    likeness = correlations(cross, power, student_power)
    left, right = (values.reshape(-1, values.shape[2]) for _, values in (theirs, ours))
    return HeadsSeen(likeness, likeness, left @ right.T, traces, cross, power, student_power, None)


@one_blas_thread()
def neurons_by_weights(teacher: Side, student: Side, mapping: ResidualMap) -> NeuronsSeen:
    """Return what neurons are compared by without activations: mean cosine of rows of gate, up and down."""
    total: Float64 = np.zeros((teacher[0].specs["ffn.down"].shape[1], student[0].specs["ffn.down"].shape[1]))
    for role in ("ffn.gate", "ffn.up", "ffn.down"):
        theirs, ours = _weights(teacher, role), _weights(student, role)
        if role == "ffn.down":
            left, right = theirs.T @ mapping.forward, ours.T
        else:
            left = _gained(theirs, teacher, "norm.ffn") @ mapping.backward
            right = _gained(ours, student, "norm.ffn")
        total += correlations(left @ right.T, (left**2).sum(1), (right**2).sum(1)) / 3
    adds = (_weights(teacher, "ffn.down") ** 2).sum(0)
    return NeuronsSeen(total, np.ones(len(total)), np.ones(total.shape[1]), adds, None, None)


def mixer_map(
    method: HeadMethod, teacher: Side, student: Side, seen: HeadsSeen, states: Float64
) -> HeadMap | DeltaMap:
    """Return how the teacher's heads become the student's.

    `match` takes the most alike; of attention, `pair` mixes blocks of heads (`paired_heads`), `prune` takes
    the most important (`pruned_heads`), `turn` turns values towards the student's (`with_turned_values`),
    `frozen-kv` keeps the student's keys and values and turns towards them (`with_frozen_kv`; values where no
    gate forbids). DeltaNet's heads are matched whatever of these is asked for. `regress` keeps all of the
    student's heads and finds by least squares what o_proj or out_proj has to make of them to write what the
    teacher's write. `states` is E[x_t x_sᵀ] in front of the mixer. Raises BitsmithError as `most_alike` and
    `with_turned_values` do.
    """
    (theirs, big), (ours, small) = teacher, student
    turns = ours.has("attn.o") and (method == "turn" or (method == "frozen-kv" and not _is_gated(ours)))
    likeness = seen.turned_likeness if turns else seen.likeness
    chosen = most_alike((theirs, big.arch), (ours, small.arch), likeness)
    if method == "regress":
        return _with_regressed_output(chosen, seen)
    if isinstance(chosen, DeltaMap):
        return chosen
    if method == "pair":
        return paired_heads(chosen, seen.traces, seen.cross_traces)
    if method == "prune":
        return pruned_heads(chosen, likeness, seen.importance, seen.traces)
    if turns:
        chosen = with_turned_values(chosen, seen.cross)
    if method != "frozen-kv":
        return chosen
    keys = [_gained(_weights(side, "attn.k"), side, "norm.mixer") for side in (teacher, student)]
    cross = key_cross(keys[0], keys[1], states, chosen.shared, chosen.head_dim)
    return with_frozen_kv(chosen, cross, small.arch.rotary_dim)


def group_likeness(heads: HeadMap | DeltaMap, seen: HeadsSeen) -> tuple[float, ...]:
    """Return by student group the mean likeness of its heads' outputs to those of the heads they take.

    Of heads that are mixed, `E[o' · o_s]` over the root of both powers; of turned ones, the best turn's; of
    `regress` the multiple correlation of all of the teacher's outputs with the student's.
    """
    if heads.regressed is not None:
        explained = _multiple_correlation(heads.regressed, seen.cross, float(np.trace(seen.traces)))
        return (explained,) * heads.student.groups
    taken = heads.values if isinstance(heads, DeltaMap) else heads.query
    if is_selection(taken):
        is_turned = isinstance(heads, HeadMap) and heads.value_turns is not None
        alike = (seen.turned_likeness if is_turned else seen.likeness)[taken, np.arange(len(taken))]
    else:
        power = np.einsum("ts,tu,us->s", taken, seen.traces, taken) * seen.student_power
        cross = (taken * seen.cross_traces).sum(0)
        alike = np.divide(cross, np.sqrt(np.maximum(power, 0)), out=np.zeros(len(cross)), where=power > 0)
    return tuple(float(alike[heads.student.of(group)].mean()) for group in range(heads.student.groups))


def ffn_map(method: FfnMethod, seen: NeuronsSeen) -> AxisMap:
    """Return how the teacher's neurons become the student's.

    `match` takes the most alike, `strongest` the most important; `solve` and `tie` match and fold those left
    out into down_proj (`with_rest_solved`, `with_rest_tied`); `regress` keeps the student's neurons and finds
    what down_proj makes of them by least squares. Raises BitsmithError for fewer neurons than the
    student has, and as those two do; without activations for the last three.
    """
    if method == "strongest":
        return strongest_neurons(seen.cross, seen.teacher_power, seen.student_power, seen.importance)
    chosen = matched_neurons(seen.cross, seen.teacher_power, seen.student_power)
    if method == "match":
        return chosen
    if seen.moment is None or seen.student_moment is None:
        raise BitsmithError(f"ffn {method} takes the neurons' activations: it cannot do without")
    if method == "regress":
        _expect_correlated(seen.student_moment, "neurons")
        reading = regression(seen.cross, seen.student_moment, RIDGE)
        return AxisMap(chosen.producing, reading, "ffn.regress", keeps_producers=True)
    return with_rest_solved(chosen, seen.moment) if method == "solve" else with_rest_tied(chosen, seen.moment)


def neuron_likeness(ffn: AxisMap, seen: NeuronsSeen) -> float:
    """Return the mean correlation of the student's neurons with those they take.

    Of `regress` the multiple correlation of all of the teacher's neurons with the student's.
    """
    if ffn.keeps_producers:
        return _multiple_correlation(ffn.reading, seen.cross, float(seen.teacher_power.sum()))
    kept = ffn.producing
    cross = seen.cross[kept, np.arange(len(kept))]
    power = seen.teacher_power[kept] * seen.student_power
    found = np.divide(cross, np.sqrt(np.maximum(power, 0)), out=np.zeros(len(kept)), where=power > 0)
    return float(found.mean())


def _multiple_correlation(mixing: Float64, cross: Float64, power: float) -> float:
    """Return the root of the share of `power` that a regression explains: `tr(M E[s tᵀ])` over it."""
    explained = max(float(np.vdot(mixing, cross)), 0.0)
    return float(np.sqrt(explained / power)) if power > 0 else 0.0


def _with_regressed_output(chosen: HeadMap | DeltaMap, seen: HeadsSeen) -> HeadMap | DeltaMap:
    """Return the map that keeps the student's heads and lets them write what the teacher's do."""
    if seen.student_moment is None:
        raise BitsmithError("heads regress takes the heads' activations: it cannot do without")
    _expect_correlated(seen.student_moment, "heads")
    mixing = regression(seen.cross, seen.student_moment, RIDGE)
    kind = "delta" if isinstance(chosen, DeltaMap) else "heads"
    return replace(chosen, regressed=mixing, method=f"{kind}.regress")


def _expect_correlated(moment: Float64, what: str) -> None:
    if moment.ndim == 1:
        raise BitsmithError(f"the {what}' second moment is kept as a diagonal: regress needs more of it")


def _head_dim(theirs: Layer, ours: Layer) -> int:
    norm = "norm.q" if ours.has("attn.o") else "norm.delta"
    if not theirs.has(*ours.specs) or theirs.specs[norm].shape != ours.specs[norm].shape:
        raise BitsmithError(f"{theirs.instance} and {ours.instance} are of different kinds or head sizes")
    return int(ours.specs[norm].shape[0])


def _is_gated(layer: Layer) -> bool:
    return layer.specs["attn.q"].axes[0] != "head.q"


def _weights(side: Side, role: str) -> Float64:
    layer, model = side
    rows: Float64 = model.ref(layer.specs[role].name).read().astype(np.float64)
    return rows


def _gained(weights: Float64, side: Side, norm: str) -> Float64:
    """Return what reads a norm with the norm's gain taken up."""
    return weights * (_weights(side, norm) + float(side[0].specs[norm].norm == "1+w"))


def _outputs_and_values(side: Side, dim: int) -> tuple[Float64, Float64]:
    """Return by head the columns of what writes (`H D d`) and the rows that make its values (`H d D`)."""
    layer, model = side
    attention = layer.has("attn.o")
    writer = _weights(side, "attn.o" if attention else "delta.out")
    values = _gained(_weights(side, "attn.v" if attention else "delta.in_qkv"), side, "norm.mixer")
    groups = groups_of(layer, model.arch)
    each = groups.each if attention else 1
    values = values[-groups.heads // each * dim :].reshape(-1, dim, values.shape[1])
    outputs = writer.reshape(len(writer), -1, dim).transpose(1, 0, 2)
    return outputs, np.repeat(values, each, axis=0)


def _inner_products(left: tuple[Float64, Float64], right: tuple[Float64, Float64]) -> Float64:
    """Return `tr((O_a V_a)ᵀ O_b V_b)` of all heads (`H_a H_b`)."""
    rows = [
        ((o.T @ right[0]) * (v @ right[1].transpose(0, 2, 1))).sum((1, 2)) for o, v in zip(*left, strict=True)
    ]
    return np.stack(rows)
