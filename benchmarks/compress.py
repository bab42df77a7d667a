"""From a Hugging Face folder to a finished GGUF: ours against llama.cpp's converter and llama-quantize.

    python benchmarks/compress.py [--sizes 0.8B] [--model DIR] [--types Q4_K_M IQ4_XS] [--threads 1 2]
        [--repeats 1] [--llama-bin DIR] [--folder DIR] [--out FILE]

Both sides are commands, processes of their own on the first so many cores, that take turns: `bitsmith
compress`, which reads the checkpoint, hashes source and output and measures every tensor's error; and
convert_hf_to_gguf.py to BF16, then llama-quantize without importance. Checkpoints are synthetic, of
published shapes (text alone), or `--model`. Each row is one measure: seconds, peak memory (the peer's larger
one), bytes written and, of ours alone, read by the processes' own calls (pages that llama.cpp maps are no
reads). Kernels are compiled before, and that is not counted. Where two numbers of threads are measured, a
row has how much faster the larger one is.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from measuring import MEASURES, OURS, Ran, Row, Spread, arguments, child, limits, report, value_row
from peer import Peer, find_peer

from bitsmith.lab.models import DEMO_MODEL
from bitsmith.lab.synth import synth

BITSMITH = (sys.executable, "-m", "bitsmith.cli.main")
PEER = "convert_hf_to_gguf + llama-quantize"

Runs = dict[str, list[list[Ran]]]
"""By side: of each round, the commands that it took."""


def ours(model: Path, folder: Path, type_name: str, threads: int) -> list[Ran]:
    """Compress in one command."""
    out = folder / "ours.gguf"
    words = (*BITSMITH, "compress", model, "-o", out, "--type", type_name, "--overwrite", "--quiet")
    return [child([*words, "--threads", str(threads)], threads=threads)]


def theirs(peer: Peer, model: Path, folder: Path, type_name: str, threads: int) -> list[Ran]:
    """Convert and quantize in two commands; the file between them is deleted."""
    base, out = folder / "base.gguf", folder / "theirs.gguf"
    environment = {"OMP_NUM_THREADS": str(threads)}
    try:
        return [
            child(peer.convert_command(model, base), env=environment, threads=threads),
            child(peer.quantize_command(base, out, type_name), env=environment, threads=threads),
        ]
    finally:
        for path in (base, out):
            path.unlink(missing_ok=True)


def in_turns(
    peer: Peer | None, model: Path, folder: Path, type_name: str, threads: int, repeats: int
) -> Runs:
    """Let both sides take turns, the other one first in every other round."""
    sides = {OURS: lambda: ours(model, folder, type_name, threads)}
    if peer is not None:
        sides[PEER] = lambda: theirs(peer, model, folder, type_name, threads)
    found: Runs = {name: [] for name in sides}
    for number in range(repeats):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            found[name].append(sides[name]())
            print(f"{model.name} {type_name} {threads} threads, {name}: {_seconds(found[name][-1]):.1f} s",
                  file=sys.stderr, flush=True)  # fmt: skip
    return found


def _seconds(commands: Sequence[Ran]) -> float:
    return sum(one.seconds for one in commands)


def measured(runs: Runs, key: str) -> dict[str, Spread]:
    """Return a measure of each side: the sum over its commands, of the peak the largest."""
    found = {}
    for name, rounds in runs.items():
        values = [[getattr(one, key) for one in commands] for commands in rounds]
        if all(value is not None for one in values for value in one):
            found[name] = Spread.of(max(one) if key == "peak_bytes" else sum(one) for one in values)
    return found


def rows_of(
    case: str, runs: Runs, source_bytes: int, known: Mapping[str, Any], **facts: Any
) -> Iterator[Row]:
    """Yield a row for each measure; the time's limit is reading the source from the disk once."""
    for key, unit, words in MEASURES:
        sides = measured(runs, key)
        if OURS not in sides:
            continue
        more: dict[str, Any] = {"measure": words, "source_bytes": source_bytes, **facts}
        if key == "read_bytes":  # the peer maps most of what it reads
            sides = {OURS: sides[OURS]}
            more["times_the_source"] = sides[OURS].median / source_bytes
        limited = {"limit": known["disk_read"], "limit_amount": source_bytes} if key == "seconds" else {}
        yield value_row(f"{case}, {words}", unit, sides, **limited, **more)


def bytes_of(model: Path) -> int:
    """Return the bytes of a checkpoint's weights."""
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


def models(options: Any, folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the checkpoints by size, each made when its turn comes."""
    if options.model is not None:
        yield options.model.name, options.model
        return
    for size in options.sizes:
        yield size, synth(folder / f"synth-{size}", size, vision=False, planted=True)


def measure(options: Any, folder: Path, peer_of: Any, known: Mapping[str, Any]) -> Iterator[Row]:
    """Yield the rows of all sizes, types and numbers of threads."""
    for size, model in models(options, folder):
        nbytes = bytes_of(model)
        for type_name in options.types:
            alone: dict[int, float] = {}
            for threads in options.threads:
                ours(DEMO_MODEL, folder, type_name, threads)  # compiles
                runs = in_turns(peer_of(threads), model, folder, type_name, threads, options.repeats)
                alone[threads] = measured(runs, "seconds")[OURS].median
                case = f"{size} to {type_name}, {threads} threads"
                facts = {"size": size, "type": type_name, "threads": threads}
                yield from rows_of(case, runs, nbytes, known, **facts)
            if len(alone) > 1:
                few, many = min(alone), max(alone)
                gain = {OURS: alone[few] / alone[many]}
                case = f"{size} to {type_name}: {many} threads over {few}"
                yield value_row(case, "times as fast", gain, better="higher", size=size, type=type_name)


def main() -> None:
    """Measure and report."""
    parser = arguments(__doc__)
    parser.add_argument("--sizes", nargs="+", default=["0.8B"])
    parser.add_argument("--model", type=Path, help="a checkpoint instead of synthetic ones")
    parser.add_argument("--types", nargs="+", default=["Q4_K_M", "IQ4_XS"])
    parser.add_argument("--threads", type=int, nargs="+", default=[os.cpu_count() or 1])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--llama-bin", type=Path, help="folder of the tools; default: built and cached")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--folder", type=Path, help="where checkpoints and outputs are put, and deleted")
    options = parser.parse_args()

    def peer_of(threads: int) -> Peer | None:
        return None if options.no_peer else find_peer(options.llama_bin, threads)

    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        known = limits("disk_read", folder=Path(place))
        rows = list(measure(options, Path(place), peer_of, known))
    protocol = {
        "statement": (
            "BF16 checkpoints to a finished GGUF, commands in turns on the first cores; the peer is "
            "convert_hf_to_gguf.py to BF16 and then llama-quantize, both without importance."
        ),
        "repeats": options.repeats,
        "threads": options.threads,
    }
    report("compress", protocol, rows, known, out=options.out)


if __name__ == "__main__":
    main()
