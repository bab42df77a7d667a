"""Measured coherence of what a model writes: how much it repeats, how likely the original finds it.

From each of several prompts the model writes on, greedily and by seeded sampling at a temperature, in both
cases without a repeat penalty, which would hide loops. Of a continuation's tokens t_1…t_n

    repetition = (4-grams − distinct 4-grams) / 4-grams,        4-grams = max(0, n − 3)
    NLL        = −1/n Σ_i log p_original(t_i | prompt, t_1…t_(i−1))        in nats per token

both pooled over prompts as ratios of sums, with 95 % bootstrap intervals over prompts. What the original
itself writes after the same prompts, with the same seeds, is the yardstick; differences from it are paired.
Verdicts rest on the sampled text: greedily, small originals loop too, and how soon is chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bitsmith.errors import BitsmithError
from bitsmith.numerics.divergence import Estimate
from bitsmith.numerics.resampling import difference_of_ratios, ratio_of_sums
from bitsmith.progress import Progress, silent
from bitsmith.run.continuation import written
from bitsmith.run.decode import Decoder
from bitsmith.run.evaluation import Measure
from bitsmith.run.forward import TextModel, compare, final_hidden_states
from bitsmith.run.sampling import GREEDY, Sampling
from bitsmith.run.vocabulary import Vocabulary

INTERVAL = "95 % bootstrap over prompts"
GRAM_TOKENS = 4
INCOHERENT_NATS = 1.0
"""Of NLL per sampled token over the original's own: the text is e times less likely per token."""
REPETITIVE_SHARE = 0.2
"""Of repeated 4-grams over the original's own."""
SAMPLED = Sampling(temperature=0.8, top_k=40, repeat_penalty=1.0, repeat_window=0)

Verdict = Literal["original", "coherent", "repetitive", "incoherent", "undecided"]


def rule() -> str:
    """Return in one sentence how verdicts follow from the figures."""
    return (
        f"of the text sampled at temperature {SAMPLED.temperature:g}, against the original's own: incoherent "
        f"if its NLL is {INCOHERENT_NATS:g} nat per token or more over, else repetitive if its repetition is "
        f"{REPETITIVE_SHARE:g} or more over, else coherent; undecided where a paired interval is on both "
        "sides"
    )


@dataclass(frozen=True)
class Passage:
    """What was written after one prompt: `repeats` of `grams` 4-grams, `nll_nats` summed over the tokens."""

    text: str
    stopped: str
    tokens: tuple[int, ...]
    repeats: int
    grams: int
    nll_nats: float


@dataclass(frozen=True)
class Writing:
    """All passages of one way of sampling with their measures; `_over` are differences from the original's.

    None where nothing was written, and over the original for itself.
    """

    passages: tuple[Passage, ...]
    repetition: Measure | None
    nll: Measure | None
    repetition_over: Measure | None = None
    nll_over: Measure | None = None


@dataclass(frozen=True)
class Coherence:
    """How coherent a model writes, greedily and sampled, and the verdict of `rule`."""

    greedy: Writing
    sampled: Writing
    verdict: Verdict


@dataclass(frozen=True)
class Prompts:
    """What is to be continued: token ids, at most `n_tokens` more each, sampled with `seed` + the index."""

    tokens: tuple[tuple[int, ...], ...]
    n_tokens: int
    seed: int = 0


def prompts_of(
    chunks: NDArray[np.int64], count: int, length_tokens: int, n_tokens: int, seed: int = 0
) -> Prompts:
    """Return the first `length_tokens` of up to `count` chunks (`chunks ctx`), evenly spread."""
    places = np.unique(np.linspace(0, len(chunks) - 1, min(count, len(chunks))).round().astype(int))
    return Prompts(tuple(tuple(chunks[place, :length_tokens].tolist()) for place in places), n_tokens, seed)


