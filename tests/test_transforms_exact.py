"""Every transform, alone and composed, leaves the logits of whole models alone: to 1e-10 in float64.

Vectors are drawn at random and lie far from one, so that a factor or an index in the wrong place shows. An
error that does not shrink with precision is no rounding error and fails.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitsmith.formats import format_named
from bitsmith.passes import fold, rotate  # noqa: F401  (they register their transforms)
from bitsmith.passes.transform import (
    TRANSFORMS,
    Context,
    Model,
    model_of,
    transform_named,
    transformed,
    with_needs,
)
from bitsmith.store import open_checkpoint
from exact_forward import TINY, Outputs, Tiny, arrays, forward, random_vectors

STORED = {"float64": "F64", "float32": "F32"}
RESTRUCTURING = ("untie", "drop-mtp", "fold", "rotate")
ALL = (*RESTRUCTURING, *(name for name in TRANSFORMS if name not in RESTRUCTURING))
KEEPING = ("fold", *ALL[len(RESTRUCTURING) :])
"""What leaves tied heads and MTP layers in place."""

BF16_FACTOR = 3
FEW = ("qwen3-tied", "qwen3.5", "qwen3.5-vision-tied-mtp")
KINDS = [pytest.param(kind, marks=() if kind in FEW else pytest.mark.slow) for kind in TINY]


@dataclass(frozen=True)
class Source:
    """A tiny model as stored in one precision, and what it computes in it."""

    model: Model
    dtype: str
    outputs: Outputs


Made = Callable[[Tiny, str], Source]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Tiny models by shape and precision, each written and run once."""

    @cache
    def made(tiny: Tiny, dtype: str) -> Source:
        folder = tiny.write(tmp_path_factory.mktemp("exact") / dtype, STORED[dtype])
        model = model_of(open_checkpoint(folder))
        return Source(model, dtype, _outputs(model, dtype))

    return made


def _changed(model: Model, names: Sequence[str]) -> Model:
    """Return `model` with the named transforms, and those they need, under random vectors."""
    for transform in with_needs([transform_named(name) for name in names]):
        model = model.applying(transform, random_vectors(transform, model))
    return model


def _outputs(model: Model, dtype: str) -> Outputs:
    view = model.view()
    return forward(view.config, arrays(view), dtype)


def _error(source: Source, changed: Model) -> float:
    """Return the error of a changed model, which must have every output but that of a dropped MTP layer."""
    ours = _outputs(changed, source.dtype)
    dropped = any(applied.transform.name == "drop-mtp" for applied in changed.applied)
    assert (ours.image is None) == (source.outputs.image is None)
    assert (ours.mtp is None) == (source.outputs.mtp is None or dropped)
    return ours.error(source.outputs)


def _assert_exact(source: Made, tiny: Tiny, change: Callable[[Model], Model], at_most: float = 1e-5) -> None:
    wide, narrow = source(tiny, "float64"), source(tiny, "float32")
    errors = {made.dtype: _error(made, change(made.model)) for made in (wide, narrow)}
    assert errors["float64"] <= 1e-10, errors
    assert errors["float32"] <= at_most, errors
    assert 1e4 * errors["float64"] <= errors["float32"], errors


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ALL)
def test_a_transform_is_exact(name: str, kind: str, source: Made) -> None:
    _assert_exact(source, TINY[kind], lambda model: _changed(model, [name]))


@pytest.mark.parametrize("names", [ALL, KEEPING], ids=["all", "keeping"])
@pytest.mark.parametrize("kind", TINY)
def test_transforms_composed_are_exact(kind: str, names: Sequence[str], source: Made) -> None:
    _assert_exact(source, TINY[kind], lambda model: _changed(model, names))


@pytest.mark.parametrize("kind", KINDS)
def test_solved_transforms_are_exact(kind: str, source: Made) -> None:
    """As a plan has them: for Q4_0 in every matrix that it fits."""

    def change(model: Model) -> Model:
        specs = [spec for spec, _ in model.tensors.values() if spec.gguf_name and not spec.float_only]
        formats = {spec.name: format_named("Q4_0") for spec in specs if spec.shape[-1] % 32 == 0}
        return transformed(model, [transform_named(name) for name in ALL], Context(formats))

    _assert_exact(source, TINY[kind], change)


@pytest.mark.parametrize("names", [ALL, KEEPING], ids=["all", "keeping"])
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_errs_as_it_does_without_transforms(kind: str, names: Sequence[str], source: Made) -> None:
    """What rounding the matrices costs, norms kept as a GGUF keeps them: another error of the same size."""
    made = source(TINY[kind], "float64")
    before = _in_bfloat16(made.model).error(made.outputs)
    after = _in_bfloat16(_changed(made.model, names)).error(made.outputs)
    assert 1e-3 < before < 0.1
    assert 1e-4 < after < BF16_FACTOR * before


def _in_bfloat16(model: Model) -> Outputs:
    view = model.view()
    kept = {spec.name for spec, _ in model.tensors.values() if spec.float_only}
    weights = arrays(view)
    for name in weights.keys() - kept:
        weights[name] = torch.from_numpy(weights[name].copy()).bfloat16().double().numpy()
    return forward(view.config, weights)


