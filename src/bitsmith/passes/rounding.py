"""Round a matrix onto a block format so that its output changes least: minimise `tr(E H Eᵀ)`, `E = W - Q`.

Error feedback goes block by block: the block's fields are fitted to the weights as the errors before it have
moved them (a column weighs what its own error costs when the later columns make up for it), its whole scales
and mins are searched, and its codes taken column by column. Sweeps follow: sub-block by sub-block the same
search with the whole rest of the row in view, coordinate descent on the codes, and a refit of the block's
float16 factors in H. A sweep's step is kept only where the cost falls.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitsmith.errors import BitsmithError
from bitsmith.formats.accelerator import accelerator
from bitsmith.formats.blocks import BlockFormat, Fields
from bitsmith.formats.format import Bytes, Float32, Format
from bitsmith.numerics.input_metric import Group, InputMetric, SubFactors
from bitsmith.numerics.lane_products import LANES, add_products
from bitsmith.numerics.short_products import add_short_products, short_values, shorten
from bitsmith.numerics.threads import for_ranges
from bitsmith.passes import feedback as kernels
from bitsmith.passes.feedback import Tile
from bitsmith.passes.refit import refit_panel

SWEEPS = 2
"""Of the default, over rows of one panel: there they cost no products beside the panel's own."""
PANEL_COLUMNS = 256
"""Columns rounded together."""

_feed_panel: Any = kernels.feed_panel
_improve_panel: Any = kernels.improve_panel
_WAVE_ROWS = 4 * LANES  # rows whose fields are fitted at a time


@dataclass(frozen=True)
class Effort:
    """How hard `round_rows` tries: each part of the search by itself, for measuring what it brings.

    `panel` columns (in whole blocks, at least one) are rounded together: their fields are fitted before the
    first of them is rounded (`quick`: by a shorter search, see `BlockFormat.quick`), and with `local` they
    are improved once before the feedback goes on. `sweeps` follow the error feedback where rows have
    no more than `sweep_columns` weights (they end early where nothing changes). Improving, `scales`
    searches whole scales and mins (the feedback does too), `descent` moves single codes and `refit`, in
    panels only, the float16 factors. `importance` weighs the columns where a block's fields are fitted: by
    `schur` complements, H's `diagonal` or `none`.
    `FEEDBACK_ONLY` is GPTQ as in the literature.
    """

    sweeps: int = 0
    descent: bool = True
    refit: bool = False
    scales: bool = True
    importance: str = "schur"
    local: bool = True
    panel: int = PANEL_COLUMNS
    sweep_columns: int = 1 << 30
    quick: bool = True


