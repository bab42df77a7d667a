"""Reverse water-filling against optimality conditions and brute force; gaps of real codes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from bitsmith.errors import BitsmithError
from bitsmith.numerics.rate_distortion import (
    bound_points,
    decibels,
    gap_db,
    spectral_distortion,
    spectral_rate,
    water_level,
    white_distortion,
)

SPECTRA = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=40).map(np.array)
RATES = st.floats(0, 12)


@given(SPECTRA, RATES)
def test_the_water_level_spends_exactly_the_rate(sigma: np.ndarray, rate: float) -> None:
    energy, level = sigma**2, water_level(sigma, rate)
    spent = np.maximum(0.5 * np.log2(energy / level), 0).sum() / sigma.size
    assert spent == pytest.approx(rate, rel=1e-9, abs=1e-9)
    assert level <= energy.max() * (1 + 1e-12)


@given(SPECTRA, RATES)
def test_karush_kuhn_tucker(sigma: np.ndarray, rate: float) -> None:
    """Distortions D_i = min(λ_i, θ): every component above the water pays the same slope, none pays more."""
    energy, level = sigma**2, water_level(sigma, rate)
    distortion = np.minimum(energy, level)
    rates = 0.5 * np.log2(energy / distortion)
    slope = 2 * np.log(2) * distortion  # -dD_i/dR_i = 2 ln 2 D_i
    active = rates > 1e-9
    assert np.allclose(slope[active], 2 * np.log(2) * level, rtol=1e-9)
    assert (slope[~active] <= 2 * np.log(2) * level * (1 + 1e-6)).all()
    assert spectral_distortion(sigma, rate) == pytest.approx(distortion.sum() / energy.sum())


def test_no_other_split_of_the_rate_is_better() -> None:
    sigma = np.array([5.0, 2.0, 1.0, 0.4, 0.05])
    for rate in (0.3, 1.0, 2.5):
        total = rate * sigma.size

        def distortion(rates: np.ndarray) -> float:
            return float((sigma**2 * 4.0**-rates).sum() / (sigma**2).sum())

        best = min(
            minimize(
                distortion,
                start * total / start.sum(),
                bounds=[(0, None)] * sigma.size,
                constraints={"type": "eq", "fun": lambda r, t=total: r.sum() - t},
                method="SLSQP",
                options={"ftol": 1e-14, "maxiter": 500},
            ).fun
            for start in np.random.default_rng(0).random((8, sigma.size))
        )
        assert spectral_distortion(sigma, rate) == pytest.approx(best, rel=1e-4)
        assert spectral_distortion(sigma, rate) <= best * (1 + 1e-9)


@given(SPECTRA, st.floats(1e-6, 10))
def test_rate_and_distortion_are_inverse(sigma: np.ndarray, rate: float) -> None:
    distortion = spectral_distortion(sigma, rate)
    assert spectral_rate(sigma, distortion) == pytest.approx(rate, rel=1e-6, abs=1e-9)


@given(SPECTRA, RATES)
def test_the_spectrum_never_makes_it_harder(sigma: np.ndarray, rate: float) -> None:
    assert spectral_distortion(sigma, rate) <= white_distortion(rate) * (1 + 1e-9)


def test_a_flat_spectrum_is_white_and_six_decibels_a_bit() -> None:
    for point in bound_points(np.full(64, 3.0), (0.0, 1.0, 2.0, 4.5)):
        assert point.spectral_squared_error == pytest.approx(point.white_squared_error)
        assert point.white_db == pytest.approx(point.rate_bpw * 20 * np.log10(2))
        assert point.spectral_db == pytest.approx(decibels(point.spectral_squared_error))


def test_components_without_energy_cost_nothing() -> None:
    sigma = np.array([2.0, 1.0, 0.0, 0.0])
    assert spectral_distortion(sigma, 1.0) == pytest.approx(spectral_distortion(sigma[:2], 2.0))
    assert spectral_distortion(sigma, 0.0) == pytest.approx(1.0)


def test_scalar_codes_of_a_gaussian_stay_above_the_bound() -> None:
    """The best scalar quantizer of a Gaussian with 16 levels has D = 0.009497 (Max 1960)."""
    assert gap_db(np.sqrt(0.009497), 4.0) == pytest.approx(3.86, abs=0.01)
    assert gap_db(np.sqrt(white_distortion(4.0)), 4.0) == pytest.approx(0.0, abs=1e-9)
    assert gap_db(0.0, 4.0) is None


def test_the_gap_to_the_spectral_bound_is_larger() -> None:
    sigma = 0.9 ** np.arange(50)
    assert gap_db(0.1, 4.0, sigma) > gap_db(0.1, 4.0)


@pytest.mark.parametrize(
    ("sigma", "rate"),
    [(np.zeros(3), 1.0), (np.array([]), 1.0), (np.array([1.0, np.nan]), 1.0), (np.array([1.0, -1.0]), 1.0)],
)
def test_a_spectrum_that_has_no_bound_is_refused(sigma: np.ndarray, rate: float) -> None:
    with pytest.raises(BitsmithError, match="singular values"):
        spectral_distortion(sigma, rate)


def test_impossible_targets_are_refused() -> None:
    with pytest.raises(BitsmithError, match="rate"):
        water_level(np.ones(3), -1.0)
    for error in (0.0, 1.5, float("nan")):
        with pytest.raises(BitsmithError, match="relative squared error"):
            spectral_rate(np.ones(3), error)
