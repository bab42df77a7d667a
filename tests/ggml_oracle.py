"""Real ggml through ctypes: the plain C API that the `xllamacpp` wheel exports."""

from __future__ import annotations

import ctypes
import importlib.util
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType


@cache
def library() -> ctypes.CDLL:
    """Load the wheel's shared object and declare the functions used here."""
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("the oracle needs the `llama` extra: pip install 'bitsmith[llama]'")
    folder = Path(next(iter(spec.submodule_search_locations)))
    lib = ctypes.CDLL(str(next(folder.glob("xllamacpp*.so"))))
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    lib.ggml_validate_row_data.restype = ctypes.c_bool
    lib.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    lib.ggml_quantize_init.restype = None
    lib.ggml_quantize_init.argtypes = [ctypes.c_int]
    lib.ggml_type_name.restype = ctypes.c_char_p
    lib.ggml_type_name.argtypes = [ctypes.c_int]
    lib.ggml_blck_size.restype = ctypes.c_int64
    lib.ggml_blck_size.argtypes = [ctypes.c_int]
    lib.ggml_type_size.restype = ctypes.c_size_t
    lib.ggml_type_size.argtypes = [ctypes.c_int]
    return lib


_NEWER = {"Q2_0": 42}  # than the `gguf` package


def type_number(name: str) -> int:
    """Return the number of a ggml type, checked against ggml's own name for it."""
    number = _NEWER.get(name)
    if number is None:
        number = int(GGMLQuantizationType[name])
    assert library().ggml_type_name(number).decode().upper() == name
    return number


def block_of(name: str) -> tuple[int, int]:
    """Return the weights and the bytes of a block as ggml has them."""
    number = type_number(name)
    return library().ggml_blck_size(number), library().ggml_type_size(number)


def quantize(
    name: str, rows: np.ndarray, importance: np.ndarray | None = None, threads: int = 1
) -> np.ndarray:
    """Encode float32 `rows` (`out in`) with `ggml_quantize_chunk`, the rows shared out over `threads`."""
    kind = type_number(name)
    block_size, block_bytes = block_of(name)
    rows = np.ascontiguousarray(rows, np.float32)
    n_rows, n_in = rows.shape
    out = np.empty((n_rows, n_in // block_size * block_bytes), np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    pointer = None if weights is None else weights.ctypes.data
    lib = library()
    lib.ggml_quantize_init(kind)

    def part(first: int, last: int) -> None:
        lib.ggml_quantize_chunk(
            kind, rows.ctypes.data, out.ctypes.data, first * n_in, last - first, n_in, pointer
        )

    edges = np.linspace(0, n_rows, threads + 1).astype(int)
    if threads == 1:
        part(0, n_rows)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(part, edges[:-1].tolist(), edges[1:].tolist()))
    return out


def accepts(name: str, blocks: np.ndarray) -> bool:
    """Tell whether ggml's own validation takes these bytes (finite scales)."""
    blocks = np.ascontiguousarray(blocks)
    return bool(library().ggml_validate_row_data(type_number(name), blocks.ctypes.data, blocks.nbytes))


def dequantize(name: str, blocks: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Decode bytes (`out row_bytes`) with ggml's own `dequantize_row_…` to float32 rows (`out in`)."""
    block_size, block_bytes = block_of(name)
    blocks = np.ascontiguousarray(blocks)
    if name == "F32":
        return blocks.view(np.float32)
    plain = {"F16": "ggml_fp16_to_fp32_row", "BF16": "ggml_bf16_to_fp32_row"}
    symbol = plain.get(name, f"dequantize_row_{name if name.endswith('_K') else name.lower()}")
    symbol = symbol.replace("row_Q", "row_q")
    if out is None:
        out = np.empty((len(blocks), blocks.shape[1] // block_bytes * block_size), np.float32)
    decode = library()[symbol]
    decode.restype = None
    decode.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    decode(blocks.ctypes.data, out.ctypes.data, out.size)
    return out
