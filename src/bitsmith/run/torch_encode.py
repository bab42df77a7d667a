"""Encode blocks on a device of torch: fields and codes are found there, bytes are packed on the processor."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import torch

from bitsmith.formats.blocks import BlockFormat, Fields
from bitsmith.formats.format import Bytes, Float32, Format
from bitsmith.numerics.input_metric import InputMetric
from bitsmith.numerics.threads import for_ranges
from bitsmith.passes.rounding import Effort
from bitsmith.run.device import described
from bitsmith.run.torch_feedback import Feedback
from bitsmith.run.torch_fields import KNOWN, fit, nearest_codes
from bitsmith.run.torch_search import Tensor

_GPU_PIECE_WEIGHTS = 1 << 24
_CPU_PIECE_WEIGHTS = 1 << 18
_LEAST_PACKED = 1 << 18  # worth a thread


class TorchEncoder:
    """Encodes formats in `KNOWN` on `device`, a piece of rows at a time, to the compiled searches' bytes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._feedback = Feedback(device)
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

    def round_rows(self, form: Format, rows: Float32, metric: InputMetric, effort: Effort) -> Bytes | None:
        """Do as `passes.rounding.round_rows`, or return None for a format that is not in `KNOWN`."""
        if form.name not in KNOWN or not isinstance(form, BlockFormat) or not rows.size:
            return None
        with self._lock, torch.inference_mode():
            parts = [
                _packed(form, *self._feedback.round(form, part, metric, effort)).reshape(len(part), -1)
                for part in self._pieces(rows)
            ]
        return np.concatenate(parts)

    def _pieces(self, rows: Float32) -> Iterator[Float32]:
        step = max(1, self._piece // rows.shape[-1])
        for start in range(0, len(rows), step):
            yield rows[start : start + step]

    def _piece_of(self, form: BlockFormat, rows: Float32, weights: Tensor | None) -> Bytes:
        on_device = self._put(rows)
        found = fit(form, on_device, weights)
        return _packed(form, found, nearest_codes(form, on_device, found)).reshape(len(rows), -1)

    def _put(self, values: Float32) -> Tensor:
        return torch.from_numpy(np.require(values, requirements=["C", "W"])).to(self._device)


def _packed(form: BlockFormat, found: tuple[Tensor, ...], on_device: Tensor) -> Bytes:
    """Return the bytes (`blocks block_bytes`) of fields and codes."""
    codes = on_device.cpu().numpy()
    d, m, scales, mins = (np.ascontiguousarray(part.flatten(0, 1).cpu().numpy()) for part in found)
    fields = Fields(d, m, scales.astype(np.int16), mins.astype(np.int16))
    out = np.empty((len(codes), form.block_bytes), np.uint8)

    def pack(first: int, last: int) -> None:
        out[first:last] = form.pack(fields.part(first, last), codes[first:last])

    for_ranges(len(codes), _LEAST_PACKED // form.block_size, len(codes), pack)
    return out
