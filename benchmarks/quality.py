"""Mean KLD of bitsmith's files over llama-quantize's with llama-imatrix: same types, same calibration text.

    python benchmarks/quality.py [--model PATH]... [--types Q2_K Q4_K ...] [--rounders gptq ...] [--mixes]

For each model (default: the bundled one), type and rounder, both sides quantize the same 16-bit weights to
one type, token embedding Q8_0, ssm_alpha and ssm_beta F32, from statistics of the same text; every tensor's
type must agree, or the run fails. Rounders: nearest, weighted, gptq, auto and auto-tune (`--rounder auto
--tune`), or plain (no statistics). With `--mixes` also `--recipe auto` in no more bytes than llama-quantize's
own mixes with imatrix. Each file is judged on held-out text of the calibration kind and on prose unlike it
(`--unlike FILE` for another), by real llama-perplexity and by bitsmith: see `judge.py` for what the two say,
`texts.py` for the texts.

A work folder keeps every file and every judgement by digest: a second run does only what is new. Files of
ours are made again when bitsmith's sources have changed, unless `--keep`. The peer is built when
`--llama-bin` names none (`peer.py`). The table goes to stdout, all of it to `--out FILE` as JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFReader
from judge import OWN, Judge, Window, own_figures, paired_ratios, printed_ratios
from measuring import OURS, Row, Spread, arguments, report
from peer import CACHE, RUN_OPTIONS, SDIST, Peer, find_peer, run, sha256_of
from texts import write_texts

import bitsmith
from bitsmith.lab.models import DEMO_MODEL

TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")
ROUNDERS = ("nearest", "weighted", "gptq", "auto", "auto-tune")
MIXES = ("Q2_K", "Q3_K_M", "IQ4_XS", "Q4_K_M", "Q5_K_M")
EMBEDDING = "Q8_0"
PEER = "llama-quantize"
SSM = ("ssm_alpha", "ssm_beta")
BITSMITH = (sys.executable, "-m", "bitsmith.cli.main")

Json = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What all models share."""

    work: Path
    peer: Peer
    calibration: Path
    calibration_chunks: int
    windows: dict[str, Window]
    ctx_tokens: int
    head: bool
    keep: bool


@dataclass(frozen=True)
class Made:
    """A file, the command that made it, and how long that took."""

    path: Path
    command: str
    seconds: float


