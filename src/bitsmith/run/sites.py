"""What enters each matrix in a forward: layers run from one file of states into the next, inputs watched."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bitsmith.archs import TensorSpec
from bitsmith.errors import BitsmithError, OutputError, UnsupportedError
from bitsmith.numerics.threads import one_blas_thread
from bitsmith.run.device import CPU, current_device
from bitsmith.run.forward import Network, TextModel, Tokens, embed, quiet_transformers
from bitsmith.run.turns import Turn, Turns

Float32 = NDArray[np.float32]
Take = Callable[[str, int, torch.Tensor, Turn], None]
"""Takes (site, first chunk, inputs `B T in`, turn) on a worker thread, every site of every task once.

What depends on the order of the chunks is done in a turn, by a name of its own; a task takes all names that
another does, in the same order.
"""

_ACTIVATION_BYTES = 1 << 30
_WORKER_BYTES = 256 << 20
_CACHE_LINE_BYTES = 64


@dataclass(frozen=True)
class States:
    """Hidden states (`chunks T hidden`, float32) in a file that is read and written by position."""

    path: Path
    shape: tuple[int, int, int]

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return 4 * int(np.prod(self.shape, dtype=np.int64))

    def create(self) -> None:
        """Make the file, with its room on the disk.

        Raises OutputError if there is none.
        """
        with self.path.open("wb") as file:
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, self.nbytes)
                else:  # macOS
                    file.truncate(self.nbytes)
            except OSError as error:
                raise OutputError(
                    f"no room for {self.nbytes} bytes of hidden states: {error.strerror}", path=self.path
                ) from error

    def mapped(self) -> Float32:
        """Return the whole file as an array that writes through."""
        return np.memmap(self.path, dtype=np.float32, mode="r+", shape=self.shape)

    def read(self, start: int, stop: int) -> Float32:
        """Return chunks `[start, stop)`."""
        row = self.shape[1] * self.shape[2]
        part = np.fromfile(self.path, np.float32, (stop - start) * row, offset=4 * start * row)
        return part.reshape(stop - start, *self.shape[1:])

    def write(self, start: int, part: Float32) -> None:
        """Replace the chunks from `start` on by `part` (`B T hidden`)."""
        with self.path.open("r+b") as file:
            file.seek(4 * start * self.shape[1] * self.shape[2])
            file.write(np.ascontiguousarray(part).data)

    def sync(self) -> None:
        """Force the file's bytes to the disk."""
        with self.path.open("r+b") as file:
            os.fsync(file.fileno())


