"""What exact transforms change in the mean KLD of quantized files: types × transforms × rounders.

    python benchmarks/transforms.py [--models FOLDER ...] [--types Q2_K ...] [--rounders gptq ...]
                                    [--transforms auto ...] [--unlike FILE] [--out FILE] [--quick]

For each model (default: the bundled one) a file of one type is written for each set of transforms and each
rounder: token embedding and output head Q8_0, ssm_alpha and ssm_beta F32, the rest that type. Statistics
come from the lab corpus's training split, in `--work` (kept for the next run); they solve the transforms,
whatever the rounder, and `auto` chooses on the part of them that is held out. Files are judged on other text:
the corpus's held-out split (`like`) and prose unlike it (`unlike`; `--no-unlike` leaves it out), by mean KLD
over positions ctx/2 to ctx-2 of each chunk, with 95 % bootstrap intervals over chunks; `ratio` is that over
the file without transforms, paired. A rotation needs an output head of its own and no MTP: where a model has
those otherwise, `none, untied` is the file to compare with, as large.

Rows are kept in `--work` as they are measured, so a run can be stopped and go on. Every row also has the
chunks' mean KLDs, to pair any two. The table goes to stdout, all of it to `--out FILE` as JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from measuring import OURS, Row, Spread, arguments, report
from peer import CACHE, sha256_of
from texts import write_texts

from bitsmith.lab.models import DEMO_MODEL
from bitsmith.numerics.divergence import Estimate, TokenScores, estimates
from bitsmith.passes.transform import Model, model_of
from bitsmith.run.calibrate import calibrate
from bitsmith.run.evaluate import open_model, text_chunks
from bitsmith.run.execute import Record
from bitsmith.run.forward import TextModel, compare, final_hidden_states
from bitsmith.run.job import Job, run
from bitsmith.store import open_checkpoint

TYPES = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K")
ROUNDERS = ("gptq", "weighted", "nearest")
UNTIED = "none, untied"
TRANSFORMS = {
    "none": None,
    "gauge": "gauge",
    "permute": "permute",
    "rotate": "rotate",
    "gauge+permute": "gauge,permute",
    "rotate+gauge+permute": "rotate,gauge,permute",
    "auto": "auto",
    UNTIED: "untie,drop-mtp",
}
RESAMPLES = 2000

Json = dict[str, Any]


@dataclass
class Table:
    """The rows so far under one protocol, in a file of their own that is written after each."""

    folder: Path
    protocol: Json
    rows: list[Json] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Take up the rows of an earlier run under the same protocol."""
        digest = hashlib.sha256(json.dumps(self.protocol, sort_keys=True).encode()).hexdigest()
        self.path = self.folder / f"rows-{digest[:12]}.json"
        if self.path.exists():
            self.rows = json.loads(self.path.read_text())

    def add(self, row: Json) -> None:
        """Take a row and write all."""
        self.rows.append(row)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.rows, indent=1, allow_nan=False) + "\n")
        part.replace(self.path)

    def find(self, **wanted: str) -> Json | None:
        """Return the row with these values."""
        return next((row for row in self.rows if wanted.items() <= row.items()), None)


