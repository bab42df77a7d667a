"""The scale searches of `formats.symmetric` and `formats.affine` on torch tensors, for a GPU.

The same sums in the same order and the same choices, operation by operation in float32, so that a device with
IEEE arithmetic finds the same fields as the compiled loops, bit for bit. Lanes are `rows columns`, with
sub-blocks next to each other in a row; a tile is `size rows columns`. Several starts go side by side.

Nothing is divided by a Python number: CUDA would multiply by its reciprocal.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from bitsmith.formats import affine, lanes
from bitsmith.numerics.half import HALF_MAX, HALF_TINY

Tensor = torch.Tensor

_NOISE, _HEARD, _SPREAD = float(lanes.NOISE), float(lanes.HEARD), float(affine.SPREAD)
_SINGULAR = 1e-6
_GPU_ROOM_WEIGHTS = 1 << 26  # that lie side by side in a step of a search
_CPU_ROOM_WEIGHTS = 1 << 16


class Grid(NamedTuple):
    """Levels: whole numbers from `low` to `high`, or those of a `table` (see `BlockFormat.level_table`)."""

    low: float
    high: float
    table: Tensor | None = None

    def nearest(self, places: Tensor) -> Tensor:
        """Return the levels nearest to `places`, in place where that can be."""
        if self.table is None:
            return places.clamp_(self.low, self.high).round_()
        middle = float(len(self.table) // 2)
        index = (places * 2.0 + middle).clamp_(0.0, middle + middle - 1.0).nan_to_num_(0.0)
        return self.table[index.to(torch.int64)]


class Tile(NamedTuple):
    """Sub-blocks to be searched: `x` over `unit` (`rows columns`), `w` (`size 1 columns`) or None."""

    x: Tensor
    w: Tensor | None
    unit: Tensor
    subs: int

    @classmethod
    def of(cls, rows: Tensor, weights: Tensor | None, size: int, subs: int) -> Tile:
        """Return the tile of `rows` (`rows in`), blocks of `subs` sub-blocks of `size`; weights are `in`."""
        x = rows.reshape(len(rows), -1, size).permute(2, 0, 1).contiguous()
        w = None if weights is None else weights.reshape(1, -1, size).permute(2, 0, 1).contiguous()
        unit, inverse = _units(x, subs)
        return cls(x * inverse, w, unit, subs)

    def weighted(self, values: Tensor) -> Tensor:
        """Return `values` times the weights."""
        return values if self.w is None else self.w * values

    def heard(self, values: Tensor, otherwise: float) -> Tensor:
        """Return `values` where the weight lets them stretch the span."""
        if self.w is None:
            return values
        return torch.where(self.w > _HEARD, values, torch.full_like(values, otherwise))

    def blocks(self, values: Tensor) -> Tensor:
        """Return `values` (`… rows columns`) by block (`… rows blocks subs`)."""
        return values.reshape(*values.shape[:-1], -1, self.subs)

    def spread(self, values: Tensor) -> Tensor:
        """Return what every block has (`rows blocks`) for every sub-block (`rows columns`)."""
        return values[..., None].expand(*values.shape, self.subs).flatten(-2)

    def at_a_time(self, steps: int) -> int:
        """Return how many of `steps` go side by side."""
        room = _CPU_ROOM_WEIGHTS if self.x.device.type == "cpu" else _GPU_ROOM_WEIGHTS
        return max(1, min(steps, room // self.x.numel()))


def half_round(values: Tensor) -> Tensor:
    """Return values rounded to float16, saturating, as float32."""
    return values.clamp(-float(HALF_MAX), float(HALF_MAX)).to(torch.float16).to(torch.float32)


def half_in_unit(values: Tensor, unit: Tensor) -> Tensor:
    """Return `values * unit` rounded to float16, never to zero, over `unit`."""
    rounded = half_round(values * unit)
    tiny = torch.where(values < 0, -float(HALF_TINY), float(HALF_TINY))
    rounded = torch.where(rounded == 0, tiny.to(rounded.dtype), rounded)
    return torch.where(unit == 0, 0.0, rounded / unit)


def _units(x: Tensor, subs: int) -> tuple[Tensor, Tensor]:
    largest = x.abs().amax(0).reshape(x.shape[1], -1, subs).amax(-1)
    ordinary = (largest >= float(lanes.ORDINARY_LOW)) & (largest <= float(lanes.ORDINARY_HIGH))
    exponent = (largest.view(torch.int32) & int(lanes.EXPONENT)).clamp(max=int(lanes.EXPONENT_LIMIT))
    power = torch.where(largest >= float(lanes.SMALLEST), exponent.view(torch.float32), 0.0)
    unit = torch.where(ordinary, 1.0, power)
    inverse = _inverse(unit)
    return tuple(part[..., None].expand(*part.shape, subs).flatten(-2) for part in (unit, inverse))  # type: ignore[return-value]


def _inverse(step: Tensor) -> Tensor:
    return torch.where(step != 0, torch.ones_like(step) / step, 0.0)


def _inverse_above(step: Tensor, numerator: Tensor | None = None) -> Tensor:
    whole = torch.ones_like(step) if numerator is None else numerator
    return torch.where(step > 0, whole / step, 0.0)


def _down(terms: Tensor) -> Tensor:
    """Sum `terms` (`… size rows columns`) down each lane, one after the other."""
    total = torch.zeros_like(terms[..., 0, :, :])
    for j in range(terms.shape[-3]):
        total += terms[..., j, :, :]
    return total


def _down_pairs(terms: Tensor) -> Tensor:
    return _down(terms[..., 0::2, :, :] + terms[..., 1::2, :, :])


def _symmetric_sums(tile: Tile, inverse: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return `sum w q x` and `sum w q q` for `inverse` (`… rows columns`)."""
    q = grid.nearest(tile.x * inverse[..., None, :, :])
    wq = tile.weighted(q)
    down = _down_pairs if grid.table is None else _down
    return down(wq * tile.x), down(wq * q)


