"""A block format's fields and codes on a device of torch."""

from __future__ import annotations

import numpy as np
import torch

from bitsmith.formats.blocks import BlockFormat
from bitsmith.run import torch_search as search
from bitsmith.run.torch_search import Grid, Tensor, Tile

KNOWN = frozenset(
    ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
)
"""Formats that a device encodes; the compiled searches do the others."""


def fit(form: BlockFormat, rows: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what `BlockFormat.fit` finds for `rows` (`rows in`), all float32.

    That is d, m (`rows blocks`), scales and mins (`rows blocks subs`). `weights` (`in`) are those of
    `BlockFormat.weights`, None for the plain squared error.
    """
    tile = Tile.of(rows, weights, form.sub_size, form.subs)
    starts, rounds = form.effort(weighted=weights is not None)
    places = torch.from_numpy(np.ascontiguousarray(starts)).to(rows.device)
    high = float(form.levels[-1])
    whole, pairs = form.scale_limits[0] < form.scale_limits[1], form.min_limits[1] > 0
    if pairs and whole:
        return search.fit_super_affine(
            tile, high, places, form.reach, form.refits, float(form.scale_limits[1])
        )
    if pairs:
        d, m = search.fit_affine(tile, high, places, rounds)
        return d, m, torch.ones_like(d)[..., None], torch.ones_like(d)[..., None]
    grid = grid_of(form, rows.device)
    if not whole:
        d = search.fit_symmetric(tile, grid, places, rounds)
        return d, torch.zeros_like(d), torch.ones_like(d)[..., None], torch.zeros_like(d)[..., None]
    low, top = form.scale_limits
    d, scales = search.fit_super_symmetric(
        tile, grid, places, form.reach[0], form.refits, (float(low), float(top))
    )
    return d, torch.zeros_like(d), scales, torch.zeros_like(scales)


def grid_of(form: BlockFormat, device: torch.device) -> Grid:
    """Return the levels of a format without mins."""
    table = form.level_table
    even = len(table) == 1
    low, high = float(form.levels[form.first_code]), float(form.levels[-1])
    return Grid(low, high, None if even else torch.from_numpy(table).to(device))


def nearest_codes(form: BlockFormat, rows: Tensor, fields: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """Return the codes (`blocks block_size`, uint8) of the levels nearest to `rows` (`rows in`)."""
    d, m, scales, mins = (part.flatten(0, 1) for part in fields)
    x = rows.reshape(len(d), form.subs, form.sub_size)
    step = (d[:, None] * scales)[..., None]
    inverse = torch.where(step != 0, torch.ones_like(step) / step, 0.0)
    if len(form.level_table) > 1:
        middle = float(len(form.level_table) // 2)
        places = (x * inverse * 2.0 + middle).clamp_(0.0, middle + middle - 1.0).nan_to_num_(0.0)
        table = torch.from_numpy(np.searchsorted(form.levels, form.level_table)).to(rows.device)
        codes = table[places.to(torch.int64)]
    else:
        offset = (m[:, None] * mins)[..., None]
        places = (x + offset) * inverse + float(-form.levels[0])
        codes = places.clamp_(float(form.first_code), float(len(form.levels) - 1)).round_()
    return codes.to(torch.uint8).reshape(len(d), form.block_size)
