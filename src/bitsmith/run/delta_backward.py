"""The gated delta rule with its gradient, head by head at once, in chunks of 64 tokens.

In the words of `numerics.delta`, per head and chunk, with D_ij = e^(c_i - c_j) for j ≤ i, B = K Kᵀ ∘ D below
the diagonal, P = Q Kᵀ ∘ D, e = e^c, f = e^(c_last - c), M = V - e K S:
`(I + β B) R = β M`, `O = e Q S + P R`, `S' = e_last S + (f K)ᵀ R`.
Backwards, from the gradients Ȯ and Ṡ': `Ṙ = Pᵀ Ȯ + f K Ṡ'`, `Ṗ = Ȯ Rᵀ`, `(I + β B)ᵀ W = Ṙ`, `Ȧ = -W Rᵀ` below
the diagonal, `β̇ = Σ W M + Σ Ȧ B`, `V̇ = β W`, `Q̇ = e Ȯ Sᵀ + (Ṗ ∘ D) K`, with Z = β Ȧ ∘ D
`K̇ = -β e W Sᵀ + f R Ṡ'ᵀ + (Ṗ ∘ D)ᵀ Q + (Z + Zᵀ) K`, `Ṡ = e_last Ṡ' + Qᵀ(e Ȯ) - Kᵀ(β e W)`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

Tensor = torch.Tensor

_CHUNK = 64


@dataclass(frozen=True)
class Saved:
    """What a chunk's gradient needs again; vectors `heads L`, matrices `heads L …`."""

    keys: Tensor
    queries: Tensor
    beta: Tensor
    sums: Tensor
    decays: Tensor
    below: Tensor
    within: Tensor
    missing: Tensor
    replies: Tensor
    state: Tensor


def delta_rule(
    queries: Tensor, keys: Tensor, values: Tensor, log_decay: Tensor, beta: Tensor
) -> tuple[Tensor, list[Saved]]:
    """Return the recurrence's output (`heads T dv`) from a zero state, and what `delta_rule_gradient` needs.

    Queries and keys (`heads T dk`) have their lengths already; `log_decay` and `beta` are `heads T`.
    """
    state = values.new_zeros((len(keys), keys.shape[-1], values.shape[-1]))
    found, saved = torch.empty_like(values), list[Saved]()
    for start in range(0, keys.shape[1], _CHUNK):
        part = slice(start, start + _CHUNK)
        out, state, kept = _chunk(
            (queries[:, part], keys[:, part], values[:, part]), log_decay[:, part], beta[:, part], state
        )
        found[:, part] = out
        saved.append(kept)
    return found, saved


def _chunk(
    q_k_v: tuple[Tensor, Tensor, Tensor], log_decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Saved]:
    queries, keys, values = q_k_v
    sums = log_decay.cumsum(-1)
    decays = (sums[:, :, None] - sums[:, None]).tril_().exp_().tril_()
    below = (keys @ keys.mT).mul_(decays).tril_(-1)
    within = (queries @ keys.mT).mul_(decays)
    grown = sums.exp()[..., None]
    missing = values - grown * (keys @ state)
    replies = torch.linalg.solve_triangular(
        beta[..., None] * below, beta[..., None] * missing, upper=False, unitriangular=True
    )
    out = torch.baddbmm(grown * (queries @ state), within, replies)
    rest = (sums[:, -1:] - sums).exp()[..., None]
    after = torch.baddbmm(grown[:, -1:] * state, (rest * keys).mT, replies)
    return out, after, Saved(keys, queries, beta, sums, decays, below, within, missing, replies, state)


def delta_rule_gradient(saved: list[Saved], by_out: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients by queries, keys, values, log decay and beta, from that by the output."""
    by_state = torch.zeros_like(saved[0].state)
    found = []
    for number in reversed(range(len(saved))):
        part = slice(number * _CHUNK, (number + 1) * _CHUNK)
        by_state, parts = _chunk_gradient(saved.pop(), by_out[:, part], by_state)
        found.append(parts)
    by_q, by_k, by_v, by_decay, by_beta = (torch.cat(parts[::-1], 1) for parts in zip(*found, strict=True))
    return by_q, by_k, by_v, by_decay, by_beta


def _chunk_gradient(kept: Saved, by_out: Tensor, by_after: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    keys, queries, state, replies = kept.keys, kept.queries, kept.state, kept.replies
    beta, grown = kept.beta[..., None], kept.sums.exp()[..., None]
    rest, last = (kept.sums[:, -1:] - kept.sums).exp()[..., None], grown[:, -1:]
    by_replies = torch.baddbmm(kept.within.mT @ by_out, rest * keys, by_after)
    solved = torch.linalg.solve_triangular((beta * kept.below).mT, by_replies, upper=True, unitriangular=True)
    by_within = by_out @ replies.mT
    by_below = (solved @ replies.mT).neg_().tril_(-1)
    read, replaced = grown * by_out, beta * grown * solved
    by_q, by_k, later = read @ state.mT, replaced @ state.mT, rest * (replies @ by_after.mT)
    by_sums = (queries * by_q).sum(-1) - (keys * by_k).sum(-1)
    moved = (keys * later).sum(-1)
    by_sums -= moved
    by_sums[:, -1] += moved.sum(-1) + last[:, 0, 0] * (by_after * state).sum((-1, -2))
    fading = by_below * kept.below
    by_beta = (solved * kept.missing).sum(-1) + fading.sum(-1)
    spread = torch.addcmul(by_within * kept.within, beta, fading)
    by_sums += spread.sum(-1) - spread.sum(-2)
    by_decay = by_sums.flip(-1).cumsum(-1).flip(-1)
    across = by_within.mul_(kept.decays)
    among = by_below.mul_(kept.decays).mul_(beta)
    by_q = torch.baddbmm(by_q, across, keys)
    by_k = torch.baddbmm(later.sub_(by_k), across.mT, queries)
    by_k = torch.baddbmm(by_k, among.add_(among.mT.clone()), keys)
    before = torch.baddbmm(last * by_after, queries.mT, read).baddbmm_(keys.mT, replaced, alpha=-1)
    return before, (by_q, by_k, beta * solved, by_decay, by_beta)
