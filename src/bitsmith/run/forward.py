"""The reference forward: transformers' own layers in float32, one layer's weights in memory at a time."""

from __future__ import annotations

import importlib
import logging
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.utils import logging as transformers_logging

from bitsmith.archs import Architecture
from bitsmith.errors import BitsmithError, OutputError, UnsupportedError, printable
from bitsmith.log import event
from bitsmith.numerics.divergence import DivergenceAccumulator, TokenScores
from bitsmith.numerics.threads import one_blas_thread
from bitsmith.progress import Progress, silent
from bitsmith.run.device import CPU, current_device, task_tokens
from bitsmith.run.finite import finite_weights
from bitsmith.run.fused import fused
from bitsmith.run.torch_scores import DeviceDivergence
from bitsmith.store.checkpoint import Checkpoint, TensorRef

Float32 = NDArray[np.float32]
Tokens = NDArray[np.int64]

_ACTIVATION_BYTES = 1 << 30
SPILL_BYTES = 256 << 20
_HEAD_SLICE_BYTES = 8 << 20
_DEVICE_LOGITS = 1 << 24  # of one model at a time on a GPU: 128 MB in float64
_LOGIT_BLOCK = 1 << 19  # logits of one model at a time: 2 MB
_KNOWN_LAYERS = {"full_attention", "linear_attention"}


@dataclass(frozen=True)
class TextModel:
    """A model's text tensors under Hugging Face names; `source` is what is stored, closed on exit."""

    checkpoint: Checkpoint
    arch: Architecture
    source: Checkpoint

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.source.close()

    @property
    def embedding(self) -> TensorRef:
        """The token embedding (`vocab hidden`)."""
        return self._tensor(f"{self.arch.text_prefix}embed_tokens.weight")

    @property
    def head(self) -> TensorRef:
        """The output head (`vocab hidden`); the token embedding where the two are tied."""
        return self.embedding if self.arch.tied else self._tensor("lm_head.weight")

    def _tensor(self, name: str) -> TensorRef:
        if name not in self.checkpoint:
            raise BitsmithError("missing", path=self.checkpoint.path, tensor=name)
        return self.checkpoint[name]


class Observer(Protocol):
    """Watches a forward: called layer by layer, in the order of the chunks, on the calling thread."""

    def entering(self, layer: int, states: Float32) -> None:
        """Take hidden states (`B T hidden`) about to enter `layer`; `n_layers` stands for the final norm."""

    def cached(self, layer: int, keys: Float32, values: Float32) -> None:
        """Take K, normed and rotated, and V (`B heads T head_dim`), as they enter the layer's KV cache."""


class _Cache:
    """A KV cache of one layer that keeps what is put into it and gives it back unchanged."""

    entries: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep and return keys and values (`B heads T head_dim`); transformers' attention calls this."""
        self.entries = keys, values
        return keys, values


def final_hidden_states(
    model: TextModel, tokens: Tokens, first: int, progress: Progress = silent, stage: str = "forward"
) -> Float32:
    """Run `tokens` (`chunks T`); return normed hidden states of positions first…T-2 (`chunks S hidden`).

    Every chunk starts from an empty state, as in llama.cpp's perplexity. Arrays beyond 256 MB live in an
    unnamed temporary file. Reports in tokens times layers.

    Raises BitsmithError for tensors that are missing, extra, mis-shaped, or that make the states overflow.
    """
    with quiet_transformers(), torch.inference_mode():
        network = Network(model, current_device())
        states = _through_all(network, tokens, progress, stage)
        return network.normed(states[:, first:-1])


def observe(
    model: TextModel, tokens: Tokens, observer: Observer, progress: Progress = silent, stage: str = "observe"
) -> None:
    """Run `tokens` (`chunks T`) and show `observer` what enters each layer and each KV cache.

    The same forward as `final_hidden_states`, which the observer does not change. Reports in tokens times
    layers. Raises as `final_hidden_states` does.
    """
    with quiet_transformers(), torch.inference_mode():
        network = Network(model, current_device())
        _through_all(network, tokens, progress, stage, observer)


