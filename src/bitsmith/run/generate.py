"""What generating gives, and how real llama.cpp, from the `llama` extra, does it."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bitsmith.archs.tokenizer import tokenizer_from_gguf
from bitsmith.errors import BitsmithError, UnsupportedError, printable
from bitsmith.run.sampling import GREEDY, Sampling
from bitsmith.store import Checkpoint, open_gguf
from bitsmith.store.hub import local

_SMALL_FILE_BYTES = 64 << 20  # below it, meeting points of threads cost more than the arithmetic they share
Emit = Callable[[str], None]


@dataclass(frozen=True)
class Continuation:
    """Text after a prompt: what, why it ended, and the time it took.

    `seconds` run from the first new token to the last; `weight_bytes` and `cache_bytes` are what the model
    and the states of the sequence take in memory. llama.cpp tells neither these nor `tokens`.
    """

    text: str
    stopped: str
    prompt_tokens: int
    prompt_seconds: float
    seconds: float
    n_tokens: int
    tokens: tuple[int, ...] = ()
    weight_bytes: int | None = None
    cache_bytes: int | None = None

    @property
    def prompt_rate(self) -> float | None:
        """Tokens of the prompt per second; None where nothing was timed."""
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds > 0 else None

    @property
    def rate(self) -> float | None:
        """New tokens per second after the first; None where there are fewer than two."""
        return (self.n_tokens - 1) / self.seconds if self.n_tokens > 1 and self.seconds > 0 else None


def generate(
    model: Path, prompt: str, n_tokens: int, *, threads: int | None = None, verbose: bool = False
) -> str:
    """Return the text that llama.cpp puts greedily after `prompt`; as `continue_with_llama` otherwise."""
    return continue_with_llama(model, prompt, n_tokens, threads=threads, verbose=verbose).text


def continue_with_llama(
    model: Path,
    prompt: str,
    n_tokens: int,
    sampling: Sampling = GREEDY,
    *,
    ctx_tokens: int | None = None,
    threads: int | None = None,
    verbose: bool = False,
    emit: Emit | None = None,
) -> Continuation:
    """Return what llama.cpp puts after `prompt`, at most `n_tokens` tokens; `emit` gets the text as it grows.

    `verbose` lets llama.cpp log to stderr. While it runs, its server listens on a random local port behind a
    random key.

    Raises UnsupportedError without the `llama` extra, DamagedFileError for a damaged GGUF, BitsmithError
    for a prompt that does not fit in the context and where llama.cpp refuses.
    """
    if find_spec("xllamacpp") is None:
        raise UnsupportedError("generating needs llama.cpp: install bitsmith[llama]")
    model = local(model)
    with open_gguf(model) as checked:  # llama.cpp's own parser has had memory faults
        if checked.metadata.get("tokenizer.ggml.model") in (None, "no_vocab"):
            raise UnsupportedError("has no tokenizer; generating from text needs one", path=model)
        _check_prompt(checked, prompt, ctx_tokens)
    n_ctx = len(prompt.encode()) + n_tokens + 8  # a byte-level token is at least a byte
    server = _server(model, n_ctx if ctx_tokens is None else ctx_tokens, threads, verbose)
    answers: list[Any] = []
    texts: list[str] = []

    def take(answer: Any) -> bool:
        """Keep a part of the answer; False goes on."""
        answers.append(answer)
        for choice in answer.get("choices", []) if isinstance(answer, dict) else []:
            texts.append(str(choice["text"]))
            if emit is not None and choice["text"]:
                emit(choice["text"])
        return False

    server.handle_completions(_request(prompt, n_tokens, sampling), take)
    last = answers[-1] if answers else {}
    if "error" in last:
        raise BitsmithError(f"llama.cpp: {printable(str(last['error'].get('message')))}", path=model)
    return _continuation("".join(texts), last)


def _request(prompt: str, n_tokens: int, sampling: Sampling) -> dict[str, Any]:
    greedy = sampling.temperature == 0
    return {
        "prompt": prompt,
        "n_predict": n_tokens,
        "stream": True,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": 0.0,
        "repeat_penalty": 1.0 if greedy else sampling.repeat_penalty,
        "repeat_last_n": sampling.repeat_window,
        "seed": sampling.seed,
    }


def _continuation(text: str, last: dict[str, Any]) -> Continuation:
    timings = last.get("timings", {})
    n_tokens = int(timings.get("predicted_n", 0))
    per_token = timings.get("predicted_ms", 0.0) / 1000 / max(1, n_tokens)
    reasons = [choice.get("finish_reason") for choice in last.get("choices", [])]
    return Continuation(
        text=text,
        stopped="length" if "length" in reasons else "stop token",
        prompt_tokens=int(timings.get("prompt_n", 0)),
        prompt_seconds=timings.get("prompt_ms", 0.0) / 1000,
        seconds=per_token * max(0, n_tokens - 1),
        n_tokens=n_tokens,
    )


def _check_prompt(checkpoint: Checkpoint, prompt: str, ctx_tokens: int | None) -> None:
    """Refuse a prompt longer than the context, where the tokenizer is one that can be counted with."""
    arch = checkpoint.metadata.get("general.architecture")
    limit = checkpoint.metadata.get(f"{arch}.context_length") if ctx_tokens is None else ctx_tokens
    if type(limit) is not int:
        return
    with suppress(UnsupportedError):
        found = tokenizer_from_gguf(checkpoint.metadata, checkpoint.path).encode(prompt).ids
        if len(found) > limit:
            raise BitsmithError(
                f"the prompt has {len(found)} tokens, the context holds {limit}", path=checkpoint.path
            )


def _server(model: Path, n_ctx: int, threads: int | None, verbose: bool) -> Any:
    xllamacpp: Any = import_module("xllamacpp")  # the extra may be absent, and it has no types
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx = n_ctx
    params.n_parallel = 1
    params.warmup = False
    params.verbosity = 3 if verbose else -1
    params.api_keys = [secrets.token_hex()]
    if threads is None and model.stat().st_size < _SMALL_FILE_BYTES:
        threads = 1
    if threads is not None:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    try:
        return xllamacpp.Server(params)
    except RuntimeError as error:
        raise BitsmithError(f"llama.cpp cannot load it: {printable(str(error))}", path=model) from error
