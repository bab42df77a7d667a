"""Diagnostics of a merge: estimators on known distributions, attention beside plain transformers, targets."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig, Qwen3Config, Qwen3ForCausalLM

from bitsmith.errors import BitsmithError
from bitsmith.lab.embedded import Sizes, embed_student
from bitsmith.numerics.higher_order import excess_kurtosis, kurtosis_gap, pairwise_information
from bitsmith.passes.merge_fold import LayerAlpha
from bitsmith.passes.transform import Model, model_of
from bitsmith.run.merge_attention import attention_kl, head_entropy, mapped_heads
from bitsmith.run.merge_diagnostics import merge_diagnostics
from bitsmith.run.merge_plan import MergePlan, merge_plan
from bitsmith.run.merge_recipe import MergeRecipe
from bitsmith.run.paired import paired
from bitsmith.store import open_checkpoint
from bitsmith.store.paired import Paired
from paired_models import DELTA, DENSE, FULL, HYBRID, LARGE, LINES, SMALL, write_model

RANDOM = np.random.default_rng(11)
SHAPE = 8, 256, 24
LONG = 32, 512, 12
TEACHER_LAYERS = 3


@pytest.mark.parametrize(
    ("drawn", "known"),
    [
        (RANDOM.standard_normal(LONG), 0.0),
        (RANDOM.uniform(size=LONG), -1.2),
        (RANDOM.laplace(size=LONG), 3.0),
        (RANDOM.exponential(size=LONG), 6.0),
        (RANDOM.integers(0, 2, LONG).astype(float), -2.0),
    ],
    ids=["normal", "uniform", "laplace", "exponential", "coin"],
)
def test_kurtosis_is_the_distributions(drawn: np.ndarray, known: float) -> None:
    found = excess_kurtosis(1e3 + 7 * drawn)
    assert abs(np.median(found) - known) < 0.05 + 0.1 * abs(known)
    gap = kurtosis_gap(drawn, RANDOM.standard_normal(LONG))
    assert gap is not None and gap.low is not None and gap.high is not None
    assert gap.low - 0.15 * abs(known) <= known <= gap.high + 0.15 * abs(known)


def test_kurtosis_gap_does_not_see_scale_and_place() -> None:
    drawn = RANDOM.laplace(size=SHAPE)
    gap = kurtosis_gap(5 - 3 * drawn, drawn)
    assert gap is not None and abs(gap.value) < 1e-9
    assert kurtosis_gap(drawn, np.ones(SHAPE)) is None
    drawn[..., 0] = 4.0
    assert np.isnan(excess_kurtosis(drawn)[0]) and kurtosis_gap(drawn, drawn) is not None
    single = kurtosis_gap(drawn[:1], drawn[1:2])
    assert single is not None and single.low is None and single.high is None


@pytest.mark.parametrize("correlation", [0.1, 0.3, 0.5, 0.8])
def test_information_of_normals_is_the_known_one(correlation: float) -> None:
    one, noise = RANDOM.standard_normal((2, 16, 512, 16))
    other = correlation * one + math.sqrt(1 - correlation**2) * noise
    known = -0.5 * math.log(1 - correlation**2)
    found = pairwise_information(one, other)
    assert 0.9 * known < found.estimate.value < 1.02 * known + 1e-3
    assert found.null_low < 0 < found.null_high < found.estimate.value
    assert found.estimate.low is not None and found.estimate.low < found.estimate.value


def test_information_sees_what_correlation_does_not() -> None:
    drawn = RANDOM.standard_normal(SHAPE)
    assert abs(np.corrcoef(drawn[..., 0].ravel(), drawn[..., 0].ravel() ** 2)[0, 1]) < 0.1
    assert pairwise_information(drawn, drawn**2).estimate.value > 1
    other = RANDOM.standard_normal(SHAPE) + drawn
    assert pairwise_information(np.exp(drawn), other) == pairwise_information(drawn, other)
    levels = RANDOM.integers(0, 4, SHAPE).astype(float)
    assert abs(pairwise_information(levels, levels).estimate.value - math.log(4)) < 0.01
    assert pairwise_information(drawn, np.zeros(SHAPE)).estimate.value == 0


def test_unrelated_channels_that_wander_stay_in_their_null_band() -> None:
    """Plain estimates find 0.1 nats and more in tokens that resemble their neighbours."""
    one, other = np.zeros((2, *SHAPE))
    for walk in (one, other):
        steps = RANDOM.standard_normal((SHAPE[0] * SHAPE[1], SHAPE[2]))
        for n in range(1, len(steps)):
            steps[n] += 0.95 * steps[n - 1]
        walk[...] = steps.reshape(SHAPE)
    found = pairwise_information(one, other)
    width = found.null_high - found.null_low
    assert found.null_low - width < found.estimate.value < found.null_high + width
    assert pairwise_information(one[:1], other[:1]).estimate.low is None


@pytest.mark.parametrize("shapes", [((2, 3, 4), (2, 3, 5)), ((2, 3), (2, 3)), ((0, 3, 4), (0, 3, 4))])
def test_activations_of_other_shapes_are_refused(shapes: Any) -> None:
    one, other = (np.ones(shape) for shape in shapes)
    for work in (kurtosis_gap, pairwise_information):
        with pytest.raises(BitsmithError, match="have shapes"):
            work(one, other)


class Merged:
    """A teacher, a student and their paired activations."""

    def __init__(self, folder: Path, teacher: Path, student: Path, samples: int = 256) -> None:
        text = folder / "text.txt"
        text.write_text("".join(LINES))
        self.folders = teacher, student
        self.paired: Paired = paired(
            teacher, student, text, folder / "paired", ctx_tokens=64, samples=samples
        )
        self.teacher, self.student = (model_of(open_checkpoint(path)) for path in (teacher, student))

    def plan(self, **recipe: Any) -> MergePlan:
        return merge_plan(self.paired, self.teacher, self.student, MergeRecipe(**{"alpha": 0.5, **recipe}))

    def states(self, plan: MergePlan, layer: int) -> tuple[np.ndarray, np.ndarray]:
        return self.paired.samples("teacher", plan.layer_map[layer]), self.paired.samples("student", layer)

    def weights(self, side: int) -> dict[int, np.ndarray]:
        """Return by attention layer what plain transformers' eager attention looks at (`chunks H T T`)."""
        config = json.loads((self.folders[side] / "config.json").read_text())
        dense = config["model_type"] == "qwen3"
        kinds = (Qwen3Config, Qwen3ForCausalLM) if dense else (Qwen3_5TextConfig, Qwen3_5ForCausalLM)
        settings = kinds[0].from_dict(config)
        settings._attn_implementation = "eager"
        model = kinds[1](settings).float().eval()
        stored = load_file(self.folders[side] / "model.safetensors")
        model.load_state_dict({name: torch.from_numpy(array) for name, array in stored.items()})
        seen: dict[int, np.ndarray] = {}
        for number, layer in enumerate(model.model.layers):
            if hasattr(layer, "self_attn"):
                layer.self_attn.register_forward_hook(
                    lambda _, __, out, number=number: seen.__setitem__(number, out[1].double().numpy())
                )
        with torch.no_grad():
            model(torch.from_numpy(self.paired.tokens()[1]))
        return seen


