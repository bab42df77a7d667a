"""Error feedback on a device of torch: `passes.rounding.round_rows` step by step, all rows side by side.

The same panels, factors, moves and rules as the compiled rounder. Products are the device's own, so that a
sum's last bits and now and then a code differ from the processor's; what the rounding costs does not. A tile
is `columns rows`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray

from bitsmith.formats.blocks import BlockFormat
from bitsmith.formats.format import Float32
from bitsmith.numerics.input_metric import Group, InputMetric, SubFactors
from bitsmith.passes.feedback import HIGHEST, LEAST_GAIN
from bitsmith.passes.rounding import Effort, moves_of
from bitsmith.run.torch_fields import fit, grid_of
from bitsmith.run.torch_search import Grid, Tensor, half_round

_GAIN, _HIGHEST = float(LEAST_GAIN), float(HIGHEST)
_SINGULAR = 1e-5


class _Factors(NamedTuple):
    """What a group's metric says of one panel, on the device (see `input_metric.Panel`)."""

    metric: Tensor
    factor: Tensor
    turned: Tensor
    feedback: Tensor
    solved: Tensor
    subs: tuple[Tensor, Tensor, Tensor]


class _Fields(NamedTuple):
    """Fields of some blocks: `d`, `m` (`blocks rows`), `scales`, `mins` (`subs rows`)."""

    d: Tensor
    m: Tensor
    scales: Tensor
    mins: Tensor

    def steps(self, sub: int) -> tuple[Tensor, Tensor]:
        """Return step and offset of a sub-block (`rows`)."""
        block = sub // (len(self.scales) // len(self.d))
        return self.d[block] * self.scales[sub], self.m[block] * self.mins[sub]


class Feedback:
    """Rounds rows by error feedback on `device`; what metrics hold is kept there while they live."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: WeakKeyDictionary[Group, dict[str, Tensor]] = WeakKeyDictionary()

    def round(
        self, form: BlockFormat, rows: Float32, metric: InputMetric, effort: Effort
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return the fields and codes of `rows` (`rows in`), as `torch_fields.fit` and `nearest_codes` do."""
        parts, at = list[tuple[_Fields, Tensor]](), 0
        for group in metric.groups(form.block_size):
            some = torch.from_numpy(np.ascontiguousarray(rows[:, at : at + group.width].T))
            parts.append(_Rows(self, form, some.to(self._device), group, effort).rounded())
            at += group.width
        book = torch.from_numpy(form.levels).to(self._device)
        levels = torch.cat([found for _, found in parts]).T.contiguous()
        codes = torch.searchsorted(book, levels).to(torch.uint8).reshape(-1, form.block_size)
        d, m, scales, mins = (
            torch.cat(some).T for some in zip(*(fields for fields, _ in parts), strict=True)
        )
        by_block = (len(rows), -1, form.subs)
        return (d, m, scales.reshape(by_block), mins.reshape(by_block)), codes

    def put(self, values: NDArray[Any]) -> Tensor:
        """Return an array as float32 on the device."""
        return torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(self._device)

    def of(self, group: Group, name: str) -> Tensor:
        """Return one of a group's matrices on the device."""
        kept = self._kept.setdefault(group, {})
        if name not in kept:
            kept[name] = self.put(getattr(group, name))
        return kept[name]


