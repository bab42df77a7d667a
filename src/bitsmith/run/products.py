"""The precision of a forward's matrix products: float32, or BF16 on processors that multiply it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from bitsmith.errors import BitsmithError, printable
from bitsmith.run.device import current_device

Products = Literal["float32", "bfloat16"]


@contextmanager
def matrix_products(name: str) -> Iterator[None]:
    """Let torch take matrix products of float32 in `name`, sums in float32; all else stays as it is.

    `bfloat16` rounds both factors to 8 bits of mantissa, which AVX-512 BF16 and AMX multiply several times
    as fast. Raises BitsmithError for another name, and for `bfloat16` on a GPU or on a processor that only
    emulates it, which is slower than float32.
    """
    if name not in ("float32", "bfloat16"):
        raise BitsmithError(f"unknown products {printable(name)!r}; known: float32, bfloat16")
    if name == "float32":
        yield
        return
    if current_device().type != "cpu":
        raise BitsmithError("--products bfloat16 is for the CPU")
    if not bfloat16_products():
        raise BitsmithError("--products bfloat16 needs a CPU with AVX-512 BF16 or AMX, which this one is not")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def bfloat16_products() -> bool:
    """Tell whether this processor multiplies matrices of BF16 itself."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(check()) for name in checks if (check := getattr(torch.cpu, name, None)))


def current_products() -> Products:
    """Return what `matrix_products` set."""
    return "bfloat16" if torch.get_float32_matmul_precision() == "medium" else "float32"
