"""Shapes of the published models, and the config.json that goes with them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from bitsmith.errors import BitsmithError


@dataclass(frozen=True)
class Shapes:
    """The sizes of one checkpoint; `vision` is (depth, hidden, ffn), all zero in a dense Qwen3."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    k_heads: int = 0
    v_heads: int = 0
    delta_dim: int = 128
    vision: tuple[int, int, int] = (0, 0, 0)

    @property
    def dense(self) -> bool:
        """Whether this is a dense Qwen3 rather than a Qwen3.5."""
        return self.k_heads == 0


_SMALL_VISION, _LARGE_VISION = (24, 1024, 4096), (27, 1152, 4304)
SIZES = {
    "0.8B": Shapes(1024, 3584, 24, 8, 2, 256, 248320, True, 16, 16, vision=(12, 768, 3072)),
    "2B": Shapes(2048, 6144, 24, 8, 2, 256, 248320, True, 16, 16, vision=_SMALL_VISION),
    "4B": Shapes(2560, 9216, 32, 16, 4, 256, 248320, True, 16, 32, vision=_SMALL_VISION),
    "9B": Shapes(4096, 12288, 32, 16, 4, 256, 248320, False, 16, 32, vision=_LARGE_VISION),
    "27B": Shapes(5120, 17408, 64, 24, 4, 256, 248320, False, 16, 48, vision=_LARGE_VISION),
    "tiny": Shapes(256, 512, 4, 4, 2, 64, 4352, False, 4, 8, 64, (1, 64, 128)),
    "qwen3-0.6B": Shapes(1024, 3072, 28, 16, 8, 128, 151936, True),
    "qwen3-1.7B": Shapes(2048, 6144, 28, 16, 8, 128, 151936, True),
    "qwen3-4B": Shapes(2560, 9728, 36, 32, 8, 128, 151936, True),
    "qwen3-32B": Shapes(5120, 25600, 64, 64, 8, 128, 151936, False),
    "qwen3-tiny": Shapes(256, 512, 3, 4, 2, 64, 4352, False),
}
"""Published shapes by name, Qwen3.5's without a prefix; the tiny ones keep rows of 256 for K-quants."""


def size_named(name: str) -> str | None:
    """Return the size of `SIZES` that a model's name means, in any case: `qwen3.5-9b`, `9B`, `qwen3-4b`."""
    wanted = name.lower().removeprefix("qwen3.5-")
    return next((size for size in SIZES if size.lower() == wanted), None)


def published_config(
    size: str,
    *,
    mtp: bool = True,
    vision: bool = True,
    tied: bool | None = None,
    layers: int | None = None,
    dtype: str = "BF16",
) -> dict[str, Any]:
    """Return the config.json of a size, in the published layout: text nested beside vision, or text alone.

    Raises BitsmithError for an unknown size.
    """
    known = size_named(size)
    if known is None:
        raise BitsmithError(f"unknown size {size!r}; known: {', '.join(SIZES)}")
    shapes = SIZES[known]
    shapes = replace(
        shapes, tied=shapes.tied if tied is None else tied, layers=shapes.layers if layers is None else layers
    )
    text = _text_config(shapes, {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[dtype])
    if shapes.dense:
        return {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **text}
    text |= _delta_config(shapes)
    if mtp:
        text |= {"mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False}
    if not vision:
        return {"architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text", **text}
    return {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "text_config": {"model_type": "qwen3_5_text", **text},
        "tie_word_embeddings": shapes.tied,
        "vision_config": _vision_config(shapes),
    }


def _text_config(shapes: Shapes, dtype: str) -> dict[str, Any]:
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": dtype,
        "eos_token_id": 4093,  # <|endoftext|> of the lab's tokenizer
        "head_dim": shapes.head_dim,
        "hidden_act": "silu",
        "hidden_size": shapes.hidden,
        "intermediate_size": shapes.ffn,
        "max_position_embeddings": 40960 if shapes.dense else 262144,
        "num_attention_heads": shapes.heads,
        "num_hidden_layers": shapes.layers,
        "num_key_value_heads": shapes.kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 1e6 if shapes.dense else 1e7, "rope_type": "default"},
        "tie_word_embeddings": shapes.tied,
        "vocab_size": shapes.vocab,
    }


def _delta_config(shapes: Shapes) -> dict[str, Any]:
    pairs = shapes.head_dim // 8  # a quarter of the head rotates, in pairs, shared by time, height and width
    return {
        "full_attention_interval": 4,
        "layer_types": [
            "linear_attention" if (n + 1) % 4 else "full_attention" for n in range(shapes.layers)
        ],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": shapes.delta_dim,
        "linear_num_key_heads": shapes.k_heads,
        "linear_num_value_heads": shapes.v_heads,
        "linear_value_head_dim": shapes.delta_dim,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [pairs // 3 + (pairs % 3 > n) for n in range(3)],
            "partial_rotary_factor": 0.25,
            "rope_theta": 1e7,
            "rope_type": "default",
        },
    }


def _vision_config(shapes: Shapes) -> dict[str, Any]:
    depth, hidden, ffn = shapes.vision
    return {
        "deepstack_visual_indexes": [],
        "depth": depth,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": hidden,
        "in_channels": 3,
        "intermediate_size": ffn,
        "model_type": "qwen3_5",
        "num_heads": 16,
        "num_position_embeddings": 2304,
        "out_hidden_size": shapes.hidden,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
