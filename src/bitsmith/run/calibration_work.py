"""A calibration under way: its steps, what each reads and writes, and what a killed run goes on with."""

from __future__ import annotations

import math
import shutil
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from safetensors.numpy import load_file, save_file

from bitsmith.archs import TensorSpec
from bitsmith.log import event
from bitsmith.progress import Progress
from bitsmith.run.forward import TextModel, Tokens
from bitsmith.run.gather import Gather, Kept
from bitsmith.run.saliency import Backward, Saliency
from bitsmith.run.sites import SiteForward, States
from bitsmith.store.atomic import sync_path
from bitsmith.store.journal import Journal, Key, remove_work
from bitsmith.store.statistics import write_sites
from bitsmith.store.statistics_manifest import SiteEntry, entries_from_json

_BACKWARD_COST = 3  # a layer's backward pass in the seconds of its forward, nearly
_EMBED, _HEAD, _MTP = "embed", "head", "mtp"
_NORMED, _EMBEDDED = "normed", "embedded"  # files that the last two write


class Steps:
    """The steps of a calibration in their order, and what each reads and writes.

    Without saliency, layer by layer forwards, `layers.N`, from the states before to those behind. With it,
    forwards without gathering, `forward.N`, all states kept; then back from the head, `layers.N` from the
    gradient by the layer's output to that by its input, with the states before it. The head has
    `head_layers` times as many weights as a layer.
    """

    def __init__(self, n_layers: int, head_layers: float, *, mtp: bool, saliency: bool) -> None:
        self.n_layers, self.saliency = n_layers, saliency
        self._head_cost = max(1, round(2 * head_layers)) if saliency else 1
        layers = [f"layers.{n}" for n in range(n_layers)]
        last = [_HEAD, *([_MTP] if mtp else [])]
        forwards = [f"forward.{n}" for n in range(n_layers)]
        self.names = [_EMBED, *forwards, *last, *layers[::-1]] if saliency else [_EMBED, *layers, *last]

    def reads(self, name: str) -> set[str]:
        """Return the files of states and gradients that a step reads."""
        kind, _, number = name.partition(".")
        if kind == _EMBED:
            return set()
        if kind == _HEAD:
            return {_states(self.n_layers)}
        if kind == _MTP:
            return {_NORMED}
        read = {_states(int(number))}
        return read | {_gradients(int(number) + 1)} if self._is_backward(name) else read

    def needed(self, done: Mapping[str, Any]) -> set[str]:
        """Return the files that steps which are not `done` read."""
        return {read for name in self.names if name not in done for read in self.reads(name)}

    def cost(self, name: str) -> int:
        """Return how long a step takes for a token, in forwards of a layer."""
        if name == _HEAD:
            return self._head_cost
        return 0 if name == _EMBED else _BACKWARD_COST if self._is_backward(name) else 1

    def _is_backward(self, name: str) -> bool:
        return self.saliency and name.startswith("layers.")

    @property
    def most_states(self) -> int:
        """How many files of states and gradients lie on the disk at a time, at the most."""
        return self.n_layers + 4 if self.saliency else 4


class Passes:
    """What runs a model of `specs` through a calibration: its forward, its backward, and their steps."""

    def __init__(self, model: TextModel, specs: Sequence[TensorSpec], seed: int, *, saliency: bool) -> None:
        self.path = model.checkpoint.path
        self.forward = SiteForward(model, specs)
        self.backward = Backward(model, specs, self.forward.network, seed)
        first = f"{model.arch.text_prefix}layers.0."
        layer = sum(math.prod(spec.shape) for spec in specs if spec.name.startswith(first))
        mtp = bool(self.forward.mtp_layers)
        self.steps = Steps(self.forward.n_layers, model.head.size / layer, mtp=mtp, saliency=saliency)


def _states(number: int) -> str:
    return f"states.{number}"


def _gradients(number: int) -> str:
    return f"gradients.{number}"


