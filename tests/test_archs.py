"""Specs, claims and the export: against published totals, gguf's names, transformers and real llama.cpp."""

from __future__ import annotations

import math
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from bitsmith.archs import ARCHITECTURES, Qwen3, Qwen35, architecture_of, claim, export_view, import_view
from bitsmith.archs import tokenizer_metadata as tokenizer_keys
from bitsmith.archs.published import published_config
from bitsmith.errors import BitsmithError, UnsupportedError
from bitsmith.formats import format_named
from bitsmith.lab.synth import synth_tensors
from bitsmith.store import Checkpoint, TensorInfo, open_checkpoint, write_gguf

PUBLISHED = {  # parameters and tensors of the published safetensors
    "0.8B": (873_438_784, 488),
    "2B": (2_274_069_824, 632),
    "4B": (4_659_865_088, 738),
    "9B": (9_653_104_368, 775),
    "27B": (27_781_427_952, 1199),
}
FIXTURES = ["tiny_qwen3_5", "tiny_qwen3_5_tied", "tiny_qwen3", "demo_model"]


@pytest.fixture(params=FIXTURES)
def folder(request) -> Path:
    return request.getfixturevalue(request.param)


def in_memory(config: dict) -> Checkpoint:
    checkpoint = Checkpoint(Path("memory"), synth_tensors(config))
    checkpoint.config = config
    return checkpoint


def write_float32_gguf(folder: Path, out: Path) -> Path:
    checkpoint = open_checkpoint(folder)
    export = export_view(checkpoint)
    tokenizer, _ = tokenizer_keys(checkpoint, export.arch)
    refs = {tensor.gguf_name: tensor.ref for tensor in export.tensors}
    infos = [TensorInfo(tensor.gguf_name, tensor.ref.shape, "F32") for tensor in export.tensors]
    f32 = format_named("F32")
    write_gguf(
        out,
        export.metadata | tokenizer,
        infos,
        lambda info: (f32.encode(refs[info.name].read(a, b)) for a, b in refs[info.name].slices()),
    )
    return out


@pytest.mark.parametrize("size", PUBLISHED)
def test_specs_add_up_to_the_published_totals(size):
    config = published_config(size)
    specs = ARCHITECTURES[config["model_type"]](config).specs()
    assert (sum(math.prod(spec.shape) for spec in specs), len(specs)) == PUBLISHED[size]
    assert len({spec.name for spec in specs}) == len(specs)


def test_every_stored_tensor_is_claimed_once(folder):
    checkpoint = open_checkpoint(folder)
    pairs = claim(checkpoint)
    assert sorted(spec.name for spec, _ in pairs) == sorted(checkpoint)
    for spec, ref in pairs:
        assert spec.shape == ref.shape
        assert len(spec.axes) == len(spec.shape)
        assert (spec.norm is not None) == (spec.role.startswith("norm.") and spec.component != "vision")
    names = [spec.gguf_name for spec, _ in pairs if spec.gguf_name is not None]
    assert len(set(names)) == len(names)


def test_vision_is_set_aside_and_mtp_is_not(tiny_qwen3_5):
    export = export_view(open_checkpoint(tiny_qwen3_5))
    assert {spec.component for spec in export.set_aside} == {"vision"}
    assert len(export.set_aside) == 21
    mtp = [tensor.gguf_name for tensor in export.tensors if tensor.spec.component == "mtp"]
    assert len(mtp) == 15
    assert all(name.startswith("blk.4.") for name in mtp)
    assert export.metadata["qwen35.block_count"] == 5
    assert export.metadata["qwen35.nextn_predict_layers"] == 1


def test_inputs_of_one_activation_share_its_site(tiny_qwen3_5):
    by_role: dict[tuple[int, str], str] = {}
    for spec, _ in claim(open_checkpoint(tiny_qwen3_5)):
        if spec.site is not None:
            by_role[spec.layer if spec.layer is not None else -1, spec.role] = spec.site
    assert len({by_role[0, role] for role in ("delta.in_qkv", "delta.in_z", "delta.in_b", "delta.in_a")}) == 1
    assert len({by_role[3, role] for role in ("attn.q", "attn.k", "attn.v")}) == 1
    assert by_role[3, "ffn.gate"] == by_role[3, "ffn.up"]
    distinct = [by_role[3, role] for role in ("attn.q", "attn.o", "ffn.up", "ffn.down")]
    assert len({*distinct, by_role[-1, "head"], by_role[4, "mtp.fc"], by_role[4, "attn.q"]}) == 7


