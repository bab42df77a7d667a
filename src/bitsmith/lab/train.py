"""Train a tiny real Qwen3.5 or Qwen3 on the Python standard library's sources, from random weights."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from bitsmith.archs.tokenizer import load_tokenizer
from bitsmith.errors import BitsmithError, OutputError
from bitsmith.lab.corpus import save_tokenizer, train_tokenizer
from bitsmith.progress import Progress, silent
from bitsmith.run.corpus import documents
from bitsmith.run.evaluate import open_model
from bitsmith.run.forward import quiet_transformers
from bitsmith.run.free_model import plain
from bitsmith.run.record import seal
from bitsmith.store import open_checkpoint
from bitsmith.store.atomic import Content, atomic_folder

_FLOAT32_SUFFIXES = (".A_log", ".linear_attn.norm.weight")  # Qwen's own files keep these two in F32
_SAVED_EVERY_SECONDS = 300.0
_LOGGED_EVERY_STEPS = 100
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class TrainSpec:
    """What `train` makes: shapes, length and seed; `minutes` and `steps` end it, whichever comes first.

    Heads that are not given: as many query heads of 64 as fit the hidden size, half as many KV heads.
    `kl_share` is what KL(teacher‖model) counts in the loss of a model that has a teacher; the text's own
    next token counts the rest.
    """

    arch: Literal["qwen3_5", "qwen3"] = "qwen3_5"
    hidden_size: int = 256
    num_hidden_layers: int = 4
    intermediate_size: int = 768
    vocab_size: int = 4096
    tie_word_embeddings: bool = False
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int = 64
    minutes: float = 60.0
    steps: int = 100_000
    batch_size: int = 16
    context_tokens: int = 256
    learning_rate: float = 2e-3
    seed: int = 0
    compile: bool = True
    kl_share: float = 0.5


def model_config(spec: TrainSpec) -> Any:
    """Return the transformers config of `spec`; a DeltaNet has twice as many V as K heads, all of 64."""
    fitting = max(2, spec.hidden_size // 64)
    heads = spec.num_attention_heads or fitting
    shared: dict[str, Any] = {
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.num_hidden_layers,
        "intermediate_size": spec.intermediate_size,
        "vocab_size": spec.vocab_size,
        "tie_word_embeddings": spec.tie_word_embeddings,
        "num_attention_heads": heads,
        "num_key_value_heads": spec.num_key_value_heads or heads // 2,
        "head_dim": spec.head_dim,
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
        linear_num_key_heads=fitting,
        linear_num_value_heads=2 * fitting,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        architectures=["Qwen3_5ForCausalLM"],
    )


def new_model(spec: TrainSpec) -> torch.nn.Module:
    """Return a freshly initialised causal LM of `spec`, seeded."""
    torch.manual_seed(spec.seed)
    cls = Qwen3ForCausalLM if spec.arch == "qwen3" else Qwen3_5ForCausalLM
    model: torch.nn.Module = cls(model_config(spec))
    return model


def _token_stream(tokenizer: Tokenizer, held_out: bool) -> NDArray[np.int64]:
    (end,) = tokenizer.encode("<|endoftext|>").ids
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(list(documents(held_out))):
        ids.extend(encoding.ids)
        ids.append(end)
    return np.asarray(ids, dtype=np.int64)


def _batch(stream: NDArray[np.int64], seed: Sequence[int], spec: TrainSpec) -> torch.Tensor:
    starts = np.random.default_rng(seed).integers(0, len(stream) - spec.context_tokens - 1, spec.batch_size)
    return torch.from_numpy(np.stack([stream[s : s + spec.context_tokens + 1] for s in starts]))


@cache
def bf16_is_faster() -> bool:
    """Tell whether this processor multiplies in BF16 faster than in float32; some emulate it, far slower."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones((512, 512), dtype=dtype)
        a @ a  # the first product sets the library up
        started = time.perf_counter()
        for _ in range(4):
            a @ a
        seconds[dtype] = time.perf_counter() - started
    return seconds[torch.bfloat16] < seconds[torch.float32]


def _logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Return logits (`N vocab`) of every position but the last."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16_is_faster()):
        logits: torch.Tensor = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return logits.float().flatten(0, 1)


