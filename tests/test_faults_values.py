"""Weights that are not finite, and rows that no block divides: told with their place, whatever is made."""

from __future__ import annotations

import json
import re
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from bitsmith.errors import BitsmithError, DamagedFileError
from bitsmith.formats import format_named
from bitsmith.lab.synth import synth_tensors
from bitsmith.report.written import print_planned, print_written
from bitsmith.run.compress import compress
from bitsmith.run.compress import plan as dry_run
from bitsmith.run.decode import Decoder
from bitsmith.run.evaluate import open_model
from bitsmith.run.forward import embed, weight_of
from bitsmith.run.job import Job
from bitsmith.store import TensorData, write_safetensors

EMBEDDING, NORM, UP = (
    "model.embed_tokens.weight",
    "model.layers.1.input_layernorm.weight",
    "model.layers.1.mlp.up_proj.weight",
)
PLACES: dict[str, tuple[tuple[int, ...], float]] = {
    EMBEDDING: ((70, 3), np.inf),
    NORM: ((11,), np.nan),
    UP: ((3, 5), -np.inf),
}


def spoiled(model: Path, folder: Path, *names: str) -> Path:
    copy = Path(shutil.copytree(model, folder / "model"))
    tensors = load_file(copy / "model.safetensors")
    for name in names:
        place, value = PLACES[name]
        tensors[name][place] = value
    save_file(tensors, copy / "model.safetensors")
    return copy


def told(name: str) -> str:
    place, value = PLACES[name]
    return re.escape(f"model.safetensors: tensor '{name}': is {value} at {list(place)}, expected finite")


OUTPUTS = {"BF16": "x.gguf", "Q4_K_M": "x.gguf", "i4": "x.cellm", "W8A16": "x"}
FEW = (("BF16", NORM), ("Q4_K_M", UP), ("i4", UP), ("W8A16", EMBEDDING))


@pytest.mark.parametrize(
    ("type_name", "name"),
    [pytest.param(*case, marks=() if case in FEW else pytest.mark.slow) for case in product(OUTPUTS, PLACES)],
)
def test_no_output_holds_a_weight_that_is_not_finite(
    type_name: str, name: str, tiny_qwen3: Path, tmp_path: Path
) -> None:
    model = spoiled(tiny_qwen3, tmp_path, name)
    with pytest.raises(DamagedFileError, match=told(name)) as caught:
        compress(Job(model=model, out=tmp_path / OUTPUTS[type_name], type_name=type_name))
    assert "\n" not in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_forward_names_the_weight_and_not_what_came_of_it(tiny_qwen3: Path, tmp_path: Path) -> None:
    with open_model(spoiled(tiny_qwen3, tmp_path, EMBEDDING, UP)) as model:
        states = np.zeros((1, 2, model.embedding.shape[1]), np.float32)
        embed(model, np.array([[1, 2]]), states)
        assert np.isfinite(states).all()
        with pytest.raises(DamagedFileError, match=told(EMBEDDING)):
            embed(model, np.array([[1, 70]]), states)
        with pytest.raises(DamagedFileError, match=told(UP)):
            Decoder(model)
        path = model.checkpoint.path
        assert weight_of(model.checkpoint[UP], path, 4, 9).shape == (5, model.checkpoint[UP].shape[1])
        with pytest.raises(DamagedFileError, match=told(UP)):
            weight_of(model.checkpoint[UP], path, 2, 9)


@pytest.fixture(scope="module")
def odd_rows(tiny_qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense Qwen3 with FFN rows of 320 and hidden rows of 272: 256 divides neither, 32 the first."""
    config: dict[str, Any] = json.loads((tiny_qwen3 / "config.json").read_text())
    config |= {"hidden_size": 272, "intermediate_size": 320}
    data = []
    for name, ref in synth_tensors(config).items():
        encoded = format_named(ref.dtype).encode(ref.read().reshape(1, -1))
        data.append(TensorData(name, ref.dtype, ref.shape, [encoded]))
    folder = tmp_path_factory.mktemp("odd") / "model"
    write_safetensors(folder, data, config)
    return folder


def test_a_fallback_is_shown_with_the_bits_it_costs(
    odd_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.gguf"
    planned = dry_run(Job(model=odd_rows, out=out, type_name="Q4_K_M"))
    print_planned(planned)
    before = capsys.readouterr().out
    record = compress(Job(model=odd_rows, out=out, type_name="Q4_K_M"))
    print_written(record)
    after = capsys.readouterr().out
    down = "model.layers.1.mlp.down_proj.weight"
    warning = f"warning: {down}: fallback from Q4_K: rows of 320 are not divisible by 256, stored as Q5_0"
    for said in (before, after):
        assert warning in said
        assert f"{record.plan.bpw:.4f} bpw" in said
    infos = record.plan.rows
    assert record.plan.bpw == 8 * sum(row.nbytes for row in infos) / sum(
        int(np.prod(row.shape)) for row in infos
    )
    assert record.plan.bpw > 6  # a Q4_K_M of whole blocks has fewer than 5.2


def test_no_fallback_refuses_before_anything_is_written(odd_rows: Path, tmp_path: Path) -> None:
    job = Job(model=odd_rows, out=tmp_path / "x.gguf", type_name="Q4_K_M", no_fallback=True)
    for act in (compress, dry_run):
        with pytest.raises(BitsmithError, match=r"need a fallback: .*mlp\.down_proj.*320.*Q4_K.*Q5_0"):
            act(job)
    assert not list(tmp_path.iterdir())
