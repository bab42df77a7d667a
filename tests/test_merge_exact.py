"""A teacher that is an embedded copy of the student is recovered: the merge has the student's logits.

Moments come from plain transformers' forward on some tokens, logits are compared on others. Errors are over
the largest logit, in float32.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bitsmith.errors import BitsmithError
from bitsmith.lab.embedded import Embedding, Sizes, embed_student, spread_layers
from bitsmith.passes.merge_axes import AxisMap
from bitsmith.passes.merge_fold import EndsMerge, LayerAlpha, LayerMerge, MergedView, merged_view
from bitsmith.passes.merge_heads import HeadMap, with_frozen_kv, with_turned_values
from bitsmith.passes.merge_maps import (
    ResidualMap,
    cross_map,
    procrustes_map,
    ridge_map,
    subspace_map,
    tiered_map,
    whitened_map,
)
from bitsmith.passes.transform import Model, model_of
from bitsmith.store import TensorData, open_checkpoint, write_safetensors
from exact_forward import TINY, VOCAB, Tiny, arrays, forward
from merge_pairs import Pair, seen

EXACT = 1e-5  # of the largest logit; the random models' are below 10
KINDS = ("qwen3", "qwen3-tied", "qwen3.5", "qwen3.5-tied")
FEW = ("qwen3-tied", "qwen3.5")
SOME = [pytest.param(kind, marks=() if kind in FEW else pytest.mark.slow) for kind in KINDS]
RIVALS = (procrustes_map, cross_map, subspace_map, whitened_map, ridge_map)


@dataclass(frozen=True)
class Case:
    """A student, its embedded teacher, and both on the same tokens; the student's logits on others."""

    tiny: Tiny
    folder: Path
    embedding: Embedding
    pair: Pair
    held: np.ndarray
    logits: np.ndarray

    def error(self, view: Any) -> float:
        """Return the largest deviation from the student's logits over the largest of them."""
        found = seen(view, self.held).logits
        return float(np.abs(found - self.logits).max() / np.abs(self.logits).max())

    def merged(self, mapping: ResidualMap | None = None, alpha: float = 1.0) -> MergedView:
        return merged_view(*self.pair.models, *self.pair.merges(mapping, alpha))


def _sizes(tiny: Tiny, scale: float | None) -> Sizes:
    layers = tiny.config.get("text_config", tiny.config)["num_hidden_layers"]
    delta = {"k_heads": 3, "v_heads": 9} if tiny.k_heads else {}
    return Sizes(
        96, spread_layers(layers, 2 * layers + 1), ffn=160, heads=9, kv_heads=3, scale=scale, **delta
    )


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Case]:
    """Cases by the kind of student, whether value channels are turned, and scale, each made once."""

    @cache
    def made(kind: str, turned: bool = False, scale: float | None = None) -> Case:
        random = np.random.default_rng(3)
        fit, held = (random.integers(4, VOCAB, shape) for shape in ((16, 32), (2, 16)))
        folder = TINY[kind].write(tmp_path_factory.mktemp("merge") / "student", "F32")
        teacher = folder.parent / "teacher"
        embedding = embed_student(folder, teacher, _sizes(TINY[kind], scale), turn_values=turned)
        pair = Pair(teacher, folder, fit)
        return Case(TINY[kind], folder, embedding, pair, held, seen(pair.student.checkpoint, held).logits)

    return made


@pytest.mark.parametrize("kind", SOME)
def test_the_embedded_teacher_computes_what_the_student_does(kind: str, case: Callable[..., Case]) -> None:
    found = case(kind)
    teacher, student = found.pair.teacher.checkpoint, found.pair.student.checkpoint
    outputs = [forward(one.config, arrays(one)) for one in (teacher, student)]
    assert outputs[0].error(outputs[1]) <= 2e-6  # its weights are stored in F32
    assert found.pair.teacher.arch.number("hidden_size") == 96


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_the_student_is_recovered(kind: str, alpha: float, case: Callable[..., Case]) -> None:
    assert case(kind).error(case(kind).merged(alpha=alpha)) <= EXACT


