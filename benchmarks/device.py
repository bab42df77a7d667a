"""A GPU against the processor: whether the results are equal, and how fast each is.

    python benchmarks/device.py [--device auto] [--rows 4096] [--columns 4096] [--model DIR] [--text FILE]

Without a GPU the device is torch on the processor: that checks equality, its seconds say nothing. `--model`
(default: the bundled trained one) is calibrated and evaluated on both sides against its own Q4_K_M. Searches
must give equal bytes; error feedback and forwards must agree within the tolerances that the result
states, else the script ends with exit code 1.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from measuring import OURS, Row, alternate, arguments, rate_row, report, value_row

from bitsmith.formats import format_named
from bitsmith.formats.accelerator import accelerated_by
from bitsmith.lab.models import DEMO_MODEL
from bitsmith.numerics.input_metric import InputMetric
from bitsmith.passes.rounding import round_rows
from bitsmith.run.calibrate import calibrate
from bitsmith.run.compress import compress
from bitsmith.run.corpus import default_text
from bitsmith.run.device import described, device_named
from bitsmith.run.evaluate import evaluate
from bitsmith.run.job import Job
from bitsmith.run.torch_encode import TorchEncoder
from bitsmith.run.torch_fields import KNOWN

PROCESSOR = "processor"
FEEDBACK = ("Q4_K", "IQ4_XS", "Q6_K")
COST, PERPLEXITY = 0.01, 1e-4  # relative differences that are allowed


def encoding(encoder: TorchEncoder, rows: np.ndarray, importance: np.ndarray) -> tuple[list[Row], bool]:
    found, equal = [], True
    for name in sorted(KNOWN):
        form, kept = format_named(name), dict[str, np.ndarray]()

        def on_device(form: Any = form, kept: dict[str, np.ndarray] = kept) -> None:
            with accelerated_by(encoder):
                kept[OURS] = form.encode(rows, importance)

        def on_processor(form: Any = form, kept: dict[str, np.ndarray] = kept) -> None:
            kept[PROCESSOR] = form.encode(rows, importance)

        turns = alternate({OURS: on_device, PROCESSOR: on_processor}, repeats=3, warmups=1)
        same = float((kept[OURS] == kept[PROCESSOR]).mean())
        equal &= same == 1.0
        found.append(rate_row(f"encode {name}", turns, rows.size, "weights/s", **{"equal bytes": same}))
    return found, equal


def feedback(encoder: TorchEncoder, rows: np.ndarray, moment: np.ndarray) -> tuple[list[Row], bool]:
    found, equal, metric = [], True, InputMetric(moment)
    for name in FEEDBACK:
        form, kept = format_named(name), dict[str, np.ndarray]()

        def on_device(form: Any = form, kept: dict[str, np.ndarray] = kept) -> None:
            with accelerated_by(encoder):
                kept[OURS] = round_rows(form, rows, metric)

        def on_processor(form: Any = form, kept: dict[str, np.ndarray] = kept) -> None:
            kept[PROCESSOR] = round_rows(form, rows, metric)

        turns = alternate({OURS: on_device, PROCESSOR: on_processor}, repeats=1, warmups=1)
        costs = {side: cost(rows - form.decode(blocks), moment) for side, blocks in kept.items()}
        equal &= abs(costs[OURS] / costs[PROCESSOR] - 1) <= COST
        same = float((kept[OURS] == kept[PROCESSOR]).mean())
        found.append(rate_row(f"feedback {name}", turns, rows.size, "weights/s", **{"equal bytes": same}))
        found.append(value_row(f"feedback {name}, tr(E M E^T)", "cost", costs))
    return found, equal


def cost(errors: np.ndarray, moment: np.ndarray) -> float:
    return float(np.einsum("ij,ij->", errors @ moment, errors, dtype=np.float64))


def forwards(name: str, model: Path, text: Path, work: Path) -> tuple[list[Row], bool]:
    compress(Job(model, work / "m.gguf", "Q4_K_M"))
    found: dict[str, Any] = {}

    def evaluated(side: str, device: str) -> Callable[[], None]:
        def run() -> None:
            found[side] = evaluate(model, work / "m.gguf", text, chunks=8, device=device)

        return run

    def calibrated(side: str, device: str) -> Callable[[], None]:
        def run() -> None:
            calibrate(model, text, work / side, chunks=8, device=device, overwrite=True)

        return run

    sides = {OURS: name, PROCESSOR: "cpu"}
    turns = alternate({side: evaluated(side, device) for side, device in sides.items()}, repeats=2, warmups=1)
    tokens = 2 * 8 * 512
    rows = [rate_row("evaluate", turns, tokens, "tokens/s")]
    turns = alternate({side: calibrated(side, device) for side, device in sides.items()}, repeats=1)
    rows.append(rate_row("calibrate", turns, tokens // 2, "tokens/s"))
    values = {side: one.ppl_ref.value for side, one in found.items()}
    rows.append(value_row("perplexity of the reference", "perplexity", values))
    rows.append(value_row("mean KLD", "nats", {side: one.mean_kld.value for side, one in found.items()}))
    return rows, abs(values[OURS] / values[PROCESSOR] - 1) <= PERPLEXITY


def main() -> int:
    """Compare searches, error feedback and forwards; tell by the exit code whether they agree."""
    parser = arguments(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda", "auto"), default="auto")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--text", type=Path)
    chosen = parser.parse_args()
    device, rng = device_named(chosen.device), np.random.default_rng(0)
    encoder = TorchEncoder(device)
    rows = (0.02 * rng.standard_t(5, (chosen.rows, chosen.columns))).astype(np.float32)
    inputs = rng.standard_normal((2 * chosen.columns, chosen.columns), np.float32)
    inputs *= rng.lognormal(0, 1, chosen.columns).astype(np.float32)
    moment = inputs.T @ inputs / np.float32(len(inputs))
    with tempfile.TemporaryDirectory() as folder:
        text = chosen.text or Path(folder) / "text.txt"
        if chosen.text is None:
            text.write_text(default_text(), "utf-8")
        parts = [
            encoding(encoder, rows, np.ascontiguousarray(np.diagonal(moment))),
            feedback(encoder, rows, moment),
            forwards(device.type, chosen.model, text, Path(folder)),
        ]
    protocol = {
        "statement": "The same rows, statistics, model and text on the device and on the processor, "
        "in turns. Encoded bytes are equal; the cost of error feedback agrees within 1 %, perplexity within "
        "0.01 %.",
        "device": described(device),
        "rows": chosen.rows,
        "columns": chosen.columns,
        "equal": {what: one[1] for what, one in zip(("encode", "feedback", "forward"), parts, strict=True)},
    }
    report("device", protocol, [row for one in parts for row in one[0]], out=chosen.out)
    return 0 if all(one[1] for one in parts) else 1


if __name__ == "__main__":
    sys.exit(main())
