"""Evaluate and calibrate of a 0.8B shape, layers streamed, against transformers fully loaded and llama.cpp.

    python benchmarks/forward.py [--size 0.8B] [--chunks 4] [--ctx 512] [--repeats 2] [--llama-bin DIR]

A synthetic checkpoint without vision and MTP is written and exported to a BF16 GGUF; every side is a process
of its own that reads the same chunks of the lab's held-out text. bitsmith `evaluate` runs the checkpoint and
its GGUF and scores both, KL divergence too: tokens count every one that is forwarded through a model, its
weights are read from the page cache layer by layer in the seconds. transformers' perplexity loop runs one
model that it has loaded before its seconds begin, one chunk at a time, logits of the scored half alone, as
llama-perplexity (weights mapped, BF16) does after loading. `calibrate` gathers second moments without
saliency; transformers then does a forward alone, without head, gathering nothing, in its place. With
saliency, the default, transformers does a forward and `loss.backward()` to the embeddings of its tokens,
without gradients of weights, gathering nothing. imatrix is `calibrate` to a .gguf against llama-imatrix.
Peaks are the kernel's; a loaded BF16 model (one chunk) stands beside for memory alone, as its products are
emulated on most CPUs.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from measuring import OURS, Ran, Row, Spread, arguments, child, limits, rate_row, report, value_row
from peer import Peer, find_peer
from turns import Turns, alternate

from bitsmith.lab.corpus import held_out_text
from bitsmith.lab.synth import synth
from bitsmith.run.execute import compress

TRANSFORMERS, LLAMA = "transformers", "llama.cpp"

OURS_EVALUATE = """
import json, sys, time
from pathlib import Path
import transformers.models.qwen3_5.modeling_qwen3_5  # else imported within the seconds
from bitsmith.run.evaluate import evaluate
folder, gguf, text = map(Path, sys.argv[1:4])
ctx, chunks = map(int, sys.argv[4:6])
started = time.monotonic()
found = evaluate(folder, gguf, text, ctx, chunks)
print(json.dumps({"seconds": time.monotonic() - started, "ppl": found.ppl_ref.value,
                  "mean_kld": found.mean_kld.value}))
"""
OURS_CALIBRATE = """
import json, sys, time
from pathlib import Path
import transformers.models.qwen3_5.modeling_qwen3_5
from bitsmith.run.calibrate import calibrate
model, out, text = map(Path, sys.argv[1:4])
ctx, chunks = map(int, sys.argv[4:6])
started = time.monotonic()
saliency = sys.argv[6] == "saliency"
calibrate(model, text, out, ctx_tokens=ctx, chunks=chunks, saliency=saliency, overwrite=True)
print(json.dumps({"seconds": time.monotonic() - started}))
"""
THEIRS = """
import json, math, sys, time
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging
from bitsmith.run.evaluate import open_model, text_chunks
logging.set_verbosity_error()
folder, text = Path(sys.argv[1]), Path(sys.argv[3])
ctx, chunks, dtype, what = int(sys.argv[4]), int(sys.argv[5]), getattr(torch, sys.argv[6]), sys.argv[7]
with open_model(folder) as opened:
    tokens, _ = text_chunks(opened, text, ctx, chunks)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
