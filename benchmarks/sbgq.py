"""The recipe `sbgq-iq4xs`: its true size for every Qwen3.5, and what running it takes.

    python benchmarks/sbgq.py [--sizes 0.8B 2B 4B 9B 27B] [--run 9B] [--folder DIR] [--out FILE]

Sizes are exact: the plan of a checkpoint of the published shapes (text, MTP, vision), of which nothing is
written. `--run` writes a synthetic checkpoint of that size, or takes the one in `--folder`, and compresses it
in a process of its own: wall time, and the kernel's peak of resident memory. The write-up that the recipe is
taken from claims 4.66 bpw and 4.86 GB for the 9B, and 1.5 GB of memory; `plain` is `--type IQ4_XS`.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measuring import OURS, Row, arguments, child, report, value_row

from bitsmith.archs.published import published_config
from bitsmith.lab.models import DEMO_MODEL
from bitsmith.lab.synth import synth_tensors
from bitsmith.passes.transform import model_of, parse_transforms
from bitsmith.run.plan import Plan, open_source, plan_source
from bitsmith.run.sbgq import SBGQ, SBGQ_BASE, SBGQ_TRANSFORMS, sbgq_types
from bitsmith.store.checkpoint import Checkpoint

BITSMITH = (sys.executable, "-m", "bitsmith.cli.main")
SIZES = ("0.8B", "2B", "4B", "9B", "27B")


class Unwritten(Checkpoint):
    """A checkpoint of a published size whose weights are computed when they are read."""

    def __init__(self, size: str) -> None:
        config = published_config(size)
        super().__init__(DEMO_MODEL, synth_tensors(config))  # for its tokenizer
        self.config = config


def size_of(size: str) -> Row:
    checkpoint = Unwritten(size)
    source = open_source(checkpoint, parse_transforms(SBGQ_TRANSFORMS))
    types = sbgq_types(model_of(checkpoint))
    planned = plan_source(source, SBGQ_BASE, pure=True, tensor_types=types)
    plain = plan_source(open_source(checkpoint), "IQ4_XS", has_imatrix=True)
    facts = {"recipe": said(planned), "plain IQ4_XS": said(plain), "notes": planned.notes}
    sides = {f"recipe {SBGQ}": planned.bpw, "plain IQ4_XS": plain.bpw}
    return value_row(f"{size}: bits per weight of the file", "bpw", sides, **facts)


def said(plan: Plan) -> dict[str, Any]:
    return {"parameters": plan.parameters, "tensor_bytes": plan.tensor_bytes, "bpw": round(plan.bpw, 4)}


def run_of(size: str, folder: Path) -> Iterator[Row]:
    """Compress a synthetic checkpoint of a size; yield time and peak."""
    model, out = folder / f"synth-{size}", folder / f"{size}-{SBGQ}.gguf"
    if not model.exists():
        child([*BITSMITH, "lab", "synth", model, "--size", size])
    ran = child([*BITSMITH, "compress", model, "-o", out, "--recipe", SBGQ, "--overwrite"])
    facts = ran.to_json() | {"output_bytes": out.stat().st_size}
    out.unlink()
    yield value_row(f"{size}: wall time of the recipe", "s", {OURS: ran.seconds}, **facts)
    yield value_row(f"{size}: peak memory of the recipe", "bytes", {OURS: ran.peak_bytes}, **facts)


def main() -> None:
    options = arguments(__doc__)
    options.add_argument("--sizes", nargs="*", default=SIZES)
    options.add_argument("--run", metavar="SIZE")
    options.add_argument("--folder", type=Path)
    chosen = options.parse_args()
    rows = [size_of(size) for size in chosen.sizes]
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if chosen.run:
            rows += run_of(chosen.run, folder)
    protocol = {
        "statement": "Sizes are exact, of plans of published shapes (text, MTP, vision); the write-up claims "
        "4.66 bpw and 4.86 GB for the 9B, and 1.5 GB of memory."
    }
    report("sbgq", protocol, rows, out=chosen.out)


if __name__ == "__main__":
    main()
