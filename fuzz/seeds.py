"""Sound inputs to begin with: small files of every layout and every type that the readers know."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np

from bitsmith.archs import ARCHITECTURES
from bitsmith.archs.published import published_config
from bitsmith.errors import BitsmithError
from bitsmith.formats.nf4 import NF4
from bitsmith.run.mixes import MIXES
from bitsmith.run.plan import plan_source
from bitsmith.run.plan_file import plan_text
from bitsmith.store import CellmInfo, TensorInfo, Typed, write_cellm_file, write_gguf
from bitsmith.store.cellm import DTYPES
from bitsmith.store.gguf_layout import NUMBERS, tensor_bytes, type_names
from bitsmith.store.imatrix import Imatrix, write_imatrix
from bitsmith.store.safetensors import ITEM_BYTES
from changes import put_digests_right
from readers import (
    FOLDER_FILES,
    MODEL_FILES,
    PAIRED_FILES,
    SITES,
    STATISTICS_FILES,
    model_source,
    pack,
    scratch,
)

EXAMPLES = Path(__file__).parent.parent / "examples"
RANDOM = np.random.default_rng(9)

Tensors = Mapping[str, tuple[str, tuple[int, ...]] | tuple[str, tuple[int, ...], bytes]]


def seeds(name: str) -> list[bytes]:
    """Return the sound inputs of a reader; one of another kind begins with a digit."""
    made: dict[str, Any] = {
        "safetensors": _safetensors,
        "gguf": _gguf,
        "cellm": _cellm,
        "imatrix": lambda: _imatrix("gguf"),
        "imatrix_dat": lambda: _imatrix("dat"),
        "folder": _folders,
        "model": _models,
        "statistics": _statistics,
        "paired": _paired,
        "plan": _plans,
        "study": _studies,
    }
    return list(made[name]()) if name in made else [b"1"]


def _file(tensors: Tensors, metadata: Mapping[str, str] | None = None) -> bytes:
    """Return a safetensors file of tensors as dtype, shape and, unless they are random, bytes."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    body = b""
    for name, (dtype, shape, *given) in tensors.items():
        size = ITEM_BYTES[dtype] * int(np.prod(shape, dtype=int))
        data = given[0] if given else _floats(dtype, size)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(body), len(body) + size]}
        body += data
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def _floats(dtype: str, size: int) -> bytes:
    """Return bytes of ordinary numbers of a dtype."""
    if dtype in ("F64", "F32", "F16"):
        layout = f"<f{ITEM_BYTES[dtype]}"
        return RANDOM.uniform(0.1, 1, size // ITEM_BYTES[dtype]).astype(layout).tobytes()
    if dtype == "BF16":
        return (RANDOM.uniform(0.1, 1, size // 2).astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return RANDOM.integers(0, 4, size, dtype=np.uint8).tobytes()


def _safetensors() -> Iterable[bytes]:
    yield _file({"a.weight": ("BF16", (4, 6)), "b": ("F32", (3,)), "c": ("I64", ())}, {"format": "pt"})
    yield _file({f"t.{dtype}": (dtype, (2, 3)) for dtype in sorted(ITEM_BYTES)})
    yield _file({"empty": ("F16", (0, 7)), "wide": ("U8", (1, 1, 1, 64))})


def _gguf() -> Iterable[bytes]:
    names = sorted(set(type_names().values()))
    rows = [TensorInfo(f"w.{name}", (1, 256), name) for name in names]
    known = [row for row in rows if _is_known(row)]
    for first in range(0, len(known), 8):
        yield _gguf_file({"general.architecture": "qwen3"}, known[first : first + 8])
    vectors = [TensorInfo("v", (4,), "F32"), TensorInfo("q", (64,), "Q8_0"), TensorInfo("u", (), "F32")]
    values: dict[str, Any] = {"general.alignment": 64, "a.tokens": ["x", "yy", ""], "a.flag": True}
    values |= {f"n.{kind}": Typed(kind, [_ONES.get(kind, 1)] * 2) for kind in NUMBERS} | {
        "a.name": "é",
        "a.real": 0.5,
    }
    yield _gguf_file(values, [*vectors, TensorInfo("deep", (2, 1, 3, 32), "Q4_0")])
    yield _gguf_file({}, [])


_ONES: dict[str, Any] = {"BOOL": True, "FLOAT32": 1.0, "FLOAT64": 1.0}


def _is_known(info: TensorInfo) -> bool:
    try:
        return info.nbytes > 0
    except BitsmithError:
        return False


def _gguf_file(values: Mapping[str, Any], tensors: list[TensorInfo]) -> bytes:
    def encode(info: TensorInfo) -> Iterable[Any]:
        yield np.frombuffer(_floats("U8", tensor_bytes(info.name, info.shape, info.type)), np.uint8)

    return _written("x.gguf", lambda path: write_gguf(path, values, tensors, encode))


def _written(name: str, write: Any) -> bytes:
    folder = scratch()
    try:
        write(folder / name)
        return (folder / name).read_bytes()
    finally:
        rmtree(folder)


def _cellm() -> Iterable[bytes]:
    matrices = [CellmInfo(f"m.{dtype}", (3, 128), dtype) for dtype in DTYPES]
    scales = [CellmInfo(f"m.{dtype}.qscale", shape, "f16") for dtype, shape in _SCALES.items()]
    header = {"model_type": "qwen3", "source_model_type": "qwen3", "hidden_dim": 128}
    config = {"source_text_config": {"model_type": "qwen3_text", "hidden_size": 128}}
    for values in (header, header | config):
        yield _cellm_file(values, [*matrices, *scales, CellmInfo("norm", (128,), "f16")])
    yield _cellm_file(header, [CellmInfo("a", (2, 3, 4), "f16"), CellmInfo("b", (0, 3), "f8e4m3")])


_SCALES = {"i8": (3,), "i4": (3, 4), "i2": (3, 2)}


def _cellm_file(values: Mapping[str, Any], tensors: list[CellmInfo]) -> bytes:
    def encode(info: CellmInfo) -> Iterable[Any]:
        yield np.frombuffer(_floats("F16" if info.dtype == "f16" else "U8", info.nbytes), np.uint8)

    return _written("x.cellm", lambda path: write_cellm_file(path, values, tensors, encode))


def _imatrix(suffix: str) -> Iterable[bytes]:
    entries = {f"blk.{n}.attn_q.weight": (np.full(4 + n, n + 1, np.float32), 512.0) for n in range(3)}
    for texts in ((), ("a text.txt",)):
        found = Imatrix(entries, texts, 2, 512)
        yield _written(f"x.{suffix}", lambda path, found=found: write_imatrix(path, found))


def _folder(config: Mapping[str, Any] | None, tensors: Tensors) -> bytes:
    files = {} if config is None else {"config.json": json.dumps(config).encode()}
    return pack(files | {"model.safetensors": _file(tensors)}, FOLDER_FILES)


def _folders() -> Iterable[bytes]:
    plain: Tensors = {"a.weight": ("BF16", (2, 3)), "b.weight": ("F32", (3,))}
    yield _folder({"model_type": "qwen3", "hidden_size": 3}, plain)
    yield _sharded()
    yield from _packed()
    yield from _factored()
    norms: Tensors = {
        "language_model.model.layers.0.linear_attn.conv1d.weight": ("BF16", (4, 3, 1)),
        "language_model.model.layers.0.input_layernorm.weight": ("BF16", (4,)),
        "vision_tower.patch_embed.proj.weight": ("BF16", (2, 1, 2, 2, 3)),
    }
    yield _folder({"model_type": "qwen3_5", "text_config": {"model_type": "qwen3_5_text"}}, norms)
    yield pack({"model.gguf": _gguf_file({"a": 1}, [TensorInfo("v", (4,), "F32")])}, FOLDER_FILES)


def _sharded() -> bytes:
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    index = {"metadata": {"total_size": 24}, "weight_map": {"a": names[0], "b": names[1]}}
    shards = {name: _file({tensor: ("F32", (3,))}) for name, tensor in zip(names, "ab", strict=True)}
    files = {"model.safetensors.index.json": json.dumps(index).encode(), "config.json": b"{}"} | shards
    return pack(files, FOLDER_FILES)


def _packed() -> Iterable[bytes]:
    """Weights of every method that packs them."""
    fp8 = {"quant_method": "fp8", "weight_block_size": [2, 2]}
    yield _quantized(fp8, {"a.weight": ("F8_E4M3", (3, 4)), "a.weight_scale_inv": ("F32", (2, 2))})
    yield _quantized(
        {"group_size": 32, "bits": 4, "mode": "affine"},
        {"a.weight": ("U32", (2, 8)), "a.scales": ("F16", (2, 2)), "a.biases": ("F16", (2, 2))},
        key="quantization",
    )
    yield _quantized(
        {"group_size": 32, "bits": 4, "mode": "mxfp4"},
        {"a.weight": ("U32", (2, 8)), "a.scales": ("U8", (2, 2))},
        key="quantization",
    )
    yield from _compressed()
    yield from _bitsandbytes()


def _quantized(settings: Mapping[str, Any], tensors: Tensors, key: str = "quantization_config") -> bytes:
    return _folder({"model_type": "qwen3", key: dict(settings)}, {**tensors, "norm": ("F32", (2,))})


def _compressed() -> Iterable[bytes]:
    shape = np.array([2, 64], "<i8").tobytes()
    for symmetric, stored in ((True, "pack-quantized"), (False, "pack-quantized"), (True, "int-quantized")):
        bits = 4 if stored == "pack-quantized" else 8
        weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group"}
        weights |= {"group_size": 32}
        group = {"targets": ["Linear"], "weights": weights, "format": stored}
        tensors: dict[str, Any] = {"a.weight_scale": ("BF16", (2, 2))}
        if bits == 4:
            tensors |= {"a.weight_packed": ("I32", (2, 8)), "a.weight_shape": ("I64", (2,), shape)}
        else:
            tensors |= {"a.weight": ("I8", (2, 64))}
        if not symmetric:
            tensors |= {"a.weight_zero_point": ("I32", (1, 2))}
        config = {"quant_method": "compressed-tensors", "format": stored, "config_groups": {"g": group}}
        yield _quantized(config | {"ignore": ["lm_head", "re:.*norm"]}, tensors)


def _bitsandbytes() -> Iterable[bytes]:
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [2, 64]}
    levels = np.asarray(NF4.levels, "<f4").tobytes()
    parts: dict[str, Any] = {"a.weight": ("U8", (64, 1)), "a.weight.quant_map": ("F32", (16,), levels)}
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    yield _quantized(settings, parts | {"a.weight.absmax": ("F32", (2,))} | _state(state))
    nested = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}
    scales: dict[str, Any] = {
        "a.weight.absmax": ("U8", (2,)),
        "a.weight.nested_absmax": ("F32", (1,)),
        "a.weight.nested_quant_map": ("F32", (256,)),
    }
    yield _quantized(settings, parts | scales | _state(state | nested))
    yield _quantized(settings, {"a.weight": ("I8", (2, 4)), "a.SCB": ("F32", (2,))})


def _state(state: Mapping[str, Any]) -> dict[str, Any]:
    text = json.dumps(state).encode()
    return {"a.weight.quant_state.bitsandbytes__nf4": ("U8", (len(text),), text)}


def _factored() -> Iterable[bytes]:
    train = {"form": "train", "modes": [[2, 2, 2], [2, 2, 2]], "ranks": [1, 2, 2, 1], "cores": "f16"}
    wide = train | {"shape": [8, 8]}
    blocks = {"rows": {"size": 2, "kept": [0, 2]}, "columns": {"size": 4, "kept": [1]}}
    forms: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (
            {"form": "factored", "shape": [8, 8], "rank": 2, "factors": "f16", "rest": "int4_g32"},
            {
                "a.weight_left": ("F16", (8, 2)),
                "a.weight_right": ("F16", (2, 8)),
                "a.weight_rest": ("I32", (8, 1)),
                "a.weight_rest_scale": ("F16", (8, 1)),
            },
        ),
        (
            {"form": "factored", "shape": [8, 8], "rest": "f16", **blocks},
            {"a.weight_rest": ("F16", (4, 4))},
        ),
        (wide, _cores("weight")),
        (
            wide | {"scales": True},
            _cores("weight") | {"a.weight_row_scale": ("F16", (8,)), "a.weight_column_scale": ("F16", (8,))},
        ),
        (
            {"form": "trains", "weight_left": wide, "weight_right": wide},
            _cores("weight_left") | _cores("weight_right"),
        ),
    ]
    for form, tensors in forms:
        yield _quantized({"quant_method": "bitsmith", "version": 1, "modules": {"a": form}}, tensors)


