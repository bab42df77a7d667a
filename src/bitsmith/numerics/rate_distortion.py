"""What no code can beat: the Gaussian rate-distortion bound of a matrix, white and on its spectrum.

A matrix is taken for `max(out, in)` independent samples of a Gaussian vector of `n = min(out, in)`
components, one along each singular direction, with variances `λ_i = σ_i² / max(out, in)`. Squared error is
the distortion, relative to `Σ λ_i`; the rate is in bits per weight.

- white: all weights independent with one variance, `D(R) = 2^(-2R)`;
- spectral: reverse water-filling, `D = Σ min(λ_i, θ) / Σ λ_i`, `R = 1/n Σ max(0, ½ log2(λ_i / θ))`.

What that assumes. A Gaussian is the hardest source of its covariance: weights of another distribution may be
coded below the bound. The spectral bound hands the decoder the singular directions for nothing and is too low
for a nearly square matrix: independent Gaussian weights have Marchenko-Pastur's spectrum, not a flat one, but
their true bound is the white one. Neither is reached without coding long blocks: scalar quantization with
entropy coding stays 1.53 dB above at high rates, without entropy coding further.
Source: Cover and Thomas, Elements of Information Theory, 10.3.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitsmith.errors import BitsmithError

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class BoundPoint:
    """The bounds at one rate: relative squared errors, and the same as signal-to-noise ratios in dB."""

    rate_bpw: float
    white_squared_error: float
    spectral_squared_error: float
    white_db: float
    spectral_db: float


def white_distortion(rate_bpw: float) -> float:
    """Return the least relative squared error `2^(-2R)` of independent Gaussian weights."""
    return float(2.0 ** (-2.0 * rate_bpw))


def water_level(singular_values: Float64, rate_bpw: float) -> float:
    """Return the water level `θ`, in units of σ², at which the spectrum costs `rate_bpw` bits per weight.

    The `k` largest components stay above the water: `log2 θ = mean_k(log2 λ) - 2 R n / k`.
    Raises BitsmithError for a spectrum of zeros, values that are negative or not finite, or a negative rate.
    """
    energy = _energies(singular_values)
    if not rate_bpw >= 0:
        raise BitsmithError(f"rate is {rate_bpw}, expected 0 or more bits per weight")
    logs = np.log2(energy[energy > 0])
    count = np.arange(1, logs.size + 1)
    levels = np.cumsum(logs) / count - 2.0 * rate_bpw * energy.size / count
    # the candidate level of k components is right for the last k whose own component is still above it
    above = int(np.flatnonzero(logs >= levels)[-1])
    return float(2.0 ** levels[above])


def spectral_distortion(singular_values: Float64, rate_bpw: float) -> float:
    """Return the least relative squared error at `rate_bpw`, by reverse water-filling; raises as above."""
    energy = _energies(singular_values)
    return float(np.minimum(energy, water_level(singular_values, rate_bpw)).sum() / energy.sum())


def spectral_rate(singular_values: Float64, relative_squared_error: float) -> float:
    """Return the least bits per weight for a relative squared error in (0, 1]; inverse of the above.

    Raises BitsmithError for an error outside (0, 1], and as `water_level` does.
    """
    energy = _energies(singular_values)
    if not 0 < relative_squared_error <= 1:
        raise BitsmithError(f"relative squared error is {relative_squared_error}, expected (0, 1]")
    target = relative_squared_error * energy.sum()
    tail = np.append(np.cumsum(energy[::-1])[::-1], 0.0)  # tail[k] = energy of components k, k+1, ...
    count = np.arange(1, energy.size + 1)
    levels = (target - tail[1:]) / count
    above = int(np.flatnonzero(levels <= energy * (1 + 1e-12))[-1])
    level = float(levels[above])
    wet = energy[: above + 1]
    return float(np.maximum(0.5 * np.log2(wet / level), 0.0).sum() / energy.size)


def bound_points(singular_values: Float64, rates_bpw: tuple[float, ...]) -> tuple[BoundPoint, ...]:
    """Return both bounds at each rate; raises as `water_level` does."""
    points = []
    for rate in rates_bpw:
        white, spectral = white_distortion(rate), spectral_distortion(singular_values, rate)
        points.append(BoundPoint(rate, white, spectral, decibels(white), decibels(spectral)))
    return tuple(points)


def decibels(relative_squared_error: float) -> float:
    """Return the signal-to-noise ratio `-10 log10(D)` in dB of a relative squared error above 0."""
    return float(-10.0 * np.log10(relative_squared_error))


def gap_db(relative_error: float, rate_bpw: float, singular_values: Float64 | None = None) -> float | None:
    """Return how many dB a measured error lies above the bound at its rate; negative beats a Gaussian.

    `relative_error` is `|W - W'|_F / |W|_F`. The bound is the white one, or the spectral one where
    `singular_values` are given. None for an error of 0, which no finite number of dB expresses.
    """
    if relative_error == 0:
        return None
    bound = (
        white_distortion(rate_bpw)
        if singular_values is None
        else spectral_distortion(singular_values, rate_bpw)
    )
    return decibels(bound) - decibels(relative_error**2)


def _energies(singular_values: Float64) -> Float64:
    values = np.sort(np.asarray(singular_values, dtype=np.float64).reshape(-1))[::-1]
    if values.size == 0 or not np.isfinite(values).all() or values[-1] < 0:
        raise BitsmithError("singular values are absent, negative or not finite")
    if values[0] == 0:
        raise BitsmithError("all singular values are 0: a zero matrix has no rate-distortion bound")
    return np.square(values)
