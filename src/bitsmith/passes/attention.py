"""Attention and DeltaNet layers compressed as the seed meant to, measured on the weights.

What a weight-space error of a composed map means: inputs are independent standard Gaussian vectors, and heads
mix positions independently of each other. The output energy of a full-attention head is then `|O_h V_g|²`
(`V_g` the value rows of its KV head, `O_h` its columns of o_proj), and scores `xᵀ Q_hᵀ K_g y` have energy
`|Q_hᵀ K_g|²`. Norms, RoPE, softmax, output gates, DeltaNet's convolution, SiLU and decay are left out: the
errors compare methods; they do not predict a layer's output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from bitsmith.errors import BitsmithError
from bitsmith.passes.factors import symmetric, symmetric_bytes

Weights = NDArray[Any]
Float64 = NDArray[np.float64]

Products = tuple[float, float, float]  # <M, M>, <M, M'>, <M', M'>

PRUNABLE_SHARE = 0.01
SEED_HEADS_RATIO = 8.0  # "EYM low-rank + head pruning + 4-bit"
SEED_KERNEL_RATIO = 12.6  # "kernel SVD + value pruning + 4-bit"
_INT4_RATIO = 4.0
_INPUTS = "independent Gaussian inputs; heads mix positions independently; norms, RoPE, gates, SiLU left out"


@dataclass(frozen=True)
class HeadEnergies:
    """Shares of energy by head (each list sums to 1), and query heads that cost little of the output.

    `output` are the shares `|O_h V_g(h)|²` by query head: what dropping the head costs of the output's
    energy. None where all weights of a list are 0.
    """

    q: tuple[float, ...] | None
    k: tuple[float, ...] | None
    v: tuple[float, ...] | None
    o: tuple[float, ...] | None
    output: tuple[float, ...] | None
    threshold: float
    prunable: tuple[int, ...]  # query heads whose output share is below the threshold


@dataclass(frozen=True)
class SetCoding:
    """The projections of one layer stored another way, with errors measured after decoding.

    `weights_error` is the relative Frobenius error of all projections together; for a method that changes
    the projections' basis it is None. `score_error` is that of the score maps, `output_error` that of the
    value-output maps (attention) or of their products with the score maps (DeltaNet), under `inputs`. Errors
    are None where the weights are all 0.
    """

    method: str
    rank: int
    dropped: int  # query heads (attention) or value channels (DeltaNet)
    factor_bits: int
    stored_bytes: int
    ratio_to_16_bit: float
    weights_error: float | None
    score_error: float | None
    output_error: float | None
    claimed_ratio: float
    inputs: str = _INPUTS


def head_energies(
    q: Weights,
    k: Weights,
    v: Weights,
    o: Weights,
    heads: int,
    kv_heads: int,
    threshold: float = PRUNABLE_SHARE,
) -> HeadEnergies:
    """Return energies by head of q (`heads*d in`), k and v (`kv_heads*d in`) and o (`out heads*d`).

    Query rows only: gate rows that share q_proj are the caller's to leave out (`query_rows`).
    Raises BitsmithError where the shapes do not hold these heads.
    """
    q_heads, k_heads, v_heads, o_heads = _attention_heads(q, k, v, o, heads, kv_heads)
    output = _shares(_output_energies(v_heads, o_heads))
    prunable = () if output is None else tuple(h for h, share in enumerate(output) if share < threshold)
    return HeadEnergies(
        _by_head(q_heads),
        _by_head(k_heads),
        _by_head(v_heads),
        _by_head(o_heads),
        output,
        threshold,
        prunable,
    )


def query_rows(q_proj: Weights, heads: int) -> Weights:
    """Return the query rows of a gated q_proj, which holds `d` query and `d` gate rows for each head."""
    if q_proj.shape[0] % (2 * heads):
        raise BitsmithError(f"q_proj has {q_proj.shape[0]} rows, expected a multiple of {2 * heads}")
    return q_proj.reshape(heads, 2, -1, q_proj.shape[1])[:, 0].reshape(-1, q_proj.shape[1])


def delta_parts(
    in_qkv: Weights, k_heads: int, k_dim: int, v_heads: int, v_dim: int
) -> tuple[Weights, Weights, Weights]:
    """Return the q, k and v rows of a DeltaNet's in_proj_qkv.

    Raises BitsmithError if the rows are not theirs.
    """
    keys, values = k_heads * k_dim, v_heads * v_dim
    if in_qkv.shape[0] != 2 * keys + values:
        raise BitsmithError(f"in_proj_qkv has {in_qkv.shape[0]} rows, expected {2 * keys + values}")
    return in_qkv[:keys], in_qkv[keys : 2 * keys], in_qkv[2 * keys :]


def low_rank_heads(
    q: Weights,
    k: Weights,
    v: Weights,
    o: Weights,
    heads: int,
    kv_heads: int,
    rank: int | None = None,
    dropped: int | None = None,
    factor_bits: int = 4,
) -> SetCoding:
    """Truncate every head's slice of q, k, v and o to `rank`, and drop the query heads that cost least.

    Defaults: the prunable heads of `head_energies`, and the rank that with 4-bit factors comes to the claimed
    ratio, 8.0. A KV head is dropped with the last of its query heads; one head always stays. The factors are
    stored in `factor_bits` (4 or 8: integers with an F16 scale per row; 16: F16). The best rank per slice is
    Eckart-Young-Mirsky's. Raises as `head_energies` does.
    """
    parts = _attention_heads(q, k, v, o, heads, kv_heads)
    if rank is None:
        dim, columns = parts[0][0].shape
        rank = max(1, int(_INT4_RATIO / SEED_HEADS_RATIO * dim * columns / (dim + columns)))
    if dropped is None:
        dropped = len(head_energies(q, k, v, o, heads, kv_heads).prunable)
    order = np.argsort(_output_energies(parts[2], parts[3]), kind="stable")
    gone = set(order[: min(dropped, heads - 1)].tolist())
    group = heads // kv_heads
    kv_gone = {g for g in range(kv_heads) if gone.issuperset(range(g * group, (g + 1) * group))}
    made = [
        [_truncated(head, rank, factor_bits, h in without) for h, head in enumerate(part)]
        for part, without in zip(parts, (gone, kv_gone, kv_gone, gone), strict=True)
    ]
    stored_bytes = sum(size for part in made for _, size in part)
    errors = _attention_errors(parts, [[head for head, _ in part] for part in made])
    return SetCoding(
        "EYM low rank + head pruning",
        rank,
        len(gone),
        factor_bits,
        stored_bytes,
        2 * (q.size + k.size + v.size + o.size) / stored_bytes,
        *errors,
        claimed_ratio=SEED_HEADS_RATIO,
    )


def _attention_errors(
    before: Sequence[list[Float64]], after: Sequence[list[Float64]]
) -> tuple[float | None, float | None, float | None]:
    """Return the relative errors of all weights, of the score maps and of the value-output maps."""
    weights, scores, outputs = _Inner(), _Inner(), _Inner()
    for part, part2 in zip(before, after, strict=True):
        for head, head2 in zip(part, part2, strict=True):
            weights.add((_energy(head), float(np.vdot(head, head2)), _energy(head2)))
    (q, k, v, o), (q2, k2, v2, o2) = before, after
    for h in range(len(q)):
        g = h * len(k) // len(q)
        scores.add(_products(q[h].T, k[g], q2[h].T, k2[g]))
        outputs.add(_products(o[h], v[g], o2[h], v2[g]))
    return weights.error, scores.error, outputs.error


def kernel_and_values(
    q: Weights,
    k: Weights,
    v: Weights,
    out: Weights,
    k_heads: int,
    v_heads: int,
    rank: int | None = None,
    dropped: int | None = None,
    factor_bits: int = 4,
) -> SetCoding:
    """Truncate the kernel `Q_hᵀ K_h` of each K head to `rank` and drop the weakest value channels.

    q and k are `k_heads*d in`, v is `v_heads*e in`, out `hidden v_heads*e`; V heads are grouped by K head. A
    value channel is a row of v with its column of out; its energy is `|v_c|² |out_c|²`. Defaults keep the
    share of key dimensions and of channels that with 4-bit codes comes to the claimed ratio, 12.6. The
    truncated kernel is stored as new q and k of `rank` rows per head. The output error is that of
    `(Q_hᵀ K_h) ⊗ (Out_j V_j)` over V heads j. Raises BitsmithError where the shapes do not hold these heads.
    """
    _expect(q.shape == k.shape and v.shape[0] == out.shape[1], "q, k or v, out", (q, k, v, out))
    _expect(v_heads % k_heads == 0, f"{v_heads} V heads over {k_heads} K heads", (v,))
    q_heads, kk_heads = _split(q, k_heads), _split(k, k_heads)
    key_dim = q_heads[0].shape[0]
    share = _INT4_RATIO / SEED_KERNEL_RATIO
    rank = max(1, int(share * key_dim)) if rank is None else min(rank, key_dim)
    dropped = int((1 - share) * v.shape[0]) if dropped is None else min(dropped, v.shape[0])
    kernels, kernel_bytes = _coded_kernels(q_heads, kk_heads, rank, factor_bits)
    values, value_bytes = _pruned_values(v, out, v_heads, dropped, factor_bits)
    scores, both = _Inner(), _Inner()
    for kernel in kernels:
        scores.add(kernel)
    for j, value in enumerate(values):
        kernel = kernels[j * k_heads // v_heads]
        both.add((value[0] * kernel[0], value[1] * kernel[1], value[2] * kernel[2]))
    return SetCoding(
        "kernel SVD + value pruning",
        rank,
        dropped,
        factor_bits,
        kernel_bytes + value_bytes,
        2 * (q.size + k.size + v.size + out.size) / (kernel_bytes + value_bytes),
        None,
        scores.error,
        both.error,
        SEED_KERNEL_RATIO,
    )


def _coded_kernels(
    q_heads: list[Float64], k_heads: list[Float64], rank: int, bits: int
) -> tuple[list[Products], int]:
    """Return the inner products of each head's kernel and its coded truncation, and the bytes of all."""
    kernels, stored_bytes = [], 0
    for left, right in zip(q_heads, k_heads, strict=True):
        made = _kernel(left, right, rank)
        stored_bytes += sum(_stored_bytes(part, bits) for part in made)
        left2, right2 = (_coded(part, bits) for part in made)
        kernels.append(_products(left.T, right, left2.T, right2))
    return kernels, stored_bytes


