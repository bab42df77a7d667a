"""Peak resident memory of `bitsmith compress` on synthetic checkpoints of about 4 and 8 GB, as JSON.

    python benchmarks/memory.py [--type Q4_K_M] [--sizes 2B 4B] [--folder DIR]

Each step runs in a process of its own; the peak is the kernel's `ru_maxrss` of the compressing one. The
checkpoints have Qwen3.5's shapes (text and MTP); they are temporary, or kept and used again in `--folder`.
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

SYNTH = "import sys; from pathlib import Path; from bitsmith.lab.synth import synth; \
synth(Path(sys.argv[1]), sys.argv[2], vision=False)"


def peak_of(*arguments: str | Path) -> tuple[int, float]:
    """Run a fresh interpreter with `arguments` and return its peak resident bytes and its seconds."""
    started = time.monotonic()
    child = subprocess.Popen([sys.executable, *map(str, arguments)], stdout=sys.stderr)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"failed with exit status {child.returncode}: {arguments}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), time.monotonic() - started


def measure(size: str, folder: Path, out_name: str, *options: str, synth: str = SYNTH) -> dict[str, object]:
    model, out = folder / f"synth-{size}", folder / out_name
    if not model.exists():
        peak_of("-c", synth, model, size)
    peak, seconds = peak_of("-m", "bitsmith.cli.main", "compress", model, "-o", out, *options, "--overwrite")
    written = out.stat().st_size
    out.unlink()
    return {
        "size": size,
        "checkpoint_bytes": sum(file.stat().st_size for file in model.glob("*.safetensors")),
        "output_bytes": written,
        "peak_memory_bytes": peak,
        "seconds": round(seconds, 1),
    }


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--type", default="Q4_K_M")
    options.add_argument("--sizes", nargs="+", default=["2B", "4B"])
    options.add_argument("--folder", type=Path)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        runs = [
            measure(size, folder, f"{size}-{chosen.type}.gguf", "--type", chosen.type)
            for size in chosen.sizes
        ]
    peaks = [int(str(run["peak_memory_bytes"])) for run in runs]
    print(
        json.dumps(
            {"type": chosen.type, "runs": runs, "peak_ratio_last_to_first": peaks[-1] / peaks[0]}, indent=2
        )
    )


if __name__ == "__main__":
    main()
