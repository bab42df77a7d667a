"""Tokens per second of `bitsmith generate`'s forward and of transformers' `generate`, in one run.

    python benchmarks/generate.py [--model FOLDER] [--type BF16] [--tokens 128] [--runs 5] [--threads 1]
        [--out FILE]

Both read the same prompt and continue it greedily in float32: transformers from the folder, bitsmith from its
GGUF of the given type. They take turns, and each figure is the median over the runs: seconds for prompt and
new tokens together, without loading. The new tokens are the same where the type keeps the weights.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import torch
from measuring import OURS, Row, alternate, arguments, rate_row, report
from transformers import AutoModelForCausalLM

from bitsmith.lab.models import DEMO_MODEL
from bitsmith.run.continuation import written
from bitsmith.run.decode import Decoder
from bitsmith.run.evaluate import open_model
from bitsmith.run.execute import compress
from bitsmith.run.sampling import GREEDY
from bitsmith.run.vocabulary import Vocabulary

PROMPT = "def __init__(self, name, value):\n"


def measure(folder: Path, gguf: Path, n_tokens: int, runs: int) -> Row:
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

        same = ours() == of_transformers()
        n_new = len(ours())
        turns = alternate({OURS: ours, "transformers": of_transformers}, runs)
    facts = {
        "new_tokens": n_new,
        "prompt_tokens": len(prompt),
        "same_tokens": same,
        "weight_bytes": decoder.weight_bytes,
        "state_bytes": decoder.cache_bytes,
    }
    return rate_row(f"{n_new} greedy tokens behind {len(prompt)}", turns, n_new, "tokens/s", **facts)


def main() -> None:
    options = arguments(__doc__)
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
        row = measure(chosen.model, gguf, chosen.tokens, chosen.runs)
    protocol = {
        "statement": "The same prompt continued greedily in float32, by turns, without loading; "
        f"bitsmith from a {chosen.type} GGUF, transformers from the folder.",
        "model": chosen.model.name,
        "threads": torch.get_num_threads(),
        "repeats": chosen.runs,
    }
    report("generate", protocol, [row], out=chosen.out)


if __name__ == "__main__":
    main()
