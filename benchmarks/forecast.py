"""What `--dry-run` predicts against what the run takes: wall time, peak memory, bytes on the disk and read.

    python benchmarks/forecast.py [--sizes 0.8B 2B 4B] [--layers 4] [--commands compress assay]
        [--repeats 3] [--earlier FILE] [--out FILE]

Each command is a process of its own, first with `--dry-run --json`, then for real, in turns `--repeats`
times. A ratio is measured over predicted: 1 is exact, `within` says whether it lies in the promised interval;
what a forecast calls unmeasured has none. Without `--folder` synthetic checkpoints are made and thrown away,
one size at a time. `--earlier` keeps the rows of a result that are not measured again.
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
COMPRESSED = {
    "compress": ("out.gguf", "--type", "Q4_K_M"),
    "iq4": ("out.gguf", "--type", "IQ4_XS"),
    "transforms": ("out.gguf", "--type", "Q4_K_M", "--transforms", "gauge,permute,rotate"),
    "feedback": ("out.gguf", "--type", "Q4_K_M", "--no-sequential"),
    "cellm": ("out.cellm", "--type", "i4"),
    "W4A16": ("packed", "--type", "W4A16"),
    "NF4": ("packed", "--type", "NF4"),
    "factored": ("packed", "--type", "SVD+INT4:bpw=4.5"),
}
CALIBRATED = {
    "saliency": ("statistics",),
    "moments": ("statistics", "--no-saliency"),
    "imatrix": ("imatrix.gguf",),
}
ASSAYED: dict[str, tuple[str, ...]] = {"assay": (), "sampled": ("--sample", "1")}
COMMANDS = (*COMPRESSED, *CALIBRATED, *ASSAYED, "evaluate")
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
    chunks = ["--text", folder / "calibration.txt", "--chunks", str(args.chunks)]
    if command in COMPRESSED:
        name, *options = COMPRESSED[command]
        if command == "feedback":
            options += ["--stats", _before("moments", model, folder, args)]
        return ["compress", model, "-o", folder / name, *options], folder / name
    if command in CALIBRATED:
        name, *options = CALIBRATED[command]
        return ["calibrate", model, "-o", folder / name, *chunks, *options], folder / name
    if command in ASSAYED:
        chosen = ["--match", args.match] if args.match and command == "assay" else []
        return ["assay", model, "-o", folder / "assay", *ASSAYED[command], *chosen], folder / "assay"
    return ["evaluate", model, _before("compress", model, folder, args), *chunks], None


def _before(command: str, model: Path, folder: Path, args: argparse.Namespace) -> Path:
    """Return what a command leaves, made once for a model."""
    kept = folder / f"before-{model.name}"
    kept.mkdir(exist_ok=True)
    words, left = words_of(command, model, folder, args)
    made = kept / left.name if left is not None else kept
    if not made.exists():
        child([*BITSMITH, *[made if word == left else word for word in words]])
    return made


def once(words: list[Any], left: Path | None, told: Path) -> tuple[Json, Ran, Ran, int]:
    """Predict and run; return the forecast, both processes, and the bytes left on the disk."""
    foretold = child([*BITSMITH, *words, "--dry-run", "--json", told])
    found = json.loads(told.read_text())
    forecast = found.get("forecast", found) or {}
    ran = child([*BITSMITH, *words])
    if left is None:
        return forecast, foretold, ran, 0
    size = left.stat().st_size if left.is_file() else sum(f.stat().st_size for f in left.rglob("*"))
    for path in left.parent.glob(f"{left.name}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return forecast, foretold, ran, size


def rows_of(size: str, command: str, model: Path, folder: Path, args: argparse.Namespace) -> Iterator[Row]:
    """Yield a row for each measure of one command on one model."""
    words, left = words_of(command, model, folder, args)
    runs = [once(words, left, folder / "told.json") for _ in range(args.repeats)]
    forecasts = [forecast for forecast, _, _, _ in runs]
    beside: Json = {
        "parts": [{part["name"]: part["seconds"] for part in one.get("parts", ())} for one in forecasts],
        "processor seconds": [ran.cpu_seconds for _, _, ran, _ in runs],
        "seconds of the dry run": [foretold.seconds for _, foretold, _, _ in runs],
        "seconds of calibration": [one.get("calibrated_seconds") for one in forecasts],
        "unmeasured": [one.get("unmeasured", []) for one in forecasts],
    }
    for key, (name, unit, field) in MEASURES.items():
        found = [(forecast.get(key), getattr(ran, field)) for forecast, _, ran, _ in runs]
        yield _row(size, command, name, unit, found, beside if key == "seconds" else {})
    if left is not None:
        yield _row(size, command, "output", "bytes", [(f.get("output_bytes"), n) for f, _, _, n in runs], {})
    print(_summary(size, command, runs), file=sys.stderr, flush=True)


def _summary(size: str, command: str, runs: list[tuple[Json, Ran, Ran, int]]) -> str:
    said = []
    for forecast, foretold, ran, _ in runs:
        told = {name: forecast[key] for key, (name, _, _) in MEASURES.items() if forecast.get(key)}
        real = {name: getattr(ran, field) for name, _, field in MEASURES.values()}
        over = ", ".join(f"{name} {real[name] / value:.2f}" for name, value in told.items() if real[name])
        said.append(
            f"{over}; {ran.seconds:.1f} s, {ran.cpu_seconds:.1f} s of processor time, "
            f"dry run {foretold.seconds:.1f} s"
        )
    return f"{size}: {command}: measured over predicted: " + " | ".join(said)


def _row(
    size: str,
    command: str,
    measure: str,
    unit: str,
    found: list[tuple[float | None, float | None]],
    beside: Json,
) -> Row:
    known = [(told, real) for told, real in found if told and real]
    sides = {OURS: Spread.of(real or 0 for _, real in found)}
    facts: Json = {"size": size, "step": command, "measure": measure}
    if known:
        sides[PREDICTED] = Spread.of(told for told, _ in known)
        over = Spread.of(real / told for told, real in known)
        facts |= {"measured over predicted": over.to_json(), "within": 0.7 <= over.median <= 1.3}
    return value_row(f"{size}: {command}, {measure}", unit, sides, better="equal", **facts, **beside)


def run_all(args: argparse.Namespace, folder: Path) -> Json:
    """Measure all commands on all sizes and report."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = str(4 * 512 * (args.chunks + 1))
    if not (folder / "calibration.txt").exists():
        child([sys.executable, Path(__file__).with_name("texts.py"), folder, "--tokens", tokens])
    rows: list[Row] = []
    for size in args.sizes:
        end = f"-{args.layers}" if args.layers else ""
        model = (args.models or folder) / f"qwen3.5-{size.lower()}{end}"
        made = not model.exists()
        if made:
            cut = ["--layers", str(args.layers)] if args.layers else []
            child([*BITSMITH, "lab", "synth", f"qwen3.5-{size.lower()}", "-o", model, *cut])
        name = f"{size}, {args.layers} layers" if args.layers else size
        for command in args.commands:
            rows += rows_of(name, command, model, folder, args)
        if made and args.folder is None:
            shutil.rmtree(model)
    kept = _earlier(args.earlier, {row.case for row in rows})
    sizes = dict.fromkeys(row.facts["size"] for row in [*kept, *rows])
    protocol = {
        "statement": "Each command predicted by its --dry-run, then run, in turns, on synthetic checkpoints "
        f"of {'; '.join(sizes)}; caches as they were.",
        "matrices of the full assay": args.match or "all",
        "chunks of 512 tokens": args.chunks,
        "repeats": args.repeats,
    }
    return report("forecast", protocol, [*kept, *rows], out=args.out)


def _earlier(file: Path | None, measured: set[str]) -> list[Row]:
    """Return the rows of an earlier result that have not been measured again."""
    if file is None or not file.exists():
        return []
    found = json.loads(file.read_text(encoding="utf-8"))["rows"]
    return [Row(**row) for row in found if row["case"] not in measured]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sizes", nargs="+", default=["0.8B", "2B", "4B"])
    parser.add_argument("--layers", type=int, help="layers of the checkpoints; default as published")
    parser.add_argument("--commands", nargs="+", default=["compress"], choices=COMMANDS)
    parser.add_argument("--match", help="matrices of the full assay; default all")
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keeps checkpoints")
    parser.add_argument("--models", type=Path, help="folder of checkpoints named qwen3.5-SIZE[-LAYERS]")
    parser.add_argument("--earlier", type=Path, help="a result whose other rows are kept")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        run_all(args, args.folder or Path(temporary))


if __name__ == "__main__":
    main()
