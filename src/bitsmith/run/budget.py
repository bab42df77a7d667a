"""How large the output may be: targets in bits per weight, in bytes of the file, or in memory at run time."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from math import prod
from typing import Any, Literal

from bitsmith.errors import BitsmithError, printable
from bitsmith.run.plan import Source
from bitsmith.store import Typed

DEFAULT_CTX_TOKENS = 8192
UBATCH_TOKENS = 512
"""llama.cpp's default micro-batch, which its compute buffer is reserved for."""

_UNITS = {
    "": 1,
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", start=1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", start=1)},
}
_NUMBER = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*", re.ASCII)
_CTX_MULTIPLE = 256
_MAX_CTX_TOKENS = 1 << 24
_MAX_SIZE_BYTES = 1 << 50
_MAX_BPW = 32

Kind = Literal["bpw", "file", "fit"]


@dataclass(frozen=True)
class Target:
    """What was asked for: `kind` says of what, `amount` how much (bits per weight, or bytes).

    `ctx_tokens` is the context that `fit` makes room for.
    """

    kind: Kind
    amount: Fraction
    ctx_tokens: int = DEFAULT_CTX_TOKENS

    def __str__(self) -> str:
        if self.kind == "bpw":
            return f"{float(self.amount):g} bpw"
        size = f"{int(self.amount):,} bytes"
        return size if self.kind == "file" else f"{size} of memory at {self.ctx_tokens} tokens of context"


@dataclass(frozen=True)
class Memory:
    """What llama.cpp takes besides the weights for one sequence of `ctx_tokens`, in bytes.

    `kv_bytes`, `state_bytes` and `conv_bytes` are what it allocates, `compute_bytes` an allowance.
    """

    ctx_tokens: int
    kv_bytes: int
    state_bytes: int
    conv_bytes: int
    compute_bytes: int

    @property
    def total_bytes(self) -> int:
        """Everything but the weights."""
        return self.kv_bytes + self.state_bytes + self.conv_bytes + self.compute_bytes

    def to_json(self) -> dict[str, int]:
        """Return the parts and their sum."""
        return asdict(self) | {"total_bytes": self.total_bytes}


@dataclass(frozen=True)
class Limit:
    """A target resolved for one model: at most `limit_bytes` of tensor data (`tensors`) or of the file.

    `memory` is what a `fit` target set aside, else None.
    """

    target: Target
    of: Literal["tensors", "file"]
    limit_bytes: int
    memory: Memory | None = None

    def __str__(self) -> str:
        what = "tensor data" if self.of == "tensors" else "file"
        aside = f" ({self.memory.total_bytes:,} set aside)" if self.memory else ""
        return f"{self.target}: {what} of at most {self.limit_bytes:,} bytes{aside}"

    def holds(self, tensor_bytes: int, file_bytes: int) -> bool:
        """Tell whether a plan of these sizes keeps the limit."""
        return (tensor_bytes if self.of == "tensors" else file_bytes) <= self.limit_bytes


def parse_target(text: str) -> Target:
    """Return the target that `--target` names: `4.66bpw`, `4.86GiB`, `5.2GB`, `300MiB` or plain bytes.

    `bpw` is of all weights written, as `Plan.bpw`; sizes are of the whole file. Any case.

    Raises BitsmithError for anything else and for amounts that make no sense.
    """
    amount, unit = _split(text, "target", "4.66bpw, 4.86GiB, 5.2GB or plain bytes")
    if unit.lower() == "bpw":
        if not 0 < amount <= _MAX_BPW:
            raise BitsmithError(f"target {printable(text)!r} must be above 0 and at most {_MAX_BPW} bpw")
        return Target("bpw", amount)
    return Target("file", _bytes(text, amount, unit, "target"))


def parse_memory(text: str) -> int:
    """Return the bytes that `8GiB`, `5.2GB` or a plain number of bytes names. Raises BitsmithError."""
    expected = "8GiB, 5.2GB or plain bytes"
    amount, unit = _split(text, "memory", expected)
    return int(_bytes(text, amount, unit, "memory"))


def parse_fit(text: str, ctx_tokens: int = DEFAULT_CTX_TOKENS) -> Target:
    """Return the target that `--fit 8GiB --ctx 8192` names: weights and what running them takes.

    Raises BitsmithError for a size that is none, and for a context out of range.
    """
    amount, unit = _split(text, "memory", "8GiB, 8GB or plain bytes")
    if not 1 <= ctx_tokens <= _MAX_CTX_TOKENS:
        raise BitsmithError(f"a context of {ctx_tokens} tokens is not between 1 and {_MAX_CTX_TOKENS}")
    return Target("fit", _bytes(text, amount, unit, "memory"), ctx_tokens)