@pytest.mark.parametrize("kind", ["qwen3", pytest.param("qwen3.5-tied", marks=pytest.mark.slow)])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_other_scales_and_what_rms_norm_loses(kind: str, scale: float, case: Callable[..., Case]) -> None:
    """The teacher's states are `scale` as long: the map's scale and the norms' gains make up for it."""
    found = case(kind, scale=scale)
    for alpha in (1.0, 0.5):
        assert found.error(found.merged(alpha=alpha)) <= EXACT
    layers, ends = found.pair.merges()
    assert np.linalg.norm(ends.final.forward[:, 0]) == pytest.approx(1 / scale, rel=1e-4)
    assert [*layers[1].gains, ends.gain] == pytest.approx([np.sqrt(96 / 64) / scale] * 3, rel=1e-4)
    without = {n: replace(merge, gains=(1.0, 1.0)) for n, merge in layers.items()}
    assert found.error(merged_view(*found.pair.models, without, ends)) > 1e-2


@pytest.mark.parametrize("kind", SOME)
def test_layers_heads_and_neurons_are_found(kind: str, case: Callable[..., Case]) -> None:
    found = case(kind)
    assert found.pair.layers == found.embedding.layers
    layers, _ = found.pair.merges()
    for n, merge in layers.items():
        places, heads = found.embedding.places[n], merge.heads
        groups = heads.shared if isinstance(heads, HeadMap) else heads.keys
        queries = heads.query if isinstance(heads, HeadMap) else heads.values
        assert groups.tolist() == places["groups"].tolist()
        assert queries.tolist() == places["heads"].tolist()
        assert merge.ffn.producing.tolist() == places["ffn"].tolist()


@pytest.mark.parametrize("kind", ["qwen3", pytest.param("qwen3.5", marks=pytest.mark.slow)])
@pytest.mark.parametrize("rival", RIVALS)
def test_every_map_recovers_what_is_there(
    rival: Callable[..., ResidualMap], kind: str, case: Callable[..., Case]
) -> None:
    found = case(kind)
    assert found.error(found.merged(rival(found.pair.pooled()))) <= 10 * EXACT


@pytest.mark.parametrize("kind", SOME)
def test_a_wrong_map_shows(kind: str, case: Callable[..., Case]) -> None:
    """A map that is right but for one channel with its sign turned."""
    found = case(kind)
    right = tiered_map(found.pair.pooled())
    signs = np.where(np.arange(64) == 5, -1.0, 1.0)
    forward, backward = right.forward * signs, right.backward
    assert found.error(found.merged(ResidualMap(forward, backward, "wrong"))) > 1e-2


@pytest.mark.parametrize("kind", SOME)
def test_at_one_nothing_of_the_student_is_left(kind: str, case: Callable[..., Case], tmp_path: Path) -> None:
    """Another student of the same shape takes the first one's place: the merge is still the first one."""
    found = case(kind)
    other = model_of(open_checkpoint(found.tiny.write(tmp_path / "other", "F32", seed=9)))
    assert found.error(other.checkpoint) > 0.1
    assert found.error(merged_view(found.pair.teacher, other, *found.pair.merges())) <= EXACT


@pytest.mark.parametrize("kind", SOME)
def test_at_zero_the_student_stays_bit_for_bit(kind: str, case: Callable[..., Case]) -> None:
    found = case(kind)
    view, stored = found.merged(alpha=0.0), found.pair.student.checkpoint
    assert view.keys() == stored.keys()
    assert all(view[name] is stored[name] for name in stored)