scored, total = torch.arange(ctx // 2, ctx - 1), 0.0
model.requires_grad_(False)
started = time.monotonic()
with torch.inference_mode(what != "backward"):
    for row in tokens:
        ids = torch.from_numpy(row)[None]
        if what == "backward":
            inputs = model.get_input_embeddings()(ids).requires_grad_()
            logits = model(inputs_embeds=inputs, use_cache=False).logits[0]
            torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum").backward()
            continue
        if what == "forward":
            model.model(ids, use_cache=False)
            continue
        logits = model(ids, logits_to_keep=scored, use_cache=False).logits[0].float()
        total += torch.nn.functional.cross_entropy(logits, ids[0, ctx // 2 + 1 :], reduction="sum").item()
seconds = time.monotonic() - started
print(json.dumps({"seconds": seconds, "ppl": math.exp(total / (len(tokens) * len(scored)))}))
"""


class Sides:
    """What runs on one checkpoint; keeps every side's last answer and largest peak."""

    def __init__(self, folder: Path, size: str, ctx_tokens: int, chunks: int, peer: Peer) -> None:
        self.model, self.gguf, self.text = folder / "model", folder / "model.gguf", folder / "held_out.txt"
        self.folder, self.ctx, self.chunks, self.peer = folder, ctx_tokens, chunks, peer
        self.text.write_text(held_out_text(16 * ctx_tokens * chunks), encoding="utf-8")
        synth(self.model, size, mtp=False, vision=False)
        compress(self.model, self.gguf, "BF16")
        self.peaks: dict[str, list[int]] = {}
        self.answers: dict[str, dict[str, float]] = {}

    def python(self, name: str, script: str, second: Path, *more: str, ctx: int = 0, chunks: int = 0) -> Ran:
        """Run `script` in a process of its own; its seconds are those it says."""
        sizes = str(ctx or self.ctx), str(chunks or self.chunks)
        ran = child([sys.executable, "-c", script, self.model, second, self.text, *sizes, *more])
        answer = json.loads(ran.output.strip().splitlines()[-1])
        return self._kept(name, ran, answer)

    def tool(self, name: str, tool: str, *more: str | Path) -> Ran:
        """Run one of llama.cpp's tools; its seconds are those from when its log says it begins to the end.

        Its last lines can be missing (llama.cpp#22142), so that the log's end tells nothing.
        """
        options = ["-c", self.ctx, "-b", self.ctx, "--chunks", self.chunks, "-t", self.peer.threads]
        command = [self.peer.folder / tool, "-m", self.gguf, "-f", self.text, *options, "--no-repack", *more]
        ran = child([str(part) for part in command])
        answer = {"seconds": ran.seconds - _stamp(ran.output, r"over \d+ chunks")}
        found = re.search(r"Final estimate: PPL = ([\d.]+)", ran.output)
        return self._kept(name, ran, answer | ({"ppl": float(found[1])} if found else {}))

    def _kept(self, name: str, ran: Ran, answer: dict[str, float]) -> Ran:
        self.peaks.setdefault(name, []).append(ran.peak_bytes)
        self.answers[name] = answer
        return replace(ran, seconds=answer["seconds"])

    def peak(self, name: str) -> Spread:
        """Return the peaks that a side was seen with."""
        return Spread.of(self.peaks[name])

    def evaluating(self) -> dict[str, Callable[[], object]]:
        """Return the sides of the perplexity loop."""
        return {
            OURS: lambda: self.python("evaluate", OURS_EVALUATE, self.gguf),
            TRANSFORMERS: lambda: self.python("loop", THEIRS, self.gguf, "float32", "perplexity"),
            LLAMA: lambda: self.tool("llama-perplexity", "llama-perplexity"),
        }

    def weighing(self) -> dict[str, Callable[[], object]]:
        """Return the sides that go forward and backward, and keep weighed second moments, or nothing."""
        return {
            OURS: lambda: self.python("saliency", OURS_CALIBRATE, self.folder / "weighed", "saliency"),
            TRANSFORMERS: lambda: self.python("backward", THEIRS, self.gguf, "float32", "backward"),
        }

    def calibrating(self) -> dict[str, Callable[[], object]]:
        """Return the sides that run a text and keep second moments, or nothing."""
        return {
            OURS: lambda: self.python("calibrate", OURS_CALIBRATE, self.folder / "statistics", "plain"),
            TRANSFORMERS: lambda: self.python("forward", THEIRS, self.gguf, "float32", "forward"),
        }

    def importance(self) -> dict[str, Callable[[], object]]:
        """Return the sides that keep an importance matrix."""
        return {
            OURS: lambda: self.python("imatrix", OURS_CALIBRATE, self.folder / "ours.gguf", "plain"),
            LLAMA: lambda: self.tool("llama-imatrix", "llama-imatrix", "-o", self.folder / "theirs.gguf"),
        }

    def rows(self, repeats: int) -> list[Row]:
        """Measure and return all rows."""
        tokens = self.ctx * self.chunks
        loops = alternate(self.evaluating(), repeats, warmups=0)
        gathered = alternate(self.calibrating(), repeats, warmups=0)
        weighed = alternate(self.weighing(), repeats, warmups=0)
        matrices = alternate(self.importance(), repeats, warmups=0)
        self.python("bfloat16", THEIRS, self.gguf, "bfloat16", "perplexity", ctx=64, chunks=1)
        found = {"perplexity": {name: one.get("ppl") for name, one in self.answers.items()}}
        halved = Turns(  # evaluate runs two models
            {name: [one / (1 + (name == OURS)) for one in seconds] for name, seconds in loops.rounds.items()}
        )
        loaded = {"transformers, float32": self.peak("loop"), "transformers, BF16": self.peak("bfloat16")}
        return [
            rate_row("evaluate", halved, tokens, "tokens/s", **found),
            rate_row("calibrate, second moments, against a forward", gathered, tokens, "tokens/s"),
            rate_row(
                "calibrate, saliency, against a backward to the embeddings", weighed, tokens, "tokens/s"
            ),
            rate_row("calibrate, imatrix", matrices, tokens, "tokens/s"),
            value_row(
                "evaluate, peak memory",
                "bytes",
                {OURS: self.peak("evaluate"), **loaded, LLAMA: self.peak("llama-perplexity")},
            ),
            value_row("calibrate, peak memory", "bytes", {OURS: self.peak("calibrate"), **loaded}),
            value_row(
                "saliency, peak memory",
                "bytes",
                {OURS: self.peak("saliency"), TRANSFORMERS: self.peak("backward")},
            ),
            value_row(
                "imatrix, peak memory",
                "bytes",
                {OURS: self.peak("imatrix"), LLAMA: self.peak("llama-imatrix")},
            ),
        ]


def _stamp(output: str, words: str) -> float:
    """Return the seconds since its start that llama.cpp's log gives a line: minutes, s, ms, µs."""
    found = re.findall(rf"^(\d+)\.(\d+)\.(\d+)\.(\d+) .*{words}", output, re.MULTILINE)
    if not found:
        raise SystemExit(f"llama.cpp printed no line with {words!r}:\n{output[-2000:]}")
    minutes, seconds, milli, micro = map(int, found[-1])
    return 60 * minutes + seconds + milli / 1e3 + micro / 1e6


def main() -> None:
    """Measure all sides on one checkpoint."""
    parser = arguments(__doc__)
    parser.add_argument("--size", default="0.8B")
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--llama-bin", type=Path, help="folder of llama.cpp's tools; default: built, cached")
    parser.add_argument("--folder", type=Path, help="where files are written; default: the temporary folder")
    chosen = parser.parse_args()
    peer = find_peer(chosen.llama_bin)
    known = limits("matrix", threads=peer.threads)
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        sides = Sides(Path(folder), chosen.size, chosen.ctx, chosen.chunks, peer)
        rows = sides.rows(chosen.repeats)
    statement = (
        f"Synthetic {chosen.size} without vision and MTP, {chosen.chunks} chunks of {chosen.ctx} tokens, the "
        "second half of each scored. float32 products in bitsmith and transformers, which is loaded before "
        "its seconds begin; llama.cpp on the BF16 GGUF. Without Python's imports and llama.cpp's loading."
    )
    protocol = {"statement": statement, "threads": peer.threads, "repeats": chosen.repeats}
    report("forward", protocol, rows, known, out=chosen.out)


if __name__ == "__main__":
    main()
