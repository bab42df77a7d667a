"""What a gated DeltaNet layer does between its matrix products, in loops that keep a head in the cache.

The recurrence per head, with q and k of length 1, k's weight β, and S (`dk dv`) zero at the start:
`S ← e^g S; r = β (v - Sᵀk); S ← S + k rᵀ; o = Sᵀq / √dk`. Chunks of 64 tokens (Yang et al. 2024,
arXiv:2412.06464): with c the running sum of g in a chunk,
`r_i = β_i (v_i - e^(c_i) Sᵀk_i) - Σ_{j<i} β_i k_i·k_j e^(c_i - c_j) r_j`,
`o_i = e^(c_i) Sᵀq_i + Σ_{j≤i} q_i·k_j e^(c_i - c_j) r_j`,
`S ← e^c S + Σ_j e^(c - c_j) k_j r_jᵀ`.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from bitsmith.numerics.exponential import decay, silu

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

_CHUNK = 64
_EPSILON = np.float32(1e-6)  # of the length of q and k
_ZERO = np.float32(0)


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc"})
def gate_linear(gate: Float32, up: Float32) -> None:
    """Replace `gate` (`N in`) by silu(gate) · up."""
    for row in range(gate.shape[0]):
        of_gate, of_up = gate[row], up[row]
        for column in range(of_gate.size):
            of_gate[column] = silu(of_gate[column]) * of_up[column]


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc"})
def convolve(mixed: Float32, taps: Float32) -> None:
    """Replace `mixed` (`T channels`) by silu of its causal convolution with `taps` (`taps channels`).

    From the last token to the first, so that what is still read is not yet replaced.
    """
    n_taps = taps.shape[0]
    for token in range(mixed.shape[0] - 1, -1, -1):
        row = mixed[token]
        last = taps[n_taps - 1]
        for channel in range(row.size):
            row[channel] *= last[channel]
        for back in range(1, min(n_taps, token + 1)):
            before, tap = mixed[token - back], taps[n_taps - 1 - back]
            for channel in range(row.size):
                row[channel] += before[channel] * tap[channel]
        for channel in range(row.size):
            row[channel] = silu(row[channel])


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc"})
def _normalise(mixed: Float32, heads: int, size: int, factor: np.float32) -> None:
    """Give each of the first `heads` vectors of `size` in every row of `mixed` the length `factor`."""
    for token in range(mixed.shape[0]):
        for head in range(heads):
            part = mixed[token, head * size : (head + 1) * size]
            square = _ZERO
            for i in range(size):
                square += part[i] * part[i]
            scale = factor / np.sqrt(square + _EPSILON)
            for i in range(size):
                part[i] *= scale


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc"})
def delta_rule(
    mixed: Float32,
    shape: tuple[int, int, int, int],
    log_decay: Float32,
    beta: Float32,
    weight: Float32,
    epsilon: float,
    gate: Float32,
) -> None:
    """Run the recurrence of one sequence from a zero state; `gate` (`T vheads·dv`) is replaced by the output.

    `mixed` (`T 2·kheads·dk + vheads·dv`) is q, k and v after convolution, its q and k are replaced by those
    of length 1; `shape` is (kheads, dk, vheads, dv), `log_decay` g and `beta` are `T vheads`. The output is
    o / √(mean o² + epsilon) · weight · silu(gate), head by head.
    """
    k_heads, dk, v_heads, dv = shape
    tokens, keys = mixed.shape[0], k_heads * dk
    _normalise(mixed, k_heads, dk, np.float32(1 / np.sqrt(dk)))
    _normalise(mixed[:, keys:], k_heads, dk, np.float32(1))
    both = np.empty((2 * _CHUNK, dk), np.float32)  # k, then q
    values = np.empty((_CHUNK, dv), np.float32)
    state, change = np.empty((dk, dv), np.float32), np.empty((dk, dv), np.float32)
    products, read = np.empty((2 * _CHUNK, _CHUNK), np.float32), np.empty((2 * _CHUNK, dv), np.float32)
    within, out = np.empty((_CHUNK, _CHUNK), np.float32), np.empty((_CHUNK, dv), np.float32)
    sums, rates = np.empty(_CHUNK), np.empty(_CHUNK, np.float32)
    for head in range(v_heads):
        state[:] = _ZERO
        at = head // (v_heads // k_heads) * dk
        q_k_v = (at, keys + at, 2 * keys + head * dv)
        for start in range(0, tokens, _CHUNK):
            stop = min(start + _CHUNK, tokens)
            _load(mixed[start:stop], q_k_v, both, values)
            _load_rates(log_decay[start:stop, head], beta[start:stop, head], sums, rates)
            np.dot(both, both[:_CHUNK].T, products)
            np.dot(both, state, read)
            _decayed(products, sums, rates, within)
            _solve(products, read, sums, rates, values)
            np.dot(within, values, out)
            _output(out, read, sums, weight, epsilon, gate[start:stop, head * dv : (head + 1) * dv])
            _forget(state, values, sums)
            np.dot(both[:_CHUNK].T, values, change)
            for i in range(dk):
                for j in range(dv):
                    state[i, j] += change[i, j]


@njit(nogil=True, cache=True, error_model="numpy")
def _load(mixed: Float32, q_k_v: tuple[int, int, int], both: Float32, values: Float32) -> None:
    """Copy a head's vectors of up to 64 tokens; zeros follow the last."""
    tokens, dk, dv = mixed.shape[0], both.shape[1], values.shape[1]
    q, k, v = q_k_v
    for i in range(tokens):
        both[i] = mixed[i, k : k + dk]
        both[_CHUNK + i] = mixed[i, q : q + dk]
        values[i] = mixed[i, v : v + dv]
    for i in range(tokens, _CHUNK):
        both[i] = _ZERO
        both[_CHUNK + i] = _ZERO
        values[i] = _ZERO


