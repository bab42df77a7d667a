"""Products of a matrix with values in lanes, both in 16-bit whole numbers: two products per multiply-add.

Every row of a chunk of the matrix, and every lane of a chunk of the values, is scaled to a length (root of
the sum of squares) of `_LENGTH` and rounded. By Cauchy and Schwarz no sum over a chunk leaves 32 bits, so
sums are exact and do not depend on their order; rounded, one of 256 values is off by about 1.4e-4 of their
root mean square. Chunks add up in float32, in order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from bitsmith.numerics.lane_products import LANES
from bitsmith.numerics.vectors import Vector, converted, load, nearest, spread, store

_LENGTH = np.float32(32000.0)
_ROWS, _SLICE = 4, 16
_WORD = ir.IntType(32)
_LOW, _HIGH = np.int32(0xFFFF), np.int32(16)
_compiled: Any = intrinsic  # whose own types do not know that the compiler passes the context

Int32 = NDArray[np.int32]


class ShortMatrix(NamedTuple):
    """Rows in chunks of columns: `codes` (`chunks rows/4 size/2 4`, neighbours in a word), `scales`.

    An entry of `scales` (`chunks rows`) is what a row's codes stand for in that chunk.
    """

    codes: Int32
    scales: NDArray[np.float32]


class ShortValues(NamedTuple):
    """As a `ShortMatrix` for lanes: `codes` (`chunks LANES/16 size/2 16`), `scales` (`chunks LANES`)."""

    codes: Int32
    scales: NDArray[np.float32]


def short_matrix(matrix: NDArray[Any], size: int) -> ShortMatrix:
    """Return a matrix (`rows columns`, rows a multiple of 4) in chunks of `size` columns (even)."""
    rows, chunks = len(matrix), matrix.shape[1] // size
    found = ShortMatrix(
        np.empty((chunks, rows // _ROWS, size // 2, _ROWS), np.int32), np.empty((chunks, rows), np.float32)
    )
    _shorten_rows(matrix, *found)
    return found


def short_values(columns: int, size: int) -> ShortValues:
    """Return zeros in chunks of `size` columns."""
    chunks = -(-columns // size)
    codes = np.zeros((chunks, LANES // _SLICE, size // 2, _SLICE), np.int32)
    return ShortValues(codes, np.zeros((chunks, LANES), np.float32))


@_compiled  # type: ignore[untyped-decorator]
def _add_pairs(typing: Any, sums: Any, matrix: Any, at: Any, values: Any) -> Any:
    """Return `sums` (int32) plus the products of a word's two codes with each lane's two `values` (int16)."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        lanes = sums.lanes
        wide = ir.VectorType(_WORD, 2 * lanes)

        def every(start: int) -> Any:
            return ir.Constant(sums.compiled, list(range(start, 2 * lanes, 2)))

        word = builder.load(
            builder.gep(context.make_array(matrix)(context, builder, args[1]).data, [args[2]])
        )
        empty = ir.Constant(sums.compiled, ir.Undefined)
        first = builder.insert_element(empty, word, _WORD(0))
        same = builder.shuffle_vector(first, empty, ir.Constant(sums.compiled, [0] * lanes))
        pair = builder.sext(builder.bitcast(same, values.compiled), wide)
        products = builder.mul(pair, builder.sext(args[3], wide))
        none = ir.Constant(wide, ir.Undefined)
        both = builder.add(*(builder.shuffle_vector(products, none, every(start)) for start in (0, 1)))
        return builder.add(args[0], both)

    return sums(sums, matrix, types.intp, values), emit


@_compiled(prefer_literal=True)  # type: ignore[untyped-decorator]
def _load_pairs(typing: Any, words: Any, at: Any, lanes: Any) -> Any:
    """Return the codes (int16) of `lanes` (a literal) words of a contiguous array from flat index `at` on."""
    kind = Vector(types.int16, 2 * lanes.literal_value)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        data = context.make_array(words)(context, builder, args[0]).data
        return builder.load(
            builder.bitcast(builder.gep(data, [args[1]]), kind.compiled.as_pointer()), align=4
        )

    return kind(words, types.intp, lanes), emit


