"""What merging takes at published shapes, from layers of true size, and whether it grows with depth.

    python benchmarks/merge.py [--teacher qwen3-32B] [--student qwen3-4B] [--tokens 143360] [--folder DIR]
                               [--only cost pair plan fold growth] [--out FILE]

Weights are random. `cost` runs one layer of each kind with its moments out of models of full depth
(benchmarks/paired.py). The other steps use checkpoints on the disk with true widths and few layers: `pair`
pairs a layer of each and compares peak and disk with what is said before;
`plan` makes the merge's plan of that; `fold` folds one layer and rows of the vocabulary. `estimate` scales
them to all layers, tokens and the whole vocabulary. `growth` merges pairs of 1, 2 and 4 student layers
(twice as many in the teacher) by `bitsmith merge`, of moderate width, where a layer that is kept would show.

Each step runs in a process of its own; peaks stand beside the bound that was said.
`cpu_seconds` are the process's own, wall time depends on what else the machine does; nothing has intervals.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from measuring import OURS, Row, arguments, child, report, value_row
from texts import corpus_text

from bitsmith.archs.published import published_config
from bitsmith.lab.models import DEMO_MODEL
from bitsmith.lab.synth import synth_tensors
from bitsmith.passes.merge_axes import AxisMap
from bitsmith.passes.merge_fold import EndsMerge, LayerAlpha, LayerMerge, merged_view
from bitsmith.passes.merge_heads import Groups, HeadMap
from bitsmith.passes.merge_maps import ResidualMap
from bitsmith.passes.transform import Model, model_of
from bitsmith.run.merge_plan import merge_plan
from bitsmith.run.paired import paired
from bitsmith.run.paired_cost import paired_cost
from bitsmith.store import open_checkpoint
from bitsmith.store.paired import open_paired
from bitsmith.store.safetensors_writer import TensorData, write_safetensors

VOCABULARY = 8192
CTX, TRIED_TOKENS = 512, 6 * 512
MODERATE = ("qwen3-1.7B", "qwen3-0.6B")
DEPTHS = (1, 2, 4)
STEPS = ("cost", "pair", "plan", "fold", "growth")


def write_model(folder: Path, size: str, layers: int, seed: int) -> Path:
    """Write a model of a size's widths with few layers and a small vocabulary; weights are random."""
    if folder.exists():
        return folder
    config = published_config(size, vision=False, mtp=False, layers=layers) | {"vocab_size": VOCABULARY}
    tensors = synth_tensors(config, seed)
    names = ("tokenizer.json", "tokenizer_config.json")

    def stored(ref: Any) -> Iterator[Any]:
        for start, stop in ref.slices():
            yield (ref.read(start, stop).view(np.uint32) >> 16).astype(np.uint16)

    data = [TensorData(name, "BF16", ref.shape, stored(ref)) for name, ref in tensors.items()]
    write_safetensors(folder, data, config, files={name: (DEMO_MODEL / name).read_bytes() for name in names})
    return folder


def measured(*arguments: str | Path) -> dict[str, Any]:
    """Run this interpreter with `arguments`; return its JSON with peak memory, wall and CPU seconds."""
    ran = child([sys.executable, *arguments])
    text = ran.output[ran.output.find("{") :] if "{" in ran.output else "{}"
    found = json.loads(text) if arguments[0] != "-m" else {}
    return {
        **(found["rows"][0]["facts"] if "rows" in found else found),
        "peak_memory_bytes": ran.peak_bytes,
        "wall_seconds": round(ran.seconds, 1),
        "cpu_seconds": round(ran.cpu_seconds, 1),
    }


def pair(teacher: Path, student: Path, text: Path, out: Path) -> dict[str, Any]:
    """Pair two models of one layer each; return what is said of it before."""
    said = paired_cost(teacher, student, TRIED_TOKENS, ctx_tokens=CTX, measure=False)
    found = paired(teacher, student, text, out, tokens=TRIED_TOKENS, ctx_tokens=CTX, overwrite=True)
    return {"said": said.to_json(), "written_bytes": found.size_bytes}