class _Rows:
    """Rows over one group of columns: their weights, errors, levels and fields."""

    def __init__(
        self, device: Feedback, form: BlockFormat, base: Tensor, group: Group, effort: Effort
    ) -> None:
        self.device, self.form, self.group, self.effort, self.base = device, form, group, effort, base
        self.errors, self.levels = torch.zeros_like(base), torch.zeros_like(base)
        width, count = base.shape
        blocks = width // form.block_size
        shapes = (blocks, count), (blocks, count), (blocks * form.subs, count), (blocks * form.subs, count)
        self.fields = _Fields(*(base.new_zeros(shape) for shape in shapes))
        self.grid = grid_of(form, base.device)
        self.moves = device.put(moves_of(form, effort))
        self.size = max(1, effort.panel // form.block_size) * form.block_size
        self.weights = device.of(group, "weights")

    def rounded(self) -> tuple[_Fields, Tensor]:
        """Return the fields and the levels."""
        panels = self.group.panels(self.size, self.form.sub_size)
        put = self.device.put
        for index, panel in enumerate(panels):
            subs = put(panel.subs.feedback), put(panel.subs.weights), put(panel.subs.inverse)
            whole = put(panel.metric), put(panel.factor), put(panel.turned), put(panel.feedback)
            self._feed(index, _Factors(*whole, put(panel.solved), subs))
        for _ in range(self.effort.sweeps):
            changed = torch.stack([self._sweep(index) for index in range(len(panels))])
            if not changed.any():
                break
        return self.fields, self.levels

    def _columns(self, index: int) -> slice:
        return slice(index * self.size, min((index + 1) * self.size, len(self.base)))

    def _part(self, at: slice) -> _Fields:
        blocks, subs = (
            slice(at.start // size, at.stop // size) for size in (self.form.block_size, self.form.sub_size)
        )
        return _Fields(*(self.fields[i][blocks] for i in range(2)), *(self.fields[i][subs] for i in (2, 3)))

    def _feed(self, index: int, panel: _Factors) -> None:
        """Error feedback through a panel, and what improves it as long as the columns after it may follow."""
        at = self._columns(index)
        base, errors, levels, fields = self.base[at], self.errors[at], self.levels[at], self._part(at)
        by = self.device.of(self.group, "feedback")[at, : at.start] @ self.errors[: at.start]
        target = base + by
        self._fit(at, base + panel.solved @ by)
        size = self.form.sub_size
        for sub in range(len(fields.scales)):
            own = slice(sub * size, (sub + 1) * size)
            target[own] += panel.feedback[own, : own.start] @ errors[: own.start]
            best = torch.full_like(base[0], _HIGHEST)
            inner, weights = panel.feedback[own, own], self.weights[at][own]
            self._search(base[own], target[own], inner, weights, fields, sub, best, levels[own])
            errors[own] = self._errors(base[own], levels[own], fields, sub)
            target[own] += inner @ errors[own]
        if not self.effort.local:
            return
        if self.effort.refit:
            self._refit(at, target, panel)
        own_errors = torch.diagonal(panel.factor)[:, None] * (target - (base - errors))
        self._improve(at, panel.factor @ own_errors, panel.metric, panel.subs)

    def _fit(self, at: slice, wanted: Tensor) -> None:
        form = self.form
        importance = {
            "schur": self.group.weights, "diagonal": self.group.diagonal, "none": None,
        }[self.effort.importance]  # fmt: skip
        given = None if importance is None else form.weights(np.asarray(importance[at], np.float32))
        weights = None if given is None else self.device.put(given.reshape(-1))
        fitted = form.quick() if self.effort.quick else form
        d, m, scales, mins = fit(fitted, wanted.T.contiguous(), weights)
        part = self._part(at)
        for mine, found in zip(part, (d, m, scales.flatten(1), mins.flatten(1)), strict=True):
            mine.copy_(found.T)

    def _errors(self, base: Tensor, levels: Tensor, fields: _Fields, sub: int) -> Tensor:
        step, offset = fields.steps(sub)
        return base - (step * levels - offset)

    def _search(
        self, base: Tensor, target: Tensor, feedback: Tensor, weights: Tensor, fields: _Fields, sub: int,
        best: Tensor, levels: Tensor,
    ) -> None:  # fmt: skip
        """Choose a sub-block's whole scale and min and its `levels`, all moves side by side."""
        form, block = self.form, sub // self.form.subs
        scales = (fields.scales[sub] + self.moves[:, :1]).clamp_(*map(float, form.scale_limits))
        mins = (fields.mins[sub] + self.moves[:, 1:]).clamp_(*map(float, form.min_limits))
        step, offset = fields.d[block] * scales, fields.m[block] * mins
        trial, cost = _fed(base, target, feedback, weights, (step, offset), self.grid)
        chosen = torch.full_like(best, -1, dtype=torch.int64)
        for move, found in enumerate(cost):
            better = found < best - best.abs() * _GAIN
            best.copy_(torch.where(better, found, best))
            chosen = torch.where(better, move, chosen)
        taken, place = chosen >= 0, chosen.clamp(min=0)[None]
        for kept, tried in ((fields.scales, scales), (fields.mins, mins)):
            kept[sub] = torch.where(taken, tried.gather(0, place)[0], kept[sub])
        new = trial.gather(0, place[:, None].expand(1, *levels.shape))[0]
        levels.copy_(torch.where(taken, new, levels))

    def _improve(self, at: slice, gradient: Tensor, hessian: Tensor, subs: Sequence[Tensor]) -> Tensor:
        """Improve each sub-block, everything else in the row as it stands; tell whether anything changed."""
        base, errors, levels, fields = self.base[at], self.errors[at], self.levels[at], self._part(at)
        size, before = self.form.sub_size, self.errors[at].clone()
        for sub in range(len(fields.scales)):
            own = slice(sub * size, (sub + 1) * size)
            gradient[own] += hessian[own, : own.start] @ (errors[: own.start] - before[: own.start])
            if self.effort.scales:
                self._research(
                    base[own], gradient[own], [part[sub] for part in subs], fields, sub, levels[own]
                )
                errors[own] = self._errors(base[own], levels[own], fields, sub)
                gradient[own] += hessian[own, own] @ (errors[own] - before[own])
            if self.effort.descent:
                steps = fields.steps(sub)
                _descend(
                    base[own], gradient[own], hessian[own, own], steps, self.grid, levels[own], errors[own]
                )
        return (before != errors).any()

    def _research(
        self, base: Tensor, gradient: Tensor, factors: Sequence[Tensor], fields: _Fields, sub: int,
        levels: Tensor,
    ) -> None:  # fmt: skip
        feedback, weights, inverse = factors
        step, offset = fields.steps(sub)
        decoded = step * levels - offset
        aim = decoded + inverse @ gradient
        left = aim - decoded
        left = left + feedback @ left
        self._search(
            aim, aim, feedback, weights, fields, sub, (weights[:, None] * left * left).sum(0), levels
        )

    def _refit(self, at: slice, target: Tensor, panel: _Factors) -> None:
        """Refit a panel's float16 `d` and `m`, block by block, keeping `target` and errors up to date."""
        form, fields = self.form, self._part(at)
        base, errors, levels = self.base[at], self.errors[at], self.levels[at]
        own = torch.diagonal(panel.turned)[:, None]
        for block in range(len(fields.d)):
            columns = slice(block * form.block_size, (block + 1) * form.block_size)
            subs = slice(block * form.subs, (block + 1) * form.subs)
            scale, least = (part[subs].repeat_interleave(form.sub_size, 0) for part in fields[2:])
            a, c = scale * levels[columns], least
            av, cv = panel.turned[:, columns] @ a, panel.turned[:, columns] @ c
            left = own * (target - (base - errors))
            sums = [(x * y).sum(0) for x, y in ((av, av), (av, cv), (cv, cv), (av, left), (cv, left))]
            by, by_m = _refitted(sums, fields.d[block], fields.m[block])
            target += (by_m * cv - by * av) / own
            now = base[columns] - (fields.d[block] * a - fields.m[block] * c)
            target[columns] += errors[columns] - now
            errors[columns] = now

    def _sweep(self, index: int) -> Tensor:
        at, size = self._columns(index), self.form.sub_size
        hessian = self.device.of(self.group, "hessian")
        subs = slice(at.start // size, at.stop // size)
        factors = SubFactors(*(part[subs] for part in self.group.sub_factors(size)))
        given = [self.device.put(part) for part in factors]
        return self._improve(at, hessian[at] @ self.errors, hessian[at, at], given)


def _fed(
    base: Tensor, target: Tensor, feedback: Tensor, weights: Tensor, steps: tuple[Tensor, Tensor], grid: Grid
) -> tuple[Tensor, Tensor]:
    """Round `target` (`size rows`) column by column under each of `steps`; return levels, costs by move."""
    step, offset = steps
    inverse = torch.where(step != 0, torch.ones_like(step) / step, 0.0)
    wanted = target.expand(len(step), *target.shape).clone()
    levels, cost = torch.empty_like(wanted), torch.zeros_like(step)
    for j in range(len(base)):
        levels[:, j] = grid.nearest((wanted[:, j] + offset) * inverse)
        decoded = step * levels[:, j] - offset
        left = wanted[:, j] - decoded
        cost += weights[j] * left * left
        wanted[:, j + 1 :].addcmul_(feedback[j + 1 :, j, None], (base[j] - decoded)[:, None])
    return levels, cost


def _descend(
    base: Tensor, gradient: Tensor, hessian: Tensor, steps: tuple[Tensor, Tensor], grid: Grid, levels: Tensor,
    errors: Tensor,
) -> None:  # fmt: skip
    """Coordinate descent on the levels of one sub-block, column by column."""
    step, offset = steps
    inverse = torch.where(step != 0, torch.ones_like(step) / step, 0.0)
    least = step * step * _GAIN
    slope = gradient.clone()
    for j in range(len(base)):
        own = hessian[j, j]
        wanted = base[j] - errors[j] + slope[j] / own
        level = grid.nearest((wanted + offset) * inverse)
        now = base[j] - (step * level - offset)
        change = now - errors[j]
        gain = -change * (slope[j] + slope[j] + own * change)
        keep = (gain > own * least) & (level != levels[j])
        slope[j + 1 :].addcmul_(hessian[j + 1 :, j, None], torch.where(keep, change, 0.0)[None])
        errors[j] = torch.where(keep, now, errors[j])
        levels[j] = torch.where(keep, level, levels[j])


def _refitted(sums: list[Tensor], d: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """Move `d` and `m` (`rows`) in place to what costs least, rounded to float16; return how far."""
    aa, ac, cc, ag, cg = sums
    det = aa * cc - ac * ac
    wanted = torch.where(det > aa * cc * _SINGULAR, (cc * ag - ac * cg) / det, ag / aa)
    new_d = half_round(d + wanted)
    by = new_d - d
    new_m = torch.where(cc > 0, half_round(m + (by * ac - cg) / cc), m)
    by_m = new_m - m
    cost = by * (by * aa - 2.0 * ag) + by_m * (2.0 * cg + by_m * cc) - 2.0 * by * by_m * ac
    kept = (aa > 0) & (new_d != 0) & (cost < -_GAIN * ((by * ag).abs() + (by_m * cg).abs()))
    d.copy_(torch.where(kept, new_d, d))
    m.copy_(torch.where(kept, new_m, m))
    return torch.where(kept, by, 0.0), torch.where(kept, by_m, 0.0)