@njit(nogil=True, cache=True, error_model="numpy")
def _shorten_rows(matrix: NDArray[Any], codes: Int32, scales: NDArray[np.float32]) -> None:
    size = 2 * codes.shape[2]
    for row in range(matrix.shape[0]):
        for chunk in range(codes.shape[0]):
            part, square = matrix[row, chunk * size : (chunk + 1) * size], 0.0
            for value in part:
                square += np.float64(value) * np.float64(value)
            length = np.sqrt(square)
            by = np.float64(_LENGTH) / length if length > 0 else 0.0
            scales[chunk, row] = length / np.float64(_LENGTH)
            for k in range(size // 2):
                low, high = np.int32(np.rint(part[2 * k] * by)), np.int32(np.rint(part[2 * k + 1] * by))
                codes[chunk, row // _ROWS, k, row % _ROWS] = (low & _LOW) | (high << _HIGH)


@njit(nogil=True, cache=True, error_model="numpy")
def shorten(values: NDArray[Any], codes: Int32, scales: NDArray[np.float32]) -> None:
    """Fill a chunk's `codes` (`LANES/16 size/2 16`) and `scales` (`LANES`) with `values` (`size LANES`)."""
    by = np.empty(LANES, np.float32)
    for at in range(0, LANES, _SLICE):
        squares = spread(np.float32(0.0), 16)
        for j in range(values.shape[0]):
            value = load(values, j * LANES + at, 16)
            squares = squares + value * value
        store(scales, at, squares)
    for lane in range(LANES):
        length = np.sqrt(scales[lane])
        by[lane] = _LENGTH / length if length > 0 else np.float32(0.0)
        scales[lane] = length / _LENGTH
    pairs = codes.shape[1]
    for part in range(codes.shape[0]):
        factor = load(by, part * _SLICE, 16)
        for k in range(pairs):
            place = 2 * k * LANES + part * _SLICE
            low = converted(nearest(load(values, place, 16) * factor), "int32")
            high = converted(nearest(load(values, place + LANES, 16) * factor), "int32")
            store(codes, (part * pairs + k) * _SLICE, (low & _LOW) | (high << _HIGH))


@njit(nogil=True, cache=True, error_model="numpy")
def add_short_products(
    matrix: Int32, row_scales: NDArray[np.float32], values: Int32, lane_scales: NDArray[np.float32],
    last: int, out: NDArray[np.float32],
) -> None:  # fmt: skip
    """Add the products of the first `last` chunks of both (see `ShortMatrix`) to `out` (`rows LANES`)."""
    pairs = matrix.shape[2]
    for chunk in range(last):
        for part in range(values.shape[1]):
            scale = load(lane_scales, chunk * LANES + part * _SLICE, 16)
            begin = (chunk * values.shape[1] + part) * pairs * _SLICE
            for group in range(matrix.shape[1]):
                at = (chunk * matrix.shape[1] + group) * pairs * _ROWS
                a, b = spread(np.int32(0), 16), spread(np.int32(0), 16)
                c, d = spread(np.int32(0), 16), spread(np.int32(0), 16)
                for k in range(pairs):
                    both = _load_pairs(values, begin + k * _SLICE, 16)
                    a = _add_pairs(a, matrix, at + k * _ROWS, both)
                    b = _add_pairs(b, matrix, at + k * _ROWS + 1, both)
                    c = _add_pairs(c, matrix, at + k * _ROWS + 2, both)
                    d = _add_pairs(d, matrix, at + k * _ROWS + 3, both)
                for row, found in ((0, a), (1, b), (2, c), (3, d)):
                    place = (group * _ROWS + row) * LANES + part * _SLICE
                    by = row_scales[chunk, group * _ROWS + row]
                    store(out, place, load(out, place, 16) + converted(found, "float32") * scale * by)
