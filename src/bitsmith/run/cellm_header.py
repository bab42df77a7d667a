"""The header of a .cellm file: what its converter takes from a checkpoint's config.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bitsmith.errors import BitsmithError
from bitsmith.store.cellm import CellmCheckpoint
from bitsmith.store.checkpoint import Checkpoint
from bitsmith.store.safetensors import load_json
from bitsmith.store.stored import SourceFile

_TEXT_PREFIXES = ("model.text_model.", "language_model.", "model.")
_VISION_PREFIXES = (
    "model.vision_tower.vision_model.", "vision_tower.vision_model.", "model.vision_model.", "vision_model.",
)  # fmt: skip
_PROJECTOR_PREFIXES = ("model.connector.", "connector.", "multi_modal_projector.")


def cellm_metadata(checkpoint: Checkpoint, *, like_seed: bool = False) -> dict[str, Any]:
    """Return the header's fields for a checkpoint, from its config.json (or from the .cellm that it is).

    `like_seed` leaves out what cellm's converter does not know: Qwen3.5's vision prefix, the newer `dtype`.
    Raises BitsmithError for a size that the config lacks.
    """
    if isinstance(checkpoint, CellmCheckpoint):
        return dict(checkpoint.metadata)
    config = checkpoint.config
    nested = config.get("text_config")
    text: Mapping[str, Any] = nested if isinstance(nested, dict) else config
    both = {**text, **{key: value for key, value in config.items() if value is not None}}
    sizes = _sizes(checkpoint, both)
    vision = _VISION_PREFIXES if like_seed else (*_VISION_PREFIXES, "model.visual.", "visual.")
    dtype = both.get("torch_dtype") or (None if like_seed else both.get("dtype"))
    return {
        "model_type": text.get("model_type") or config.get("model_type") or "unknown",
        "source_model_type": config.get("model_type"),
        "source_safetensors_format": _safetensors_format(checkpoint.files),
        "text_tensor_prefix": _prefix(checkpoint, _TEXT_PREFIXES),
        "vision_tensor_prefix": _prefix(checkpoint, vision),
        "projector_tensor_prefix": _prefix(checkpoint, _PROJECTOR_PREFIXES),
        **sizes,
        "head_dim": both.get("head_dim"),
        "rms_norm_eps": both.get("rms_norm_eps", 1e-5),
        "rope_theta": _rope_theta(both, text),
        "bos_token_id": _token(config, text, "bos_token_id"),
        "eos_token_id": _token(config, text, "eos_token_id"),
        "max_position_embeddings": both.get("max_position_embeddings"),
        "tie_word_embeddings": both.get("tie_word_embeddings"),
        "source_torch_dtype": dtype,
        "source_architectures": config.get("architectures"),
        "source_quantization": config.get("quantization"),
        "source_quantization_config": config.get("quantization_config"),
        "source_text_config": dict(text),
        "source_vision_config": config.get("vision_config"),
        "source_projector_config": config.get("connector_config") or config.get("perceiver_config"),
    }


def _sizes(checkpoint: Checkpoint, config: Mapping[str, Any]) -> dict[str, int]:
    names = {
        "vocab_size": "vocab_size",
        "hidden_dim": "hidden_size",
        "intermediate_size": "intermediate_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
    }
    for key in names.values():
        if type(config.get(key)) is not int:
            raise BitsmithError(f"config.json has no {key}, which the header needs", path=checkpoint.path)
    return {field: config[key] for field, key in names.items()}


def _rope_theta(both: Mapping[str, Any], text: Mapping[str, Any]) -> float:
    for holder in (both, text.get("rope_parameters")):
        if isinstance(holder, Mapping) and isinstance(holder.get("rope_theta"), int | float):
            return float(holder["rope_theta"])
    return 10000.0


def _token(config: Mapping[str, Any], text: Mapping[str, Any], key: str) -> int | None:
    """Return a token id, the first where there are several."""
    for holder in (config, text):
        value = holder.get(key)
        for token in value if isinstance(value, list) else [value]:
            if type(token) is int and token >= 0:
                return token
    return None


def _prefix(names: Iterable[str], prefixes: Sequence[str]) -> str | None:
    listed = list(names)
    return next((prefix for prefix in prefixes if any(name.startswith(prefix) for name in listed)), None)


def _safetensors_format(files: Sequence[Path]) -> str | None:
    """Return what the first file that says so calls its format (`pt`)."""
    for path in files:
        source = SourceFile(path)
        try:
            length = int(source.read(0, 8).view("<u8")[0])
            metadata = load_json(source.read(8, length).tobytes(), path, "header").get("__metadata__")
        finally:
            source.close()
        if isinstance(metadata, dict) and "format" in metadata:
            return str(metadata["format"])
    return None
