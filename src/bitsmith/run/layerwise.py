"""Tune a GGUF layer by layer, for models whose gradients do not fit in memory: layer outputs as targets."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bitsmith.archs.export import ImportedView
from bitsmith.formats import decoder_named
from bitsmith.log import event
from bitsmith.progress import Progress
from bitsmith.run.descent import Descent, Facts, Schedule, batches
from bitsmith.run.forward import TextModel, compare, final_hidden_states, quiet_transformers
from bitsmith.run.free_model import FreeModel
from bitsmith.run.sequential import Encoded
from bitsmith.run.sites import SiteForward, States
from bitsmith.run.student import Student
from bitsmith.store import GgufCheckpoint
from bitsmith.store.checkpoint import Bytes, ComputedTensor, TensorRef
from bitsmith.store.journal import Journal, Key

Tokens = NDArray[np.int64]


@dataclass(frozen=True)
class LayerFacts:
    """What came of one layer: relative squared errors of its output on held-out tokens, first and best."""

    layer: int
    best_step: int
    error_before: float
    error_after: float
    learning_rate: float
    free_parameters: int
    log: list[dict[str, Any]]


@dataclass(frozen=True)
class LayerOptions:
    """How every layer is tuned; `schedule` is told the layer's free weights."""

    codes: bool
    seed: int
    batch_windows: int
    schedule: Callable[[FreeModel], Schedule]


class Layerwise:
    """A walk through the layers of `student` (a GGUF of `teacher`), each tuned behind the tuned ones.

    A layer's free parameters minimise `mean_t |f(ĥ_t) − h'_t|² / |h'_t|²`: ĥ are the states that the tuned
    layers before give, h' what the original's layer gives in the original's own stream. Weights of one layer
    are in memory; states of both streams, finished layers and the descent's own state are in `folder`, where
    a killed run goes on by `journal`. Embedding, final norm and head stay as they are.
    """

    def __init__(
        self,
        models: tuple[TextModel, TextModel],
        gguf: tuple[GgufCheckpoint, ImportedView],
        splits: tuple[Tokens, Tokens],
        options: LayerOptions,
        folder: Path,
        journal: tuple[Journal, Key],
    ) -> None:
        (self._teacher, student), (self._stored, self._view) = models, gguf
        self._options, self._folder, (self._journal, self._key) = options, folder, journal
        self._tuned = Encoded(self._view, self._view)
        self._network = Student(student.arch)
        self.n_layers, self.estimated_seconds = self._network.n_layers, 0.0
        streams = folder / "streams"
        shutil.rmtree(streams, ignore_errors=True)
        streams.mkdir()
        coded = SiteForward(TextModel(self._tuned, student.arch, student.source), [])
        plain = SiteForward(self._teacher, [])
        named = tuple(zip(("fit", "held"), splits, strict=True))
        self._original = [_Flow(plain, part, streams / f"original.{name}") for name, part in named]
        self._coded = [_Flow(coded, part, streams / f"tuned.{name}") for name, part in named]

    def run(self, progress: Progress, say_cost: Callable[[float], None]) -> list[LayerFacts]:
        """Tune every layer, but take over those that a killed run finished.

        `say_cost` is told the seconds of all layers, judged from the first.
        """
        found = []
        for index in range(self.n_layers):
            for flow in self._original:
                flow.advance(index)
            done = self._journal.entries.get(str(index))
            if done is None or not self._path(index).exists():
                done = self._descend(index, progress, say_cost)
            self._pass(index)
            found.append(LayerFacts(**done))
        return found

    def _descend(self, index: int, progress: Progress, say_cost: Callable[[float], None]) -> dict[str, Any]:
        event("tune", layer=index)
        options, total = self._options, self.n_layers
        free = FreeModel(
            self._stored, self._view, self._teacher, codes=options.codes, only=f"layers.{index}."
        )
        flows = zip(self._coded, self._original, strict=True)
        fit, held = (_Pairs(coded.now, original.now) for coded, original in flows)
        task = _LayerTask(self._network, index, free, (fit, held), options.batch_windows, options.seed)
        state, schedule = self._folder / "descent", options.schedule(free)

        def told(seconds: float) -> None:
            if self.estimated_seconds == 0.0:
                self.estimated_seconds = seconds * total
                say_cost(self.estimated_seconds)

        facts = Descent(task, free.parameters, schedule, state, {**self._key, "layer": index}).run(
            lambda stage, step, steps: progress(stage, index * steps + step, total * steps), told
        )
        done = self._finished(index, free, task, facts)
        done["learning_rate"] = schedule.rates["scale"] * facts.damping
        self._journal.add(str(index), done)
        state.unlink(missing_ok=True)
        return done

    def _finished(self, index: int, free: FreeModel, task: _LayerTask, facts: Facts) -> dict[str, Any]:
        """Write the layer's file; return its facts."""
        before, after = task.start, task.error(free.decoded())
        better = facts.best_step > 0 and after < before
        packed: dict[str, Any] = free.packed() if better else {}
        np.savez(self._path(index), **packed)
        return {
            "layer": index,
            "best_step": facts.best_step if better else 0,
            "error_before": before,
            "error_after": after if better else before,
            "free_parameters": sum(leaf.numel() for leaf in free.parameters.values()),
            "log": _renamed(facts, index),
        }

    def _pass(self, index: int) -> None:
        """Run the layer as it is in its finished file, and forget its weights."""
        packed = self._packed(index)
        specs = {spec.gguf_name: spec for spec in self._view.specs.values()}
        changed = [specs[name] for name in packed]
        for spec in changed:
            ref = self._stored[str(spec.gguf_name)]
            self._tuned.put(spec.name, spec.from_gguf(_decoded(ref, packed[str(spec.gguf_name)])))
        for flow in self._coded:
            flow.advance(index)
        for spec in changed:
            self._tuned.put(spec.name, self._view[spec.name])

    def packed(self) -> dict[str, Bytes]:
        """Return the changed tensors' bytes of all layers, by GGUF name."""
        layers = range(self.n_layers)
        return {name: part for index in layers for name, part in self._packed(index).items()}

    def _packed(self, index: int) -> dict[str, Bytes]:
        """Return the changed tensors' bytes of a finished layer, by GGUF name."""
        with np.load(self._path(index)) as file:
            return {name: file[name] for name in file.files}

    def _path(self, index: int) -> Path:
        return self._folder / f"layer.{index}.npz"


