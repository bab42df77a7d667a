"""The command on teachers that hold a copy of their student: sharded, tied, FP8, with vision and MTP."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from typer.testing import CliRunner

from bitsmith.archs.published import published_config
from bitsmith.cli.main import app
from bitsmith.lab.embedded import Sizes, embed_student, spread_layers
from bitsmith.lab.models import DEMO_MODEL
from bitsmith.lab.synth import synth_tensors
from bitsmith.store import TensorData, open_checkpoint, write_safetensors
from paired_models import DELTA, FULL, LINES, in_eight_bits

EXACT = 1e-4  # of the largest logit
VOCABULARY = 4352
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
HYBRID = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
HYBRID |= {"linear_num_value_heads": 4, "layer_types": [DELTA, FULL, DELTA], "head_dim": 32}


@dataclass(frozen=True)
class Pair:
    """A student and a teacher that computes what the student does."""

    teacher: Path
    student: Path
    text: Path

    def merge(self, out: Path, *options: str) -> dict[str, Any]:
        """Merge by the command; return the record."""
        paths = [self.teacher, self.student, "--text", self.text, "-o", out]
        asked = ["--ctx", "32", "--samples", "64", "--no-fallback", *options]
        found = CliRunner().invoke(app, ["merge", *map(str, paths), *asked])
        assert found.exit_code == 0, found.output
        return json.loads((out.with_name(f"{out.name}.merge") / "merge.json").read_text())


def write_student(folder: Path, *, dense: bool, shard_bytes: int = 1 << 30, **options: Any) -> Path:
    """Write a student of random weights with the demo's tokenizer."""
    config = published_config("qwen3-tiny" if dense else "tiny", layers=2 if dense else 3, **options)
    text = config.get("text_config", config)
    text |= SIZES | ({"head_dim": 16} if dense else HYBRID)
    if "vision_config" in config:
        config["vision_config"]["out_hidden_size"] = SIZES["hidden_size"]
    tensors = synth_tensors(config, 5, "F32")
    data = [TensorData(name, "F32", ref.shape, [ref.read()]) for name, ref in tensors.items()]
    files = {name: (DEMO_MODEL / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    write_safetensors(folder, data, config, shard_bytes=shard_bytes, files=files)
    return folder


def made(folder: Path, *, dense: bool, **options: Any) -> Pair:
    student = write_student(folder / "student", dense=dense, **options)
    delta = {} if dense else {"k_heads": 3, "v_heads": 9}
    layers = spread_layers(2 if dense else 3, 5)
    sizes = Sizes(48, layers, ffn=80, heads=9, kv_heads=3, **delta)
    embed_student(student, folder / "teacher", sizes)
    text = folder / "text.txt"
    text.write_text("".join(LINES[:120]))
    return Pair(folder / "teacher", student, text)


def logits(folder: Path) -> np.ndarray:
    """Return what transformers makes of a folder on tokens of no text."""
    vision = "vision_config" in json.loads((folder / "config.json").read_text())
    loader = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    model = loader.from_pretrained(folder, dtype=torch.float32)
    tokens = np.random.default_rng(1).integers(4, 4000, (2, 24))
    with torch.inference_mode():
        found: np.ndarray = model(input_ids=torch.from_numpy(tokens)).logits.double().numpy()
    return found


def error(out: Path, expected: np.ndarray) -> float:
    return float(np.abs(logits(out) - expected).max() / np.abs(expected).max())


KINDS = {
    "dense, sharded": {"dense": True, "shard_bytes": 300_000},
    "dense, tied": {"dense": True, "tied": True},
    "hybrid, vision and MTP": {"dense": False},
    "hybrid, tied": {"dense": False, "vision": False, "mtp": False, "tied": True},
}
DEFAULT = ("dense, tied",)


@pytest.mark.parametrize(
    "kind", [pytest.param(one, marks=() if one in DEFAULT else pytest.mark.slow) for one in KINDS]
)
def test_the_command_gives_the_student_back(kind: str, tmp_path: Path) -> None:
    pair, out = made(tmp_path, **KINDS[kind]), tmp_path / "out"
    record = pair.merge(out, "--alpha", "1")
    layers = spread_layers(*_depths(pair))
    assert record["layer_map"] == [n for n, one in enumerate(layers) if one is not None]
    assert error(out, logits(pair.student)) <= EXACT
    with open_checkpoint(out) as written, open_checkpoint(pair.student) as student:
        assert set(written) == {name for name in student if not name.startswith("mtp.")}
        for name, ref in written.items():
            assert (ref.dtype, ref.shape) == (student[name].dtype, student[name].shape)
            is_own = np.array_equal(ref.raw(), student[name].raw())
            assert is_own if "visual" in name else not (is_own and "proj" in name)
    notes = [note for note in record["written"]["notes"] if "MTP" in note]
    assert len(notes) == (kind == "hybrid, vision and MTP")


@pytest.mark.slow
def test_fp8_weights_merge_as_what_their_scales_say(tmp_path: Path) -> None:
    pair = made(tmp_path, dense=True)
    pairs = [Pair(*(tmp_path / kind / side for side in ("teacher", "student")), pair.text) for kind in KEPT]
    for folder, *copies in ((getattr(pair, side), *(getattr(one, side) for one in pairs)) for side in SIDES):
        in_both_forms(folder, *copies)
    outs = [tmp_path / kind / "out" for kind in KEPT]
    records = [one.merge(out, "--alpha", "0.5") for one, out in zip(pairs, outs, strict=True)]
    assert records[0]["measures"] == records[1]["measures"]
    with open_checkpoint(outs[0]) as plain, open_checkpoint(outs[1]) as packed:
        assert "quantization_config" not in packed.config
        for name, ref in packed.items():
            assert ref.dtype == ("BF16" if "_proj" in name else "F32")
            np.testing.assert_array_equal(ref.raw(), plain[name].raw())
    assert logits(outs[1]).std() > 0


KEPT, SIDES = ("plain", "fp8"), ("teacher", "student")


def in_both_forms(folder: Path, plain: Path, packed: Path) -> None:
    """Write a model with its matrices in FP8 by blocks, and with what those say in BF16 where it is exact."""
    values = load_file(folder / "model.safetensors")
    stored = dict(values)
    for name in [name for name in values if "_proj" in name]:
        codes, scale, _ = in_eight_bits(values[name].numpy())
        scale = np.exp2(np.ceil(np.log2(scale))).astype(np.float32)  # so that BF16 holds the product
        said = torch.from_numpy(codes).view(torch.float8_e4m3fn)
        wide = torch.from_numpy(scale).repeat_interleave(32, 0).repeat_interleave(32, 1)
        stored[name], stored[f"{name}_scale_inv"] = said, torch.from_numpy(scale)
        values[name] = (said.float() * wide[: said.shape[0], : said.shape[1]]).bfloat16()
    settings = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 32]}}
    for out, tensors, extra in ((plain, values, {}), (packed, stored, settings)):
        shutil.copytree(folder, out)
        save_file(tensors, out / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        (out / "config.json").write_text(json.dumps(config | extra))


def _depths(pair: Pair) -> tuple[int, int]:
    found = []
    for folder in (pair.student, pair.teacher):
        config = json.loads((folder / "config.json").read_text())
        found.append(config.get("text_config", config)["num_hidden_layers"])
    return found[0], found[1]
