"""Continue a prompt with bitsmith's own forward, from whatever checkpoint can be opened."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bitsmith.errors import BitsmithError, printable
from bitsmith.run.decode import Decoder, positions
from bitsmith.run.evaluate import open_model
from bitsmith.run.forward import TextModel
from bitsmith.run.generate import Continuation, Emit
from bitsmith.run.sampling import GREEDY, Sampler, Sampling
from bitsmith.run.vocabulary import Message, Vocabulary, open_teller

CHAT_CTX_TOKENS = 8192


def continue_prompt(
    path: Path,
    prompt: str,
    n_tokens: int,
    sampling: Sampling = GREEDY,
    *,
    chat: bool = False,
    tokenizer: Path | None = None,
    ctx_tokens: int | None = None,
    memory_bytes: int | None = None,
    emit: Emit | None = None,
) -> Continuation:
    """Return what the model at `path` puts after `prompt`, at most `n_tokens` tokens; `emit` gets it growing.

    With `chat` the prompt is the user's message in the model's chat template. `ctx_tokens` bounds prompt and
    answer together; by default the model's positions do. `tokenizer` is as for `open_teller`, for a file
    that has none, such as a .cellm alone.

    Raises BitsmithError for a prompt that is empty or does not fit, for `chat` without a template, and as
    `Vocabulary` and `Decoder` do.
    """
    with open_model(path) as model, open_teller(model, tokenizer) as teller:
        vocabulary = Vocabulary(teller)
        text = vocabulary.chat_text([{"role": "user", "content": prompt}]) if chat else prompt
        tokens = vocabulary.encode(text)
        room = positions(model, ctx_tokens)
        check_prompt(len(tokens), room, path)
        decoder = Decoder(model, min(room, len(tokens) + n_tokens), memory_bytes)
        return written(decoder, vocabulary, tokens, n_tokens, sampling, emit)


class Chat:
    """A conversation with a model in memory; what the turns have in common is not computed again.

    `ctx_tokens` bounds the whole conversation (default: 8192, or the model's positions where they are fewer).
    `teller` has the tokenizer, the chat template and the stop tokens (default: `model`). Raises as
    `continue_prompt` does.
    """

    def __init__(
        self,
        model: TextModel,
        sampling: Sampling,
        teller: TextModel | None = None,
        ctx_tokens: int | None = None,
        memory_bytes: int | None = None,
    ) -> None:
        self._path = model.checkpoint.path
        self._vocabulary = Vocabulary(teller or model)
        room = positions(model, ctx_tokens)
        room = min(room, CHAT_CTX_TOKENS) if ctx_tokens is None else room
        self._decoder = Decoder(model, room, memory_bytes)
        self._sampling = sampling
        self._messages: list[Message] = []
        self._fed: list[int] = []

    def say(self, text: str, n_tokens: int, emit: Emit | None = None) -> Continuation:
        """Return the answer to `text`; a turn that is refused leaves the conversation as it was."""
        asked: list[Message] = [*self._messages, {"role": "user", "content": text}]
        tokens = self._vocabulary.encode(self._vocabulary.chat_text(asked))
        check_prompt(len(tokens), self._decoder.ctx_tokens, self._path)
        fed, self._fed = self._fed, []  # an interrupted answer leaves them in doubt
        if not fed or fed != tokens[: len(fed)] or len(fed) == len(tokens):
            self._decoder.reset()  # the template tells the past otherwise than it was said
            fed = []
        sampling = replace(self._sampling, seed=self._sampling.seed + len(self._messages))
        new = tokens[len(fed) :]
        answer = written(self._decoder, self._vocabulary, new, n_tokens, sampling, emit)
        self._fed = [*tokens, *answer.tokens][: self._decoder.n_tokens]
        self._messages = [*asked, {"role": "assistant", "content": answer.text}]
        return answer


def check_prompt(n_tokens: int, ctx_tokens: int, path: Path) -> None:
    """Raise BitsmithError for a prompt of no tokens, or of more than the context holds."""
    if n_tokens == 0:
        raise BitsmithError("the prompt has no tokens to continue", path=path)
    if n_tokens > ctx_tokens:
        raise BitsmithError(f"the prompt has {n_tokens} tokens, the context holds {ctx_tokens}", path=path)


def written(
    decoder: Decoder,
    vocabulary: Vocabulary,
    prompt: list[int],
    n_tokens: int,
    sampling: Sampling,
    emit: Emit | None = None,
) -> Continuation:
    """Feed `prompt` to `decoder` and write on until `n_tokens`, a stop token or the end of the context."""
    started = time.monotonic()
    logits = decoder.feed(prompt)
    read = first = last = time.monotonic()
    pieces = vocabulary.pieces()
    tokens: list[int] = []
    texts: list[str] = []

    def put(text: str) -> None:
        texts.append(text)
        if emit is not None and text:
            emit(text)

    for token in _picked(decoder, logits, n_tokens, Sampler(sampling, prompt)):
        if token in vocabulary.stops:
            stopped = f"stop token {printable(vocabulary.tokenizer.id_to_token(token) or str(token))}"
            break
        tokens.append(token)
        put(pieces.push(token))
        last = time.monotonic()
        first = last if len(tokens) == 1 else first
    else:
        stopped = "length" if len(tokens) == n_tokens else "end of the context"
    put(pieces.rest())
    return Continuation(
        text="".join(texts),
        stopped=stopped,
        prompt_tokens=len(prompt),
        prompt_seconds=read - started,
        seconds=last - first,
        n_tokens=len(tokens),
        tokens=tuple(tokens),
        weight_bytes=decoder.weight_bytes,
        cache_bytes=decoder.cache_bytes,
    )


def _picked(decoder: Decoder, logits: NDArray[np.float32], n_tokens: int, sampler: Sampler) -> Iterator[int]:
    """Yield tokens, each fed to `decoder` only when the next one is asked for."""
    for left in reversed(range(n_tokens)):
        token = sampler.pick(logits)
        yield token
        if left and decoder.n_tokens < decoder.ctx_tokens:
            logits = decoder.feed([token])
        else:
            return
