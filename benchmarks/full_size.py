"""Checkpoints of published shapes from start to end: time, peak memory, bytes moved; llama.cpp on the same.

    python benchmarks/full_size.py --folder DIR [--sizes 0.8B 2B 9B] [--llama-bin DIR] [--threads 2]
        [--steps synth inspect ...] [--again STEP ...] [--model DIR] [--virtual] [--drop-source] [--out FILE]

For each size: write a synthetic checkpoint (`bitsmith lab synth`), inspect it, assay it (a sample of its
matrices, then all), compress it to Q4_K_M and IQ4_XS and by the recipe sbgq-iq4xs, each verified against its
source, and the same two types by llama.cpp: convert_hf_to_gguf.py to BF16, then llama-quantize. Every step is
a process of its own (Python's start and imports are in its time) on the first `--threads` cores; the
checkpoint's cached pages are dropped before each. Bytes are those of the process's own calls, and beside them
what storage moved; what llama.cpp reads by its calls is left out, as it maps most of it.

A step's figures are kept in `--folder` as it ends, so a run that was stopped goes on, and one that fails
does not stop the others; `--again` measures steps once more and keeps both. Outputs are deleted when no
later step needs them. The wall time of a run beside programs that took more than .3 of the processor time
is left out. The peer's BF16 file is as large as the checkpoint: `--drop-source` deletes the checkpoint then.
With `--virtual` weights are computed as they are read, and llama.cpp's tools, which cannot read those, are
left out. `--model` is a checkpoint that is there already. Kernels are compiled before, on the bundled model,
and that is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring import (
    MEASURES,
    OURS,
    ChildFailedError,
    Limit,
    Row,
    Spread,
    arguments,
    child,
    drop_cache,
    limits,
    report,
    value_row,
)
from peer import Peer, find_peer
from result import OthersShare, commit, now

from bitsmith.lab.models import DEMO_MODEL

BITSMITH = (sys.executable, "-m", "bitsmith.cli.main")
TYPES = ("Q4_K_M", "IQ4_XS")
SBGQ = "sbgq-iq4xs"
PEER = "llama.cpp"
CONVERT = "peer-convert"
BUSY = 0.3
"""Share of the processor time that other programs may take beside a run whose wall time counts."""

Json = dict[str, Any]
Words = list[str | Path]


@dataclass(frozen=True)
class Place:
    """Where one size's checkpoint, outputs and figures lie."""

    folder: Path
    size: str
    virtual: bool
    given: Path | None = None

    @property
    def model(self) -> Path:
        """Folder of the checkpoint."""
        return self.given or self.folder / f"synth-{self.size}"

    @property
    def base(self) -> Path:
        """The converter's output."""
        return self.folder / "peer-BF16.gguf"

    def out(self, name: str) -> Path:
        """Return what compress or the peer writes."""
        return self.folder / f"{name}.gguf"

    def kept(self, step: str) -> Path:
        """Return the file of a step's figures."""
        return self.folder / "steps" / f"{step}.json"

    def runs(self, step: str) -> list[Json]:
        """Return a step's figures so far."""
        kept = self.kept(step)
        return json.loads(kept.read_text()) if kept.exists() else []


@dataclass(frozen=True)
class Step:
    """A command by name; `reads` must be there before, `makes` after, `ends` is deleted when it is done."""

    name: str
    command: Words
    reads: Path | None = None
    makes: Path | None = None
    ends: tuple[Path, ...] = ()


def steps_of(place: Place, peer: Peer | None, options: argparse.Namespace) -> Iterator[Step]:
    """Yield all steps of one size in order."""
    model, virtual = place.model, ["--virtual"] if place.virtual else []
    if place.given is None:
        yield Step("synth", [*BITSMITH, "lab", "synth", model, "--size", place.size, *virtual], None, model)
    yield Step("inspect", [*BITSMITH, "inspect", model, "--json", place.folder / "inspect.json"], model)
    for name, extra in (("sampled", ("--sample", str(options.sample))), ("full", ())):
        out = place.folder / f"assay-{name}"
        yield Step(f"assay-{name}", [*BITSMITH, "assay", model, "-o", out, "--overwrite", *extra], model)
    for name, how in [(each, ["--type", each]) for each in TYPES] + [(SBGQ, ["--recipe", SBGQ])]:
        out = place.out(name)
        yield Step(
            f"compress-{name}",
            [*BITSMITH, "compress", model, "-o", out, *how, "--overwrite"],
            model,
            out,
        )
        yield Step(f"verify-{name}", [*BITSMITH, "verify", out, "--source", model], out, None, (out,))
    if peer is not None:
        ends = (model,) if options.drop_source else ()
        yield Step(CONVERT, peer.convert_command(model, place.base), model, place.base, ends)
        for name in TYPES:
            out = place.out(f"peer-{name}")
            ends = (out, place.base) if name == TYPES[-1] else (out,)
            command = peer.quantize_command(place.base, out, name)
            yield Step(f"peer-{name}", command, place.base, out, ends)