class Judge:
    """One model's reference states on each text, computed once."""

    def __init__(self, reference: TextModel, texts: dict[str, Path], ctx: int, chunks: int) -> None:
        self._reference, self._texts = reference, {}
        for name, text in texts.items():
            tokens, _ = text_chunks(reference, text, ctx, chunks)
            self._texts[name] = tokens, final_hidden_states(reference, tokens, ctx // 2)

    def scores(self, file: Path) -> dict[str, TokenScores]:
        """Return every scored token of each text (`chunks tokens`)."""
        found = {}
        with open_model(file) as model:
            for name, (tokens, states) in self._texts.items():
                half = tokens.shape[1] // 2
                other = final_hidden_states(model, tokens, half)
                flat = states.reshape(-1, states.shape[-1]), other.reshape(-1, other.shape[-1])
                scored = compare(self._reference, model, flat, tokens[:, half + 1 :].reshape(-1))
                found[name] = scored.reshape(len(tokens))
        return found


def figures(scores: TokenScores) -> Json:
    """Return value and 95 % interval of the measures of one file on one text."""
    found = estimates(scores, RESAMPLES)
    shown = {name: _listed(found[name]) for name in ("mean_kld", "kld_99", "top1_agreement", "ppl_ratio")}
    return {**shown, "chunk_kld": scores.kld.mean(axis=1).tolist()}


def _listed(estimate: Estimate) -> list[float | None]:
    return [estimate.value, estimate.low, estimate.high]


def ratio(ours: Json, other: Json) -> list[float]:
    """Return the ratio of mean KLDs with its 95 % interval, chunks drawn alike for both."""
    top, bottom = np.array(ours["chunk_kld"]), np.array(other["chunk_kld"])
    count = len(top)
    draws = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    low, high = np.quantile((draws @ top) / (draws @ bottom), (0.025, 0.975))
    return [float(top.sum() / bottom.sum()), float(low), float(high)]


@dataclass(frozen=True)
class Bench:
    """One model with its statistics."""

    path: Path
    statistics: Path
    judge: Judge
    gguf_names: tuple[str, ...]
    needs_untying: bool

    def job(self, out: Path, type_name: str, rounder: str, asked: str | None) -> Job:
        """Return what makes one file."""
        head = "output.weight" in self.gguf_names or any(name in str(asked) for name in ("rotate", "untie"))
        kept = [("^token_embd", "Q8_0"), *([("^output.weight", "Q8_0")] if head else [])]
        kept += [
            (part, "F32") for part in ("ssm_alpha", "ssm_beta") if any(part in n for n in self.gguf_names)
        ]
        return Job(
            self.path,
            out,
            type_name,
            pure=True,
            tensor_types=tuple(kept),
            statistics=self.statistics,
            rounder=rounder,
            sequential=False,
            transforms=asked,
        )

    def measured(self, type_name: str, rounder: str, transforms: str) -> Json:
        """Write one file, judge it, and return its row without what names it."""
        with tempfile.TemporaryDirectory() as folder:
            out, started = Path(folder) / "out.gguf", time.monotonic()
            made = run(self.job(out, type_name, rounder, TRANSFORMS[transforms]))
            seconds = time.monotonic() - started
            texts = {name: figures(scores) for name, scores in self.judge.scores(out).items()}
            facts = {"file_bytes": out.stat().st_size, "seconds": round(seconds, 1)}
        return facts | _said(made) | {"texts": texts}


def _said(made: Record) -> Json:
    told = made.to_json()
    return {"applied": told["transforms"], "search": told.get("transform_search")}


def open_bench(path: Path, reference: TextModel, args: argparse.Namespace, texts: dict[str, Path]) -> Bench:
    """Calibrate if no earlier run did, and run the reference."""
    with open_checkpoint(path) as checkpoint:
        model: Model = model_of(checkpoint)
        digest = checkpoint.source_digest
        names = tuple(spec.gguf_name for spec, _ in model.tensors.values() if spec.gguf_name is not None)
        mtp = any(spec.component == "mtp" for spec, _ in model.tensors.values())
        tied = model.arch.tied
    text = texts["calibration"]
    key = f"{digest[:12]}-{sha256_of(text)[:12]}-{args.ctx}x{args.calibration_chunks}"
    statistics = args.work / f"statistics-{key}"
    if not statistics.exists():
        calibrate(path, text, statistics, ctx_tokens=args.ctx, chunks=args.calibration_chunks)
    judged = {name: text for name, text in texts.items() if name != "calibration"}
    return Bench(path, statistics, Judge(reference, judged, args.ctx, args.chunks), names, tied or mtp)


def measure(bench: Bench, args: argparse.Namespace, table: Table) -> None:
    """Measure what the table lacks of one model, type by type and rounder by rounder."""
    wanted = [name for name in args.transforms if name != UNTIED or bench.needs_untying]
    for type_name, rounder in ((t, r) for t in args.types for r in args.rounders):
        for transforms in wanted:
            named = {
                "model": bench.path.name,
                "type": type_name,
                "rounder": rounder,
                "transforms": transforms,
            }
            if table.find(**named) is None:
                table.add(named | bench.measured(type_name, rounder, transforms))
            for row in filter(None, [table.find(**named)]):
                print(*lines(row, table), sep="\n", flush=True)


def lines(row: Json, table: Table) -> Iterator[str]:
    """Yield the table's line of a row for each text."""
    keys = {name: row[name] for name in ("model", "type", "rounder")}
    plain = table.find(**keys, transforms="none")
    for text, found in row["texts"].items():
        value, low, high = found["mean_kld"]
        told = ""
        if plain is not None and plain is not row:
            told = "{:6.3f} {:6.3f} … {:5.3f}".format(*ratio(found, plain["texts"][text]))
        kept = "" if row["search"] is None else " ".join(row["search"]["applied"]) or "nothing"
        interval = f"{low:8.5f} … {high:8.5f}" if low is not None else f"{'unmeasured':>19}"
        print_row = f"{row['model']:14} {row['type']:7} {row['rounder']:9} {row['transforms']:21} {text:7}"
        yield f"{print_row} {value:9.5f} {interval} {told:23} {row['file_bytes']:>11,} {kept}"


HEADER = (
    f"{'model':14} {'type':7} {'rounder':9} {'transforms':21} {'text':7} {'mean KLD':>9}"
    f" {'95 % interval':>19} {'ratio to none':23} {'file bytes':>11} kept by auto"
)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--models", type=Path, nargs="+", default=[Path(str(DEMO_MODEL))])
    parser.add_argument("--types", nargs="+", default=list(TYPES))
    parser.add_argument("--rounders", nargs="+", default=list(ROUNDERS))
    parser.add_argument("--transforms", nargs="+", default=list(TRANSFORMS), choices=list(TRANSFORMS))
    parser.add_argument("--unlike", type=Path, help="default: prose of the installed packages")
    parser.add_argument("--no-unlike", action="store_true", help="judge on the held-out split alone")
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=24)
    parser.add_argument("--calibration-chunks", type=int, default=128)
    parser.add_argument("--quick", action="store_true", help="one type and rounder, few and short chunks")
    parser.add_argument("--work", type=Path, default=CACHE / "transforms")
    args = parser.parse_args()
    if args.quick:
        args.types, args.rounders, args.ctx, args.chunks = ["Q2_K"], ["weighted"], 128, 8
        args.calibration_chunks = 32
    args.work.mkdir(parents=True, exist_ok=True)
    written = write_texts(args.work / "texts", args.ctx * args.calibration_chunks, args.ctx * args.chunks)
    texts = {"calibration": written["calibration"], "like": written["like"]}
    if not args.no_unlike:
        texts["unlike"] = args.unlike or written["unlike"]
    table = Table(args.work, protocol(args, texts))
    print(HEADER, flush=True)
    for path in args.models:
        with open_model(path) as reference:
            measure(open_bench(path.resolve(), reference, args, texts), args, table)
    if args.out:
        report("transforms", table.protocol, list(rows_of(table)), out=args.out)