def limit_of(source: Source, target: Target) -> Limit:
    """Return what `target` allows the file of `source` to be.

    `bpw` limits the tensor data to `floor(bpw weights / 8)` bytes, a size the file; `fit` leaves the file
    what remains beside `runtime_memory`; the header and its vocabulary count as if they stayed in memory.

    Raises BitsmithError where nothing remains for the weights, and as `runtime_memory` does.
    """
    if target.kind == "bpw":
        weights = sum(prod(tensor.ref.shape) for tensor in source.tensors)
        return Limit(target, "tensors", int(target.amount * weights / 8))
    if target.kind == "file":
        return Limit(target, "file", int(target.amount))
    memory = runtime_memory(source.metadata, _vocab(source), target.ctx_tokens)
    left = int(target.amount) - memory.total_bytes
    if left <= 0:
        raise BitsmithError(
            f"{target} leaves nothing for the weights: cache, state and buffers take "
            f"{memory.total_bytes:,} bytes",
            path=source.checkpoint.path,
        )
    return Limit(target, "file", left, memory)


def runtime_memory(metadata: Mapping[str, Any], vocab: int, ctx_tokens: int) -> Memory:
    """Return what llama.cpp takes beside the weights for one sequence, from a GGUF's key/values.

    With its defaults (one sequence, f16 cache, flash attention, micro-batches of 512), in bytes:

    - KV cache, full-attention layers alone: `2 ctx (key_length + value_length) head_count_kv` each, `ctx`
      rounded up to a multiple of 256 (`llama-context.cpp`, `llama-kv-cache.cpp`);
    - DeltaNet layers, F32: state `4 state_size inner_size` (`llama_hparams::n_embd_s`) and convolution
      `4 (conv_kernel - 1) (inner_size + 2 group_count state_size)` (`n_embd_r`) each;
    - compute buffer, an allowance: `512 (4 (max(vocab, 8 inner_size) + ffn + 2 hidden) + 2 ctx)`, the logits
      of a micro-batch or a DeltaNet layer's intermediates, and the f16 attention mask. Against what the CPU
      back end reserves for Qwen3.5 of hidden 256 and 1024 at 512 to 262144 tokens it was never below.

    MTP layers have neither cache nor state there. CPU builds that repack weights hold a second copy of them,
    which is not counted.

    Raises BitsmithError for a key that is absent or no integer.
    """
    keys = _Keys(metadata)
    blocks = keys.number("block_count") - keys.number("nextn_predict_layers", 0)
    recurrent = keys.recurrent(blocks)
    ctx = -(-ctx_tokens // _CTX_MULTIPLE) * _CTX_MULTIPLE
    hidden = keys.number("embedding_length")
    head_dim = hidden // keys.number("attention.head_count")
    widths = sum(keys.number(f"attention.{side}_length", head_dim) for side in ("key", "value"))
    inner, state = keys.number("ssm.inner_size", 0), keys.number("ssm.state_size", 0)
    channels = inner + 2 * keys.number("ssm.group_count", 0) * state
    wide = max(vocab, 8 * inner) + keys.number("feed_forward_length") + 2 * hidden
    return Memory(
        ctx_tokens=ctx,
        kv_bytes=2 * ctx * widths * keys.number("attention.head_count_kv") * (blocks - recurrent),
        state_bytes=4 * state * inner * recurrent,
        conv_bytes=4 * max(0, keys.number("ssm.conv_kernel", 1) - 1) * channels * recurrent,
        compute_bytes=UBATCH_TOKENS * (4 * wide + 2 * ctx),
    )


class _Keys:
    """A GGUF's architecture key/values without their prefix."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._values = {key: _plain(value) for key, value in metadata.items()}
        self._arch = self._values.get("general.architecture")

    def number(self, key: str, default: int | None = None) -> int:
        value = self._values.get(f"{self._arch}.{key}", default)
        if isinstance(value, list) and value:
            value = max(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise BitsmithError(f"metadata '{self._arch}.{key}' is {printable(repr(value))}, not an integer")
        return value

    def recurrent(self, blocks: int) -> int:
        """Return how many of the text blocks are DeltaNet layers."""
        if f"{self._arch}.ssm.inner_size" not in self._values:
            return 0
        given = self._values.get(f"{self._arch}.attention.recurrent_layers")
        if isinstance(given, list):
            return sum(map(bool, given[:blocks]))
        interval = max(1, self.number("full_attention_interval", 4))
        return blocks - blocks // interval


def _vocab(source: Source) -> int:
    return next(tensor.ref.shape[0] for tensor in source.tensors if tensor.spec.role == "embed")


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Typed) else value


def _split(text: str, what: str, expected: str) -> tuple[Fraction, str]:
    match = _NUMBER.fullmatch(text) if len(text) <= 64 else None
    if match is None:
        raise BitsmithError(f"{what} {printable(text, 64)!r} is not understood; expected {expected}")
    unit = match[2]
    if unit.lower() != "bpw" and unit.lower() not in {known.lower() for known in _UNITS}:
        raise BitsmithError(f"{what} {printable(text)!r} has the unknown unit {unit!r}; expected {expected}")
    return Fraction(match[1]), unit


def _bytes(text: str, amount: Fraction, unit: str, what: str) -> Fraction:
    by_lower = {known.lower(): size for known, size in _UNITS.items()}
    if unit.lower() not in by_lower:
        raise BitsmithError(f"{what} {printable(text)!r} must be a size such as 8GiB")
    size = Fraction(int(amount * by_lower[unit.lower()]))
    if not 0 < size <= _MAX_SIZE_BYTES:
        raise BitsmithError(f"{what} {printable(text)!r} is not between 1 byte and 1 PiB")
    return size
