"""Wall time, peak memory and tokens per second of `bitsmith evaluate` on the demo model.

    python benchmarks/evaluate.py [--model FOLDER] [--type Q4_K_M] [--ctx 512] [--chunks 16] [--repeats 3]
        [--out FILE]

The model is evaluated against its own quantized GGUF in a process of its own. The wall time includes
the imports; tokens count every one forwarded through either model. The text is the lab's. Peers on the same
model and text are in `forward.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from measuring import OURS, Row, Spread, arguments, child, report, value_row

from bitsmith.lab.corpus import held_out_text
from bitsmith.lab.models import DEMO_MODEL
from bitsmith.run.execute import compress

EVALUATE = """
import json, sys, time
from pathlib import Path
started = time.monotonic()
from bitsmith.run.evaluate import evaluate
imported = time.monotonic()
reference, candidate, text = map(Path, sys.argv[1:4])
found = evaluate(reference, candidate, text, int(sys.argv[4]), int(sys.argv[5]))
record = found.to_json() | {"import_seconds": imported - started, "seconds": time.monotonic() - imported}
print(json.dumps(record))
"""


def measure(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """Evaluate as often as asked; yield tokens per second, wall time and peak."""
    text, candidate = folder / "held_out.txt", folder / "candidate.gguf"
    text.write_text(held_out_text(16 * options.ctx * options.chunks), encoding="utf-8")
    compress(options.model, candidate, options.type)
    command = [sys.executable, "-c", EVALUATE, options.model, candidate, text, options.ctx, options.chunks]
    runs = [child([str(part) for part in command]) for _ in range(options.repeats)]
    records = [json.loads(ran.output.splitlines()[-1]) for ran in runs]
    tokens = 2 * records[0]["protocol"]["chunks"] * options.ctx
    facts = {
        "chunks": records[0]["protocol"]["chunks"],
        "import_seconds": Spread.of(one["import_seconds"] for one in records).to_json(),
        "mean_kld_nats": records[0]["measures"]["mean_kld"]["value"],
    }
    case = f"evaluate {options.model.name} against its {options.type}"
    rates = Spread.of(tokens / one["seconds"] for one in records)
    yield value_row(case, "tokens/s", {OURS: rates}, better="higher", **facts)
    yield value_row(f"{case}, wall time with imports", "s", {OURS: Spread.of(ran.seconds for ran in runs)})
    yield value_row(f"{case}, peak memory", "bytes", {OURS: Spread.of(ran.peak_bytes for ran in runs)})


def main() -> None:
    options = arguments(__doc__)
    options.add_argument("--model", type=Path, default=DEMO_MODEL)
    options.add_argument("--type", default="Q4_K_M")
    options.add_argument("--ctx", type=int, default=512)
    options.add_argument("--chunks", type=int, default=16)
    options.add_argument("--repeats", type=int, default=3)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = list(measure(chosen, Path(folder)))
    protocol = {
        "statement": "The bundled model against its own quantized GGUF, a process of its own each time.",
        "ctx_tokens": chosen.ctx,
        "chunks": chosen.chunks,
        "repeats": chosen.repeats,
    }
    report("evaluate", protocol, rows, out=chosen.out)


if __name__ == "__main__":
    main()