def rows_of(table: Table) -> Iterator[Row]:
    """Yield the mean KLD of each file on each text, beside that without transforms."""
    for row in table.rows:
        keys = {name: row[name] for name in ("model", "type", "rounder")}
        plain = table.find(**keys, transforms="none")
        for text, found in row["texts"].items():
            sides, ratios = {OURS: Spread(*found["mean_kld"], 1)}, {}
            if plain is not None and plain is not row:
                sides["none"] = Spread(*plain["texts"][text]["mean_kld"], 1)
                value, low, high = ratio(found, plain["texts"][text])
                ratios["none"] = Spread(1 / value, 1 / high, 1 / low, 1)
            words = ", ".join([*keys.values(), row["transforms"], f"{text} text: mean KLD"])
            yield Row(words, "nats", "lower", sides, ratios, facts=row)


def protocol(args: argparse.Namespace, texts: dict[str, Path]) -> Json:
    """Return how everything is measured."""
    return {
        "statement": "Files of one type with and without exact transforms, mean KL divergence from the model "
        "in nats per token; ranges are 95 % intervals, ratios paired.",
        "types": "token embedding and output head Q8_0, ssm_alpha and ssm_beta F32, the rest one type",
        "calibration": {"tokens": args.ctx * args.calibration_chunks, "ctx_tokens": args.ctx},
        "texts": {name: {"file": text.name, "sha256": sha256_of(text)} for name, text in texts.items()},
        "scored": f"positions ctx/2 to ctx-2 of at most {args.chunks} chunks of {args.ctx} tokens",
        "intervals": f"95 % bootstrap over chunks, {RESAMPLES} resamples; ratios paired",
        "units": "KLD in nats per token",
    }


if __name__ == "__main__":
    main()
