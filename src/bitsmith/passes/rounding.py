"""Round a matrix onto a block format so that its output changes least: minimise `tr(E H Eᵀ)`, `E = W - Q`.

Error feedback goes block by block: the block's fields are fitted to the weights as the errors before it have
moved them (a column weighs what its own error costs when the later columns make up for it), its whole scales
and mins are searched, and its codes taken column by column. Sweeps follow: sub-block by sub-block the same
search with the whole rest of the row in view, coordinate descent on the codes, and a refit of the block's
float16 factors in H. A sweep's step is kept only where the cost falls.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitsmith.errors import BitsmithError
from bitsmith.formats.blocks import BlockFormat, Fields
from bitsmith.formats.format import Bytes, Float32, Format
from bitsmith.numerics.input_metric import PANEL, Group, InputMetric
from bitsmith.numerics.threads import for_ranges
from bitsmith.passes import feedback as kernels
from bitsmith.passes.feedback import LANES, Tile

SWEEPS = 3


@dataclass(frozen=True)
class Effort:
    """How hard `round_rows` tries: each part of the search by itself, for measuring what it brings.

    `sweeps` follow the error feedback (they end early where nothing changes); in them `descent` moves single
    codes, `refit` the float16 factors, and `scales` the whole scales and mins, in the feedback too.
    `importance` weighs the columns where a block's fields are fitted: by `schur` complements, H's `diagonal`
    or `none`. `FEEDBACK_ONLY` is GPTQ as in the literature.
    """

    sweeps: int = SWEEPS
    descent: bool = True
    refit: bool = True
    scales: bool = True
    importance: str = "schur"


EFFORT = Effort()
FEEDBACK_ONLY = Effort(sweeps=0, scales=False)


def round_rows(
    form: Format,
    rows: Float32,
    metric: InputMetric,
    effort: Effort = EFFORT,
    *,
    steps: Float32 | None = None,
) -> Bytes:
    """Encode `rows` (`out in`, GGUF layout) to bytes (`out row_bytes`), minimising `tr(E H Eᵀ)`.

    With `steps` (`out blocks`) blocks keep these as their factors, and codes alone are chosen. A row's bytes
    depend on that row, its steps, the metric and the effort alone. Formats without blocks are encoded as they
    are. Raises BitsmithError for rows that do not fit the format or the metric.
    """
    row_bytes = form.row_bytes(rows.shape[-1])
    if not isinstance(form, BlockFormat):
        return form.encode(rows)
    if rows.shape[-1] != metric.width:
        raise BitsmithError(f"rows have {rows.shape[-1]} weights, the second moment {metric.width}")
    out = np.empty((len(rows), row_bytes), np.uint8)
    groups = metric.groups(form.block_size)
    for group in groups:
        group.sub_factors(form.sub_size)

    def work(first: int, last: int) -> None:
        for at in range(first, last, LANES):
            end = min(at + LANES, last)
            given = None if steps is None else steps[at:end]
            out[at:end] = _round_tile(form, rows[at:end], groups, effort, given)

    for_ranges(len(rows), LANES, LANES, work)
    return out


def _round_tile(
    form: BlockFormat, rows: Float32, groups: list[Group], effort: Effort, steps: Float32 | None
) -> Bytes:
    parts, at = [], 0
    for group in groups:
        tile = _Rows(form, rows[:, at : at + group.width], group, effort)
        if steps is not None:
            tile.given = steps[:, at // form.block_size : (at + group.width) // form.block_size]
        tile.feed()
        for _ in range(effort.sweeps):
            if not tile.sweep():
                break
        parts.append(tile.packed())
        at += group.width
    return np.concatenate(parts, axis=1)


def _offsets(steps: list[int], pairs: bool) -> NDArray[np.int64]:
    mins = steps if pairs else [0]
    found = [(s, m) for s in steps for m in mins]
    return np.array(sorted(found, key=lambda move: abs(move[0]) + abs(move[1])), np.int64)


class _Rows:
    """At most `LANES` rows over one group of columns, their fields and codes (as levels)."""

    given: Float32 | None = None  # each block's factor (`rows blocks`), where it is not to be fitted

    def __init__(self, form: BlockFormat, rows: Float32, group: Group, effort: Effort) -> None:
        self.form, self.group, self.effort = form, group, effort
        self.count, self.width = rows.shape
        self.blocks = self.width // form.block_size
        kind = group.hessian.dtype
        self.base = np.zeros((self.width, LANES), kind)
        self.base[:, : self.count] = rows.T
        self.errors = np.zeros_like(self.base)
        self.levels = np.zeros_like(self.base)
        self.d, self.m = np.zeros((self.blocks, LANES), kind), np.zeros((self.blocks, LANES), kind)
        self.scales = np.ones((self.blocks, form.subs, LANES), kind)
        self.mins = np.zeros_like(self.scales)
        self.low = form.levels[form.first_code]
        self.high = form.levels[-1]
        self.limits = np.array([*form.scale_limits, *form.min_limits])
        self.ladder = form.scale_values
        whole = form.scale_limits[0] < form.scale_limits[1] and effort.scales
        pairs = form.min_limits[0] < form.min_limits[1]
        self.moves = (
            _offsets([0, -1, 1] if pairs else [0, -1, 1, -2, 2], pairs) if whole else _offsets([0], False)
        )
        self.sub_factors = group.sub_factors(form.sub_size)
        importance = {
            "schur": group.weights, "diagonal": group.diagonal, "none": None,
        }[effort.importance]  # fmt: skip
        self.importance = None if importance is None else np.asarray(importance, np.float32)

    def _square(self, packed: Tile, block: int) -> Tile:
        """Return the diagonal block `block` of a packed matrix (`size size`)."""
        size = self.form.block_size
        at, end = block * size, (block + 1) * size
        part = packed[at // PANEL : end // PANEL, at:end]
        return np.ascontiguousarray(part.transpose(1, 0, 2)).reshape(size, size)

    def feed(self) -> None:
        """Error feedback from the first block to the last."""
        size = self.form.block_size
        weights = np.asarray(self.group.weights, self.base.dtype)
        for block in range(self.blocks):
            at, end = block * size, (block + 1) * size
            target = self.base[at:end].copy()
            kernels.add_products(self.group.feedback, at, 0, self.errors, 0, at, target)
            own = self._square(self.group.feedback, block)
            if self.given is None:
                self._fit(block, target, own)
            else:
                self.d[block, : self.count] = self.given[:, block]
            kernels.feed_block(
                self.base[at:end], target, own, weights[at:end],
                self.d[block], self.m[block], self.scales[block], self.mins[block], self.moves, self.limits,
                self.ladder, self.low, self.high, self.form.level_table, self.levels[at:end],
                self.errors[at:end],
            )  # fmt: skip

    def _fit(self, block: int, target: Tile, feedback: Tile) -> None:
        size = self.form.block_size
        moved = target.copy()
        if block:
            kernels.compensate_block(self.base[block * size : (block + 1) * size], moved, feedback)
        rows = np.ascontiguousarray(moved[:, : self.count].T, np.float32)
        importance = None if self.importance is None else self.importance[block * size : (block + 1) * size]
        fields = self.form.fit(rows, importance)
        self.d[block, : self.count], self.m[block, : self.count] = fields.d, fields.m
        self.scales[block, :, : self.count] = fields.scales.T
        self.mins[block, :, : self.count] = fields.mins.T

    def sweep(self) -> bool:
        """Improve every block once, the rest of the row as it stands; tell whether anything changed."""
        changed = False
        for block in range(self.blocks):
            changed |= self._improve(block)
        return changed

    def _improve(self, block: int) -> bool:
        size = self.form.block_size
        at, end = block * size, (block + 1) * size
        base, errors, levels = self.base[at:end], self.errors[at:end], self.levels[at:end]
        fields = self.d[block], self.m[block], self.scales[block], self.mins[block]
        grid = self.low, self.high, self.form.level_table
        gradient = np.zeros_like(base)
        kernels.add_products(self.group.hessian, at, 0, self.errors, 0, self.width, gradient)
        hessian = self._square(self.group.hessian, block)
        before = errors.copy()
        if self.effort.scales:
            subs = slice(block * self.form.subs, (block + 1) * self.form.subs)
            own, weights, inverse = (part[subs] for part in self.sub_factors)
            kernels.research_block(
                base, gradient, hessian, own, weights, inverse, *fields, self.moves, self.limits,
                self.ladder, *grid, levels, errors,
            )  # fmt: skip
        if self.effort.descent:
            kernels.descend_block(base, gradient, hessian, *fields, *grid, levels, errors)
        if self.effort.refit and self.given is None and not len(self.ladder):
            kernels.refit_block(base, gradient, hessian, *fields, levels, errors)
        return bool((before != errors).any())

    def packed(self) -> Bytes:
        """Return the rows' bytes (`rows row_bytes`)."""
        n, form = self.count, self.form
        total = n * self.blocks
        scales = _by_row(self.scales[..., :n]).reshape(total, form.subs)
        fields = Fields(
            _by_row(self.d[:, :n]).reshape(total),
            _by_row(self.m[:, :n]).reshape(total),
            scales if len(self.ladder) else scales.astype(np.int16),
            _by_row(self.mins[..., :n]).astype(np.int16).reshape(total, form.subs),
        )
        levels = _by_row(self.levels[:, :n]).reshape(total, form.block_size)
        codes = np.searchsorted(form.levels, levels).astype(np.uint8)
        return form.pack(fields, codes).reshape(n, -1)


def _by_row(lanes: Tile) -> Float32:
    return np.ascontiguousarray(np.moveaxis(lanes, -1, 0), np.float32)


def output_error(errors: Float32, held: Float32) -> float:
    """Return the mean over held-out inputs `held` (`rows in`) of `|E x|²` for `errors` (`out in`)."""
    produced = np.asarray(held, np.float32) @ np.asarray(errors, np.float32).T
    return float(np.einsum("ij,ij->", produced, produced, dtype=np.float64)) / max(1, len(held))
