"""The sampler against distributions worked out by hand, and against real llama.cpp's own samplers."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from bitsmith.errors import BitsmithError
from bitsmith.run.sampling import GREEDY, Sampler, Sampling, distribution
from ggml_oracle import library

HALVES = np.log(np.array([0.125, 0.5, 0.125, 0.25], np.float32))  # likeliest first: tokens 1, 3, 0, 2
PLAIN = Sampling(temperature=1.0, top_k=0, repeat_penalty=1.0)


def sampling(**changed: float) -> Sampling:
    return Sampling(**{**vars(PLAIN), **changed})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "ids", "shares"),
    [
        ({}, [1, 3, 0, 2], [1 / 2, 1 / 4, 1 / 8, 1 / 8]),
        ({"temperature": 0.5}, [1, 3, 0, 2], [16 / 22, 4 / 22, 1 / 22, 1 / 22]),
        ({"temperature": 1e-30}, [1, 3, 0, 2], [1, 0, 0, 0]),
        ({"top_k": 2}, [1, 3], [2 / 3, 1 / 3]),
        ({"top_k": 3}, [1, 3, 0], [4 / 7, 2 / 7, 1 / 7]),  # of equals the lower id
        ({"top_k": 99}, [1, 3, 0, 2], [1 / 2, 1 / 4, 1 / 8, 1 / 8]),
        ({"top_p": 0.4}, [1], [1]),
        ({"top_p": 0.6}, [1, 3], [2 / 3, 1 / 3]),
        ({"top_p": 0.8}, [1, 3, 0], [4 / 7, 2 / 7, 1 / 7]),
        ({"top_k": 2, "top_p": 0.6}, [1], [1]),  # of the two that are left, the first has 2/3
        ({"top_p": 0.6, "temperature": 0.5}, [1, 3], [4 / 5, 1 / 5]),  # p is reached before the temperature
    ],
)
def test_the_distribution_is_the_one_worked_out_by_hand(
    options: dict[str, float], ids: list[int], shares: list[float]
) -> None:
    found, probabilities = distribution(HALVES, [], sampling(**options))
    assert found.tolist() == ids
    assert probabilities == pytest.approx(shares, rel=1e-6)


def test_the_penalty_divides_positive_logits_and_multiplies_others_once() -> None:
    logits = np.array([2.0, -2.0, 1.5, 0.0], np.float32)
    found, shares = distribution(logits, [0, 1, 0, 3], sampling(repeat_penalty=2.0))
    assert found.tolist() == [2, 0, 3, 1]
    weights = np.exp([1.5, 1.0, 0.0, -4.0])
    assert shares == pytest.approx(weights / weights.sum())


def test_the_penalty_looks_back_over_the_window_and_at_picked_tokens() -> None:
    logits = np.array([10.0, 9.0, 8.0], np.float32)
    options = sampling(temperature=1e-3, repeat_penalty=2.0, repeat_window=2)
    sampler = Sampler(options, prompt=[2, 1, 0])  # 2 is out of the window: 5, 4.5 and 8
    assert [sampler.pick(logits) for _ in range(4)] == [2, 1, 0, 2]


def test_no_window_is_no_penalty() -> None:
    sampler = Sampler(sampling(temperature=1e-3, repeat_penalty=9.0, repeat_window=0), prompt=[1])
    assert [sampler.pick(HALVES) for _ in range(3)] == [1, 1, 1]


def test_temperature_0_takes_the_likeliest_and_ignores_the_penalty() -> None:
    options = Sampling(temperature=0.0, repeat_penalty=100.0, top_k=1, top_p=0.1)
    assert Sampler(options, prompt=[1]).pick(HALVES) == Sampler(GREEDY).pick(HALVES) == 1


def test_picks_follow_the_distribution_and_the_seed() -> None:
    n_picks = 20_000
    picks = [[sampler.pick(HALVES) for _ in range(n_picks)] for sampler in (Sampler(PLAIN), Sampler(PLAIN))]
    assert picks[0] == picks[1]
    assert picks[0][:99] != [Sampler(sampling(seed=1)).pick(HALVES) for _ in range(99)]
    shares = np.exp(HALVES)
    deviation = np.sqrt(shares * (1 - shares) / n_picks)
    assert (np.abs(np.bincount(picks[0]) / n_picks - shares) < 4 * deviation).all()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"repeat_penalty": 0.0},
        {"repeat_window": -1},
        {"seed": -1},
    ],
)
def test_what_has_no_meaning_is_refused(options: dict[str, float]) -> None:
    name = next(iter(options)).replace("top_", "top-").replace("_", " ")
    with pytest.raises(BitsmithError, match=f"{name} is .*, expected"):
        sampling(**options)


class _Datum(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int32), ("logit", ctypes.c_float), ("p", ctypes.c_float))


class _Data(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.POINTER(_Datum)),
        ("size", ctypes.c_size_t),
        ("selected", ctypes.c_int64),
        ("sorted", ctypes.c_bool),
    )


def _real(logits: np.ndarray, recent: list[int], options: Sampling) -> dict[int, float]:
    """Return the probabilities that llama.cpp's samplers leave, in the order of its default chain."""
    lib = library()
    makers = (
        ("penalties", len(logits), options.repeat_window, options.repeat_penalty, 0.0, 0.0),
        ("top_k", options.top_k),
        ("top_p", options.top_p, 0),
        ("temp", options.temperature),
    )
    data = (_Datum * len(logits))(*[(number, logit, 0.0) for number, logit in enumerate(logits)])
    array = _Data(data, len(logits), -1, False)
    for name, *values in makers:
        make = getattr(lib, f"llama_sampler_init_{name}")
        make.restype = ctypes.c_void_p
        last = ctypes.c_size_t if name == "top_p" else None
        kinds = [ctypes.c_float if isinstance(value, float) else ctypes.c_int32 for value in values]
        make.argtypes = kinds if last is None else [kinds[0], last]
        sampler = ctypes.c_void_p(make(*values))
        for token in recent:
            lib.llama_sampler_accept(sampler, ctypes.c_int32(token))
        lib.llama_sampler_apply(sampler, ctypes.byref(array))
        lib.llama_sampler_free(sampler)
    kept = [(array.data[n].id, array.data[n].logit) for n in range(array.size)]
    weights = np.exp(np.array([logit for _, logit in kept]) - max(logit for _, logit in kept))
    return dict(zip([number for number, _ in kept], weights / weights.sum(), strict=True))


@pytest.mark.parametrize("seed", range(8))
def test_the_distribution_is_llama_cpps(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, 200).astype(np.float32)
    options = Sampling(
        temperature=float(rng.uniform(0.3, 2)),
        top_k=int(rng.integers(1, 100)),
        top_p=float(rng.uniform(0.3, 1)),
        repeat_penalty=float(rng.uniform(0.8, 2)),
        repeat_window=16,
    )
    recent = rng.integers(0, 200, 30).tolist()
    ids, shares = distribution(logits, recent[-16:], options)
    real = _real(logits, recent, options)
    assert set(ids.tolist()) == set(real)
    assert shares == pytest.approx([real[token] for token in ids.tolist()], rel=1e-4, abs=1e-7)
