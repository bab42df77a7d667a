"""compressed-tensors: bytes worked out by hand, and the real library's packing both ways."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from numpy.typing import NDArray
from safetensors.torch import save_file

from bitsmith.errors import BitsmithError, DamagedFileError, UnsupportedError
from bitsmith.store import open_checkpoint
from bitsmith.store.compressed_tensors import pack_words, pack_zeros
from bitsmith.store.packed import PackedTensor

Tensors = dict[str, torch.Tensor]
Settings = dict[str, Any]

HAND_CODES = [[15, 0, 8, 9, 7, 1, 2, 3, 12], [8, 8, 8, 8, 8, 8, 8, 8, 8]]
HAND_WORDS = [[0x321798_0F, 0xC], [0x88888888, 0x8]]
HAND_WEIGHTS = [[3.5, -4, 0, 0.5, -0.5, -3.5, -3, -2.5, 2], [0] * 9]


def int32(words: list[list[int]]) -> torch.Tensor:
    return torch.from_numpy(np.array(words, np.uint32).view(np.int32))


def scheme(targets: list[str] | None = None, format: str | None = None, **weights: Any) -> Settings:
    return {"targets": targets or ["Linear"], "format": format, "weights": weights}


def folder(
    path: Path, tensors: Tensors, *groups: Settings, format: str = "pack-quantized", **more: Any
) -> Path:
    """Write a checkpoint of hand-made tensors; the config has nothing but its quantization."""
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "model.safetensors")
    config_groups = {f"group_{n}": group for n, group in enumerate(groups)}
    settings = {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": config_groups,
        **more,
    }
    (path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    return path


def hand_made() -> Tensors:
    return {
        "a.weight_packed": int32(HAND_WORDS),
        "a.weight_scale": torch.tensor([[0.5], [2.0]], dtype=torch.bfloat16),
        "a.weight_shape": torch.tensor([2, 9]),
        "b.bias": torch.ones(3),
    }


CHANNEL = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}


def read(path: Path, name: str = "a.weight") -> NDArray[np.float32]:
    with open_checkpoint(path) as found:
        values: NDArray[np.float32] = found[name].read()
        return values


# ---------------------------------------------------------------- by hand


def test_words_by_hand() -> None:
    packed = pack_words(np.array(HAND_CODES, np.uint8), 4)
    assert packed.view("<u4").tolist() == HAND_WORDS
    assert pack_words(np.array([[1, 2, 3, 4, 255]], np.uint8), 8).tobytes() == bytes(
        [1, 2, 3, 4, 255, 0, 0, 0]
    )
    zeros = np.array([[n, 15 - n] for n in range(9)], np.uint8)  # of nine rows, two groups each
    assert pack_zeros(zeros, 4).view("<u4").tolist() == [[0x76543210, 0x89ABCDEF], [0x8, 0x7]]


def test_weights_by_hand(tmp_path: Path) -> None:
    with open_checkpoint(folder(tmp_path, hand_made(), scheme(**CHANNEL))) as found:
        assert sorted(found) == ["a.weight", "b.bias"]
        weight = found["a.weight"]
        assert isinstance(weight, PackedTensor) and weight.dtype == "int4"
        assert weight.shape == (2, 9) and weight.nbytes == 16 + 4 + 16
        assert weight.read().dtype == np.float32
        assert weight.read().tolist() == HAND_WEIGHTS
        assert weight.read(1).tolist() == HAND_WEIGHTS[1:] and weight.read(1, 1).shape == (0, 9)


def test_columns_grouped_out_of_order(tmp_path: Path) -> None:
    tensors = {
        "a.weight_packed": int32([[0x9999_9999]]),
        "a.weight_scale": torch.tensor([[1.0, 2.0]]),
        "a.weight_shape": torch.tensor([1, 8]),
        "a.weight_g_idx": torch.tensor([1, 0, 0, 1, 1, 0, 1, 0], dtype=torch.int32),
    }
    four = scheme(num_bits=4, strategy="group", group_size=4, actorder="group")
    assert read(folder(tmp_path, tensors, four)).tolist() == [[2, 1, 1, 2, 2, 1, 2, 1]]
    tensors["a.weight_g_idx"] = torch.full(
        (8,), -1, dtype=torch.int32
    )  # as writers mark one that is not used
    assert read(folder(tmp_path, tensors, four)).tolist() == [[1] * 4 + [2] * 4]
    tensors["a.weight_g_idx"] = torch.tensor([1, 0, 0, 1, 1, 1, 1, 0], dtype=torch.int32)
    with pytest.raises(DamagedFileError, match=r"a\.weight_g_idx.*4 columns into each group"):
        open_checkpoint(folder(tmp_path, tensors, four))


def test_names_go_before_patterns_and_patterns_before_linear(tmp_path: Path) -> None:
    tensors, eight = (
        hand_made(),
        {"weight": torch.ones(2, 4, dtype=torch.int8), "weight_scale": torch.ones(1)},
    )
    for module in ("x.up", "x.down", "y.up"):
        tensors |= {f"{module}.{last}": value.clone() for last, value in eight.items()}
    bytewise = {"format": "int-quantized", "num_bits": 8}
    found = folder(
        tmp_path,
        tensors,
        scheme(["Linear"], "pack-quantized", **CHANNEL),
        scheme(["re:.*up$"], strategy="tensor", **bytewise),
        scheme(["x.down", "y.up"], strategy="tensor", symmetric=False, **bytewise),
        format="mixed-precision",
    )
    with pytest.raises(DamagedFileError, match=r"x\.down\.weight_zero_point.*int8a needs it"):
        open_checkpoint(found)
    tensors |= {
        f"{module}.weight_zero_point": torch.tensor([3], dtype=torch.int8) for module in ("x.down", "y.up")
    }
    save_file(tensors, found / "model.safetensors")
    with open_checkpoint(found) as opened:
        dtypes = {name: ref.dtype for name, ref in opened.items()}
        assert dtypes == {
            "a.weight": "int4", "b.bias": "F32", "x.up.weight": "int8", "x.down.weight": "int8a",
            "y.up.weight": "int8a",
        }  # fmt: skip
        assert opened["y.up.weight"].read().tolist() == [[-2] * 4] * 2


# ---------------------------------------------------------------- the real library

FORMATS: dict[str, tuple[str, tuple[int, int], dict[str, Any]]] = {
    "4 bits": ("pack-quantized", (24, 96), {"num_bits": 4, "strategy": "group", "group_size": 32}),
    "4 bits, odd rows": ("pack-quantized", (5, 37), {"num_bits": 4, "strategy": "channel"}),
    "4 bits, one scale": ("pack-quantized", (5, 40), {"num_bits": 4, "strategy": "tensor"}),
    "4 bits, zeros": (
        "pack-quantized", (24, 96), {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}
    ),
    "4 bits, odd zeros": (
        "pack-quantized", (13, 37), {"num_bits": 4, "strategy": "channel", "symmetric": False}
    ),
    "8 bits": ("pack-quantized", (9, 64), {"num_bits": 8, "strategy": "group", "group_size": 64}),
    "8 bits, zeros": ("pack-quantized", (9, 30), {"num_bits": 8, "strategy": "channel", "symmetric": False}),
    "2 bits": ("pack-quantized", (6, 64), {"num_bits": 2, "strategy": "group", "group_size": 32}),
    "bytes": ("int-quantized", (6, 10), {"num_bits": 8, "strategy": "channel"}),
    "bytes, zeros": ("int-quantized", (6, 10), {"num_bits": 8, "strategy": "channel", "symmetric": False}),
    "bytes, one zero": (
        "naive-quantized", (6, 10), {"num_bits": 8, "strategy": "tensor", "symmetric": False}
    ),
    "floats": ("float-quantized", (6, 10), {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "floats, one scale": ("float-quantized", (6, 10), {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "floats in blocks": (
        "float-quantized", (21, 25),
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [8, 10]},
    ),
}  # fmt: skip


def parameters(args: QuantizationArgs, shape: tuple[int, int], rng: np.random.Generator) -> Tensors:
    """Return scales and, in asymmetric schemes, zero points of a weight, as the library lays them out."""
    (out, columns), strategy = shape, str(args.strategy)
    group, block = args.group_size or 1, args.block_structure or [1, 1]
    sizes = {"tensor": (1,), "channel": (out, 1), "group": (out, columns // group)}
    size = sizes.get(strategy, (-(-out // block[0]), -(-columns // block[1])))
    found = {"weight_scale": torch.from_numpy(rng.uniform(0.01, 0.1, size)).to(torch.bfloat16)}
    if not args.symmetric:
        half = 2 ** (args.num_bits - 1)
        found["weight_zero_point"] = torch.from_numpy(rng.integers(-half, half, size).astype(np.int8))
    return found


@pytest.mark.parametrize("case", FORMATS)
def test_what_the_library_packs_is_read_exactly(case: str, tmp_path: Path) -> None:
    format, shape, weights = FORMATS[case]
    rng = np.random.default_rng(len(case))
    args = QuantizationArgs(**weights)
    known = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(format)
    dense = {"weight": torch.from_numpy(rng.normal(0, 0.5, shape)).to(torch.bfloat16)}
    stored = compressor.compress(dense | parameters(args, shape, rng), known)
    group = scheme(**weights) | {"weights": args.model_dump(mode="json")}
    path = folder(
        tmp_path, {f"m.a.{name}": value.contiguous() for name, value in stored.items()}, group, format=format
    )
    expected = compressor.decompress(stored | {"weight_scale": stored["weight_scale"].float()}, known)[
        "weight"
    ]
    with open_checkpoint(path) as found:
        weight = found["m.a.weight"]
        assert list(found) == ["m.a.weight"] and weight.shape == shape
        assert np.array_equal(weight.read(), expected.numpy())
        for start, stop in ((0, 1), (1, 5), (3, shape[0])):
            assert np.array_equal(weight.read(start, stop), expected[start:stop].numpy())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_words_are_the_library_s(bits: int) -> None:
    rng = np.random.default_rng(bits)
    for shape in ((1, 1), (3, 33), (8, 64), (17, 7)):
        codes = rng.integers(0, 2**bits, shape, np.uint8)
        signed = torch.from_numpy((codes.astype(np.int16) - 2 ** (bits - 1)).astype(np.int8))
        assert pack_words(codes, bits).view("<i4").tolist() == pack_to_int32(signed, bits).tolist()
        assert (
            pack_zeros(codes, bits).view("<i4").tolist() == pack_to_int32(signed, bits, packed_dim=0).tolist()
        )


# ---------------------------------------------------------------- damage


def replaced(**parts: torch.Tensor | None) -> Callable[[Tensors, Settings], Any]:
    def change(tensors: Tensors, _: Settings) -> None:
        for last, value in parts.items():
            tensors.pop(f"a.{last}", None)
            if value is not None:
                tensors[f"a.{last}"] = value

    return change


def configured(**weights: Any) -> Callable[[Tensors, Settings], Any]:
    return lambda _, settings: settings["config_groups"]["group_0"]["weights"].update(weights)


def grouped(**group: Any) -> Callable[[Tensors, Settings], Any]:
    return lambda _, settings: settings["config_groups"]["group_0"].update(group)


def said(**settings: Any) -> Callable[[Tensors, Settings], Any]:
    return lambda _, found: found.update(settings)


DAMAGE: dict[str, tuple[Callable[[Tensors, Settings], Any], str]] = {
    "no scales": (replaced(weight_scale=None), "a.weight_scale.*missing, int4 needs it"),
    "no shape": (replaced(weight_shape=None), "a.weight_shape.*missing"),
    "no codes": (replaced(weight_packed=None), "a.weight_packed.*missing"),
    "bytes for words": (replaced(weight_packed=torch.ones(2, 9, dtype=torch.int8)), "a.weight_packed.*I8"),
    "three axes": (
        replaced(weight_packed=torch.ones(2, 1, 2, dtype=torch.int32)), "a.weight_packed.*two axes"
    ),
    "nothing": (replaced(weight_packed=torch.ones(0, 2, dtype=torch.int32)), "a.weight_packed.*empty"),
    "other rows": (replaced(weight_shape=torch.tensor([3, 9])), r"a.weight_packed.*\[3, 9\]"),
    "other columns": (replaced(weight_shape=torch.tensor([2, 17])), r"a.weight_packed.*\[2, 17\]"),
    "negative": (replaced(weight_shape=torch.tensor([2, -9])), r"a.weight_packed.*\[2, -9\]"),
    "huge": (replaced(weight_shape=torch.tensor([2, 2**62])), "a.weight_packed"),
    "shape of three": (replaced(weight_shape=torch.tensor([2, 9, 1])), "a.weight_shape"),
    "integer scales": (replaced(weight_scale=torch.ones(2, 1, dtype=torch.int32)), "a.weight_scale.*I32"),
    "scales of groups": (replaced(weight_scale=torch.ones(2, 2)), r"a.weight_scale.*\[2, 1\] or \[2\]"),
    "ragged groups": (configured(strategy="group", group_size=4), "a.weight_packed.*9 columns.*groups of 4"),
    "no zero points": (configured(symmetric=False), "a.weight_zero_point.*missing"),
    "short zero points": (
        replaced(weight_zero_point=torch.ones(2, 1, dtype=torch.int32)), r"a.weight_zero_point.*\[1, 1\]"
    ),
    "shape of nothing": (lambda t, s: t.update({"c.weight_shape": torch.ones(2)}), "c.weight_shape.*others"),
    "floats without scales": (
        lambda t, s: t.update({"c.weight": torch.ones(2, 2).to(torch.float8_e4m3fn)}), "c.weight.*F8_E4M3"
    ),
    "stored twice": (replaced(weight=torch.ones(2, 9)), "a.weight'.*F32 and packed as well"),
    "no groups": (said(config_groups={}), "config_groups holds no schemes"),
    "a preset": (said(config_groups={"W4A16": ["Linear"]}), "names a preset"),
    "ignored": (said(ignore=["re:a"]), "ignores a"),
    "ignore is a string": (said(ignore="lm_head"), "no lists of names"),
    "no target": (grouped(targets=["b"]), "no config group targets a"),
    "targets are numbers": (grouped(targets=[1]), "no lists of names"),
    "bad pattern": (grouped(targets=["re:("]), "no regular expression"),
    "weights are a list": (grouped(weights=[4]), "no map"),
    "5 bits": (configured(num_bits=5), "pack-quantized of int with 5 bits cannot be read"),
    "4.0 bits": (configured(num_bits=4.0), "with 4.0 bits cannot be read"),
    "type is a list": (configured(type=["int"]), "cannot be read"),
    "strategy": (configured(strategy="attn_head"), "strategy attn_head"),
    "group of words": (configured(strategy="group", group_size="32"), "groups of 32"),
    "block": (configured(strategy="block", block_structure="8x"), "block_structure is 8x"),
    "format": (said(format="nvfp4-pack-quantized"), "nvfp4-pack-quantized of int with 4 bits cannot be read"),
    "no format": (said(format=None), "None of int with 4 bits cannot be read"),
    "transform": (said(transform_config={"config_groups": {"R1": {}}}), "has a transform_config"),
    "sparse": (said(sparsity_config={"format": "sparse-24-bitmask"}), "has a sparsity_config"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    change, message = DAMAGE[case]
    tensors, group = hand_made(), scheme(**CHANNEL)
    path = folder(tmp_path, tensors, group)
    config = json.loads((path / "config.json").read_text())
    change(tensors, config["quantization_config"])
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors")
    with pytest.raises((DamagedFileError, UnsupportedError), match=message) as caught:
        open_checkpoint(path)
    assert isinstance(caught.value, BitsmithError) and caught.value.path is not None
    assert "\n" not in str(caught.value)


def test_what_is_said_about_activations_is_left_out(tmp_path: Path) -> None:
    tensors = hand_made() | {"a.input_scale": torch.ones(1), "a.k_scale": torch.ones(1)}
    more = {
        "kv_cache_scheme": {"num_bits": 8},
        "sparsity_config": {"format": "dense"},
        "transform_config": {},
    }
    with open_checkpoint(folder(tmp_path, tensors, scheme(**CHANNEL), **more)) as found:
        assert sorted(found) == ["a.weight", "b.bias"]