class SiteForward:
    """The reference forward of one model, layer by layer between files, with the inputs of matrices shown.

    Every task runs on one thread of torch, so that results do not depend on how many there are. Raises
    BitsmithError as `final_hidden_states` does, UnsupportedError for several MTP layers.
    """

    def __init__(self, model: TextModel, specs: Sequence[TensorSpec]) -> None:
        with quiet_transformers():
            self.network = Network(model, current_device())
        self._model, self._specs = model, specs
        self.n_layers, self.hidden_size = self.network.n_layers, self.network.hidden_size
        self.mtp_layers = sum(spec.component == "mtp" and spec.role == "ffn.down" for spec in specs)
        if self.mtp_layers > 1:
            raise UnsupportedError(
                f"has {self.mtp_layers} MTP layers, expected one", path=model.checkpoint.path
            )

    def embed(self, tokens: Tokens, target: States) -> None:
        """Write the embedding of `tokens` (`chunks T`)."""
        states = target.mapped()
        embed(self._model, tokens, states)

    def layer(self, index: int, source: States, target: States | None, take: Take) -> Iterator[int]:
        """Run layer `index` from `source` to `target`, if any; yield the chunks of each task."""
        prefix = f"{self._model.arch.text_prefix}layers.{index}."
        with quiet_transformers():
            layer = aligned(self.network.lean_layer(index))
        watch = _Watch(layer, self._modules(prefix), take)

        def run(part: Float32) -> bool:
            return self.network.run(layer, part, None)

        yield from self._through(run, watch, source, target, f"layer {index}")

    def inputs(self, index: int, site: str, source: States, take: Take) -> Iterator[int]:
        """Run layer `index` from `source` as far as `site`, and no further; yield the chunks of each task."""
        prefix = f"{self._model.arch.text_prefix}layers.{index}."
        with quiet_transformers():
            layer = aligned(self.network.lean_layer(index))
        modules = {path: found for path, found in self._modules(prefix).items() if found == site}
        watch = _Watch(layer, modules, take, last=True)

        def run(part: Float32) -> bool:
            with suppress(_ReachedError):
                self.network.run(layer, part, None)
            return bool(np.isfinite(part).all())

        yield from self._through(run, watch, source, None, f"layer {index}")

    def head(self, source: States, target: States, take: Take) -> Iterator[int]:
        """Write the final norm of `source` to `target`, which is what the head reads."""
        norm = aligned(self.network.norm(f"{self._model.arch.text_prefix}norm."))
        watch = _Watch(norm, {}, take)

        def run(part: Float32) -> bool:
            normed = norm(torch.from_numpy(part).to(self.network.device))
            watch.took("head.in", normed)
            torch.from_numpy(part).copy_(normed)
            return bool(np.isfinite(part).all())

        yield from self._through(run, watch, source, target, "the final norm")

    def mtp(self, tokens: Tokens, normed: States, embedded: States, take: Take) -> Iterator[int]:
        """Run the MTP layer on the normed final states of tokens 0…T-2 and the embeddings of 1…T-1.

        Its matrix `fc` reads `concat(norm(embedding of token t+1), norm(final state of t))`, as `graph_mtp`
        in llama.cpp's src/models/qwen35.cpp does; `embedded` (`chunks T-1 hidden`) is overwritten.
        """
        self.embed(tokens[:, 1:], embedded)
        module = self._mtp_module()
        watch = _Watch(module, self._modules("mtp."), take)

        def run(part: Float32) -> bool:
            first, device = watch.first_chunk, self.network.device
            hidden = torch.from_numpy(normed.read(first, first + len(part))[:, :-1]).to(device)
            embeddings = torch.from_numpy(part).to(device)
            pair = module.pre_fc_norm_embedding(embeddings), module.pre_fc_norm_hidden(hidden)
            torch.from_numpy(part).copy_(module.fc(torch.cat(pair, dim=-1)))
            return self.network.run(module.layers[0], part, None)

        yield from self._through(run, watch, embedded, embedded, "the MTP layer")

    def _modules(self, prefix: str) -> dict[str, str]:
        """Return the site of one module for each site under `prefix`, by the module's path."""
        found: dict[str, str] = {}
        for spec in self._specs:
            if spec.site is not None and spec.name.startswith(prefix) and spec.site not in found.values():
                found[spec.name.removeprefix(prefix).removesuffix(".weight")] = spec.site
        return found

    def _mtp_module(self) -> Any:
        """Return the MTP layer with its weights, under the checkpoint's names; transformers has no class."""
        network = self.network
        config = copy.deepcopy(network.config)
        config.layer_types = ["full_attention"]
        with quiet_transformers(), torch.device("meta"):
            layer = getattr(network.module, self._model.arch.layer_class)(config, 0)
            fc = torch.nn.Linear(2 * self.hidden_size, self.hidden_size, bias=False)
        parts = {"layers": torch.nn.ModuleList([layer]), "fc": fc}
        norms = {name: network.norm() for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")}
        return aligned(network.filled(torch.nn.ModuleDict({**parts, **norms}), "mtp."))

    def _through(
        self,
        run: Callable[[Float32], bool],
        watch: _Watch,
        source: States,
        target: States | None,
        what: str,
    ) -> Iterator[int]:
        chunks, tokens = source.shape[:2]
        batch = self.network.batch(tokens)

        @torch.inference_mode()
        def task(number: int) -> tuple[int, bool]:
            start = number * batch
            with watch.task(number, start):
                part = source.read(start, min(start + batch, chunks))
                finite = run(part)
                if target is not None:
                    target.write(start, part)
            return len(part), finite

        task_bytes = self.network.bytes_per_token * tokens * batch
        with quiet_transformers(), site_workers(task_bytes, self.network.device) as pool:
            for done, finite in pool.map(task, range(-(-chunks // batch))):
                if not finite:
                    raise BitsmithError(
                        f"{what} makes NaN or infinite hidden states", path=self._model.checkpoint.path
                    )
                yield done


class _ReachedError(Exception):
    """Ends a layer's forward at the site that was wanted."""


class _Watch:
    """Shows inputs of a module's matrices, with turns in the order of the tasks, whoever runs them."""

    def __init__(
        self, module: torch.nn.Module, sites: Mapping[str, str], take: Take, *, last: bool = False
    ) -> None:
        self._take, self._last = take, last
        self._here = threading.local()
        self._turns = Turns()
        for path, site in sites.items():
            module.get_submodule(path).register_forward_pre_hook(
                lambda _, inputs, site=site: self.took(site, inputs[0])
            )

    @property
    def first_chunk(self) -> int:
        """First chunk of the task that runs on this thread."""
        return int(self._here.first_chunk)

    @contextmanager
    def task(self, number: int, first_chunk: int) -> Iterator[None]:
        """Run task `number`; if it fails, no task waits for it any longer."""
        self._here.first_chunk = first_chunk
        with self._turns.task(number):
            yield

    def took(self, site: str, inputs: torch.Tensor) -> None:
        """Show `inputs` (`B T in`)."""
        self._take(site, self.first_chunk, inputs, self._turns.under(site))
        if self._last:
            raise _ReachedError


def aligned(module: torch.nn.Module) -> torch.nn.Module:
    """Move weights to whole cache lines: the last bits of a product may depend on where its inputs lie."""
    for parameter in module.parameters():
        if parameter.data_ptr() % _CACHE_LINE_BYTES:
            parameter.data = parameter.data.clone()
    return module


def site_threads(task_bytes: int, device: torch.device = CPU) -> int:
    """Return how many threads tasks of `task_bytes` get: torch's, fewer where memory would not do.

    A GPU gets one.
    """
    if device.type != "cpu":
        return 1
    threads = torch.get_num_threads()
    return max(1, min(threads, max(_ACTIVATION_BYTES, threads * _WORKER_BYTES) // task_bytes))


@contextmanager
def site_workers(task_bytes: int, device: torch.device = CPU) -> Iterator[ThreadPoolExecutor]:
    """Threads for tasks of `task_bytes`, one of torch's each: its sums depend on how many share them."""
    threads = torch.get_num_threads()
    workers = site_threads(task_bytes, device)
    try:
        with (
            one_blas_thread(),
            ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        ):
            yield pool
    finally:
        torch.set_num_threads(threads)
