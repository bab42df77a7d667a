"""Matrices with planted singular values, any rows of them computed alone: a checkpoint's spectra without one.

W = diag(r) U diag(σ) Vᵀ diag(c), U and V with orthonormal columns: chosen columns, in a random order, of
Q_q ⊗ H_{2^k}, a Hartley matrix beside Sylvester's Hadamard matrix. A row costs a fast transform.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from bitsmith.errors import BitsmithError
from bitsmith.numerics.marchenko_pastur import MarchenkoPastur
from bitsmith.numerics.threads import for_ranges
from bitsmith.numerics.vectors import load, spread, store

Vector = NDArray[np.float64]
Floats = NDArray[np.float32]

LONGEST = 1 << 22
"""Longest side of a matrix."""
LARGEST_ODD = 4096
"""Largest part of a side that is no power of two: its Hartley matrix is held."""

_LANES = 16  # rows that are computed together: one cache line of float32
_BLOCK = 256  # lanes of the transform that stay in the first cache
_POOL_SIZE = 1_048_573  # a prime, so that equal rows meet only after that many rows


@dataclass(frozen=True)
class Planted:
    """What is planted in a matrix `rows columns`.

    The largest `tail` (share) of the λ = σ² follow p(λ) ∝ λ^−alpha, the others Marchenko-Pastur's law below
    them; `rms` is the root of the mean square entry. Rows and columns are then scaled: the logarithms have
    the standard deviations `row_spread`, `column_spread`, and `outliers` columns are `outlier_factor` times
    as large. Columns of equal `channels` (a seed) have equal scales. The σ of the scaled matrix are near
    those planted, not equal to them.
    """

    rows: int
    columns: int
    alpha: float
    tail: float
    rms: float
    row_spread: float = 0.0
    column_spread: float = 0.0
    outliers: int = 0
    outlier_factor: float = 1.0
    seed: int = 0
    channels: int = 0

    def sigma(self) -> Vector:
        """Return the planted singular values, descending (`min(rows, columns)`)."""
        return _sigma(self)


def check_planted(planted: Planted) -> None:
    """Raise BitsmithError for a plan that cannot be followed."""
    sides = (planted.rows, planted.columns)
    if not all(1 <= n <= LONGEST and _sides(n)[0] <= LARGEST_ODD for n in sides):
        raise BitsmithError(
            f"{planted.rows} × {planted.columns}: expected sides of at most {LONGEST}, whose part that is no "
            f"power of two is at most {LARGEST_ODD}"
        )
    spreads = (planted.row_spread, planted.column_spread)
    if not (1 < planted.alpha < 100 and 0 < planted.tail <= 1 and 0 < planted.rms < 1e6):
        raise BitsmithError(
            f"alpha {planted.alpha}, tail {planted.tail}, rms {planted.rms}: expected more than 1, "
            "a share and a positive size"
        )
    if not all(0 <= spread < 4 for spread in spreads) or not 0 < planted.outlier_factor < 1e6:
        raise BitsmithError("expected spreads between 0 and 4 and a positive factor of the outliers")
    if not 0 <= planted.outliers <= planted.columns or min(planted.seed, planted.channels) < 0:
        raise BitsmithError("expected at most as many outliers as columns, and seeds that are not negative")


def planted_rows(planted: Planted, start: int, stop: int) -> Floats:
    """Return rows `[start, stop)` (`stop-start columns`), the same to the bit in any slices."""
    tables = _tables(planted)
    first = start // _LANES * _LANES
    out = np.empty((stop - first, planted.columns), np.float32)

    def work(begin: int, end: int) -> None:
        buffer = np.empty((planted.columns, _LANES), np.float32)
        _fill(first, begin, end, out, buffer, *tables)

    for_ranges(len(out), _LANES, 1 << 30, work)  # its ranges begin at multiples of 64
    return out[start - first :]


def pool_values(seed: int, first: int, count: int, mean: float, deviation: float) -> Floats:
    """Return `count` normal values from place `first` on of a long sequence that repeats."""
    pool = _pool(seed)
    out = np.empty(count, np.float32)
    at, done = first % _POOL_SIZE, 0
    while done < count:
        piece = pool[at : at + count - done]
        np.multiply(piece, np.float32(deviation), out=out[done : done + piece.size])
        at, done = 0, done + piece.size
    out += np.float32(mean)
    return out


@lru_cache(maxsize=2)
def _pool(seed: int) -> Floats:
    return np.random.default_rng(seed).standard_normal(_POOL_SIZE, dtype=np.float32)


def _sigma(planted: Planted) -> Vector:
    short, long = sorted((planted.rows, planted.columns))
    tail = max(1, min(short, round(planted.tail * short)))
    squares = np.empty(short)
    squares[:tail] = (tail / (np.arange(tail) + 0.5)) ** (1 / (planted.alpha - 1))
    if tail < short:
        law = MarchenkoPastur(short, long)
        below = np.arange(short - tail - 0.5, 0.0, -1.0) / short
        squares[tail:] = law.quantile(below) / law.quantile(np.array([1 - tail / short]))
    squares *= planted.rms**2 * short * long / squares.sum()
    return np.sqrt(squares)


def _sides(n: int) -> tuple[int, int]:
    """Return `(q, 2^k)` with n = q 2^k; no power of two where it is smaller than a group of rows."""
    power = n & -n
    return (n // power, power) if power >= _LANES else (n, 1)


class _Tables(NamedTuple):
    """What a row is made of, by the place of a singular vector in its transform (`columns`)."""

    amplitude: Floats
    left_odd: NDArray[np.int32]
    left_even: NDArray[np.int32]
    left_mixer: Floats
    left_power: int
    right_mixer: Floats
    right_power: int
    row_scale: Floats
    column_scale: Floats
    signs: Floats


@lru_cache(maxsize=4)
def _tables(planted: Planted) -> _Tables:
    rng = np.random.default_rng(planted.seed)
    (left_odd, left_power), (right_odd, right_power) = _sides(planted.rows), _sides(planted.columns)
    short = min(planted.rows, planted.columns)
    size = 1 / np.sqrt(float(left_power) * right_power)
    amplitude, left = np.zeros(planted.columns), np.zeros(planted.columns, np.int64)
    places = rng.permutation(planted.columns)[:short]
    amplitude[places] = _sigma(planted) * rng.choice([-size, size], short)
    left[places] = rng.permutation(planted.rows)[:short]
    lanes = np.arange(_LANES)
    parity = np.bitwise_count(lanes[:, np.newaxis] & lanes) & 1
    return _Tables(
        amplitude.astype(np.float32),
        (left // left_power).astype(np.int32),
        (left % left_power).astype(np.int32),
        _hartley(left_odd),
        left_power,
        _hartley(right_odd),
        right_power,
        _scales(rng, planted.rows, planted.row_spread, 0, 1.0),
        _scales(
            np.random.default_rng(planted.channels),
            planted.columns,
            planted.column_spread,
            planted.outliers,
            planted.outlier_factor,
        ),
        (1.0 - 2.0 * parity).astype(np.float32),
    )


def _scales(rng: np.random.Generator, count: int, spread: float, outliers: int, factor: float) -> Floats:
    """Return factors with random signs whose mean square is 1."""
    scales = np.exp(spread * rng.standard_normal(count)) * rng.choice([-1.0, 1.0], count)
    scales[rng.permutation(count)[:outliers]] *= factor
    even: Floats = (scales / np.sqrt(np.mean(np.square(scales)))).astype(np.float32)
    return even


def _hartley(n: int) -> Floats:
    """Return the orthogonal, symmetric matrix (cos + sin)(2π i j / n) / √n."""
    places = np.arange(n, dtype=np.int32)
    angle = 2 * np.pi / n * places
    values = ((np.cos(angle) + np.sin(angle)) / np.sqrt(n)).astype(np.float32)
    return np.stack([values[i * places % n] for i in places])


@njit(nogil=True, cache=True, error_model="numpy")
def _fill(
    first: int,
    begin: int,
    end: int,
    out: Floats,
    buffer: Floats,
    amplitude: Floats,
    left_odd: NDArray[np.int32],
    left_even: NDArray[np.int32],
    left_mixer: Floats,
    left_power: int,
    right_mixer: Floats,
    right_power: int,
    row_scale: Floats,
    column_scale: Floats,
    signs: Floats,
) -> None:
    """Fill rows `[begin, end)` of `out`, whose first row is the matrix's `first`, a multiple of 16."""
    columns = len(amplitude)
    held = np.empty((len(right_mixer), _LANES), np.float32)
    for start in range(begin, end, _LANES):
        row = first + start
        if left_power > 1:
            odd, even = row // left_power, row % left_power
            for c in range(columns):
                value = amplitude[c] * left_mixer[odd, left_odd[c]] * _sign(even & left_even[c])
                low = left_even[c] & (_LANES - 1)
                for lane in range(_LANES):
                    buffer[c, lane] = value * signs[low, lane]
        else:
            for c in range(columns):
                for lane in range(_LANES):
                    odd = min(row + lane, len(left_mixer) - 1)
                    buffer[c, lane] = amplitude[c] * left_mixer[odd, left_odd[c]]
        for block in range(0, columns, right_power):
            _walsh(buffer[block : block + right_power])
        if len(right_mixer) > 1:
            _mix(buffer, right_mixer, right_power, held)
        for left in range(0, columns, _BLOCK):  # of the buffer, as much as stays in the first cache
            for lane in range(min(_LANES, end - start)):
                scale = row_scale[row + lane]
                for c in range(left, min(left + _BLOCK, columns)):
                    out[start + lane, c] = buffer[c, lane] * (column_scale[c] * scale)


