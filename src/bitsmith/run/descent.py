"""Adam on free parameters by KL to the original, with a held-out eye: seeded, resumable, never worse."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from bitsmith.errors import BitsmithError
from bitsmith.progress import Progress
from bitsmith.store.journal import Key, key_digest

_SAVED_EVERY_SECONDS = 60.0
_MOMENTS = ("exp_avg", "exp_avg_sq")
_TIMED_STEPS = 2
_WARM_UP = 0.05
_LAST_RATE = 0.02
_DIVERGED = 1.1  # times the starting divergence


class Objective(Protocol):
    """What is minimised."""

    def loss_nats(self, step: int) -> torch.Tensor:
        """Return the differentiable loss of one step's batch."""

    def held_nats(self) -> float:
        """Return the held-out loss of the present parameters."""


@dataclass(frozen=True)
class Schedule:
    """`steps` of Adam; `rates` is the peak step per kind of parameter, `every` the steps between looks."""

    steps: int
    rates: dict[str, float]
    every: int = 10
    clip: float = 1.0

    def factor(self, step: int) -> float:
        """Return the share of the peak at `step`: a linear warm-up, then a cosine."""
        warm = max(1.0, _WARM_UP * self.steps)
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return min(1.0, (step + 1) / warm) * (_LAST_RATE + (1 - _LAST_RATE) * cosine)


@dataclass
class Facts:
    """Where a descent stands; what a state file keeps beside the tensors."""

    step: int = 0
    best_step: int = 0
    best_nats: float = math.inf
    first_nats: float = math.inf
    damping: float = 1.0
    seconds: float = 0.0
    estimated_seconds: float = 0.0
    log: list[dict[str, Any]] = field(default_factory=list)


class Descent:
    """A minimisation of `objective` over `leaves` (by `NAME:KIND`), kept in the file `state` for one `key`.

    The best parameters on held-out text are kept; where they get worse than at the start the walk goes back
    to the best and on with a third of the step.
    """

    def __init__(
        self, objective: Objective, leaves: dict[str, torch.Tensor], schedule: Schedule, state: Path, key: Key
    ) -> None:
        self._objective, self._leaves, self._schedule = objective, leaves, schedule
        self._state, self._key = state, key_digest(key)
        self._best = {name: leaf.detach().clone() for name, leaf in leaves.items()}
        self.facts = Facts()
        kinds = sorted({name.rpartition(":")[2] for name in leaves})
        groups = [
            {"params": [leaf for name, leaf in leaves.items() if name.endswith(f":{kind}")], "kind": kind}
            for kind in kinds
        ]
        self._optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-12, fused=True)
        if state.exists():
            self._resume()

    def run(self, progress: Progress, say_cost: Callable[[float], None]) -> Facts:
        """Step to the end of the schedule, then put the best parameters in place; return what happened.

        `say_cost` is told the seconds of the whole, judged from a look and the first two steps, once they are
        known.
        """
        facts, steps = self.facts, self._schedule.steps
        started = saved = time.monotonic() - facts.seconds
        if facts.step == 0:
            self._look()
        looked = time.monotonic() - started
        while facts.step < steps:
            self._advance()
            facts.seconds = time.monotonic() - started
            if facts.step == _TIMED_STEPS:
                looks = 1 + steps / self._schedule.every
                facts.estimated_seconds = (facts.seconds - looked) * steps / _TIMED_STEPS + looks * looked
                say_cost(facts.estimated_seconds)
            if facts.step % self._schedule.every == 0 or facts.step == steps:
                self._look()
            if time.monotonic() - saved > _SAVED_EVERY_SECONDS:
                self._save()
                saved = time.monotonic()
            progress("tune", facts.step, steps)
        self._restore()
        return facts

    def _advance(self) -> None:
        share = self._schedule.factor(self.facts.step) * self.facts.damping
        for group in self._optimizer.param_groups:
            group["lr"] = self._schedule.rates[group["kind"]] * share
        loss = self._objective.loss_nats(self.facts.step)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        for group in self._optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], self._schedule.clip)
        self._optimizer.step()
        self.facts.step += 1

    def _look(self) -> None:
        facts, nats = self.facts, self._objective.held_nats()
        facts.log.append({"step": facts.step, "held_kld_nats": nats, "seconds": round(facts.seconds, 1)})
        if facts.step == 0:
            facts.first_nats = nats
        if nats < facts.best_nats:
            facts.best_nats, facts.best_step = nats, facts.step
            for name, leaf in self._leaves.items():
                self._best[name].copy_(leaf.detach())
        elif not nats <= _DIVERGED * facts.first_nats:
            self._restore()
            self._optimizer.state.clear()
            facts.damping /= 3

    def _restore(self) -> None:
        with torch.no_grad():
            for name, leaf in self._leaves.items():
                leaf.copy_(self._best[name])

    def _save(self) -> None:
        tensors = {f"best:{name}": value for name, value in self._best.items()}
        for name, leaf in self._leaves.items():
            tensors[f"leaf:{name}"] = leaf.detach()
            tensors |= {
                f"{moment}:{name}": self._optimizer.state[leaf][moment]
                for moment in _MOMENTS
                if leaf in self._optimizer.state
            }
        age = next((int(entry["step"]) for entry in self._optimizer.state.values()), 0)
        facts = {"key": self._key, "adam_steps": age, **vars(self.facts)}
        part = self._state.with_name(self._state.name + ".part")
        save_file(tensors, part, metadata={"tuning": json.dumps(facts)})
        part.replace(self._state)

    def _resume(self) -> None:
        """Take up the state file; one of other inputs, or a damaged one, is left to be replaced."""
        try:
            with safe_open(self._state, "pt") as file:
                facts = json.loads((file.metadata() or {})["tuning"])
                if facts.pop("key") != self._key:
                    return
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise BitsmithError("is no tuning's state; delete it", path=self._state) from error
        age = facts.pop("adam_steps")
        self.facts = Facts(**facts)
        with torch.no_grad():
            for name, leaf in self._leaves.items():
                leaf.copy_(tensors[f"leaf:{name}"])
                self._best[name].copy_(tensors[f"best:{name}"])
                if age:
                    moments = {moment: tensors[f"{moment}:{name}"] for moment in _MOMENTS}
                    self._optimizer.state[leaf] = {"step": torch.tensor(float(age)), **moments}


def batches(windows: int, size: int, step: int, seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the windows of a step: seeded passes over all of them, in a new order each time."""
    order = np.arange(step * size, (step + 1) * size)
    passes = order // windows
    return np.concatenate(
        [
            np.random.default_rng((seed, int(turn))).permutation(windows)[order[passes == turn] % windows]
            for turn in np.unique(passes)
        ]
    )
