"""Throughput of encoding against `ggml_quantize_chunk` with as many threads, in the same run, as JSON.

    python benchmarks/encode.py [--threads 2] [--repeats 9] [--types Q4_K,Q6_K] [--out FILE]

Ours and ggml's take turns on the same rows (Gaussian, 2048 wide); figures are the median and the range over
the repeats, in million weights per second. ggml's rows are shared out evenly over threads. Both allocate the
output.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numba
import numpy as np

from bitsmith.formats import FORMATS

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import ggml_oracle

N_IN = 2048
SLOW = ("IQ4_NL", "IQ4_XS")  # in ggml


def environment() -> dict[str, object]:
    """Return what the figures depend on."""
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    ).stdout.strip()
    packages = ("bitsmith", "numba", "numpy", "gguf", "xllamacpp")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "commit": commit,
        "versions": {name: version(name) for name in packages},
        "load_average": os.getloadavg()[0],
    }


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def compare(name: str, importance: np.ndarray | None, threads: int, repeats: int) -> dict[str, object]:
    rng = np.random.default_rng(0)
    rows = (
        rng.standard_normal((256 if name in SLOW else 1024 if name.endswith("_K") else 4096, N_IN)) * 0.02
    ).astype(np.float32)
    sides = {
        "bitsmith": lambda: FORMATS[name].encode(rows, importance),
        "ggml": lambda: ggml_oracle.quantize(name, rows, importance, threads=threads),
    }
    took: dict[str, list[float]] = {side: [] for side in sides}
    for repeat in range(repeats + 1):
        for side, work in sides.items():
            once = seconds(work)
            if repeat:  # the first is for compiling and caches
                took[side].append(once)
    speed = {side: [rows.size / s / 1e6 for s in all_s] for side, all_s in took.items()}
    return {
        "type": name,
        "importance": importance is not None,
        "mweights_per_s": {
            side: {
                "median": round(median(all_s), 1),
                "min": round(min(all_s), 1),
                "max": round(max(all_s), 1),
            }
            for side, all_s in speed.items()
        },
        "ratio": round(median(speed["bitsmith"]) / median(speed["ggml"]), 2),
        "ratio_of_best": round(max(speed["bitsmith"]) / max(speed["ggml"]), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--types", default=",".join(FORMATS))
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    numba.set_num_threads(chosen.threads)
    importance = np.random.default_rng(1).chisquare(1, N_IN).astype(np.float32)
    found = []
    for name in chosen.types.split(","):
        for weights in (None, importance):
            found.append(compare(name, weights, chosen.threads, chosen.repeats))
            print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    report = {
        "benchmark": "encode",
        "environment": environment(),
        "threads": chosen.threads,
        "repeats": chosen.repeats,
        "lowest_ratio": min(row["ratio"] for row in found),  # type: ignore[type-var]
        "rows": found,
    }
    text = json.dumps(report, indent=1)
    print(text)
    if chosen.out:
        chosen.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
