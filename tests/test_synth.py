"""Synthetic checkpoints: the published layout, seeded values whatever the slicing, memory of a slice."""

from __future__ import annotations

import json
import shutil
import tracemalloc

import numpy as np
import pytest

from bitsmith.archs import architecture_of, claim
from bitsmith.archs.published import SIZES, published_config
from bitsmith.errors import BitsmithError, OutputError
from bitsmith.lab.synth import synth, synth_tensors
from bitsmith.store import open_checkpoint


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