def _cores(begin: str) -> dict[str, Any]:
    return {f"a.{begin}_core_{n}": ("F16", shape) for n, shape in enumerate([(4, 2), (8, 2), (2, 4)])}


def _models() -> Iterable[bytes]:
    """Models of each architecture that has one layer of every kind, as a folder and as a GGUF."""
    text = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    text |= {"head_dim": 4, "vocab_size": 12}
    delta = {"linear_key_head_dim": 4, "linear_num_key_heads": 1, "linear_num_value_heads": 2}
    delta |= {"linear_value_head_dim": 4, "num_hidden_layers": 2, "full_attention_interval": 2}
    kinds = {"layer_types": ["linear_attention", "full_attention"]}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 8}
    vision |= {"num_position_embeddings": 4, "patch_size": 2}
    dense = published_config("qwen3-tiny") | text | {"num_hidden_layers": 1}
    hybrid = published_config("tiny")
    hybrid["text_config"] |= text | delta | kinds
    hybrid["vision_config"] |= vision
    for config in (dense, hybrid):
        arch = ARCHITECTURES[config["model_type"]](config)
        tensors: Tensors = {spec.name: ("BF16", spec.shape) for spec in arch.specs()}
        said = json.dumps(config).encode()
        yield pack({"config.json": said, "model.safetensors": _file(tensors)}, MODEL_FILES)
        infos = [
            TensorInfo(spec.gguf_name, spec.gguf_shape, "F32") for spec in arch.specs() if spec.gguf_name
        ]
        tokens = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": [str(n) for n in range(12)]}
        values = {"general.architecture": arch.gguf_arch} | dict(arch.gguf_metadata()) | tokens
        yield pack({"model.gguf": _gguf_file(values, infos)}, MODEL_FILES)