class Bench:
    """One model: its export, both sides' statistics and files, in a folder named by the model's digest."""

    def __init__(self, model: Path, setting: Setting) -> None:
        self.model, self.setting = model, setting
        calibration = f"{sha256_of(setting.calibration)}{setting.ctx_tokens}{setting.calibration_chunks}"
        key = hashlib.sha256((sha256_of(model) + calibration).encode()).hexdigest()
        self.folder = setting.work / f"{model.name}-{key[:12]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.base = self._ours("base-BF16.gguf", ["compress", model, "--type", "BF16"], for_ever=True)
        self.judge = Judge(self.base.path, self.folder / "judged", setting.peer)

    def overrides(self) -> list[str]:
        """Name the SSM tensors the model has; an override that changes nothing is refused."""
        names = [tensor.name for tensor in GGUFReader(self.base.path).tensors]
        return [part for part in SSM if any(part in name for name in names)]

    def peers_pure(self, type_name: str) -> Made:
        """Make llama-quantize's file of one type."""
        return self._peers(
            f"peer-pure-{type_name}.gguf",
            type_name,
            embedding=EMBEDDING,
            tensor_types={**dict.fromkeys(self.overrides(), "F32"), "weight": type_name},
        )

    def peers_mix(self, mix: str) -> Made:
        """Make llama-quantize's file of one of its mixes."""
        return self._peers(f"peer-mix-{mix}.gguf", mix)

    def our_pure(self, type_name: str, rounder: str) -> Made:
        """Make our file of one type."""
        words: list[str | Path] = ["compress", self.model, "--type", type_name, "--pure"]
        words += ["--tensor-type", f"token_embd={EMBEDDING}"]
        words += [word for part in self.overrides() for word in ("--tensor-type", f"{part}=F32")]
        return self._ours(f"ours-pure-{type_name}-{rounder}.gguf", words + self._rounding(rounder))

    def our_mix(self, mix: str, rounder: str, target_bytes: int) -> Made:
        """Make our file of at most `target_bytes`."""
        words: list[str | Path] = ["compress", self.model, "--recipe", "auto", "--target", f"{target_bytes}B"]
        return self._ours(f"ours-mix-{mix}-{rounder}.gguf", words + self._rounding(rounder))

    def _rounding(self, rounder: str) -> list[str | Path]:
        if rounder == "plain":
            return []
        name, _, tune = rounder.partition("-")
        tail = ["--tune"] if tune else []
        return ["--stats", self._statistics().path, "--rounder", name, *tail]

    def _statistics(self) -> Made:
        setting = self.setting
        words: list[str | Path] = ["calibrate", self.model, "--text", setting.calibration]
        sizes = ["--ctx", str(setting.ctx_tokens), "--chunks", str(setting.calibration_chunks)]
        return self._ours("stats", words + sizes, for_ever=setting.keep)

    def _imatrix(self) -> Made:
        def make(out: Path) -> Any:
            setting = self.setting
            sizes = (setting.ctx_tokens, setting.calibration_chunks)
            return setting.peer.imatrix(self.base.path, setting.calibration, out, *sizes, head=setting.head)

        return self._made("imatrix-head.gguf" if self.setting.head else "imatrix.gguf", make, "")

    def _peers(self, name: str, type_name: str, **options: Any) -> Made:
        imatrix = self._imatrix().path

        def make(out: Path) -> Any:
            return self.setting.peer.quantize(self.base.path, out, type_name, imatrix=imatrix, **options)

        asked = json.dumps([type_name, options])
        return self._made(f"head-{name}" if self.setting.head else name, make, asked)

    def _ours(self, name: str, words: list[str | Path], for_ever: bool = False) -> Made:
        def make(out: Path) -> Any:
            return run([*BITSMITH, *words, "-o", out, "--overwrite"])

        return self._made(name, make, "" if for_ever or self.setting.keep else _sources())

    def _made(self, name: str, make: Any, key: str) -> Made:
        """Return the kept file, or make it where it is missing or has another `key` (empty: any)."""
        path, note = self.folder / name, self.folder / f"{name}.json"
        known = json.loads(note.read_text()) if note.exists() and path.exists() else None
        if known is None or (key and known.get("key") != key):
            print(f"{self.model.name}: {name}", file=sys.stderr, flush=True)
            note.unlink(missing_ok=True)
            ran = make(path)
            known = {"key": key, "command": " ".join(ran.command), "seconds": ran.seconds}
            note.write_text(json.dumps(known))
        return Made(path, known["command"], known["seconds"])

    def compared(self, ours: Made, peers: Made) -> Json:
        """Judge both files on every text."""
        texts = {}
        for name, window in self.setting.windows.items():
            printed = {side: self.judge.by_llama(made.path, window) for side, made in _sides(ours, peers)}
            scores = {side: self.judge.by_bitsmith(made.path, window) for side, made in _sides(ours, peers)}
            texts[name] = {
                "llama_perplexity": {**printed, "ours_over_peer": printed_ratios(**_swapped(printed))},
                "bitsmith": {
                    **{side: own_figures(found) for side, found in scores.items()},
                    "ours_over_peer": paired_ratios(scores["ours"], scores["peer"]),
                },
            }
        return {"files": {side: _file(made) for side, made in _sides(ours, peers)}, "texts": texts}


def _swapped(printed: Json) -> Json:
    return {"ours": printed["ours"], "peers": printed["peer"]}


def _sides(ours: Made, peers: Made) -> list[tuple[str, Made]]:
    return [("peer", peers), ("ours", ours)]


def _file(made: Made) -> Json:
    types = _types(made.path)
    return {
        "command": made.command,
        "seconds": round(made.seconds, 2),
        "file_bytes": made.path.stat().st_size,
        "tensor_bytes": sum(int(tensor.n_bytes) for tensor in GGUFReader(made.path).tensors),
        "sha256": sha256_of(made.path),
        "tensors": {kind: list(types.values()).count(kind) for kind in sorted(set(types.values()))},
    }


def _types(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}


def check_same_types(ours: Path, peers: Path) -> None:
    """Exit, naming every difference, unless both files hold the same tensors in the same types."""
    mine, theirs = _types(ours), _types(peers)
    wrong = [
        f"{name}: ours {mine.get(name, 'missing')}, peer's {theirs.get(name, 'missing')}"
        for name in sorted({*mine, *theirs})
        if mine.get(name) != theirs.get(name)
    ]
    if wrong:
        raise SystemExit("\n".join([f"{ours} and {peers} differ in their tensors' types:", *wrong]))


def _sources() -> str:
    """Return the digest of bitsmith's sources, or of the release where they cannot be listed."""
    root = Path(bitsmith.__file__).parent
    files = sorted(root.rglob("*.py"))
    return hashlib.sha256("".join(sha256_of(file) for file in files).encode()).hexdigest()[:16]


def pure_rows(bench: Bench, types: list[str], rounders: list[str]) -> Iterator[Json]:
    """Yield every type and rounder at identical types."""
    for type_name in types:
        peers = bench.peers_pure(type_name)
        for rounder in rounders:
            ours = bench.our_pure(type_name, rounder)
            check_same_types(ours.path, peers.path)
            yield {"type": type_name, "rounder": rounder, **bench.compared(ours, peers)}


