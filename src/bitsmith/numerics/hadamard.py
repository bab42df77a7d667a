"""Hadamard matrices of any order with a known construction, and randomized Hadamard rotations.

H is ±1 with `H Hᵀ = n I`. Orders come from Paley's two constructions (R. E. A. C. Paley, "On orthogonal
matrices", 1933), `q + 1` for a prime `q = 3 mod 4` and `2 (q + 1)` for a prime `q = 1 mod 4`, times a power
of two (J. J. Sylvester, 1867).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from bitsmith.errors import BitsmithError
from bitsmith.numerics.threads import for_ranges

Floats = NDArray[Any]  # float32 or float64

_LARGEST_FACTOR = 1024
_WIDTH = 16  # vectors that are transformed together: one cache line of float32
_LEAST, _MOST = 64, 4096


def hadamard_factor(n: int) -> tuple[int, int] | None:
    """Return `(m, 2^k)` with `n = m 2^k`: the smallest factor m with Paley's construction, or 1.

    None where no such m of at most 1024 is known to these constructions.
    """
    if n < 1:
        return None
    odd = n // (n & -n)
    if odd == 1:
        return 1, n
    m = odd
    while m <= min(n, _LARGEST_FACTOR):
        if n % m == 0 and _paley_prime(m) is not None:
            return m, n // m
        m *= 2
    return None


def hadamard(n: int) -> NDArray[np.int8]:
    """Return a Hadamard matrix `n n` of ±1: Paley's of order m ⊗ Sylvester's of order 2^k.

    Raises BitsmithError where no construction is known.
    """
    m, power = _factor(n)
    sylvester = np.ones((1, 1), np.int8)
    while len(sylvester) < power:
        sylvester = np.block([[sylvester, sylvester], [sylvester, -sylvester]])
    return np.kron(_paley(m), sylvester)


class RandomHadamard:
    """The rotation `Q = diag(signs) (H_m ⊗ H_2^k) / sqrt(n)`, orthogonal; equal seeds give equal signs.

    A vector's result is the same to the bit whatever else is transformed with it, on any number of threads:
    it is a fixed sequence of float64 operations, rounded once to the array's own dtype, float32 or float64.
    `signs` (`n`, ±1) stand in for the seed's where they are known.

    Raises BitsmithError where no Hadamard matrix of order n is known, and for signs that are not such.
    """

    def __init__(self, n: int, seed: int = 0, signs: Floats | None = None) -> None:
        m, self._power = _factor(n)
        self.n = n
        drawn = np.random.default_rng(seed).choice([-1.0, 1.0], n)
        self.signs: NDArray[np.float64] = drawn if signs is None else np.asarray(signs, np.float64)
        if self.signs.shape != (n,) or (np.abs(self.signs) != 1).any():
            raise BitsmithError(f"the signs of a rotation of {n} channels are not {n} values of ±1")
        self._mixer = _paley(m).astype(np.float64)
        self._even = np.full(n, 1 / np.sqrt(n))

    def forward(self, x: Floats) -> Floats:
        """Return `x Q` along the last axis (`... n`), a new array."""
        return self._along_last(x, self._mixer, self.signs, self._even)

    def backward(self, x: Floats) -> Floats:
        """Return `x Qᵀ` along the last axis (`... n`), a new array; undoes `forward`."""
        return self._along_last(x, self._mixer.T, np.ones(self.n), self.signs * self._even)

    def forward_first(self, w: Floats) -> None:
        """Replace `w` (`n ...`, contiguous) by `Qᵀ w`."""
        self._along_first(w, self._mixer, self.signs, self._even)

    def backward_first(self, w: Floats) -> None:
        """Replace `w` (`n ...`, contiguous) by `Q w`; undoes `forward_first`."""
        self._along_first(w, self._mixer.T, np.ones(self.n), self.signs * self._even)

    def _along_last(self, x: Floats, mixer: Floats, before: Floats, after: Floats) -> Floats:
        if x.shape[-1] != self.n:
            raise ValueError(f"expected {self.n} columns, found {x.shape[-1]}")
        dtype = np.float64 if x.dtype == np.float64 else np.float32
        rows = np.ascontiguousarray(x, dtype).reshape(-1, self.n)
        out = np.empty_like(rows)
        mixer, before, after = (np.ascontiguousarray(part) for part in (mixer, before, after))

        def work(first: int, last: int) -> None:
            _transform_rows(rows, out, first, last, mixer, self._power, before, after)

        for_ranges(len(rows), _LEAST, _MOST, work)
        return out.reshape(x.shape)

    def _along_first(self, w: Floats, mixer: Floats, before: Floats, after: Floats) -> None:
        if w.shape[0] != self.n or not w.flags.c_contiguous or w.dtype not in (np.float32, np.float64):
            raise ValueError(f"expected {self.n} contiguous rows of floats, found {w.shape} of {w.dtype}")
        columns = w.reshape(self.n, -1)
        mixer, before, after = (np.ascontiguousarray(part) for part in (mixer, before, after))

        def work(first: int, last: int) -> None:
            _transform_columns(columns, first, last, mixer, self._power, before, after)

        for_ranges(columns.shape[1], _LEAST, _MOST, work)


def _factor(n: int) -> tuple[int, int]:
    factor = hadamard_factor(n)
    if factor is None:
        raise BitsmithError(f"no Hadamard matrix of order {n} is known to the Paley constructions")
    return factor


def _paley_prime(order: int) -> int | None:
    """Return the prime q that gives a matrix of `order`: `q + 1`, else `2 (q + 1)`; None without one."""
    if order % 4 == 0 and _is_prime(order - 1):
        return order - 1
    half = order // 2 - 1
    return half if order % 4 == 0 and half % 4 == 1 and _is_prime(half) else None


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % divisor for divisor in range(2, int(q**0.5) + 1))


@lru_cache(maxsize=8)
def _paley(order: int) -> NDArray[np.int8]:
    """Return a Hadamard matrix of an order with Paley's construction, or of order 1."""
    q = _paley_prime(order)
    if q is None:
        return np.ones((1, 1), np.int8)
    character = np.full(q, -1, np.int8)  # the Legendre symbol: +1 for squares, -1 for others, 0 for 0
    character[np.arange(q, dtype=np.int64) ** 2 % q] = 1
    character[0] = 0
    index = np.arange(q)
    border = np.ones((q + 1, q + 1), np.int8)
    border[1:, 1:] = character[(index[:, None] - index) % q]
    border[0, 0] = 0
    if q % 4 == 3:
        border[1:, 0] = -1
        return border + np.eye(q + 1, dtype=np.int8)
    square, corner = np.array([[1, 1], [1, -1]], np.int8), np.array([[1, -1], [-1, -1]], np.int8)
    return np.kron(border, square) + np.kron(np.eye(q + 1, dtype=np.int8), corner)