class Work:
    """The folder of a run under way: a journal, finished layers, and the states that steps to come read.

    What a step gathered is written, and its entry made, beside the next step's work.
    """

    def __init__(
        self, passes: Passes, tokens: Tokens, kept: Kept, key: Key, out: Path, *, overwrite: bool
    ) -> None:
        self._forward, self._backward, self._steps = passes.forward, passes.backward, passes.steps
        self._model_path = passes.path
        self._tokens, self._kept, self._key, self._overwrite = tokens, kept, key, overwrite
        self._shape = (*tokens.shape, self._forward.hidden_size)
        self.folder = out.absolute().with_name(f".{out.name}.calibration")
        self.resumed = 0

    def __enter__(self) -> Self:
        self.folder.mkdir(exist_ok=True)
        self._journal = Journal(self.folder / "journal", self._key, overwrite=self._overwrite)
        self._drop()
        self._pool = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        self._journal.__exit__(kind, error, trace)

    def remove(self) -> None:
        """Delete the folder: the run it served is whole."""
        remove_work(self.folder)

    def run(self, progress: Progress) -> dict[str, SiteEntry]:
        """Do all steps that are not in the journal; return the manifest's entries of all sites."""
        steps, done = self._steps, set(self._journal.entries)
        self.resumed = sum(name.startswith("layers.") for name in done)
        worth = {name: steps.cost(name) * self._tokens.size for name in steps.names}
        now, total = sum(worth[name] for name in done), sum(worth.values())
        for name in steps.names:
            if name in done:
                continue
            event("calibrate", step=name)
            with closing(self._step(name)) as step:
                for chunks in step:
                    now += steps.cost(name) * chunks * self._tokens.shape[1]
                    progress("calibrate", now, total)
        self._finished()
        sites: dict[str, SiteEntry] = {}
        for value in self._journal.entries.values():
            sites |= entries_from_json(value["sites"])
        return sites

    def saliency(self) -> Saliency:
        """Return the weights of the tokens of all sites that have them."""
        files = (self._path(value["weights"]) for value in self._journal.entries.values() if value["weights"])
        found = {site: weights for file in files for site, weights in load_file(file).items()}
        return dict(sorted(found.items()))

    def _path(self, name: str) -> Path:
        return self.folder / name

    def _drop(self) -> None:
        """Remove what neither a finished step kept nor one to come reads."""
        entries = self._journal.entries
        kept = {value[part] for value in entries.values() for part in ("file", "weights")}
        kept |= self._steps.needed(entries)
        for path in self.folder.iterdir():
            if path != self._journal.path and path.name not in kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _open(self, name: str) -> States:
        return States(self._path(name), self._shape)

    def _new(self, name: str, fewer: int = 0) -> States:
        chunks, ctx, hidden = self._shape
        states = States(self._path(name), (chunks, ctx - fewer, hidden))
        states.create()
        return states

    def _step(self, name: str) -> Generator[int]:
        """Do one step; let its sites be written and its entry be made, then what none reads be dropped."""
        gather = self._gather([site for site in self._kept.blocks if site.startswith(f"{name}.")])
        kind, _, number = name.partition(".")
        if kind == _EMBED:
            targets = [self._new(_states(0))]
            self._forward.embed(self._tokens, targets[0])
        elif kind == _HEAD:
            targets = yield from self._through_head(gather)
        elif kind == _MTP:
            targets = [self._new(_EMBEDDED, fewer=1)]
            yield from self._forward.mtp(self._tokens, self._open(_NORMED), targets[0], gather.take)
        elif kind == "layers" and self._steps.saliency:
            targets = yield from self._backwards(int(number), gather)
        else:
            targets = [self._new(_states(int(number) + 1))]
            source = self._open(_states(int(number)))
            yield from self._forward.layer(int(number), source, targets[0], gather.take)
        self._finished()
        self._pending = self._pool.submit(self._finish, name, gather, targets)

    def _gather(self, sites: Sequence[str], known: Saliency | None = None) -> Gather:
        return Gather(self._kept, sites, self._forward.network.device, known)

    def _through_head(self, gather: Gather) -> Generator[int, None, list[States]]:
        last = self._steps.n_layers
        source, normed = self._open(_states(last)), self._new(_NORMED)
        if not self._steps.saliency:
            yield from self._forward.head(source, normed, gather.take)
            return [normed]
        gradients = self._new(_gradients(last))
        yield from self._backward.head(source, normed, gradients, gather.take)
        if spoilt := gather.spoilt:
            again = self._gather(list(spoilt), spoilt)
            _exhaust(self._forward.head(source, normed, again.take))
            gather.adopt(again)
        return [normed, gradients]

    def _backwards(self, index: int, gather: Gather) -> Generator[int, None, list[States]]:
        source, by_source = self._open(_states(index)), self._new(_gradients(index))
        yield from self._backward.layer(
            index, source, self._open(_gradients(index + 1)), by_source, gather.take
        )
        if spoilt := gather.spoilt:
            again = self._gather(list(spoilt), spoilt)
            _exhaust(self._forward.layer(index, source, None, again.take))
            gather.adopt(again)
        return [by_source]

    def _finished(self) -> None:
        """Wait for the entry of the step before."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def _finish(self, name: str, gather: Gather, targets: Sequence[States]) -> None:
        for states in targets:
            states.sync()
        file, weights = self._path(f"{name}.safetensors"), self._path(f"{name}.weights")
        found = write_sites(file, gather.results(self._model_path)) if gather.sites else {}
        made = [file] if found else []
        if gather.weights:
            save_file({site: np.ascontiguousarray(part) for site, part in gather.weights.items()}, weights)
            made.append(weights)
        for path in made:
            sync_path(path)
        sync_path(self.folder)
        sites = {site: asdict(entry) for site, entry in found.items()}
        kept = weights.name if gather.weights else ""
        self._journal.add(name, {"file": file.name, "weights": kept, "sites": sites})
        scratch = self._steps.reads(name) | {states.path.name for states in targets}
        for unread in scratch - self._steps.needed(self._journal.entries):
            self._path(unread).unlink()


def _exhaust(steps: Iterator[int]) -> None:
    for _ in steps:
        pass