class Steps:
    """A forward that its caller takes layer by layer over states that the caller holds (`chunks T hidden`).

    The same layers as `final_hidden_states`. Raises as it does.
    """

    def __init__(self, model: TextModel) -> None:
        with quiet_transformers():
            self._network = Network(model, current_device())
        self.n_layers = self._network.n_layers

    def embedded(self, tokens: Tokens) -> Float32:
        """Return the embedding of `tokens` (`chunks T`)."""
        states = self.room(tokens.shape)
        embed(self._network.model, tokens, states)
        return states

    def room(self, shape: tuple[int, ...]) -> Float32:
        """Return zeroed states for tokens of `shape`; large ones live in an unnamed temporary file."""
        return _zeros((*shape, self._network.hidden_size))

    def advance(self, layer: int, states: Float32) -> None:
        """Replace `states` by the output of `layer`."""
        network = self._network
        batch = network.batch(states.shape[1])
        with quiet_transformers(), torch.inference_mode(), network.workers(states.shape[1]) as pool:
            for _ in network.through_layer(layer, states, batch, pool):
                pass

    @torch.inference_mode()
    def normed(self, states: Float32) -> Float32:
        """Return the final norm of `states` (`chunks S hidden`)."""
        return self._network.normed(states)


def _through_all(
    network: Network, tokens: Tokens, progress: Progress, stage: str, observer: Observer | None = None
) -> Float32:
    """Return the states (`chunks T hidden`) behind the last layer."""
    states = _zeros((*tokens.shape, network.hidden_size))
    embed(network.model, tokens, states)
    batch = network.batch(tokens.shape[1])
    done, total = 0, network.n_layers * tokens.size
    with network.workers(tokens.shape[1]) as pool:
        for index in range(network.n_layers):
            if observer is not None:
                _show(observer, index, states, batch)
            for chunks in network.through_layer(index, states, batch, pool, observer):
                done += chunks * tokens.shape[1]
                progress(stage, done, total)
    if observer is not None:
        _show(observer, network.n_layers, states, batch)
    return states


def _show(observer: Observer, layer: int, states: Float32, batch: int) -> None:
    for start in range(0, len(states), batch):
        observer.entering(layer, states[start : start + batch])