def _pruned_values(
    v: Weights, out: Weights, v_heads: int, dropped: int, bits: int
) -> tuple[list[Products], int]:
    """Return the inner products of each V head's value-output map and its coded rest, and all bytes."""
    channels = np.square(v.astype(np.float64)).sum(1) * np.square(out.astype(np.float64)).sum(0)
    kept = np.sort(np.argsort(channels, kind="stable")[dropped:])
    v2, out2 = np.zeros(v.shape), np.zeros(out.shape)
    v2[kept], out2[:, kept] = _coded(v[kept], bits), _coded(out[:, kept], bits)
    stored_bytes = _stored_bytes(v[kept], bits) + _stored_bytes(out[:, kept], bits)
    split = (_split(v, v_heads), _split(out.T, v_heads), _split(v2, v_heads), _split(out2.T, v_heads))
    maps = [_products(out_j.T, v_j, out2_j.T, v2_j) for v_j, out_j, v2_j, out2_j in zip(*split, strict=True)]
    return maps, stored_bytes


class _Inner:
    """Sums of `<M, M>`, `<M, M'>` and `<M', M'>` over maps, and the relative error `|M - M'| / |M|`."""

    def __init__(self) -> None:
        self.sums = np.zeros(3)

    def add(self, products: Products) -> None:
        self.sums += products

    @property
    def error(self) -> float | None:
        before, across, after = self.sums
        return float(np.sqrt(max(0.0, before - 2 * across + after) / before)) if before > 0 else None