def _statistics() -> Iterable[bytes]:
    tensors: dict[str, Any] = {}
    sites = {}
    for site in SITES:
        wide = site.shape[1]
        kinds = {"diagonal": (wide,), "mean": (wide,), "moment": (wide, wide), "held": (2, wide)}
        kinds |= {"held_diagonal": (wide,)}
        tensors |= {f"{site.site}.{kind}": ("F32", shape) for kind, shape in kinds.items()}
        sites[str(site.site)] = {
            "file": "layer.000.safetensors",
            "columns": wide,
            "tokens": 12,
            "held_tokens": 4,
            "tensors": dict.fromkeys(kinds, ""),
        }
    manifest = dict.fromkeys(("bitsmith", "model", "model_sha256", "text", "text_sha256"), "x")
    manifest |= {"ctx_tokens": 4, "chunks": 4, "held_chunks": 1, "fit_tokens": 12, "seed": 0}
    manifest |= {"tied": False, "saliency": True, "tokens": {}, "sites": sites, "saliency_sha256": {}}
    files = {
        "statistics.json": json.dumps(manifest | {"kind": "statistics", "schema": 1}).encode(),
        "tokens.safetensors": _file({"fit": ("I64", (3, 4)), "held": ("I64", (1, 4))}),
        "layer.000.safetensors": _file(tensors),
    }
    put_digests_right(files)
    yield pack(files, STATISTICS_FILES)