def name_in_gguf_package(name: str, layers: int, table: gguf.TensorNameMap) -> str | None:
    """Return the gguf package's name of a stored tensor; MTP counts as a layer of its own."""
    heads = {
        "mtp.fc.weight": gguf.MODEL_TENSOR.NEXTN_EH_PROJ,
        "mtp.pre_fc_norm_embedding.weight": gguf.MODEL_TENSOR.NEXTN_ENORM,
        "mtp.pre_fc_norm_hidden.weight": gguf.MODEL_TENSOR.NEXTN_HNORM,
        "mtp.norm.weight": gguf.MODEL_TENSOR.NEXTN_SHARED_HEAD_NORM,
    }
    if name in heads:
        return gguf.TENSOR_NAMES[heads[name]].format(bid=layers) + ".weight"
    name = name.replace("language_model.", "").replace(".dt_bias", ".dt_proj.bias")
    if name.startswith("mtp.layers."):
        number, rest = name.removeprefix("mtp.layers.").split(".", 1)
        name = f"model.layers.{layers + int(number)}.{rest}"
    return table.get_name(name, try_suffixes=(".weight", ".bias"))


def test_gguf_names_are_those_of_the_gguf_package(folder):
    export = export_view(open_checkpoint(folder))
    kind = {"qwen3": gguf.MODEL_ARCH.QWEN3, "qwen35": gguf.MODEL_ARCH.QWEN35}[export.arch.gguf_arch]
    table = gguf.get_tensor_name_map(kind, export.metadata[f"{export.arch.gguf_arch}.block_count"])
    layers = export.arch.number("num_hidden_layers")
    for tensor in export.tensors:
        assert tensor.gguf_name == name_in_gguf_package(tensor.spec.name, layers, table)


def test_float_only_tensors_are_those_llama_cpp_keeps(folder):
    for tensor in export_view(open_checkpoint(folder)).tensors:
        name = tensor.gguf_name
        kept = len(tensor.ref.shape) == 1 or name.endswith("_norm.weight") or "ssm_conv1d" in name
        assert tensor.dtype == ("F32" if kept else "BF16")


@pytest.mark.parametrize("fixture", ["tiny_qwen3_5", "tiny_qwen3_5_tied", "tiny_qwen3"])
def test_import_undoes_export_on_disk(fixture, request, tmp_path):
    checkpoint = open_checkpoint(request.getfixturevalue(fixture))
    prefix = architecture_of(checkpoint).text_prefix
    back = import_view(open_checkpoint(write_float32_gguf(checkpoint.path, tmp_path / "model.gguf")))
    kept = [name for name in checkpoint if not name.startswith("model.visual.")]
    assert sorted(back) == sorted(name.replace(prefix, "model.") for name in kept)
    for name in kept:
        after = back[name.replace(prefix, "model.")].read()
        assert np.abs(after - checkpoint[name].read()).max() <= 2.0**-22, name
    assert architecture_of(back).gguf_metadata() == architecture_of(checkpoint).gguf_metadata()


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("fixture", "class_name"),
    [
        ("tiny_qwen3_5", "Qwen3_5ForConditionalGeneration"),
        ("tiny_qwen3_5_tied", "Qwen3_5ForCausalLM"),
        ("tiny_qwen3", "Qwen3ForCausalLM"),
    ],
)
def test_real_llama_cpp_computes_what_transformers_does(fixture, class_name, request, tmp_path):
    pytest.importorskip("xllamacpp")
    import transformers

    from llama_oracle import Llama

    folder = request.getfixturevalue(fixture)
    tokens = np.random.default_rng(5).integers(0, 4096, 48).tolist()
    with Llama(write_float32_gguf(folder, tmp_path / "model.gguf")) as llama:
        ours = llama.last_logits(tokens)
    model = getattr(transformers, class_name).from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor([tokens])).logits[0, -1].numpy()
    # llama.cpp keeps keys and values in F16; a misplaced head or norm differs by about the maximum itself
    assert np.abs(ours - theirs).max() < 1e-2 * np.abs(theirs).max()


@pytest.mark.parametrize(
    ("fixture", "class_name"),
    [("tiny_qwen3_5_tied", "Qwen3_5TextConfig"), ("tiny_qwen3", "Qwen3Config")],
)
def test_imported_config_is_the_original_to_transformers(fixture, class_name, request, tmp_path):
    import transformers

    checkpoint = open_checkpoint(request.getfixturevalue(fixture))
    back = import_view(open_checkpoint(write_float32_gguf(checkpoint.path, tmp_path / "model.gguf")))
    read = getattr(transformers, class_name).from_dict
    before, after = read(dict(checkpoint.config)).to_dict(), read(dict(back.config)).to_dict()
    for key in set(before) - {"transformers_version", "pad_token_id", "mtp_use_dedicated_embeddings"}:
        assert after[key] == before[key], key


