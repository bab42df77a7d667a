"""Divergences against scipy's softmax in any split of the vocabulary; the bootstrap by its definition."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, rel_entr

from bitsmith.errors import BitsmithError
from bitsmith.numerics.divergence import (
    DivergenceAccumulator,
    TokenScores,
    estimates,
    resampled_quantiles,
    token_scores,
)


def _logits(seed: int, tokens: int = 6, vocab: int = 50, scale: float = 4.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    ref = rng.normal(0, scale, (tokens, vocab))
    return ref, ref + rng.normal(0, 0.3, ref.shape)


def _scores(seed: int, chunks: int, tokens: int = 40) -> TokenScores:
    ref, cand = _logits(seed, chunks * tokens, 30)
    return token_scores(ref, cand, np.random.default_rng(seed).integers(0, 30, len(ref))).reshape(chunks)


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_scores_follow_their_definition(offset: float) -> None:
    ref, cand = _logits(0)
    targets = np.arange(6)
    found = token_scores(ref + offset, cand - offset, targets)
    log_ref, log_cand = log_softmax(ref, axis=1), log_softmax(cand, axis=1)
    expected = rel_entr(np.exp(log_ref), np.exp(log_cand)).sum(axis=1)
    np.testing.assert_allclose(found.kld, expected, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(found.nll_ref, -log_ref[targets, targets], rtol=1e-9)
    np.testing.assert_allclose(found.nll_cand, -log_cand[targets, targets], rtol=1e-9)
    assert found.same_top.tolist() == (ref.argmax(1) == cand.argmax(1)).tolist()


@given(
    seed=st.integers(0, 2**32 - 1), cuts=st.lists(st.integers(1, 49), unique=True), row_cut=st.integers(0, 6)
)
@settings(max_examples=60, deadline=None)
def test_any_split_of_the_vocabulary_gives_the_same_scores(seed: int, cuts: list[int], row_cut: int) -> None:
    ref, cand = _logits(seed, scale=30.0)
    targets = np.random.default_rng(seed).integers(0, 50, 6)
    whole = token_scores(ref, cand, targets)
    accumulator = DivergenceAccumulator(targets)
    edges = [0, *sorted(cuts), 50]
    for first, last in itertools.pairwise(edges):
        for rows in (slice(row_cut, 6), slice(0, row_cut)):
            accumulator.update(rows, first, ref[rows, first:last], cand[rows, first:last])
    parts = accumulator.scores()
    np.testing.assert_allclose(parts.kld, whole.kld, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(parts.nll_ref, whole.nll_ref, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(parts.nll_cand, whole.nll_cand, rtol=1e-9, atol=1e-12)
    assert (parts.same_top == whole.same_top).all()


def test_equal_logits_have_no_divergence_at_all() -> None:
    ref, _ = _logits(3, vocab=4000)
    found = token_scores(ref.astype(np.float32), ref.astype(np.float32), np.zeros(6, np.int64))
    assert found.kld.max() == 0.0
    assert found.same_top.all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_show_in_the_scores(bad: float) -> None:
    ref, cand = _logits(1)
    cand[2, 7] = bad
    found = token_scores(ref, cand, np.zeros(6, np.int64))
    assert np.flatnonzero(~np.isfinite(found.nll_cand)).tolist() == [2]
    assert np.flatnonzero(~np.isfinite(found.kld)).tolist() == [2]
    assert np.isfinite(found.nll_ref).all()


def test_logits_of_different_vocabularies_are_refused() -> None:
    with pytest.raises(BitsmithError, match="differ in shape"):
        token_scores(np.zeros((2, 5)), np.zeros((2, 6)), np.zeros(2, np.int64))


@given(seed=st.integers(0, 2**32 - 1), chunks=st.integers(1, 6), tokens=st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_resampled_quantiles_are_those_of_the_repeated_values(seed: int, chunks: int, tokens: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(chunks, tokens)).round(1)  # with ties
    draws = rng.multinomial(chunks, np.full(chunks, 1 / chunks), size=3)
    fractions = np.array([0.0, 0.1, 0.5, 0.99, 0.999, 1.0])
    expected = [np.quantile(np.repeat(values, counts, axis=0), fractions) for counts in draws]
    np.testing.assert_allclose(resampled_quantiles(values, draws, fractions), expected, rtol=0, atol=1e-12)


def test_measures_are_those_of_all_tokens() -> None:
    scores = _scores(0, chunks=5)
    found = {name: estimate.value for name, estimate in estimates(scores, resamples=50).items()}
    ppl_ref, ppl_cand = np.exp(scores.nll_ref.mean()), np.exp(scores.nll_cand.mean())
    expected = {
        "ppl_ref": ppl_ref,
        "ppl_cand": ppl_cand,
        "ppl_ratio": ppl_cand / ppl_ref,
        "ppl_difference": ppl_cand - ppl_ref,
        "mean_kld": scores.kld.mean(),
        "median_kld": np.median(scores.kld),
        "kld_99": np.quantile(scores.kld, 0.99),
        "kld_99_9": np.quantile(scores.kld, 0.999),
        "max_kld": scores.kld.max(),
        "top1_agreement": scores.same_top.mean(),
    }
    assert found == pytest.approx(expected, rel=1e-12)


def test_intervals_hold_the_value_and_are_seeded() -> None:
    scores = _scores(1, chunks=12)
    first, again, other = estimates(scores), estimates(scores), estimates(scores, seed=1)
    assert first == again
    assert first["mean_kld"] != other["mean_kld"]
    for name, estimate in first.items():
        assert estimate.low is not None and estimate.high is not None
        assert estimate.low <= estimate.value <= estimate.high, name
        assert estimate.low < estimate.high or name == "max_kld"


def test_the_pairing_narrows_the_ratio_far_below_the_perplexities() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(3, 1, (30, 1)) + rng.normal(0, 0.1, (30, 50))  # chunks differ much, models little
    scores = TokenScores(hard, hard + rng.normal(0.01, 0.01, hard.shape), hard * 0, hard > 0)
    found = estimates(scores)
    widths = {
        name: (found[name].high - found[name].low) / found[name].value for name in ("ppl_ref", "ppl_ratio")
    }
    assert widths["ppl_ratio"] < widths["ppl_ref"] / 50


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(7)
    hits = 0
    for trial in range(100):
        kld = rng.exponential(0.1, (40, 1)) + rng.exponential(0.1, (40, 20))
        interval = estimates(TokenScores(kld, kld, kld, kld > 0), resamples=400, seed=trial)["mean_kld"]
        hits += interval.low <= 0.2 <= interval.high
    assert 86 <= hits <= 99


def test_one_chunk_leaves_intervals_unmeasured() -> None:
    for estimate in estimates(_scores(2, chunks=1)).values():
        assert np.isfinite(estimate.value)
        assert estimate.low is None
        assert estimate.high is None
