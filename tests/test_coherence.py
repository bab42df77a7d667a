"""Measured coherence: repetition by hand, the original's NLL by transformers, the rule of verdicts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from bitsmith.errors import BitsmithError
from bitsmith.numerics.resampling import difference_of_ratios, ratio_of_sums
from bitsmith.run.coherence import (
    INCOHERENT_NATS,
    REPETITIVE_SHARE,
    Prompts,
    Writing,
    measure_coherence,
    nll_nats,
    prompts_of,
    repeated,
    verdict_of,
)
from bitsmith.run.continuation import continue_prompt
from bitsmith.run.evaluate import open_model
from bitsmith.run.evaluation import Measure
from bitsmith.run.vocabulary import Vocabulary


def test_repetition_by_hand() -> None:
    assert repeated([1, 2, 3, 4, 1, 2, 3, 4, 1]) == (2, 6)  # 1234 and 2341 come twice
    assert repeated([7] * 10) == (6, 7)
    assert repeated([1, 2, 3, 4, 5]) == (0, 2)
    assert repeated([1, 2, 3]) == repeated([]) == (0, 0)
    assert repeated([1, 1, 1], gram_tokens=1) == (2, 3)


def test_nll_is_transformers(demo_model: Path) -> None:
    rng = np.random.default_rng(0)
    lengths = [(5, 7), (2, 11), (9, 1), (4, 0)]
    prompts = [rng.integers(0, 500, prompt).tolist() for prompt, _ in lengths]
    continuations = [rng.integers(0, 500, more).tolist() for _, more in lengths]
    with open_model(demo_model) as original:
        found = nll_nats(original, prompts, continuations)
        assert nll_nats(original, prompts, [[]] * 4).tolist() == [0, 0, 0, 0]
    theirs = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    for prompt, more, nats in zip(prompts, continuations, found, strict=True):
        with torch.inference_mode():
            logits = theirs(torch.tensor([[*prompt, *more]])).logits[0].double()
        logs = torch.log_softmax(logits, 1)
        expected = -sum(float(logs[len(prompt) - 1 + at, token]) for at, token in enumerate(more))
        assert nats == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_the_originals_own_way_is_no_different_from_itself(demo_model: Path) -> None:
    text = "def __init__(self, name"
    with open_model(demo_model) as original:
        ids = tuple(Vocabulary(original).encode(text))
        prompts = Prompts((ids, ids[:3]), 12, seed=5)
        own = measure_coherence(original, original, prompts)
        again = measure_coherence(original, original, prompts, own)
    assert own.verdict == "original" and again.verdict == "coherent"
    assert [one.tokens for one in again.sampled.passages] == [one.tokens for one in own.sampled.passages]
    over = again.sampled.nll_over, again.greedy.repetition_over
    assert [(one.value, one.low, one.high) for one in over if one is not None] == [(0, 0, 0)] * 2
    greedy = own.greedy.passages[0]
    assert greedy.tokens == continue_prompt(demo_model, text, 12).tokens
    assert own.greedy.nll is not None and own.sampled.nll is not None
    pooled = sum(p.nll_nats for p in own.greedy.passages) / sum(len(p.tokens) for p in own.greedy.passages)
    assert own.greedy.nll.value == pytest.approx(pooled)
    assert own.greedy.nll.value < own.sampled.nll.value  # the likeliest tokens are likelier than drawn ones


def test_no_prompts_are_refused(demo_model: Path) -> None:
    with open_model(demo_model) as original, pytest.raises(BitsmithError, match="no prompts"):
        measure_coherence(original, original, Prompts((), 4))


def test_prompts_are_spread_over_the_chunks() -> None:
    chunks = np.arange(70).reshape(7, 10)
    assert prompts_of(chunks, 3, 2, 5).tokens == ((0, 1), (30, 31), (60, 61))
    assert len(prompts_of(chunks, 20, 2, 5).tokens) == 7


def _writing(nll: tuple[float, float], repetition: tuple[float, float]) -> Writing:
    def over(bounds: tuple[float, float]) -> Measure:
        return Measure(sum(bounds) / 2, "x", *bounds, "by hand")

    return Writing((), None, None, over(repetition), over(nll))


@pytest.mark.parametrize(
    ("nll", "repetition", "expected"),
    [
        ((INCOHERENT_NATS, 2.0), (-0.1, 0.1), "incoherent"),
        ((1.5, 2.0), (0.5, 0.6), "incoherent"),
        ((-0.1, 0.1), (REPETITIVE_SHARE, 0.6), "repetitive"),
        ((-0.1, 0.99), (-0.1, 0.1), "coherent"),
        ((-3.0, -2.0), (-0.5, 0.19), "coherent"),
        ((0.9, 1.1), (-0.1, 0.1), "undecided"),
        ((0.9, 1.1), (0.5, 0.6), "undecided"),
        ((-0.1, 0.1), (0.1, 0.3), "undecided"),
    ],
)
def test_verdicts_follow_the_rule(
    nll: tuple[float, float], repetition: tuple[float, float], expected: str
) -> None:
    assert verdict_of(_writing(nll, repetition)) == expected
    assert verdict_of(Writing((), None, None)) == "undecided"


def test_ratios_of_sums_by_hand() -> None:
    found = ratio_of_sums([1, 3], [2, 2])
    assert found is not None and found.value == 1.0
    assert (found.low, found.high) == (0.5, 1.5)  # both draws of one pair alone are over 2.5 % likely
    same = ratio_of_sums([1, 2, 3], [2, 4, 6])
    assert same is not None and (same.value, same.low, same.high) == (0.5, 0.5, 0.5)
    assert ratio_of_sums([1, 2], [0, 0]) is None
    assert ratio_of_sums([], []) is None
    alone = ratio_of_sums([3], [4])
    assert alone is not None and (alone.value, alone.low, alone.high) == (0.75, None, None)
    holes = ratio_of_sums([1, 2], [0, 4])
    assert holes is not None and (holes.value, holes.low) == (0.75, None)  # a draw may have nothing below
    less = difference_of_ratios(([3, 5], [1, 1]), ([1, 3], [1, 1]))
    assert less is not None and (less.value, less.low, less.high) == (2.0, 2.0, 2.0)
