"""Time of one matrix's full analysis against `numpy.linalg.svd` and WeightWatcher, in the same run, as JSON.

    python benchmarks/assay.py [--rows 12288] [--columns 4096] [--repeats 3] [--out FILE]

The matrix is float32 with an LLM-like spectrum: σ falls as in a published table of Qwen3.5-9B's gate of layer
15 (4.65 … 0.95), planted by cosine transforms with random signs. Our analysis is σ, all statistics, the slope
and the power law with its resamples. The sides take turns; figures are the median and the range. σ is also
compared with a float64 SVD, run once. Peak memory is that of a process that loads the matrix, and of one that
analyses it too. WeightWatcher is not a dependency: it is skipped where it is not installed. The projection
for all matrices of Qwen3.5-9B scales our time at this size by what the Gram matrix and its reduction to a
band cost; reading from disk is not in it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from scipy.fft import dct

from bitsmith.archs import ARCHITECTURES
from bitsmith.archs.published import published_config
from bitsmith.numerics.power_law import fit_tail, log_slope
from bitsmith.numerics.spectrum import Spectrum, describe, singular_values

TABLE = {1: 4.65, 2: 4.05, 3: 3.65, 4: 3.55, 512: 2.03, 1024: 1.72, 2048: 1.18, 4096: 0.95}
PEAKS = ("loading", "bitsmith", "numpy.linalg.svd")


def llm_like(rows: int, columns: int) -> np.ndarray:
    """Return a dense matrix with the table's σ, its indices scaled to the short side."""
    rng = np.random.default_rng(0)
    short = min(rows, columns)
    places = [i if i <= 4 else i * short / 4096 for i in TABLE]
    weights = np.zeros((rows, columns), np.float32)
    diagonal = np.arange(short)
    weights[diagonal, diagonal] = np.interp(diagonal + 1, places, list(TABLE.values()))
    for axis in (0, 1, 0, 1):  # orthogonal: a cosine transform after random signs
        signs = rng.choice(np.array([-1, 1], np.float32), weights.shape[axis])
        weights *= signs[:, np.newaxis] if axis == 0 else signs
        weights = dct(weights, axis=axis, norm="ortho", overwrite_x=True)
    return weights


def analyse(weights: np.ndarray) -> Spectrum:
    """Do all that is said of one matrix."""
    spectrum = singular_values(weights)
    describe(spectrum)
    log_slope(spectrum.sigma)
    fit_tail(np.square(spectrum.sigma))
    return spectrum


def weightwatcher_analysis(weights: np.ndarray) -> Callable[[], object] | str:
    """Return WeightWatcher's analysis of a model with this one matrix, or why it is not measured."""
    try:
        import torch  # noqa: PLC0415
        import weightwatcher  # noqa: PLC0415
    except ImportError as error:
        return f"unmeasured: not installed ({error})"
    layer = torch.nn.Linear(weights.shape[1], weights.shape[0], bias=False)
    layer.weight.data = torch.from_numpy(weights)
    watcher = weightwatcher.WeightWatcher(model=torch.nn.Sequential(layer))

    def work() -> object:
        with contextlib.redirect_stdout(sys.stderr):
            return watcher.analyze(max_evals=max(weights.shape))

    return work


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def cost(shape: tuple[int, int]) -> float:
    """Return the multiplications of the Gram matrix and its reduction to a band."""
    short, long = sorted(shape)
    return short**2 * (long / 2 + 2 * short / 3)


def projection(took: float, shape: tuple[int, int]) -> dict[str, object]:
    """Scale the measured time to every matrix of Qwen3.5-9B."""
    config = published_config("9B")
    shapes = [
        (spec.shape[0], math.prod(spec.shape[1:]))
        for spec in ARCHITECTURES[config["model_type"]](config).specs()
        if len(spec.shape) > 1
    ]
    total = sum(took * cost(each) / cost(shape) for each in shapes)
    return {"matrices": len(shapes), "minutes": total / 60, "kind": "projection, not measured"}


def peak_bytes(file: Path, action: str) -> int:
    """Return the peak resident memory of a process that loads the matrix and does `action`."""
    command = [sys.executable, __file__, "--peak", action, "--matrix", str(file)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak(file: Path, action: str) -> None:
    weights = np.load(file)
    if action == "bitsmith":
        analyse(weights)
    elif action == "numpy.linalg.svd":
        np.linalg.svd(weights, compute_uv=False)
    status = Path("/proc/self/status").read_text()  # ru_maxrss would start from the parent's peak
    print(1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")))


def environment() -> dict[str, object]:
    """Return what the figures depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    versions = {}
    for name in ("bitsmith", "numpy", "scipy", "torch", "weightwatcher"):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
        "load_average": os.getloadavg()[0],
    }


def measure(rows: int, columns: int, repeats: int) -> dict[str, object]:
    report: dict[str, object] = {"environment": environment(), "shape": [rows, columns]}
    weights = llm_like(rows, columns)
    sides: dict[str, Callable[[], object]] = {
        "bitsmith": lambda: analyse(weights),
        "numpy.linalg.svd": lambda: np.linalg.svd(weights, compute_uv=False),
    }
    watcher = weightwatcher_analysis(weights)
    if isinstance(watcher, str):
        report["weightwatcher"] = watcher
    else:
        sides["weightwatcher"] = watcher
    analyse(weights[:512, :128])
    took: dict[str, list[float]] = {name: [] for name in sides}
    results: dict[str, Any] = {}
    for _ in range(repeats):
        for name, work in sides.items():
            elapsed, results[name] = timed(work)
            took[name].append(elapsed)
            print(f"{name}: {elapsed:.2f} s, load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
    for name, values in took.items():
        report[name] = {"seconds": median(values), "range": [min(values), max(values)]}
        report[f"times_faster_than_{name}"] = median(values) / median(took["bitsmith"])
    del report["times_faster_than_bitsmith"]
    spectrum, single = results["bitsmith"], results["numpy.linalg.svd"]
    exact = np.linalg.svd(weights.astype(np.float64), compute_uv=False)
    report["sigma"] = {
        "method": spectrum.method,
        "bound": spectrum.relative_error,
        "against_float64": float(np.max(np.abs(spectrum.sigma / exact - 1))),
        "numpy_float32_against_float64": float(np.max(np.abs(single / exact - 1))),
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "matrix.npy"
        np.save(file, weights)
        report["peak_bytes"] = {action: peak_bytes(file, action) for action in PEAKS}
    report["qwen3_5_9b"] = projection(median(took["bitsmith"]), (rows, columns))
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=12288)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peak", choices=PEAKS, help="print the peak memory in bytes for --matrix FILE.npy")
    parser.add_argument("--matrix", type=Path)
    args = parser.parse_args()
    if args.peak:
        print_peak(args.matrix, args.peak)
        return
    text = json.dumps(measure(args.rows, args.columns, args.repeats), indent=1, allow_nan=False)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
