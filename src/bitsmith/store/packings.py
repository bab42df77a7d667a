"""The known ways of packing weights, and what is read as what."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from bitsmith.errors import UnsupportedError, printable
from bitsmith.store.bitsandbytes import read_bitsandbytes
from bitsmith.store.checkpoint import Checkpoint, TensorRef
from bitsmith.store.compressed_tensors import METHOD, read_compressed
from bitsmith.store.factored import METHOD as FACTORED
from bitsmith.store.factored_reader import read_factored
from bitsmith.store.fp8 import read_fp8
from bitsmith.store.mlx import read_mlx
from bitsmith.store.mlx_layout import hugging_face_layout
from bitsmith.store.packed import Packing, UnpackedView
from bitsmith.store.stored import FLOATS, INTEGERS

PACKINGS: dict[str, Packing] = {
    "bitsandbytes": read_bitsandbytes,
    METHOD: read_compressed,
    FACTORED: read_factored,
    "fp8": read_fp8,
    "mlx": read_mlx,
}
"""Packings by the `quant_method` of a config's `quantization_config` (MLX: its `quantization`)."""

_CODES = re.compile(r"(^|\.)(q?weight(_packed)?|qzeros|W_q|codes|\w+_(blocks|packed))$")


def unpacked(stored: Checkpoint) -> Checkpoint:
    """Return `stored` as its model has it: packed weights decoded on read, MLX's layout undone.

    A config that says that weights are packed where all of them are plain floats is taken as left over;
    factors may be floats themselves.

    Raises UnsupportedError for a packing that is not known and for codes without settings in the config,
    DamagedFileError for parts that do not fit.
    """
    settings = _settings(stored.config)
    floats = all(ref.dtype in FLOATS for ref in stored.values())
    if settings is None or (floats and settings[0] != FACTORED):
        tensors = dict(stored)
    else:
        tensors = _decoded(stored, *settings)
    _refuse_codes(stored, tensors)
    seen = hugging_face_layout(stored, tensors)
    if seen is tensors and settings is None:
        return stored
    return UnpackedView(stored, seen, None if settings is None else settings[0])


def _decoded(stored: Checkpoint, method: str, settings: Mapping[str, Any]) -> dict[str, TensorRef]:
    packing = PACKINGS.get(method)
    if packing is None:
        raise UnsupportedError(
            f"is quantized by {printable(method)}, which cannot be read; known: "
            f"{', '.join(sorted(PACKINGS))}. Give the original in BF16 or F16",
            path=stored.path,
        )
    return packing(stored, settings)


def _settings(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
    """Return the method and its settings; mlx-lm repeats its own as `quantization_config`, unnamed."""
    nested = config.get("text_config")
    for where in (config, nested if isinstance(nested, Mapping) else {}):
        if found := where.get("quantization"):
            return ("mlx", found) if isinstance(found, Mapping) else _named(found)
        if found := where.get("quantization_config"):
            return _named(found)
    return None


def _named(found: Any) -> tuple[str, Mapping[str, Any]]:
    if not isinstance(found, Mapping):
        return str(found), {}
    method = found.get("quant_method")
    if method is None and found.keys() >= {"bits", "group_size"}:
        method = "mlx"
    if method is None and (found.get("load_in_4bit") or found.get("load_in_8bit")):
        method = "bitsandbytes"  # as transformers wrote it before methods had names
    return "a method without a name" if method is None else str(method), found


def _refuse_codes(stored: Checkpoint, tensors: Mapping[str, TensorRef]) -> None:
    """Refuse codes that nothing says how to read: taken as numbers they would be weights of nonsense."""
    for name, ref in tensors.items():
        if ref.dtype in INTEGERS and _CODES.search(name):
            raise UnsupportedError(
                f"is stored as {ref.dtype}: codes of a packed weight, and no quantization_config in a "
                "config.json beside it says how to read them",
                path=stored.path,
                tensor=name,
            )
