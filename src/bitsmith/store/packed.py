"""Weights that files keep packed, with scales beside: read under their own names, decoded row by row.

Ways of packing have a file each and register in `store.packings`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bitsmith.errors import UnsupportedError
from bitsmith.store.checkpoint import Checkpoint, Rows, TensorRef, View
from bitsmith.store.stored import FLOATS

CONFIG_KEYS = ("quantization_config", "quantization")
"""Where a config says how weights are packed."""

Packing = Callable[[Checkpoint, Mapping[str, Any]], dict[str, TensorRef]]
"""Takes a checkpoint and its config's `quantization_config`; returns all its tensors, packed ones decoded."""


class PackedTensor(TensorRef):
    """A weight held by several stored tensors, its `parts`; `decode(start, stop)` returns rows as float32.

    `dtype` names the grid (`int4_g128`, `NF4`): what the codes are, not what they are read as.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: str,
        parts: Sequence[TensorRef],
        decode: Callable[[int, int], Rows],
    ) -> None:
        self.name = name
        self.shape = shape
        self.dtype = dtype
        self.parts = tuple(parts)
        self._decode = decode

    @property
    def nbytes(self) -> int:
        """Bytes of all parts as stored: codes, scales, zero points."""
        return sum(part.nbytes for part in self.parts)

    def read(self, start: int = 0, stop: int | None = None) -> Rows:
        """Return rows `[start, stop)` decoded with their scales."""
        return self._decode(start, self.n_rows if stop is None else stop)


def _without(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in CONFIG_KEYS}


class UnpackedView(View):
    """A checkpoint whose packed weights read as plain ones; its config no longer says otherwise.

    `packing` names the method, None where the config names none; the digest is that of what is stored.
    """

    def __init__(self, base: Checkpoint, tensors: Mapping[str, TensorRef], packing: str | None) -> None:
        super().__init__(base, tensors)
        self.config = _without(base.config)
        if isinstance(text := self.config.get("text_config"), dict):
            self.config["text_config"] = _without(text)
        self.packing = packing

    def close(self) -> None:
        """Close the checkpoint underneath."""
        self.base.close()


def refuse_rounded(ref: TensorRef, path: Path, instead: str = "") -> None:
    """Raise UnsupportedError for a tensor that is stored as no floats: codes are not rounded again.

    `instead` tells what else can be done.
    """
    if ref.dtype not in FLOATS:
        raise UnsupportedError(
            f"is stored as {ref.dtype}; expected the original in {', '.join(FLOATS)}{instead}",
            path=path,
            tensor=ref.name,
        )