def search_symmetric(tile: Tile, grid: Grid, starts: Tensor, rounds: int) -> Tensor:
    """Return the scale per lane of `x ≈ scale * level`."""
    heard = tile.heard(tile.x, 0.0)
    extreme = heard.gather(0, heard.abs().argmax(0, keepdim=True))[0]
    best, scale = torch.zeros_like(extreme), torch.zeros_like(extreme)

    def take(sqx: Tensor, sqq: Tensor) -> None:
        nonlocal best, scale
        found = sqx / sqq
        gain = sqx * sqx / sqq
        better = gain > best + best * _NOISE
        best = torch.where(better, gain, best)
        scale = torch.where(better, found, scale)

    together = tile.at_a_time(len(starts))
    for part in starts.split(together):  # type: ignore[no-untyped-call]
        inverse = torch.where(extreme != 0, part[:, None, None] / extreme, 0.0)
        for sums in zip(*_symmetric_sums(tile, inverse, grid), strict=True):
            take(*sums)
    for _ in range(rounds):
        take(*_symmetric_sums(tile, _inverse(scale), grid))
    return scale


def fit_symmetric(tile: Tile, grid: Grid, starts: Tensor, rounds: int) -> Tensor:
    """Return `d` (`rows columns`)."""
    return half_round(search_symmetric(tile, grid, starts, rounds) * tile.unit)


def _symmetric_errors(tile: Tile, scale: Tensor, grid: Grid) -> Tensor:
    inverse = _inverse(scale)
    left = tile.x - scale[..., None, :, :] * grid.nearest(tile.x * inverse[..., None, :, :])
    return _down(tile.weighted(left) * left)


def _outwards(count: int, like: Tensor) -> Tensor:
    return torch.tensor([float(lanes.outwards.py_func(step)) for step in range(count)], device=like.device)


def _tried(tile: Tile, errors: list[Tensor], values: list[Tensor]) -> list[Tensor]:
    """Return the least error and its values, the first of equals."""
    best = [torch.full_like(errors[0], torch.inf), *(torch.zeros_like(part[0]) for part in values)]
    for error, *found in zip(errors, *values, strict=True):
        better = error < best[0]
        best = [torch.where(better, now, before) for now, before in zip((error, *found), best, strict=True)]
    return best


def _choose_scales(
    tile: Tile, factor: Tensor, grid: Grid, centre: Tensor, reach: int, opposite: bool,
    limits: tuple[float, float],
) -> list[Tensor]:  # fmt: skip
    """Return the least error per lane, its whole scale, and the two sums that refit the factor."""
    near = centre.round()
    wholes = near + _outwards(2 * reach + 1, near)[:, None, None]
    wholes = torch.cat([wholes, -near[None]]) if opposite else wholes
    wholes = wholes.clamp_(*limits)
    errors: list[Tensor] = []
    for part in wholes.split(tile.at_a_time(len(wholes))):  # type: ignore[no-untyped-call]
        errors.extend(_symmetric_errors(tile, part * factor, grid))
    error, whole = _tried(tile, errors, [wholes])
    return [error, whole, *_symmetric_sums(tile, _inverse(whole * factor), grid)]


def _along(values: Tensor) -> Tensor:
    """Sum over a block's sub-blocks (`… subs`), one after the other."""
    total = torch.zeros_like(values[..., 0])
    for s in range(values.shape[-1]):
        total += values[..., s]
    return total


