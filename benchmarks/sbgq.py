"""The recipe `sbgq-iq4xs`: its true size for every Qwen3.5, and what running it takes, as JSON.

    python benchmarks/sbgq.py [--sizes 0.8B 2B 4B 9B 27B] [--run 9B] [--folder DIR]

Sizes are exact: the plan of a checkpoint of the published shapes (text, MTP, vision), of which nothing is
written. `--run` writes a synthetic checkpoint of that size, or takes the one in `--folder`, and compresses it
in a process of its own: wall time, and the kernel's peak of resident memory. The write-up that the recipe is
taken from claims 4.66 bpw and 4.86 GB for the 9B, and 1.5 GB of memory; `plain` is `--type IQ4_XS`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from memory import measure

from bitsmith.archs.published import published_config
from bitsmith.lab.models import DEMO_MODEL
from bitsmith.lab.synth import synth_tensors
from bitsmith.passes.transform import model_of, parse_transforms
from bitsmith.run.plan import Plan, open_source, plan_source
from bitsmith.run.sbgq import SBGQ, SBGQ_BASE, SBGQ_TRANSFORMS, sbgq_types
from bitsmith.store.checkpoint import Checkpoint

SYNTH = "import sys; from pathlib import Path; from bitsmith.lab.synth import synth; \
synth(Path(sys.argv[1]), sys.argv[2])"
SIZES = ("0.8B", "2B", "4B", "9B", "27B")


class Unwritten(Checkpoint):
    """A checkpoint of a published size whose weights are computed when they are read."""

    def __init__(self, size: str) -> None:
        config = published_config(size)
        super().__init__(DEMO_MODEL, synth_tensors(config))  # for its tokenizer
        self.config = config


def size_of(size: str) -> dict[str, Any]:
    checkpoint = Unwritten(size)
    source = open_source(checkpoint, parse_transforms(SBGQ_TRANSFORMS))
    types = sbgq_types(model_of(checkpoint))
    planned = plan_source(source, SBGQ_BASE, pure=True, tensor_types=types)
    plain = plan_source(open_source(checkpoint), "IQ4_XS", has_imatrix=True)
    return {"size": size, "recipe": said(planned), "plain": said(plain), "notes": planned.notes}


def said(plan: Plan) -> dict[str, Any]:
    return {
        "parameters": plan.parameters,
        "tensor_bytes": plan.tensor_bytes,
        "GiB": round(plan.tensor_bytes / 2**30, 3),
        "GB": round(plan.tensor_bytes / 1e9, 3),
        "bpw": round(plan.bpw, 4),
    }


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--sizes", nargs="*", default=SIZES)
    options.add_argument("--run", metavar="SIZE")
    options.add_argument("--folder", type=Path)
    chosen = options.parse_args()
    result: dict[str, Any] = {"sizes": [size_of(size) for size in chosen.sizes]}
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if chosen.run:
            out = f"{chosen.run}-{SBGQ}.gguf"
            result["run"] = measure(chosen.run, folder, out, "--recipe", SBGQ, synth=SYNTH)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
