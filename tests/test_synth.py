"""Synthetic checkpoints: the published layout, seeded values whatever the slicing, memory of a slice."""

from __future__ import annotations

import json
import re
import shutil
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from typer.testing import CliRunner

from bitsmith.archs import architecture_of, claim
from bitsmith.archs.published import SIZES, published_config, size_named
from bitsmith.cli.main import app
from bitsmith.errors import BitsmithError, DamagedFileError, OutputError, UnsupportedError
from bitsmith.lab.synth import synth, synth_tensors
from bitsmith.numerics.planted import Planted, planted_rows
from bitsmith.progress import silent
from bitsmith.run.assay import assay
from bitsmith.run.compress import compress
from bitsmith.run.job import Job
from bitsmith.store import open_checkpoint
from bitsmith.store.virtual import VirtualTensor


def test_layout_is_the_published_one(tiny_qwen3_5):
    with open_checkpoint(tiny_qwen3_5) as checkpoint:
        assert checkpoint.config["model_type"] == "qwen3_5"
        assert checkpoint.config["text_config"]["layer_types"][3] == "full_attention"
        prefixes = {name.split(".")[0] + "." + name.split(".")[1] for name in checkpoint}
        assert prefixes == {
            "model.language_model",
            "model.visual",
            "lm_head.weight",
            "mtp.fc",
            "mtp.layers",
            "mtp.norm",
            "mtp.pre_fc_norm_embedding",
            "mtp.pre_fc_norm_hidden",
        }
        for spec, ref in claim(checkpoint):
            kept = spec.name.endswith((".A_log", ".linear_attn.norm.weight"))
            assert ref.dtype == ("F32" if kept else "BF16"), spec.name


