"""One matrix's spectrum and power law against numpy.linalg.svd and WeightWatcher, and a whole checkpoint's.

    python benchmarks/assay.py [--shapes 3584x1024,4096x2048] [--repeats 3] [--size qwen3.5-0.8b]
        [--layers 4] [--watcher-python PATH] [--out FILE]

The matrices are float32 with planted spectra (`bitsmith.numerics.planted`): a power law above Marchenko and
Pastur's, uneven rows and columns, outlier channels. Our analysis is σ, all statistics, the log-log slope and
the power law with its resamples; numpy's is σ alone; WeightWatcher's is its `analyze`. All of them have one
thread, and take turns. WeightWatcher runs in a process of `--watcher-python`, an interpreter of its own
(this one if not said), timed there after its imports; it is left out where it is not installed. The limit is
what our way costs in operations, the Gram matrix and its reduction to a band, over the rate of float32
products on one thread (where float32 does not resolve the smallest σ they are done in float64, at half that
rate).

The checkpoint has a published model's shapes with fewer layers (`--layers`) and no vision, computed on read.
`bitsmith assay` measures every matrix of it, also int4, low rank and bounds, in one process and in one for
each core, and a sample (`--sample 1`). numpy takes σ of the same matrices one after the other, with as many
threads as there are cores.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from measuring import (
    OURS,
    Limit,
    Ran,
    Row,
    alternate,
    arguments,
    child,
    limits,
    report,
    seconds_row,
    value_row,
)
from threadpoolctl import threadpool_limits

from bitsmith.lab.synth import synth
from bitsmith.numerics.planted import Planted, planted_rows
from bitsmith.numerics.power_law import fit_tail, log_slope
from bitsmith.numerics.spectrum import Spectrum, describe, singular_values
from bitsmith.run.engine import THREADS

NUMPY, WATCHER = "numpy.linalg.svd", "weightwatcher"
SVD_OF_ALL = """
import sys
from pathlib import Path
import numpy as np
from bitsmith.store import open_checkpoint
with open_checkpoint(Path(sys.argv[1])) as checkpoint:
    for ref in checkpoint.values():
        if len(ref.shape) > 1:
            np.linalg.svd(np.asarray(ref.read()).reshape(ref.shape[0], -1), compute_uv=False)
"""


WATCH = """
import contextlib, io, resource, sys, time
import numpy as np
import torch
import weightwatcher
torch.set_num_threads(1)
weights = torch.from_numpy(np.load(sys.argv[1]))
layer = torch.nn.Linear(weights.shape[1], weights.shape[0], bias=False)
layer.weight.data = weights
watcher = weightwatcher.WeightWatcher(model=torch.nn.Sequential(layer))
print(weightwatcher.__version__, flush=True)
for _ in sys.stdin:
    began, used = time.perf_counter(), time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        watcher.analyze(max_evals=max(weights.shape))
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(time.perf_counter() - began, time.process_time() - used, peak, flush=True)
"""


def matrix(rows: int, columns: int) -> np.ndarray:
    """Return a matrix like those of the synthetic checkpoints."""
    uneven = {"row_spread": 0.2, "column_spread": 0.15, "outliers": columns // 512, "outlier_factor": 3.0}
    plan = Planted(rows, columns, alpha=3.5, tail=0.3, rms=columns**-0.5, seed=1, channels=2, **uneven)
    return planted_rows(plan, 0, rows)


def analyse(weights: np.ndarray) -> Spectrum:
    """Do all that is said of one matrix's spectrum."""
    spectrum = singular_values(weights)
    describe(spectrum)
    log_slope(spectrum.sigma)
    fit_tail(np.square(spectrum.sigma))
    return spectrum


