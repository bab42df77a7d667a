"""Pick a token from logits as llama.cpp's default chain does: repeat penalty, top-k, top-p, temperature."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitsmith.errors import BitsmithError

Ids = NDArray[np.int64]
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Sampling:
    """How tokens are picked; the defaults are those of the published `.cellm` tool.

    `temperature` 0 takes the likeliest token and ignores everything else here. `top_k` 0, `top_p` 1,
    `repeat_penalty` 1 and `repeat_window` 0 (in tokens, the prompt's among them) each switch their part off.

    Raises BitsmithError for a value outside its range.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 1.0
    repeat_penalty: float = 1.05
    repeat_window: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what has no meaning; `not` also catches NaN."""
        for name, value, sound, wanted in (
            ("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 or more"),
            ("top-k", self.top_k, self.top_k >= 0, "0 or more"),
            ("top-p", self.top_p, 0 < self.top_p <= 1, "over 0 and at most 1"),
            ("repeat penalty", self.repeat_penalty, 0 < self.repeat_penalty < math.inf, "over 0"),
            ("repeat window", self.repeat_window, self.repeat_window >= 0, "0 or more"),
            ("seed", self.seed, self.seed >= 0, "0 or more"),
        ):
            if not sound:
                raise BitsmithError(f"{name} is {value}, expected {wanted}")


GREEDY = Sampling(temperature=0.0)


class Sampler:
    """Picks tokens one after another; the same `sampling` and logits give the same tokens."""

    def __init__(self, sampling: Sampling, prompt: Iterable[int] = ()) -> None:
        self._sampling = sampling
        self._recent: deque[int] = deque(prompt, maxlen=sampling.repeat_window)
        self._random = np.random.default_rng(sampling.seed)

    def pick(self, logits: NDArray[np.float32]) -> int:
        """Return the next token for `logits` (`vocab`) and remember it for the repeat penalty."""
        if self._sampling.temperature == 0:
            return int(logits.argmax())
        ids, shares = distribution(logits, self._recent, self._sampling)
        below = np.cumsum(shares)
        place = np.searchsorted(below, self._random.random() * below[-1], side="right")
        token = int(ids[min(int(place), len(ids) - 1)])
        self._recent.append(token)
        return token


def distribution(
    logits: NDArray[np.float32], recent: Iterable[int], sampling: Sampling
) -> tuple[Ids, Float64]:
    """Return the tokens that may follow, likeliest first (ties: lower id first), and their probabilities.

    The penalty r makes of the logit l of every token in `recent`: l / r if l > 0, else l · r. Of what is left
    by top-k, top-p keeps the shortest head whose probability reaches p, before the temperature is applied:
    llama.cpp's order (src/llama-sampler.cpp, common/sampling.cpp). Needs a `temperature` over 0.
    """
    penalized = logits.astype(np.float64)
    seen = np.unique(np.fromiter(recent, dtype=np.int64))
    repeated = penalized[seen]
    penalized[seen] = np.where(
        repeated > 0, repeated / sampling.repeat_penalty, repeated * sampling.repeat_penalty
    )
    ids = _likeliest(penalized, sampling.top_k)
    if sampling.top_p < 1:
        reached = np.cumsum(_softmax(penalized[ids], 1.0)) >= sampling.top_p
        ids = ids[: int(reached.argmax()) + 1] if reached.any() else ids
    return ids, _softmax(penalized[ids], sampling.temperature)


def _likeliest(logits: Float64, top_k: int) -> Ids:
    """Return ids by falling logit, `top_k` of them at most."""
    ids: Ids = np.arange(len(logits))
    if 0 < top_k < len(logits):
        least = np.partition(logits, -top_k)[-top_k]
        ids = np.flatnonzero(logits >= least)
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    return ids[:top_k] if top_k else ids


def _softmax(falling: Float64, temperature: float) -> Float64:
    with np.errstate(over="ignore", under="ignore"):  # a temperature near 0 leaves the likeliest alone
        weights = np.exp((falling - falling[0]) / temperature)
    shares: Float64 = weights / weights.sum()
    return shares