def measure_coherence(
    model: TextModel,
    original: TextModel,
    prompts: Prompts,
    own: Coherence | None = None,
    progress: Progress = silent,
) -> Coherence:
    """Let `model` continue `prompts` and measure it; `own` is the original's result, None for itself.

    The vocabulary is the original's. The model is held in memory in float32, the original streamed once.
    Reports in prompts. Raises BitsmithError as `Decoder` and `final_hidden_states` do.
    """
    longest = max(map(len, prompts.tokens), default=0)
    if not longest:
        raise BitsmithError("there are no prompts to continue", path=model.checkpoint.path)
    decoder = Decoder(model, longest + prompts.n_tokens)
    vocabulary = Vocabulary(original)
    found: list[Passage] = []
    for style in (GREEDY, SAMPLED):
        for index, prompt in enumerate(prompts.tokens):
            sampling = replace(style, seed=prompts.seed + index)
            decoder.reset()
            made = written(decoder, vocabulary, list(prompt), prompts.n_tokens, sampling)
            repeats, grams = repeated(made.tokens)
            found.append(Passage(made.text, made.stopped, made.tokens, repeats, grams, 0.0))
            progress("write", len(found), 2 * len(prompts.tokens))
    del decoder  # its weights need not stay while the original's are read
    nats = nll_nats(original, [*prompts.tokens, *prompts.tokens], [one.tokens for one in found])
    found = [replace(one, nll_nats=float(value)) for one, value in zip(found, nats, strict=True)]
    greedy, sampled = found[: len(prompts.tokens)], found[len(prompts.tokens) :]
    if own is None:
        return Coherence(_writing(greedy, None), _writing(sampled, None), "original")
    ways = _writing(greedy, own.greedy.passages), _writing(sampled, own.sampled.passages)
    return Coherence(*ways, verdict_of(ways[1]))


def repeated(tokens: Sequence[int], gram_tokens: int = GRAM_TOKENS) -> tuple[int, int]:
    """Return how many of the n-grams of `tokens` occurred before, and how many there are."""
    grams = [tuple(tokens[at : at + gram_tokens]) for at in range(len(tokens) - gram_tokens + 1)]
    return len(grams) - len(set(grams)), len(grams)


def nll_nats(
    original: TextModel, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
) -> NDArray[np.float64]:
    """Return −log p_original of each continuation after its prompt, summed over its tokens, in nats."""
    lengths = [(len(prompt), len(more)) for prompt, more in zip(prompts, continuations, strict=True)]
    tokens = np.zeros((len(lengths), max(sum(both) for both in lengths)), np.int64)
    for row, prompt, more in zip(tokens, prompts, continuations, strict=True):
        row[: len(prompt) + len(more)] = [*prompt, *more]  # what pads the end is seen by nothing before it
    first = min(prompt for prompt, _ in lengths) - 1
    if tokens.shape[1] - first < 2:  # nothing was written
        return np.zeros(len(lengths))
    states = final_hidden_states(original, tokens, first, stage="judge")
    flat, targets = states.reshape(-1, states.shape[-1]), tokens[:, first + 1 :].reshape(-1)
    nll = compare(original, original, (flat, flat), targets).nll_ref.reshape(len(tokens), -1)
    spans = [slice(prompt - 1 - first, prompt - 1 - first + more) for prompt, more in lengths]
    return np.array([row[span].sum() for row, span in zip(nll, spans, strict=True)])


def verdict_of(sampled: Writing) -> Verdict:
    """Return the word that `rule` gives, by the differences from the original's own sampled text."""
    scattered = _beyond(sampled.nll_over, INCOHERENT_NATS)
    loops = _beyond(sampled.repetition_over, REPETITIVE_SHARE)
    if scattered:
        return "incoherent"
    if scattered is None or loops is None:
        return "undecided"
    return "repetitive" if loops else "coherent"


def _beyond(measure: Measure | None, limit: float) -> bool | None:
    """Tell whether a value is at least `limit`; None where its interval does not say."""
    if measure is None or measure.low is None or measure.high is None:
        return None
    return measure.low >= limit or (None if measure.high >= limit else False)


def _writing(passages: Sequence[Passage], own: Sequence[Passage] | None) -> Writing:
    repeats, nll = _repeats(passages), _nll(passages)
    over: tuple[Measure | None, Measure | None] = None, None
    if own is not None:
        over = (
            _measure(difference_of_ratios(repeats, _repeats(own)), "fraction"),
            _measure(difference_of_ratios(nll, _nll(own)), "nats/token"),
        )
    shares = _measure(ratio_of_sums(*repeats), "fraction"), _measure(ratio_of_sums(*nll), "nats/token")
    return Writing(tuple(passages), *shares, *over)


def _repeats(passages: Sequence[Passage]) -> tuple[list[int], list[int]]:
    return [one.repeats for one in passages], [one.grams for one in passages]


def _nll(passages: Sequence[Passage]) -> tuple[list[float], list[int]]:
    return [one.nll_nats for one in passages], [len(one.tokens) for one in passages]


def _measure(estimate: Estimate | None, unit: str) -> Measure | None:
    if estimate is None:
        return None
    interval = None if estimate.low is None else INTERVAL
    return Measure(estimate.value, unit, estimate.low, estimate.high, interval)
