"""Which symmetries of the SBGQ seed hold, in float64: each wrong one beside the exact one that it resembles.

An exact change of the weights leaves the logits within 1e-10 of their largest; the wrong ones miss that by
orders of magnitude, whatever the precision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest

from exact_forward import DENSE, HYBRID, Tiny, forward

Arrays = dict[str, np.ndarray]
Edit = Callable[[Tiny, Arrays, np.random.Generator], None]

EXACT = 1e-10
DELTA, ATTENTION = "model.layers.0.linear_attn.", "model.layers.1.self_attn."


def _error(model: Tiny, edit: Edit, dtype: str = "float64") -> float:
    before = model.arrays()
    after = {name: array.copy() for name, array in before.items()}
    edit(model, after, np.random.default_rng(1))
    assert any((after[name] != before[name]).any() for name in before)
    return forward(model.config, after, dtype).error(forward(model.config, before, dtype))


def _scale(random: np.random.Generator, *shape: int) -> np.ndarray:
    return random.lognormal(0, 1, shape)


def _rows(arrays: Arrays, name: str, rows: slice | np.ndarray, scale: np.ndarray) -> None:
    weight = arrays[f"{name}.weight"]
    weight[rows] *= scale.reshape(-1, *(1,) * (weight.ndim - 1))


def _columns(arrays: Arrays, name: str, scale: np.ndarray) -> None:
    arrays[f"{name}.weight"] *= scale


def _value_rows(model: Tiny) -> slice:
    """Rows of in_proj_qkv and channels of conv1d that make v."""
    start = 2 * model.k_heads * model.k_dim
    return slice(start, start + model.v_heads * model.v_dim)


def _query_rows(model: Tiny, part: int = 0) -> np.ndarray:
    """Rows of q_proj that make q (`part` 0) or the gate (1): per head, head_dim of each."""
    blocks = np.arange(2 * model.heads * model.head_dim).reshape(model.heads, 2, model.head_dim)
    return blocks[:, part].reshape(-1)


def _per_q_head(model: Tiny, per_kv_channel: np.ndarray) -> np.ndarray:
    """Return what the columns of o_proj see of a vector over the channels of v."""
    heads = per_kv_channel.reshape(model.kv_heads, model.head_dim)
    return heads.repeat(model.heads // model.kv_heads, axis=0).reshape(-1)


def _ffn(scaled: str) -> Edit:
    def edit(model: Tiny, arrays: Arrays, random: np.random.Generator) -> None:
        scale = _scale(random, model.ffn)
        _rows(arrays, f"model.layers.0.mlp.{scaled}_proj", slice(None), scale)
        _columns(arrays, "model.layers.0.mlp.down_proj", 1 / scale)

    return edit


def _delta_values(per_head: bool) -> Edit:
    """v rows against the columns of out_proj, as the seed has it: past SiLU and the gated norm."""

    def edit(model: Tiny, arrays: Arrays, random: np.random.Generator) -> None:
        scale = _scale(random, model.v_heads, 1 if per_head else model.v_dim)
        scale = np.broadcast_to(scale, (model.v_heads, model.v_dim)).reshape(-1)
        _rows(arrays, f"{DELTA}in_proj_qkv", _value_rows(model), scale)
        _columns(arrays, f"{DELTA}out_proj", 1 / scale)

    return edit


def _conv(model: Tiny, arrays: Arrays, random: np.random.Generator) -> None:
    """All rows of in_proj_qkv against their channels of conv1d, of any sign."""
    channels = len(arrays[f"{DELTA}conv1d.weight"])
    scale = _scale(random, channels) * random.choice([-1.0, 1.0], channels)
    _rows(arrays, f"{DELTA}in_proj_qkv", slice(None), scale)
    _rows(arrays, f"{DELTA}conv1d", slice(None), 1 / scale)


def _delta_norm(model: Tiny, arrays: Arrays, random: np.random.Generator) -> None:
    """The gated norm's weight, one for all heads, against the columns of out_proj."""
    scale = _scale(random, model.v_dim) * random.choice([-1.0, 1.0], model.v_dim)
    arrays[f"{DELTA}norm.weight"] *= scale
    _columns(arrays, f"{DELTA}out_proj", np.tile(1 / scale, model.v_heads))


def _beta_values(model: Tiny, arrays: Arrays, random: np.random.Generator) -> None:
    """β against v, per head, with β scaled before its sigmoid."""
    scale = _scale(random, model.v_heads)
    _rows(arrays, f"{DELTA}in_proj_b", slice(None), scale)
    _rows(arrays, f"{DELTA}in_proj_qkv", _value_rows(model), (1 / scale).repeat(model.v_dim))


def _delta_query_key(model: Tiny, arrays: Arrays, random: np.random.Generator) -> None:
    """Rows of q and k scaled per head before the l2 norm that comes after SiLU."""
    scale = _scale(random, 2 * model.k_heads).repeat(model.k_dim)
    _rows(arrays, f"{DELTA}in_proj_qkv", slice(0, len(scale)), scale)


