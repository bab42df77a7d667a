"""What `inspect` says agrees with what is stored and with what `compress` would write."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from bitsmith.run.execute import compress, plan_for
from bitsmith.run.inspect import inspect


def test_parameters_and_shares_are_those_of_the_file(tiny_qwen3_5: Path) -> None:
    found = inspect(tiny_qwen3_5)
    stored = 0
    for shard in tiny_qwen3_5.glob("*.safetensors"):
        with safe_open(shard, "np") as file:
            stored += sum(int(np.prod(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118
    assert found.architecture == "qwen35"
    assert found.parameters == stored
    for shares in (found.components, found.roles, found.types):
        assert sum(share.share for share in shares) == pytest.approx(1.0)
        assert sum(share.parameters for share in shares) == stored
    assert {"DeltaNet", "full attention", "FFN", "MTP", "vision"} <= {c.name for c in found.components}
    assert any("vision" in note for note in found.notes)


def test_sizes_are_those_of_the_plan(demo_model: Path) -> None:
    sizes = {size.type: size for size in inspect(demo_model).sizes}
    for name in ("Q4_K_M", "IQ4_XS", "BF16"):
        assert sizes[name].file_bytes == plan_for(demo_model, name).file_bytes


def test_a_gguf_shows_its_types_and_no_second_guess(demo_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "q.gguf"
    compress(demo_model, out, "Q3_K_M")
    found = inspect(out)
    assert {"Q3_K", "Q5_K", "F32"} <= {share.name for share in found.types}
    assert found.parameters == inspect(demo_model).parameters
    assert found.sizes == []
    assert any("no sizes" in note for note in found.notes)


def test_an_unknown_family_is_grouped_by_name(tmp_path: Path) -> None:
    weights = {
        "encoder.layer.0.attention.self.query.weight": np.zeros((64, 32), np.float32),
        "encoder.layer.1.attention.self.query.weight": np.zeros((64, 32), np.float32),
        "pooler.dense.bias": np.zeros(32, np.float32),
    }
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    found = inspect(tmp_path)
    assert found.architecture is None
    assert found.parameters == 2 * 64 * 32 + 32
    assert {role.name: role.tensors for role in found.roles} == {"self.query": 2, "pooler.dense": 1}
    q8 = next(size for size in found.sizes if size.type == "Q8_0")
    assert q8.file_bytes == 2 * 64 * 34 + 32 * 4


def test_a_lone_file_without_a_config_is_shown(tmp_path: Path) -> None:
    save_file({"layer.weight": np.ones((4, 32), np.float32)}, tmp_path / "lone.safetensors")
    found = inspect(tmp_path / "lone.safetensors")
    assert (found.architecture, found.parameters) == (None, 128)
    assert any("config.json" in note for note in found.notes)
