"""Encoding loses no more than real ggml does on the same rows with the same importance."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from safetensors import safe_open

import ggml_oracle
from bitsmith.formats import FORMATS
from bitsmith.lab.models import DEMO_MODEL

QUANTIZED = [name for name in FORMATS if name not in ("F32", "F16", "BF16")]
N_IN = 768


@cache
def rows_named(data: str) -> np.ndarray:
    """Return float32 rows of 768 weights: drawn, or the bundled model's own."""
    rng = np.random.default_rng(11)
    if data == "trained":
        with safe_open(DEMO_MODEL / "model.safetensors", "pt") as file:
            names = [name for name in file.keys() if name.endswith("mlp.down_proj.weight")]  # noqa: SIM118
            stacked = np.concatenate([file.get_tensor(name).float().numpy() for name in sorted(names)])
        return np.ascontiguousarray(stacked[:: len(stacked) // 192])
    scale = rng.lognormal(-4, 0.5, (192, 1))
    rows = scale * (rng.standard_normal((192, N_IN)) if data != "student" else rng.standard_t(3, (192, N_IN)))
    if data == "outliers":
        rows[np.arange(192), rng.integers(0, N_IN, 192)] *= 20
    return rows.astype(np.float32)


@cache
def importance_named(kind: str) -> np.ndarray | None:
    rng = np.random.default_rng(12)
    if kind == "none":
        return None
    drawn = rng.chisquare(1, N_IN) if kind == "chi-square" else rng.lognormal(0, 1, N_IN) ** 2
    return drawn.astype(np.float32)


def error(rows: np.ndarray, decoded: np.ndarray, importance: np.ndarray | None) -> float:
    weights = 1.0 if importance is None else importance.astype(np.float64)
    return float((weights * (rows.astype(np.float64) - decoded) ** 2).sum())


@pytest.mark.parametrize("kind", ["none", "chi-square", "log-normal"])
@pytest.mark.parametrize("data", ["gaussian", "student", "outliers", "trained"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_error_is_at_most_ggmls(name: str, data: str, kind: str) -> None:
    rows, importance = rows_named(data), importance_named(kind)
    ours = FORMATS[name].decode(FORMATS[name].encode(rows, importance))
    theirs = ggml_oracle.dequantize(name, ggml_oracle.quantize(name, rows, importance, threads=2))
    assert error(rows, ours, importance) <= error(rows, theirs, importance) * (1 + 1e-6)


@pytest.mark.parametrize("name", QUANTIZED)
def test_importance_lowers_the_weighted_error(name: str) -> None:
    rows, importance = rows_named("gaussian"), importance_named("log-normal")
    plain = FORMATS[name].decode(FORMATS[name].encode(rows))
    weighted = FORMATS[name].decode(FORMATS[name].encode(rows, importance))
    assert error(rows, weighted, importance) < error(rows, plain, importance)
    assert error(rows, plain, None) < error(rows, weighted, None)
