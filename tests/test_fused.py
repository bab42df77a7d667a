"""Lean forwards of layers against transformers' own in float64, for shapes that are not round."""

import gc
import weakref
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer

from bitsmith.numerics.exponential import decay, silu
from bitsmith.numerics.threads import one_blas_thread
from bitsmith.run.differentiable import differentiable
from bitsmith.run.fused import fused

F32, F64 = torch.float32, torch.float64


def _layer(k_heads: int, v_heads: int, dk: int, dv: int) -> torch.nn.Module:
    torch.manual_seed(k_heads * v_heads + dk)
    config = Qwen3_5TextConfig(
        hidden_size=96,
        intermediate_size=130,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_key_heads=k_heads,
        linear_num_value_heads=v_heads,
        linear_key_head_dim=dk,
        linear_value_head_dim=dv,
    )
    layer = Qwen3_5DecoderLayer(config, 0).eval().requires_grad_(False)
    for name, weight in layer.named_parameters():
        if name.endswith(("norm.weight", "dt_bias", "A_log")):
            weight.normal_(0.5, 1.0)
        else:
            weight.normal_(0.0, 3 / np.sqrt(weight[0].numel()))
    return layer


def _run(layer: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode(), one_blas_thread():
        return layer(hidden, position_embeddings=None, attention_mask=None)


@pytest.mark.parametrize(
    ("tokens", "shape"), [(1, (2, 2, 16, 16)), (64, (2, 4, 32, 16)), (147, (1, 3, 16, 48))]
)
def test_a_lean_layer_is_as_close_to_float64_as_transformers_own(tokens: int, shape: tuple[int, ...]) -> None:
    layer, hidden = _layer(*shape), torch.randn(2, tokens, 96)
    own, exact = _run(layer, hidden), _run(_layer(*shape).double(), hidden.double())
    found = _run(fused(layer), hidden)
    largest = exact.abs().max()
    assert (exact - hidden).abs().max() > 0.3 * largest
    assert (found - exact).abs().max() <= max(2 * (own - exact).abs().max(), 1e-6 * largest)


@pytest.mark.parametrize(
    ("tokens", "shape"), [(1, (2, 2, 16, 16)), (64, (2, 4, 32, 16)), (147, (1, 3, 16, 48))]
)
def test_gradients_are_as_close_to_float64_as_transformers_own(tokens: int, shape: tuple[int, ...]) -> None:
    hidden, after = torch.randn(2, 1, tokens, 96)
    own, exact = (_gradient(_layer(*shape).to(of), hidden.to(of), after.to(of)) for of in (F32, F64))
    found = _gradient(differentiable(_layer(*shape)), hidden, after)
    largest = exact.abs().max()
    assert (exact - after).abs().max() > 0.1 * largest
    assert (found - exact).abs().max() <= max(2 * (own - exact).abs().max(), 1e-6 * largest)


def _gradient(layer: torch.nn.Module, hidden: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    leaf = hidden.clone().requires_grad_()
    with one_blas_thread():
        layer(leaf, position_embeddings=None, attention_mask=None).backward(after)
    return leaf.grad


def test_hooks_see_the_inputs_of_every_matrix() -> None:
    layer, hidden, seen = _layer(2, 4, 32, 16), torch.randn(1, 70, 96), []
    names = [name for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)]
    assert len(names) == 8
    for name in names:
        layer.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: seen.append((name, inputs[0].clone()))
        )
    _run(layer, hidden)
    _run(fused(layer), hidden)
    own, lean = dict(seen[:8]), dict(seen[8:])
    assert lean.keys() == set(names)
    for name in names:
        torch.testing.assert_close(lean[name], own[name], rtol=1e-3, atol=1e-4)


def test_a_lean_layer_goes_with_its_last_name() -> None:
    layer = fused(_layer(2, 4, 32, 16))
    gone = weakref.ref(layer.linear_attn)
    gc.disable()
    try:
        del layer
        assert gone() is None
    finally:
        gc.enable()


def test_exponentials() -> None:
    x = np.concatenate([np.linspace(-700, 0, 701), [-1e-300, -0.0]])
    np.testing.assert_allclose([decay(v) for v in x], np.exp(x), rtol=5e-16)
    assert decay(-1e6) < 1e-300
    assert np.isnan(decay(np.nan))
    y = np.linspace(-80, 80, 641).astype(np.float32)
    exact = y.astype(np.float64) / (1 + np.exp(-y.astype(np.float64)))
    np.testing.assert_allclose([silu(v) for v in y], exact, rtol=6e-7)
    assert np.isnan(silu(np.float32(np.nan)))
    assert all(silu(a) <= silu(b) + 1e-6 for a, b in pairwise(y[y > 0]))
