"""A teacher's attention and DeltaNet heads brought to a student's, whole KV groups together.

Heads are compared by their outputs on the same tokens: what o_proj (or DeltaNet's out_proj) reads, cut into
blocks of head size. Query heads belong to their KV head, DeltaNet's V heads to their K head; so groups are
matched first and heads within them. Selecting heads is well defined; mixing several into one is approximate,
as their norms and softmax are not linear. RoPE only allows turns of its own channel pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from bitsmith.errors import BitsmithError
from bitsmith.numerics.threads import one_blas_thread
from bitsmith.passes.merge_axes import (
    Index,
    Mixing,
    best_matches,
    by_channel,
    correlations,
    head_blocks,
    turned_blocks,
)

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Groups:
    """`heads` in `groups` of consecutive ones: query heads of a KV head, V heads of a K head.

    Raises BitsmithError where the heads do not divide.
    """

    heads: int
    groups: int

    def __post_init__(self) -> None:
        """Check that the heads divide."""
        if self.groups < 1 or self.heads < 1 or self.heads % self.groups:
            raise BitsmithError(f"{self.heads} heads do not divide into {self.groups} groups")

    @property
    def each(self) -> int:
        """Heads of a group."""
        return self.heads // self.groups

    def of(self, group: int) -> slice:
        """Return the heads of a group."""
        return slice(group * self.each, (group + 1) * self.each)


@dataclass(frozen=True)
class HeadMap:
    """A student's attention heads out of a teacher's: rows of q, k, v and columns of o by role.

    `query` and `output` are mixings of query heads (`Q_t Q_s`) for the rows of q and the columns of o,
    `shared` the teacher's KV head of each of the student's. `value_turns` and `query_turns` (`K_s d d`) turn
    the channels of a KV group, `x' = Rᵀ x`: values (undone by o), or queries (towards the student's keys).
    `frozen_kv` keeps the student's k and v. A `gated` q_proj holds `d` gate rows behind a head's `d` queries.
    With `regressed` (`Q_t·d Q_s·d`) q, k and v stay the student's, and the columns of o are made by it.
    """

    query: Mixing
    output: Mixing
    shared: Index
    teacher: Groups
    student: Groups
    head_dim: int
    gated: bool
    method: str
    value_turns: Float64 | None = None
    query_turns: Float64 | None = None
    frozen_kv: bool = False
    regressed: Float64 | None = None

    def rows(self, role: str) -> Mixing | None:
        """Return how the rows of a role's matrix are made; None where they stay as they are."""
        if role == "attn.q":
            return self._query_rows()
        if role in ("attn.k", "attn.v"):
            turns = self.value_turns if role == "attn.v" else None
            return _turned(self.shared, self.teacher.groups, self.head_dim, turns)
        return None

    def columns(self, role: str) -> Mixing | None:
        """Return how the columns of a role's matrix are made; None where they stay as they are."""
        if role != "attn.o" or self.regressed is not None:
            return self.regressed if role == "attn.o" else None
        turns = None if self.value_turns is None else np.repeat(self.value_turns, self.student.each, axis=0)
        return _turned(self.output, self.teacher.heads, self.head_dim, turns)

    def share(self, role: str, alpha: Float64) -> Float64:
        """Return α for each entry of a role's tensor, broadcastable, from α by KV group (`K_s`)."""
        if self.regressed is not None and role != "attn.o":
            return np.zeros(())
        if role in ("attn.q", "attn.o"):
            wide = np.repeat(
                alpha, self.student.each * self.head_dim * (1 + (self.gated and role == "attn.q"))
            )
            return wide[None, :] if role == "attn.o" else wide[:, None]
        if role in ("attn.k", "attn.v"):
            return np.repeat(alpha * (not self.frozen_kv), self.head_dim)[:, None]
        return np.asarray(alpha.mean() * (not (self.frozen_kv and role == "norm.k")))

    def _query_rows(self) -> Mixing:
        size = self.head_dim * (1 + self.gated)
        if self.query_turns is None:
            return by_channel(self.query, size)
        turns = np.zeros((self.student.groups, size, size))
        turns[:, np.arange(size), np.arange(size)] = 1.0
        turns[:, : self.head_dim, : self.head_dim] = self.query_turns
        return _turned(self.query, self.teacher.heads, size, np.repeat(turns, self.student.each, axis=0))


@dataclass(frozen=True)
class DeltaMap:
    """A student's DeltaNet heads out of a teacher's: K heads `keys` (`K_s`), V heads `values` (`V_s`).

    `output` mixes V heads (`V_t V_s`) for the columns of out_proj. Convolution, l2 norm, SiLU and decay allow
    no other change than choosing heads. With `regressed` (`V_t·d V_s·d`) all but out_proj is the student's.
    """

    keys: Index
    values: Index
    output: Mixing
    teacher: Groups
    student: Groups
    key_dim: int
    value_dim: int
    method: str
    regressed: Float64 | None = None

    def rows(self, role: str) -> Mixing | None:
        """Return how the rows of a role's tensor are made; None where they stay as they are."""
        if role in ("delta.in_qkv", "delta.conv"):
            keys, offset = by_channel(self.keys, self.key_dim), self.teacher.groups * self.key_dim
            values = by_channel(self.values, self.value_dim)
            return np.concatenate([keys, offset + keys, 2 * offset + values])
        if role == "delta.in_z":
            return by_channel(self.values, self.value_dim)
        return self.values if role in ("delta.in_b", "delta.in_a", "delta.decay", "delta.dt") else None

    def columns(self, role: str) -> Mixing | None:
        """Return how the columns of a role's matrix are made; None where they stay as they are."""
        if role != "delta.out" or self.regressed is not None:
            return self.regressed if role == "delta.out" else None
        return by_channel(self.output, self.value_dim)

    def share(self, role: str, alpha: Float64) -> Float64:
        """Return α for each entry of a role's tensor, broadcastable, from α by K head (`K_s`)."""
        heads = np.repeat(alpha, self.student.each)
        if self.regressed is not None and role != "delta.out":
            return np.zeros(())
        if role in ("delta.in_qkv", "delta.conv"):
            keys = np.repeat(alpha, self.key_dim)
            return np.concatenate([keys, keys, np.repeat(heads, self.value_dim)])[:, None]
        if role == "delta.in_z":
            return np.repeat(heads, self.value_dim)[:, None]
        if role == "delta.out":
            return np.repeat(heads, self.value_dim)[None, :]
        if role in ("delta.decay", "delta.dt"):
            return heads
        return heads[:, None] if role in ("delta.in_b", "delta.in_a") else np.asarray(alpha.mean())


def head_traces(moment: Float64, dim: int) -> Float64:
    """Return the traces (`H H'`) of a moment's blocks of head size: E[o_h · o_h'].

    Of a moment kept in blocks (`n b b`) or as a diagonal, what it does not hold counts as zero. Raises
    BitsmithError where it does not divide into heads.
    """
    if moment.ndim == 3:
        parts = [head_traces(block, dim) for block in moment]
        return np.asarray(linalg.block_diag(*parts), np.float64)
    if moment.ndim == 1:
        return np.diag(head_power(moment, dim))
    rows, columns = moment.shape
    if rows % dim or columns % dim:
        raise BitsmithError(f"a moment of shape {moment.shape} does not divide into heads of {dim}")
    blocks = moment.reshape(rows // dim, dim, columns // dim, dim)
    traces: Float64 = np.einsum("aibi->ab", blocks)
    return traces


def head_power(moment: Float64, dim: int) -> Float64:
    """Return each head's E|o|² (`H`), of a moment kept whole, in blocks or as a diagonal."""
    power: Float64 = np.trace(head_blocks(moment, dim), axis1=1, axis2=2)
    return power


@one_blas_thread()
def head_likeness(
    cross: Float64, teacher_power: Float64, student_power: Float64, dim: int, *, turn: bool = False
) -> Float64:
    """Return how alike heads' outputs are (`H_t H_s`), from E[o_t o_sᵀ] and each head's E|o|² (`H`).

    The trace of the heads' block over the root of both powers; with `turn` its nuclear norm, the best that a
    rotation of channels can make of it.
    """
    if not turn:
        return correlations(head_traces(cross, dim), teacher_power, student_power)
    shape = cross.shape[0] // dim, dim, cross.shape[1] // dim, dim
    blocks = cross.reshape(shape).transpose(0, 2, 1, 3)
    return correlations(np.linalg.svd(blocks, compute_uv=False).sum(-1), teacher_power, student_power)


def matched_heads(
    likeness: Float64, teacher: Groups, student: Groups, order: Sequence[int] | None = None
) -> tuple[Index, Index]:
    """Return the teacher's group of each student group and its head of each student head, by likeness.

    Both increase the sum of `likeness` (`H_t H_s`) to its most: heads within every pair of groups, then the
    groups. `order` fixes the groups. Raises BitsmithError for a teacher with fewer groups, or fewer heads to
    a group, than the student.
    """
    _expect_room(teacher, student)
    shape = teacher.groups, student.groups
    inside = {pair: _inside(likeness, teacher, student, *pair) for pair in np.ndindex(shape)}
    score = np.array([likeness[inside[pair], _heads(student, pair[1])].sum() for pair in np.ndindex(shape)])
    groups = best_matches(score.reshape(shape)) if order is None else np.asarray(order, np.intp)
    return groups, np.concatenate([inside[int(t), s] for s, t in enumerate(groups)])


def selected_heads(
    likeness: Float64,
    teacher: Groups,
    student: Groups,
    head_dim: int,
    *,
    gated: bool = False,
    order: Sequence[int] | None = None,
) -> HeadMap:
    """Return the teacher's attention heads that are most like the student's; raises as `matched_heads`."""
    shared, heads = matched_heads(likeness, teacher, student, order)
    return HeadMap(heads, heads, shared, teacher, student, head_dim, gated, "heads.match")


def selected_delta_heads(
    likeness: Float64, teacher: Groups, student: Groups, key_dim: int, value_dim: int
) -> DeltaMap:
    """Return the teacher's DeltaNet heads that are most like the student's; raises as `matched_heads`.

    Groups are V heads by K head.
    """
    keys, values = matched_heads(likeness, teacher, student)
    return DeltaMap(keys, values, values, teacher, student, key_dim, value_dim, "delta.match")


def pruned_heads(chosen: HeadMap, likeness: Float64, importance: Float64, traces: Float64) -> HeadMap:
    """Return the most important heads of each KV group instead, the others tied to their nearest.

    `importance` is by teacher head (`Q_t`), `traces` E[o_h · o_h'] of the teacher (`Q_t Q_t`). A head left
    out adds its columns of o to those of the kept one of its group that it correlates with most, times
    `E[o_d · o_k] / E[o_k · o_k]`. Kept heads take the places where they are most like the student's.
    """
    query = np.empty(chosen.student.heads, np.intp)
    output = np.zeros((chosen.teacher.heads, chosen.student.heads))
    for s, t in enumerate(chosen.shared):
        heads, places = _heads(chosen.teacher, int(t)), _heads(chosen.student, s)
        kept = heads[np.sort(np.argsort(-importance[heads], kind="stable")[: len(places)])]
        query[places] = kept[best_matches(likeness[np.ix_(kept, places)])]
        output[query[places], places] = 1.0
        for dropped in np.setdiff1d(heads, kept):
            place, factor = _nearest(traces, int(dropped), query[places])
            output[dropped, places[place]] = factor
    return replace(chosen, query=query, output=output, method="heads.prune")


@one_blas_thread()
def paired_heads(chosen: HeadMap, traces: Float64, cross_traces: Float64) -> HeadMap:
    """Return blocks of heads mixed along their dominant directions, turned towards the student's heads.

    Of each KV group the top eigenvectors U (`G_t G_s`) of `traces` (E[o_h · o_h'], `Q_t Q_t`), times the
    rotation that meets `cross_traces` (E[o_t · o_s], `Q_t Q_s`) best. Channel c is mixed with channel c
    alone, so RoPE is kept; norms and softmax make it approximate.
    """
    mixing = np.zeros((chosen.teacher.heads, chosen.student.heads))
    for s, t in enumerate(chosen.shared):
        heads, places = _heads(chosen.teacher, int(t)), _heads(chosen.student, s)
        _, vectors = linalg.eigh(traces[np.ix_(heads, heads)])
        top = vectors[:, ::-1][:, : len(places)]
        u, _, wt = linalg.svd(top.T @ cross_traces[np.ix_(heads, places)])
        mixing[np.ix_(heads, places)] = top @ (u @ wt)
    return replace(chosen, query=mixing, output=mixing, method="heads.pair")


@one_blas_thread()
def with_turned_values(chosen: HeadMap, cross: Float64) -> HeadMap:
    """Return the map with each KV group's value channels turned towards the student's: block rotations.

    `R = U Wᵀ` of svd(`Σ_h E[o_t o_sᵀ]`) over the group's heads (`cross` is `Q_t·d Q_s·d`). Exact, as o turns
    back. Raises BitsmithError for gated attention, whose gate acts on single channels.
    """
    if chosen.gated:
        raise BitsmithError(
            "an output gate acts on single channels: values of gated attention cannot be turned"
        )
    dim, turns = chosen.head_dim, []
    mixing = _dense(chosen.output, chosen.teacher.heads)
    blocks = cross.reshape(chosen.teacher.heads, dim, chosen.student.heads, dim)
    for group in range(chosen.student.groups):
        places = chosen.student.of(group)
        u, _, wt = linalg.svd(np.einsum("th,tihj->ij", mixing[:, places], blocks[:, :, places]))
        turns.append(u @ wt)
    return replace(chosen, value_turns=np.stack(turns), method=f"{chosen.method}+turn")


def with_frozen_kv(chosen: HeadMap, key_cross: Float64, rotary_dim: int) -> HeadMap:
    """Return the map that keeps the student's k and v and turns the teacher's queries towards those keys.

    `key_cross` is E[k_t k_sᵀ] of matched KV heads (`K_s d d`), before RoPE. Of its channel pairs
    `(c, c + rotary_dim/2)` each turns by one angle, which RoPE commutes with; those behind turn freely.
    """
    turns = np.stack([_key_turn(block, rotary_dim) for block in key_cross])
    return replace(chosen, query_turns=turns, frozen_kv=True, method=f"{chosen.method}+frozen_kv")


@one_blas_thread()
def head_importance(o_proj: NDArray[Any], moment: Float64, heads: int) -> Float64:
    """Return what each head adds to the stream's energy, `tr(O_h E[o oᵀ]_hh O_hᵀ)` (`Q_t`).

    o_proj is `D Q_t·d`, `moment` E[o oᵀ] (`Q_t·d Q_t·d`), whole, in blocks or as a diagonal.
    """
    columns = o_proj.astype(np.float64).reshape(o_proj.shape[0], heads, -1)
    blocks = head_blocks(moment, columns.shape[2])
    return np.array([np.vdot(columns[:, h] @ blocks[h], columns[:, h]) for h in range(heads)])


@one_blas_thread()
def key_cross(
    teacher: NDArray[Any], student: NDArray[Any], states: Float64, shared: Index, dim: int
) -> Float64:
    """Return E[k_t k_sᵀ] of matched KV heads (`K_s d d`) from E[x_t x_sᵀ] (`states`, `D_t D_s`).

    `teacher` and `student` are k_proj with the gain of the norm in front, `K·d D`. What RMSNorm divides a
    token by is taken as the same for all tokens.
    """
    left = teacher.astype(np.float64).reshape(-1, dim, teacher.shape[1])[shared] @ states
    right = student.astype(np.float64).reshape(-1, dim, student.shape[1])
    cross: Float64 = np.einsum("gas,gbs->gab", left, right)
    return cross


def _expect_room(teacher: Groups, student: Groups) -> None:
    if teacher.groups < student.groups or teacher.each < student.each:
        raise BitsmithError(
            f"the teacher's {teacher.groups} groups of {teacher.each} heads do not hold the student's "
            f"{student.groups} groups of {student.each}"
        )


def _heads(groups: Groups, group: int) -> Index:
    return np.arange(groups.heads, dtype=np.intp)[groups.of(group)]


def _inside(likeness: Float64, teacher: Groups, student: Groups, t: int, s: int) -> Index:
    """Return the teacher heads of group t for the student heads of group s."""
    heads, places = _heads(teacher, t), _heads(student, s)
    found: Index = heads[best_matches(likeness[np.ix_(heads, places)])]
    return found


def _nearest(traces: Float64, dropped: int, kept: Index) -> tuple[int, float]:
    """Return the place of the kept head that correlates most with a dropped one, and the factor to it."""
    power = np.diagonal(traces)
    among = correlations(traces[[dropped]][:, kept], power[[dropped]], power[kept])[0]
    place = int(np.abs(among).argmax())
    size = float(power[kept[place]])
    return place, float(traces[dropped, kept[place]]) / size if size > 0 else 0.0


def _key_turn(block: Float64, rotary_dim: int) -> Float64:
    """Return the rotation (`d d`) nearest to `block` that RoPE commutes with."""
    turn, half = np.eye(len(block)), rotary_dim // 2
    for c in range(half):
        a, b = c, c + half
        angle = np.arctan2(block[b, a] - block[a, b], block[a, a] + block[b, b])
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[b, a], turn[a, b] = np.sin(angle), -np.sin(angle)
    if rotary_dim < len(block):
        u, _, wt = linalg.svd(block[rotary_dim:, rotary_dim:])
        turn[rotary_dim:, rotary_dim:] = u @ wt
    return turn


def _dense(mixing: Mixing, wide: int) -> Float64:
    """Return a mixing as a matrix `n_t n_s`."""
    if mixing.ndim == 2:
        return np.asarray(mixing, np.float64)
    made = np.zeros((wide, len(mixing)))
    made[mixing, np.arange(len(mixing))] = 1.0
    return made


def _turned(mixing: Mixing, wide: int, dim: int, turns: Float64 | None) -> Mixing:
    """Return a mixing of heads as one of channels, each student head's channels turned."""
    if turns is None:
        return by_channel(mixing, dim)
    return turned_blocks(_dense(mixing, wide), dim, turns)
