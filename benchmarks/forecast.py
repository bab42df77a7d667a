"""What `--dry-run` predicts against what the run takes: wall time, peak memory, bytes on the disk and read.

    python benchmarks/forecast.py [--sizes 0.8B 2B 4B] [--commands compress assay] [--repeats 3] [--out FILE]

Each command is a process of its own, first with `--dry-run --json`, then for real, in turns `--repeats`
times. A ratio is measured over predicted: 1 is exact, `within` says whether it lies in the promised interval.
Without `--folder` synthetic checkpoints are made and thrown away, one size at a time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measuring import OURS, Ran, Row, Spread, arguments, child, report, value_row

BITSMITH = (sys.executable, "-m", "bitsmith.cli.main")
PREDICTED = "predicted"
COMMANDS = ("compress", "iq4", "assay", "calibrate", "evaluate", "cellm", "folder")
MEASURES = {
    "seconds": ("wall time", "s", "seconds"),
    "peak_memory_bytes": ("peak memory", "bytes", "peak_bytes"),
    "read_bytes": ("bytes read", "bytes", "read_bytes"),
    "written_bytes": ("bytes written", "bytes", "written_bytes"),
}

Json = dict[str, Any]


def words_of(
    command: str, model: Path, folder: Path, args: argparse.Namespace
) -> tuple[list[Any], Path | None]:
    """Return a command line without `--dry-run`, and what it leaves."""
    text = folder / "calibration.txt"
    chunks = ["--text", text, "--chunks", str(args.chunks)]
    if command in ("compress", "iq4"):
        out = folder / "out.gguf"
        return ["compress", model, "-o", out, "--type", args.type if command == "compress" else "IQ4_XS"], out
    if command == "cellm":
        return ["compress", model, "-o", folder / "out.cellm", "--type", "i4"], folder / "out.cellm"
    if command == "folder":
        return ["compress", model, "-o", folder / "packed", "--type", "W4A16"], folder / "packed"
    if command == "assay":
        chosen = ["--match", args.match] if args.match else []
        return ["assay", model, "-o", folder / "assay", *chosen], folder / "assay"
    if command == "calibrate":
        return ["calibrate", model, "-o", folder / "statistics", *chunks], folder / "statistics"
    return ["evaluate", model, model, *chunks], None


def once(words: list[Any], left: Path | None, told: Path) -> tuple[Json, Ran, int]:
    """Predict and run; return both, and the bytes that the run left on the disk."""
    child([*BITSMITH, *words, "--dry-run", "--json", told])
    found = json.loads(told.read_text())
    forecast = found.get("forecast", found)
    ran = child([*BITSMITH, *words])
    if left is None:
        return forecast, ran, 0
    size = left.stat().st_size if left.is_file() else sum(f.stat().st_size for f in left.rglob("*"))
    for path in left.parent.glob(f"{left.name}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return forecast, ran, size


def rows_of(size: str, command: str, model: Path, folder: Path, args: argparse.Namespace) -> Iterator[Row]:
    """Yield a row for each measure of one command on one model."""
    words, left = words_of(command, model, folder, args)
    pairs = [once(words, left, folder / "told.json") for _ in range(args.repeats)]
    for key, (name, unit, field) in MEASURES.items():
        found = [(forecast[key], getattr(ran, field)) for forecast, ran, _ in pairs]
        yield _row(f"{size}: {command}, {name}", unit, found, [forecast for forecast, _, _ in pairs])
    if left is not None:
        yield _row(f"{size}: {command}, output", "bytes", [(f["output_bytes"], n) for f, _, n in pairs], [])
    seconds = [ran.seconds / forecast["seconds"] for forecast, ran, _ in pairs]
    print(f"{size}: {command}: measured over predicted {seconds}", file=sys.stderr, flush=True)


def _row(case: str, unit: str, found: list[tuple[float, float]], forecasts: list[Json]) -> Row:
    known = [(told, real) for told, real in found if told and real is not None]
    sides = {OURS: Spread.of(real for _, real in found)}
    facts: Json = {}
    if known:
        sides[PREDICTED] = Spread.of(told for told, _ in known)
        over = Spread.of(real / told for told, real in known)
        facts = {"measured over predicted": over.to_json(), "within": 0.7 <= over.median <= 1.3}
    if forecasts:
        facts["seconds of calibration"] = [one["calibrated_seconds"] for one in forecasts]
    return value_row(case, unit, sides, better="equal", **facts)


def run_all(args: argparse.Namespace, folder: Path) -> Json:
    """Measure all commands on all sizes and report."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = str(4 * 512 * (args.chunks + 1))
    child([sys.executable, Path(__file__).with_name("texts.py"), folder, "--tokens", tokens])
    rows: list[Row] = []
    for size in args.sizes:
        model = (args.models or folder) / f"qwen3.5-{size.lower()}"
        made = not model.exists()
        if made:
            child([*BITSMITH, "lab", "synth", f"qwen3.5-{size.lower()}", "-o", model])
        for command in args.commands:
            rows += rows_of(size, command, model, folder, args)
        if made and args.folder is None:
            shutil.rmtree(model)
    protocol = {
        "statement": "Each command predicted by its --dry-run, then run, in turns, on synthetic checkpoints "
        f"of {', '.join(args.sizes)}; caches as they were.",
        "type": args.type,
        "matrices assayed": args.match or "all",
        "chunks of 512 tokens": args.chunks,
        "repeats": args.repeats,
    }
    return report("forecast", protocol, rows, out=args.out)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sizes", nargs="+", default=["0.8B", "2B", "4B"])
    parser.add_argument("--commands", nargs="+", default=["compress"], choices=COMMANDS)
    parser.add_argument("--type", default="Q4_K_M")
    parser.add_argument("--match", help="matrices of the assay; default all")
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keeps checkpoints")
    parser.add_argument("--models", type=Path, help="folder of checkpoints named qwen3.5-SIZE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        run_all(args, args.folder or Path(temporary))


if __name__ == "__main__":
    main()