@pytest.mark.parametrize("kind", ["qwen3", "qwen3.5"])
def test_every_matrix_takes_its_own_map(kind: str, case: Callable[..., Case]) -> None:
    """W = 0.3 W' + 0.7 W_s by the formulas, with another map and gain at each place."""
    found, random = case(kind), np.random.default_rng(21)
    maps = [ResidualMap(*random.standard_normal((2, 96, 64)), method="drawn") for _ in range(5)]
    layers, _ = found.pair.merges()
    n = next(n for n, merge in layers.items() if isinstance(merge.heads, HeadMap))
    places = dict(zip(("before", "between", "after"), maps, strict=False))
    merge = replace(layers[n], **places, gains=(2.0, 3.0), alpha=LayerAlpha(0.3, 0.3))
    ends = EndsMerge(maps[3], maps[4], 5.0, 0.3, 0.3)
    view = merged_view(*found.pair.models, {n: merge}, ends)
    plus = float(kind == "qwen3.5")
    theirs, ours = (arrays(model.checkpoint) for model in found.pair.models)
    t, s = f"model.layers.{merge.teacher}.", f"model.layers.{n}."
    heads, dim = merge.heads, 16
    assert isinstance(heads, HeadMap)
    wide = dim * (1 + heads.gated)
    query, kv = (
        (at[:, None] * size + np.arange(size)).ravel()
        for at, size in ((heads.query, wide), (heads.shared, dim))
    )
    output, ffn = (heads.query[:, None] * dim + np.arange(dim)).ravel(), merge.ffn.producing

    def read(weights: np.ndarray, norm: str, gain: float, place: ResidualMap) -> np.ndarray:
        return gain * weights * (theirs[norm] + plus) @ place.backward

    mixer, between = (f"{t}{norm}_layernorm.weight" for norm in ("input", "post_attention"))
    expected = {
        "self_attn.q_proj": read(theirs[f"{t}self_attn.q_proj.weight"][query], mixer, 2.0, maps[0]),
        "self_attn.k_proj": read(theirs[f"{t}self_attn.k_proj.weight"][kv], mixer, 2.0, maps[0]),
        "self_attn.v_proj": read(theirs[f"{t}self_attn.v_proj.weight"][kv], mixer, 2.0, maps[0]),
        "self_attn.o_proj": maps[1].forward.T @ theirs[f"{t}self_attn.o_proj.weight"][:, output],
        "mlp.gate_proj": read(theirs[f"{t}mlp.gate_proj.weight"][ffn], between, 3.0, maps[1]),
        "mlp.up_proj": read(theirs[f"{t}mlp.up_proj.weight"][ffn], between, 3.0, maps[1]),
        "mlp.down_proj": maps[2].forward.T @ theirs[f"{t}mlp.down_proj.weight"][:, ffn],
    }
    for name, made in expected.items():
        own = ours[f"{s}{name}.weight"]
        if not name.endswith(("o_proj", "down_proj")):
            own = own * (
                ours[s + ("input" if "attn" in name else "post_attention") + "_layernorm.weight"] + plus
            )
        np.testing.assert_allclose(
            view[f"{s}{name}.weight"].read(), 0.3 * made + 0.7 * own, rtol=1e-4, atol=1e-5
        )
    for norm in (f"{s}input_layernorm", f"{s}post_attention_layernorm", "model.norm"):
        np.testing.assert_array_equal(view[f"{norm}.weight"].read() + plus, 1)
    table = (
        0.3 * theirs["model.embed_tokens.weight"] @ maps[3].forward + 0.7 * ours["model.embed_tokens.weight"]
    )
    np.testing.assert_allclose(view["model.embed_tokens.weight"].read(), table, rtol=1e-4, atol=1e-5)
    head = 0.3 * read(theirs["lm_head.weight"], "model.norm.weight", 5.0, maps[4])
    head += 0.7 * ours["lm_head.weight"] * (ours["model.norm.weight"] + plus)
    np.testing.assert_allclose(view["lm_head.weight"].read(), head, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen3", "qwen3.5"])
def test_a_layer_that_is_left_alone_stays_bit_for_bit(kind: str, case: Callable[..., Case]) -> None:
    found = case(kind)
    layers, ends = found.pair.merges()
    layers[0] = replace(layers[0], alpha=LayerAlpha(0.0, 1.0))
    view = merged_view(*found.pair.models, layers, replace(ends, head_alpha=0.0))
    stored = found.pair.student.checkpoint
    same = {name for name in stored if view[name] is stored[name]}
    first = {name.split("layers.0.")[1] for name in same if "layers.0." in name}
    assert "input_layernorm.weight" in first
    assert not any(name.startswith(("mlp.", "post_attention")) for name in first)
    assert len(first) == sum("layers.0." in name for name in stored) - 4
    assert {"lm_head.weight", "model.norm.weight"} <= same
    assert not any("layers.1." in name for name in same)
    assert found.error(view) <= EXACT


@pytest.mark.parametrize("kind", ["qwen3", "qwen3.5"])
def test_shares_by_group_touch_their_own_heads(kind: str, case: Callable[..., Case], tmp_path: Path) -> None:
    """One group of the first model, one of another: rows of q, k, v and columns of o, gains included."""
    found = case(kind)
    other = model_of(open_checkpoint(found.tiny.write(tmp_path / "other", "F32", seed=9)))
    layers, _ = found.pair.merges()
    number = next(n for n, merge in layers.items() if isinstance(merge.heads, HeadMap))
    shares = replace(layers[number], alpha=LayerAlpha([1.0, 0.0], 0.0))
    mixed = merged_view(found.pair.teacher, other, {number: shares})
    whole = merged_view(found.pair.teacher, other, {number: replace(shares, alpha=LayerAlpha(1.0, 0.0))})
    prefix = f"model.layers.{number}.self_attn."
    gain = other.ref(f"model.layers.{number}.input_layernorm.weight").read() + (kind == "qwen3.5")
    for name, axis in (("q_proj", 0), ("k_proj", 0), ("v_proj", 0), ("o_proj", 1)):
        views = (mixed, whole, other.view())
        got, teacher, own = (np.moveaxis(v[f"{prefix}{name}.weight"].read(), axis, 0) for v in views)
        own = own if name == "o_proj" else own * gain
        half = len(got) // 2
        np.testing.assert_array_equal(got[:half], teacher[:half])
        np.testing.assert_allclose(got[half:], own[half:], rtol=1e-6)
    norms = [view[f"{prefix}q_norm.weight"].read() for view in (mixed, whole, other.view())]
    np.testing.assert_allclose(norms[0], (norms[1] + norms[2]) / 2, rtol=1e-6)


def test_turned_values_are_turned_back(case: Callable[..., Case]) -> None:
    """Values in other axes do not matter at α = 1; to mix them they must be turned."""
    found = case("qwen3", turned=True)
    layers, ends = found.pair.merges()
    for n, merge in layers.items():
        layers[n] = replace(merge, heads=found.pair.heads(n, turn=True))
    assert found.error(merged_view(*found.pair.models, layers, ends)) <= EXACT
    half = {n: replace(merge, alpha=LayerAlpha(0.5, 0.5)) for n, merge in layers.items()}
    assert found.error(merged_view(*found.pair.models, half, ends)) > 1e-2
    for n, merge in half.items():
        assert isinstance(merge.heads, HeadMap)
        half[n] = replace(merge, heads=with_turned_values(merge.heads, found.pair.moments("mixer", n).ts))
    assert found.error(merged_view(*found.pair.models, half, ends)) <= EXACT


@pytest.mark.parametrize("kind", ["qwen3", "qwen3.5"])
def test_frozen_kv_keeps_the_students_keys_and_values(kind: str, case: Callable[..., Case]) -> None:
    found = case(kind)
    layers, ends = found.pair.merges()
    number = next(n for n, merge in layers.items() if isinstance(merge.heads, HeadMap))
    heads = layers[number].heads
    assert isinstance(heads, HeadMap)
    rotary = found.pair.student.arch.rotary_dim
    keys = np.stack([np.eye(heads.head_dim)] * heads.student.groups)  # both models' keys are the same
    layers[number] = replace(layers[number], heads=with_frozen_kv(heads, keys, rotary))
    view, base = merged_view(*found.pair.models, layers, ends), found.pair.student
    assert found.error(view) <= EXACT
    prefix = f"model.layers.{number}."
    gain = base.ref(f"{prefix}input_layernorm.weight").read() + (kind == "qwen3.5")
    for name in ("k_proj", "v_proj"):
        own = base.ref(f"{prefix}self_attn.{name}.weight").read() * gain
        np.testing.assert_allclose(view[f"{prefix}self_attn.{name}.weight"].read(), own, rtol=1e-6)


@pytest.mark.slow
def test_vision_stays_and_mtp_goes(case: Callable[..., Case]) -> None:
    found = case("qwen3.5-vision-tied-mtp")
    view, stored = found.merged(), found.pair.student.checkpoint
    assert found.error(view) <= EXACT
    assert {name for name in stored if name not in view} == {n for n in stored if n.startswith("mtp.")}
    assert view.config["text_config"]["mtp_num_hidden_layers"] == 0
    assert all(view[name] is stored[name] for name in stored if "visual" in name)


def test_a_merge_has_a_digest_of_its_own(case: Callable[..., Case]) -> None:
    found = case("qwen3")
    digests = [found.merged(alpha=alpha).source_digest for alpha in (1.0, 0.5, 0.5)]
    assert digests[1] == digests[2]
    assert len({*digests, found.pair.student.checkpoint.source_digest}) == 3


def test_rows_are_read_in_any_cut(case: Callable[..., Case]) -> None:
    view = case("qwen3").merged(alpha=0.3)
    for name in ("model.layers.0.mlp.down_proj.weight", "model.embed_tokens.weight", "model.norm.weight"):
        whole = view[name].read()
        parts = [view[name].read(start, min(start + 7, len(whole))) for start in range(0, len(whole), 7)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_what_does_not_fit_is_refused(case: Callable[..., Case], tmp_path: Path) -> None:
    dense, hybrid = case("qwen3"), case("qwen3.5")
    layers, ends = dense.pair.merges()
    mixed, _ = hybrid.pair.merges()
    with pytest.raises(BitsmithError, match="different kinds"):
        merged_view(dense.pair.teacher, hybrid.pair.student, {0: layers[0]})
    with pytest.raises(BitsmithError, match="different kinds"):
        merged_view(*hybrid.pair.models, {0: replace(mixed[0], teacher=mixed[1].teacher)})
    with pytest.raises(BitsmithError, match="there are 2 and 5"):
        merged_view(*dense.pair.models, {0: replace(layers[0], teacher=5)})
    with pytest.raises(BitsmithError, match="expected 1 or 2 of 0"):
        merged_view(*dense.pair.models, {0: replace(layers[0], alpha=LayerAlpha([1.0, 0.0, 1.0]))})
    with pytest.raises(BitsmithError, match="expected 0 … 1"):
        merged_view(*dense.pair.models, {}, replace(ends, head_alpha=1.5))
    flat = ResidualMap(ends.final.forward[:80], ends.final.backward[:80], "cut")
    for changed in ({"before": flat}, {"between": flat}, {"after": flat}):
        with pytest.raises(BitsmithError, match=r"the models call for \(96, 64\)"):
            merged_view(*dense.pair.models, {0: replace(layers[0], **changed)})
    with pytest.raises(BitsmithError, match=r"the models call for \(96, 64\)"):
        merged_view(*dense.pair.models, {}, replace(ends, final=flat))
    for order in (range(95), range(70, 166), range(-1, 95)):
        with pytest.raises(BitsmithError, match=r"layers\.0\.mlp\.gate_proj.*160 to 96"):
            merged_view(*dense.pair.models, {0: replace(layers[0], ffn=AxisMap.selecting(order))})
    with pytest.raises(BitsmithError, match="vocabulary has 72 tokens, the student's 80"):
        merged_view(dense.pair.teacher, _with_vocabulary(80, tmp_path / "other"), {}, ends)


def test_a_teacher_too_small_is_refused(case: Callable[..., Case], tmp_path: Path) -> None:
    folder, sizes = case("qwen3").folder, Sizes(96)
    for small, said in (
        (replace(sizes, hidden=48), "smaller"),
        (replace(sizes, layers=[0]), "in order"),
        (replace(sizes, ffn=80), "do not hold"),
        (replace(sizes, heads=2), "do not hold"),
        (replace(sizes, heads=9), "do not"),
    ):
        with pytest.raises(BitsmithError, match=said):
            embed_student(folder, tmp_path / "teacher", small)
    with pytest.raises(BitsmithError, match="gated"):
        embed_student(case("qwen3.5").folder, tmp_path / "teacher", sizes, turn_values=True)
    assert not (tmp_path / "teacher").exists()


def test_eight_bit_floats_are_read_with_their_scales(case: Callable[..., Case], tmp_path: Path) -> None:
    """A teacher in FP8 with a scale per 32 x 32 block merges as the same values in F32 do."""
    found = case("qwen3")
    stored = found.pair.teacher.checkpoint
    plain: dict[str, torch.Tensor] = {}
    packed: dict[str, torch.Tensor] = {}
    for name, array in arrays(stored).items():
        plain[name] = packed[name] = torch.from_numpy(array)
        if name.endswith("_proj.weight"):
            packed |= _eight_bits(name, plain[name])
            wide = packed[f"{name}_scale_inv"].repeat_interleave(32, 0).repeat_interleave(32, 1)
            rows, columns = plain[name].shape
            plain[name] = packed[name].float() * wide[:rows, :columns]
    settings = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [32, 32]}
    configs = stored.config, {**stored.config, "quantization_config": settings}
    views = []
    for folder, tensors, config in zip(("plain", "fp8"), (plain, packed), configs, strict=True):
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "model.safetensors")
        (tmp_path / folder / "config.json").write_text(json.dumps(config))
        teacher = model_of(open_checkpoint(tmp_path / folder))
        views.append(merged_view(teacher, found.pair.student, *found.pair.merges()))
    for name in views[0]:
        np.testing.assert_array_equal(views[0][name].read(), views[1][name].read())
    assert EXACT < found.error(views[1]) < 0.2


