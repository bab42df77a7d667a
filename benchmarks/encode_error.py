"""Importance-weighted squared error of encoding over that of `ggml_quantize_chunk`.

    python benchmarks/encode_error.py [--rows 512] [--types Q4_K,Q6_K] [--out FILE]

Below 1 is better than ggml. Rows: Gaussian, Student-t with 3 degrees of freedom, Gaussian with one outlier
per row, and the bundled trained model's own (all its transformer matrices, cut to rows of 768). Importance:
none, chi-square (squared Gaussian activations), and log-normal squared.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from measuring import OURS, Row, arguments, report, value_row
from safetensors import safe_open

from bitsmith.formats import FORMATS
from bitsmith.lab.models import DEMO_MODEL

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import ggml_oracle

N_IN = 768
QUANTIZED = [name for name in FORMATS if name not in ("F32", "F16", "BF16")]


def trained_rows(rng: np.random.Generator, count: int) -> np.ndarray:
    with safe_open(DEMO_MODEL / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if "layers." in name]  # noqa: SIM118
        matrices = [file.get_tensor(name).float().numpy() for name in names]
    flat = np.concatenate(
        [matrix.reshape(-1) for matrix in matrices if matrix.ndim == 2 and matrix.size > 1 << 15]
    )
    rows = flat[: flat.size // N_IN * N_IN].reshape(-1, N_IN)
    return np.ascontiguousarray(rows[rng.choice(len(rows), min(count, len(rows)), replace=False)])


def all_rows(count: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    spread = rng.lognormal(-4, 0.5, (count, 1))
    gaussian = spread * rng.standard_normal((count, N_IN))
    outliers = gaussian.copy()
    outliers[np.arange(count), rng.integers(0, N_IN, count)] *= 20
    drawn = {"gaussian": gaussian, "student": spread * rng.standard_t(3, (count, N_IN)), "outliers": outliers}
    return {name: rows.astype(np.float32) for name, rows in drawn.items()} | {
        "trained": trained_rows(rng, count)
    }


def all_importance() -> dict[str, np.ndarray | None]:
    rng = np.random.default_rng(1)
    squared = {"chi_square": rng.chisquare(1, N_IN), "log_normal": rng.lognormal(0, 1, N_IN) ** 2}
    return {"none": None} | {name: values.astype(np.float32) for name, values in squared.items()}


def error(rows: np.ndarray, decoded: np.ndarray, importance: np.ndarray | None) -> float:
    weights = 1.0 if importance is None else importance.astype(np.float64)
    return float((weights * (rows.astype(np.float64) - decoded) ** 2).sum())


def compared(name: str, data: str, rows: np.ndarray, kind: str, importance: np.ndarray | None) -> Row:
    """Return both sides' errors over the rows' own weighted squares."""
    ours = FORMATS[name].decode(FORMATS[name].encode(rows, importance))
    theirs = ggml_oracle.dequantize(name, ggml_oracle.quantize(name, rows, importance, threads=2))
    whole = error(rows, np.zeros_like(rows), importance)
    sides = {OURS: error(rows, ours, importance) / whole, "ggml": error(rows, theirs, importance) / whole}
    return value_row(f"{name}, {data} rows, importance {kind.replace('_', '-')}", "relative error", sides)


def main() -> None:
    """Compare every type on all rows by all importances."""
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--types", default=",".join(QUANTIZED))
    chosen = parser.parse_args()
    rows = [
        compared(name, data, drawn, kind, weights)
        for name in chosen.types.split(",")
        for data, drawn in all_rows(chosen.rows).items()
        for kind, weights in all_importance().items()
    ]
    protocol = {
        "statement": "Importance-weighted squared error of encoding over the rows' own weighted squares; "
        "the same rows and importance on both sides.",
        "rows of each kind": chosen.rows,
    }
    report("encode_error", protocol, rows, out=chosen.out)


if __name__ == "__main__":
    main()
