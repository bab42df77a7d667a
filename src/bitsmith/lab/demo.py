"""The whole road once, on the bundled tiny Qwen3.5: compress, evaluate against the original, generate."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from bitsmith.lab.corpus import write_held_out_text
from bitsmith.lab.models import DEMO_MODEL
from bitsmith.progress import Progress, silent
from bitsmith.run.evaluate import evaluate
from bitsmith.run.evaluation import Evaluation
from bitsmith.run.execute import Record, compress
from bitsmith.run.generate import generate

PROMPT = "def __init__(self, name, value):\n"
_TEXT_BYTES = 60_000


@dataclass(frozen=True)
class Demo:
    """What the demo made: record, evaluation, and a sample of its text (None without llama.cpp)."""

    out: Path
    record: Record
    evaluation: Evaluation
    prompt: str
    sample: str | None
    seconds: float


def demo(out: Path, type_name: str = "Q4_K_M", progress: Progress = silent) -> Demo:
    """Compress the bundled model to `type_name`, evaluate it on held-out text, generate.

    Writes `demo-<type>.gguf`, `held_out.txt`, `record.json` and `evaluation.json` over earlier ones in `out`.
    Generation runs when the `llama` extra is installed; otherwise `sample` is None.
    """
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    gguf = out / f"demo-{type_name}.gguf"
    record = compress(DEMO_MODEL, gguf, type_name, overwrite=True, progress=progress)
    text = write_held_out_text(out / "held_out.txt", _TEXT_BYTES, overwrite=True)
    evaluation = evaluate(DEMO_MODEL, gguf, text, progress=progress)
    sample = generate(gguf, PROMPT, 48) if find_spec("xllamacpp") else None
    for name, result in (("record", record.to_json()), ("evaluation", evaluation.to_json())):
        (out / f"{name}.json").write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", "utf-8")
    return Demo(out, record, evaluation, PROMPT, sample, time.monotonic() - started)