def _products(left: Float64, right: Float64, left2: Float64, right2: Float64) -> Products:
    """Return the inner products of `M = left @ right` and `M' = left2 @ right2`, never formed."""

    def inner(a: Float64, b: Float64, c: Float64, d: Float64) -> float:
        return float(np.vdot(a.T @ c, b @ d.T))

    return (
        inner(left, right, left, right),
        inner(left, right, left2, right2),
        inner(left2, right2, left2, right2),
    )


def _attention_heads(
    q: Weights, k: Weights, v: Weights, o: Weights, heads: int, kv_heads: int
) -> tuple[list[Float64], list[Float64], list[Float64], list[Float64]]:
    """Return q, k, v and (transposed to `out d`) o by head."""
    _expect(heads % kv_heads == 0, f"{heads} heads over {kv_heads} KV heads", (q, k))
    fits = q.shape[0] == o.shape[1] and k.shape == v.shape and q.shape[0] * kv_heads == k.shape[0] * heads
    _expect(fits, f"{heads} heads and {kv_heads} KV heads", (q, k, v, o))
    return (
        _split(q, heads),
        _split(k, kv_heads),
        _split(v, kv_heads),
        [np.ascontiguousarray(head.T) for head in _split(o.T, heads)],
    )


def _expect(fits: bool, what: str, arrays: Sequence[Weights]) -> None:
    if not fits:
        raise BitsmithError(f"shapes {' '.join(str(a.shape) for a in arrays)} do not hold {what}")


