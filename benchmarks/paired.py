"""What pairing a teacher's and a student's activations takes at published shapes, by one layer of each.

    python benchmarks/paired.py [--teacher qwen3-32B] [--student qwen3-4B] [--tokens 143360] [--no-measure]
        [--out FILE]

Weights are random and made as they are read, so that no checkpoint lies on the disk. One layer of each kind
of both models is read and run at its true size with its moments; the seconds of all layers are judged from
it. The peak is the kernel's `ru_maxrss` of this process, beside what the cost says.
"""

from __future__ import annotations

import resource
import sys

from measuring import OURS, arguments, report, value_row

from bitsmith.archs import architecture_of
from bitsmith.archs.published import published_config
from bitsmith.lab.models import DEMO_MODEL
from bitsmith.lab.synth import synth_tensors
from bitsmith.run.forward import TextModel
from bitsmith.run.paired_cost import cost_of
from bitsmith.run.paired_forward import WIDEST_SQUARE
from bitsmith.run.paired_inputs import checked_sides
from bitsmith.store import Checkpoint


def model(size: str, seed: int) -> TextModel:
    """Return a model of published shapes with the demo model's tokenizer."""
    config = published_config(size, vision=False, mtp=False)
    checkpoint = Checkpoint(DEMO_MODEL, synth_tensors(config, seed))
    checkpoint.config = config
    return TextModel(checkpoint, architecture_of(checkpoint), checkpoint)


def main() -> None:
    options = arguments(__doc__)
    options.add_argument("--teacher", default="qwen3-32B")
    options.add_argument("--student", default="qwen3-4B")
    options.add_argument("--tokens", type=int, default=143_360)
    options.add_argument("--ctx", type=int, default=512)
    options.add_argument("--samples", type=int, default=2048)
    options.add_argument("--widest-square", type=int, default=WIDEST_SQUARE)
    options.add_argument("--no-measure", action="store_true")
    chosen = options.parse_args()
    sides = checked_sides(model(chosen.teacher, 0), model(chosen.student, 1))
    cost = cost_of(
        sides,
        chosen.tokens,
        ctx_tokens=chosen.ctx,
        samples=chosen.samples,
        widest_square=chosen.widest_square,
        measure=not chosen.no_measure,
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    facts = cost.to_json()
    sides = {"said": float(cost.memory_bytes)}
    words = f"one layer of {chosen.teacher} and {chosen.student}"
    if not chosen.no_measure:
        facts["peak_memory_bytes"] = sides[OURS] = peak
    rows = [value_row(f"peak memory of {words}", "bytes", sides, better="equal", **facts)]
    if cost.seconds is not None:
        rows.append(value_row(f"time of all layers, judged from {words}", "s", {"said": cost.seconds}))
    statement = "One layer of each kind of both models at its true size with its moments; random weights."
    report("paired", {"statement": statement, "tokens": chosen.tokens}, rows, out=chosen.out)


if __name__ == "__main__":
    main()
