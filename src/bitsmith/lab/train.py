"""Train a tiny real Qwen3.5 or Qwen3 on the Python standard library's sources, from random weights, on CPU."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from tokenizers import Tokenizer

from bitsmith.errors import BitsmithError, OutputError
from bitsmith.lab.corpus import CHAT_TEMPLATE, documents, train_tokenizer

_FLOAT32_SUFFIXES = (".A_log", ".linear_attn.norm.weight")  # Qwen's own files keep these two in F32


@dataclass(frozen=True)
class TrainSpec:
    """What `train` makes: shapes, length and seed; `minutes` and `steps` end it, whichever comes first."""

    arch: Literal["qwen3_5", "qwen3"] = "qwen3_5"
    hidden_size: int = 256
    num_hidden_layers: int = 4
    intermediate_size: int = 768
    vocab_size: int = 4096
    tie_word_embeddings: bool = False
    minutes: float = 60.0
    steps: int = 100_000
    batch_size: int = 16
    context_tokens: int = 256
    learning_rate: float = 2e-3
    seed: int = 0
    compile: bool = True


def model_config(spec: TrainSpec) -> Any:
    """Return the transformers config of `spec`: heads of 64, twice as many query as KV and V as K heads."""
    from transformers import Qwen3_5TextConfig, Qwen3Config

    heads = max(2, spec.hidden_size // 64)
    shared = {
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.num_hidden_layers,
        "intermediate_size": spec.intermediate_size,
        "vocab_size": spec.vocab_size,
        "tie_word_embeddings": spec.tie_word_embeddings,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": spec.vocab_size - 3,
        "dtype": "bfloat16",
    }
    if spec.arch == "qwen3":
        return Qwen3Config(
            **shared,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            architectures=["Qwen3ForCausalLM"],
        )
    rope = {
        "rope_type": "default",
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.25,
        "mrope_section": [3, 3, 2],
        "mrope_interleaved": True,
    }
    return Qwen3_5TextConfig(
        **shared,
        rope_parameters=rope,
        linear_num_key_heads=heads,
        linear_num_value_heads=2 * heads,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        architectures=["Qwen3_5ForCausalLM"],
    )


def new_model(spec: TrainSpec) -> torch.nn.Module:
    """Return a freshly initialised causal LM of `spec`, seeded."""
    from transformers import Qwen3_5ForCausalLM, Qwen3ForCausalLM

    torch.manual_seed(spec.seed)
    cls = Qwen3ForCausalLM if spec.arch == "qwen3" else Qwen3_5ForCausalLM
    model: torch.nn.Module = cls(model_config(spec))
    return model


def _token_stream(tokenizer: Tokenizer, held_out: bool) -> NDArray[np.int64]:
    end = tokenizer.token_to_id("<|endoftext|>")
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(list(documents(held_out))):
        ids.extend(encoding.ids)
        ids.append(end)
    return np.asarray(ids, dtype=np.int64)


def _batch(stream: NDArray[np.int64], rng: np.random.Generator, spec: TrainSpec) -> torch.Tensor:
    starts = rng.integers(0, len(stream) - spec.context_tokens - 1, spec.batch_size)
    return torch.from_numpy(np.stack([stream[s : s + spec.context_tokens + 1] for s in starts]))


def _loss_nats(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def _held_out_loss_nats(model: Any, stream: NDArray[np.int64], spec: TrainSpec) -> float:
    rng = np.random.default_rng(12345)
    with torch.no_grad():
        return float(np.mean([_loss_nats(model, _batch(stream, rng, spec)).item() for _ in range(4)]))


def _optimizer(model: torch.nn.Module, spec: TrainSpec) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=spec.learning_rate, betas=(0.9, 0.95), fused=True)


def _rate(done: float, step: int) -> float:
    return min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


def train(out: Path, spec: TrainSpec) -> Path:
    """Train `spec` and write a Hugging Face folder with its tokenizer and `training_log.jsonl`.

    Cosine schedule over the steps or minutes, AdamW, bf16 autocast; losses are in nats per token.
    Weights are BF16 except `A_log` and `linear_attn.norm`, which stay F32 as in Qwen's own files.

    Raises OutputError if `out` exists.
    """
    if out.exists():
        raise OutputError("exists already; choose another folder", path=out)
    if spec.hidden_size % 128:
        raise BitsmithError(f"hidden size {spec.hidden_size} is not a multiple of 128")
    tokenizer = train_tokenizer(spec.vocab_size)
    stream = _token_stream(tokenizer, held_out=False)
    held_out = _token_stream(tokenizer, held_out=True)
    model = new_model(spec)
    log = _fit(model, stream, held_out, spec)
    save(out, model, tokenizer, spec)
    (out / "training_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    return out


def _fit(
    model: torch.nn.Module, stream: NDArray[np.int64], held_out: NDArray[np.int64], spec: TrainSpec
) -> list[dict[str, object]]:
    optimizer = _optimizer(model, spec)
    forward = torch.compile(model) if spec.compile else model
    rng = np.random.default_rng(spec.seed)
    log: list[dict[str, object]] = [
        {
            "spec": asdict(spec),
            "parameters": sum(p.numel() for p in model.parameters()),
            "train_tokens_available": len(stream),
            "held_out_tokens_available": len(held_out),
            "loss_unit": "nats per token",
        }
    ]
    started, step, done = time.monotonic(), 0, 0.0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("training", total=1000)
        while done < 1.0:
            for group in optimizer.param_groups:
                group["lr"] = spec.learning_rate * _rate(done, step)
            loss = _loss_nats(forward, _batch(stream, rng, spec))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            seconds = time.monotonic() - started
            done = max(step / spec.steps, seconds / (60 * spec.minutes))
            if step % 100 == 0 or done >= 1.0:
                row: dict[str, object] = {
                    "step": step,
                    "tokens": step * spec.batch_size * spec.context_tokens,
                    "seconds": round(seconds, 1),
                    "train_loss_nats": round(loss.item(), 4),
                    "held_out_loss_nats": round(_held_out_loss_nats(forward, held_out, spec), 4),
                }
                log.append(row)
                progress.console.print(json.dumps(row), highlight=False)
            progress.update(bar, completed=int(1000 * min(done, 1.0)))
    return log


def save(out: Path, model: Any, tokenizer: Tokenizer, spec: TrainSpec) -> None:
    """Write `model` as a Hugging Face folder: config, BF16 safetensors, tokenizer and chat template."""
    out.mkdir(parents=True)
    state = {
        name: p.detach().to(torch.float32 if name.endswith(_FLOAT32_SUFFIXES) else torch.bfloat16).contiguous()
        for name, p in model.state_dict().items()
        if not (spec.tie_word_embeddings and name == "lm_head.weight")
    }
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(out)
    save_tokenizer(out, tokenizer)


def save_tokenizer(out: Path, tokenizer: Tokenizer) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` with the lab's chat template."""
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "add_bos_token": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