EFFORT = Effort(sweeps=SWEEPS, sweep_columns=PANEL_COLUMNS)
FEEDBACK_ONLY = Effort(sweeps=0, scales=False, local=False, panel=0, quick=False)


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
    if metric.width > effort.sweep_columns:
        effort = replace(effort, sweeps=0)
    fast = accelerator()
    found = None if fast is None or steps is not None else fast.round_rows(form, rows, metric, effort)
    if found is not None:
        return found
    out = np.empty((len(rows), row_bytes), np.uint8)
    size = max(1, effort.panel // form.block_size) * form.block_size
    plans = [_Plan(form, group, effort, size) for group in metric.groups(form.block_size)]

    def work(first: int, last: int) -> None:
        for at in range(first, last, _WAVE_ROWS):
            end = min(at + _WAVE_ROWS, last)
            _round_wave(plans, rows[at:end], None if steps is None else steps[at:end], out[at:end])

    for_ranges(len(rows), LANES, _WAVE_ROWS, work)
    return out


class _Plan:
    """What all rows share: a group of columns, its panels' factors and the format's limits."""

    def __init__(self, form: BlockFormat, group: Group, effort: Effort, size: int) -> None:
        self.form, self.group, self.effort, self.size = form, group, effort, size
        self.fitted = form.quick() if effort.quick else form
        self.panels = group.panels(size, form.sub_size)
        self.kind = group.feedback.dtype
        self.short = group.short_rows(size) if self.kind == np.float32 else None
        self.weights = np.asarray(group.weights, self.kind)
        importance = {
            "schur": group.weights, "diagonal": group.diagonal, "none": None,
        }[effort.importance]  # fmt: skip
        self.importance = None if importance is None else np.asarray(importance, np.float32)
        self.limits = np.array([*form.scale_limits, *form.min_limits])
        low, high = form.levels[form.first_code], form.levels[-1]
        self.grid: Any = form.scale_values, low, high, form.level_table
        self.moves = moves_of(form, effort)
        self.refits = effort.refit and not len(form.scale_values)
        self.sweeps = effort.sweeps


def _round_wave(plans: list[_Plan], rows: Float32, steps: Float32 | None, out: Bytes) -> None:
    column = at = 0
    for plan in plans:
        form, end = plan.form, column + plan.group.width
        given = None if steps is None else steps[:, column // form.block_size : end // form.block_size]
        tiles = [
            _Tile(
                plan,
                rows[first : first + LANES, column:end],
                None if given is None else given[first : first + LANES],
            )
            for first in range(0, len(rows), LANES)
        ]
        for index in range(len(plan.panels)):
            _feed_wave(plan, tiles, index)
        for tile in tiles:
            for _ in range(plan.sweeps):
                if not tile.sweep():
                    break
        width = form.row_bytes(plan.group.width)
        for number, tile in enumerate(tiles):
            out[number * LANES : number * LANES + tile.count, at : at + width] = tile.packed()
        column, at = end, at + width


def _feed_wave(plan: _Plan, tiles: list[_Tile], index: int) -> None:
    """Error feedback through one panel of all tiles, whose fields are fitted together."""
    moved = [tile.aim(index) for tile in tiles]
    if tiles[0].given is None:
        form, at = plan.form, index * plan.size
        blocks = np.concatenate(moved).reshape(-1, form.block_size)
        importance = None if plan.importance is None else plan.importance[at : at + moved[0].shape[1]]
        fields = plan.fitted.fit_alone(blocks, importance)
        first = 0
        for tile, rows in zip(tiles, moved, strict=True):
            last = first + rows.size // form.block_size
            tile.take(index, fields.part(first, last))
            first = last
    for tile in tiles:
        tile.feed(index)


def moves_of(form: BlockFormat, effort: Effort) -> NDArray[np.int64]:
    """Return what is added to a sub-block's whole scale and min in their search (`n 2`), nothing first."""
    whole = form.scale_limits[0] < form.scale_limits[1] and effort.scales
    pairs = form.min_limits[0] < form.min_limits[1]
    steps = ([0, -1, 1] if pairs else [0, -1, 1, -2, 2]) if whole else [0]
    found = [(s, m) for s in steps for m in (steps if pairs and whole else [0])]
    return np.array(sorted(found, key=lambda move: abs(move[0]) + abs(move[1])), np.int64)


class _Tile:
    """At most `LANES` rows over one group of columns, their fields and codes (as levels).

    With `given` (`rows blocks`) these are the blocks' factors.
    """

    def __init__(self, plan: _Plan, rows: Float32, given: Float32 | None) -> None:
        self.plan, self.given = plan, given
        self.count, width = rows.shape
        form, kind = plan.form, plan.kind
        blocks = width // form.block_size
        self.base = np.empty((width, LANES), kind)
        kernels.load_rows(np.ascontiguousarray(rows, np.float32), self.base)
        self.errors, self.levels = np.zeros_like(self.base), np.zeros_like(self.base)
        self.d, self.m = np.zeros((blocks, LANES), kind), np.zeros((blocks, LANES), kind)
        self.scales = np.ones((blocks * form.subs, LANES), kind)
        self.mins = np.zeros_like(self.scales)
        if given is not None:
            self.d[:, : self.count] = given.T
        self.target = self.base[:0]
        self.shorts = short_values(width if plan.short else 0, plan.size)

    def _columns(self, index: int) -> slice:
        return slice(index * self.plan.size, min((index + 1) * self.plan.size, len(self.base)))

    def _fields(self, index: int) -> tuple[Tile, Tile, Tile, Tile]:
        """Return a panel's `d`, `m`, `scales` and `mins` (views)."""
        at, form = self._columns(index), self.plan.form
        blocks = slice(at.start // form.block_size, at.stop // form.block_size)
        subs = slice(at.start // form.sub_size, at.stop // form.sub_size)
        return self.d[blocks], self.m[blocks], self.scales[subs], self.mins[subs]

    def aim(self, index: int) -> Float32:
        """Move a panel's target by the errors before it; return the weights to fit it to (`rows size`).

        There every column of the panel takes its own target as it is: the panel's optimum unquantized.
        """
        at = self._columns(index)
        by: Tile = np.zeros_like(self.base[at])
        self.target = np.empty_like(by)
        moved = np.empty((self.count, len(by)), np.float32)
        if self.plan.short is None:
            add_products(self.plan.group.feedback, at.start, 0, self.errors, 0, at.start, by)
        else:
            add_short_products(*self.plan.short[index], *self.shorts, index, by)
        kernels.aim_panel(self.base[at], by, self.plan.panels[index].solved, self.target, moved)
        return moved

    def take(self, index: int, fields: Fields) -> None:
        """Take a panel's fields as fitted, row by row."""
        found: tuple[Tile, ...] = (fields.d, fields.m, fields.scales, fields.mins)
        for mine, given in zip(self._fields(index), found, strict=True):
            mine[:, : self.count] = given.reshape(self.count, -1).T

    def feed(self, index: int) -> None:
        """Error feedback through a panel, and what improves it as long as the columns after it may follow."""
        plan, at, panel = self.plan, self._columns(index), self.plan.panels[index]
        base, target, levels, errors = self.base[at], self.target, self.levels[at], self.errors[at]
        fields = self._fields(index)
        _feed_panel(
            base, target, panel.feedback, plan.weights[at], *fields, plan.moves, plan.limits, *plan.grid,
            levels, errors,
        )  # fmt: skip
        if plan.effort.local:
            self._improve_panel(index)
        if plan.short is not None and index + 1 < len(plan.panels):
            shorten(errors, self.shorts.codes[index], self.shorts.scales[index])

    def _improve_panel(self, index: int) -> None:
        plan, at, panel = self.plan, self._columns(index), self.plan.panels[index]
        base, target, levels, errors = self.base[at], self.target, self.levels[at], self.errors[at]
        fields = self._fields(index)
        if plan.refits and self.given is None:
            refit_panel(base, target, panel.turned, *fields, levels, errors)
        residual, gradient = np.empty_like(base), np.empty_like(base)
        kernels.gradient_of(target, base, errors, panel.factor, residual, gradient)
        self._improve(index, gradient, panel.metric, panel.subs)

    def _improve(self, index: int, gradient: Tile, metric: Tile, subs: SubFactors) -> bool:
        plan, at = self.plan, self._columns(index)
        effort, fields = plan.effort, self._fields(index)
        return bool(
            _improve_panel(
                self.base[at], gradient, metric, *subs, *fields, plan.moves, plan.limits, *plan.grid,
                self.levels[at], self.errors[at], effort.scales, effort.descent,
            )
        )  # fmt: skip

    def sweep(self) -> bool:
        """Improve every panel once, the rest of the row as it stands; tell whether anything changed."""
        changed = False
        for index in range(len(self.plan.panels)):
            changed |= self._sweep(index)
        return changed

    def _sweep(self, index: int) -> bool:
        at, group, form = self._columns(index), self.plan.group, self.plan.form
        hessian = np.ascontiguousarray(group.hessian[at, at])
        subs = slice(at.start // form.sub_size, at.stop // form.sub_size)
        factors = SubFactors(*(part[subs] for part in group.sub_factors(form.sub_size)))
        gradient = np.zeros_like(self.base[at])
        add_products(group.hessian, at.start, 0, self.errors, 0, len(self.errors), gradient)
        return self._improve(index, gradient, hessian, factors)

    def packed(self) -> Bytes:
        """Return the rows' bytes (`rows row_bytes`)."""
        n, form = self.count, self.plan.form
        total = n * len(self.d)
        scales = _by_row(self.scales[:, :n]).reshape(total, form.subs)
        fields = Fields(
            _by_row(self.d[:, :n]).reshape(total),
            _by_row(self.m[:, :n]).reshape(total),
            scales if len(form.scale_values) else scales.astype(np.int16),
            _by_row(self.mins[:, :n]).astype(np.int16).reshape(total, form.subs),
        )
        codes = np.empty((n, len(self.levels)), np.uint8)
        kernels.codes_of(self.levels, form.levels, codes)
        return form.pack(fields, codes.reshape(total, form.block_size)).reshape(n, -1)


def _by_row(lanes: Tile) -> Float32:
    return np.ascontiguousarray(lanes.T, np.float32)


def output_error(errors: Float32, held: Float32) -> float:
    """Return the mean over held-out inputs `held` (`rows in`) of `|E x|²` for `errors` (`out in`)."""
    produced = np.asarray(held, np.float32) @ np.asarray(errors, np.float32).T
    return float(np.einsum("ij,ij->", produced, produced, dtype=np.float64)) / max(1, len(held))