def _kl_nats(logits: torch.Tensor, teacher: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Return the mean KL(teacher‖model) of next-token distributions."""
    with torch.no_grad():
        wanted = log_softmax(_logits(teacher, tokens), dim=-1)
    return kl_div(log_softmax(logits, dim=-1), wanted, reduction="batchmean", log_target=True)


class _Losses(NamedTuple):
    """Of a batch, in nats per token; `kl` is None without a teacher."""

    cross_entropy: torch.Tensor
    kl: torch.Tensor | None

    def mixed(self, kl_share: float) -> torch.Tensor:
        """Return what is minimised."""
        if self.kl is None:
            return self.cross_entropy
        return kl_share * self.kl + (1 - kl_share) * self.cross_entropy


def _losses(model: Any, teacher: Any, tokens: torch.Tensor) -> _Losses:
    logits = _logits(model, tokens)
    kl = None if teacher is None else _kl_nats(logits, teacher, tokens)
    return _Losses(cross_entropy(logits, tokens[:, 1:].flatten()), kl)


def _optimizer(model: torch.nn.Module, spec: TrainSpec) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=spec.learning_rate, betas=(0.9, 0.95), fused=True)


def _rate(done: float, step: int) -> float:
    return min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


class _Run:
    """A training under way: model, optimizer, step, seconds spent and log, kept in one state file."""

    def __init__(self, spec: TrainSpec, state: Path, teacher: Path | None = None) -> None:
        self.spec = spec
        self.state = state
        self.teacher_sha256 = None if teacher is None else _sha256(teacher)
        self._teacher = None if teacher is None else _frozen(teacher)
        self.model = new_model(spec)
        self.optimizer = _optimizer(self.model, spec)
        self.step = 0
        self.seconds = 0.0
        self.log: list[dict[str, object]] = []
        if state.exists():
            self._resume()

    def fit(
        self, stream: NDArray[np.int64], held_out: NDArray[np.int64], progress: Progress
    ) -> list[dict[str, object]]:
        """Step until the spec's steps or minutes are spent; return the log."""
        forward = torch.compile(self.model) if self.spec.compile else self.model
        if self.spec.compile and self._teacher is not None:
            self._teacher = torch.compile(self._teacher)
        saved = resumed = time.monotonic() - self.seconds
        while (done := self._done) < 1.0:
            loss = self._advance(forward, _batch(stream, (self.spec.seed, self.step), self.spec), done)
            self.seconds = time.monotonic() - resumed
            if self.step % _LOGGED_EVERY_STEPS == 0 or self._done >= 1.0:
                self._note(loss, self._held_out(forward, held_out))
            if time.monotonic() - saved > _SAVED_EVERY_SECONDS:
                self._save()
                saved = time.monotonic()
            progress("train", int(1000 * min(self._done, 1.0)), 1000)
        return self.log

    @property
    def _done(self) -> float:
        return max(self.step / self.spec.steps, self.seconds / (60 * self.spec.minutes))

    def _advance(self, forward: Any, tokens: torch.Tensor, done: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.spec.learning_rate * _rate(done, self.step)
        loss = _losses(forward, self._teacher, tokens).mixed(self.spec.kl_share)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return float(loss.item())

    def _note(self, loss_nats: float, held_out: dict[str, float]) -> None:
        row: dict[str, object] = {
            "step": self.step,
            "tokens": self.step * self.spec.batch_size * self.spec.context_tokens,
            "seconds": round(self.seconds, 1),
            "train_loss_nats": round(loss_nats, 4),
        }
        self.log.append(row | {name: round(nats, 4) for name, nats in held_out.items()})

    def _held_out(self, forward: Any, stream: NDArray[np.int64]) -> dict[str, float]:
        """Return the held-out cross-entropy, and with a teacher the divergence from it."""
        with torch.no_grad():
            found = [_losses(forward, self._teacher, _batch(stream, (12345, i), self.spec)) for i in range(4)]
        nats = {"held_out_loss_nats": float(np.mean([one.cross_entropy.item() for one in found]))}
        klds = [one.kl.item() for one in found if one.kl is not None]
        return nats | ({"held_out_kld_nats": float(np.mean(klds))} if klds else {})

    @property
    def asked(self) -> dict[str, Any]:
        """What is trained; a state of something else is refused."""
        return {"spec": asdict(self.spec), "teacher_sha256": self.teacher_sha256}

    def _save(self) -> None:
        tensors = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        for name, p in self.model.named_parameters():
            tensors |= {f"{moment}.{name}": self.optimizer.state[p][moment] for moment in _MOMENTS}
        facts = self.asked | {"step": self.step, "seconds": self.seconds, "log": self.log}
        part = self.state.with_name(self.state.name + ".part")
        save_file(tensors, part, metadata={"run": json.dumps(facts)})
        part.replace(self.state)

    def _resume(self) -> None:
        with safe_open(self.state, "pt") as file:
            facts = json.loads(file.metadata()["run"])
        if any(facts.get(name) != value for name, value in self.asked.items()):
            raise BitsmithError("holds a training with other options; finish or delete it", path=self.state)
        self.step, self.seconds, self.log = facts["step"], facts["seconds"], facts["log"]
        tensors = load_file(self.state)
        for name, p in self.model.named_parameters():
            p.data.copy_(tensors[f"model.{name}"])
            moments = {moment: tensors[f"{moment}.{name}"] for moment in _MOMENTS}
            self.optimizer.state[p] = {"step": torch.tensor(float(self.step)), **moments}


def _check(out: Path, spec: TrainSpec) -> None:
    if out.exists():
        raise OutputError("exists; choose another folder", path=out)
    if not out.absolute().parent.is_dir():
        raise OutputError("is not in a folder that exists", path=out)
    if spec.hidden_size % 128:
        raise BitsmithError(f"hidden size {spec.hidden_size} is not a multiple of 128")
    if not (spec.minutes > 0 and spec.steps > 0):
        raise BitsmithError(f"{spec.minutes} minutes of at most {spec.steps} steps leave nothing to train")


def _sha256(folder: Path) -> str:
    with open_checkpoint(folder) as checkpoint:
        return checkpoint.source_digest


def _frozen(folder: Path) -> Any:
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with quiet_transformers(), open_model(folder) as stored:
        made: Any = AutoModelForCausalLM
        model = made.from_config(config, dtype=torch.float32)
        weights = {name: plain(ref) for name, ref in stored.checkpoint.items()}
        model.load_state_dict({"lm_head.weight": plain(stored.head)} | weights)
    return model.requires_grad_(False).train(False)


def _tokenizer(spec: TrainSpec, teacher: Path | None) -> Tokenizer:
    """Return the teacher's tokenizer, or one trained for `spec`."""
    if teacher is None:
        return train_tokenizer(spec.vocab_size)
    with open_checkpoint(teacher) as checkpoint:
        tokenizer = load_tokenizer(checkpoint)
    if tokenizer.get_vocab_size() != spec.vocab_size:
        raise BitsmithError(
            f"its tokenizer has {tokenizer.get_vocab_size()} tokens, expected {spec.vocab_size}", path=teacher
        )
    return tokenizer


def train(out: Path, spec: TrainSpec, progress: Progress = silent, *, teacher: Path | None = None) -> Path:
    """Train `spec` and write a Hugging Face folder with its tokenizer and `training_log.jsonl`.

    Cosine schedule over the steps or minutes, AdamW, bf16 autocast where that is faster; losses are in
    nats per token.
    Weights are BF16 except `A_log` and `linear_attn.norm`, which stay F32 as in Qwen's own files.
    A state file `.OUT.training` beside `out`, saved every five minutes, lets a killed run go on.
    With a `teacher`, a Hugging Face folder, the model is distilled from it: it takes its tokenizer, and the
    loss is `kl_share` KL(teacher‖model) + (1 - `kl_share`) cross-entropy, at every position.

    Raises OutputError if `out` exists or is in no folder, BitsmithError for a hidden size that is no multiple
    of 128, for no steps or minutes, and for a teacher with another vocabulary.
    """
    _check(out, spec)
    tokenizer = _tokenizer(spec, teacher)
    stream, held_out = (_token_stream(tokenizer, held_out=split) for split in (False, True))
    run = _Run(spec, out.with_name(f".{out.name}.training"), teacher)
    header = run.asked | {
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "train_tokens_available": len(stream),
        "held_out_tokens_available": len(held_out),
        "loss_unit": "nats per token",
        "bf16_autocast": bf16_is_faster(),
    }
    log = [header, *run.fit(stream, held_out, progress)]

    def finish(content: Content) -> None:
        seal(out, "lab train", content, **run.asked)

    with atomic_folder(out, last="model.safetensors", stale=lambda _: False, finish=finish) as folder:
        _save_model(folder, run.model, tokenizer, spec)
        (folder / "training_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log), "utf-8")
    run.state.unlink(missing_ok=True)
    return out


def _save_model(folder: Path, model: Any, tokenizer: Tokenizer, spec: TrainSpec) -> None:
    state = {
        name: p.detach()
        .to(torch.float32 if name.endswith(_FLOAT32_SUFFIXES) else torch.bfloat16)
        .contiguous()
        for name, p in model.state_dict().items()
        if not (spec.tie_word_embeddings and name == "lm_head.weight")
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    save_tokenizer(folder, tokenizer)