def _paired() -> Iterable[bytes]:
    model = {"path": "m", "sha256": "x", "hidden": 4, "layers": 1, "mixer": [4], "ffn": [6]}
    student = model | {"hidden": 2, "mixer": [2], "ffn": [4]}
    manifest = dict.fromkeys(("bitsmith", "family", "text", "text_sha256", "tokenizer_sha256"), "x")
    manifest |= {"teacher": model, "student": student, "ctx_tokens": 4, "chunks": 3, "held_chunks": [2]}
    manifest |= {"fit_tokens": 8, "layer_map": [0], "mapped_by": "cka", "kind": "paired", "schema": 1}
    states = _place("states", "F64", 4, 2)
    tensors: dict[str, dict[str, Any]] = {
        "tokens.safetensors": {"fit": ("I64", (2, 4)), "held": ("I64", (1, 4))},
        "embed.safetensors": states,
        "final.safetensors": states | _place("normed", "F64", 4, 2),
        "pair.000.safetensors": states
        | _place("updates", "F64", 4, 2)
        | _place("mixer", "F32", 4, 2)
        | _place("ffn", "F32", 6, 4),
    }
    for side, wide in (("teacher", 4), ("student", 2)):
        entering: dict[str, Any] = {"states": ("F32", (1, 4, wide))}
        tensors[f"{side}.000.safetensors"] = entering | {"between": ("F32", (1, 4, wide))}
        tensors[f"{side}.001.safetensors"] = entering
    files = {name: _file(held) for name, held in tensors.items()}
    files["paired.json"] = json.dumps(manifest | {"files": {name: {} for name in files}}).encode()
    put_digests_right(files)
    yield pack(files, PAIRED_FILES)