def test_configs_of_transformers_4_and_without_defaults_give_the_same_metadata():
    config = published_config("tiny", vision=False)
    reference = Qwen35(config).gguf_metadata()
    old = {key: value for key, value in config.items() if key not in ("rope_parameters", "layer_types")}
    old |= {"rope_theta": 1e7, "partial_rotary_factor": 0.25, "rope_scaling": {"type": "default"}}
    older = Qwen35(old | {"rope_scaling": None}).gguf_metadata()
    assert older.pop("qwen35.rope.dimension_sections") == [11, 11, 10, 0]
    reference.pop("qwen35.rope.dimension_sections")
    assert reference.pop("qwen35.attention.recurrent_layers") == [True, True, True, False, False]
    assert older == reference
    assert Qwen35(old).layer_types == Qwen35(config).layer_types
    scaled = Qwen3(
        published_config("qwen3-tiny")
        | {
            "rope_parameters": None,
            "rope_theta": 1e6,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        }
    ).gguf_metadata()
    assert scaled["qwen3.rope.scaling.type"] == "yarn"
    assert scaled["qwen3.rope.scaling.factor"] == 4.0
    assert scaled["qwen3.rope.scaling.original_context_length"] == 32768
    assert scaled["qwen3.rope.freq_base"] == 1e6


def test_a_stored_head_is_used_though_the_config_says_tied():
    config = published_config("tiny", vision=False, tied=False)
    checkpoint = in_memory(config)
    checkpoint.config = config | {"tie_word_embeddings": True}
    assert "output.weight" in [tensor.gguf_name for tensor in export_view(checkpoint).tensors]


def test_mtp_follows_what_is_stored_not_what_the_config_says():
    checkpoint = in_memory(published_config("tiny", mtp=False))
    checkpoint.config["text_config"]["mtp_num_hidden_layers"] = 1
    assert "qwen35.nextn_predict_layers" not in export_view(checkpoint).metadata
    assert export_view(checkpoint).metadata["qwen35.block_count"] == 4


def refused(checkpoint: Checkpoint, error: type[BitsmithError]) -> str:
    with pytest.raises(error) as caught:
        export_view(checkpoint)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_wrong_checkpoints_are_refused_with_what_is_wrong():
    config = published_config("qwen3-tiny")
    tensors = synth_tensors(config)

    def checkpoint(changed: dict | None = None, **new: object) -> Checkpoint:
        made = Checkpoint(Path("folder"), {k: v for k, v in (changed or tensors).items() if v is not None})
        made.config = config | new
        return made

    unknown = refused(checkpoint(model_type="llama5"), UnsupportedError)
    assert "'llama5'" in unknown
    assert "qwen3, qwen3_5, qwen3_5_text" in unknown
    bare = Checkpoint(Path("folder"), tensors)
    assert "config.json is missing" in refused(bare, BitsmithError)
    assert "model_type" in refused(checkpoint(model_type=None), BitsmithError)
    stray = tensors["lm_head.weight"]
    assert "tensor extra.weight" in refused(checkpoint(tensors | {"extra.weight": stray}), UnsupportedError)
    gaps = {"model.norm.weight": None, "model.layers.1.mlp.up_proj.weight": None}
    missing = refused(checkpoint(tensors | gaps), BitsmithError)
    assert all(name in missing for name in gaps)
    shape = refused(checkpoint(intermediate_size=511), BitsmithError)
    assert "512×256" in shape
    assert "511×256" in shape
    assert "model.layers.0.mlp" in shape
    assert "hidden_size is 'big'" in refused(checkpoint(hidden_size="big"), BitsmithError)
    assert "fp8" in refused(checkpoint(quantization_config={"quant_method": "fp8"}), UnsupportedError)
    rope = {"rope_type": "llama3", "rope_theta": 1e6, "factor": 8.0}
    assert "'llama3'" in refused(checkpoint(rope_parameters=rope), UnsupportedError)
    assert "sliding window" in refused(checkpoint(use_sliding_window=True), UnsupportedError)


def test_wrong_ggufs_are_refused_with_what_is_wrong(tiny_qwen3_5):
    export = export_view(open_checkpoint(tiny_qwen3_5))
    refs = {tensor.gguf_name: tensor.ref for tensor in export.tensors}

    def message(tensors: dict, metadata: dict) -> str:
        checkpoint = Checkpoint(Path("model.gguf"), tensors)
        checkpoint.metadata = metadata
        with pytest.raises(BitsmithError) as caught:
            import_view(checkpoint)
        return str(caught.value)

    without = {name: ref for name, ref in refs.items() if name != "blk.0.ssm_a"}
    assert "blk.0.ssm_a" in message(without, export.metadata)
    assert "blk.9.attn_q.weight" in message(
        refs | {"blk.9.attn_q.weight": refs["output.weight"]}, export.metadata
    )
    assert "'llama'" in message(refs, export.metadata | {"general.architecture": "llama"})
    assert "ssm.group_count" in message(refs, export.metadata | {"qwen35.ssm.group_count": -1})
    assert "token_embd.weight" in message({}, export.metadata)
