"""Error feedback on integer grids: round a matrix so that its output changes least, `tr(E H Eᵀ)`.

Scales of groups of columns are those of a block format, which `round_rows` fits as the errors before have
moved the weights. A row's one scale is found beforehand, weighed by what each column's error costs; rows are
then rounded in units of it, and it is refitted in H to the codes, in turn, while that lowers the cost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from bitsmith.errors import BitsmithError
from bitsmith.formats.blocks import BlockFormat, Codes, Fields
from bitsmith.formats.format import Bytes, Float32
from bitsmith.formats.integer import Coded, GridFormat
from bitsmith.numerics.input_metric import InputMetric
from bitsmith.numerics.lane_products import LANES, add_products
from bitsmith.passes.choice import Choice, SiteInputs, choose_by
from bitsmith.passes.rounding import EFFORT, Effort, round_rows

_SUB = 32
_TURNS = 2  # rounds of codes after the scale of a row was refitted to the ones before
_HEAD = 5  # bytes of a block beside its codes: float32 scale, zero point


def feedback(grid: GridFormat, rows: Float32, metric: InputMetric, effort: Effort = EFFORT) -> Coded:
    """Return the codes and scales of `rows` (`out in`) that minimise `tr(E H Eᵀ)`.

    A row's codes depend on that row, the metric and the effort alone. Raises BitsmithError for a `cellm-*`
    grid, for rows of another width than the metric's, and for columns that are no whole groups of 32.
    """
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    columns = rows.shape[-1]
    if grid.seed:
        raise BitsmithError(f"{grid.name} is encoded as cellm does; error feedback needs {_searched(grid)}")
    if columns != metric.width:
        raise BitsmithError(f"rows have {columns} weights, the second moment {metric.width}")
    if not takes_feedback(grid, columns):
        raise BitsmithError(
            f"{grid.name}: error feedback needs whole groups of {_SUB}, found {columns} columns"
        )
    if grid.groups(columns) > 1:
        return _in_groups(grid, rows, metric, effort)
    return _in_rows(grid, rows, metric, effort)


def choose_grid(
    grid: GridFormat,
    rows: Float32,
    inputs: SiteInputs | None,
    rounder: str = "auto",
    *,
    metric_for: Callable[[float, float], InputMetric] | None = None,
) -> Choice:
    """Choose a tensor's rounder by a sample of its `rows` (`out in`), as `passes.choice.choose` does.

    `nearest` is the search with equal weights. Columns in the order of `rows`.
    """
    if grid.seed:
        return Choice("nearest")
    fed = takes_feedback(grid, rows.shape[1])
    return choose_by(
        lambda importance: grid.dequantize(grid.quantize(rows, importance)),
        (lambda metric: grid.dequantize(feedback(grid, rows, metric))) if fed else None,
        rows,
        inputs,
        rounder,
        metric_for=metric_for,
    )


def takes_feedback(grid: GridFormat, columns: int) -> bool:
    """Tell whether rows of `columns` weights can be rounded by error feedback."""
    width = grid.width(columns)
    return not grid.seed and width % _SUB == 0 and columns % width == 0


def _searched(grid: GridFormat) -> str:
    return grid.name.replace("cellm-q1_0", "int1").replace("cellm-i", "int")


class _Blocks(BlockFormat):
    """A grid's groups (`size` columns each) as blocks; unregistered, its bytes are for this file only.

    With `scaled` the weights come in units of their scale, which is then 1.
    """

    ggml_type = -1
    sub_size = _SUB

    def __init__(self, grid: GridFormat, size: int, *, scaled: bool = False) -> None:
        self.grid, self.scaled = grid, scaled
        self.name = grid.name  # type: ignore[misc]
        self.block_size = size  # type: ignore[misc]
        self.block_bytes = _HEAD + size  # type: ignore[misc]
        self.levels = grid.levels  # type: ignore[misc]
        if grid.symmetric and grid.bits < 4:
            cuts = np.repeat(grid.levels, 4 if grid.bits == 1 else 2)
            self.level_table = cuts  # type: ignore[misc]
        if not grid.symmetric:
            self.min_limits = (0, grid.top)  # type: ignore[misc]

    def _fit(self, blocks: Float32, weights: Float32 | None, first: int, fields: Fields) -> None:
        if self.scaled:
            fields.d[:] = 1.0
            return
        kinds = 1 if weights is None else len(weights)
        for kind in range(kinds):
            importance = None if weights is None else weights[(first + kind) % kinds]
            scales, zeros = replace(self.grid, group=None).fit(blocks[kind::kinds], importance)
            fields.d[kind::kinds] = scales[:, 0]
            if zeros is not None:
                fields.m[kind::kinds] = scales[:, 0]
                fields.mins[kind::kinds] = zeros

    def _pack(self, fields: Fields, codes: Codes, out: Bytes) -> None:
        out[:, : _HEAD - 1] = np.ascontiguousarray(fields.d, "<f4")[:, None].view(np.uint8)
        out[:, _HEAD - 1] = fields.mins[:, 0]
        out[:, _HEAD:] = codes

    def _unpack(self, blocks: Bytes, fields: Fields, codes: Codes) -> None:
        fields.d[:] = np.ascontiguousarray(blocks[:, : _HEAD - 1]).view("<f4")[:, 0]
        fields.mins[:] = blocks[:, _HEAD - 1 : _HEAD]
        fields.m[:] = 0.0 if self.grid.symmetric else fields.d
        codes[:] = blocks[:, _HEAD:]


def _in_groups(grid: GridFormat, rows: Float32, metric: InputMetric, effort: Effort) -> Coded:
    form = _Blocks(grid, grid.width(rows.shape[1]))
    refit = effort.refit and grid.symmetric and grid.scale_type == "F16"  # `refit_block` rounds to F16
    fields, codes = form.unpack(round_rows(form, rows, metric, replace(effort, refit=refit)))
    shape = len(rows), grid.groups(rows.shape[1])
    zeros = None if grid.symmetric else fields.mins[:, 0].astype(np.uint8).reshape(shape)
    return Coded(codes.reshape(rows.shape), fields.d.reshape(shape), zeros)


def _in_rows(grid: GridFormat, rows: Float32, metric: InputMetric, effort: Effort) -> Coded:
    weights = np.concatenate([group.weights for group in metric.groups(_SUB)])
    scales, zeros = grid.fit(rows, weights.astype(np.float32))
    best, cost = _rounded(grid, rows, scales, zeros, metric, effort)
    for _ in range(_TURNS if effort.scales else 0):
        scales = _refitted(grid, rows, best, metric)
        again, now = _rounded(grid, rows, scales, zeros, metric, effort)
        better = now < cost
        if not better.any():
            break
        cost = np.where(better, now, cost)
        parts = zip(again, best, strict=True)
        kept = [None if a is None or b is None else np.where(better[:, None], a, b) for a, b in parts]
        best = Coded(*kept)  # type: ignore[arg-type]
    return best


def _rounded(
    grid: GridFormat, rows: Float32, scales: Float32, zeros: Codes | None, metric: InputMetric, effort: Effort
) -> tuple[Coded, NDArray[np.float64]]:
    """Return the codes on the grid of `scales` (`out 1`), and what each row's error costs."""
    form = _Blocks(grid, _SUB, scaled=True)
    target = np.divide(rows, scales, out=np.zeros_like(rows), where=scales > 0)
    if zeros is not None:
        target += zeros
    form.min_limits = (0, 0)  # type: ignore[misc] # the zero point is in the target
    _, codes = form.unpack(round_rows(form, target, metric, replace(effort, refit=False)))
    coded = Coded(codes.reshape(rows.shape), scales, zeros)
    errors = rows - grid.dequantize(coded)
    return coded, _products(errors, errors, metric)