def _split(rows: Weights, heads: int) -> list[Float64]:
    _expect(rows.ndim == 2 and rows.shape[0] % heads == 0, f"{heads} heads", (rows,))
    return list(rows.astype(np.float64).reshape(heads, -1, rows.shape[1]))


def _energy(weights: Weights) -> float:
    return float(np.vdot(weights, weights))


def _by_head(parts: list[Float64]) -> tuple[float, ...] | None:
    return _shares([_energy(head) for head in parts])


def _output_energies(v_heads: list[Float64], o_heads: list[Float64]) -> list[float]:
    group = len(o_heads) // len(v_heads)
    grams = [v @ v.T for v in v_heads]
    return [float(np.vdot(o.T @ o, grams[h // group])) for h, o in enumerate(o_heads)]


def _shares(energies: list[float]) -> tuple[float, ...] | None:
    total = sum(energies)
    if not np.isfinite(total):
        raise BitsmithError("values are not finite, or too large to square")
    return tuple(energy / total for energy in energies) if total > 0 else None


def _truncated(head: Float64, rank: int, bits: int, dropped: bool) -> tuple[Float64, int]:
    """Return a head's slice from coded factors of `rank`, and their bytes."""
    if dropped:
        return np.zeros_like(head), 0
    u, s, vt = linalg.svd(head, full_matrices=False)
    left, right = (u[:, :rank] * np.sqrt(s[:rank])).T, np.sqrt(s[:rank])[:, None] * vt[:rank]
    product = _coded(left, bits).T @ _coded(right, bits)
    return product, _stored_bytes(left, bits) + _stored_bytes(right, bits)


def _kernel(left: Float64, right: Float64, rank: int) -> tuple[Float64, Float64]:
    """Return new q and k (`rank in` each) whose kernel is the best rank of `leftᵀ right`."""
    q_left, r_left = linalg.qr(left.T, mode="economic")
    q_right, r_right = linalg.qr(right.T, mode="economic")
    u, s, vt = linalg.svd(r_left @ r_right.T)
    root = np.sqrt(s[:rank])
    return (q_left @ u[:, :rank] * root).T, (q_right @ vt[:rank].T * root).T


def _coded(rows: Weights, bits: int) -> Float64:
    if rows.size == 0 or bits == 16:
        return rows.astype(np.float16).astype(np.float64)
    return symmetric(rows.astype(np.float32), 2 ** (bits - 1) - 1).astype(np.float64)


def _stored_bytes(rows: Weights, bits: int) -> int:
    return 2 * rows.size if bits == 16 else symmetric_bytes(rows.shape[0], rows.shape[1], bits)
