"""Gauges and permutations: their steps are what they say, and solving lowers the error of rounding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bitsmith.archs.steps import ScaleColumns
from bitsmith.errors import BitsmithError
from bitsmith.formats import format_named
from bitsmith.passes.axes import Heads
from bitsmith.passes.column_trial import ColumnTrial
from bitsmith.passes.permute import Permute
from bitsmith.passes.rescale import Gauge, balance
from bitsmith.passes.transform import TRANSFORMS, Context, Model, Transform, model_of, transform_named
from bitsmith.passes.trial import output_errors
from bitsmith.store.safetensors import open_safetensors
from bitsmith.store.statistics import SiteSpec, SiteStatistics, Statistics, site_widths
from exact_forward import HYBRID, TINY, forward

GAUGES = sorted(name for name, kind in TRANSFORMS.items() if issubclass(kind, Gauge))
PERMUTATIONS = sorted(name for name, kind in TRANSFORMS.items() if issubclass(kind, Permute))


def random_vectors(transform: Transform, model: Model, seed: int = 0) -> dict[str, np.ndarray]:
    """Return random scales or orders for every instance."""
    random = np.random.default_rng(seed)
    found: dict[str, np.ndarray] = {}
    if isinstance(transform, Permute):
        for instance, (groups, size) in transform.sizes(model).items():
            orders = [group * size + random.permutation(size) for group in range(groups)]
            found[instance] = np.concatenate(orders)
    elif isinstance(transform, Gauge):
        for instance, sides in transform.sides(model).items():
            count = int(sides[0].channels.max()) + 1
            scales = np.exp(random.normal(size=count)) * random.choice([-1, 1], count)
            if (partners := transform.partners(model, instance)) is not None:
                scales = scales * scales[partners]
            found[instance] = scales
    return found


@pytest.fixture(scope="module", params=["qwen3", "qwen3.5-tied", "qwen3.5-vision-tied-mtp"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Tiny random models in float64: dense, hybrid, and with everything that a checkpoint may hold."""
    folder = tmp_path_factory.mktemp("gauges") / request.param
    return model_of(open_safetensors(TINY[request.param].write(folder)))


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A random Qwen3.5 with rows of whole K-quant blocks and more V than K heads."""
    tiny = replace(HYBRID, hidden=256, ffn=512, heads=4, kv_heads=2, head_dim=64, v_dim=64)
    return model_of(open_safetensors(tiny.write(tmp_path_factory.mktemp("gauges") / "wide", "F32")))


def arrays_of(model: Model) -> dict[str, np.ndarray]:
    """Return every transformed tensor, read whole."""
    return {name: model.ref(name).read() for name in model.tensors}


def test_all_together_leave_the_logits(model: Model) -> None:
    changed = model
    for seed, name in enumerate([*GAUGES, *PERMUTATIONS]):
        transform = transform_named(name)
        changed = changed.applying(transform, random_vectors(transform, changed, seed))
    reference = forward(model.checkpoint.config, arrays_of(model))
    assert forward(changed.view().config, arrays_of(changed)).error(reference) <= 1e-12


@pytest.mark.parametrize("name", [*GAUGES, *PERMUTATIONS])
def test_gguf_leads_back_to_the_source(model: Model, name: str) -> None:
    transform = transform_named(name)
    changed = model.applying(transform, random_vectors(transform, model))
    for spec, ref in changed.tensors.values():
        # the export adds 1 to norms and takes exponentials in float32; undoing a scale then magnifies that
        rtol, atol = (1e-6, 1e-4) if spec.float_only else (1e-14, 0)
        back = spec.from_gguf(spec.to_gguf(ref)).read()
        np.testing.assert_allclose(back, ref.read(), rtol=rtol, atol=atol, err_msg=spec.name)


def test_scales_do_what_they_say(hybrid: Model) -> None:
    layer = "model.layers.1."
    kv, dim = 2, 64
    scales = np.linspace(0.5, 2, kv * dim)
    changed = hybrid.applying(transform_named("scale-vo"), {"layers.1": scales})
    o = hybrid.ref(f"{layer}self_attn.o_proj.weight").read()
    by_head = o.reshape(len(o), kv, 2, dim) / scales.reshape(kv, 1, dim)
    np.testing.assert_allclose(
        changed.ref(f"{layer}self_attn.o_proj.weight").read(), by_head.reshape(o.shape), rtol=1e-6
    )
    v = hybrid.ref(f"{layer}self_attn.v_proj.weight").read()
    np.testing.assert_allclose(
        changed.ref(f"{layer}self_attn.v_proj.weight").read(), v * scales[:, None], rtol=1e-6
    )
    assert changed.ref(f"{layer}self_attn.q_proj.weight").read().tobytes() == (
        hybrid.ref(f"{layer}self_attn.q_proj.weight").read().tobytes()
    )


def test_norm_scales_reach_every_reader(hybrid: Model) -> None:
    sides = transform_named("scale-norm").sides(hybrid)
    named = {norm: {side.spec.role for side in found} for norm, found in sides.items()}
    assert named["model.layers.0.input_layernorm.weight"] == {
        "norm.mixer", "delta.in_qkv", "delta.in_z", "delta.in_b", "delta.in_a",
    }  # fmt: skip
    assert named["model.layers.1.input_layernorm.weight"] == {"norm.mixer", "attn.q", "attn.k", "attn.v"}
    assert named["model.layers.1.post_attention_layernorm.weight"] == {"norm.ffn", "ffn.gate", "ffn.up"}
    assert named["model.norm.weight"] == {"norm.final", "head"}


def test_final_norm_is_left_where_others_read_it(model: Model) -> None:
    found = transform_named("scale-norm").sides(model)
    alone = not model.arch.tied and not any(name.startswith("mtp.") for name in model.tensors)
    assert any(name.endswith("model.norm.weight") for name in found) == alone


def test_rope_pairs_scale_alike(hybrid: Model) -> None:
    scales = np.ones(64)
    scales[3] = 2.0
    with pytest.raises(BitsmithError, match="RoPE"):
        hybrid.applying(transform_named("scale-qk"), {"layers.1": scales})
    scales[3 + 8] = 2.0  # a quarter of 64 channels turns, in pairs 8 apart
    hybrid.applying(transform_named("scale-qk"), {"layers.1": scales})


@pytest.mark.parametrize(
    ("name", "vectors", "match"),
    [
        ("scale-ffn", {"layers.9": np.ones(512)}, "has no layers.9"),
        ("scale-ffn", {"layers.0": np.ones(511)}, "expected 512"),
        ("scale-ffn", {"layers.0": np.zeros(512)}, "none zero"),
        ("scale-ffn", {"layers.0": np.full(512, np.nan)}, "finite"),
        ("permute-ffn", {"layers.0": np.zeros(512, int)}, "no order"),
        ("permute-ffn", {"layers.0": np.arange(511)}, "no order"),
        ("permute-v", {"layers.1": np.roll(np.arange(128), 1)}, "within their groups"),
        ("permute-residual", {"layers.1": np.arange(256)}, "has no layers.1"),
    ],
)
def test_unsound_vectors_are_refused(
    hybrid: Model, name: str, vectors: dict[str, np.ndarray], match: str
) -> None:
    with pytest.raises(BitsmithError, match=match):
        hybrid.applying(transform_named(name), vectors)


def test_unknown_order_is_refused() -> None:
    with pytest.raises(BitsmithError, match="by is size, expected best, moment"):
        transform_named("permute-ffn", {"by": "size"})


def test_residual_order_reaches_every_tensor_of_its_width(tmp_path: Path) -> None:
    tiny = replace(TINY["qwen3.5-vision-tied-mtp"], hidden=88)  # a width that nothing else has
    model = model_of(open_safetensors(tiny.write(tmp_path)))
    steps = transform_named("permute-residual").steps(model, {"residual": np.arange(88)[::-1]})
    wide = {name for name, (spec, _) in model.tensors.items() if {88, 176} & set(spec.shape)}
    assert set(steps) == wide
    assert "model.visual.merger.linear_fc2.bias" in wide
    assert "mtp.fc.weight" in wide


class Known(Statistics):
    """Statistics of random inputs in memory: channels of very different size, those first largest."""

    def __init__(self, model: Model, seed: int = 0) -> None:
        specs = [spec for spec, _ in model.tensors.values()]
        super().__init__(Path("random"), specs, False)
        random = np.random.default_rng(seed)
        self._known = {site: self._random(site, width, random) for site, width in site_widths(specs).items()}

    @staticmethod
    def _random(site: str, width: int, random: np.random.Generator) -> SiteStatistics:
        size = -np.sort(-random.lognormal(0, 1, width))
        fit, held = np.split((random.normal(size=(192, width)) * size).astype(np.float32), [160])
        moment = fit.T @ fit / np.float32(len(fit))
        return SiteStatistics(site, len(fit), np.diag(moment).copy(), moment=moment, held=held)

    def knows(self, spec: SiteSpec) -> bool:
        return self._site(spec) in self._known

    def _load(self, site: str) -> SiteStatistics | None:
        return self._known.get(site)


def context_of(model: Model, form: str = "Q2_K", *, known: bool = True) -> Context:
    """Return a format for every matrix of whole blocks, with statistics of its inputs."""
    formats = {
        spec.name: format_named(form)
        for spec, _ in model.tensors.values()
        if len(spec.shape) == 2 and not spec.float_only and spec.shape[-1] % 256 == 0
    }
    return Context(formats, Known(model) if known else None)


@pytest.fixture(scope="module")
def uneven(hybrid: Model) -> Model:
    """A Qwen3.5 of which every eighth ffn, value and residual channel is 30 times as large as it need be."""
    model = hybrid
    for name in SOLVED:
        gauge = transform_named(name)
        sizes = {instance: len(one) for instance, one in random_vectors(gauge, model).items()}
        model = model.applying(gauge, {key: _every_eighth(size) for key, size in sizes.items()})
    return model


def _every_eighth(count: int) -> np.ndarray:
    return np.where(np.arange(count) % 8 == 3, 30.0, 1.0)


def fit_error(model: Model, context: Context) -> float:
    """Return the error that solving goes by, over all matrices."""
    matrices = [(name, np.arange(model.spec(name).shape[1])) for name in context.formats]
    return float(sum(one.errors().sum() for one in ColumnTrial.of(model, matrices, context)))


SOLVED = ("scale-ffn", "scale-vo", "scale-delta", "scale-norm")


@pytest.mark.parametrize("name", SOLVED)
def test_scales_undo_uneven_columns(uneven: Model, name: str) -> None:
    context = context_of(uneven, "Q4_K")
    gauge = transform_named(name)
    vectors = gauge.vectors(uneven, context)
    assert len(vectors) == len(random_vectors(gauge, uneven))
    names = _with_changed_columns(gauge, uneven, vectors)
    only = replace(context, formats={key: context.formats[key] for key in names})
    before = fit_error(uneven, only)
    assert fit_error(uneven.applying(gauge, vectors), only) < 0.7 * before


@pytest.mark.parametrize("name", [*SOLVED, *PERMUTATIONS])
@pytest.mark.parametrize("form", ["Q2_K", "Q4_K"])
def test_solving_never_raises_the_error(hybrid: Model, name: str, form: str) -> None:
    context = context_of(hybrid, form)
    transform = transform_named(name)
    changed = hybrid.applying(transform, transform.vectors(hybrid, context))
    assert fit_error(changed, context) <= fit_error(hybrid, context) * (1 + 1e-6)


def test_without_statistics_columns_count_alike(hybrid: Model) -> None:
    context = context_of(hybrid, "Q4_K", known=False)
    scales = transform_named("scale-vo").vectors(uneven_v(hybrid), context)["layers.1"]
    channels = Heads(4, 2, 64).channels()
    name = "model.layers.1.self_attn.o_proj.weight"
    (trial,) = ColumnTrial.of(uneven_v(hybrid), [(name, channels)], context)
    assert trial.scaled(1 / scales[channels]).sum() < 0.98 * trial.errors().sum()


@pytest.mark.parametrize("known", [True, False])
def test_what_is_rounded_without_error_stays(hybrid: Model, known: bool) -> None:
    downs = [spec.name for spec in hybrid.having("ffn.down")]
    model = hybrid.with_steps({name: ScaleColumns(np.zeros(512)) for name in downs})
    context = context_of(model, known=known)
    assert transform_named("scale-ffn").vectors(model, context) == {}
    assert transform_named("permute-ffn").vectors(model, context) == {}


@pytest.mark.parametrize("name", ["scale-conv", "scale-qk"])
def test_scales_of_no_rounded_columns_are_left_out(uneven: Model, name: str) -> None:
    assert transform_named(name).vectors(uneven, context_of(uneven)) == {}
    assert transform_named(name).vectors(uneven, Context())


def test_scales_of_float_tensors_are_left_out(uneven: Model) -> None:
    formats = {name: format_named("F32") for name in context_of(uneven).formats}
    assert all(transform_named(name).vectors(uneven, Context(formats)) == {} for name in SOLVED)


@pytest.mark.parametrize("name", GAUGES)
def test_without_formats_both_sides_are_balanced(hybrid: Model, name: str) -> None:
    gauge = transform_named(name)
    assert isinstance(gauge, Gauge)
    changed = hybrid.applying(gauge, gauge.vectors(hybrid, Context()))
    for instance, sides in gauge.sides(changed).items():
        again = balance(changed, sides, gauge.partners(changed, instance))
        np.testing.assert_allclose(again, 1, rtol=1e-4)


def test_channels_that_are_dead_keep_their_scale(hybrid: Model) -> None:
    down = "model.layers.0.mlp.down_proj.weight"
    dead = hybrid.with_steps({down: ScaleColumns(np.where(np.arange(512) < 7, 0.0, _every_eighth(512)))})
    scales = transform_named("scale-ffn").vectors(dead, context_of(dead, "Q4_K"))["layers.0"]
    assert (scales[:7] == 1).all()
    assert (scales[7:] != 1).any()
    assert 1 / 64 <= scales.min() <= scales.max() <= 64


def test_spread_sensitivity_beats_sorted(hybrid: Model) -> None:
    context = context_of(hybrid)  # sensitive channels come first
    permute = transform_named("permute-ffn")
    vectors = permute.vectors(hybrid, context)
    assert len(vectors) == 3
    names = _with_changed_columns(permute, hybrid, vectors)
    only = replace(context, formats={key: context.formats[key] for key in names})
    assert fit_error(hybrid.applying(permute, vectors), only) < 0.9 * fit_error(hybrid, only)


@pytest.mark.parametrize("by", ["moment", "scale", "both", "spread"])
def test_orders_stay_within_heads(hybrid: Model, by: str) -> None:
    order = transform_named("permute-v", {"by": by}).vectors(uneven_v(hybrid), context_of(hybrid))["layers.1"]
    assert (np.sort(order.reshape(2, 64)) == np.arange(128).reshape(2, 64)).all()


def uneven_v(model: Model) -> Model:
    return model.applying(transform_named("scale-vo"), {"layers.1": 1 + np.arange(128.0) % 5})


def test_orders_sort_by_what_they_say(hybrid: Model) -> None:
    down = "model.layers.0.mlp.down_proj.weight"
    model = hybrid.with_steps({down: ScaleColumns(np.geomspace(0.01, 1, 512))})
    context = context_of(model)
    by_scale = transform_named("permute-ffn", {"by": "scale"}).vectors(model, context)["layers.0"]
    rms = np.sqrt(np.mean(model.ref(down).read() ** 2, axis=0))[by_scale]
    assert (np.diff(rms) <= 0).all()
    by_moment = transform_named("permute-ffn", {"by": "moment"}).vectors(model, context)["layers.0"]
    statistics = context.statistics
    assert statistics is not None
    found = statistics.of(model.spec(down))
    assert found is not None
    assert (np.diff(found.importance[by_moment]) <= 0).all()
    unknown = replace(context, statistics=None)
    fallback = transform_named("permute-ffn", {"by": "moment"}).vectors(model, unknown)["layers.0"]
    assert (fallback == by_scale).all()


@pytest.mark.parametrize("name", [*SOLVED, *PERMUTATIONS])
def test_statistics_follow(hybrid: Model, name: str) -> None:
    transform, statistics = transform_named(name), Known(hybrid)
    vectors = random_vectors(transform, hybrid)
    changed = hybrid.applying(transform, vectors)
    names = _with_changed_columns(transform, hybrid, vectors)
    assert names
    for tensor in names:
        before, after = (_outputs(one, tensor, statistics) for one in (hybrid, changed))
        if before is not None and after is not None:
            np.testing.assert_allclose(after, before, atol=1e-5 * np.abs(before).max(), err_msg=tensor)


def _outputs(model: Model, name: str, statistics: Statistics) -> np.ndarray | None:
    spec, ref = model.tensors[name]
    found = statistics.of(spec)
    return None if found is None or found.held is None else found.held @ spec.to_gguf(ref).read().T


def _with_changed_columns(transform: Transform, model: Model, vectors: Mapping[str, np.ndarray]) -> list[str]:
    return [name for name, step in transform.steps(model, vectors).items() if step.changes_columns]


def test_trials_measure_what_they_say(hybrid: Model) -> None:
    name = "model.layers.0.linear_attn.out_proj.weight"
    context = context_of(hybrid)
    spec, ref = hybrid.tensors[name]
    assert context.statistics is not None
    inputs = context.statistics.of(spec)
    assert inputs is not None
    assert inputs.held is not None
    assert inputs.moment is not None
    rows = spec.to_gguf(ref).read()
    form = context.formats[name]
    errors = rows - form.decode(form.encode(rows, inputs.importance))
    held = output_errors(hybrid, [name], context)[name]
    assert (held.measure, held.rows) == ("held", 256)
    assert held.token_errors is not None
    np.testing.assert_allclose(held.token_errors, np.square(inputs.held @ errors.T).sum(axis=1), rtol=1e-4)
    fit = output_errors(hybrid, [name], context, split="fit")[name]
    expected = [np.einsum("ij,jk,ik->", part, inputs.moment, part) for part in (errors, rows)]
    assert fit.measure == "moment"
    assert fit.error == pytest.approx(expected[0] / expected[1], rel=1e-3)
    plain = output_errors(hybrid, [name], replace(context, statistics=None))[name]
    nearest = rows - form.decode(form.encode(rows))
    assert plain.measure == "plain"
    assert plain.error == pytest.approx(np.square(nearest).sum() / np.square(rows).sum(), rel=1e-3)
    feedback = output_errors(hybrid, [name], context, split="fit", rounder="gptq")[name]
    assert feedback.error < fit.error
    few = output_errors(hybrid, [name], context, sample_rows=40)[name]
    assert few.rows == 32


def test_trials_leave_out_what_is_not_rounded(hybrid: Model) -> None:
    names = list(hybrid.tensors)
    assert set(output_errors(hybrid, names, context_of(hybrid), rounder="nearest")) == set(
        context_of(hybrid).formats
    )
    assert output_errors(hybrid, names, context_of(hybrid, "F32")) == {}
    with pytest.raises(BitsmithError, match="unknown rounder 'best'"):
        output_errors(hybrid, names, context_of(hybrid), rounder="best")
