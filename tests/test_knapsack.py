"""The knapsack against brute force, and the certificate of its gap."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitsmith.errors import BitsmithError
from bitsmith.passes.knapsack import Option, pack

OPTIONS = st.builds(Option, st.integers(0, 40), st.integers(0, 30).map(lambda n: n / 7))
GROUPS = st.lists(st.lists(OPTIONS, min_size=1, max_size=4), min_size=1, max_size=6)


def brute_force(groups, budget):
    """The least loss of every choice there is, None where none fits."""
    fitting = [
        sum(o.loss for o in choice) for choice in product(*groups) if sum(o.cost for o in choice) <= budget
    ]
    return min(fitting, default=None)


def formats_like(rng, n_groups, n_options=8):
    """Groups as an allocation has them: sizes of many scales, losses that fall about fourfold per bit."""
    groups = []
    for _ in range(n_groups):
        weights = int(rng.integers(1, 64)) * 4096
        scale = float(np.exp(rng.normal(0, 1.5)))
        bits = np.sort(rng.uniform(2, 9, n_options))
        groups.append(
            [Option(int(weights * b / 8), scale * 4.0**-b * float(rng.uniform(0.8, 1.25))) for b in bits]
        )
    return groups


@settings(max_examples=300)
@given(GROUPS, st.integers(0, 160))
def test_it_finds_what_brute_force_finds(groups, budget):
    expected = brute_force(groups, budget)
    if expected is None:
        with pytest.raises(BitsmithError, match="below the smallest choice"):
            pack(groups, budget)
        return
    found = pack(groups, budget)
    chosen = [options[pick] for options, pick in zip(groups, found.picks, strict=True)]
    assert found.loss == pytest.approx(expected, abs=1e-12)
    assert found.loss == sum(o.loss for o in chosen)
    assert found.cost == sum(o.cost for o in chosen) <= budget
    assert found.gap == pytest.approx(0, abs=1e-12)


@settings(max_examples=200)
@given(GROUPS, st.integers(0, 160), st.integers(1, 3))
def test_the_certificate_holds_when_choices_were_dropped(groups, budget, max_labels):
    expected = brute_force(groups, budget)
    if expected is None:
        return
    found = pack(groups, budget, max_labels=max_labels)
    assert found.bound <= expected + 1e-12
    assert expected <= found.loss + 1e-12
    assert found.cost <= budget


def test_capped_search_states_an_open_gap_and_the_full_one_closes_it():
    groups = formats_like(np.random.default_rng(3), 40)
    budget = sum(options[3].cost for options in groups)
    capped, full = pack(groups, budget, max_labels=2), pack(groups, budget)
    assert full.gap == pytest.approx(0, abs=1e-9 * full.loss)
    assert capped.bound <= full.loss <= capped.loss
    assert capped.gap > 0


@pytest.mark.parametrize("seed", range(4))
def test_an_allocation_of_a_large_model_is_exact(seed):
    rng = np.random.default_rng(seed)
    groups = formats_like(rng, 330)
    budget = sum(options[3].cost for options in groups) + int(rng.integers(0, 4096))
    found = pack(groups, budget)
    assert found.gap <= 1e-9 * found.loss
    assert budget - found.cost < 4096 * 8


def test_a_budget_for_everything_takes_the_least_losses():
    groups = formats_like(np.random.default_rng(0), 12)
    found = pack(groups, 1 << 40)
    assert found.loss == pytest.approx(sum(min(o.loss for o in options) for options in groups))
    assert found.gap == pytest.approx(0, abs=1e-15)


def test_the_exact_smallest_budget_works_and_one_less_is_refused():
    groups = formats_like(np.random.default_rng(1), 9)
    least = sum(min(o.cost for o in options) for options in groups)
    assert pack(groups, least).cost == least
    with pytest.raises(BitsmithError, match=str(least)):
        pack(groups, least - 1)


@pytest.mark.parametrize(
    "bad", [Option(1, float("nan")), Option(1, -1.0), Option(-1, 1.0), Option(1, np.inf)]
)
def test_senseless_options_are_refused(bad):
    with pytest.raises(BitsmithError, match="group 1"):
        pack([[Option(1, 1.0)], [bad]], 10)


def test_a_group_without_options_is_refused():
    with pytest.raises(BitsmithError, match="group 0 has no options"):
        pack([[]], 10)