def _place(place: str, dtype: str, teacher: int, student: int) -> dict[str, Any]:
    shapes = {"tt": (teacher, teacher), "ss": (student, student), "ts": (teacher, student)}
    shapes |= {"mean_t": (teacher,), "mean_s": (student,)}  # type: ignore[dict-item]
    return {f"{place}.{part}": (dtype, shape) for part, shape in shapes.items()}


def _plans() -> Iterable[bytes]:
    source = model_source()
    for mix in ("Q4_K_M", "F16") if "Q4_K_M" in MIXES else list(MIXES)[:2]:
        plan = plan_source(source, mix)
        yield plan_text(plan, source, about={"target": "4.5 bpw"}).encode()
    text = plan_text(plan_source(source, "F16"), source)
    yield text.replace("tensors:\n", 'transforms: ["fold", "untie", "rotate:seed=3"]\ntensors:\n').encode()
    yield b"version: 1\nlayout_sha256: x\nmix: Q4_K_M\ntensors:\n  a.weight: Q4_K\n"


def _studies() -> Iterable[bytes]:
    for file in sorted(EXAMPLES.glob("*.yaml")):
        yield file.read_bytes()
    yield _STUDY


_STUDY = b"""version: 1
title: a
models: {a: /a, b: b}
texts: {t: t.txt, u: u.txt}
calibration: {text: t, ctx: 64, chunks: 4}
merges: {m: {teacher: a, student: b, text: t, alpha: sweep, budget: 3}}
recipes:
  q: {type: Q4_K_M, stats: auto, tensor-type: ["ffn_down=Q6_K"], rounder: gptq}
  s: {recipe: sahc, text: u}
  f: {type: W4A16_G128, output: folder, ignore: [lm_head]}
evaluations:
  - {text: u, ctx: 64}
generate: {prompts: ["def f"]}
claims: {text: t, calibration: t}
gates: {mean_kld: {below: 0.1}}
limits: {memory: 2GiB, seconds: 60}
"""
