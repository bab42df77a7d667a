"""Weights that files keep packed, with scales beside: read under their own names, decoded row by row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from bitsmith.errors import UnsupportedError, printable
from bitsmith.store.checkpoint import Checkpoint, Rows, TensorRef, View

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


class UnpackedView(View):
    """A checkpoint whose packed weights read as plain ones; its config no longer says otherwise.

    `packing` names the method; the digest is that of what is stored.
    """

    def __init__(self, base: Checkpoint, tensors: Mapping[str, TensorRef], packing: str) -> None:
        super().__init__(base, tensors)
        self.config = {key: value for key, value in base.config.items() if key not in _CONFIG_KEYS}
        self.packing = packing

    def close(self) -> None:
        """Close the checkpoint underneath."""
        self.base.close()

    @cached_property
    def source_digest(self) -> str:
        """The digest of the stored tensors."""
        return self.base.source_digest


def unpacked(stored: Checkpoint) -> Checkpoint:
    """Return `stored` with packed weights decoded on read, or itself where its config packs none.

    Raises UnsupportedError for a packing that is not known, DamagedFileError for parts that do not fit.
    """
    settings = _settings(stored.config)
    if settings is None:
        return stored
    method, found = settings
    packing = PACKINGS.get(method)
    if packing is None:
        known = ", ".join(sorted(PACKINGS)) or "none"
        raise UnsupportedError(
            f"is quantized by {printable(method)}, which cannot be read; known: {known}. "
            "Give the original in BF16 or F16",
            path=stored.path,
        )
    return UnpackedView(stored, packing(stored, found), method)


PACKINGS: dict[str, Packing] = {}
"""Packings by the `quant_method` of a config's `quantization_config` (MLX: its `quantization`)."""


_CONFIG_KEYS = ("quantization_config", "quantization")


def _settings(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
    found = config.get("quantization_config")
    if isinstance(found, Mapping):
        return str(found.get("quant_method", "one without a name")), found
    return None