@njit(nogil=True, cache=True, error_model="numpy")
def _sign(bits: int) -> np.float32:
    bits ^= bits >> 16
    bits ^= bits >> 8
    bits ^= bits >> 4
    bits ^= bits >> 2
    bits ^= bits >> 1
    return np.float32(1 - 2 * (bits & 1))


@njit(nogil=True, cache=True, error_model="numpy")
def _walsh(block: Floats) -> None:
    """Replace a block (`2^k lanes`) by H times it."""
    small = min(_BLOCK, len(block))
    for start in range(0, len(block), small):
        _stages(block[start : start + small], 1)
    _stages(block, small)


@njit(nogil=True, cache=True, error_model="numpy")
def _stages(block: Floats, half: int) -> None:
    size = len(block)
    while 4 * half <= size:
        for start in range(0, size, 4 * half):
            for i in range(start, start + half):
                for lane in range(_LANES):
                    a, b = block[i, lane], block[i + half, lane]
                    c, d = block[i + 2 * half, lane], block[i + 3 * half, lane]
                    block[i, lane] = (a + b) + (c + d)
                    block[i + half, lane] = (a - b) + (c - d)
                    block[i + 2 * half, lane] = (a + b) - (c + d)
                    block[i + 3 * half, lane] = (a - b) - (c - d)
        half *= 4
    if half < size:
        for i in range(half):
            for lane in range(_LANES):
                a, b = block[i, lane], block[i + half, lane]
                block[i, lane] = a + b
                block[i + half, lane] = a - b


@njit(nogil=True, cache=True, error_model="numpy")
def _mix(buffer: Floats, mixer: Floats, power: int, held: Floats) -> None:
    """Multiply by `mixer ⊗ 1`: what lies `power` apart is mixed; `held` (`odd lanes`) is room to work in."""
    n = len(mixer)
    for i in range(power):
        for k in range(n):  # side by side: so far apart they would push each other out of the cache
            store(held, k * _LANES, load(buffer, (k * power + i) * _LANES, 16))
        for j in range(n):
            mixed = spread(np.float32(0.0), 16)
            for k in range(n):
                mixed = mixed + load(held, k * _LANES, 16) * mixer[j, k]
            store(buffer, (j * power + i) * _LANES, mixed)
