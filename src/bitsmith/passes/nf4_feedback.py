"""Error feedback on NF4 and FP4: codes that change a matrix's output least, under scales given as stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from bitsmith.errors import BitsmithError
from bitsmith.formats.blocks import BlockFormat, Codes, Fields
from bitsmith.formats.format import Bytes, Float32
from bitsmith.formats.nf4 import FourBit, nest
from bitsmith.numerics.input_metric import InputMetric
from bitsmith.passes.choice import Choice, SiteInputs, choose_by
from bitsmith.passes.rounding import EFFORT, Effort, round_rows

_BLOCK = 64  # columns at a time; a scale of more is repeated
_SUB = 32
_FINE = 1024  # levels are looked up at places this fine


def feedback(
    form: FourBit, rows: Float32, scales: Float32, metric: InputMetric, effort: Effort = EFFORT
) -> Codes:
    """Return the codes (flat) of `rows` (`out in`) under `scales` (flat) that minimise `tr(E H Eᵀ)`.

    A row's codes depend on that row, its scales, the metric and the effort alone. Raises BitsmithError where
    blocks do not lie within rows and for rows of another width than the metric's.
    """
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    columns = rows.shape[-1]
    if not form.takes_feedback(columns):
        raise BitsmithError(
            f"{form.name}: error feedback needs whole blocks of {form.block_size}, found {columns} columns"
        )
    blocks = _Blocks(form)
    steps = np.repeat(scales, form.block_size // blocks.block_size).reshape(len(rows), -1) / blocks.fine
    places = round_rows(blocks, rows, metric, replace(effort, refit=False), steps=steps)
    return blocks.codes[places].reshape(-1)


def feedback_importance(form: FourBit, metric: InputMetric) -> Float32:
    """Return what a column's own error costs when the later ones make up for it (`in`)."""
    groups = metric.groups(min(_BLOCK, form.block_size))
    weights: Float32 = np.concatenate([group.weights for group in groups]).astype(np.float32)
    return weights


def choose_four_bit(
    form: FourBit,
    rows: Float32,
    inputs: SiteInputs | None,
    rounder: str = "auto",
    *,
    metric_for: Callable[[float, float], InputMetric] | None = None,
) -> Choice:
    """Choose a tensor's rounder by a sample of its `rows` (`out in`), as `passes.choice.choose` does.

    `nearest` are bitsandbytes' own codes. Columns in the order of `rows`.
    """
    flat = np.ascontiguousarray(rows, dtype=np.float32).reshape(-1)

    def decoded(codes: Codes, scales: Float32) -> Float32:
        return form.dequantize(codes, scales).reshape(rows.shape)

    def searched(importance: Float32 | None) -> Float32:
        if importance is None:
            largest = form.absmax(flat)
            return decoded(form.nearest(flat, largest), nest(largest).scales())
        scales = form.searched(flat, importance).scales()
        return decoded(form.nearest(flat, scales), scales)

    def fed_back(metric: InputMetric) -> Float32:
        scales = form.searched(flat, feedback_importance(form, metric)).scales()
        return decoded(feedback(form, rows, scales, metric), scales)

    fed = fed_back if form.takes_feedback(rows.shape[1]) else None
    return choose_by(searched, fed, rows, inputs, rounder, metric_for=metric_for)


class _Blocks(BlockFormat):
    """A code book's levels in order, whose bytes are their places; unregistered, for given factors only."""

    ggml_type = -1
    sub_size = _SUB
    fine = np.float32(_FINE)

    def __init__(self, form: FourBit) -> None:
        levels, first = np.unique(form.levels, return_index=True)
        self.codes = first.astype(np.uint8)
        self.name = form.name  # type: ignore[misc]
        self.block_size = self.block_bytes = min(_BLOCK, form.block_size)  # type: ignore[misc]
        self.levels = levels * self.fine  # type: ignore[misc]
        middles = (self.levels[:-1] + self.levels[1:]) / 2
        places = (np.arange(-2 * _FINE, 2 * _FINE) + 0.5) / 2
        self.level_table = self.levels[np.searchsorted(middles, places)]  # type: ignore[misc]

    def _fit(self, blocks: Float32, weights: Float32 | None, first: int, fields: Fields) -> None:
        raise NotImplementedError("factors are given")

    def _pack(self, fields: Fields, codes: Codes, out: Bytes) -> None:
        out[:] = codes

    def _unpack(self, blocks: Bytes, fields: Fields, codes: Codes) -> None:
        raise NotImplementedError("factors are not in the bytes")
