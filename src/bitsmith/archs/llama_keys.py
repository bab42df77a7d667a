"""The key/values every Qwen GGUF shares, written as llama.cpp's converter does, and read back to a config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bitsmith.archs.arch import Architecture
from bitsmith.errors import BitsmithError, UnsupportedError, printable
from bitsmith.store.checkpoint import TensorRef

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_YARN_OPTIONAL = {
    "extrapolation_factor": "yarn_ext_factor",
    "attention_factor": "yarn_attn_factor",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
}


def real(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """Return a finite number of a config; raises BitsmithError if it is absent or something else."""
    value = values.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int | float) or not _is_float32(value):
        raise BitsmithError(f"config.json: {key} is {printable(repr(value))}, expected a number")
    return float(value)


def _is_float32(value: float) -> bool:
    return abs(value) <= _FLOAT32_MAX  # false for NaN


def rope_of(arch: Architecture) -> dict[str, Any]:
    """Return the rope parameters in transformers 5's form (`rope_parameters`) or 4's (`rope_theta`)."""
    text = arch.text_config
    given = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise BitsmithError(f"config.json: rope_parameters is {printable(repr(given))}, expected an object")
    rope = dict(given)
    for key in ("rope_theta", "partial_rotary_factor"):
        if key not in rope and text.get(key) is not None:
            rope[key] = text[key]
    rope.setdefault("rope_type", rope.get("type", "default"))
    return rope


def shared_metadata(arch: Architecture, block_count: int) -> dict[str, Any]:
    """Return the keys common to all Qwen architectures; ints are UINT32 and floats FLOAT32 in the file.

    Raises UnsupportedError for a rope scaling other than none, linear and yarn, and for an activation
    other than SiLU.
    """
    name, text = arch.gguf_arch, arch.text_config
    if (activation := text.get("hidden_act") or "silu") not in ("silu", "swish"):
        raise UnsupportedError(
            f"hidden_act is {printable(repr(activation))}, llama.cpp's {name} has SiLU and no other"
        )
    keys: dict[str, Any] = {f"{name}.block_count": block_count}
    if text.get("max_position_embeddings") is not None:
        keys[f"{name}.context_length"] = arch.number("max_position_embeddings")
    keys[f"{name}.embedding_length"] = arch.number("hidden_size")
    keys[f"{name}.feed_forward_length"] = arch.number("intermediate_size")
    keys[f"{name}.attention.head_count"] = arch.number("num_attention_heads")
    keys[f"{name}.attention.head_count_kv"] = arch.number("num_key_value_heads")
    keys |= _rope_metadata(name, rope_of(arch))
    keys[f"{name}.attention.layer_norm_rms_epsilon"] = real(text, "rms_norm_eps", 1e-6)
    keys[f"{name}.attention.key_length"] = arch.head_dim
    keys[f"{name}.attention.value_length"] = arch.head_dim
    return keys


def _rope_metadata(name: str, rope: Mapping[str, Any]) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    rope_type = rope["rope_type"]
    if rope_type in ("linear", "yarn"):
        keys[f"{name}.rope.scaling.type"] = rope_type
        keys[f"{name}.rope.scaling.factor"] = real(rope, "factor")
    elif rope_type != "default":
        raise UnsupportedError(
            f"rope_type {printable(str(rope_type))!r} is not supported; known: default, linear, yarn"
        )
    if rope_type == "yarn":
        keys[f"{name}.rope.scaling.original_context_length"] = int(
            real(rope, "original_max_position_embeddings")
        )
        for theirs, ours in _YARN_OPTIONAL.items():
            if rope.get(theirs) is not None:
                keys[f"{name}.rope.scaling.{ours}"] = real(rope, theirs)
    if "mrope_section" in rope:
        keys[f"{name}.rope.dimension_sections"] = (_sections(rope["mrope_section"]) + [0] * 4)[:4]
    if rope.get("rope_theta") is not None:
        keys[f"{name}.rope.freq_base"] = real(rope, "rope_theta")
    return keys


def _sections(value: Any) -> list[int]:
    if not isinstance(value, list) or not all(type(n) is int and 0 <= n < 1 << 31 for n in value):
        raise BitsmithError(f"mrope_section is {printable(repr(value))}, expected a list of integers")
    return value


def shared_config(name: str, metadata: Mapping[str, Any], tensors: Mapping[str, TensorRef]) -> dict[str, Any]:
    """Return the Hugging Face config entries that `shared_metadata` came from, for architecture `name`."""
    if "token_embd.weight" not in tensors:
        raise BitsmithError("missing: tensor token_embd.weight")
    blocks = gguf_int(metadata, f"{name}.block_count")
    if blocks > len(tensors):
        raise BitsmithError(
            f"GGUF key {name}.block_count is {blocks}, but only {len(tensors)} tensors are stored"
        )
    heads = gguf_int(metadata, f"{name}.attention.head_count")
    hidden = gguf_int(metadata, f"{name}.embedding_length")
    tokens = metadata.get("tokenizer.ggml.tokens")
    return {
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": gguf_int(metadata, f"{name}.feed_forward_length"),
        "num_hidden_layers": blocks - gguf_int(metadata, f"{name}.nextn_predict_layers", 0),
        "num_attention_heads": heads,
        "num_key_value_heads": gguf_int(metadata, f"{name}.attention.head_count_kv", heads),
        "head_dim": gguf_int(metadata, f"{name}.attention.key_length", hidden // heads),
        "max_position_embeddings": gguf_int(metadata, f"{name}.context_length", 32768),
        "rms_norm_eps": gguf_float(metadata, f"{name}.attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope_config(name, metadata),
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id") if tokens else None,
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id") if tokens else None,
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id") if tokens else None,
        "dtype": "bfloat16",
    }


def _rope_config(name: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    scaling = metadata.get(f"{name}.rope.scaling.type", "default")
    rope: dict[str, Any] = {
        "rope_type": "default" if scaling == "none" else scaling,
        "rope_theta": gguf_float(metadata, f"{name}.rope.freq_base", 10000.0),
    }
    if rope["rope_type"] in ("linear", "yarn"):
        rope["factor"] = gguf_float(metadata, f"{name}.rope.scaling.factor")
    elif rope["rope_type"] != "default":
        raise UnsupportedError(f"rope scaling {printable(str(scaling))!r} is not supported")
    sections = metadata.get(f"{name}.rope.dimension_sections")
    if sections is not None:
        rope["mrope_section"] = _sections(sections)[:3]
    if rope["rope_type"] == "yarn":
        rope["original_max_position_embeddings"] = gguf_int(
            metadata, f"{name}.rope.scaling.original_context_length"
        )
        for theirs, ours in _YARN_OPTIONAL.items():
            if f"{name}.rope.scaling.{ours}" in metadata:
                rope[theirs] = gguf_float(metadata, f"{name}.rope.scaling.{ours}")
    return rope


def gguf_int(metadata: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """Return the positive integer under `key` (0 only where that is the default).

    Raises BitsmithError if it is absent without a default, or something else.
    """
    value = metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < (default != 0):
        raise BitsmithError(f"GGUF key {key} is {printable(repr(value))}, expected a positive integer")
    return value


def gguf_float(metadata: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """Return the number under `key` as the shortest decimal that is the same float32.

    Raises BitsmithError if it is absent or not a finite number.
    """
    value = metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not _is_float32(value):
        raise BitsmithError(f"GGUF key {key} is {printable(repr(value))}, expected a number")
    return float(str(np.float32(value)))
