"""MLX's packed weights and its layout of Qwen3.5, written by a packer that knows their description alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bitsmith.archs import claim
from bitsmith.errors import BitsmithError, DamagedFileError, UnsupportedError
from bitsmith.run.assay import assay
from bitsmith.run.continuation import continue_prompt
from bitsmith.run.evaluate import evaluate
from bitsmith.run.execute import compress
from bitsmith.run.folder import write_folder
from bitsmith.run.inspect import inspect
from bitsmith.store import open_checkpoint

Tensors = dict[str, torch.Tensor]
AFFINE = {"group_size": 64, "bits": 4, "mode": "affine"}
SHIFTED = ("input_layernorm", "post_attention_layernorm", "q_norm", "k_norm", "model.norm")


def stream(codes: np.ndarray, bits: int) -> torch.Tensor:
    """Pack a row's codes as one integer, least significant first, cut into words of 32 bits."""
    words = []
    for row in codes.tolist():
        number = sum(code << bits * place for place, code in enumerate(row))
        words.append([number >> 32 * n & 0xFFFFFFFF for n in range(len(row) * bits // 32)])
    return torch.from_numpy(np.array(words, dtype=np.uint32))


def pack(name: str, weight: torch.Tensor, bits: int, group: int, scale_type: torch.dtype) -> Tensors:
    """Round to the nearest of evenly spaced values between a group's least and largest."""
    rows = weight.float().numpy().reshape(len(weight), -1, group)
    low, high = rows.min(axis=2, keepdims=True), rows.max(axis=2, keepdims=True)
    step = np.maximum((high - low) / (2**bits - 1), 1e-7)
    codes = np.clip(np.rint((rows - low) / step), 0, 2**bits - 1).astype(np.int64)
    module = name.removesuffix(".weight")
    return {
        name: stream(codes.reshape(len(weight), -1), bits),
        f"{module}.scales": torch.from_numpy(step[:, :, 0]).to(scale_type),
        f"{module}.biases": torch.from_numpy(low[:, :, 0]).to(scale_type),
    }


def save(folder: Path, tensors: Tensors, config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def mlx_name(name: str) -> str:
    """Name a tensor of a text-only Qwen3.5 as mlx-lm does."""
    return f"language_model.{name}"


def converted(
    model: Path, folder: Path, *, bits: int | None = 4, scale_type: torch.dtype = torch.bfloat16
) -> Path:
    """Write `model` as mlx-lm's converter does; `bits` None leaves the weights as they are."""
    tensors: Tensors = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        named = mlx_name(name)
        if name.endswith("conv1d.weight"):
            tensors[named] = tensor.movedim(2, 1)
        elif any(name.endswith(f"{part}.weight") for part in SHIFTED):
            tensors[named] = tensor + 1.0
        elif bits and tensor.ndim == 2 and tensor.shape[1] % 64 == 0:
            tensors |= pack(named, tensor, bits, 64, scale_type)
        else:
            tensors[named] = tensor
    config = json.loads((model / "config.json").read_text())
    if bits:
        config["quantization"] = config["quantization_config"] = {**AFFINE, "bits": bits}
    save(folder, tensors, config)
    for file in model.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def packed(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in 8 bits."""
    return converted(demo_model, tmp_path_factory.mktemp("mlx") / "packed", bits=8)


def test_bytes_by_hand(tmp_path: Path) -> None:
    """Two rows of 32 codes of 4 bits, groups of 32: `scale * code + bias`."""
    words = torch.tensor([[0x76543210, 0xFEDCBA98, 0, 0xF], [0, 0, 0, 0x10000000]], dtype=torch.uint32)
    tensors = {
        "a.weight": words,
        "a.scales": torch.tensor([[0.5], [2.0]], dtype=torch.float16),
        "a.biases": torch.tensor([[-1.0], [3.0]], dtype=torch.float16),
        "b.weight": torch.ones(2, 2),
    }
    folder = save(tmp_path / "m", tensors, {"quantization": {"group_size": 32, "bits": 4}})
    first = [0.5 * code - 1 for code in [*range(16), *[0] * 8, 15, *[0] * 7]]
    second = [3.0] * 31 + [5.0]
    with open_checkpoint(folder) as opened:
        assert set(opened) == {"a.weight", "b.weight"}
        ref = opened["a.weight"]
        assert (ref.shape, ref.dtype, ref.nbytes) == ((2, 32), "MLX_4bit_g32", 32 + 4 + 4)
        assert ref.read().tolist() == [first, second]
        assert ref.read(1, 2).tolist() == [second]
        assert ref.read().dtype == np.float32
        assert opened.config == {}


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_every_width_and_group(bits: int, group: int, tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(bits)
    weight = torch.randn(3, 256, generator=random)
    scale_type = {32: torch.float32, 64: torch.float16, 128: torch.bfloat16}[group]
    tensors = pack("x.weight", weight, bits, group, scale_type)
    scales, biases = (
        tensors[f"x.{part}"].float().numpy().repeat(group, axis=1) for part in ("scales", "biases")
    )
    words = [sum(int(w) << 32 * n for n, w in enumerate(row)) for row in tensors["x.weight"].tolist()]
    codes = np.array([[word >> bits * n & (1 << bits) - 1 for n in range(256)] for word in words], np.float32)
    own = {"group_size": 64, "bits": 4, "x": {"group_size": group, "bits": bits}}
    with open_checkpoint(save(tmp_path / "m", tensors, {"quantization": own})) as opened:
        read = opened["x.weight"].read()
        assert np.array_equal(read, codes * scales + biases)
        assert np.abs(read - weight.numpy()).max() <= 0.6 * float(scales.max()) + 0.05
        assert np.array_equal(opened["x.weight"].read(1, 3), read[1:])


def test_experts_and_powers_of_two(tmp_path: Path) -> None:
    experts = pack("e.weight", torch.randn(6, 64), 4, 64, torch.float32)
    tensors = {name: tensor.reshape(2, 3, -1) for name, tensor in experts.items()}
    tensors["p.weight"] = torch.tensor([[0x76543210, 0xFEDCBA98, 0, 1]], dtype=torch.uint32)
    tensors["p.scales"] = torch.tensor([[128]], dtype=torch.uint8)
    config = {"quantization": {**AFFINE, "p": {"group_size": 32, "bits": 4, "mode": "mxfp4"}}}
    with open_checkpoint(save(tmp_path / "m", tensors, config)) as opened:
        assert opened["e.weight"].shape == (2, 3, 64)
        assert opened["e.weight"].read(1, 2).shape == (1, 3, 64)
        ladder = [0, 1, 2, 3, 4, 6, 8, 12]
        expected = [*ladder, *[-step for step in ladder], *[0] * 8, 1, *[0] * 7]
        assert opened["p.weight"].read().tolist() == [expected]


def change(name: str, made: Callable[[torch.Tensor], torch.Tensor] | None) -> Callable[[Tensors, Any], None]:
    def done(tensors: Tensors, config: Any) -> None:
        if made is None:
            del tensors[name]
        else:
            tensors[name] = made(tensors[name])

    return done


def settings(**other: Any) -> Callable[[Tensors, Any], None]:
    return lambda tensors, config: config["quantization"].update(other)


FAULTS: dict[str, tuple[Callable[[Tensors, Any], None], type[BitsmithError], str]] = {
    "no scales": (change("x.scales", None), DamagedFileError, "has no scales: 'x.scales' is missing"),
    "no biases": (change("x.biases", None), DamagedFileError, "has no biases: 'x.biases' is missing"),
    "left over": (change("x.weight", None), DamagedFileError, "belongs to no packed weight"),
    "plain": (
        change("x.weight", lambda t: torch.ones(2, 64)),
        DamagedFileError,
        "belongs to no packed weight",
    ),
    "wide": (change("x.weight", lambda t: t[:, :5]), DamagedFileError, "expected rows of whole groups of 64"),
    "vector": (change("x.weight", lambda t: t[0]), DamagedFileError, "expected rows of whole groups of 64"),
    "short": (
        change("x.scales", lambda t: t[:1]),
        DamagedFileError,
        r"are F16 \[1, 1\], expected .* \[2, 1\]",
    ),
    "integer": (change("x.biases", lambda t: t.int()), DamagedFileError, "are I32"),
    "two types": (change("x.biases", lambda t: t.float()), DamagedFileError, "of two types"),
    "bits": (settings(bits=7), UnsupportedError, "mode 'affine', 7 bits, groups of 64; known"),
    "part bits": (settings(bits=4.0), UnsupportedError, "mode 'affine', 4.0 bits"),
    "no mode": (settings(mode=["affine"]), UnsupportedError, "mode"),
    "empty": (
        change("x.weight", lambda t: t[:, :0]),
        DamagedFileError,
        "expected rows of whole groups of 64",
    ),
    "no bits": (settings(bits="4"), UnsupportedError, "mode 'affine', '4' bits"),
    "group": (settings(group_size=48), UnsupportedError, "groups of 48"),
    "mode": (settings(mode="nvfp4"), UnsupportedError, "mode 'nvfp4'"),
    "denied": (settings(x=False), DamagedFileError, "the config says that it is not packed"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_parts_that_do_not_fit_are_refused(fault: str, tmp_path: Path) -> None:
    spoil, kind, words = FAULTS[fault]
    tensors = {}
    for name in ("x.weight", "y.weight"):
        tensors |= pack(name, torch.randn(2, 64), 4, 64, torch.float16)
    config = {"quantization": dict(AFFINE)}
    spoil(tensors, config)
    with pytest.raises(kind, match=words) as caught:
        open_checkpoint(save(tmp_path / "m", tensors, config))
    assert "\n" not in str(caught.value)
    assert caught.value.path == tmp_path / "m"


def test_the_layout_of_mlx_is_undone(demo_model: Path, tmp_path: Path) -> None:
    """A conversion without packing gives back what was converted, to the bit; so does its GGUF."""
    folder = converted(demo_model, tmp_path / "plain", bits=None)
    with open_checkpoint(demo_model) as theirs, open_checkpoint(folder) as ours:
        assert set(ours) == set(theirs)
        assert len(claim(ours)) == len(theirs)
        for name, ref in theirs.items():
            assert ours[name].shape == ref.shape
            expected = ref.read()
            if any(name.endswith(f"{part}.weight") for part in SHIFTED):
                expected = (torch.from_numpy(expected).bfloat16() + 1.0).float().numpy() - np.float32(1)
                assert ours[name].dtype == "F32"
            assert np.array_equal(ours[name].read(), expected), name
            if ours[name].dtype == ref.dtype:
                assert np.array_equal(ours[name].raw(), ref.raw()), name
                assert np.array_equal(ours[name].raw(3, 5), ref.raw(3, 5)), name
    assert {size.type: size.bpw for size in inspect(folder).sizes}["BF16"] > 16
    write_folder(folder, tmp_path / "again", "BF16")
    with open_checkpoint(folder) as ours, open_checkpoint(tmp_path / "again") as again:
        assert {name: again[name].raw().tobytes() for name in again} == {
            n: ours[n].raw().tobytes() for n in ours
        }


def nested(folder: Path, target: Path, spoil: Callable[[Tensors], None] = lambda _: None) -> Path:
    """Write a text-only conversion as one of a vision-language checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    tensors["vision_tower.patch_embed.proj.weight"] = (
        torch.arange(2 * 2 * 4 * 4 * 3).reshape(2, 2, 4, 4, 3).float()
    )
    config = json.loads((folder / "config.json").read_text())
    spoil(tensors)
    return save(target, tensors, {"model_type": "qwen3_5", "text_config": config, "vision_config": {}})


def test_a_vision_language_conversion(demo_model: Path, tmp_path: Path) -> None:
    folder = nested(converted(demo_model, tmp_path / "plain", bits=None), tmp_path / "nested")
    with open_checkpoint(folder) as opened:
        assert len(claim(opened)) == len(opened)
        assert "model.language_model.layers.0.input_layernorm.weight" in opened
        norm = opened["model.language_model.norm.weight"].read()
        assert abs(float(norm.mean()) - 0.843) < 0.01
        patches = opened["model.visual.patch_embed.proj.weight"]
        assert patches.shape == (2, 3, 2, 4, 4)
        assert patches.read()[1, :, 0, 0, 1].tolist() == [99, 100, 101]


def norms(tensors: Tensors, by: float) -> None:
    for name in tensors:
        if any(name.endswith(f"{part}.weight") for part in SHIFTED):
            tensors[name] = tensors[name] + by


def test_norms_and_kernels_that_contradict_are_refused(demo_model: Path, tmp_path: Path) -> None:
    plain = converted(demo_model, tmp_path / "plain", bits=None)

    def refused(words: str, spoil: Callable[[Tensors], None]) -> None:
        folder = nested(plain, tmp_path / "nested", spoil)
        with pytest.raises(BitsmithError, match=words):
            open_checkpoint(folder)

    refused("do not look shifted by one .*median -0.1", lambda tensors: norms(tensors, -1))
    refused("look shifted by one twice", lambda tensors: norms(tensors, 1))
    kernel = "language_model.model.layers.1.linear_attn.conv1d.weight"
    refused("MLX's layout and others", lambda t: t.update({kernel: t[kernel].movedim(2, 1)}))
    refused(
        "'language_model.mtp.norm.weight': is an MTP tensor",
        lambda t: t.update({"language_model.mtp.norm.weight": torch.ones(2)}),
    )
    refused("is 'lm_head.weight' as another is", lambda t: t.update({"lm_head.weight": torch.ones(2)}))
    shifted = load_file(demo_model / "model.safetensors")
    norms(shifted, 1)
    folder = save(tmp_path / "shifted", shifted, json.loads((demo_model / "config.json").read_text()))
    with pytest.raises(
        UnsupportedError, match="as Hugging Face stores it, but the norms look shifted by one"
    ):
        open_checkpoint(folder)


def test_a_packed_model_is_measured_and_speaks(demo_model: Path, packed: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("def main(argument):\n    return [argument for _ in range(3)]\n" * 12)
    found = evaluate(demo_model, packed, text, ctx_tokens=64, chunks=2)
    assert 0 < found.mean_kld.value < 0.01
    assert found.warnings == ()
    assert 8.5 < found.candidate.bpw < 8.6
    assert continue_prompt(packed, "def ", 3).n_tokens == 3
    seen = inspect(packed)
    assert "MLX_8bit_g64" in {share.name for share in seen.types}
    assert seen.architecture == "qwen35"
    assert not seen.sizes
    assayed = assay(packed, match=r"layers\.0\.mlp\.gate_proj")
    assert [matrix.name for matrix in assayed.matrices] == ["model.layers.0.mlp.gate_proj.weight"]


def test_a_packed_model_is_not_compressed_again(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"packed: .*MLX_8bit_g64.*the original"):
        compress(packed, tmp_path / "x.gguf", "Q4_K_M")
    with pytest.raises(UnsupportedError, match="is packed as MLX_8bit_g64 already"):
        write_folder(packed, tmp_path / "folder", "W4A16")
    assert not list(tmp_path.iterdir())


def test_real_mlx_decodes_to_the_same_values(tmp_path: Path) -> None:
    """A file that MLX wrote, with what its own `dequantize` makes of it."""
    file = shutil.copy(
        Path(__file__).parent / "data" / "mlx_quantized.safetensors", tmp_path / "model.safetensors"
    )
    with safe_open(file, "np") as stored:
        settings = json.loads(stored.metadata()["quantization"])
    (tmp_path / "config.json").write_text(json.dumps({"quantization": settings}))
    with open_checkpoint(tmp_path) as opened:
        names = [name for name in opened if name.endswith(".weight")]
        assert len(names) == 7
        for name in names:
            expected = opened[name.replace(".weight", ".expected")].read()
            assert np.array_equal(opened[name].read(), expected), name
