"""Tokens per second of `bitsmith generate`'s forward and of transformers' `generate`, in one run, as JSON.

    python benchmarks/generate.py [--model FOLDER] [--type BF16] [--tokens 128] [--runs 5] [--threads 1]

Both read the same prompt and continue it greedily in float32: transformers from the folder, bitsmith from its
GGUF of the given type. They take turns, and each figure is the median over the runs: seconds for prompt and
new tokens together, without loading. The new tokens are the same where the type keeps the weights.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from bitsmith.lab.models import DEMO_MODEL
from bitsmith.run.continuation import written
from bitsmith.run.decode import Decoder
from bitsmith.run.evaluate import open_model
from bitsmith.run.execute import compress
from bitsmith.run.sampling import GREEDY
from bitsmith.run.vocabulary import Vocabulary

PROMPT = "def __init__(self, name, value):\n"


def seconds_of(action: Callable[[], list[int]]) -> tuple[float, list[int]]:
    started = time.monotonic()
    tokens = action()
    return time.monotonic() - started, tokens


def measure(folder: Path, gguf: Path, n_tokens: int, runs: int) -> dict[str, object]:
    with open_model(gguf) as model:
        vocabulary = Vocabulary(model)
        prompt = vocabulary.encode(PROMPT)
        decoder = Decoder(model, len(prompt) + n_tokens)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        ids, stops = torch.tensor([prompt]), sorted(vocabulary.stops)

        def ours() -> list[int]:
            decoder.reset()
            return list(written(decoder, vocabulary, prompt, n_tokens, GREEDY).tokens)

        @torch.inference_mode()
        def of_transformers() -> list[int]:
            found = theirs.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=n_tokens,
                do_sample=False,
                eos_token_id=stops,
                pad_token_id=0,
            )[0, len(prompt) :].tolist()
            return [token for token in found if token not in stops]

        ours(), of_transformers()  # what is done once is not measured
        pairs = [(seconds_of(ours), seconds_of(of_transformers)) for _ in range(runs)]
    n_new = len(pairs[0][0][1])
    rates = [(n_new / mine[0], len(other[1]) / other[0]) for mine, other in pairs]
    return {
        "new_tokens": n_new,
        "prompt_tokens": len(prompt),
        "same_tokens": all(mine[1] == other[1] for mine, other in pairs),
        "bitsmith_tokens_per_second": round(statistics.median(one for one, _ in rates), 1),
        "transformers_tokens_per_second": round(statistics.median(one for _, one in rates), 1),
        "ratio_of_each_run": [round(one / other, 3) for one, other in rates],
        "ratio": round(statistics.median(one / other for one, other in rates), 3),
        "weight_bytes": decoder.weight_bytes,
        "state_bytes": decoder.cache_bytes,
    }


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--model", type=Path, default=DEMO_MODEL)
    options.add_argument("--type", default="BF16")
    options.add_argument("--tokens", type=int, default=128)
    options.add_argument("--runs", type=int, default=5)
    options.add_argument("--threads", type=int, default=None)
    chosen = options.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    with tempfile.TemporaryDirectory() as folder:
        gguf = compress(chosen.model, Path(folder) / "candidate.gguf", chosen.type).out
        found = measure(chosen.model, gguf, chosen.tokens, chosen.runs)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    about = {"model": chosen.model.name, "type": chosen.type, "threads": torch.get_num_threads()}
    print(json.dumps(about | {"cores": os.cpu_count(), "load_average": load} | found, indent=2))


if __name__ == "__main__":
    main()