@st.composite
def _shapes(draw: st.DrawFn) -> Tiny:
    pick = partial(_pick, draw)
    kv_heads, k_heads = pick(1, 2), pick(0, 1, 2)
    return Tiny(
        hidden=pick(64, 80, 96, 128),  # 80 = 20 x 4 and 96 = 12 x 8
        ffn=pick(96, 112, 160),
        heads=kv_heads * pick(1, 2, 3),
        kv_heads=kv_heads,
        head_dim=pick(8, 16, 24),
        k_heads=k_heads,
        v_heads=k_heads * pick(1, 2, 3),
        k_dim=pick(8, 12),
        v_dim=pick(8, 12),
        tied=pick(True, False),
        mtp=bool(k_heads) and pick(True, False),
        vision=bool(k_heads) and pick(True, False),
    )


def _pick(draw: st.DrawFn, *values: Any) -> Any:
    return draw(st.sampled_from(values))


@st.composite
def _orders(draw: st.DrawFn) -> list[str]:
    """Gauges and permutations in any order, the rotation with what it needs somewhere among them or not."""
    names: list[str] = draw(st.permutations(ALL[len(RESTRUCTURING) :]))
    if not draw(st.booleans()):
        return names
    at = draw(st.integers(0, len(names)))
    return [*names[:at], *RESTRUCTURING, *names[at:]]


@given(tiny=_shapes(), names=_orders())
@settings(max_examples=5, derandomize=True)
def test_any_shape_and_order_is_exact(tiny: Tiny, names: list[str], source: Made) -> None:
    _assert_exact(source, tiny, lambda model: _changed(model, names))


@pytest.mark.slow
@given(tiny=_shapes(), names=_orders())
@settings(max_examples=100)
def test_many_shapes_and_orders_are_exact(tiny: Tiny, names: list[str], source: Made) -> None:
    """Some draws are so ill-conditioned that float32 by itself comes near the limit."""
    own = source(tiny, "float32").outputs.error(source(tiny, "float64").outputs)
    _assert_exact(source, tiny, lambda model: _changed(model, names), at_most=max(1e-5, 5 * own))


def _instances(tiny: Tiny) -> dict[str, int]:
    """Return how many instances each transform has, counted from the shapes."""
    delta, attention = (2, 1 + tiny.mtp) if tiny.k_heads else (0, 2)
    layers, final = delta + attention, not (tiny.tied or tiny.mtp)
    return {
        "fold": 2 * layers + 2 * tiny.mtp + final,
        "scale-norm": 2 * layers + final,
        **dict.fromkeys(("untie", "drop-mtp"), 0),
        **dict.fromkeys(("rotate", "permute-residual"), 1),
        **dict.fromkeys(("scale-ffn", "permute-ffn"), layers),
        **dict.fromkeys(("scale-vo", "scale-qk", "permute-v"), attention),
        **dict.fromkeys(("scale-conv", "scale-delta", "permute-delta"), delta),
    }


@pytest.mark.parametrize("kind", TINY)
def test_a_transform_reaches_every_layer(kind: str, source: Made) -> None:
    model = source(TINY[kind], "float64").model
    found = {name: len(random_vectors(transform_named(name), model)) for name in ALL}
    assert found == _instances(TINY[kind])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ALL if name not in ("untie", "drop-mtp")])
@pytest.mark.parametrize(
    "kind", ["qwen3.5-vision-tied-mtp", pytest.param("qwen3.5-vision", marks=pytest.mark.slow)]
)
def test_every_step_of_a_transform_is_needed(name: str, kind: str, source: Made) -> None:
    """Without the step of any one role some logits are wrong: of text, with an image or of the MTP layer."""
    made, transform = source(TINY[kind], "float64"), transform_named(name)
    model = _changed(made.model, transform.needs)
    steps = transform.steps(model, random_vectors(transform, model))
    by_role = {f"{model.spec(one).role} {len(model.spec(one).shape)}": one for one in steps}
    for role, left_out in by_role.items():
        rest = {one: step for one, step in steps.items() if one != left_out}
        assert _outputs(model.with_steps(rest), "float64").error(made.outputs) > 1e-3, role


@pytest.mark.parametrize("names", [ALL, KEEPING], ids=["all", "keeping"])
@pytest.mark.parametrize("kind", KINDS)
def test_exported_tensors_lead_back_to_the_stored_ones(kind: str, names: Sequence[str], source: Made) -> None:
    """In float32, as a GGUF holds them; rows are the same read alone or together."""
    model = _changed(source(TINY[kind], "float32").model, names)
    for spec, ref in model.tensors.values():
        if spec.gguf_name is None:
            continue
        exported, stored = spec.to_gguf(ref), ref.read()
        whole, last = exported.read(), exported.n_rows
        assert exported.shape == whole.shape == spec.gguf_shape
        np.testing.assert_array_equal(exported.read(last // 3, last // 2), whole[last // 3 : last // 2])
        back = spec.from_gguf(exported).read()
        np.testing.assert_allclose(
            back, stored, rtol=1e-6, atol=1e-6 * np.abs(stored).max(), err_msg=spec.name
        )