def plan(teacher: Path, student: Path, out: Path) -> dict[str, Any]:
    """Plan a merge of one layer with one map for all; return CPU seconds of its parts."""
    profile = cProfile.Profile(time.process_time)
    with open_checkpoint(teacher) as big, open_checkpoint(student) as small:
        profile.runcall(merge_plan, open_paired(out), model_of(big), model_of(small))
    seconds: dict[str, float] = {}
    for (file, _, name), (_, _, _, spent, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        if "merge_" in file:
            seconds[f"{Path(file).stem}.{name}"] = seconds.get(f"{Path(file).stem}.{name}", 0) + spent
    return {"profile": {name: round(spent, 2) for name, spent in seconds.items() if spent >= 0.05}}


def fold(teacher: Path, student: Path) -> dict[str, Any]:
    """Fold a layer and the tables by a random orthonormal map and random choices; return CPU seconds."""
    random = np.random.default_rng(0)
    with open_checkpoint(teacher) as big, open_checkpoint(student) as small:
        theirs, ours = model_of(big), model_of(small)
        wide, narrow = (model.arch.number("hidden_size") for model in (theirs, ours))
        frame = np.linalg.qr(random.standard_normal((wide, narrow)))[0]
        one = ResidualMap(frame, frame, "random")
        del frame
        half = LayerAlpha(0.5, 0.5)
        layer = LayerMerge(0, one, one, one, *_inner(random, theirs, ours), (1.0, 1.0), half)
        view = merged_view(theirs, ours, {0: layer}, EndsMerge(one, one, 1.0, 0.5, 0.5))
        seconds = {
            name: _cpu(lambda ref=ref: [len(ref.read(*at)) for at in ref.slices()])
            for name, ref in view.items()
        }
    tables = [name for name in seconds if "layers." not in name]
    return {
        "layer": round(sum(spent for name, spent in seconds.items() if name not in tables), 2),
        "per_1000_rows_of_vocabulary": round(sum(seconds[name] for name in tables) / VOCABULARY * 1000, 3),
        "tensors": {name: round(spent, 2) for name, spent in seconds.items() if spent >= 0.01},
    }


def _inner(random: np.random.Generator, theirs: Model, ours: Model) -> tuple[HeadMap, AxisMap]:
    sizes = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    (q_t, k_t, n_t), (q_s, k_s, n_s) = ([one.arch.number(key) for key in sizes] for one in (theirs, ours))
    shared = np.sort(random.permutation(k_t)[:k_s])
    heads = (shared[:, None] * (q_t // k_t) + np.arange(q_s // k_s)).reshape(-1)
    groups = Groups(q_t, k_t), Groups(q_s, k_s)
    made = HeadMap(heads, heads, shared, *groups, ours.arch.head_dim, False, "random")
    return made, AxisMap.selecting(random.permutation(n_t)[:n_s], "random")


def _cpu(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def growth(folder: Path, text: Path) -> list[dict[str, Any]]:
    """Merge pairs of more and more layers by the command; return each one's peak."""
    runs = []
    for number, depth in zip(count(), DEPTHS, strict=False):
        teacher = write_model(folder / f"moderate-teacher-{2 * depth}", MODERATE[0], 2 * depth, number)
        student = write_model(folder / f"moderate-student-{depth}", MODERATE[1], depth, 10 + number)
        options = ("--tokens", "4096", "--ctx", "256", "--samples", "512", "--overwrite")
        command = ("-m", "bitsmith.cli.main", "merge", teacher, student, "--text", text)
        out = folder / f"moderate-{depth}"
        runs.append({"student_layers": depth, "teacher_layers": 2 * depth})
        runs[-1] |= measured(*command, "-o", out, "--alpha", "0.5", "--no-fallback", *options)
    return runs


def estimate(found: dict[str, Any], teacher: str, student: str, tokens: int) -> dict[str, Any]:
    """Scale what was measured to all layers, tokens and the vocabulary: CPU seconds of one core."""
    big, small = (published_config(size, vision=False, mtp=False) for size in (teacher, student))
    layers, vocab = small["num_hidden_layers"], small["vocab_size"]
    cost, steps = found["cost"], found["plan"]["profile"]
    quiet = min(1.0, cost["cpu_seconds"] / cost["wall_seconds"])
    places = steps.get("merge_plan._place", 0) / 2  # of one layer: in front of it and behind it
    seconds = {
        "pairing": cost["seconds"] * quiet,
        "map": steps.get("merge_mapping._global", 0),
        "plan": places * (layers + 1) + steps.get("merge_plan._layer", 0) * layers,
        "fold": found["fold"]["layer"] * layers + found["fold"]["per_1000_rows_of_vocabulary"] * vocab / 1000,
    }
    peaks = {step: found[step]["peak_memory_bytes"] for step in ("cost", "pair", "plan", "fold")}
    return {
        "teacher_layers": big["num_hidden_layers"],
        "student_layers": layers,
        "tokens": tokens,
        "cpu_seconds": {name: round(spent) for name, spent in seconds.items()},
        "cpu_hours": round(sum(seconds.values()) / 3600, 2),
        "cpu_share_of_wall_in_cost": round(quiet, 2),
        "peak_memory_bytes": max(peaks.values()),
        "peak_step": max(peaks, key=lambda step: peaks[step]),
        "memory_bound_bytes": cost["memory_bytes"],
        "disk_bytes": cost["disk_bytes"],
    }


def work(step: str, folder: Path, teacher: str, student: str) -> dict[str, Any]:
    """Do one step in this process."""
    big, small, text = folder / f"teacher-{teacher}", folder / f"student-{student}", folder / "text.txt"
    out = folder / f"paired-{teacher}-{student}"
    if step == "pair":
        return pair(big, small, text, out)
    return plan(big, small, out) if step == "plan" else fold(big, small)


def main() -> None:
    options = arguments(__doc__)
    options.add_argument("--teacher", default="qwen3-32B")
    options.add_argument("--student", default="qwen3-4B")
    options.add_argument("--tokens", type=int, default=143_360)
    options.add_argument("--folder", type=Path)
    options.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS))
    options.add_argument("--work", choices=STEPS, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.work:
        print(json.dumps(work(chosen.work, chosen.folder, chosen.teacher, chosen.student)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "text.txt").write_text(corpus_text(20_000, held_out=False))
        found = all_steps(chosen, folder)
    protocol = {
        "statement": "One layer of each of two published sizes, random weights, every step a process of its "
        "own; the estimate scales them to all layers, tokens and the vocabulary.",
        "teacher": chosen.teacher,
        "student": chosen.student,
        "tokens": chosen.tokens,
    }
    report("merge", protocol, list(rows_of(found)), out=chosen.out)


def rows_of(found: dict[str, Any]) -> Iterator[Row]:
    """Yield each step's peak and processor time, the estimate and the growth with depth."""
    for step in ("cost", "pair", "plan", "fold"):
        if step in found:
            facts = {key: value for key, value in found[step].items() if not isinstance(value, list)}
            peak = {OURS: found[step]["peak_memory_bytes"]}
            if step in ("cost", "pair"):
                said = found[step].get("said", found[step])
                peak["said"] = said["memory_bytes"]
            yield value_row(f"{step}: peak memory", "bytes", peak, better="equal", **facts)
            yield value_row(f"{step}: processor time", "s", {OURS: found[step]["cpu_seconds"]})
    if "estimate" in found:
        hours = found["estimate"]["cpu_hours"]
        yield value_row("estimate of a whole merge", "processor hours", {OURS: hours}, **found["estimate"])
    for one in found.get("growth", []):
        words = f"merging {one['teacher_layers']} layers into {one['student_layers']}: peak memory"
        yield value_row(words, "bytes", {OURS: one["peak_memory_bytes"]}, **one)


def all_steps(chosen: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Do what is asked, each step in a process of its own."""
    sizes = ("--teacher", chosen.teacher, "--student", chosen.student)
    found: dict[str, Any] = {"teacher": chosen.teacher, "student": chosen.student}
    if {"pair", "plan", "fold"} & set(chosen.only):
        write_model(folder / f"teacher-{chosen.teacher}", chosen.teacher, 1, 0)
        write_model(folder / f"student-{chosen.student}", chosen.student, 1, 1)
    for step in [step for step in STEPS if step in chosen.only]:
        if step == "growth":
            found[step] = growth(folder, folder / "text.txt")
        elif step == "cost":
            script = Path(__file__).with_name("paired.py")
            found[step] = measured(script, *sizes, "--tokens", str(chosen.tokens))
        else:
            found[step] = measured(__file__, "--work", step, "--folder", folder, *sizes)
        print(step, json.dumps(found[step]), file=sys.stderr)
    if {"cost", "plan", "fold", "pair"} <= found.keys():
        found["estimate"] = estimate(found, chosen.teacher, chosen.student, chosen.tokens)
    return found


if __name__ == "__main__":
    main()
