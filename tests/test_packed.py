"""Packed checkpoints: 8-bit floats are read, other packings and codes without settings are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bitsmith.archs import claim
from bitsmith.errors import BitsmithError, DamagedFileError, UnsupportedError
from bitsmith.formats.minifloat import E2M1, E4M3, E8M0
from bitsmith.store import open_checkpoint

Tensors = dict[str, torch.Tensor]
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}


def save(folder: Path, tensors: Tensors, config: dict[str, Any] | None) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_small_floats_against_torch_and_by_hand() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    assert np.array_equal(E4M3, codes.view(torch.float8_e4m3fn).float().numpy(), equal_nan=True)
    assert E2M1.tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
    expected = codes.view(torch.float8_e8m0fnu).float().numpy()
    assert np.array_equal(E8M0, expected, equal_nan=True)


def eight_bits(rows: int = 200, columns: int = 300) -> Tensors:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-rows // 128), -(-columns // 128)) + 0.5
    return {"a.weight": weight, "a.weight_scale_inv": scales, "b.weight": torch.ones(2, 2)}


def test_blocks_of_8_bit_floats_are_read_with_their_scales(tmp_path: Path) -> None:
    tensors = eight_bits()
    folder = save(tmp_path / "m", tensors, {"quantization_config": FP8})
    scales = tensors["a.weight_scale_inv"]
    wide = scales.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300]
    expected = (tensors["a.weight"].float() * wide).numpy()
    with open_checkpoint(folder) as opened:
        assert set(opened) == {"a.weight", "b.weight"}
        ref = opened["a.weight"]
        assert (ref.shape, ref.dtype, ref.nbytes) == ((200, 300), "FP8_128x128", 60_000 + 24)
        assert np.array_equal(ref.read(), expected)
        assert np.array_equal(ref.read(100, 150), expected[100:150])
        assert opened.config == {}


def spoiled(name: str, tensor: torch.Tensor | None) -> Tensors:
    tensors = eight_bits()
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    return tensors


SCALES = "a.weight_scale_inv"
FAULTS_8 = {
    "none": (spoiled(SCALES, None), FP8, DamagedFileError, f"has no scales: '{SCALES}' is missing"),
    "short": (
        spoiled(SCALES, torch.ones(2, 2)),
        FP8,
        DamagedFileError,
        r"F32 \[2, 2\], expected .* \[2, 3\]",
    ),
    "type": (spoiled(SCALES, torch.ones(2, 3).int()), FP8, DamagedFileError, "are I32"),
    "left": (spoiled("b.weight_scale_inv", torch.ones(1, 1)), FP8, DamagedFileError, "scales of no F8_E4M3"),
    "wide": (spoiled("b.weight", torch.ones(2, 2).to(torch.float8_e5m2)), FP8, UnsupportedError, "F8_E5M2"),
    "tensor": (eight_bits(), {"quant_method": "fp8"}, UnsupportedError, "weight_block_size None"),
    "zero": (
        eight_bits(),
        FP8 | {"weight_block_size": [0, 1]},
        UnsupportedError,
        r"weight_block_size \[0, 1\]",
    ),
}


@pytest.mark.parametrize("fault", FAULTS_8)
def test_8_bit_floats_that_do_not_fit_are_refused(fault: str, tmp_path: Path) -> None:
    tensors, settings, kind, words = FAULTS_8[fault]
    with pytest.raises(kind, match=words):
        open_checkpoint(save(tmp_path / "m", tensors, {"quantization_config": settings}))


CODES = torch.ones(4, 8, dtype=torch.int32)
UNKNOWN = {
    "gptq": {"a.qweight": CODES, "a.qzeros": CODES, "a.scales": torch.ones(1, 8), "a.g_idx": CODES[0]},
    "awq": {"a.qweight": CODES, "a.qzeros": CODES, "a.scales": torch.ones(1, 8)},
    "mxfp4": {"a.gate_up_proj_blocks": CODES.byte(), "a.gate_up_proj_scales": CODES.byte()},
    "hqq": {"a.W_q": CODES.byte(), "a.scale": torch.ones(1)},
    "aqlm": {"a.codes": CODES.short(), "a.codebooks": torch.ones(2, 2)},
    "torchao": {"a.weight": CODES.to(torch.int8)},
    "quanto": {"a.weight._data": CODES.to(torch.int8), "a.weight._scale": torch.ones(1)},
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("method", UNKNOWN)
def test_unknown_packings_are_refused_by_name(method: str, nested: bool, tmp_path: Path) -> None:
    said: dict[str, Any] = {"quantization_config": {"quant_method": method, "bits": 4}}
    folder = save(tmp_path / "m", UNKNOWN[method], {"text_config": said} if nested else said)
    words = f"m: is quantized by {method}, which cannot be read; known: .*fp8, mlx. Give the original"
    with pytest.raises(UnsupportedError, match=words) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("said", [5, "int8", {"quant_method": None}, {"bits": 4}, [1]])
def test_settings_of_no_known_shape_are_refused(said: Any, tmp_path: Path) -> None:
    folder = save(tmp_path / "m", {"a.weight": CODES}, {"quantization_config": said})
    with pytest.raises(BitsmithError, match=r"is quantized by .*, which cannot be read"):
        open_checkpoint(folder)


@pytest.mark.parametrize("config", [None, {}, {"quantization": {}}, {"quantization_config": None}])
@pytest.mark.parametrize(
    "name", ["a.weight", "weight", "a.qweight", "a.weight_packed", "a.codes", "a.w_blocks"]
)
def test_codes_without_settings_are_refused(name: str, config: dict[str, Any] | None, tmp_path: Path) -> None:
    for codes in (CODES.byte(), CODES):
        folder = save(tmp_path / "m", {name: codes, "a.scales": torch.ones(2)}, config)
        with pytest.raises(UnsupportedError, match="codes of a packed weight, and no quantization_config"):
            open_checkpoint(folder)


def test_integer_buffers_are_no_codes(tmp_path: Path) -> None:
    tensors = {"a.position_ids": CODES, "a.attn.bias": CODES.byte(), "a.weight": torch.ones(2, 2)}
    with open_checkpoint(save(tmp_path / "m", tensors, {})) as opened:
        assert set(opened) == set(tensors)


def test_methods_without_a_name_are_known_by_their_settings(tmp_path: Path) -> None:
    for said in ({"load_in_4bit": True}, {"load_in_8bit": True}):
        with pytest.raises(BitsmithError) as caught:
            open_checkpoint(save(tmp_path / "m", {"a.weight": CODES.short()}, {"quantization_config": said}))
        assert "which cannot be read" not in str(caught.value)
    packed = {
        "a.weight": torch.zeros(1, 4, dtype=torch.uint32),
        "a.scales": torch.ones(1, 1),
        "a.biases": torch.ones(1, 1),
    }
    folder = save(tmp_path / "m", packed, {"quantization_config": {"bits": 4, "group_size": 32}})
    with open_checkpoint(folder) as opened:
        assert opened["a.weight"].read().tolist() == [[1.0] * 32]


def test_settings_left_over_among_floats_are_ignored(tiny_qwen3: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny_qwen3 / "model.safetensors")
    config = json.loads((tiny_qwen3 / "config.json").read_text())
    for said in ({"quant_method": "bitsandbytes", "load_in_4bit": True}, {"quant_method": "gptq"}):
        folder = save(tmp_path / "m", tensors, {**config, "quantization_config": said})
        with open_checkpoint(folder) as opened:
            assert len(claim(opened)) == len(tensors)
            assert "quantization_config" not in opened.config


def test_integers_are_no_weights_of_a_known_model(tiny_qwen3: Path, tmp_path: Path) -> None:
    name = "model.layers.0.input_layernorm.weight"
    tensors = load_file(tiny_qwen3 / "model.safetensors")
    tensors[name] = tensors[name].to(torch.bool)
    config = json.loads((tiny_qwen3 / "config.json").read_text())
    with (
        pytest.raises(UnsupportedError, match="is stored as BOOL"),
        open_checkpoint(save(tmp_path / "m", tensors, config)) as opened,
    ):
        claim(opened)
