"""What rounding in a metric gains, what it survives, and when it is kept."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from bitsmith.errors import BitsmithError
from bitsmith.formats import FORMATS, format_named
from bitsmith.formats.blocks import BlockFormat
from bitsmith.numerics.input_metric import InputMetric, corrected_target
from bitsmith.passes.choice import choose, noise_share
from bitsmith.passes.rounding import output_error, round_rows

BLOCKED = [name for name, form in FORMATS.items() if isinstance(form, BlockFormat)]


@dataclass(frozen=True)
class Inputs:
    importance: np.ndarray
    moment: np.ndarray | None
    held: np.ndarray | None


def tokens(count: int, width: int, seed: int) -> np.ndarray:
    mixing = np.random.default_rng(99).standard_normal((width // 4, width))
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((count, width // 4)) @ mixing + rng.standard_normal((count, width))).astype(
        np.float32
    )


def weights(out: int, width: int) -> np.ndarray:
    return (np.random.default_rng(1).standard_normal((out, width)) * 0.02).astype(np.float32)


def inputs_of(fit: np.ndarray, held: np.ndarray | None) -> Inputs:
    moment = (fit.T.astype(np.float64) @ fit / len(fit)).astype(np.float32)
    return Inputs(np.diagonal(moment).copy(), moment, held)


@pytest.mark.parametrize("name", BLOCKED)
def test_beats_the_weighted_search_on_held_out_inputs(name: str) -> None:
    form, rows = FORMATS[name], weights(48, 512)
    inputs, held = inputs_of(tokens(4000, 512, 2), None), tokens(1000, 512, 3)
    assert inputs.moment is not None
    plain = output_error(rows - form.decode(form.encode(rows, inputs.importance)), held)
    ours = output_error(rows - form.decode(round_rows(form, rows, InputMetric(inputs.moment))), held)
    assert ours < 0.6 * plain


MOMENTS = {
    "zero": np.zeros((512, 512)),
    "rank one": np.ones((512, 512)),
    "three tokens": np.cov(tokens(3, 512, 4), rowvar=False, bias=True),
    "huge": 1e30 * np.eye(512, dtype=np.float32),
    "tiny": 1e-38 * np.eye(512, dtype=np.float32),
    "one loud column": np.diag([1e12] + [1.0] * 511),
    "spread": np.diag(np.logspace(-30, 30, 512)),
    "dead columns": np.diag([0.0, 1.0] * 256),
    "not definite": np.eye(512) - 2 * np.eye(512, k=1) - 2 * np.eye(512, k=-1),
}


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS.keys())
@pytest.mark.parametrize("name", ["Q1_0", "Q2_0", "NVFP4", "Q2_K", "Q3_K", "Q4_K", "Q8_0", "Q4_1", "IQ4_XS"])
def test_a_hard_moment_never_spoils_weights(name: str, moment: np.ndarray) -> None:
    form, rows = format_named(name), weights(8, 512)
    rows[0] = 0
    rows[1, :256] = 0
    decoded = form.decode(round_rows(form, rows, InputMetric(moment)))
    assert np.isfinite(decoded).all()
    plain = form.decode(form.encode(rows))
    assert (decoded[0] == 0).all()
    assert np.square(decoded - rows).sum() < 30 * np.square(plain - rows).sum() + 1e-9


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e6])
def test_weights_of_any_size(scale: float) -> None:
    form, rows = format_named("Q4_K"), weights(8, 512) * np.float32(scale)
    moment = inputs_of(tokens(1000, 512, 2), None).moment
    assert moment is not None
    decoded = form.decode(round_rows(form, rows, InputMetric(moment)))
    assert np.isfinite(decoded).all()
    assert np.square(decoded - rows, dtype=np.float64).sum() <= np.square(rows, dtype=np.float64).sum()


@pytest.mark.parametrize(
    ("moment", "says"),
    [
        (np.full((256, 256), np.nan), "not finite"),
        (-np.eye(256), "negative"),
        (np.ones((256, 128)), "shape"),
        (np.ones(256), "shape"),
    ],
)
def test_refuses_what_is_no_moment(moment: np.ndarray, says: str) -> None:
    with pytest.raises(BitsmithError, match=says):
        InputMetric(moment)


def test_refuses_rows_of_another_width() -> None:
    with pytest.raises(BitsmithError, match="512"):
        round_rows(format_named("Q4_K"), weights(4, 512), InputMetric(np.eye(256)))


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_plain_types_are_encoded_as_they_are(name: str) -> None:
    form, rows = format_named(name), weights(4, 256)
    np.testing.assert_array_equal(round_rows(form, rows, InputMetric(np.eye(256))), form.encode(rows))


def test_choice_keeps_feedback_where_held_out_error_falls() -> None:
    rows, form = weights(32, 512), format_named("Q3_K")
    chosen = choose(form, rows, inputs_of(tokens(4000, 512, 2), tokens(500, 512, 3)), "gptq")
    assert chosen.rounder == "gptq"
    assert chosen.damping is not None
    assert chosen.held_errors[f"gptq {chosen.damping:g}"] == min(chosen.held_errors.values())
    assert chosen.held_errors["weighted"] > chosen.held_errors[f"gptq {chosen.damping:g}"]


def test_choice_drops_feedback_that_overfits() -> None:
    rows, form = weights(32, 512), format_named("Q4_K")
    white = np.random.default_rng(5).standard_normal((500, 512)).astype(np.float32)
    chosen = choose(form, rows, inputs_of(tokens(6, 512, 2), white), "gptq", dampings=(1e-4,))
    assert chosen.rounder == "weighted"
    assert chosen.held_errors["weighted"] < chosen.held_errors["gptq 0.0001"]


def test_noise_share_grows_with_the_error_of_the_type() -> None:
    rows, fit, held = weights(32, 512), tokens(4000, 512, 2), tokens(500, 512, 3)
    shares = [
        choose(format_named(name), rows, inputs_of(fit, held), "gptq", dampings=(0.01,)).shrink
        for name in ("Q2_K", "Q4_K", "Q8_0")
    ]
    assert shares[0] >= 4 * shares[1] > 0
    assert shares[2] == 0
    assert noise_share(0.04) == 0.25
    assert noise_share(5.0) == 1.0
    assert noise_share(0.0) == 0.0


def test_shrinking_ends_at_the_diagonal() -> None:
    moment = inputs_of(tokens(4000, 512, 2), None).moment
    assert moment is not None
    (group,) = InputMetric(moment, shrink=1e9).groups(256)
    assert np.abs(group.feedback).max() < 1e-6
    np.testing.assert_allclose(group.diagonal, group.weights, rtol=1e-5)


def test_choice_without_statistics() -> None:
    rows, form = weights(8, 512), format_named("Q4_K")
    fit = inputs_of(tokens(1000, 512, 2), None)
    assert choose(form, rows, None, "gptq").rounder == "nearest"
    assert choose(form, rows, Inputs(fit.importance, None, None), "gptq").rounder == "weighted"
    assert choose(form, rows, fit, "gptq").rounder == "gptq"
    assert choose(form, rows, fit, "auto").rounder == "weighted"
    assert choose(format_named("F16"), rows, fit, "auto").rounder == "nearest"


def test_corrected_target_is_the_rows_where_inputs_did_not_change() -> None:
    rows, fit = weights(8, 128), tokens(1000, 128, 2).astype(np.float64)
    moment = fit.T @ fit / len(fit)
    np.testing.assert_array_equal(corrected_target(rows, moment, moment), rows)


def test_corrected_target_makes_up_for_changed_inputs() -> None:
    rows = weights(16, 128)
    original = tokens(4000, 128, 2).astype(np.float64)
    changed = original * 0.9 + 0.2 * np.random.default_rng(6).standard_normal(original.shape)
    cross, moment = original.T @ changed / 4000, changed.T @ changed / 4000
    target = corrected_target(rows, cross, moment, 1e-3)

    def left(candidate: np.ndarray) -> float:
        return float(np.square(original @ rows.T - changed @ candidate.T).mean())

    exact = rows @ cross @ np.linalg.inv(moment)
    assert left(target) < 0.9 * left(rows)
    assert left(target) == pytest.approx(left(exact), rel=0.01)
    with pytest.raises(BitsmithError, match="shape"):
        corrected_target(rows, cross[:64], moment)
