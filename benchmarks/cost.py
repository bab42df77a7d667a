"""Time and peak memory of `bitsmith calibrate` and `compress --stats`, with a projection to 9B.

    python benchmarks/cost.py [--sizes 0.8B] [--layers 4] [--tokens 2048] [--rounders gptq ...] [--out FILE]

On the demo model (trained) and on synthetic checkpoints of Qwen3.5's shapes (text and MTP, random weights,
the first `--layers` layers; 0 for all). Every command is a process of its own. The model measured last is
scaled to Qwen3.5-9B: calibration by the multiplications of its matrix products and second moments at
`--project-tokens` tokens, compression by the sum over matrices of `out in²` (error feedback) and over sites
of `in³` (factors), memory by the bytes of the largest layer in float32 and of its second moments. A
projection is no measurement, and says so.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from measuring import OURS, Ran, Row, arguments, child, report, value_row

from bitsmith.archs import ARCHITECTURES
from bitsmith.archs.arch import TensorSpec
from bitsmith.archs.published import published_config
from bitsmith.lab.models import DEMO_MODEL

BITSMITH = (sys.executable, "-m", "bitsmith.cli.main")
CTX_TOKENS = 512
FULL = "9B"
KIND = "projection, not measured"

Json = dict[str, Any]


def matrices(config: Json) -> list[TensorSpec]:
    """Return the text matrices that read an activation site, a tied embedding as the head it is."""
    arch = ARCHITECTURES[config["model_type"]](config)
    specs = [
        replace(spec, site="head.in") if arch.tied and spec.role == "embed" else spec for spec in arch.specs()
    ]
    return [spec for spec in specs if spec.site and len(spec.gguf_shape) == 2 and not spec.float_only]


def work(config: Json) -> Json:
    """Return what time and memory are scaled by."""
    from bitsmith.run.gather import block_columns  # noqa: PLC0415  (torch: after all peaks are taken)

    found = matrices(config)
    widths = {spec.site: spec.shape[-1] for spec in found}
    moments = {site: width * block_columns(width, None) for site, width in widths.items()}
    layers: dict[int | None, float] = defaultdict(float)
    for spec in found:
        if spec.layer is not None:
            layers[spec.layer] += 4 * math.prod(spec.shape)
    for spec in {spec.site: spec for spec in found if spec.layer is not None}.values():
        layers[spec.layer] += 4 * moments[spec.site]
    weights = sum(math.prod(spec.shape) for spec in found)
    feedback = sum(math.prod(spec.shape) * block_columns(spec.shape[-1], None) for spec in found)
    factors = sum(width * block_columns(width, None) ** 2 for width in widths.values())
    return {
        "weights": weights,
        "calibrate_multiplications_per_token": weights + sum(moments.values()),
        "compress_multiplications": feedback + factors,
        "largest_layer_bytes": max(layers.values()),
    }


def measured(ran: Ran) -> Json:
    return ran.to_json() | {"peak_memory_bytes": ran.peak_bytes}


def measure(model: Path, text: Path, args: argparse.Namespace, folder: Path) -> Json:
    """Calibrate once, compress once for each rounder."""
    stats = folder / f"{model.name}-stats"
    chunks = max(2, args.tokens // CTX_TOKENS)
    sizes = ("--ctx", str(CTX_TOKENS), "--chunks", str(chunks))
    calibrated = child([*BITSMITH, "calibrate", model, "--text", text, *sizes, "-o", stats])
    record: Json = {
        "model": model.name,
        "checkpoint_bytes": sum(file.stat().st_size for file in model.glob("*.safetensors")),
        "tokens": chunks * CTX_TOKENS,
        "statistics_bytes": sum(file.stat().st_size for file in stats.rglob("*") if file.is_file()),
        "calibrate": measured(calibrated),
        "compress": {},
    }
    print(f"{model.name}: calibrate {calibrated.seconds:.1f} s", file=sys.stderr, flush=True)
    for rounder in args.rounders:
        out = folder / f"{model.name}.gguf"
        how = ("--type", args.type, "--stats", stats, "--rounder", rounder, "--overwrite")
        record["compress"][rounder] = measured(child([*BITSMITH, "compress", model, "-o", out, *how]))
        seconds = record["compress"][rounder]["seconds"]
        print(f"{model.name}: {rounder} {seconds:.1f} s", file=sys.stderr, flush=True)
        out.unlink()
    return record


def projection(small: Json, large: Json, tokens: int) -> Json:
    """Scale the larger model's times, and both models' peaks, to every layer of Qwen3.5-9B."""
    full = work(published_config(FULL, vision=False))
    per_token = large["calibrate"]["seconds"] / large["tokens"]
    work_ratio = {key: full[key] / large["work"][key] for key in full}
    gap = large["work"]["largest_layer_bytes"] - small["work"]["largest_layer_bytes"]

    def peak(of: Any) -> float:
        slope = max(0.0, (of(large) - of(small)) / gap) if gap > 0 else 1.0
        further = full["largest_layer_bytes"] - large["work"]["largest_layer_bytes"]
        return float(of(large) + slope * further)

    return {
        "kind": KIND,
        "from": large["model"],
        "to": f"Qwen3.5-{FULL} (text and MTP)",
        "rule": " ".join(__doc__.split()).split("scaled to Qwen3.5-9B: ")[1].split(" A projection")[0],
        "work": full,
        "calibrate": {
            "tokens": tokens,
            "hours": per_token * tokens * work_ratio["calibrate_multiplications_per_token"] / 3600,
            "peak_memory_bytes": peak(lambda side: side["calibrate"]["peak_memory_bytes"]),
        },
        "compress": {
            rounder: {
                "hours": found["seconds"] * work_ratio["compress_multiplications"] / 3600,
                "peak_memory_bytes": peak(
                    lambda side, name=rounder: side["compress"][name]["peak_memory_bytes"]
                ),
            }
            for rounder, found in large["compress"].items()
        },
    }


def synthetic(size: str, layers: int, folder: Path) -> tuple[Path, Json]:
    """Write a synthetic checkpoint, unless it is kept from before; return it and its configuration."""
    model = folder / f"synth-{size}-{layers or 'all'}"
    if not model.exists():
        options = ["--no-vision", *(["--layers", str(layers)] if layers else [])]
        child([*BITSMITH, "lab", "synth", model, "--size", size, *options])
    return model, published_config(size, vision=False, layers=layers or None)


def rows_of(runs: list[Json], projected: Json) -> Iterator[Row]:
    """Yield what each command took, and what is projected."""
    for run in runs:
        facts = {key: value for key, value in run.items() if key not in ("compress", "calibrate")}
        steps = {"calibrate": run["calibrate"]}
        steps |= {f"compress --rounder {name}": found for name, found in run["compress"].items()}
        for name, found in steps.items():
            for key, unit, words in (("seconds", "s", "wall time"), ("peak_bytes", "bytes", "peak memory")):
                more = {"size": run["model"], "step": name, "measure": words}
                yield value_row(f"{run['model']}: {name}, {words}", unit, {OURS: found[key]}, **more, **facts)
    for name, found in {"calibrate": projected["calibrate"], **projected["compress"]}.items():
        words = f"{projected['to']}: {name}, {KIND}"
        yield value_row(f"{words}, wall time", "hours", {KIND: found["hours"]}, **found)
        yield value_row(f"{words}, peak memory", "bytes", {KIND: found["peak_memory_bytes"]})


def run_all(args: argparse.Namespace, folder: Path) -> Json:
    """Measure all models and report."""
    folder.mkdir(parents=True, exist_ok=True)
    child([sys.executable, Path(__file__).with_name("texts.py"), folder, "--tokens", str(4 * args.tokens)])
    demo = Path(str(DEMO_MODEL))
    models = [(demo, json.loads((demo / "config.json").read_text()))]
    models += [synthetic(size, args.layers, folder) for size in args.sizes]
    runs = [measure(model, folder / "calibration.txt", args, folder) for model, _ in models]
    for record, (_, config) in zip(runs, models, strict=True):
        record["work"] = work(config)
    projected = projection(runs[0], runs[-1], args.project_tokens)
    protocol = {
        "statement": f"{args.type}, contexts of {CTX_TOKENS} tokens of the lab's training split.",
        "layers of synthetic models": args.layers,
        "tokens": args.tokens,
        "projection": projected,
    }
    return report("cost", protocol, list(rows_of(runs, projected)), out=args.out)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sizes", nargs="*", default=["0.8B"])
    parser.add_argument("--layers", type=int, default=4, help="of the synthetic models; 0: as published")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--project-tokens", type=int, default=102_400)
    parser.add_argument("--type", default="Q4_K_M")
    parser.add_argument("--rounders", nargs="+", default=["weighted", "gptq", "auto"])
    parser.add_argument("--folder", type=Path, help="keeps the synthetic checkpoints")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        run_all(args, args.folder or Path(temporary))


if __name__ == "__main__":
    main()