def dense(folder: Path) -> Merged:
    teacher = write_model(folder / "teacher", 1, **DENSE, **LARGE, num_hidden_layers=TEACHER_LAYERS)
    return Merged(folder, teacher, write_model(folder / "student", 2, **DENSE, **SMALL, num_hidden_layers=2))


def hybrid(folder: Path) -> Merged:
    large = LARGE | {"linear_num_value_heads": 4, "num_key_value_heads": 2}
    small = SMALL | {"linear_num_value_heads": 2, "num_key_value_heads": 1}
    teacher = write_model(folder / "teacher", 1, **HYBRID, **large, layer_types=[FULL, DELTA, FULL])
    student = write_model(folder / "student", 2, **HYBRID, **small, layer_types=[FULL, DELTA])
    return Merged(folder, teacher, student)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Merged:
    return dense(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def qwen3_5(tmp_path_factory: pytest.TempPathFactory) -> Merged:
    return hybrid(tmp_path_factory.mktemp("qwen3_5"))


@pytest.fixture(params=["qwen3", "qwen3_5"])
def pair(request: pytest.FixtureRequest) -> Merged:
    merged: Merged = request.getfixturevalue(request.param)
    return merged


def kl_by_group(ours: np.ndarray, theirs: np.ndarray, groups: int) -> np.ndarray:
    """Return the mean over heads and queries 1 … T-1 of KL(ours‖theirs) by group (`H T T` per chunk)."""
    logs = [np.log(part, out=np.zeros_like(part), where=part > 0) for part in (ours, theirs)]
    found = (ours * (logs[0] - logs[1])).sum(-1)[:, :, 1:]
    by_group: np.ndarray = found.reshape(len(found), groups, -1).mean((0, 2))
    return by_group


def test_attention_is_that_of_plain_transformers(pair: Merged) -> None:
    plan = pair.plan()
    theirs, ours = pair.weights(0), pair.weights(1)
    merge = plan.layers[0]
    found = attention_kl(pair.teacher, pair.student, 0, merge, pair.states(plan, 0))
    heads = mapped_heads(merge.heads)
    groups = merge.heads.student.groups
    expected = kl_by_group(ours[0], theirs[merge.teacher][:, heads], groups)
    assert expected.min() > 1e-3
    np.testing.assert_allclose([one.value for one in found.teacher], expected, rtol=1e-4)
    for model, seen, number in ((pair.teacher, theirs, merge.teacher), (pair.student, ours, 0)):
        part = seen[number]
        logs = np.log(part, out=np.zeros_like(part), where=part > 0)
        entropy = -(part * logs).sum(-1)[:, :, 1:].mean((0, 2))
        side = "teacher" if model is pair.teacher else "student"
        found_entropy = head_entropy(model, number, pair.paired.samples(side, number))
        np.testing.assert_allclose([one.value for one in found_entropy], entropy, rtol=1e-4)


def test_a_head_stands_beside_the_one_it_is_mapped_to(qwen3: Merged) -> None:
    """Another teacher head gives another figure: the mapping is not ignored."""
    plan = qwen3.plan(heads="pair")
    heads = plan.layers[0].heads
    found = mapped_heads(heads)
    assert (np.abs(np.asarray(heads.query))[found, np.arange(len(found))] > 0).all()
    selected = qwen3.plan().layers[0].heads
    np.testing.assert_array_equal(mapped_heads(selected), selected.query)


def test_shares_of_nothing_leave_attention_alone(pair: Merged) -> None:
    plan = pair.plan(alpha=0.0)
    found = attention_kl(pair.teacher, pair.student, 0, plan.layers[0], pair.states(plan, 0))
    merge = plan.layers[0]
    still = attention_kl(
        pair.teacher,
        pair.student,
        0,
        merge.__class__(**{**vars(merge), "alpha": LayerAlpha(0.0, 0.0)}),
        pair.states(plan, 0),
    )
    assert all(one.value == 0 for one in still.merged)
    assert all(one.value > 1e-3 for one in found.folded)
    assert [one.value for one in still.folded] == [one.value for one in found.folded]


def test_block_rotations_of_values_do_not_touch_attention_those_of_queries_do(qwen3: Merged) -> None:
    found = {}
    for heads in ("match", "turn", "frozen-kv"):
        plan = qwen3.plan(heads=heads)
        found[heads] = attention_kl(qwen3.teacher, qwen3.student, 0, plan.layers[0], qwen3.states(plan, 0))
    assert found["match"].unturned is None
    turned = found["turn"]
    assert turned.unturned is not None
    np.testing.assert_array_equal(
        [one.value for one in turned.folded], [one.value for one in turned.unturned]
    )
    frozen = found["frozen-kv"]
    assert frozen.unturned is not None
    assert all(a.value != b.value for a, b in zip(frozen.folded, frozen.unturned, strict=True))


def test_a_layer_without_attention_is_refused(qwen3_5: Merged) -> None:
    plan = qwen3_5.plan()
    with pytest.raises(BitsmithError, match="DeltaNet layer"):
        attention_kl(qwen3_5.teacher, qwen3_5.student, 1, plan.layers[1], qwen3_5.states(plan, 1))
    with pytest.raises(BitsmithError, match="no attention logits"):
        head_entropy(qwen3_5.student, 1, qwen3_5.paired.samples("student", 1))


def test_figures_are_those_of_the_held_out_states(qwen3: Merged) -> None:
    plan = qwen3.plan(basis="layer", map="joint")
    found = merge_diagnostics(plan).to_json()
    json.dumps(found, allow_nan=False)
    for number, layer in enumerate(found["layers"]):
        merge = plan.layers[number]
        x, y = (part.reshape(-1, part.shape[-1]).astype(float) for part in qwen3.states(plan, number))
        mapped = x @ merge.before.forward
        cosine = (mapped * y).sum(1) / np.linalg.norm(mapped, axis=1) / np.linalg.norm(y, axis=1)
        basis = np.linalg.qr(merge.before.forward)[0]
        cost = np.linalg.norm(merge.before.backward.T @ merge.after.forward - np.eye(y.shape[1]))
        assert cost > 0.1
        expected = {
            "cosine": cosine.mean(),
            "variance_kept": np.linalg.norm(x @ basis) ** 2 / np.linalg.norm(x) ** 2,
            "transition_cost": cost,
            "transition_cost_normalised": cost / math.sqrt(y.shape[1]),
            "kurtosis_gap": np.median(moment_kurtosis(mapped) - moment_kurtosis(y)),
        }
        for name, value in expected.items():
            assert abs(layer[name]["value"] - value) < 1e-6 * max(1, abs(value)), name
        assert layer["cosine"]["low"] < layer["cosine"]["value"] < layer["cosine"]["high"]
        assert layer["transition_cost"]["interval"] == "unmeasured" and not layer["met"]["transition_cost"]
        assert layer["met"]["cosine"] == (expected["cosine"] >= 0.8)
        assert layer["alpha_mixer"] == [0.5, 0.5] and layer["alpha_ffn"] == 0.5
    assert found["protocol"]["chunks"] == 4 and found["protocol"]["tokens"] == 256


def moment_kurtosis(rows: np.ndarray) -> np.ndarray:
    centred = rows - rows.mean(0)
    found: np.ndarray = (centred**4).mean(0) / (centred**2).mean(0) ** 2 - 3
    return found


def test_least_squares_maps_lie_in_the_tolerance_that_they_make(qwen3_5: Merged) -> None:
    found = merge_diagnostics(qwen3_5.plan(map="ridge", basis="layer")).to_json()
    places = [*found["layers"], found["final"]]
    for place in places:
        assert place["met"]["kurtosis_gap"] and place["met"]["pairwise_mi"]
        assert place["pairwise_mi"]["value"] > place["pairwise_mi_null"]["high"]
        for name, figure in place["reference"].items():
            assert abs(figure["value"] - place[name]["value"]) < 1e-6
    delta = found["layers"][1]
    assert delta["kind"] == "linear_attention" and delta["attention_kl"] == []
    assert "no attention logits" in delta["unmeasured"]["attention_kl"]
    assert len(found["layers"][0]["attention_kl"]) == 1
    assert len(found["layers"][0]["teacher_head_entropy"]) == 4


def test_an_embedded_teacher_meets_every_target(tmp_path: Path) -> None:
    student = write_model(tmp_path / "student", 2, **DENSE, **SMALL, num_hidden_layers=2)
    sizes = Sizes(48, [None, 0, 1], ffn=56, heads=8, kv_heads=4)
    embed_student(student, tmp_path / "teacher", sizes, turn_values=True)
    merged = Merged(tmp_path, tmp_path / "teacher", student)
    found = merge_diagnostics(merged.plan(heads="turn", alpha=1.0)).to_json()
    for place in [*found["layers"], found["final"]]:
        assert all(place["met"].values()), place["met"]
        assert place["variance_kept"]["value"] > 0.9999 and place["cosine"]["value"] > 0.9999
        assert abs(place["kurtosis_gap"]["value"]) < 1e-3
        for name in ("attention_kl", "attention_kl_merged", "attention_kl_folded"):
            assert all(figure["value"] < 1e-6 for figure in place.get(name, []))


def test_single_chunks_have_no_intervals_and_short_texts_no_tolerance(tmp_path: Path) -> None:
    teacher = write_model(tmp_path / "teacher", 1, **DENSE, **LARGE, num_hidden_layers=TEACHER_LAYERS)
    student = write_model(tmp_path / "student", 2, **DENSE, **SMALL, num_hidden_layers=2)
    text = tmp_path / "text.txt"
    text.write_text("".join(LINES))
    short = paired(teacher, student, text, tmp_path / "paired", ctx_tokens=32, tokens=96)
    models: list[Model] = [model_of(open_checkpoint(path)) for path in (teacher, student)]
    found = merge_diagnostics(merge_plan(short, *models, MergeRecipe(alpha=0.5))).to_json()
    assert found["protocol"]["interval"] == "unmeasured"
    for place in [*found["layers"], found["final"]]:
        figures = [place["cosine"], place["kurtosis_gap"], *place.get("attention_kl", [])]
        assert all(one["low"] is None and one["interval"] == "unmeasured" for one in figures)
        assert "single chunk" in place["unmeasured"]["intervals"]
        assert "too few" in place["unmeasured"]["reference"] and place["reference"] == {}
        assert place["met"]["kurtosis_gap"] is None and place["met"]["pairwise_mi"] is None
    assert found["targets"]["kurtosis_gap"] is None


@pytest.mark.slow
def test_figures_do_not_depend_on_threads(qwen3: Merged) -> None:
    plan, found = qwen3.plan(heads="frozen-kv"), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(merge_diagnostics(plan).to_json())
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]