def compare(
    reference: TextModel,
    candidate: TextModel,
    states: tuple[Float32, Float32],
    targets: Tokens,
    progress: Progress = silent,
) -> TokenScores:
    """Replay both heads over hidden states (`N hidden` each) and score `targets` (`N`).

    Both heads are read once, in slices of the vocabulary; logits are never stored whole. Reports in
    vocabulary entries.

    Raises BitsmithError if the heads' vocabularies differ in size.
    """
    check_heads(reference, candidate)
    heads = reference.head, candidate.head
    vocab = heads[0].n_rows
    if (device := current_device()).type != "cpu":
        return _compared_on(device, reference, candidate, states, targets, progress)
    accumulator = DivergenceAccumulator(targets)
    widest = max(head.shape[1] for head in heads)
    step = min(vocab, max(1, _HEAD_SLICE_BYTES // (4 * widest)), _LOGIT_BLOCK // 64)
    block = max(1, _LOGIT_BLOCK // step)
    blocks = [slice(row, min(row + block, len(targets))) for row in range(0, len(targets), block)]

    def read(start: int) -> list[torch.Tensor]:
        stop = min(start + step, vocab)
        return [weight_of(model.head, model.checkpoint.path, start, stop) for model in (reference, candidate)]

    def add(rows: slice, first: int, weights: list[torch.Tensor]) -> None:
        ref, cand = (_product(part[rows], weight) for part, weight in zip(states, weights, strict=True))
        accumulator.update(rows, first, ref, cand)

    with _workers(_ACTIVATION_BYTES // (8 * 8 * _LOGIT_BLOCK)) as pool:
        coming = pool.submit(read, 0)
        for start in range(0, vocab, step):
            weights = coming.result()
            if start + step < vocab:  # read beside the products
                coming = pool.submit(read, start + step)
            for _ in pool.map(lambda rows, a=start, w=weights: add(rows, a, w), blocks):
                pass
            progress("head", min(start + step, vocab), vocab)
    return accumulator.scores()


@torch.inference_mode()
def _compared_on(
    device: torch.device,
    reference: TextModel,
    candidate: TextModel,
    states: tuple[Float32, Float32],
    targets: Tokens,
    progress: Progress,
) -> TokenScores:
    """Score on `device`: slices of the heads and blocks of the states go there, scores come back."""
    vocab, accumulator = reference.head.n_rows, DeviceDivergence(targets, device)
    step = max(1, _HEAD_SLICE_BYTES // (4 * max(part.shape[1] for part in states)))
    rows = max(1, _DEVICE_LOGITS // step)
    for start in range(0, vocab, step):
        stop = min(start + step, vocab)
        heads = [
            weight_of(model.head, model.checkpoint.path, start, stop).to(device)
            for model in (reference, candidate)
        ]
        for first in range(0, len(targets), rows):
            part = slice(first, min(first + rows, len(targets)))
            ref, cand = (
                torch.from_numpy(np.ascontiguousarray(own[part])).to(device) @ head.T
                for own, head in zip(states, heads, strict=True)
            )
            accumulator.update(part, start, ref, cand)
        progress("head", stop, vocab)
    return accumulator.scores()


@torch.inference_mode()
def _product(states: Float32, weight: torch.Tensor) -> Float32:
    product: Float32 = (torch.from_numpy(states) @ weight.T).numpy()
    return product


def check_heads(reference: TextModel, candidate: TextModel) -> None:
    """Raise BitsmithError if the two models' heads give logits for different numbers of tokens."""
    expected, found = reference.head.n_rows, candidate.head.n_rows
    if found != expected:
        raise BitsmithError(
            f"the vocabulary has {found} tokens, the reference's {expected}",
            path=candidate.checkpoint.path,
            tensor=candidate.head.name,
        )


class Network:
    """The transformers classes of one model, its rotary embedding, and layers built on demand on `device`."""

    def __init__(self, model: TextModel, device: torch.device = CPU) -> None:
        self.model, self.device = model, device
        arch = model.arch
        self.module = importlib.import_module(arch.transformers_module)
        self.config = getattr(self.module, arch.config_class).from_dict(dict(arch.text_config))
        self.config._attn_implementation = "sdpa"
        self.n_layers = int(self.config.num_hidden_layers)
        self.hidden_size = int(self.config.hidden_size)
        unknown = set(self.config.layer_types) - _KNOWN_LAYERS
        if unknown:
            raise UnsupportedError(f"layers of type {', '.join(sorted(unknown))}", path=model.checkpoint.path)
        self.rotary = getattr(self.module, arch.rotary_class)(self.config)

    @property
    def bytes_per_token(self) -> int:
        """What a layer's intermediates take for a token: wider of MLP and DeltaNet, measured, rounded up."""
        config = self.config
        delta = getattr(config, "linear_num_value_heads", 0) * getattr(config, "linear_value_head_dim", 0)
        return 4 * (8 * self.hidden_size + max(4 * int(config.intermediate_size), 20 * delta))

    def batch(self, ctx_tokens: int) -> int:
        """Return how many chunks of `ctx_tokens` a task takes."""
        return max(1, task_tokens(self.device) // ctx_tokens)

    @contextmanager
    def workers(self, ctx_tokens: int) -> Iterator[ThreadPoolExecutor]:
        """Give threads for tasks over chunks of `ctx_tokens`, one for a GPU."""
        task_bytes = self.bytes_per_token * ctx_tokens * self.batch(ctx_tokens)
        limit = _ACTIVATION_BYTES // task_bytes if self.device.type == "cpu" else 1
        with _workers(limit) as pool:
            yield pool

    def through_layer(
        self,
        index: int,
        states: Float32,
        batch: int,
        pool: ThreadPoolExecutor,
        observer: Observer | None = None,
    ) -> Iterator[int]:
        """Replace `states` (`chunks T hidden`) by layer `index`'s output, `batch` chunks in a task.

        Yields the chunks of each task; the layer's weights are dropped at the end.
        """
        layer = self.lean_layer(index)
        caching = observer is not None and self.config.layer_types[index] == "full_attention"
        parts = [states[start : start + batch] for start in range(0, len(states), batch)]
        caches = [_Cache() if caching else None for _ in parts]
        tasks = zip(parts, caches, pool.map(lambda *task: self.run(layer, *task), parts, caches), strict=True)
        for part, cache, finite in tasks:
            if not finite:
                raise BitsmithError(
                    f"layer {index} makes NaN or infinite hidden states", path=self.model.checkpoint.path
                )
            if observer is not None and cache is not None and cache.entries is not None:
                keys, values = (entry.cpu().numpy() for entry in cache.entries)
                cache.entries = None
                observer.cached(index, keys, values)
            yield len(part)

    def layer(self, index: int) -> torch.nn.Module:
        """Return a decoder layer with its weights."""
        event("layer", layer=index, model=self.model.checkpoint.path)
        with torch.device("meta"):
            layer = getattr(self.module, self.model.arch.layer_class)(self.config, index)
        return self.filled(layer, f"{self.model.arch.text_prefix}layers.{index}.")

    def lean_layer(self, index: int) -> torch.nn.Module:
        """Return a decoder layer with its weights for forwards without gradients."""
        layer = self.layer(index)
        return fused(layer) if self.device.type == "cpu" else layer

    @torch.inference_mode()
    def run(self, layer: torch.nn.Module, states: Float32, cache: _Cache | None) -> bool:
        """Replace `states` (`B T hidden`) by the causal layer's output; tell if that is finite."""
        hidden = torch.from_numpy(states)
        made = layer(
            hidden.to(self.device),
            attention_mask=None,  # scaled_dot_product_attention then masks causally by itself
            past_key_values=cache,
            **self.positions(hidden),
        )
        hidden.copy_(made)
        return bool(np.isfinite(states).all())

    def positions(self, hidden: torch.Tensor) -> dict[str, Any]:
        """Return the arguments of a layer that say where the tokens of `hidden` (`B T hidden`) stand."""
        places = torch.arange(hidden.shape[1])[None]
        turned = tuple(part.to(self.device) for part in self.rotary(hidden.cpu(), places))
        return {"position_embeddings": turned, "position_ids": places.to(self.device)}

    def norm(self, prefix: str | None = None) -> torch.nn.Module:
        """Return an RMSNorm of the residual stream with the weights under `prefix`, None: without weights."""
        with torch.device("meta"):
            norm: torch.nn.Module = getattr(self.module, self.model.arch.norm_class)(
                self.hidden_size, eps=self.config.rms_norm_eps
            )
        return norm if prefix is None else self.filled(norm, prefix)

    def normed(self, states: Float32) -> Float32:
        """Return the final norm of `states` (`B S hidden`)."""
        norm = self.norm(f"{self.model.arch.text_prefix}norm.")
        out = _zeros(states.shape)
        for index in range(len(states)):
            out[index] = norm(torch.from_numpy(states[index]).to(self.device)).cpu().numpy()
        return out

    def filled(self, module: torch.nn.Module, prefix: str) -> torch.nn.Module:
        """Give a module on the meta device its weights, the tensors of the checkpoint under `prefix`."""
        checkpoint = self.model.checkpoint
        wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
        found = {name.removeprefix(prefix) for name in checkpoint if name.startswith(prefix)}
        for what, names in (("missing", wanted.keys() - found), ("not of this model", found - wanted.keys())):
            if names:
                listed = ", ".join(printable(prefix + name) for name in sorted(names))
                raise BitsmithError(f"{what}: {listed}", path=checkpoint.path)
        for name, shape in wanted.items():
            if (stored := checkpoint[prefix + name].shape) != shape:
                raise BitsmithError(
                    f"shape is {stored}, expected {shape}", path=checkpoint.path, tensor=prefix + name
                )
        weights = {
            name: weight_of(checkpoint[prefix + name], checkpoint.path).to(self.device) for name in wanted
        }
        module.load_state_dict(weights, strict=True, assign=True)
        return module.eval()


def embed(model: TextModel, tokens: Tokens, states: Float32) -> None:
    """Fill `states` (`chunks T hidden`) with the embedding rows of `tokens`, reading only rows that occur."""
    embedding = model.embedding
    if tokens.max() >= embedding.n_rows:
        raise BitsmithError(
            f"token {tokens.max()} has no row among {embedding.n_rows}",
            path=model.checkpoint.path,
            tensor=embedding.name,
        )
    flat = states.reshape(-1, states.shape[-1])
    order = np.argsort(tokens, axis=None, kind="stable")
    ordered = tokens.reshape(-1)[order]
    limit = max(1, _HEAD_SLICE_BYTES // (4 * states.shape[-1]))
    start = 0
    while start < len(ordered):
        low = int(ordered[start])
        stop = start + _run_length(ordered[start:], limit)
        rows = finite_weights(embedding, model.checkpoint.path, low, int(ordered[stop - 1]) + 1)
        flat[order[start:stop]] = rows[ordered[start:stop] - low]
        start = stop


def _run_length(ordered: Tokens, limit: int, gap: int = 16) -> int:
    """Return how many of the sorted tokens one read serves: no gap over `gap` rows, at most `limit` rows."""
    window = ordered[: int(np.searchsorted(ordered, ordered[0] + limit))]
    breaks = np.flatnonzero(np.diff(window) > gap)
    return int(breaks[0]) + 1 if len(breaks) else len(window)


def weight_of(ref: TensorRef, path: Path, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """Return rows `[start, stop)` of a weight of the model at `path` in float32.

    Raises DamagedFileError with the place of a weight that is not finite.
    """
    return torch.from_numpy(np.require(finite_weights(ref, path, start, stop), requirements=["W"]))


def _zeros(shape: tuple[int, ...]) -> Float32:
    """Return a float32 array of zeros, in an unnamed temporary file if it is large.

    Raises OutputError if the temporary folder has no room for it.
    """
    size_bytes = 4 * int(np.prod(shape, dtype=np.int64))
    if size_bytes <= SPILL_BYTES:
        return np.zeros(shape, dtype=np.float32)
    with tempfile.TemporaryFile() as file:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size_bytes)
            else:  # macOS and Windows
                file.truncate(size_bytes)
        except OSError as error:
            raise OutputError(
                f"no room for {size_bytes} bytes of hidden states: {error.strerror}",
                path=tempfile.gettempdir(),
            ) from error
        return np.memmap(file, dtype=np.float32, mode="r+", shape=shape)


@contextmanager
def _workers(limit: int) -> Iterator[ThreadPoolExecutor]:
    """Threads, at most `limit`, that share out torch's own; they work on separate chunks.

    torch's threading inside an operation stalls in DeltaNet's many tiny triangular solves.
    """
    threads = torch.get_num_threads()
    workers = max(1, min(threads, limit))
    share = threads // workers
    try:
        with (
            one_blas_thread(),
            ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(share,)) as pool,
        ):
            yield pool
    finally:
        torch.set_num_threads(threads)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' notes about absent fast kernels; errors still show."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
