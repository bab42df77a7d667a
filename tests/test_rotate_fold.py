"""Folding, untying, dropping MTP, rotating: what each tensor becomes, how it comes back, what is refused."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from bitsmith.archs import architecture_of, claim
from bitsmith.archs.published import published_config
from bitsmith.errors import BitsmithError, UnsupportedError
from bitsmith.lab.synth import synth_tensors
from bitsmith.numerics.hadamard import RandomHadamard, hadamard
from bitsmith.passes.fold import DropMtp, Fold, Untie
from bitsmith.passes.rotate import Rotate, RotateColumns, RotateRows
from bitsmith.passes.transform import Context, Model, model_of, transform_named, transformed, with_needs
from bitsmith.store import open_checkpoint
from bitsmith.store.checkpoint import Checkpoint, ComputedTensor

SOURCES = ["tiny_qwen3_5", "tiny_qwen3_5_tied", "tiny_qwen3"]
QWEN3_5 = "model.language_model."


def doubles(config: dict) -> Checkpoint:
    """Random float64 tensors of a config, with nothing on disk."""

    def wide(ref: ComputedTensor) -> ComputedTensor:
        # thirds, so that the values need all their bits
        return ComputedTensor(ref.name, ref.shape, "F64", lambda a, b: ref.read(a, b).astype(np.float64) / 3)

    checkpoint = Checkpoint(Path("in-memory"), {k: wide(ref) for k, ref in synth_tensors(config).items()})
    checkpoint.config = config
    return checkpoint


def applying(model: Model, *names: str, seed: int = 3) -> Model:
    options = {"rotate": {"seed": seed}}
    return transformed(model, [transform_named(name, options.get(name)) for name in names], Context())


def rotated(model: Model) -> Model:
    return transformed(model, with_needs([Rotate({"seed": 3})]), Context())


def matrix(n: int, seed: int = 3) -> np.ndarray:
    return RandomHadamard(n, seed).signs[:, None] * hadamard(n).astype(np.float64) / np.sqrt(n)


def tensor(values: np.ndarray, reads: list[int] | None = None) -> ComputedTensor:
    def read(start: int, stop: int) -> np.ndarray:
        if reads is not None:
            reads.append(stop - start)
        return values[start:stop].copy()

    return ComputedTensor("t", values.shape, "F64" if values.dtype == np.float64 else "F32", read)


def normal(*shape: int, dtype: type = np.float64) -> np.ndarray:
    return np.random.default_rng(5).standard_normal(shape).astype(dtype)


# Steps


@pytest.mark.parametrize("copies", [1, 2])
def test_rotated_columns_are_w_q_for_each_copy_of_the_axis(copies: int) -> None:
    w, q = normal(7, 20 * copies), np.kron(np.eye(copies), matrix(20))
    step = RotateColumns(RandomHadamard(20, 3))
    turned = step.apply(tensor(w))
    np.testing.assert_allclose(turned.read(), w @ q, rtol=0, atol=1e-13)
    np.testing.assert_allclose(step.unapply(turned).read(), w, rtol=0, atol=1e-13)
    x = normal(5, 20 * copies)
    np.testing.assert_allclose(step.inputs(x) @ turned.read().T, x @ w.T, rtol=0, atol=1e-12)


def test_importance_of_rotated_columns_is_the_mean_of_each_copy() -> None:
    step = RotateColumns(RandomHadamard(4, 0))
    vector = np.array([1, 2, 3, 6, 0, 0, 0, 8], np.float32)
    assert step.importance(vector).tolist() == [3, 3, 3, 3, 2, 2, 2, 2]
    assert step.importance(vector).dtype == np.float32
    assert step.importance_back(vector).tolist() == [3, 3, 3, 3, 2, 2, 2, 2]


@pytest.mark.parametrize("shape", [(20, 9), (20,), (20, 2, 3)])
def test_rotated_rows_are_the_transpose_times_w_and_a_bias_turns_too(shape: tuple[int, ...]) -> None:
    w, q = normal(*shape), matrix(20)
    step = RotateRows(RandomHadamard(20, 3))
    turned = step.apply(tensor(w))
    np.testing.assert_allclose(turned.read(), np.tensordot(q.T, w, 1), rtol=0, atol=1e-13)
    np.testing.assert_allclose(step.unapply(turned).read(), w, rtol=0, atol=1e-13)
    np.testing.assert_allclose(step.unapply(tensor(w)).read(), np.tensordot(q, w, 1), rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", [RotateColumns, RotateRows])
def test_row_slices_equal_the_whole_bit_for_bit(kind: type) -> None:
    step = kind(RandomHadamard(80, 1))
    for change in (step.apply, step.unapply):
        turned = change(tensor(normal(80, 80, dtype=np.float32)))
        whole = turned.read()
        assert whole.dtype == np.float32
        sliced = [turned.read(a, b) for a, b in ((0, 1), (1, 18), (18, 18), (18, 80))]
        assert np.array_equal(whole, np.concatenate(sliced))


def test_a_row_rotation_reads_its_source_once_until_another_takes_its_place() -> None:
    step, reads = RotateRows(RandomHadamard(64, 0)), []
    one, other = step.apply(tensor(normal(64, 8), reads)), step.apply(tensor(normal(64, 8)))
    first = one.read(0, 9)
    one.read(9, 64)
    first[:] = 0  # what was returned is the reader's own
    assert sum(reads) == 64 and one.read(0, 9).any()
    other.read(0, 1)
    assert sum(reads) == 64
    one.read(0, 1)
    assert sum(reads) == 128


def test_a_rotation_of_a_rotation_reads_through() -> None:
    w, step = normal(64, 8), RotateRows(RandomHadamard(64, 0))
    np.testing.assert_allclose(step.unapply(step.apply(tensor(w))).read(3, 7), w[3:7], rtol=0, atol=1e-13)


def test_one_rotated_tensor_is_held_at_a_time_and_goes_with_its_last_user() -> None:
    step, nbytes = RotateRows(RandomHadamard(1024, 0)), 1024 * 1024 * 4

    def compute(start: int, stop: int) -> np.ndarray:
        return np.ones((stop - start, 1024), np.float32)

    several = [step.apply(ComputedTensor(str(n), (1024, 1024), "F32", compute)) for n in range(3)]
    several[0].read(0, 1)
    several.append(several.pop(0))
    tracemalloc.start()
    try:
        for ref in several:
            ref.read(0, 1)
        held, _ = tracemalloc.get_traced_memory()
        del several, ref
        gc.collect()
        left, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert nbytes <= held < 1.5 * nbytes
    assert left < 0.5 * nbytes


# Fold


def test_fold_moves_gains_into_every_reader_of_a_block() -> None:
    source = model_of(doubles(published_config("tiny", mtp=False, vision=False)))
    folded = applying(source, "fold")
    layers = {
        "0": "linear_attn.in_proj_qkv in_proj_z in_proj_b in_proj_a",
        "3": "self_attn.q_proj k_proj v_proj",
    }
    for n, names in layers.items():
        first, *others = names.split()
        module, at = first.split(".")[0], f"model.layers.{n}."
        readers = {f"{at}{first}.weight", *(f"{at}{module}.{name}.weight" for name in others)}
        mlp = {f"{at}mlp.gate_proj.weight", f"{at}mlp.up_proj.weight"}
        for norm, read_by in (("input_layernorm", readers), ("post_attention_layernorm", mlp)):
            gains = 1 + source.ref(f"{at}{norm}.weight").read()
            assert not folded.ref(f"{at}{norm}.weight").read().any()
            for name in read_by:
                np.testing.assert_allclose(
                    folded.ref(name).read(), source.ref(name).read() * gains, rtol=1e-15
                )
    head = source.ref("lm_head.weight").read() * (1 + source.ref("model.norm.weight").read())
    np.testing.assert_allclose(folded.ref("lm_head.weight").read(), head, rtol=1e-15)
    residual_norms = {s.name for s, _ in source.tensors.values() if s.norm and s.axes == ("residual",)}
    assert set(folded.applied[0].vectors) == residual_norms
    untouched = {s.name for s, _ in folded.tensors.values() if not s.transforms}
    assert {s.role for s, _ in source.tensors.values() if s.name in untouched} >= {
        *("embed", "norm.q", "norm.k", "norm.delta", "attn.o", "delta.out", "ffn.down", "delta.conv")
    }


def test_norms_that_act_as_w_become_one() -> None:
    source = model_of(doubles(published_config("qwen3-tiny")))
    folded, name = applying(source, "fold"), "model.layers.1.input_layernorm.weight"
    assert (folded.ref(name).read() == 1).all()
    k = "model.layers.1.self_attn.k_proj.weight"
    np.testing.assert_allclose(
        folded.ref(k).read(), source.ref(k).read() * source.ref(name).read(), rtol=1e-15
    )
    assert not folded.spec("model.layers.1.self_attn.k_norm.weight").transforms


def test_mtp_norms_fold_into_their_halves_and_the_shared_ones_stay(tiny_qwen3_5: Path) -> None:
    source = model_of(open_checkpoint(tiny_qwen3_5))
    folded = applying(source, "fold")
    gains = [
        1 + source.ref(f"mtp.pre_fc_norm_{side}.weight").read().astype(np.float64)
        for side in ("embedding", "hidden")
    ]
    fc = source.ref("mtp.fc.weight").read()
    np.testing.assert_allclose(folded.ref("mtp.fc.weight").read(), fc * np.concatenate(gains), rtol=1e-6)
    for name in ("mtp.pre_fc_norm_embedding.weight", "mtp.layers.0.post_attention_layernorm.weight"):
        assert not folded.ref(name).read().any()
    for name in ("mtp.norm.weight", f"{QWEN3_5}norm.weight", "lm_head.weight"):
        assert not folded.spec(name).transforms
    assert folded.applied[0].notes == (
        "MTP layers read the state behind the final norm: the final norm keeps its weight",
    )


def test_the_final_norm_of_a_tied_model_stays_and_that_is_said() -> None:
    folded = applying(model_of(doubles(published_config("qwen3-tiny", tied=True))), "fold")
    assert not folded.spec("model.norm.weight").transforms
    assert "tied" in folded.applied[0].notes[0]
    assert applying(model_of(doubles(published_config("qwen3-tiny"))), "fold").applied[0].notes == ()


def test_folding_twice_changes_nothing_more() -> None:
    once = applying(model_of(doubles(published_config("qwen3-tiny"))), "fold")
    assert Fold().vectors(once, Context()) == {}


def test_a_gain_of_zero_loses_its_column_and_the_norm_comes_back() -> None:
    config = published_config("qwen3-tiny", layers=1)
    checkpoint, name = doubles(config), "model.layers.0.post_attention_layernorm.weight"
    gains = checkpoint[name].read()
    gains[7] = 0
    source = model_of(checkpoint)
    source = Model(checkpoint, source.arch, source.tensors | {name: (source.spec(name), tensor(gains))})
    folded, up = applying(source, "fold"), "model.layers.0.mlp.up_proj.weight"
    turned = folded.ref(up).read()
    assert not turned[:, 7].any() and turned[:, 8].all()
    stored, back = source.ref(up).read(), folded.spec(up).from_gguf(folded.ref(up)).read()
    stored[:, 7] = 0
    np.testing.assert_allclose(back, stored, rtol=1e-14)
    assert np.array_equal(folded.spec(name).from_gguf(folded.ref(name)).read(), gains)


# Untie and drop-mtp


def test_untie_adds_a_head_that_is_the_embedding_byte_for_byte(tiny_qwen3_5_tied: Path) -> None:
    source = model_of(open_checkpoint(tiny_qwen3_5_tied))
    untied = applying(source, "untie")
    spec, ref = untied.tensors["lm_head.weight"]
    assert (spec.role, spec.site, spec.gguf_name) == ("head", "head.in", "output.weight")
    assert (ref.name, ref.dtype, ref.nbytes) == ("lm_head.weight", "BF16", 4352 * 256 * 2)
    assert np.array_equal(ref.raw(), source.tensors["model.embed_tokens.weight"][1].raw())
    assert source.tensors["model.embed_tokens.weight"][1].name == "model.embed_tokens.weight"
    assert untied.applied[0].notes == (
        "lm_head.weight is added, a copy of model.embed_tokens.weight: "
        "1,114,112 parameters, 2,228,224 bytes as BF16",
    )
    assert source.arch.tied and not untied.arch.tied
    view = untied.view()
    assert view.config["tie_word_embeddings"] is False and len(claim(view)) == len(view)
    assert applying(untied, "fold").ref("lm_head.weight").shape == (4352, 256)


def test_untie_copies_what_the_embedding_has_become() -> None:
    source = model_of(doubles(published_config("qwen3-tiny", tied=True)))
    step = RotateColumns(RandomHadamard(256, 9))
    untied = applying(source.with_steps({"model.embed_tokens.weight": step}), "untie")
    head, embed = (
        untied.ref("lm_head.weight").read(0, 50),
        untied.ref("model.embed_tokens.weight").read(0, 50),
    )
    assert np.array_equal(head, embed)
    assert not np.array_equal(embed, source.ref("model.embed_tokens.weight").read(0, 50))


def test_untying_or_dropping_what_is_not_there_does_nothing_and_says_so(demo_model: Path) -> None:
    source = model_of(open_checkpoint(demo_model))
    for transform in (Untie(), DropMtp()):
        changed = source.applying(transform, {})
        assert dict(changed.tensors) == dict(source.tensors)
        assert "nothing to" in changed.applied[0].notes[0]


def test_dropping_mtp_leaves_the_text_and_vision(tiny_qwen3_5: Path) -> None:
    source = model_of(open_checkpoint(tiny_qwen3_5))
    dropped = applying(source, "drop-mtp")
    gone = set(source.tensors) - set(dropped.tensors)
    assert gone == {name for name in source.tensors if name.startswith("mtp.")}
    size = sum(source.tensors[name][1].size for name in gone)
    expected = f"{len(gone)} MTP tensors are dropped: {size:,} parameters, {2 * size:,} bytes"
    assert dropped.applied[0].notes == (expected,)
    view = dropped.view()
    assert len(claim(view)) == len(view) == len(source.tensors) - len(gone)
    assert "nextn" not in str(dropped.arch.gguf_metadata())
    assert view.config["text_config"]["mtp_num_hidden_layers"] == 0


# Rotate


def test_the_whole_rotation_in_dense_algebra() -> None:
    source = model_of(doubles(published_config("tiny", tied=True)))
    turned, q = rotated(source), matrix(256)
    assert [one.transform.name for one in turned.applied] == ["untie", "drop-mtp", "fold", "rotate"]

    def was(name: str) -> np.ndarray:
        return source.ref(name).read()

    def close(name: str, expected: np.ndarray) -> None:
        np.testing.assert_allclose(turned.ref(name).read(), expected, rtol=0, atol=1e-13, err_msg=name)

    embed, final = was(f"{QWEN3_5}embed_tokens.weight"), was(f"{QWEN3_5}norm.weight")
    close(f"{QWEN3_5}embed_tokens.weight", embed @ q)
    close("lm_head.weight", embed * (1 + final) @ q)
    at = f"{QWEN3_5}layers.3."
    mixer, ffn = was(f"{at}input_layernorm.weight"), was(f"{at}post_attention_layernorm.weight")
    close(f"{at}self_attn.v_proj.weight", was(f"{at}self_attn.v_proj.weight") * (1 + mixer) @ q)
    close(f"{at}self_attn.o_proj.weight", q.T @ was(f"{at}self_attn.o_proj.weight"))
    close(f"{at}mlp.up_proj.weight", was(f"{at}mlp.up_proj.weight") * (1 + ffn) @ q)
    close(f"{at}mlp.down_proj.weight", q.T @ was(f"{at}mlp.down_proj.weight"))
    out = f"{QWEN3_5}layers.0.linear_attn.out_proj.weight"
    close(out, q.T @ was(out))
    merger = "model.visual.merger.linear_fc2."
    close(f"{merger}weight", q.T @ was(f"{merger}weight"))
    close(f"{merger}bias", was(f"{merger}bias") @ q)
    changed = {name for name in turned.tensors if turned.spec(name).transforms}
    assert {name for name in changed if "visual" in name} == {f"{merger}weight", f"{merger}bias"}
    assert any("mmproj" in note for note in turned.applied[-1].notes)


@pytest.mark.parametrize("fixture", SOURCES)
def test_undoing_gives_back_what_was_stored(fixture: str, request: pytest.FixtureRequest) -> None:
    turned = rotated(model_of(open_checkpoint(request.getfixturevalue(fixture))))
    for name, (spec, ref) in turned.tensors.items():
        stored, back = ref.read(), spec.from_gguf(spec.to_gguf(ref)).read()
        assert back.shape == stored.shape and back.dtype == stored.dtype, name
        if spec.transforms:
            assert np.abs(back - stored).max() <= 3e-7 * np.abs(stored).max(), name


@pytest.mark.parametrize("size", ["tiny", "qwen3-tiny"])
def test_undoing_is_exact_to_float64_where_the_source_is(size: str) -> None:
    turned = rotated(model_of(doubles(published_config(size, tied=True, layers=1, mtp=False))))
    for name, (spec, ref) in turned.tensors.items():
        back = ref
        for step in spec.transforms:
            back = step.apply(back)
        for step in reversed(spec.transforms):
            back = step.unapply(back)
        found, stored = back.read(), ref.read()
        assert found.dtype == np.float64, name
        assert np.abs(found - stored).max() <= 1e-14 * np.abs(stored).max(), name


@pytest.mark.parametrize("fixture", SOURCES)
def test_slices_of_the_rotated_view_equal_the_whole(fixture: str, request: pytest.FixtureRequest) -> None:
    turned = rotated(model_of(open_checkpoint(request.getfixturevalue(fixture))))
    view = turned.view()
    assert len(claim(view)) == len(view) and not architecture_of(view).tied
    for name, ref in view.items():
        if turned.spec(name).transforms:
            whole, cut = ref.read(), ref.n_rows // 3 + 1
            assert np.array_equal(whole, np.concatenate([ref.read(0, cut), ref.read(cut)])), name


def test_the_seed_decides_the_rotation_and_its_signs_are_the_vector() -> None:
    source = applying(model_of(doubles(published_config("qwen3-tiny", layers=1))), "fold")
    one, other = applying(source, "rotate", seed=1), applying(source, "rotate", seed=2)
    vectors = dict(one.applied[-1].vectors)
    assert vectors["residual"].shape == (256,) and set(vectors["residual"]) == {-1.0, 1.0}
    by_signs = source.applying(Rotate({"seed": 2}), vectors)  # the signs given, not the seed, are carried out
    name = "model.layers.0.mlp.down_proj.weight"
    assert np.array_equal(one.ref(name).read(), by_signs.ref(name).read())
    assert not np.array_equal(one.ref(name).read(), other.ref(name).read())
    assert not Rotate().steps(source, {})


# Refusals


def refused(model: Model, *said: str) -> None:
    with pytest.raises(UnsupportedError) as error:
        applying(model, "rotate")
    assert all(part in str(error.value) for part in ("rotate: ", *said)), str(error.value)


def test_rotation_is_refused_with_the_reason_until_each_is_seen_to(tiny_qwen3_5_tied: Path) -> None:
    model = model_of(open_checkpoint(tiny_qwen3_5_tied))
    refused(model, "model.embed_tokens.weight", "tied", "untie")
    model = applying(model, "untie")
    refused(model, "15 MTP tensors", "mtp.layers.0.input_layernorm.weight", "drop-mtp")
    model = applying(model, "drop-mtp")
    refused(model, "model.layers.0.input_layernorm.weight", "fold first")
    assert applying(applying(model, "fold"), "rotate").applied[-1].transform.name == "rotate"


def test_a_final_norm_left_alone_by_an_early_fold_is_refused() -> None:
    model = applying(
        model_of(doubles(published_config("qwen3-tiny", tied=True))), "fold", "untie", "drop-mtp"
    )
    refused(model, "model.norm.weight", "after untie and drop-mtp")


def test_a_hidden_size_without_a_hadamard_matrix_is_refused() -> None:
    config = published_config("qwen3-tiny", layers=1) | {"hidden_size": 52}
    refused(applying(model_of(doubles(config)), "fold"), "hidden size 52", "Hadamard")
    known = config | {"hidden_size": 60}
    assert applying(model_of(doubles(known)), "fold", "rotate").arch.number("hidden_size") == 60


def test_a_vision_tower_that_is_not_understood_is_refused() -> None:
    model = applying(model_of(doubles(published_config("tiny", mtp=False, layers=1))), "fold")
    kept = {k: pair for k, pair in model.tensors.items() if "merger.linear_fc2" not in k}
    refused(model.with_tensors(kept), "vision tensors", "model.visual.")


@pytest.mark.parametrize("options", [{"seed": "three"}, {"sede": 3}, {"seed": True}])
def test_wrong_options_are_refused(options: dict) -> None:
    with pytest.raises(BitsmithError, match=r"seed|sede"):
        Rotate(options)