def _refitted(grid: GridFormat, rows: Float32, coded: Coded, metric: InputMetric) -> Float32:
    """Return each row's least-squares scale in H for its codes, as stored."""
    levels = grid.dequantize(coded._replace(scales=np.ones_like(coded.scales)))
    across, along = _products(rows, levels, metric), _products(levels, levels, metric)
    found = np.divide(across, along, out=np.zeros_like(along), where=(along > 0) & (across > 0))
    return np.where(found[:, None] > 0, grid.stored(found[:, None].astype(np.float32)), coded.scales)


def _products(left: Float32, right: Float32, metric: InputMetric) -> NDArray[np.float64]:
    """Return `l H rᵀ` of each pair of rows; in lanes, so that no other row has a say in the rounding."""
    found = np.zeros(len(left))
    for at in range(0, len(left), LANES):
        count, column = min(LANES, len(left) - at), 0
        for group in metric.groups(_SUB):
            cut = slice(column, column + group.width)
            tile = np.zeros((group.width, LANES), group.hessian.dtype)
            tile[:, :count] = right[at : at + count, cut].T
            moved = np.zeros_like(tile)
            add_products(group.hessian, 0, 0, tile, 0, group.width, moved)
            product = left[at : at + count, cut].T.astype(np.float64) * moved[:, :count]
            found[at : at + count] += np.add.accumulate(product, axis=0)[-1]
            column += group.width
    return found