def test_tied_shards_have_an_index(tiny_qwen3_5_tied):
    shards = sorted(tiny_qwen3_5_tied.glob("model-*.safetensors"))
    assert len(shards) > 2
    index = json.loads((tiny_qwen3_5_tied / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    with open_checkpoint(tiny_qwen3_5_tied) as checkpoint:
        assert "lm_head.weight" not in checkpoint
        assert set(index["weight_map"]) == set(checkpoint)
        assert architecture_of(checkpoint).tied


def test_values_are_what_was_asked_for(tiny_qwen3_5):
    tensors = synth_tensors(published_config("tiny"))
    with open_checkpoint(tiny_qwen3_5) as checkpoint:
        for name, ref in tensors.items():
            wanted, found = ref.read(), checkpoint[name].read()
            assert np.abs(found - wanted).max() <= 2.0**-8 * np.abs(wanted).max()
        gate = checkpoint["model.language_model.layers.0.mlp.gate_proj.weight"].read()
        assert abs(gate.std() * np.sqrt(gate.shape[1]) - 1) < 0.02
        assert len(np.unique(gate, axis=0)) == len(gate)


def test_a_seed_gives_the_same_values_in_any_slices():
    config = published_config("4B", vision=False)
    once, again = synth_tensors(config, seed=3), synth_tensors(config, seed=3)
    other = synth_tensors(config, seed=4)
    name, next_layer = (f"model.layers.{n}.mlp.up_proj.weight" for n in range(2))
    whole = once[name].read(100, 400)
    pieces = [again[name].read(start, start + 50) for start in range(100, 400, 50)]
    assert np.array_equal(whole, np.concatenate(pieces))
    assert not np.array_equal(whole, other[name].read(100, 400))
    assert not np.array_equal(whole, once[next_layer].read(100, 400))


def test_writing_needs_the_memory_of_slices(tmp_path):
    tracemalloc.start()
    try:
        synth(tmp_path / "big", "qwen3-0.6B", layers=1)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    written = sum(file.stat().st_size for file in (tmp_path / "big").iterdir())
    shutil.rmtree(tmp_path / "big")
    assert written > 300_000_000
    assert peak_bytes < 60_000_000


def test_two_runs_write_the_same_bytes(tiny_qwen3, tmp_path):
    folder = synth(tmp_path / "again", "qwen3-tiny", seed=2)
    for file in tiny_qwen3.iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("size", SIZES)
def test_every_size_has_a_config_its_architecture_accepts(size):
    config = published_config(size, layers=4, tied=True)
    tensors = synth_tensors(config)
    assert "lm_head.weight" not in tensors
    assert any(name.endswith("layers.3.self_attn.q_proj.weight") for name in tensors)


def test_wrong_requests_are_refused(tiny_qwen3):
    with pytest.raises(BitsmithError, match=r"unknown size '3B'; known: 0\.8B"):
        published_config("3B")
    with pytest.raises(OutputError):
        synth(tiny_qwen3, "qwen3-tiny")


def test_planted_spectra_are_found_again():
    plan = Planted(768, 512, alpha=3.5, tail=0.3, rms=0.05, seed=3)
    sigma = np.linalg.svd(planted_rows(plan, 0, 768).astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(sigma, plan.sigma(), rtol=1e-4)
    assert np.sqrt(np.sum(sigma**2) / (768 * 512)) == pytest.approx(0.05, rel=1e-4)


@pytest.mark.parametrize("shape", [(384, 256), (256, 384), (24, 80), (1, 7), (4352, 256)])
def test_planted_rows_are_the_same_in_any_slices(shape):
    uneven = {"row_spread": 0.2, "column_spread": 0.1, "outliers": 1}
    plan = Planted(*shape, alpha=3.0, tail=0.5, rms=1.0, seed=9, **uneven)
    whole = planted_rows(plan, 0, shape[0])
    cuts = sorted({0, shape[0], *(min(shape[0], at) for at in (1, 15, 16, 17, 63, 130))})
    pieces = [planted_rows(plan, first, last) for first, last in pairwise(cuts)]
    assert np.array_equal(whole, np.concatenate(pieces))
    assert len(np.unique(whole, axis=0)) == shape[0]


def test_a_planted_checkpoint_says_what_an_assay_finds(tmp_path):
    folder = synth(tmp_path / "planted", "tiny", vision=False, mtp=False, planted=True)
    expected = json.loads((folder / "planted.json").read_text())["expected"]
    name = "model.layers.3.self_attn.q_proj.weight"
    [found] = assay(folder, match=re.escape(name), resamples=40).matrices
    planned = expected[name]
    assert found.power_law.alpha_low < planned["alpha"] < found.power_law.alpha_high
    assert dict(found.spectrum.rank_for_error)[0.1] == pytest.approx(
        planned["rank_for_error"]["0.1"], rel=0.03
    )
    with open_checkpoint(folder) as checkpoint:
        first, second = (
            np.square(checkpoint[f"model.layers.{n}.mlp.up_proj.weight"].read()).sum(axis=0) for n in (0, 1)
        )
    assert np.corrcoef(first, second)[0, 1] > 0.8  # channels of the residual stream, the same in every layer


def test_a_virtual_checkpoint_reads_as_the_folder_it_stands_for(tmp_path):
    real = synth(tmp_path / "real", "tiny", planted=True)
    computed = synth(tmp_path / "computed", "tiny", planted=True, virtual=True)
    assert {file.name for file in computed.iterdir()} == {file.name for file in real.iterdir()} - {
        "model.safetensors"
    }
    with open_checkpoint(real) as stored, open_checkpoint(computed) as checkpoint:
        assert checkpoint.source_digest == stored.source_digest
        assert sorted(checkpoint) == sorted(stored)
        for name in stored:
            assert checkpoint[name].dtype == stored[name].dtype
            assert np.array_equal(checkpoint[name].read(), stored[name].read()), name
    ours, theirs = tmp_path / "computed.gguf", tmp_path / "real.gguf"
    compress(Job(computed, ours, "Q4_0"))
    compress(Job(real, theirs, "Q4_0"))
    with open_checkpoint(ours) as one, open_checkpoint(theirs) as other:
        assert all(np.array_equal(one[name].raw(), other[name].raw()) for name in other)


def test_compress_computes_a_virtual_checkpoint_once(tmp_path, monkeypatch):
    folder = synth(tmp_path / "computed", "qwen3-tiny", planted=True, virtual=True)
    computed, whole = [], VirtualTensor._computed

    def counted(tensor, start, stop):
        computed.append((stop - start) * (tensor.nbytes // tensor.n_rows))
        return whole(tensor, start, stop)

    monkeypatch.setattr(VirtualTensor, "_computed", counted)
    compress(Job(folder, tmp_path / "out.gguf", "Q4_0"))
    with open_checkpoint(folder) as checkpoint:
        assert sum(computed) == sum(ref.nbytes for ref in checkpoint.values())


def test_lost_shards_are_not_made_up_for(tmp_path):
    folder = synth(tmp_path / "real", "qwen3-tiny", planted=True)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UnsupportedError, match=r"has no \.safetensors"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shape": [1 << 30, 64]}, "expected sides of at most"),
        ({"shape": [-1, 64]}, "expected positive lengths"),
        ({"dtype": "I8"}, "expected a dtype of F32, F16, BF16"),
        ({"planted": {"alpha": 3}}, "is planned by"),
        ({"planted": {"alpha": float("nan")}}, "expected a number"),
        ({"planted": {"alpha": 0.5}}, "alpha 0.5"),
    ],
)
def test_a_plan_that_cannot_be_followed_is_named(tmp_path, change, said):
    folder = synth(tmp_path / "computed", "qwen3-tiny", planted=True, virtual=True)
    path = folder / "planted.json"
    plan = json.loads(path.read_text())
    name = "model.layers.0.mlp.up_proj.weight"
    entry = plan["tensors"][name]
    whole = "planted" in change and said != "is planned by"
    entry |= {"planted": entry["planted"] | change["planted"]} if whole else change
    path.write_text(json.dumps(plan))
    with pytest.raises(DamagedFileError, match=re.escape(said)) as refused:
        open_checkpoint(folder)
    assert refused.value.tensor == name and refused.value.path == path


@pytest.mark.parametrize(
    ("name", "size"),
    [("qwen3.5-9b", "9B"), ("Qwen3.5-0.8B", "0.8B"), ("QWEN3-4b", "qwen3-4B"), ("27b", "27B")],
)
def test_models_are_known_by_name(name, size):
    assert size_named(name) == size
    assert published_config(name) == published_config(size)


def test_the_command_takes_a_name_or_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = (
        "qwen3-tiny",
        "QWEN3-tiny -o named",
        "sized --size qwen3-tiny --random",
        "qwen3-tiny -o v --virtual",
    )
    for line in lines:
        assert CliRunner().invoke(app, ["lab", "synth", *line.split()]).exit_code == 0, line
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("qwen3-tiny", "named", "sized")]
    assert same[0] == same[1] != same[2]
    assert not (tmp_path / "v" / "model.safetensors").exists()
    wrong = CliRunner().invoke(app, ["lab", "synth", "qwen3.5-10b", "-o", "x"])
    assert wrong.exit_code == 1 and not (tmp_path / "x").exists()


def test_a_killed_run_goes_on_with_the_shard_it_was_at(tmp_path):
    def write(name, progress=silent, **options):
        more = {"vision": False, "shard_bytes": 2_000_000, "planted": True, "progress": progress}
        return synth(tmp_path / name, "tiny", **more | options)

    def stop_late(_, done, total):
        if done > 0.6 * total:
            raise KeyboardInterrupt

    whole = write("whole")
    with pytest.raises(KeyboardInterrupt):
        write("part", stop_late)
    assert not (tmp_path / "part").exists()
    made = tmp_path / ".part.shards" / "files"
    first = made / sorted(file.name for file in made.iterdir())[0]
    was = first.stat().st_mtime_ns
    with pytest.raises(OutputError, match="run with other seed"):
        write("part", seed=5)
    again = write("part")
    assert {file.name: file.read_bytes() for file in again.iterdir()} == {
        file.name: file.read_bytes() for file in whole.iterdir()
    }
    assert (again / first.name).stat().st_mtime_ns == was
    assert not (tmp_path / ".part.shards").exists()