def _attention_values(model: Tiny, arrays: Arrays, random: np.random.Generator) -> None:
    """v channels against the columns of o_proj of every query head that reads them."""
    scale = _scale(random, model.kv_heads * model.head_dim)
    scale *= random.choice([-1.0, 1.0], len(scale))
    _rows(arrays, f"{ATTENTION}v_proj", slice(None), scale)
    _columns(arrays, f"{ATTENTION}o_proj", 1 / _per_q_head(model, scale))


def _attention_rotation(model: Tiny, arrays: Arrays, random: np.random.Generator) -> None:
    """v channels rotated within each head, and the columns of o_proj back."""
    size = model.head_dim
    turns = [np.linalg.qr(random.standard_normal((size, size)))[0] for _ in range(model.kv_heads)]
    value, output = f"{ATTENTION}v_proj.weight", f"{ATTENTION}o_proj.weight"
    arrays[value] = np.concatenate(
        [turn @ arrays[value][n * size : (n + 1) * size] for n, turn in enumerate(turns)]
    )
    for head in range(model.heads):
        turn = turns[head * model.kv_heads // model.heads]
        arrays[output][:, head * size : (head + 1) * size] @= turn.T


def _gate_rows(model: Tiny, arrays: Arrays, random: np.random.Generator) -> None:
    """The gate rows of q_proj alone against the columns of o_proj."""
    scale = _scale(random, model.heads * model.head_dim)
    _rows(arrays, f"{ATTENTION}q_proj", _query_rows(model, 1), scale)
    _columns(arrays, f"{ATTENTION}o_proj", 1 / scale)


def _query_key_norms(model: Tiny, arrays: Arrays, random: np.random.Generator) -> None:
    """q_norm against k_norm, one factor for both channels of each rotary pair."""
    rotary = max(2, model.head_dim // 4) if model.k_heads else model.head_dim
    scale = _scale(random, model.head_dim)
    scale[:rotary] = np.tile(scale[: rotary // 2], 2)
    for name, factor in (("q_norm", scale), ("k_norm", 1 / scale)):
        weight, offset = arrays[f"{ATTENTION}{name}.weight"], bool(model.k_heads)
        weight[...] = (weight + offset) * factor - offset


def _query_key_rows(model: Tiny, arrays: Arrays, random: np.random.Generator) -> None:
    """Rows of q and k scaled per head, which the norms behind them undo but for their epsilon."""
    for name, heads in (("q_proj", model.heads), ("k_proj", model.kv_heads)):
        rows = _query_rows(model) if name == "q_proj" and model.k_heads else slice(None)
        _rows(arrays, f"{ATTENTION}{name}", rows, _scale(random, heads).repeat(model.head_dim))


WRONG: Mapping[str, tuple[Edit, Edit, Tiny]] = {
    "gate-scale": (_ffn("gate"), _ffn("up"), HYBRID),
    "delta-v-channels": (_delta_values(per_head=False), _delta_norm, HYBRID),
    "delta-v-heads": (_delta_values(per_head=True), _delta_norm, HYBRID),
    "beta-v": (_beta_values, _conv, HYBRID),
    "delta-qk-rows": (_delta_query_key, _conv, HYBRID),
    "gated-vo-rotation": (_attention_rotation, _attention_rotation, DENSE),
    "attention-gate-rows": (_gate_rows, _attention_values, HYBRID),
}
"""The wrong edit of a Qwen3.5, the exact one beside it, and the model on which that one is exact."""


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_symmetry_shows_beside_the_exact_one(name: str) -> None:
    wrong, exact, exact_model = WRONG[name]
    assert _error(HYBRID, wrong) > 0.1
    assert 0 < _error(exact_model, exact) <= EXACT


@pytest.mark.parametrize("model", [DENSE, HYBRID], ids=["qwen3", "qwen3.5"])
def test_row_scales_of_q_and_k_leave_an_error_that_float64_does_not_shrink(model: Tiny) -> None:
    """The norm's epsilon sees the scale; in float32 that hides among rounding errors of the same size."""
    errors = {dtype: _error(model, _query_key_rows, dtype) for dtype in ("float64", "float32")}
    assert errors["float32"] < 1e-5
    assert errors["float64"] > max(100 * EXACT, errors["float32"] / 100)
    assert _error(model, _query_key_norms) <= EXACT


@pytest.mark.parametrize("model", [DENSE, HYBRID], ids=["qwen3", "qwen3.5"])
def test_row_scales_of_q_and_k_are_exact_only_without_the_epsilon(model: Tiny) -> None:
    before = model.arrays()
    after = {name: array.copy() for name, array in before.items()}
    _query_key_rows(model, after, np.random.default_rng(1))
    config = {**model.config, "rms_norm_eps": 0.0}
    assert forward(config, after).error(forward(config, before)) <= EXACT
