"""Packed folders: transformers loads them, and what it computes is what bitsmith says of them."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from numpy.typing import NDArray
from safetensors.torch import load_file

from bitsmith.archs import claim
from bitsmith.archs.published import published_config
from bitsmith.errors import BitsmithError, DamagedFileError, OutputError, UnsupportedError
from bitsmith.lab.models import DEMO_MODEL
from bitsmith.lab.synth import synth_tensors
from bitsmith.numerics import threads
from bitsmith.run.calibrate import calibrate
from bitsmith.run.evaluate import open_model
from bitsmith.run.folder import SCHEMES, FolderRecord, plan_folder, write_folder
from bitsmith.run.forward import final_hidden_states
from bitsmith.store import TensorData, open_checkpoint, write_safetensors
from bitsmith.store.checkpoint import TensorRef

TOKENS = np.random.default_rng(0).integers(0, 4000, (1, 17))
MIXED = [("down_proj", "W8A16"), (r"self_attn\.(q|k|v)_proj", "W8A16")]

Folder = tuple[Path, FolderRecord]


@pytest.fixture(scope="module")
def whole(tiny_qwen3_5: Path, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Qwen3.5 with vision and MTP in W4A16, whose text is nested."""
    out = tmp_path_factory.mktemp("folders") / "whole"
    return out, write_folder(tiny_qwen3_5, out, "W4A16")


