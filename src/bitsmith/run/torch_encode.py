"""Encode blocks on a device of torch: fields and codes are found there, bytes are packed on the processor."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import torch

from bitsmith.formats.blocks import BlockFormat, Fields
from bitsmith.formats.format import Bytes, Float32, Format
from bitsmith.numerics.threads import for_ranges
from bitsmith.run import torch_search as search
from bitsmith.run.device import described
from bitsmith.run.torch_search import Grid, Tensor, Tile

KNOWN = frozenset(
    ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
)
"""Formats that a device encodes; the compiled searches do the others."""

_GPU_PIECE_WEIGHTS = 1 << 24
_CPU_PIECE_WEIGHTS = 1 << 18
_LEAST_PACKED = 1 << 18  # worth a thread


class TorchEncoder:
    """Encodes formats in `KNOWN` on `device`, a piece of rows at a time, to the compiled searches' bytes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._piece = _CPU_PIECE_WEIGHTS if device.type == "cpu" else _GPU_PIECE_WEIGHTS

    @property
    def name(self) -> str:
        """The device's name, with torch's version."""
        return described(self._device)

    @property
    def slice_bytes(self) -> int:
        """Float32 bytes of a piece."""
        return 4 * self._piece

    def encode(self, form: Format, rows: Float32, importance: Float32 | None) -> Bytes | None:
        """Encode as `Format.encode` does, or return None for a format that is not in `KNOWN`."""
        if form.name not in KNOWN or not isinstance(form, BlockFormat) or not rows.size:
            return None
        flat = rows.reshape(-1, rows.shape[-1])
        with self._lock, torch.inference_mode():
            weights = form.weights(importance)
            given = None if weights is None else self._put(weights.reshape(-1))
            parts = [self._piece_of(form, part, given) for part in self._pieces(flat)]
        return np.concatenate(parts).reshape(*rows.shape[:-1], -1)

    def _pieces(self, rows: Float32) -> Iterator[Float32]:
        step = max(1, self._piece // rows.shape[-1])
        for start in range(0, len(rows), step):
            yield rows[start : start + step]

    def _piece_of(self, form: BlockFormat, rows: Float32, weights: Tensor | None) -> Bytes:
        on_device = self._put(rows)
        found = fit(form, on_device, weights)
        codes = nearest_codes(form, on_device, found).cpu().numpy()
        d, m, scales, mins = (part.flatten(0, 1).cpu().numpy() for part in found)
        fields = Fields(d, m, scales.astype(np.int16), mins.astype(np.int16))
        out = np.empty((len(codes), form.block_bytes), np.uint8)

        def pack(first: int, last: int) -> None:
            out[first:last] = form.pack(fields.part(first, last), codes[first:last])

        for_ranges(len(codes), _LEAST_PACKED // form.block_size, len(codes), pack)
        return out.reshape(len(rows), -1)

    def _put(self, values: Float32) -> Tensor:
        return torch.from_numpy(np.require(values, requirements=["C", "W"])).to(self._device)


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
        return search.fit_super_affine(tile, high, places, form.reach, float(form.scale_limits[1]))
    if pairs:
        d, m = search.fit_affine(tile, high, places, rounds)
        return d, m, torch.ones_like(d)[..., None], torch.ones_like(d)[..., None]
    grid = grid_of(form, rows.device)
    if not whole:
        d = search.fit_symmetric(tile, grid, places, rounds)
        return d, torch.zeros_like(d), torch.ones_like(d)[..., None], torch.zeros_like(d)[..., None]
    low, top = form.scale_limits
    d, scales = search.fit_super_symmetric(tile, grid, places, form.reach[0], (float(low), float(top)))
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
