"""The steps between layouts: against plain numpy, sliced anyhow, and composed with their inverses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitsmith.archs import Export, Qwen35, export_view, import_view
from bitsmith.archs.published import published_config
from bitsmith.archs.qwen3_5 import tiled_order
from bitsmith.archs.steps import AddOne, NegativeExp, PermuteColumns, PermuteRows, SqueezeKernel
from bitsmith.lab.synth import synth_tensors
from bitsmith.store import Checkpoint, ComputedTensor, TensorRef

PERMUTATION = st.integers(1, 40).flatmap(lambda n: st.permutations(range(n)))


def stored(values: np.ndarray, dtype: str = "BF16", reads: list[tuple[int, int]] | None = None) -> TensorRef:
    def compute(start: int, stop: int) -> np.ndarray:
        if reads is not None:
            reads.append((start, stop))
        return values[start:stop]

    return ComputedTensor("t", values.shape, dtype, compute)


def bfloat16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


@given(PERMUTATION, st.data())
def test_row_permutation_reads_any_slice(order, data):
    order = np.array(order, np.intp)
    values = np.arange(3 * len(order), dtype=np.float32).reshape(-1, 3)
    view = PermuteRows(order).apply(stored(values))
    start = data.draw(st.integers(0, len(order)))
    stop = data.draw(st.integers(start, len(order)))
    assert view.dtype == "BF16"
    assert np.array_equal(view.read(start, stop), values[order][start:stop])


@given(PERMUTATION)
def test_permutations_undo_themselves_and_move_importance(order):
    order = np.array(order, np.intp)
    rng = np.random.default_rng(len(order))
    values = rng.standard_normal((len(order), len(order)), dtype=np.float32)
    importance = rng.random(len(order), dtype=np.float32)
    rows, columns = PermuteRows(order), PermuteColumns(order)
    for step in (rows, columns):
        assert np.array_equal(step.unapply(step.apply(stored(values))).read(), values)
        assert np.array_equal(step.importance_back(step.importance(importance)), importance)
    # a permuted matrix times a permuted input is the same output, and so is the weighted squared error
    moved = columns.apply(stored(values)).read()
    assert np.allclose(moved @ columns.importance(importance), values @ importance, rtol=1e-5, atol=1e-5)
    assert np.array_equal(rows.importance(importance), importance)


def test_row_permutation_reads_runs_not_rows():
    reads: list[tuple[int, int]] = []
    order = tiled_order(8, 32, 16)
    values = np.arange(512 * 2, dtype=np.float32).reshape(512, 2)
    view = PermuteRows(order).apply(stored(values, reads=reads))
    assert np.array_equal(view.read(), values[order])
    assert len(reads) == 1
    reads.clear()
    assert np.array_equal(view.read(8, 56), values[order][8:56])
    assert len(reads) == 4, "a read per head that the slice touches"
    assert sum(stop - start for start, stop in reads) == 48


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 5))
def test_tiled_order_is_the_transposed_head_grid(k_heads, ratio, head_dim):
    order = tiled_order(k_heads, k_heads * ratio, head_dim)
    at = 0
    for r in range(ratio):
        for k in range(k_heads):
            for d in range(head_dim):
                assert order[at] == (k * ratio + r) * head_dim + d
                at += 1


@given(st.lists(st.floats(-200, 200, width=32), min_size=1, max_size=30))
def test_add_one_is_float32_and_undone_within_its_precision(weights):
    weights = bfloat16(np.array(weights, np.float32))
    step = AddOne()
    shifted = step.apply(stored(weights))
    assert shifted.dtype == "F32"
    assert np.array_equal(shifted.read(), np.float32(1) + weights)
    back = step.unapply(shifted).read()
    assert np.abs(back.astype(np.float64) - weights).max() <= 2.0**-24 * max(1, np.abs(weights).max())
    again = step.apply(stored(back, "F32")).read()
    assert np.array_equal(again[shifted.read() >= 0.5], shifted.read()[shifted.read() >= 0.5])


@given(st.lists(st.floats(-6, 6, width=32), min_size=1, max_size=30))
def test_negative_exp_is_correctly_rounded_and_undone(logs):
    logs = np.array(logs, np.float32)
    step = NegativeExp()
    decays = step.apply(stored(logs, "F32"))
    exact = -np.exp(logs.astype(np.longdouble))
    assert np.abs(decays.read() / exact - 1).max() <= 2.0**-24
    assert np.abs(step.unapply(decays).read() - logs).max() <= 2.0**-22


def test_squeeze_drops_and_restores_the_middle_axis():
    values = np.arange(24, dtype=np.float32).reshape(6, 1, 4)
    step = SqueezeKernel()
    squeezed = step.apply(stored(values))
    assert squeezed.shape == step.shape(values.shape) == (6, 4)
    assert np.array_equal(squeezed.read(2, 5), values[2:5, 0])
    assert step.unapply(squeezed).shape == values.shape
    assert np.array_equal(step.unapply(squeezed).read(1, 4), values[1:4])


def in_memory(config: dict, seed: int) -> Checkpoint:
    checkpoint = Checkpoint(Path("memory"), synth_tensors(config, seed))
    checkpoint.config = config
    return checkpoint


def as_gguf(export: Export) -> Checkpoint:
    checkpoint = Checkpoint(Path("memory.gguf"), {t.gguf_name: t.ref for t in export.tensors})
    checkpoint.metadata = export.metadata
    return checkpoint


@settings(max_examples=15)
@given(
    k_heads=st.integers(1, 4),
    ratio=st.integers(1, 4),
    head_dim=st.sampled_from([2, 8]),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 3)]),
    tied=st.booleans(),
    mtp=st.integers(0, 2),
    layers=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_export_then_import_is_the_identity(k_heads, ratio, head_dim, heads, tied, mtp, layers, seed):
    config = published_config("tiny", vision=False, tied=tied, layers=layers) | {
        "hidden_size": 16,
        "intermediate_size": 24,
        "vocab_size": 32,
        "linear_num_key_heads": k_heads,
        "linear_num_value_heads": k_heads * ratio,
        "linear_key_head_dim": head_dim,
        "linear_value_head_dim": head_dim,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": 16,
        "mtp_num_hidden_layers": mtp,
    }
    original = in_memory(config, seed)
    back = import_view(as_gguf(export_view(original)))
    assert list(back) == list(original)
    for name, ref in original.items():
        before, after = ref.read(), back[name].read()
        assert after.shape == ref.shape
        spec = back.specs[name]
        if spec.norm == "1+w" or spec.role == "delta.decay":
            assert np.abs(after - before).max() <= 2.0**-22, name
        else:
            assert np.array_equal(after, before), name
    assert Qwen35(back.config).gguf_metadata() == Qwen35(config).gguf_metadata()


@pytest.mark.parametrize(("k_heads", "v_heads"), [(2, 6), (4, 8), (3, 3)])
def test_export_moves_v_heads_as_an_independent_reshape_does(k_heads, v_heads):
    dim, hidden, width = 8, 16, 4
    config = published_config("tiny", vision=False, mtp=False) | {
        "hidden_size": hidden,
        "linear_num_key_heads": k_heads,
        "linear_num_value_heads": v_heads,
        "linear_key_head_dim": dim,
        "linear_value_head_dim": dim,
    }
    original = in_memory(config, 3)
    export = export_view(original)
    at = "model.layers.1.linear_attn."
    ratio, qk = v_heads // k_heads, 2 * k_heads * dim

    def tiled(heads_first: np.ndarray) -> np.ndarray:
        grid = heads_first.reshape(k_heads, ratio, -1)
        return np.swapaxes(grid, 0, 1).reshape(heads_first.shape)

    def exported(name: str) -> np.ndarray:
        return export[f"blk.1.{name}"].ref.read()

    qkv = original[f"{at}in_proj_qkv.weight"].read()
    assert np.array_equal(exported("attn_qkv.weight"), np.concatenate([qkv[:qk], tiled(qkv[qk:])]))
    conv = original[f"{at}conv1d.weight"].read().reshape(-1, width)
    assert np.array_equal(exported("ssm_conv1d.weight"), np.concatenate([conv[:qk], tiled(conv[qk:])]))
    assert np.array_equal(exported("attn_gate.weight"), tiled(original[f"{at}in_proj_z.weight"].read()))
    assert np.array_equal(exported("ssm_beta.weight"), tiled(original[f"{at}in_proj_b.weight"].read()))
    assert np.array_equal(exported("ssm_alpha.weight"), tiled(original[f"{at}in_proj_a.weight"].read()))
    assert np.array_equal(exported("ssm_dt.bias"), tiled(original[f"{at}dt_bias"].read()))
    decay = -np.exp(original[f"{at}A_log"].read().astype(np.float64))
    assert np.allclose(exported("ssm_a"), tiled(decay), rtol=1e-7, atol=0)
    out = original[f"{at}out_proj.weight"].read()
    assert np.array_equal(exported("ssm_out.weight"), tiled(out.T.copy()).T)
    importance = np.arange(out.shape[1], dtype=np.float32)
    spec = export["blk.1.ssm_out.weight"].spec
    assert np.array_equal(spec.importance_to_gguf(importance), tiled(importance))
    assert np.array_equal(spec.importance_from_gguf(tiled(importance)), importance)
    norm = original["model.layers.1.input_layernorm.weight"].read()
    assert np.array_equal(exported("attn_norm.weight"), norm + np.float32(1))
    assert np.array_equal(exported("ssm_norm.weight"), original[f"{at}norm.weight"].read())
