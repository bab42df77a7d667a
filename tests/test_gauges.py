"""Gauges and permutations: their steps are what they say, and solving lowers the error of rounding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bitsmith.errors import BitsmithError
from bitsmith.passes.permute import Permute
from bitsmith.passes.rescale import Gauge
from bitsmith.passes.transform import TRANSFORMS, Model, Transform, model_of, transform_named
from bitsmith.store.safetensors import open_safetensors
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