def fit_super_symmetric(
    tile: Tile, grid: Grid, starts: Tensor, reach: int, refits: int, limits: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Return `d` (`rows blocks`) and the whole scales (`rows blocks subs`)."""
    scale = search_symmetric(tile, grid, starts, 1)
    by_block = tile.blocks(scale)
    unit = tile.blocks(tile.unit)[..., 0]
    at = by_block.abs().argmax(-1, keepdim=True)
    value = by_block.gather(-1, at)[..., 0] / torch.full_like(unit, limits[0])
    best = torch.full_like(unit, torch.inf)
    d, scales = torch.zeros_like(unit), torch.zeros_like(by_block)
    factor, found = unit, [unit]
    for turn in range(refits):
        if turn > 0:
            whole, sqx, sqq = (tile.blocks(part) for part in found[1:])
            total = _along(whole * whole * sqq)
            value = torch.where(total > 0, _along(whole * sqx) / total, factor)
        factor = half_in_unit(value, unit)
        every = tile.spread(factor)
        start = torch.where(every != 0, scale / every, 0.0)
        centre = start if turn == 0 else found[1]
        found = _choose_scales(tile, every, grid, centre, reach if turn == 0 else 1, turn == 0, limits)
        total = _along(tile.blocks(found[0]))
        better = total < best
        best = torch.where(better, total, best)
        d = torch.where(better, factor * unit, d)
        scales = torch.where(better[..., None], tile.blocks(found[1]), scales)
    return d, scales


def _affine_sums(tile: Tile, inverse: Tensor, offset: Tensor, high: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return `sum w q`, `sum w q x` and `sum w q q` for `inverse` and `offset` (`… rows columns`)."""
    q = ((tile.x + offset[..., None, :, :]) * inverse[..., None, :, :]).clamp_(0.0, high).round_()
    wq = tile.weighted(q)
    return _down_pairs(wq), _down_pairs(wq * tile.x), _down_pairs(wq * q)


class _Line(NamedTuple):
    scale: Tensor
    offset: Tensor
    codes: Tensor
    sw: Tensor
    sx: Tensor


def _search_affine(tile: Tile, high: float, starts: Tensor, rounds: int, negative: bool) -> _Line:
    """Return `x ≈ scale * q - offset` per lane, the codes' weighted sum, `sum w` and `sum w x`."""
    x = tile.x
    least = tile.heard(x, torch.inf).amin(0)
    least = least if negative else least.clamp(max=0.0)
    most = tile.heard(x, -torch.inf).amax(0)
    weights = torch.ones_like(x[:, :1]) if tile.w is None else tile.w
    sx = _down_pairs(tile.weighted(x))
    sw = _down_pairs(weights).expand_as(sx)
    mean = sx / sw
    flat = torch.full_like(mean, True, dtype=torch.bool) if negative else mean < 0
    zero = torch.zeros_like(mean)
    offset, best = torch.where(flat, -mean, 0.0), torch.where(flat, 0.0, -mean * sx)
    scale, codes = zero, zero

    def take(sq: Tensor, sqx: Tensor, sqq: Tensor) -> None:
        nonlocal best, scale, offset, codes
        level = sq / sw
        together, spread = sqx - level * sx, sqq - level * sq
        known = spread > sqq * _SPREAD
        s = torch.where(known, together / spread, 0.0)
        o = s * level - mean
        gain = s * together
        if not negative:
            alone = ~(known & (o > 0))
            gain = torch.where(alone, sqx * sqx / sqq - mean * sx, gain)
            s = torch.where(alone, sqx / sqq, s)
            o = torch.where(alone, 0.0, o)
        noise = (torch.where(best > 0, best, 0.0) + mean * sx) * _NOISE
        better = (gain > best + noise) & (s > 0)
        best, scale = torch.where(better, gain, best), torch.where(better, s, scale)
        offset, codes = torch.where(better, o, offset), torch.where(better, sq, codes)

    span = most - least
    for part in starts.split(tile.at_a_time(len(starts))):  # type: ignore[no-untyped-call]
        share, stretch = part[:, 0, None, None], part[:, 1, None, None]
        trial = -(least + share * span)
        inverse = torch.where(span > 0, stretch / span, 0.0)
        for sums in zip(*_affine_sums(tile, inverse, trial, high), strict=True):
            take(*sums)
    for _ in range(rounds):
        take(*_affine_sums(tile, _inverse_above(scale), offset, high))
    return _Line(scale, offset, codes, sw, sx)


def fit_affine(tile: Tile, high: float, starts: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """Return `d` and `m` (`rows columns`)."""
    line = _search_affine(tile, high, starts, rounds, True)
    d = half_round(line.scale * tile.unit)
    offset = torch.where(d != 0, line.offset, -line.sx / line.sw)
    return d, half_round(offset * tile.unit)


def _affine_errors(tile: Tile, scale: Tensor, offset: Tensor, high: float) -> Tensor:
    inverse = _inverse_above(scale)
    value = tile.x + offset[..., None, :, :]
    places = (value * inverse[..., None, :, :]).clamp_(0.0, high).round_()
    left = value - scale[..., None, :, :] * places
    return _down(tile.weighted(left) * left)


def _choose_scales_and_mins(
    tile: Tile, factors: tuple[Tensor, Tensor], high: float, top: float, line: _Line,
    before: tuple[Tensor, Tensor] | None, reach: tuple[int, int],
) -> list[Tensor]:  # fmt: skip
    """Return the least error per lane, its whole scale and min, and the sums that refit the factors."""
    factor, factor_m = factors
    centre = _inverse_above(factor, line.scale).round() if before is None else before[0]
    width = 2 * reach[1] + 1
    scales = (centre + _outwards(2 * reach[0] + 1, centre)[:, None, None]).clamp_(0.0, top)
    wholes = scales.repeat_interleave(width, 0)
    if before is None:
        wanted = (wholes * factor * line.codes - line.sx) / line.sw
        wanted = torch.where(line.scale > 0, wanted, line.offset).clamp_(min=0.0)
        near = _inverse_above(factor_m.expand_as(wanted), wanted).round()
    else:
        near = before[1].expand_as(wholes)
    mins = (near + _outwards(width, near).repeat(len(scales))[:, None, None]).clamp_(0.0, top)
    errors: list[Tensor] = []
    together = tile.at_a_time(len(wholes))
    for first in range(0, len(wholes), together):
        some = slice(first, first + together)
        errors.extend(_affine_errors(tile, wholes[some] * factor, mins[some] * factor_m, high))
    error, whole, least = _tried(tile, errors, [wholes, mins])
    sums = _affine_sums(tile, _inverse_above(whole * factor), least * factor_m, high)
    return [error, whole, least, *sums]


def _refit_factors(
    tile: Tile, found: list[Tensor], line: _Line, d: Tensor, m: Tensor
) -> tuple[Tensor, Tensor]:
    """Solve least squares for the two factors; where it is singular keep `m` and fit `d` alone.

    Terms are float32, their sums float64, as in the compiled loops.
    """
    a, b, sq, sqx, sqq = (tile.blocks(part) for part in found[1:])
    sw, sx = tile.blocks(line.sw), tile.blocks(line.sx)
    terms = a * a * sqq, a * b * sq, b * b * sw, a * sqx, b * sx
    aa, ab, bb, ax, bx = (_along(term.double()) for term in terms)
    det = aa * bb - ab * ab
    both = det > aa * _SINGULAR * bb
    alone = torch.where(aa > 0, ((ax + m.double() * ab) / aa).float(), d)
    fitted = torch.where(both, ((ax * bb - bx * ab) / det).float(), alone)
    return fitted, torch.where(both, ((ax * ab - bx * aa) / det).float(), m)


def fit_super_affine(
    tile: Tile, high: float, starts: Tensor, reach: tuple[int, int], refits: int, top: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `d`, `m` (`rows blocks`) and the whole scales and mins (`rows blocks subs`)."""
    line = _search_affine(tile, high, starts, 1, False)
    unit = tile.blocks(tile.unit)[..., 0]
    tops = torch.full_like(unit, top)
    value = tile.blocks(line.scale).amax(-1) / tops
    value_m = tile.blocks(line.offset).amax(-1) / tops
    best = torch.full_like(unit, torch.inf)
    kept = [torch.zeros_like(unit), torch.zeros_like(unit)]
    wholes = [torch.zeros_like(tile.blocks(line.scale)) for _ in range(2)]
    found, factor, factor_m = list[Tensor](), unit, unit
    for turn in range(refits):
        if turn > 0:
            value, value_m = _refit_factors(tile, found, line, factor, factor_m)
        factor = half_in_unit(value.clamp(min=0.0), unit)
        factor_m = half_in_unit(value_m.clamp(min=0.0), unit)
        factors = tile.spread(factor), tile.spread(factor_m)
        before = None if turn == 0 else (found[1], found[2])
        near = reach if turn == 0 else (1, 1)
        found = _choose_scales_and_mins(tile, factors, high, top, line, before, near)
        total = _along(tile.blocks(found[0]))
        better = total < best
        best = torch.where(better, total, best)
        now = factor * unit, factor_m * unit
        kept = [torch.where(better, new, old) for new, old in zip(now, kept, strict=True)]
        new_wholes = tile.blocks(found[1]), tile.blocks(found[2])
        wholes = [
            torch.where(better[..., None], new, old) for new, old in zip(new_wholes, wholes, strict=True)
        ]
    return kept[0], kept[1], wholes[0], wholes[1]
