"""Wall time, peak memory and tokens per second of `bitsmith evaluate` on the demo model, as JSON.

    python benchmarks/evaluate.py [--model FOLDER] [--type Q4_K_M] [--ctx 512] [--chunks 16]

The model is evaluated against its own quantized GGUF in a process of its own. The wall time includes
the imports, the peak is the kernel's `ru_maxrss`, tokens count every one forwarded through either model. The
text is the lab's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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


def measure(model: Path, type_name: str, ctx_tokens: int, chunks: int, folder: Path) -> dict[str, object]:
    text, candidate = folder / "held_out.txt", folder / "candidate.gguf"
    text.write_text(held_out_text(16 * ctx_tokens * chunks), encoding="utf-8")
    compress(model, candidate, type_name)
    started = time.monotonic()
    command = [sys.executable, "-c", EVALUATE, *map(str, (model, candidate, text, ctx_tokens, chunks))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        answer = child.stdout.read() if child.stdout else ""
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"evaluate failed with exit status {child.returncode}")
    record = json.loads(answer)
    tokens = 2 * record["protocol"]["chunks"] * ctx_tokens
    return {
        "model": model.name,
        "type": type_name,
        "ctx_tokens": ctx_tokens,
        "chunks": record["protocol"]["chunks"],
        "wall_seconds": round(time.monotonic() - started, 2),
        "import_seconds": round(record["import_seconds"], 2),
        "evaluate_seconds": round(record["seconds"], 2),
        "tokens_per_second": round(tokens / record["seconds"], 1),
        "peak_memory_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "mean_kld_nats": record["measures"]["mean_kld"]["value"],
        "cores": os.cpu_count(),
    }


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--model", type=Path, default=DEMO_MODEL)
    options.add_argument("--type", default="Q4_K_M")
    options.add_argument("--ctx", type=int, default=512)
    options.add_argument("--chunks", type=int, default=16)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(chosen.model, chosen.type, chosen.ctx, chosen.chunks, Path(folder))
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
