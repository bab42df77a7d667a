"""The loss of tuning: KL(original‖candidate) of next-token distributions, all positions of a window."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from bitsmith.numerics.divergence import Float64
from bitsmith.progress import Progress
from bitsmith.run.descent import batches
from bitsmith.run.forward import TextModel, final_hidden_states
from bitsmith.run.free_model import HEAD
from bitsmith.run.student import Student, Weights, divergence

Tokens = NDArray[np.int64]
Float32 = NDArray[np.float32]


class Lesson:
    """Windows of tokens (`n T`) with the original's final hidden states at positions first…T-2."""

    def __init__(self, teacher: TextModel, tokens: Tokens, first: int, progress: Progress) -> None:
        self.tokens, self.first = tokens, first
        self.states: Float32 = final_hidden_states(teacher, tokens, first, progress, "original")

    def kld(self, student: Student, weights: Weights, head: torch.Tensor, which: Tokens) -> torch.Tensor:
        """Return KL in nats (`windows positions`) of the windows `which`; `head` is the original's."""
        states = student.states(weights, torch.from_numpy(self.tokens[which]))[:, self.first : -1]
        wanted = torch.from_numpy(np.ascontiguousarray(self.states[which]))
        flat = divergence(states.flatten(0, 1), weights[HEAD], wanted.flatten(0, 1), head)
        return flat.reshape(len(which), -1)


class Distillation:
    """Draws batches of the fit windows, and looks at `selection`, a part of the held-out ones."""

    def __init__(
        self,
        student: Student,
        head: torch.Tensor,
        weights: Callable[[], Weights],
        lessons: tuple[Lesson, Lesson],
        batch_windows: int,
        selection: Tokens,
        seed: int,
    ) -> None:
        self._student, self._head, self._weights = student, head, weights
        self._fit, self._held = lessons
        self._batch_windows, self._selection, self._seed = batch_windows, selection, seed

    def loss_nats(self, step: int) -> torch.Tensor:
        """Return the mean KL of one batch."""
        which = batches(len(self._fit.tokens), self._batch_windows, step, self._seed)
        return self._fit.kld(self._student, self._weights(), self._head, which).mean()

    def held_nats(self) -> float:
        """Return the mean KL over the selection."""
        return float(self.held_klds(self._weights(), self._selection).mean())

    @property
    def held_tokens(self) -> int:
        """Number of scored held-out positions."""
        return int(np.prod(self._held.states.shape[:2]))

    @torch.no_grad()
    def held_klds(self, weights: Weights, which: Tokens | None = None) -> Float64:
        """Return KL in nats (`windows positions`) of held-out windows, all unless told which."""
        which = np.arange(len(self._held.tokens)) if which is None else which
        found = [self._held.kld(self._student, weights, self._head, one[None]) for one in which]
        return torch.cat(found).numpy().astype(np.float64)


def noisy(tokens: Tokens, share: float, seed: int) -> Tokens:
    """Return `tokens` (`n T`) with a share of all replaced by tokens drawn from the same text.

    The original labels any input; odd ones show how the candidate differs away from the calibration text.
    """
    random = np.random.default_rng((seed, 1))
    drawn = random.choice(tokens.reshape(-1), tokens.shape)
    changed: Tokens = np.where(random.random(tokens.shape) < share, drawn, tokens)
    return changed
