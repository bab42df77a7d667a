"""Second moments of a matrix's inputs, as llama.cpp's `imatrix` collects them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bitsmith.archs import TensorSpec
from bitsmith.errors import BitsmithError
from bitsmith.store import open_gguf

Moments = Mapping[str, NDArray[np.float64]]
"""By tensor name: E[x xᵀ] (`in in`), or its diagonal E[x²] (`in`)."""

_SUMS, _COUNTS = ".in_sum2", ".counts"


def imatrix_moments(path: Path, specs: Iterable[TensorSpec]) -> dict[str, NDArray[np.float64]]:
    """Return E[x²] (`in`) by Hugging Face name from an imatrix in GGUF.

    Matrices that it does not hold are left out. Raises BitsmithError where it holds none of the model's, or
    one of another width.
    """
    moments = {}
    with open_gguf(path) as imatrix:
        for spec in specs:
            sums, counts = imatrix.get(f"{spec.gguf_name}{_SUMS}"), imatrix.get(f"{spec.gguf_name}{_COUNTS}")
            if sums is None or counts is None:
                continue
            if sums.size != spec.shape[-1] or counts.size != 1:
                raise BitsmithError(
                    f"holds {sums.size} sums and {counts.size} counts, expected {spec.shape[-1]} and 1",
                    path=path,
                    tensor=sums.name,
                )
            count = max(float(counts.read().reshape(-1)[0]), 1.0)
            mean = spec.importance_from_gguf(np.asarray(sums.read(), dtype=np.float32).reshape(-1) / count)
            moments[spec.name] = mean.astype(np.float64)
    if not moments:
        raise BitsmithError("holds no statistics of this model's matrices", path=path)
    return moments
