"""Synthetic checkpoints of real shapes: planted spectra or plain noise, streamed, the lab's tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitsmith import __version__
from bitsmith.archs import ARCHITECTURES, TensorSpec
from bitsmith.archs.published import published_config
from bitsmith.lab.models import DEMO_MODEL
from bitsmith.numerics.planted import Planted
from bitsmith.progress import Progress, silent
from bitsmith.run.record import seal
from bitsmith.store.atomic import Content, atomic_folder
from bitsmith.store.checkpoint import TensorRef
from bitsmith.store.safetensors_writer import (
    SHARD_BYTES,
    TensorData,
    write_safetensors,
    write_shard_by_shard,
)
from bitsmith.store.virtual import PLAN_NAME, PLAN_SCHEMA, Normal, VirtualTensor

_SLICE_BYTES = 16 << 20
_FLOAT32_ROLES = ("delta.decay", "norm.delta")  # Qwen's own files keep these two in F32
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_ERRORS = (0.5, 0.2, 0.1)  # whose ranks the plan names

_TAILS = {
    "embed": (3.2, 0.15),
    "head": (3.4, 0.15),
    "attn.q": (3.0, 0.3),
    "attn.k": (2.8, 0.3),
    "attn.v": (4.0, 0.3),
    "attn.o": (3.6, 0.3),
    "delta.in_qkv": (3.2, 0.3),
    "delta.in_z": (3.8, 0.3),
    "delta.in_b": (2.6, 0.6),
    "delta.in_a": (2.6, 0.6),
    "delta.out": (3.8, 0.3),
    "ffn.gate": (4.2, 0.35),
    "ffn.up": (4.8, 0.35),
    "ffn.down": (4.4, 0.35),
    "mtp.fc": (3.6, 0.3),
    "vision": (3.6, 0.3),
}
"""α and the share of the values in the tail by role, within what is reported of published models."""

_ALPHA_RANGE = 0.08  # relative, between layers
_ROW_SPREAD, _COLUMN_SPREAD = 0.2, 0.15  # of the logarithms of the scales
_OUTLIERS, _OUTLIER_FACTOR = 1 / 512, 3.0  # of the input channels


def synth_tensors(
    config: Mapping[str, Any], seed: int = 0, dtype: str = "BF16", *, planted: bool = False
) -> dict[str, TensorRef]:
    """Return the tensors of `config`, computed on read, the same for the same seed.

    Matrices have the mean square `1 / in`, norms stay near 1; `A_log` and `linear_attn.norm` are F32. A
    `planted` matrix has a power law in its spectrum, rows and columns of uneven size and a few large input
    channels, those of the residual stream the same in every layer; else its values are independent.
    """
    return dict(_tensors(config, seed, dtype, planted))


def _tensors(config: Mapping[str, Any], seed: int, dtype: str, planted: bool) -> dict[str, VirtualTensor]:
    specs = ARCHITECTURES[config["model_type"]](dict(config)).specs()
    return {
        spec.name: VirtualTensor(
            spec.name,
            spec.shape,
            "F32" if spec.role in _FLOAT32_ROLES else dtype,
            _planted(spec, seed) if planted and _is_matrix(spec) else _normal(spec, seed),
        )
        for spec in specs
    }


def _is_matrix(spec: TensorSpec) -> bool:
    return len(spec.shape) > 1 and spec.role in _TAILS


def _planted(spec: TensorSpec, seed: int) -> Planted:
    own = _place(f"{seed} {spec.name}")
    alpha, tail = _TAILS[spec.role]
    around = np.random.default_rng(own).uniform(1 - _ALPHA_RANGE, 1 + _ALPHA_RANGE)
    columns = int(np.prod(spec.shape[1:]))
    reads = spec.axes[1] if len(spec.axes) == 2 else ""
    return Planted(
        spec.shape[0],
        columns,
        alpha=round(alpha * float(around), 3),
        tail=tail,
        rms=float(columns**-0.5),
        row_spread=_ROW_SPREAD,
        column_spread=_COLUMN_SPREAD,
        outliers=round(columns * _OUTLIERS),
        outlier_factor=_OUTLIER_FACTOR,
        seed=own,
        channels=_place(f"{seed} residual") if reads == "residual" else own + 1,
    )


def _place(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")


def _normal(spec: TensorSpec, seed: int) -> Normal:
    return Normal(*_moments(spec), _place(spec.name), seed)


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
    planted: bool = False,
    virtual: bool = False,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Path:
    """Write a Hugging Face folder of a size of `SIZES` with the demo model's tokenizer; see `synth_tensors`.

    Streamed: memory stays at slices of a tensor. What is planted is written down in `planted.json`; a
    `virtual` folder holds nothing else of the weights, and every command computes them as it reads. Shards
    that a killed run finished are kept for the next. Raises BitsmithError for an unknown size, OutputError if
    `out` exists or the disk is too small.
    """
    config = published_config(size, mtp=mtp, vision=vision, tied=tied, layers=layers, dtype=dtype)
    tensors = _tensors(config, seed, dtype, planted)
    files = {name: (DEMO_MODEL / name).read_bytes() for name in _TOKENIZER_FILES}
    if planted or virtual:
        files[PLAN_NAME] = _plan(tensors, virtual)

    def finish(content: Content) -> None:
        seal(out, "lab synth", content, size=size, seed=seed, dtype=dtype)

    if virtual:
        with atomic_folder(
            out, last=PLAN_NAME, stale=files.__contains__, overwrite=overwrite, finish=finish
        ) as part:
            for name, data in {"config.json": _json(config), **files}.items():
                (part / name).write_bytes(data)
        return out
    listed = _data(tensors, progress)
    options: dict[str, Any] = {
        "shard_bytes": shard_bytes,
        "files": files,
        "overwrite": overwrite,
        "finish": finish,
    }
    if sum(tensor.nbytes for tensor in listed) <= shard_bytes:
        write_safetensors(out, listed, config, **options)
    else:
        plan = {"size": size, "seed": seed, "dtype": dtype, "planted": planted, "shard": shard_bytes}
        key = {"bitsmith version": __version__, "config": config, **plan}
        write_shard_by_shard(out, listed, config, key, **options)
    return out


def _data(tensors: Mapping[str, TensorRef], progress: Progress) -> list[TensorData]:
    total, done = sum(ref.size for ref in tensors.values()), 0

    def encoded(ref: TensorRef) -> Iterator[NDArray[np.uint8]]:
        nonlocal done
        for start, stop in ref.slices(_SLICE_BYTES):
            yield ref.raw(start, stop)
            done += (stop - start) * (ref.size // ref.n_rows)
            progress("synth", done, total)

    return [TensorData(name, ref.dtype, ref.shape, encoded(ref)) for name, ref in tensors.items()]


def _plan(tensors: Mapping[str, VirtualTensor], virtual: bool) -> bytes:
    """Return `planted.json`: how each tensor is computed, and for a matrix what its spectrum is near to."""
    planned = {name: tensor.facts() for name, tensor in tensors.items()}
    expected = {
        name: _expected(tensor.plan) for name, tensor in tensors.items() if isinstance(tensor.plan, Planted)
    }
    return _json({"schema": PLAN_SCHEMA, "virtual": virtual, "tensors": planned, "expected": expected})


def _expected(plan: Planted) -> dict[str, Any]:
    squares = np.square(plan.sigma())
    left = np.append(np.cumsum(squares[::-1])[::-1], 0.0) / squares.sum()
    return {
        "alpha": plan.alpha,
        "sigma_max": float(np.sqrt(squares[0])),
        "rank_for_error": {str(error): int(np.argmax(np.sqrt(left) <= error)) for error in _ERRORS},
    }


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