def mix_rows(bench: Bench, mixes: list[str], rounders: list[str]) -> Iterator[Json]:
    """Yield every mix against `--recipe auto` in no more bytes."""
    for mix in mixes:
        peers = bench.peers_mix(mix)
        for rounder in rounders:
            ours = bench.our_mix(mix, rounder, peers.path.stat().st_size)
            row = bench.compared(ours, peers)
            sizes = {side: file["file_bytes"] for side, file in row["files"].items()}
            yield {"type": mix, "rounder": rounder, "no_larger": sizes["ours"] <= sizes["peer"], **row}


HEADER = (
    f"{'type':8} {'rounder':10} {'text':7} {'peer KLD':>10} {'our KLD':>10} {'ratio':>6}"
    f" {'99.9 %':>6} {'Δ ln PPL':>9} {'Δ top-1':>8} | {'own KLD':>10} {'ratio':>6} {'95 % interval':>13}"
    f" {'99.9 %':>6}"
)


def print_row(row: Json) -> None:
    """Print a line for each text: llama-perplexity's figures left of the bar, bitsmith's own right of it."""
    for name, found in row["texts"].items():
        real, own = found["llama_perplexity"], found["bitsmith"]
        ratio, ours = real["ours_over_peer"], own["ours_over_peer"]
        mean, low, high = ours["mean_kld"]
        print(
            f"{row['type']:8} {row['rounder']:10} {name:7} {real['peer']['mean_kld']:10.6f}"
            f" {real['ours']['mean_kld']:10.6f} {ratio['mean_kld']:6.3f} {ratio['kld_99_9']:6.3f}"
            f" {ratio['ln_ppl']:+9.5f} {100 * ratio['top1']:+7.2f}% | {own['ours']['mean_kld'][0]:10.6f}"
            f" {mean:6.3f} {low:6.3f} {high:6.3f} {ours['kld_99_9'][0]:6.3f}"
            + ("" if row.get("no_larger", True) else "  LARGER FILE"),
            flush=True,
        )


def summary(rows: list[Json]) -> list[Json]:
    """Return, for each rounder and text, the geometric mean and the highest of both judges' ratios."""
    lines = []
    for rounder in dict.fromkeys(row["rounder"] for row in rows):
        for text in rows[0]["texts"]:
            line: Json = {"rounder": rounder, "text": text}
            for judge in ("llama_perplexity", "bitsmith"):
                found = [
                    row["texts"][text][judge]["ours_over_peer"]["mean_kld"]
                    for row in rows
                    if row["rounder"] == rounder
                ]
                values = [each[0] if isinstance(each, list) else each for each in found]
                mean = math.exp(sum(map(math.log, values)) / len(values))
                line[judge] = {"geometric_mean": mean, "highest": max(values), "rows": len(values)}
            lines.append(line)
    return lines


def print_summary(title: str, lines: list[Json]) -> None:
    for line in lines:
        real, own = line["llama_perplexity"], line["bitsmith"]
        print(
            f"{title}, {line['rounder']}, {line['text']}: mean-KLD ratio over {real['rows']} rows, geometric"
            f" mean {real['geometric_mean']:.3f} and highest {real['highest']:.3f} by llama-perplexity,"
            f" {own['geometric_mean']:.3f} and {own['highest']:.3f} by bitsmith"
        )


def measure(bench: Bench, args: argparse.Namespace) -> Json:
    """Measure one model and print its table."""
    print(f"\n{bench.model} ({bench.base.path.stat().st_size:,} bytes in BF16)\n{HEADER}", flush=True)
    record: Json = {"model": str(bench.model), "base": _file(bench.base)}
    kinds = {"pure": pure_rows(bench, args.types, args.rounders)}
    if args.mixes is not None:
        mixed = [name for name in args.rounders if name.startswith("auto")] or ["auto"]
        kinds["mixes"] = mix_rows(bench, args.mixes or list(MIXES), mixed)
    for kind, rows in kinds.items():
        record[kind] = []
        for row in rows:
            print_row(row)
            record[kind].append(row)
        if record[kind]:
            record[f"{kind}_summary"] = summary(record[kind])
            print_summary(kind, record[f"{kind}_summary"])
    return record


def settle(args: argparse.Namespace) -> Setting:
    """Write the texts, find the peer."""
    args.work.mkdir(parents=True, exist_ok=True)
    tokens = args.ctx * args.calibration_chunks, args.ctx * args.chunks
    texts = write_texts(args.work / "texts", *tokens)
    chosen = {"like": args.like or texts["like"], "unlike": args.unlike or texts["unlike"]}
    return Setting(
        work=args.work,
        peer=find_peer(args.llama_bin, args.threads),
        calibration=args.calibration or texts["calibration"],
        calibration_chunks=args.calibration_chunks,
        windows={name: Window(chosen[name], args.ctx, args.chunks) for name in args.texts},
        ctx_tokens=args.ctx,
        head=args.process_output,
        keep=args.keep,
    )