class Watcher:
    """WeightWatcher's analysis of a model with one matrix, in a process that waits between its turns."""

    def __init__(self, python: str, weights: np.ndarray, folder: Path) -> None:
        np.save(folder / "weights.npy", weights)
        self.process = subprocess.Popen(
            [python, "-W", "ignore", "-c", WATCH, folder / "weights.npy"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **dict.fromkeys(THREADS, "1"), "PYTHONPATH": ""},
            text=True,
        )
        self.version = self.process.stdout.readline().strip()  # '' where its imports failed

    def __call__(self) -> Ran:
        """Return what one analysis took, as the process itself says."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        seconds, cpu, peak = map(float, self.process.stdout.readline().split())
        return Ran(seconds, cpu, int(peak), None, None, None, None)

    def stop(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def operations(shape: tuple[int, int]) -> float:
    """Return the operations of the Gram matrix (one triangle) and its reduction to a band."""
    short, long = sorted(shape)
    return short**2 * (long + 4 * short / 3)


def one_matrix(shape: tuple[int, int], repeats: int, limit: Limit, python: str) -> list[Row]:
    """Return seconds of one matrix's analysis, and how exact σ is."""
    weights = matrix(*shape)
    sides: dict[str, Callable[[], object]] = {
        OURS: lambda: analyse(weights),
        NUMPY: lambda: np.linalg.svd(weights, compute_uv=False),
    }
    with tempfile.TemporaryDirectory() as made, threadpool_limits(1):
        watcher = Watcher(python, weights, Path(made))
        if watcher.version:
            sides[WATCHER] = watcher
        turns = alternate(sides, repeats, warmups=1)
        watcher.stop()
        spectrum, single = analyse(weights), np.linalg.svd(weights, compute_uv=False)
    exact = np.linalg.svd(weights.astype(np.float64), compute_uv=False)
    errors = {OURS: _error(spectrum.sigma, exact), NUMPY: _error(single, exact)}
    facts = {"method": spectrum.method, "weightwatcher": watcher.version or "not installed"}
    case = f"spectrum of {shape[0]} × {shape[1]}"
    return [
        seconds_row(case, turns, limit=limit, limit_amount=operations(shape), **facts),
        value_row(f"largest relative error of σ, {shape[0]} × {shape[1]}", "1", errors),
    ]


def _error(sigma: np.ndarray, exact: np.ndarray) -> float:
    return float(np.max(np.abs(sigma / exact - 1)))


def whole_checkpoint(folder: Path, repeats: int) -> list[Row]:
    """Return seconds and peak memory of `bitsmith assay` on a checkpoint, and numpy's for σ alone."""
    peaks: dict[str, int] = {}

    def run(name: str, *command: str) -> Callable[[], Any]:
        def work() -> Any:
            ran = child([sys.executable, *command])
            peaks[name] = max(peaks.get(name, 0), ran.peak_bytes)
            return ran

        return work

    ours = ("-c", "from bitsmith.cli.main import main; main()", "--quiet", "assay", str(folder), "--workers")
    cores = str(len(os.sched_getaffinity(0)))
    turns = alternate(
        {
            OURS: run(OURS, *ours, cores),
            "bitsmith, one process": run("bitsmith, one process", *ours, "1"),
            "bitsmith --sample 1": run("bitsmith --sample 1", *ours, cores, "--sample", "1"),
            f"{NUMPY}, σ alone": run(f"{NUMPY}, σ alone", "-c", SVD_OF_ALL, str(folder)),
        },
        repeats,
        warmups=0,
    )
    return [
        seconds_row("every matrix of a checkpoint", turns, processes=int(cores)),
        value_row("peak memory of all processes", "bytes", peaks),
    ]


def main() -> None:
    """Measure what is asked for."""
    parser = arguments(__doc__)
    parser.add_argument("--shapes", default="3584x1024,4096x2048", help="of single matrices; '' for none")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", default="qwen3.5-0.8b", help="shapes of the checkpoint; '' for none")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--watcher-python", default=sys.executable, help="interpreter with WeightWatcher")
    options = parser.parse_args()
    known = limits("matrix", threads=1)
    rows: list[Row] = []
    for text in filter(None, options.shapes.split(",")):
        height, width = map(int, text.split("x"))
        rows += one_matrix((height, width), options.repeats, known["matrix"], options.watcher_python)
    if options.size:
        with tempfile.TemporaryDirectory() as made:
            asked = {"layers": options.layers, "vision": False, "planted": True, "virtual": True}
            folder = synth(Path(made) / "model", options.size, **asked)
            rows += whole_checkpoint(folder, 1)
    statement = (
        f"float32 matrices with planted spectra, {options.repeats} rounds in turns, one thread each; then a "
        f"checkpoint of {options.size}'s shapes with {options.layers} layers, once"
    )
    report("assay", {"statement": statement, "threads": 1}, rows, known, out=options.out)


if __name__ == "__main__":
    main()
