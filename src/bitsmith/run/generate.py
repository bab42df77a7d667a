"""Continue a prompt with real llama.cpp, from the `llama` extra."""

from __future__ import annotations

import secrets
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bitsmith.errors import BitsmithError, UnsupportedError, printable
from bitsmith.store import open_gguf

_SMALL_FILE_BYTES = 64 << 20  # below it, meeting points of threads cost more than the arithmetic they share


def generate(
    model: Path,
    prompt: str,
    n_tokens: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    threads: int | None = None,
    verbose: bool = False,
) -> str:
    """Return the text that llama.cpp puts after `prompt`, at most `n_tokens` tokens; greedy at temperature 0.

    `verbose` lets llama.cpp log to stderr. While it runs, its server listens on a random local port behind a
    random key.

    Raises UnsupportedError without the `llama` extra, DamagedFileError for a damaged GGUF, BitsmithError
    where llama.cpp refuses.
    """
    if find_spec("xllamacpp") is None:
        raise UnsupportedError("generating needs llama.cpp: install bitsmith[llama]")
    with open_gguf(model) as checked:  # llama.cpp's own parser has had memory faults
        if checked.metadata.get("tokenizer.ggml.model") in (None, "no_vocab"):
            raise UnsupportedError("has no tokenizer; generating from text needs one", path=model)
    body = {"prompt": prompt, "n_predict": n_tokens, "temperature": temperature, "seed": seed}
    n_ctx = len(prompt.encode()) + n_tokens + 8  # a byte-level token is at least a byte
    answer = _server(model, n_ctx, threads, verbose).handle_completions(body)
    if "error" in answer:
        raise BitsmithError(f"llama.cpp: {printable(str(answer['error'].get('message')))}", path=model)
    return str(answer["choices"][0]["text"])


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
