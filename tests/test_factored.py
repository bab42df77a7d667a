"""Weights as factors: what is computed, what is stored, what is read back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import linalg

from bitsmith.archs import claim
from bitsmith.errors import BitsmithError, DamagedFileError, UnsupportedError
from bitsmith.passes.factorize import (
    FactorCode,
)
from bitsmith.run.calibrate import calibrate
from bitsmith.run.evaluate import evaluate_all
from bitsmith.run.factored_scheme import form_of, parse_scheme
from bitsmith.run.folder import FolderRecord, plan_folder, write_folder
from bitsmith.run.overrides import split_rule
from bitsmith.store import TensorData, open_checkpoint, write_safetensors
from bitsmith.store.factored import form_bytes
from bitsmith.store.statistics import open_statistics

Float32 = NDArray[np.float32]

FLOATS = FactorCode(None)


def kept_blocks(scheme: str) -> list[int]:
    return [int(block) for block in scheme.rpartition("x")[2].split(".")]


RULES = [
    (r"layers\.0\.mlp\.gate_proj", "SVD:r=16:int4"),
    (r"layers\.0\.mlp\.up_proj", "svd+int4:bpw=5.5"),
    (r"layers\.0\.mlp\.down_proj", "SVD:r=8:f16"),
    (r"layers\.0\.self_attn\.o_proj", "INT4:cols=16x0.2"),
    (r"layers\.0\.self_attn\.q_proj", "INT8:rows=16x1.3"),
    (r"layers\.1\.mlp\.gate_proj", "SVD+INT4:r=8:kernel=32:rows=16x0.1.4"),
    (r"layers\.1\.mlp\.down_proj", "TT:r=8:f32"),
    ("embed_tokens", "TT:r=12"),
    ("lm_head", "TT+SVD:r=6:core=24"),
]


@pytest.fixture(scope="module")
def mixed(tiny_qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FolderRecord]:
    """A folder with every kind of factors in it, in several shards."""
    out = tmp_path_factory.mktemp("factored") / "mixed"
    return out, write_folder(tiny_qwen3, out, "INT4", group=32, tensor_types=RULES, shard_bytes=60_000)


# ---------------------------------------------------------------- what is stored and read back


def test_plans_tell_every_byte(tiny_qwen3: Path, mixed: tuple[Path, FolderRecord]) -> None:
    out, record = mixed
    plan = plan_folder(tiny_qwen3, "INT4", group=32, tensor_types=RULES, shard_bytes=60_000)
    assert plan.file_bytes == record.file_bytes
    assert plan.file_bytes == sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert len(list(out.glob("*.safetensors"))) > 2
    with open_checkpoint(out) as checkpoint:
        for row in plan.rows:
            assert checkpoint[row.name].nbytes == row.nbytes, row.name
    by_name = {row.name: row for row in plan.rows}
    row = by_name["model.layers.0.mlp.up_proj.weight"]
    assert row.nbytes <= 5.5 * row.shape[0] * row.shape[1] / 8
    form = form_of(parse_scheme(row.scheme), row.shape, 32)
    assert row.nbytes == form_bytes(form)


def test_what_is_read_is_what_was_measured(tiny_qwen3: Path, mixed: tuple[Path, FolderRecord]) -> None:
    out, record = mixed
    with open_checkpoint(tiny_qwen3) as original, open_checkpoint(out) as checkpoint:
        assert set(original) == set(checkpoint)
        for tensor in record.tensors:
            want = np.asarray(original[tensor.name].read(), np.float32)
            found = checkpoint[tensor.name].read()
            error = float(np.square(want - found).sum() / np.square(want).sum())
            assert error == pytest.approx(tensor.relative_error, rel=1e-4, abs=1e-9), tensor.name
            assert error < 1
        kinds = {name: checkpoint[name].dtype for name in checkpoint}
    assert kinds["model.layers.0.mlp.gate_proj.weight"] == "rank 16 int4_g32"
    assert kinds["model.embed_tokens.weight"].startswith("TT 1,12,12,1 int8")
    assert kinds["lm_head.weight"].startswith("rank 24 TT 1,6,6,1 int8")
    assert kinds["model.layers.1.self_attn.q_proj.weight"] == "int4_g32"


def test_any_slice_of_rows_is_the_same(mixed: tuple[Path, FolderRecord]) -> None:
    out, record = mixed
    rng = np.random.default_rng(0)
    with open_checkpoint(out) as checkpoint:
        for tensor in record.tensors:
            if tensor.scheme != "BF16":
                ref = checkpoint[tensor.name]
                whole = ref.read()
                for _ in range(6):
                    start, stop = sorted(rng.integers(0, ref.n_rows + 1, 2).tolist())
                    assert np.allclose(ref.read(start, stop), whole[start:stop], atol=1e-6), tensor.name


def test_pruned_blocks_are_zero_and_the_others_are_not(mixed: tuple[Path, FolderRecord]) -> None:
    out, _ = mixed
    with open_checkpoint(out) as checkpoint:
        o = checkpoint["model.layers.0.self_attn.o_proj.weight"].read()
        q = checkpoint["model.layers.0.self_attn.q_proj.weight"].read()
        split = checkpoint["model.layers.1.mlp.gate_proj.weight"].read()
    assert np.flatnonzero(np.abs(o).sum(0)).tolist() == [*range(16), *range(32, 48)]
    assert np.flatnonzero(np.abs(q).sum(1)).tolist() == [*range(16, 32), *range(48, 64)]
    assert np.flatnonzero(np.abs(split).sum(1)).tolist() == [*range(32), *range(64, 80)]
    assert np.linalg.matrix_rank(split[:32]) == 8


def test_a_written_folder_is_evaluated(demo_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("def add(a, b):\n    return a + b\n" * 60)
    exact = [(r"layers\.0\.mlp", "SVD:r=256:f16")]
    pruned = [(r"layers\.0\.mlp", "SVD:r=4"), ("attn", "INT4:heads=0.5")]
    outs = [tmp_path / "exact", tmp_path / "pruned"]
    for out, rules in zip(outs, (exact, pruned), strict=True):
        write_folder(demo_model, out, "BF16", tensor_types=rules)
    losses = [found.mean_kld.value for found in evaluate_all(demo_model, outs, text, 32, 2)]
    assert losses[0] < 1e-4
    assert 1e-2 < losses[1] < 50


@pytest.fixture(scope="module")
def statistics(tiny_qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("statistics")
    words = np.random.default_rng(0).choice(
        ["def ", "add", "(a, b)", ":\n", "    ", "return ", "x = ", "1"], 900
    )
    (folder / "text.txt").write_text("".join(words))
    calibrate(tiny_qwen3, folder / "text.txt", folder / "stats", ctx_tokens=32, chunks=8, saliency=False)
    return folder / "stats"


def test_statistics_decide_what_is_stored(tiny_qwen3: Path, statistics: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    rules = [
        (r"layers\.0\.mlp\.up_proj", "SVD:r=12:f32"),
        ("embed_tokens", "TT:r=8:scales"),
        ("lm_head", "TT+SVD:r=9999:core=16:f32"),
    ]
    record = write_folder(tiny_qwen3, tmp_path / "out", "BF16", tensor_types=rules, statistics=statistics)
    plan = plan_folder(tiny_qwen3, "BF16", tensor_types=rules, statistics=statistics)
    assert plan.file_bytes == record.file_bytes
    assert {one.rounder for one in record.tensors} == {"", "weighted"}
    with open_checkpoint(tiny_qwen3) as original, open_checkpoint(tmp_path / "out") as checkpoint:
        specs = {spec.name: spec for spec, _ in claim(original)}
        known = open_statistics(statistics, specs.values())
        for tensor, rank in ((name, 12), ("lm_head.weight", 16)):
            weight = np.asarray(original[tensor].read(), np.float64)
            inputs = known.hugging_face(specs[tensor])
            assert inputs is not None
            assert inputs.moment is not None
            moment = inputs.moment.astype(np.float64)
            unit = np.diagonal(moment).mean()
            root = linalg.cholesky(moment / unit + 0.01 * np.eye(len(moment)), lower=True)
            _, sigma, _ = linalg.svd(weight @ root)  # Eckart, Young, Mirsky in that metric, by itself
            left = (weight - checkpoint[tensor].read()) @ root
            assert np.square(left).sum() == pytest.approx(np.square(sigma[rank:]).sum(), rel=1e-4)
        rows = checkpoint["model.embed_tokens.weight"]
        assert rows.dtype.endswith("scaled")
        assert np.allclose(rows.read(5, 9), rows.read()[5:9], atol=1e-6)


def test_a_killed_run_goes_on(tiny_qwen3: Path, tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    rules = [(r"layers\.0\.mlp", "SVD:r=6")]

    def kill(stage: str, done: int, total: int) -> None:
        del total
        if stage == "round" and done == 3:
            raise KeyboardInterrupt

    write_folder(tiny_qwen3, undisturbed, "BF16", tensor_types=rules)
    with pytest.raises(KeyboardInterrupt):
        write_folder(tiny_qwen3, killed, "BF16", tensor_types=rules, progress=kill)
    assert not killed.exists()
    assert write_folder(tiny_qwen3, killed, "BF16", tensor_types=rules).resumed == 2
    for file in undisturbed.iterdir():
        assert (killed / file.name).read_bytes() == file.read_bytes()
    left = {
        f"{name}{suffix}" for name in ("killed", "undisturbed") for suffix in ("", ".sha256", ".record.json")
    }
    assert {path.name for path in tmp_path.iterdir()} == left


def test_key_and_value_heads_that_nobody_reads_go_too(tiny_qwen3: Path) -> None:
    plan = plan_folder(tiny_qwen3, "INT4:heads=0.25")
    schemes = {row.name.split("model.layers.0.")[-1]: row.scheme for row in plan.rows}
    q, k, v, o = (schemes[f"self_attn.{side}_proj.weight"] for side in "qkvo")
    [head] = kept_blocks(q)
    assert kept_blocks(o) == [head]
    assert kept_blocks(k) == kept_blocks(v) == [head // 2]
    assert schemes["mlp.up_proj.weight"] == "INT4"
    with pytest.raises(BitsmithError, match="leaves to measurement"):
        form_of(parse_scheme("INT4:heads=0.25"), (64, 64), 0)


def test_ranks_by_error_and_heads_by_output(demo_model: Path) -> None:
    rules = [
        (r"layers\.3\.mlp\.up_proj", "SVD:error=0.3"),
        ("in_proj_qkv", "SVD+INT4:r=32:kernel=qk:heads=.5"),
    ]
    plan = plan_folder(demo_model, "INT4:heads=0.5", tensor_types=rules)
    schemes = {row.name: row.scheme for row in plan.rows}
    rank = int(schemes["model.layers.3.mlp.up_proj.weight"].split("=")[1])
    with open_checkpoint(demo_model) as checkpoint:
        sigma = np.linalg.svd(checkpoint["model.layers.3.mlp.up_proj.weight"].read(), compute_uv=False)
    tails = [float(np.sqrt(np.square(sigma[r:]).sum() / np.square(sigma).sum())) for r in (rank - 1, rank)]
    assert tails[1] <= 0.3 < tails[0]
    assert schemes["model.layers.0.mlp.up_proj.weight"] == "INT4"
    kept = {name: kept_blocks(scheme) for name, scheme in schemes.items() if scheme.startswith("INT4:")}
    attention, delta = "model.layers.3.self_attn.", "model.layers.0.linear_attn."
    heads = kept[f"{attention}o_proj.weight"]
    assert heads == kept[f"{attention}q_proj.weight"]
    assert len(heads) == 2
    values = kept[f"{delta}out_proj.weight"]
    assert values == kept[f"{delta}in_proj_z.weight"]
    mixed = schemes[f"{delta}in_proj_qkv.weight"]
    assert ":kernel=512:" in mixed
    assert kept_blocks(mixed) == [*range(8), *(8 + head for head in values)]  # q and k stay
    assert len(values) == 4


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        ("SVD", "needs one of r=, bpw= and error="),
        ("SVD:r=4:bpw=2", "needs one of"),
        ("SVD:r=0", "no value that r= could have"),
        ("SVD:r=x", "no value"),
        ("SVD:bpw=nan", "no value"),
        ("SVD:r=4:int3", "unknown option 'INT3'"),
        ("INT4:r=4", "has no factors"),
        ("SVD:r=4:kernel=8", "kernel= needs codes"),
        ("SVD+INT4:r=4:f16", "beside codes factors are"),
        ("TT:r=4:rows=16x0", "keeps all rows"),
        ("TT:r=4:heads=0.5", "keeps all rows"),
        ("TT:r=4:scales", "needs statistics of"),
        ("TT+SVD:r=4:core=8:scales", "scales are for TT"),
        ("TT+SVD:r=4", "core= is for TT\\+SVD"),
        ("SVD:r=4:core=8", "core= is for TT\\+SVD"),
        ("SVD:r=4:r=5", "says twice what rank is"),
        ("SVD:error=1", "no value that error="),
        ("INT4:heads=0", "no value that heads="),
        ("INT4:heads=0.5:rows=16x0", "heads= says which"),
        ("SVD+INT4:r=4:error=0.5", "needs one of"),
        ("SVD+INT4:error=0.5", "error= is for SVD"),
        ("SVD+INT4:r=4:kernel=qk", "only DeltaNet's in_proj_qkv"),
        ("SVD:r=4:[red]", "unknown option"),
        ("INT4:rows=16x3.1", "rows keeps blocks"),
        ("INT4:cols=48x0", "columns keeps blocks"),
        ("INT4:rows=16x", "no value"),
        ("SVD:bpw=0.01", "takes 0."),
        ("SVD+INT4:r=4:kernel=100000", "has a kernel"),
        ("SVDX:r=4", "unknown scheme"),
    ],
)
def test_schemes_that_make_no_sense(tiny_qwen3: Path, tmp_path: Path, scheme: str, said: str) -> None:
    with pytest.raises(BitsmithError, match=said):
        write_folder(tiny_qwen3, tmp_path / "out", scheme)
    assert not (tmp_path / "out").exists()


def test_other_packings_do_not_mix_in(tiny_qwen3: Path) -> None:
    with pytest.raises(BitsmithError, match="cannot be in one folder"):
        plan_folder(tiny_qwen3, "SVD:r=4", tensor_types=[("down_proj", "W4A16")])
    with pytest.raises(BitsmithError, match="groups of"):
        plan_folder(tiny_qwen3, "SVD:r=4", group=48)
    with pytest.raises(BitsmithError, match="matches"):
        plan_folder(tiny_qwen3, "W4A16", tensor_types=[("embed_tokens", "W8A16")])  # these pack no tables


MODULE = "model.layers.0.mlp.gate_proj"


def settings(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def module(**fields: Any) -> Callable[[Path], None]:
    return settings(lambda said: said["modules"][MODULE].update(fields))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (settings(lambda said: said.update(version=2)), "factors of version 2"),
        (settings(lambda said: said.pop("modules")), "modules is no map"),
        (settings(lambda said: said["modules"].update({MODULE: 3})), "is no map"),
        (settings(lambda said: said["modules"].pop(MODULE)), "belongs to no factored weight"),
        (settings(lambda said: said["modules"].update({"x": said["modules"][MODULE]})), "is missing"),
        (module(rank=15), r"expected I32 \[\d+, \d+\]"),
        (module(rank=-1), "is not within"),
        (module(rank="16"), "is no list of integers"),
        (module(rank=0), "has rank 0"),
        (module(factors="int3"), "factors is int3"),
        (module(factors=["int4"]), "factors is"),
        (module(form="tucker"), "form is tucker"),
        (module(shape=[1 << 40, 64]), "is not within"),
        (module(shape=[4]), "expected out and in"),
        (module(rows={"size": 16, "kept": [9999]}), "rows keeps blocks"),
        (module(rows={"size": 0, "kept": [0]}), "rows keeps blocks"),
        (module(rows={"size": 16}), "kept"),
        (module(more=1), "more"),
        (
            settings(lambda said: said["modules"]["model.embed_tokens"].update(ranks=[1, 12, 12])),
            "has no three cores",
        ),
        (
            settings(lambda said: said["modules"]["model.embed_tokens"].update(modes=[[1, 1, 1]] * 2)),
            "has modes for 1x1",
        ),
        (settings(lambda said: said["modules"]["model.embed_tokens"].update(scales=1)), "scales is 1"),
        (settings(lambda said: said["modules"]["model.embed_tokens"].update(scales=True)), "is missing"),
        (settings(lambda said: said["modules"]["lm_head"].pop("weight_left")), "weight_left"),
        (
            settings(lambda said: said["modules"]["lm_head"].update(weight_right=3)),
            "weight_right is no train",
        ),
        (
            settings(lambda said: said["modules"]["lm_head"]["weight_left"].update(shape=[9, 9])),
            "multiplies",
        ),
    ],
)
def test_damaged_settings_are_refused(
    mixed: tuple[Path, FolderRecord], tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(mixed[0], folder)
    damage(folder)
    with pytest.raises((DamagedFileError, UnsupportedError), match=said):
        open_checkpoint(folder)


def test_parts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    def tensor(name: str, dtype: str, shape: tuple[int, ...], size: int) -> TensorData:
        return TensorData(f"a.{name}", dtype, shape, [bytes(size)])

    said = {"form": "factored", "shape": [8, 16], "rank": 4, "factors": "f32"}
    config = {"quantization_config": {"quant_method": "bitsmith", "version": 1, "modules": {"a": said}}}
    left, right = tensor("weight_left", "F32", (8, 4), 128), tensor("weight_right", "F32", (4, 16), 256)
    for number, (parts, wrong) in enumerate(
        [
            ([left], "is missing, rank 4 f32 needs it"),
            ([left, tensor("weight_right", "F32", (4, 8), 128)], r"is F32 \[4, 8\], expected F32 \[4, 16\]"),
            ([left, tensor("weight_right", "F16", (4, 16), 128)], "is F16"),
            ([left, right, tensor("weight", "F32", (8, 16), 512)], "is stored plainly and as factors"),
            ([left, right, tensor("weight_rest", "F32", (8, 16), 512)], "belongs to no factored weight"),
        ]
    ):
        folder = tmp_path / str(number)
        write_safetensors(folder, [*parts, TensorData("b", "I8", (1,), [bytes(1)])], config)
        with pytest.raises(DamagedFileError, match=wrong):
            open_checkpoint(folder)


@pytest.mark.parametrize(
    ("rule", "parts"),
    [
        ("ffn_down=Q6_K", ("ffn_down", "Q6_K")),
        (
            r"layers\.0\.(?:gate|up)_proj=SVD:bpw=4.5:int8",
            (r"layers\.0\.(?:gate|up)_proj", "SVD:bpw=4.5:int8"),
        ),
        ("qkv=SVD+INT4:r=8:kernel=qk:rows=64x0.2", ("qkv", "SVD+INT4:r=8:kernel=qk:rows=64x0.2")),
        ("(?<=mlp.)up=TT+SVD:core=9:r=3", ("(?<=mlp.)up", "TT+SVD:core=9:r=3")),
        ("a=b=INT8", ("a=b", "INT8")),
        ("a=SVD:[r]=4", ("a=SVD:[r]", "4")),  # an unknown type, refused later
        ("SVD:r=4", ("SVD:r", "4")),
        ("=INT8", None),
        ("up=", None),
        ("up", None),
    ],
)
def test_rules_are_told_from_options(rule: str, parts: tuple[str, str] | None) -> None:
    assert split_rule(rule) == parts