def _eight_bits(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    rows, columns = (-(-size // 32) for size in weight.shape)
    whole = torch.nn.functional.pad(weight, (0, 32 * columns - weight.shape[1], 0, 32 * rows - len(weight)))
    scales = whole.reshape(rows, 32, columns, 32).abs().amax((1, 3)) / 448
    wide = scales.clamp(min=1e-12).repeat_interleave(32, 0).repeat_interleave(32, 1)
    codes = (whole / wide).to(torch.float8_e4m3fn)[: len(weight), : weight.shape[1]]
    return {name: codes.contiguous(), f"{name}_scale_inv": scales}


def _with_vocabulary(tokens: int, folder: Path) -> Model:
    tiny = TINY["qwen3"]
    rows = {"model.embed_tokens.weight", "lm_head.weight"}
    data = [
        TensorData(name, "F32", array.shape, [array.astype(np.float32)])
        for name, whole in tiny.arrays().items()
        for array in [np.resize(whole, (tokens, whole.shape[1])) if name in rows else whole]
    ]
    write_safetensors(folder, data, {**tiny.config, "vocab_size": tokens})
    return model_of(open_checkpoint(folder))


@pytest.mark.slow
def test_a_trained_student_is_recovered(demo_model: Path, tmp_path: Path) -> None:
    """The bundled Qwen3.5 in a model half as wide again and twice as deep, on its own kind of text."""
    random = np.random.default_rng(5)
    fit, held = random.integers(0, 4096, (8, 128)), random.integers(0, 4096, (2, 64))
    sizes = Sizes(384, spread_layers(4, 8), ffn=1024, heads=12, kv_heads=3, k_heads=6, v_heads=18)
    embed_student(demo_model, tmp_path / "teacher", sizes)
    pair = Pair(tmp_path / "teacher", demo_model, fit)
    assert pair.layers == (1, 3, 5, 7)
    logits = seen(pair.student.checkpoint, held).logits
    found = seen(merged_view(*pair.models, *pair.merges()), held).logits
    assert np.abs(found - logits).max() <= 1e-4


def test_merges_of_per_layer_maps_agree_with_the_global_one(case: Callable[..., Case]) -> None:
    """Each layer's own moments give the same map here, so their transitions are identities."""
    found = case("qwen3")
    layers, _ = found.pair.merges()
    own = [tiered_map(found.pair.moments("states", n)) for n in range(3)]
    made: dict[int, LayerMerge] = {
        n: replace(merge, before=own[n], between=own[n], after=own[n + 1]) for n, merge in layers.items()
    }
    view = merged_view(*found.pair.models, made, EndsMerge(own[0], own[-1]))
    assert found.error(view) <= 10 * EXACT