@pytest.fixture(scope="module")
def mixed(tiny_qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Qwen3 in 4 and 8 bits, in many shards."""
    out = tmp_path_factory.mktemp("folders") / "mixed"
    return out, write_folder(tiny_qwen3, out, "W4A16", group=32, tensor_types=MIXED, shard_bytes=100_000)


@pytest.fixture(scope="module")
def asymmetric(tiny_qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Qwen3 with zero points, a scale to a row."""
    out = tmp_path_factory.mktemp("folders") / "asymmetric"
    return out, write_folder(tiny_qwen3, out, "W4A16_ASYM", group=0)


def settings(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def loaded(folder: Path, kind: Any = transformers.AutoModelForCausalLM) -> Any:
    """Return the model as anyone loads it, in float32."""
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: Any) -> NDArray[np.float32]:
    with torch.inference_mode():
        found: NDArray[np.float32] = model(input_ids=torch.from_numpy(TOKENS)).logits[0, :-1].numpy()
    return found


def evaluated(folder: Path) -> NDArray[np.float32]:
    """Return the logits that bitsmith's own forward has from what lies in the folder."""
    with open_model(folder) as model:
        found: NDArray[np.float32] = final_hidden_states(model, TOKENS, 0)[0] @ model.head.read().T
    return found


# ---------------------------------------------------------------- what others make of it


def test_transformers_computes_what_is_evaluated(whole: Folder, mixed: Folder) -> None:
    seen = loaded(whole[0], transformers.AutoModelForImageTextToText)
    assert type(seen).__name__ == "Qwen3_5ForConditionalGeneration"
    assert np.abs(logits(seen) - evaluated(whole[0])).max() < 2e-5  # measured: 3e-6, of logits up to 4.4
    assert np.abs(logits(loaded(mixed[0])) - evaluated(mixed[0])).max() < 2e-5


def test_a_nested_text_model_loads_alone_and_inside(
    tiny_qwen3_5: Path, whole: Folder, tmp_path: Path
) -> None:
    rules = [("down_proj", "W8A16"), ("in_proj_(qkv|z)", "W8A16")]
    write_folder(tiny_qwen3_5, tmp_path / "mixed", "W4A16", group=64, tensor_types=rules)
    for folder in (whole[0], tmp_path / "mixed"):
        alone = loaded(folder)
        assert type(alone).__name__ == "Qwen3_5ForCausalLM"
        assert np.abs(logits(alone) - evaluated(folder)).max() < 2e-5
    inside = loaded(tmp_path / "mixed", transformers.AutoModelForImageTextToText)
    assert np.abs(logits(inside) - evaluated(tmp_path / "mixed")).max() < 2e-5
    with open_checkpoint(tmp_path / "mixed") as checkpoint:
        found = {ref.dtype for name, ref in checkpoint.items() if "mlp.down" in name or "in_proj_z" in name}
    assert found == {"int8_g64", "BF16"}  # the MTP layer's stays


def test_zero_points_load_with_the_products_in_bf16(asymmetric: Folder) -> None:
    folder, _ = asymmetric
    model = loaded(folder)
    with open_checkpoint(folder) as checkpoint:
        for name, parameter in model.named_parameters():
            expected = torch.from_numpy(checkpoint[name].read())
            if checkpoint[name].dtype == "int4a":
                expected = expected.to(torch.bfloat16).float()
            assert torch.equal(parameter, expected), name
    assert np.abs(logits(model) - evaluated(folder)).max() < 0.1  # measured: 0.026, of logits up to 4.7


@pytest.mark.parametrize("made", ["whole", "mixed", "asymmetric"])
def test_the_library_decodes_the_same_weights(made: str, request: pytest.FixtureRequest) -> None:
    folder, record = request.getfixturevalue(made)
    tensors, config = stored(folder), QuantizationConfig.model_validate(settings(folder))
    compressor = BaseCompressor.get_value_from_registry(config.format)
    packed = [one for one in record.tensors if one.scheme != "BF16"]
    assert len(packed) == {"whole": 25, "mixed": 21, "asymmetric": 21}[made]
    with open_checkpoint(folder) as checkpoint:
        for one in packed:
            module = one.name.removesuffix(".weight")
            schemes = config.config_groups.values()
            [scheme] = [scheme for scheme in schemes if {"Linear", module} & set(scheme.targets)]
            parts = {
                name.removeprefix(module + "."): tensors[name] for name in tensors if name.startswith(module)
            }
            assert parts["weight_scale"].dtype == torch.bfloat16
            parts["weight_scale"] = parts["weight_scale"].float()
            expected = compressor.decompress(parts, scheme)["weight"].numpy()
            assert np.array_equal(checkpoint[one.name].read(), expected), one.name


# ---------------------------------------------------------------- what lies in it


def test_what_is_not_packed_is_carried_as_it_is(tiny_qwen3_5: Path, whole: Folder) -> None:
    folder, record = whole
    before, after = stored(tiny_qwen3_5), stored(folder)
    kept = [one for one in record.tensors if one.scheme == "BF16"]
    names = " ".join(one.name for one in kept)
    for part in (
        "mtp.layers.0.mlp",
        "visual.blocks.0.attn.qkv",
        "in_proj_a",
        "in_proj_b",
        "conv1d",
        "lm_head",
    ):
        assert part in names
    for one in kept:
        assert after[one.name].dtype == before[one.name].dtype
        assert torch.equal(after[one.name], before[one.name]), one.name
        assert (one.rounder, one.relative_error, one.nbytes) == ("", 0.0, before[one.name].nbytes)
    assert set(after) - set(before) == {
        one.name + last
        for one in record.tensors
        if one not in kept
        for last in ("_packed", "_scale", "_shape")
    }
    config = json.loads((tiny_qwen3_5 / "config.json").read_text())
    assert json.loads((folder / "config.json").read_text()) == config | {
        "quantization_config": settings(folder)
    }


def test_every_linear_is_targeted_or_ignored_by_name(
    tiny_qwen3_5: Path, whole: Folder, mixed: Folder
) -> None:
    model = transformers.AutoModelForImageTextToText.from_config(
        transformers.AutoConfig.from_pretrained(tiny_qwen3_5)
    )
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    packed = {one.name.removesuffix(".weight") for one in whole[1].tensors if one.scheme != "BF16"}
    found = settings(whole[0])
    kept = (linears | mtp_linears(tiny_qwen3_5)) - packed
    alone = {
        name.replace("model.language_model.", "model.") for name in kept
    }  # as AutoModelForCausalLM has them
    assert set(found["ignore"]) == kept | alone and len(alone - kept) == 6
    assert [group["targets"] for group in found["config_groups"].values()] == [["Linear"]]
    four, eight = settings(mixed[0])["config_groups"].values()
    assert (four["weights"]["num_bits"], eight["weights"]["num_bits"]) == (4, 8)
    assert set(eight["targets"]) == {
        f"model.layers.{n}.{last}"
        for n in range(3)
        for last in ("mlp.down_proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    }
    assert settings(mixed[0])["ignore"] == ["lm_head"]


def mtp_linears(model: Path) -> set[str]:
    with open_checkpoint(model) as checkpoint:
        pairs = [spec for spec, _ in claim(checkpoint) if spec.component == "mtp"]
    return {spec.name.removesuffix(".weight") for spec in pairs if len(spec.shape) == 2}


def test_a_tied_head_is_ignored(tiny_qwen3_5_tied: Path, tmp_path: Path) -> None:
    write_folder(tiny_qwen3_5_tied, tmp_path / "out", "W8A16", ignore=["re:.*mlp"])
    found = settings(tmp_path / "out")
    assert "lm_head" in found["ignore"] and "model.layers.0.mlp.up_proj" in found["ignore"]
    tied = loaded(tmp_path / "out")
    assert np.abs(logits(tied) - evaluated(tmp_path / "out")).max() < 2e-5


@pytest.mark.parametrize("made", ["whole", "mixed", "asymmetric"])
def test_sizes_are_those_of_the_files(made: str, request: pytest.FixtureRequest) -> None:
    folder, record = request.getfixturevalue(made)
    files = list(folder.glob("*.safetensors"))
    assert (len(files) > 10) == (made == "mixed")
    assert record.file_bytes == sum(file.stat().st_size for file in files)
    assert sum(one.nbytes for one in record.tensors) == sum(value.nbytes for value in stored(folder).values())
    said = record.to_json()
    assert said["bpw"] == 8 * said["file_bytes"] / said["parameters"]
    assert json.loads(json.dumps(said))["tensors"][0]["name"] == record.tensors[0].name


def test_a_plan_has_the_record_s_bytes(tiny_qwen3: Path, mixed: Folder, asymmetric: Folder) -> None:
    plans = (
        plan_folder(tiny_qwen3, "W4A16", group=32, tensor_types=MIXED, shard_bytes=100_000),
        plan_folder(tiny_qwen3, "W4A16_ASYM", group=0),
    )
    for plan, (_, record) in zip(plans, (mixed, asymmetric), strict=True):
        assert (plan.file_bytes, plan.parameters, plan.bpw) == (
            record.file_bytes,
            record.parameters,
            record.bpw,
        )
        for row, one in zip(plan.rows, record.tensors, strict=True):
            assert vars(row).items() <= vars(one).items()
        json.dumps(plan.to_json())


def test_shards_and_threads_change_no_byte(
    tiny_qwen3: Path, mixed: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tiny_qwen3, tmp_path / "one", "W4A16", group=32, tensor_types=MIXED)
    one, many = stored(tmp_path / "one"), stored(mixed[0])
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)
    monkeypatch.setattr(threads.numba, "get_num_threads", lambda: 3)
    write_folder(tiny_qwen3, tmp_path / "three", "W4A16", group=32, tensor_types=MIXED)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "three" / file.name).read_bytes()


def test_files_beside_the_weights_are_copied_and_code_is_not(tiny_qwen3: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_qwen3, tmp_path / "model")
    extra = {
        "generation_config.json": '{"temperature": 0.6}', "chat_template.jinja": "{{ messages }}",
        "preprocessor_config.json": "{}", "merges.txt": "a b",
    }  # fmt: skip
    for name, text in extra.items():
        (model / name).write_text(text)
    (model / "pytorch_model.bin").write_bytes(b"pickle")
    (model / "modeling_own.py").write_text("raise SystemExit")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "modeling_own.Own"}}))
    write_folder(model, tmp_path / "out", "BF16")
    copied = {*extra, "tokenizer.json", "tokenizer_config.json"}
    for name in copied:
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()
    assert {file.name for file in (tmp_path / "out").iterdir()} == copied | {
        "config.json",
        "model.safetensors",
    }
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config
    (tmp_path / "secret").write_text("of someone")
    (model / "vocab.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(DamagedFileError, match="links out of the model folder"):
        write_folder(model, tmp_path / "again", "BF16")


# ---------------------------------------------------------------- schemes, groups, rounders


def narrow(folder: Path, ffn: int) -> Path:
    """Write a Qwen3 of one layer whose down projection is `ffn` wide, in float16."""
    config = published_config("qwen3-tiny", layers=1, dtype="F16") | {"intermediate_size": ffn}

    def data(ref: TensorRef) -> TensorData:
        return TensorData(ref.name, "F16", ref.shape, [ref.read().astype("<f2")])

    write_safetensors(folder, map(data, synth_tensors(config, 0, "F16").values()), config)
    return folder


def test_a_width_that_no_group_divides_falls_back_and_says_so(tmp_path: Path) -> None:
    record = write_folder(narrow(tmp_path / "m", 96), tmp_path / "out", "W4A16")
    [down] = [one for one in record.tensors if "down_proj" in one.name]
    assert (down.scheme, down.group) == ("W4A16", 32)
    assert down.note == "groups of 32: 128 does not divide 96 columns"
    assert [
        group["weights"]["group_size"] for group in settings(tmp_path / "out")["config_groups"].values()
    ] == [128, 32]
    assert stored(tmp_path / "out")["model.layers.0.mlp.down_proj.weight_scale"].dtype == torch.float16
    assert np.abs(logits(loaded(tmp_path / "out")) - evaluated(tmp_path / "out")).max() < 2e-5
    plan = plan_folder(narrow(tmp_path / "n", 80), "W4A16")
    [down] = [row for row in plan.rows if "down_proj" in row.name]
    assert (down.scheme, down.group, down.nbytes) == ("BF16", None, 2 * 256 * 80)
    assert down.note == "kept: no group of W4A16 divides 80 columns"


def test_the_first_rule_that_matches_wins(tiny_qwen3: Path) -> None:
    rules = [(r"layers\.0\.", "BF16"), ("mlp", "W8A16"), ("lm_head", "W8A16")]
    plan = plan_folder(tiny_qwen3, "W4A16", tensor_types=rules, ignore=["model.layers.2.self_attn.o_proj"])
    schemes = {row.name: row.scheme for row in plan.rows}
    assert {scheme for name, scheme in schemes.items() if "layers.0." in name} == {"BF16"}
    assert schemes["model.layers.1.mlp.down_proj.weight"] == schemes["lm_head.weight"] == "W8A16"
    assert schemes["model.layers.1.self_attn.o_proj.weight"] == "W4A16"
    assert schemes["model.layers.2.self_attn.o_proj.weight"] == schemes["model.embed_tokens.weight"] == "BF16"
    with pytest.raises(BitsmithError, match="down=BF16 changes nothing: mlp comes before it"):
        plan_folder(tiny_qwen3, "W4A16", tensor_types=[*rules, ("down", "BF16")])


def test_statistics_guide_the_codes(tmp_path: Path) -> None:
    model, text = narrow(tmp_path / "m", 128), tmp_path / "text.txt"
    shutil.copyfile(DEMO_MODEL / "tokenizer.json", model / "tokenizer.json")
    text.write_text("".join(f"{n} squared is {n * n}.\n" for n in range(400)))
    calibrate(model, text, tmp_path / "stats", ctx_tokens=64, chunks=8, saliency=False)
    held = {}
    for rounder in ("nearest", "gptq"):
        record = write_folder(
            model, tmp_path / rounder, "W4A16", statistics=tmp_path / "stats", rounder=rounder
        )
        coded = [one for one in record.tensors if one.scheme == "W4A16"]
        assert len(coded) == 7 and {one.rounder for one in coded} == {rounder}
        held[rounder] = np.mean([one.held_error for one in coded if one.held_error is not None])
        assert all(0 < one.relative_error < 0.05 for one in coded)
    assert held["gptq"] < held["nearest"]


# ---------------------------------------------------------------- refusals


def torn(part: str) -> Callable[[Path, Path], Any]:
    return lambda m, out: write_folder(m, out, "W4A16", tensor_types=[(part, "W8A16")])


def unfinished(m: Path, out: Path) -> Any:
    """Put a NaN into a copied model's gate projection."""
    model = shutil.copytree(m, out.with_name("nan"))
    with open_checkpoint(model) as checkpoint:
        ref = checkpoint["model.layers.0.mlp.gate_proj.weight"]
        start = ref.offset  # type: ignore[attr-defined]
    blob = bytearray((model / "model.safetensors").read_bytes())
    blob[start : start + 2] = struct.pack("<H", 0x7FC0)
    (model / "model.safetensors").write_bytes(blob)
    return write_folder(model, out, "W4A16")


def packed_twice(m: Path, out: Path) -> Any:
    write_folder(m, out.with_name("once"), "W4A16")
    return write_folder(out.with_name("once"), out, "W8A16")


REFUSALS: dict[str, tuple[Callable[[Path, Path], Any], type[BitsmithError], str]] = {
    "scheme": (lambda m, o: write_folder(m, o, "W3A16"), BitsmithError, "'W3A16'; known: W4A16"),
    "scheme of a rule": (torn("("), BitsmithError, "bad regular expression"),
    "rule of nothing": (torn("embed"), BitsmithError, "changes nothing: no linear of the text model"),
    "group": (lambda m, o: write_folder(m, o, "W4A16", group=48), BitsmithError, "groups of 32, 64, 128"),
    "ignored nothing": (
        lambda m, o: write_folder(m, o, "W4A16", ignore=["model.layers.9.mlp.up_proj"]), BitsmithError,
        "'model.layers.9.mlp.up_proj' names no linear",
    ),
    "ignored a class": (
        lambda m, o: write_folder(m, o, "W4A16", ignore=["Linear"]), BitsmithError, "'Linear' names no"
    ),
    "ignored by suffix": (
        lambda m, o: write_folder(m, o, "W4A16", ignore=["re:head"]), BitsmithError, "'re:head' names no"
    ),
    "q apart": (
        torn("q_proj"), BitsmithError,
        "self_attn.qkv_proj as one.*q_proj W8A16 in groups of 128, .*k_proj W4A16 in groups of 128",
    ),
    "up apart": (
        lambda m, o: write_folder(m, o, "W4A16", ignore=["model.layers.1.mlp.up_proj"]), BitsmithError,
        "model.layers.1.mlp.gate_up_proj as one.*up_proj as stored",
    ),
    "zero points beside": (
        lambda m, o: write_folder(m, o, "W4A16", tensor_types=[("down", "W4A16_ASYM")]), BitsmithError,
        "W4A16 in groups of 128 and W4A16_ASYM in groups of 128 cannot be in one folder",
    ),
    "rounder": (
        lambda m, o: write_folder(m, o, "W4A16", rounder="gptq"), BitsmithError, "gptq needs statistics"
    ),
    "no config": (
        lambda m, o: write_folder(m.parent / "no.gguf", o, "W4A16"), BitsmithError, "does not exist"
    ),
    "NaN": (unfinished, DamagedFileError, "gate_proj.weight.*is nan at"),
    "packed": (packed_twice, UnsupportedError, "is packed as int4_g128 already; give the checkpoint"),
    "onto itself": (lambda m, o: write_folder(m, m, "W4A16", overwrite=True), OutputError, "is the input"),
    "there": (
        lambda m, o: [write_folder(m, o.with_name("there"), scheme) for scheme in ("BF16", "W4A16")],
        OutputError, "--overwrite",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_leave_nothing_behind(case: str, tiny_qwen3: Path, tmp_path: Path) -> None:
    act, kind, message = REFUSALS[case]
    with pytest.raises(kind, match=message):
        act(tiny_qwen3, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not any(tmp_path.glob(".*"))


def test_deltanet_s_fused_projections_stay_together(tiny_qwen3_5: Path) -> None:
    for part, whole in (("in_proj_z", "in_proj_qkvz"), ("in_proj_a", "in_proj_ba")):
        with pytest.raises(BitsmithError, match=re.escape(f"linear_attn.{whole} as one")):
            plan_folder(tiny_qwen3_5, "W4A16", tensor_types=[(part, "W8A16")])
    plan = plan_folder(tiny_qwen3_5, "W4A16", tensor_types=[(r"in_proj_(a|b)\.", "W8A16")])
    assert sum(row.scheme == "W8A16" for row in plan.rows) == 6


def test_schemes_are_the_presets_of_the_library() -> None:
    from compressed_tensors.quantization import is_preset_scheme

    assert all(is_preset_scheme(scheme) for scheme in SCHEMES[:3])