def _decoded(ref: TensorRef, packed: Bytes) -> TensorRef:
    """Return `packed`, other bytes of the type and shape of `ref`, as a tensor of floats."""
    rows = packed.reshape(int(np.prod(ref.shape[:-1])), -1)
    values = np.asarray(decoder_named(ref.dtype).decode(rows), np.float32).reshape(ref.shape)
    return ComputedTensor(ref.name, values.shape, "F32", lambda start, stop: values[start:stop])


def _renamed(facts: Facts, index: int) -> list[dict[str, Any]]:
    """Return the looks as rows; an error that is no number, which JSON cannot hold, as None."""
    return [
        {
            "layer": index,
            "step": row["step"],
            "held_error": row["held_kld_nats"] if math.isfinite(row["held_kld_nats"]) else None,
            "seconds": row["seconds"],
        }
        for row in facts.log
    ]


class _Flow:
    """States of one split on their way through one model; `now` are those before and after a layer."""

    def __init__(self, forward: SiteForward, tokens: Tokens, path: Path) -> None:
        self._forward, self._path, self._shape = forward, path, (*tokens.shape, forward.hidden_size)
        self.now = self._states(0), self._states(0)
        self.now[1].create()
        forward.embed(tokens, self.now[1])

    def _states(self, number: int) -> States:
        return States(self._path.with_name(f"{self._path.name}.{number}"), self._shape)

    def advance(self, index: int) -> None:
        """Run layer `index`; its input stays until the next."""
        if self.now[0].path != self.now[1].path:
            self.now[0].path.unlink()
        source, target = self.now[1], self._states(index + 1)
        target.create()
        for _ in self._forward.layer(index, source, target, lambda *_: None):
            pass
        self.now = source, target


class _Pairs:
    """Inputs and targets of one layer: the tuned stream before it, the original's behind it."""

    def __init__(self, coded: tuple[States, States], original: tuple[States, States]) -> None:
        self._inputs, self._targets = coded[1], original[1]
        self.windows = coded[1].shape[0]

    def read(self, which: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and targets (`windows T hidden` each) of the windows `which`."""
        inputs, targets = (
            np.concatenate([states.read(int(one), int(one) + 1) for one in which])
            for states in (self._inputs, self._targets)
        )
        return torch.from_numpy(inputs), torch.from_numpy(targets)


class _LayerTask:
    """The error of one layer's output; the descent's objective, in units of 1 instead of nats."""

    def __init__(
        self,
        network: Student,
        index: int,
        free: FreeModel,
        pairs: tuple[_Pairs, _Pairs],
        batch_windows: int,
        seed: int,
    ) -> None:
        self._network, self._index, self._free = network, index, free
        self._fit, self._held = pairs
        self._batch_windows, self._seed = batch_windows, seed
        self.start = self.error(free.decoded())

    def loss_nats(self, step: int) -> torch.Tensor:
        """Return the mean relative squared error of one batch, as a multiple of the candidate's."""
        which = batches(self._fit.windows, self._batch_windows, step, self._seed)
        return self._errors(self._free.weights(), self._fit, which).mean() / (self.start or 1.0)

    @torch.no_grad()
    def held_nats(self) -> float:
        """Return the held-out error of the present parameters."""
        return self.error(self._free.weights())

    @torch.no_grad()
    def error(self, weights: dict[str, torch.Tensor]) -> float:
        """Return the mean relative squared error over all held-out windows."""
        held = self._held
        found = [self._errors(weights, held, np.array([one])) for one in range(held.windows)]
        return float(torch.cat(found).mean(dtype=torch.float64))

    def _errors(self, weights: dict[str, torch.Tensor], pairs: _Pairs, which: Tokens) -> torch.Tensor:
        inputs, targets = pairs.read(which)
        positions = torch.arange(inputs.shape[1])[None]
        rotary = self._network._rotary(inputs, positions)
        found = self._network.layer(self._index, weights, inputs, positions, rotary)
        tiny = torch.finfo(torch.float32).tiny
        return (found - targets).square().sum(-1) / targets.square().sum(-1).clamp_min(tiny)


def streamed_kld(teacher: TextModel, models: list[TextModel], held: Tokens) -> list[float]:
    """Return mean KL(teacher‖model) in nats of positions T/2…T-2 of `held`, one layer in memory."""
    first = held.shape[1] // 2
    targets = held[:, first + 1 :].reshape(-1)
    with quiet_transformers():
        states = final_hidden_states(teacher, held, first).reshape(len(targets), -1)
        return [
            float(
                compare(
                    teacher,
                    model,
                    (states, final_hidden_states(model, held, first).reshape(len(targets), -1)),
                    targets,
                ).kld.mean()
            )
            for model in models
        ]
