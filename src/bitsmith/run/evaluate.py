"""Measure a model against a reference on a text: perplexity, KL divergence and agreement, with intervals."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from bitsmith.archs import architecture_of, claim, import_view
from bitsmith.archs.tokenizer import load_tokenizer, tokenizer_metadata
from bitsmith.errors import BitsmithError, printable
from bitsmith.numerics.divergence import Estimate, TokenScores, estimates
from bitsmith.numerics.threads import one_blas_thread
from bitsmith.passes.transform import Applied, model_of
from bitsmith.progress import Progress, silent
from bitsmith.run.device import current_device, described, on_device
from bitsmith.run.evaluation import INTERVAL, RESAMPLES, Artifact, Evaluation, Measure, Protocol
from bitsmith.run.forward import TextModel, check_heads, compare, final_hidden_states
from bitsmith.run.products import current_products, matrix_products
from bitsmith.store import open_checkpoint
from bitsmith.store.checkpoint import Checkpoint
from bitsmith.store.hub import local

PROTOCOL = "llama.cpp perplexity: non-overlapping chunks, positions ctx/2 to ctx-2 of each are scored"
MIN_CTX_TOKENS = 4

_TOKENS = "tokenizer.ggml.tokens"

_UNITS = {
    "ppl_ref": "perplexity",
    "ppl_cand": "perplexity",
    "ppl_ratio": "ratio",
    "ppl_difference": "perplexity",
    "top1_agreement": "fraction",
}  # every other measure is in nats


@one_blas_thread()
def evaluate(
    ref: Path,
    candidate: Path,
    text: Path,
    ctx_tokens: int = 512,
    chunks: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
    device: str = "cpu",
    products: str = "float32",
) -> Evaluation:
    """Measure `candidate` against `ref`, each whatever `open_checkpoint` opens, on a UTF-8 text.

    llama.cpp's protocol: the text, tokenized by the reference, is cut into chunks of `ctx_tokens`; each
    starts from an empty context and its positions ctx/2…ctx-2 are scored on the token that follows. `chunks`
    caps how many are used. Intervals are 95 % percentile intervals of a seeded paired bootstrap over chunks.
    A candidate without a tokenizer, such as a .cellm alone, is held against the reference's vocabulary by its
    size; a warning says so. `device` is one of `run.device`: a GPU's measures differ in the last digits.
    `products` is one of `run.products`: BF16 rounds what enters both models' products, which adds to KLD.

    Raises BitsmithError for a text that is not UTF-8 or shorter than one chunk, for vocabularies that differ,
    and for logits that are not finite.
    """
    with on_device(device), matrix_products(products):
        return evaluate_all(ref, [candidate], text, ctx_tokens, chunks, seed, progress)[0]


def evaluate_all(
    ref: Path,
    candidates: Sequence[Path],
    text: Path,
    ctx_tokens: int = 512,
    chunks: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> list[Evaluation]:
    """Measure several candidates as `evaluate` does, running the reference forward once."""
    ref, candidates = local(ref, progress), [local(path, progress) for path in candidates]
    with Reference(ref, text, ctx_tokens, chunks, seed, progress) as reference:
        for path in candidates:  # refuse before the first forward
            reference.check(path)
        return [reference.measure(path)[0] for path in candidates]


class Reference:
    """A model whose forward over a text is run once, before the first of its candidates is measured.

    Options and errors are `evaluate`'s. A context manager that closes the model.
    """

    def __init__(
        self,
        path: Path,
        text: Path,
        ctx_tokens: int = 512,
        chunks: int | None = None,
        seed: int = 0,
        progress: Progress = silent,
    ) -> None:
        self.model = open_model(path)
        self._progress = progress
        self._warnings: dict[Path, tuple[str, ...]] = {}
        try:
            self.tokens, self.protocol = text_chunks(self.model, text, ctx_tokens, chunks, seed)
        except BaseException:
            self.model.source.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.model.source.close()

    def check(self, path: Path) -> None:
        """Refuse a candidate with another vocabulary, without a forward."""
        with open_model(path) as candidate:
            self._warnings[path] = check_vocabulary(self.model, candidate)

    def measure(self, path: Path) -> tuple[Evaluation, TokenScores]:
        """Return a candidate's measures, and what they were made of (`chunks tokens`)."""
        if path not in self._warnings:
            self.check(path)
        tokens, protocol = self.tokens, self.protocol
        targets = tokens[:, protocol.ctx_tokens // 2 + 1 :].reshape(-1)
        with open_model(path) as candidate:
            states = self._states, scored_states(candidate, tokens, self._progress, "candidate")
            scores = compare(self.model, candidate, states, targets, self._progress)
            check_finite(scores, self.model, candidate)
            scores = scores.reshape(len(tokens))
            found = estimates(scores, protocol.resamples, protocol.seed)
            measures = {name: _measure(name, estimate) for name, estimate in found.items()}
            weighed = _artifact(candidate)
        return Evaluation(self.artifact, weighed, protocol, **measures, warnings=self._warnings[path]), scores

    @property
    def artifact(self) -> Artifact:
        """The model's size."""
        return _artifact(self.model)

    @cached_property
    def _states(self) -> NDArray[np.float32]:
        return scored_states(self.model, self.tokens, self._progress, "reference")


def open_model(path: Path, applied: Sequence[Applied] = ()) -> TextModel:
    """Open a Hugging Face folder or a GGUF under Hugging Face names, with transforms done to it.

    Raises as `open_checkpoint`, `claim` and `import_view` do.
    """
    checkpoint = open_checkpoint(path)
    if applied:
        model = model_of(checkpoint)
        for one in applied:
            model = model.applying(one.transform, one.vectors)
        return TextModel(model.view(), model.arch, checkpoint)
    if checkpoint.config:
        claim(checkpoint)
        return TextModel(checkpoint, architecture_of(checkpoint), checkpoint)
    view = import_view(checkpoint)
    return TextModel(view, view.arch, checkpoint)


def scored_states(
    model: TextModel, tokens: NDArray[np.int64], progress: Progress, stage: str
) -> NDArray[np.float32]:
    """Return the normed states (`scored_tokens hidden`) that a model's logits on chunks are made of."""
    states = final_hidden_states(model, tokens, tokens.shape[1] // 2, progress, stage)
    return states.reshape(-1, states.shape[-1])


def text_chunks(
    model: TextModel, text: Path, ctx_tokens: int, chunks: int | None, seed: int = 0
) -> tuple[NDArray[np.int64], Protocol]:
    """Return a UTF-8 text as token chunks (`chunks ctx_tokens`) the way llama.cpp's perplexity cuts it.

    Raises BitsmithError for a text that is not UTF-8 or shorter than one chunk.
    """
    if ctx_tokens < MIN_CTX_TOKENS:
        raise BitsmithError(f"a context of {ctx_tokens} tokens is too short; {MIN_CTX_TOKENS} is the least")
    if chunks is not None and chunks < 1:
        raise BitsmithError(f"{chunks} chunks leave nothing to measure")
    raw, decoded = _read_text(text)
    tokenizer = load_tokenizer(model.source)
    tokenizer.encode_special_tokens = (
        True  # llama.cpp's perplexity reads "<|im_end|>" in a text as plain text
    )
    found = np.asarray(tokenizer.encode(decoded, add_special_tokens=False).ids, dtype=np.int64)
    bos = bos_token(model)
    if bos is not None:
        found = np.concatenate([[bos], found])
    available = len(found) // ctx_tokens
    if available == 0:
        raise BitsmithError(
            f"has {len(found)} tokens, one chunk needs {ctx_tokens}; give a longer text or a smaller --ctx",
            path=text,
        )
    used = available if chunks is None else min(chunks, available)
    windows = found[: used * ctx_tokens].reshape(used, ctx_tokens).copy()
    if bos is not None:
        windows[:, 0] = bos
    return windows, Protocol(
        name=PROTOCOL,
        text=str(text),
        text_sha256=hashlib.sha256(raw).hexdigest(),
        text_tokens=len(found),
        ctx_tokens=ctx_tokens,
        chunks=used,
        chunks_available=available,
        scored_tokens=used * (ctx_tokens - 1 - ctx_tokens // 2),
        resamples=RESAMPLES,
        seed=seed,
        device=described(current_device()),
        products=current_products(),
    )


def _read_text(path: Path) -> tuple[bytes, str]:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise BitsmithError(f"cannot be read: {error.strerror}", path=path) from error
    try:
        return raw, raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BitsmithError(
            f"is not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}", path=path
        ) from error


def check_vocabulary(reference: TextModel, candidate: TextModel) -> tuple[str, ...]:
    """Refuse a candidate with another vocabulary; return a warning where only its size can be compared."""
    check_heads(reference, candidate)
    ours, theirs = tokenizer_keys(reference)[_TOKENS], _keys(candidate).get(_TOKENS)
    if not isinstance(theirs, list):
        size = reference.head.n_rows
        return (f"{candidate.checkpoint.path}: has no tokenizer; only the vocabulary's size, {size}, agrees",)
    if len(ours) != len(theirs):
        raise BitsmithError(
            f"the tokenizer has {len(theirs)} tokens, the reference's {len(ours)}",
            path=candidate.checkpoint.path,
        )
    for index, (expected, found) in enumerate(zip(ours, theirs, strict=True)):
        if expected != found:
            raise BitsmithError(
                f"token {index} is {printable(found)!r}, the reference's is {printable(expected)!r}; "
                "models with different vocabularies cannot be compared",
                path=candidate.checkpoint.path,
            )
    return ()


def tokenizer_keys(model: TextModel) -> dict[str, Any]:
    """Return the tokenizer's GGUF keys: as stored in a GGUF, as they would be exported for a folder."""
    keys = _keys(model)
    if not isinstance(keys.get(_TOKENS), list):
        raise BitsmithError(
            "has no tokenizer: put its tokenizer.json beside it, or name one with --tokenizer",
            path=model.checkpoint.path,
        )
    return keys


def _keys(model: TextModel) -> dict[str, Any]:
    stored = model.source.metadata
    return stored if model.source is not model.checkpoint else tokenizer_metadata(model.source, model.arch)[0]


def bos_token(model: TextModel) -> int | None:
    """Return the token that llama.cpp puts before a text, None where there is none."""
    keys = tokenizer_keys(model)
    return keys.get("tokenizer.ggml.bos_token_id") if keys.get("tokenizer.ggml.add_bos_token") else None


def check_finite(scores: TokenScores, reference: TextModel, candidate: TextModel) -> None:
    """Raise BitsmithError that names the model whose logits are not finite, if one's are not."""
    for model, nll in ((reference, scores.nll_ref), (candidate, scores.nll_cand)):
        bad = np.flatnonzero(~np.isfinite(nll))
        if len(bad):
            raise BitsmithError(
                f"logits are NaN or infinite at {len(bad)} of {nll.size} scored tokens, first at {bad[0]}",
                path=model.checkpoint.path,
            )


def _measure(name: str, estimate: Estimate) -> Measure:
    interval = None if estimate.low is None else INTERVAL
    return Measure(estimate.value, _UNITS.get(name, "nats"), estimate.low, estimate.high, interval)


def _artifact(model: TextModel) -> Artifact:
    stored: Checkpoint = model.source
    weights = sum(ref.size for ref in stored.values())
    return Artifact(
        path=str(stored.path),
        file_bytes=sum(file.stat().st_size for file in stored.files),
        weights=weights,
        bpw=8 * sum(ref.nbytes for ref in stored.values()) / weights,
    )
