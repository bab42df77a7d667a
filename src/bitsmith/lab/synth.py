"""Synthetic checkpoints of real shapes: seeded random weights, streamed, with the lab's tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitsmith.archs import ARCHITECTURES, TensorSpec
from bitsmith.errors import BitsmithError
from bitsmith.formats import format_named
from bitsmith.lab.models import DEMO_MODEL
from bitsmith.progress import Progress, silent
from bitsmith.store.checkpoint import ComputedTensor, TensorRef
from bitsmith.store.safetensors_writer import SHARD_BYTES, TensorData, write_safetensors

_POOL_SIZE = 1_048_573  # a prime, so that equal rows meet only after that many rows
_SLICE_BYTES = 4 << 20
_FLOAT32_ROLES = ("delta.decay", "norm.delta")  # Qwen's own files keep these two in F32
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


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
    "qwen3-tiny": Shapes(256, 512, 3, 4, 2, 64, 4352, False),
}
"""Published shapes by name, Qwen3.5's without a prefix; the tiny ones keep rows of 256 for K-quants."""


def synth_config(
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
    if size not in SIZES:
        raise BitsmithError(f"unknown size {size!r}; known: {', '.join(SIZES)}")
    shapes = SIZES[size]
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


def synth_tensors(config: dict[str, Any], seed: int = 0, dtype: str = "BF16") -> dict[str, TensorRef]:
    """Return the tensors of `config` with random values, computed on read, the same for the same seed.

    Matrices have variance `1 / in`, norms stay near 1; `A_log` and `linear_attn.norm` are F32.
    """
    specs = ARCHITECTURES[config["model_type"]](config).specs()
    pool = np.random.default_rng(seed).standard_normal(_POOL_SIZE, dtype=np.float32)
    return {spec.name: _random(spec, pool, "F32" if spec.role in _FLOAT32_ROLES else dtype) for spec in specs}


def _random(spec: TensorSpec, pool: NDArray[np.float32], dtype: str) -> TensorRef:
    mean, deviation = _moments(spec)
    row_size = int(np.prod(spec.shape[1:], dtype=np.int64))
    first = int.from_bytes(hashlib.sha256(spec.name.encode()).digest()[:4], "little")

    def compute(start: int, stop: int) -> NDArray[np.float32]:
        out = np.empty((stop - start) * row_size, np.float32)
        at, done = (first + start * row_size) % _POOL_SIZE, 0
        while done < out.size:
            piece = pool[at : at + out.size - done]
            np.multiply(piece, np.float32(deviation), out=out[done : done + piece.size])
            at, done = 0, done + piece.size
        out += np.float32(mean)
        return out.reshape(stop - start, *spec.shape[1:])

    return ComputedTensor(spec.name, spec.shape, dtype, compute)


def _moments(spec: TensorSpec) -> tuple[float, float]:
    if spec.norm == "w":
        return 1.0, 0.1
    if spec.norm == "1+w":
        return 0.0, 0.1
    by_role = {"delta.decay": (1.0, 0.5), "delta.dt": (0.0, 1.0), "delta.conv": (0.0, 0.3)}
    if spec.role in by_role:
        return by_role[spec.role]
    return 0.0, 1 / float(np.sqrt(np.prod(spec.shape[1:], dtype=np.int64)))


def synth(
    out: Path,
    size: str = "tiny",
    *,
    seed: int = 0,
    mtp: bool = True,
    vision: bool = True,
    tied: bool | None = None,
    layers: int | None = None,
    dtype: str = "BF16",
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = silent,
) -> Path:
    """Write a Hugging Face folder of a size of `SIZES` with random weights and the demo model's tokenizer.

    Streamed: memory stays at a slice of a tensor. Raises BitsmithError for an unknown size, OutputError if
    `out` exists or the disk is too small.
    """
    config = synth_config(size, mtp=mtp, vision=vision, tied=tied, layers=layers, dtype=dtype)
    tensors = synth_tensors(config, seed, dtype)
    files = {name: (DEMO_MODEL / name).read_bytes() for name in _TOKENIZER_FILES}
    total, done = sum(ref.size for ref in tensors.values()), 0

    def encoded(ref: TensorRef) -> Iterator[NDArray[np.uint8]]:
        nonlocal done
        encoding = format_named(ref.dtype)
        for start, stop in ref.slices(_SLICE_BYTES):
            rows = ref.read(start, stop).reshape(1, -1)
            yield encoding.encode(rows)
            done += rows.size
            progress("synth", done, total)

    data = [TensorData(name, ref.dtype, ref.shape, encoded(ref)) for name, ref in tensors.items()]
    write_safetensors(out, data, config, shard_bytes=shard_bytes, files=files)
    return out