def compile_kernels(threads: int) -> None:
    """Compress the bundled model by each way that is measured, so that no measured run compiles."""
    print("compiling kernels", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for how in (*(("--type", name) for name in TYPES), ("--recipe", SBGQ)):
            out = Path(folder) / f"{how[1]}.gguf"
            child([*BITSMITH, "compress", Path(str(DEMO_MODEL)), "-o", out, *how], threads=threads)
            child([*BITSMITH, "verify", out], threads=threads)


def source_bytes(place: Place) -> int | None:
    """Return the bytes of the checkpoint's tensors, as `inspect` says."""
    said = place.folder / "inspect.json"
    return int(json.loads(said.read_text())["stored_bytes"]) if said.exists() else None


def perform(step: Step, place: Place, threads: int) -> Json:
    """Run a step and return its figures."""
    if step.reads is not None and not step.reads.exists():
        raise ChildFailedError(f"needs {step.reads}: measure the step that makes it with --again")
    if step.name == CONVERT and shutil.disk_usage(place.folder).free < (source_bytes(place) or 0) * 1.4:
        raise ChildFailedError(f"no room in {place.folder} for a BF16 GGUF and a quantized one")
    if step.reads is not None:
        drop_cache(step.reads)
    others = OthersShare()
    ran = child(step.command, threads=threads)
    made = step.makes
    found = ran.to_json() | {"finished": now(), "commit": commit(), "others_cpu_share": others.share()}
    if made is not None:
        files = [file for file in made.rglob("*") if file.is_file()] if made.is_dir() else [made]
        found["output_bytes"] = sum(file.stat().st_size for file in files)
    if step.name == "assay-full":
        found["said"] = ran.output[-2000:]
    return found


def delete(*paths: Path) -> None:
    """Delete outputs with what bitsmith writes beside them."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        for file in [path, *path.parent.glob(f"{path.name}.*")]:
            if file.is_file():
                file.unlink()


def needed(step: Step, todo: Sequence[Step]) -> bool:
    """Tell whether a later step that is still to do reads what a step would delete."""
    return any(later.reads in step.ends for later in todo)


def work(place: Place, options: argparse.Namespace, peer: Peer | None, failed: list[str]) -> Iterator[str]:
    """Do what has not been done of one size; yield the name of each step as it ends, note those that fail."""
    (place.folder / "steps").mkdir(parents=True, exist_ok=True)
    steps = [
        step
        for step in steps_of(place, peer, options)
        if (options.steps is None or step.name in options.steps)
        and (not place.runs(step.name) or step.name in options.again)
    ]
    for index, step in enumerate(steps):
        print(f"{place.size}: {step.name} …", end=" ", file=sys.stderr, flush=True)
        try:
            found = perform(step, place, options.threads)
        except ChildFailedError as error:
            print(f"failed: {error}", file=sys.stderr, flush=True)
            failed.append(f"{place.size}: {step.name}")
            continue
        place.kept(step.name).write_text(json.dumps([*place.runs(step.name), found], indent=1) + "\n")
        peak = found["peak_bytes"] / 1e6
        print(f"{found['seconds']:.1f} s, {peak:,.0f} MB", file=sys.stderr, flush=True)
        if not options.keep and not needed(step, steps[index + 1 :]):
            delete(*step.ends)
        yield step.name


# Rows of the result.


def spread(runs: Sequence[Json], key: str) -> Spread | None:
    """Return the spread of a figure; wall time of runs beside busy programs is not one."""
    if key == "seconds":
        runs = [run for run in runs if (run["others_cpu_share"] or 0.0) <= BUSY]
    values = [run[key] for run in runs if run.get(key) is not None]
    return Spread.of(values) if values else None


def sides_of(place: Place, name: str, key: str) -> dict[str, float | Spread]:
    """Return ours, and the peer's two steps together where it has them: the sum, or the higher peak."""
    found: dict[str, float | Spread] = {}
    ours = spread(place.runs(name), key)
    if ours is not None:
        found[OURS] = ours
    parts = [place.runs(CONVERT), place.runs(name.replace("compress", "peer"))]
    if name.startswith("compress") and all(parts) and key != "read_bytes":
        medians = [one.median for runs in parts if (one := spread(runs, key)) is not None]
        if len(medians) == len(parts):
            found[PEER] = max(medians) if key == "peak_bytes" else sum(medians)
    return found


STEP_MEASURES = (
    *MEASURES,
    ("disk_read_bytes", "bytes", "bytes storage read"),
    ("disk_written_bytes", "bytes", "bytes storage wrote"),
)


def rows_of(place: Place, steps: Sequence[str], known: dict[str, Limit]) -> Iterator[Row]:
    """Yield a row for each measure of each step."""
    source = source_bytes(place)
    for step in steps:
        if step.startswith("peer-"):
            continue
        for key, unit, words in STEP_MEASURES:
            sides = sides_of(place, step, key)
            if OURS not in sides:
                continue
            facts: Json = {"size": place.size, "step": step, "measure": words, "source_bytes": source}
            ours = sides[OURS]
            if source and key == "read_bytes" and isinstance(ours, Spread):
                facts["times_the_source"] = ours.median / source
            limited: Json = {}
            if key == "seconds" and source:
                name = "disk_write" if step == "synth" else "disk_read"
                limited = {"limit": known[name], "limit_amount": source}
            yield value_row(f"{place.size}: {step}, {words}", unit, sides, **limited, **facts)


def growth(places: Sequence[Place], step: str) -> Iterator[Row]:
    """Yield how a step's time and peak grow from the smallest size to the largest, per byte of the source."""
    done = [(place, source_bytes(place)) for place in places if place.runs(step)]
    sized = sorted(((source, place) for place, source in done if source), key=lambda one: one[0])
    if len(sized) < 2:
        return
    (small, first), (large, last) = sized[0], sized[-1]
    for key, words in (("seconds", "seconds per byte"), ("peak_bytes", "peak memory")):
        low, high = spread(first.runs(step), key), spread(last.runs(step), key)
        if low is None or high is None:
            continue
        scale = large / small if key == "seconds" else 1.0
        yield value_row(
            f"{step}: {words} of {last.size} over {first.size}'s",
            "ratio",
            {OURS: high.median / low.median / scale},
            better="equal",
            source_ratio=large / small,
        )


def result(options: argparse.Namespace, places: Sequence[Place], known: dict[str, Limit]) -> None:
    """Write the result of all that has been measured so far."""
    names = [step.name for step in steps_of(places[0], None, options)]
    rows = [row for place in places for row in rows_of(place, names, known)]
    rows += [row for step in names for row in growth(places, step)]
    for place in places:  # the peer's two steps by themselves
        for step in (CONVERT, *(f"peer-{name}" for name in TYPES)):
            for key, unit, words in STEP_MEASURES:
                found = spread(place.runs(step), key)
                if found is not None and key != "read_bytes":
                    facts = {"size": place.size, "step": step, "measure": words}
                    rows.append(value_row(f"{place.size}: {step}, {words}", unit, {PEER: found}, **facts))
    if not rows:
        return
    kept = [*names, CONVERT, *(f"peer-{name}" for name in TYPES)]
    runs = [run for place in places for step in kept for run in place.runs(step)]
    protocol = {
        "statement": (
            "Synthetic checkpoints of published shapes, BF16; each command a process of its own on the first "
            f"{options.threads} cores, after the checkpoint's cached pages are dropped. llama.cpp's time is "
            "that of convert_hf_to_gguf.py and llama-quantize together, its peak the higher one."
        ),
        "threads": options.threads,
        "virtual": options.virtual,
        "sampled matrices of each role": options.sample,
        "sizes": [place.size for place in places],
        "steps_commits": sorted({run["commit"] for run in runs}),
        "steps_finished": [min(run["finished"] for run in runs), max(run["finished"] for run in runs)],
        "steps_others_cpu_share": Spread.of(run["others_cpu_share"] or 0.0 for run in runs).to_json(),
    }
    report("full_size", protocol, rows, known, out=options.out)


def main() -> None:
    """Do the steps that have not been done, and write the result after each."""
    parser = arguments(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="checkpoints, outputs, finished steps")
    parser.add_argument("--sizes", nargs="+", default=["0.8B"])
    parser.add_argument("--steps", nargs="+", help="default: all")
    parser.add_argument("--again", nargs="+", default=[], metavar="STEP", help="measure once more")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--sample", type=int, default=1, help="matrices of each role in the sampled assay")
    parser.add_argument("--llama-bin", type=Path, help="folder of the tools; default: built and cached")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--model", type=Path, help="the checkpoint, of the one size")
    parser.add_argument("--virtual", action="store_true", help="weights computed as they are read")
    parser.add_argument("--drop-source", action="store_true", help="delete the checkpoint for the peer")
    parser.add_argument("--keep", action="store_true", help="delete no output")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a step ends with this process
    options.folder.mkdir(parents=True, exist_ok=True)
    peer = None if options.no_peer or options.virtual else find_peer(options.llama_bin, options.threads)
    known = limits("disk_read", "disk_write", "matrix", threads=options.threads, folder=options.folder)
    if options.model is not None and len(options.sizes) != 1:
        raise SystemExit("--model is a checkpoint of one size: name that one by --sizes")
    places = [Place(options.folder / size, size, options.virtual, options.model) for size in options.sizes]
    compile_kernels(options.threads)
    failed: list[str] = []
    for place in places:
        for _ in work(place, options, peer, failed):
            if options.out is not None:
                result(options, places, known)
    result(options, places, known)
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
