"""The known ways of packing weights, and what is read as what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitsmith.errors import UnsupportedError, printable
from bitsmith.store.checkpoint import Checkpoint
from bitsmith.store.packed import Packing, UnpackedView


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


def _settings(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
    found = config.get("quantization_config")
    if isinstance(found, Mapping):
        return str(found.get("quant_method", "one without a name")), found
    return None
