"""Planted power laws lie in their intervals; other laws are refused; what cannot be fitted is None."""

from __future__ import annotations

import numpy as np
import pytest

from bitsmith.numerics.power_law import fit_tail, log_slope


def draws(rng, n, alpha, body=0.0):
    """Return n draws from p(x) ∝ x^−alpha, x ≥ 1, a share `body` of them replaced by uniform ones below."""
    values = rng.pareto(alpha - 1, n) + 1
    low = rng.random(n) < body
    values[low] = rng.uniform(0.1, 1.0, int(low.sum()))
    return values


@pytest.mark.parametrize(
    ("n", "alpha", "body"), [(40, 2.5, 0), (128, 1.5, 0), (256, 4.0, 0), (400, 3.0, 0.6)]
)
def test_interval_covers_alpha(n, alpha, body):
    covered = 0
    for seed in range(50):
        fit = fit_tail(draws(np.random.default_rng([seed, n]), n, alpha, body), resamples=100, seed=seed)
        covered += fit.low <= alpha <= fit.high
    assert covered >= 45  # of 50; 48 are expected


def test_good_fits_are_kept_and_bad_ones_refused():
    rng = np.random.default_rng(0)
    kept = [fit_tail(draws(rng, 300, 2.5), seed=n).p_value >= 0.1 for n in range(40)]
    assert sum(kept) >= 30  # 36 expected
    assert fit_tail(np.repeat([1.0, 2.0, 4.0, 8.0], 50)).p_value == 0.0


@pytest.mark.parametrize("beta", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("n", [128, 1024])
def test_exact_power_spectrum(beta, n):
    sigma = np.arange(1.0, n + 1) ** -beta
    slope = log_slope(sigma)
    assert slope.slope == pytest.approx(-beta)
    assert slope.low < -beta < slope.high
    assert slope.r_squared == pytest.approx(1.0)
    fit = fit_tail(np.square(sigma))
    assert fit.low < 1 + 1 / (2 * beta) < fit.high
    assert fit.alpha == pytest.approx(1 + 1 / (2 * beta), rel=0.03)


def test_slope_interval_covers_sorted_draws():
    covered = 0
    for seed in range(200):
        sigma = np.sqrt(np.sort(draws(np.random.default_rng(seed), 300, 3.0))[::-1])
        slope = log_slope(sigma)
        covered += slope.low <= -1 / 4 <= slope.high
    assert covered >= 184  # of 200; 190 are expected


def test_alpha_is_the_maximum_likelihood_of_the_tail_it_names():
    values = draws(np.random.default_rng(5), 500, 2.2, 0.3)
    fit = fit_tail(values, resamples=0)
    tail = np.sort(values)[-fit.n_tail :]
    assert tail[0] == pytest.approx(fit.x_min)
    assert fit.alpha == pytest.approx(1 + len(tail) / np.sum(np.log(tail / tail[0])))
    model = 1 - (tail / tail[0]) ** (1 - fit.alpha)
    steps = np.arange(len(tail) + 1) / len(tail)
    assert fit.ks_distance == pytest.approx(max(np.max(model - steps[:-1]), np.max(steps[1:] - model)))
    assert (fit.low, fit.high, fit.p_value) == (None, None, None)


def test_body_below_the_tail_is_found():
    fit = fit_tail(draws(np.random.default_rng(2), 2000, 3.0, 0.7))
    assert fit.x_min > 0.85
    assert fit.n_tail < 900


def test_same_seed_same_fit_and_order_and_scale_do_not_matter():
    values = draws(np.random.default_rng(3), 200, 3.0)
    fit, again = fit_tail(values), fit_tail(values[::-1] * 1e-12)
    assert fit == fit_tail(values)
    assert (again.alpha, again.low, again.high) == pytest.approx((fit.alpha, fit.low, fit.high))
    assert again.x_min == pytest.approx(fit.x_min * 1e-12)


@pytest.mark.parametrize("values", [np.zeros(50), np.ones(50), np.arange(1.0, 10.0), np.array([])])
def test_what_cannot_be_fitted_is_unmeasured(values):
    assert fit_tail(values) is None
    assert log_slope(values[::-1]) is None


def test_zeros_are_left_out():
    values = draws(np.random.default_rng(4), 100, 2.0)
    with_zeros = np.concatenate([values, np.zeros(30)])
    assert fit_tail(with_zeros) == fit_tail(values)
    assert log_slope(np.sort(with_zeros)[::-1]).n_values == 100


def test_equal_largest_values_do_not_end_the_fit():
    fit = fit_tail(np.concatenate([np.full(30, 5.0), np.linspace(1, 4, 40)]))
    assert np.isfinite([fit.alpha, fit.low, fit.high, fit.ks_distance]).all()