def protocol(setting: Setting) -> Json:
    """Return how everything was measured."""
    return {
        "statement": "Mean KL divergence from the 16-bit model in nats per token: both sides quantize the "
        "same weights to the same types by statistics of the same text; ranges are 95 % intervals.",
        "peer": f"{SDIST} {setting.peer.version()}",
        "peer_options": [*RUN_OPTIONS, *(["--process-output"] if setting.head else [])],
        "pure": f"token embedding {EMBEDDING}, {' and '.join(SSM)} F32, the rest one type; checked by tensor",
        "calibration": {
            "text_sha256": sha256_of(setting.calibration),
            "tokens": setting.ctx_tokens * setting.calibration_chunks,
            "ctx_tokens": setting.ctx_tokens,
        },
        "texts": {
            name: {
                "file": window.text.name,
                "text_sha256": sha256_of(window.text),
                "chunks_at_most": window.chunks,
                "ctx_tokens": window.ctx_tokens,
                "scored": "positions ctx/2 to ctx-2 of each chunk",
            }
            for name, window in setting.windows.items()
        },
        "units": "KLD and ln PPL in nats, top1 as a share, seconds of wall time",
        "intervals": "bitsmith: 95 % paired bootstrap over chunks; *_se: standard errors of llama-perplexity",
        "own_figures": list(OWN),
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", dest="models", type=Path, action="append", help="repeatable")
    parser.add_argument("--types", nargs="*", default=list(TYPES))
    parser.add_argument("--rounders", nargs="+", default=list(ROUNDERS), choices=[*ROUNDERS, "plain"])
    parser.add_argument("--mixes", nargs="*", help=f"names of mixes; none: {' '.join(MIXES)}")
    parser.add_argument("--texts", nargs="+", default=["like", "unlike"], choices=["like", "unlike"])
    parser.add_argument("--calibration", type=Path, help="default: the lab corpus's training split")
    parser.add_argument("--like", type=Path, help="default: its held-out split")
    parser.add_argument("--unlike", type=Path, help="default: prose of the installed packages")
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--calibration-chunks", type=int, default=200)
    parser.add_argument("--process-output", action="store_true", help="the peer's imatrix also of the head")
    parser.add_argument("--llama-bin", type=Path)
    parser.add_argument("--threads", type=int, help="of the peer's tools")
    parser.add_argument("--work", type=Path, default=CACHE / "quality")
    parser.add_argument("--keep", action="store_true", help="use files made by older sources")
    args = parser.parse_args()
    setting = settle(args)
    models = [model.resolve() for model in args.models or [Path(str(DEMO_MODEL))]]
    found = [measure(Bench(model, setting), args) for model in models]
    if args.out:
        rows = [row for model in found for row in rows_of(model)]
        report("quality", protocol(setting), rows, out=args.out)


def rows_of(found: Json) -> Iterator[Row]:
    """Yield the mean KLD of each file on each text by both judges."""
    for kind in ("pure", "mixes"):
        for row in found.get(kind, ()):
            for text, judged in row["texts"].items():
                words = f"{Path(found['model']).name}, {kind} {row['type']}, {row['rounder']}, {text} text"
                facts = {"files": row["files"], "no_larger": row.get("no_larger")}
                for judge in ("llama_perplexity", "bitsmith"):
                    one = judged[judge]
                    sides = {OURS: _spread(one["ours"]), PEER: _spread(one["peer"])}
                    ratio = one["ours_over_peer"]["mean_kld"]
                    yield Row(
                        f"{words}: mean KLD by {judge.replace('_', '-')}",
                        "nats",
                        "lower",
                        sides,
                        {PEER: _times_better(ratio)},
                        facts=facts | {"judged": one},
                    )


def _spread(figures: Json) -> Spread:
    """Return a mean KLD with its interval: ours, or two of llama-perplexity's standard errors."""
    mean = figures["mean_kld"]
    if isinstance(mean, list):
        return Spread(mean[0], mean[1], mean[2], 1)
    error = 1.96 * figures["mean_kld_se"]
    return Spread(mean, mean - error, mean + error, 1)


def _times_better(ratio: float | list[float]) -> Spread:
    """Return the peer's over ours of what is ours over the peer's."""
    if isinstance(ratio, list):
        return Spread(1 / ratio[0], 1 / ratio[2], 1 / ratio[1], 1)
    return Spread(1 / ratio, None, None, 1)


if __name__ == "__main__":
    main()