@njit(nogil=True, cache=True, error_model="numpy")
def _load_rates(log_decay: Float32, beta: Float32, sums: Float64, rates: Float32) -> None:
    total = 0.0
    for i in range(_CHUNK):
        inside = i < log_decay.size
        total += np.float64(log_decay[i]) if inside else 0.0
        sums[i] = total
        rates[i] = beta[i] if inside else _ZERO


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc"})
def _decayed(products: Float32, sums: Float64, rates: Float32, within: Float32) -> None:
    """Put q_i·k_j e^(c_i - c_j) into `within`, of k_i·k_j make β_i k_i·k_j e^(c_i - c_j), for j ≤ i."""
    for i in range(_CHUNK):
        for j in range(i + 1):
            factor = np.float32(decay(sums[i] - sums[j]))
            within[i, j] = products[_CHUNK + i, j] * factor
            products[i, j] *= factor * rates[i]
        within[i, i + 1 :] = _ZERO


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc"})
def _solve(products: Float32, read: Float32, sums: Float64, rates: Float32, values: Float32) -> None:
    """Replace v by r, four earlier rows at a time."""
    for i in range(_CHUNK):
        row, of_state = values[i], read[i]
        factor, rate = np.float32(decay(sums[i])), rates[i]
        for c in range(row.size):
            row[c] = rate * (row[c] - factor * of_state[c])
        fours = i // 4 * 4
        for j in range(0, fours, 4):
            w0, w1, w2, w3 = products[i, j], products[i, j + 1], products[i, j + 2], products[i, j + 3]
            r0, r1, r2, r3 = values[j], values[j + 1], values[j + 2], values[j + 3]
            for c in range(row.size):
                row[c] -= (w0 * r0[c] + w1 * r1[c]) + (w2 * r2[c] + w3 * r3[c])
        for j in range(fours, i):
            w0, r0 = products[i, j], values[j]
            for c in range(row.size):
                row[c] -= w0 * r0[c]


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc"})
def _output(
    out: Float32, read: Float32, sums: Float64, weight: Float32, epsilon: float, gate: Float32
) -> None:
    """Add what the state gives, norm, and multiply by silu of the gate, whose place it takes."""
    for i in range(gate.shape[0]):
        row, of_state, at = out[i], read[_CHUNK + i], gate[i]
        factor, square = np.float32(decay(sums[i])), _ZERO
        for c in range(row.size):
            row[c] += factor * of_state[c]
            square += row[c] * row[c]
        scale = np.float32(1 / np.sqrt(square / row.size + epsilon))
        for c in range(row.size):
            at[c] = row[c] * scale * weight[c] * silu(at[c])


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc"})
def _forget(state: Float32, values: Float32, sums: Float64) -> None:
    """Let the state decay to the end of the chunk, and r_j from its token to there."""
    last = sums[_CHUNK - 1]
    whole = np.float32(decay(last))
    for i in range(state.shape[0]):
        for j in range(state.shape[1]):
            state[i, j] *= whole
    for i in range(_CHUNK):
        factor = np.float32(decay(last - sums[i]))
        for c in range(values.shape[1]):
            values[i, c] *= factor
