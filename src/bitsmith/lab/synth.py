"""Synthetic checkpoints of real shapes: seeded random weights, streamed, with the lab's tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitsmith.archs import ARCHITECTURES, TensorSpec
from bitsmith.archs.published import published_config
from bitsmith.formats import format_named
from bitsmith.lab.models import DEMO_MODEL
from bitsmith.progress import Progress, silent
from bitsmith.run.record import seal
from bitsmith.store.atomic import Content
from bitsmith.store.checkpoint import ComputedTensor, TensorRef
from bitsmith.store.safetensors_writer import SHARD_BYTES, TensorData, write_safetensors

_POOL_SIZE = 1_048_573  # a prime, so that equal rows meet only after that many rows
_SLICE_BYTES = 4 << 20
_FLOAT32_ROLES = ("delta.decay", "norm.delta")  # Qwen's own files keep these two in F32
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


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
    config = published_config(size, mtp=mtp, vision=vision, tied=tied, layers=layers, dtype=dtype)
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

    def finish(content: Content) -> None:
        seal(out, "lab synth", content, size=size, seed=seed, dtype=dtype)

    write_safetensors(out, data, config, shard_bytes=shard_bytes, files=files, finish=finish)
    return out