@njit(nogil=True, cache=True, error_model="numpy")
def _transform_rows(
    rows: Floats,
    out: Floats,
    first: int,
    last: int,
    mixer: Floats,
    power: int,
    before: Floats,
    after: Floats,
) -> None:
    """Transform rows `[first, last)` of `rows n` into `out`."""
    n = rows.shape[1]
    tile = np.zeros((n, _WIDTH))
    scratch = np.zeros((mixer.shape[0], _WIDTH))
    for start in range(first, last, _WIDTH):
        count = min(_WIDTH, last - start)
        for c in range(count):
            for i in range(n):
                tile[i, c] = rows[start + c, i] * before[i]
        _transform_tile(tile, mixer, power, scratch)
        for c in range(count):
            for i in range(n):
                out[start + c, i] = tile[i, c] * after[i]


@njit(nogil=True, cache=True, error_model="numpy")
def _transform_columns(
    columns: Floats, first: int, last: int, mixer: Floats, power: int, before: Floats, after: Floats
) -> None:
    """Transform columns `[first, last)` of `n columns` in place."""
    n = columns.shape[0]
    tile = np.zeros((n, _WIDTH))
    scratch = np.zeros((mixer.shape[0], _WIDTH))
    for start in range(first, last, _WIDTH):
        count = min(_WIDTH, last - start)
        for i in range(n):
            for c in range(count):
                tile[i, c] = columns[i, start + c] * before[i]
        _transform_tile(tile, mixer, power, scratch)
        for i in range(n):
            for c in range(count):
                columns[i, start + c] = tile[i, c] * after[i]


@njit(nogil=True, cache=True, error_model="numpy")
def _transform_tile(tile: Floats, mixer: Floats, power: int, scratch: Floats) -> None:
    """Apply the 2^k factor as butterflies and the m factor as sums along the first axis, in place."""
    n = tile.shape[0]
    half = 1
    while 2 * half < power:  # two stages at a time
        for start in range(0, n, 4 * half):
            for i in range(start, start + half):
                for c in range(_WIDTH):
                    a, b = tile[i, c], tile[i + half, c]
                    d, e = tile[i + 2 * half, c], tile[i + 3 * half, c]
                    low, high, left, right = a + b, d + e, a - b, d - e
                    tile[i, c], tile[i + half, c] = low + high, left + right
                    tile[i + 2 * half, c], tile[i + 3 * half, c] = low - high, left - right
        half *= 4
    if half < power:
        for start in range(0, n, 2 * half):
            for i in range(start, start + half):
                for c in range(_WIDTH):
                    a, b = tile[i, c], tile[i + half, c]
                    tile[i, c], tile[i + half, c] = a + b, a - b
    if mixer.shape[0] > 1:
        for start in range(power):
            _mix(tile[start::power], mixer, scratch)


@njit(nogil=True, cache=True, error_model="numpy")
def _mix(rows: Floats, mixer: Floats, scratch: Floats) -> None:
    """Replace `rows` (`m width`) by `mixerᵀ rows`; m is a multiple of four, and ±1 makes products exact."""
    m = mixer.shape[0]
    scratch[:] = 0
    for a in range(0, m, 4):
        for to in range(m):
            s0, s1, s2, s3 = mixer[a, to], mixer[a + 1, to], mixer[a + 2, to], mixer[a + 3, to]
            for c in range(_WIDTH):
                left = s0 * rows[a, c] + s1 * rows[a + 1, c]
                right = s2 * rows[a + 2, c] + s3 * rows[a + 3, c]
                scratch[to, c] += left + right
    rows[:] = scratch
