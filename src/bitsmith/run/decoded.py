"""Tensors of an output as they are read back, and how far they are from what they were made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from bitsmith.errors import BitsmithError
from bitsmith.passes.transform import Applied, Transform, Vectors, model_of
from bitsmith.progress import Progress, silent
from bitsmith.run.encode import SLICE_BYTES
from bitsmith.run.plan import SourceTensor, open_source
from bitsmith.run.transforms import resolved
from bitsmith.store import open_checkpoint, open_gguf
from bitsmith.store.checkpoint import Checkpoint, Rows, TensorRef


def relative_error(source: TensorRef, stored: TensorRef) -> float:
    """Return `sum (w - decoded)² / sum w²` in float32 weights and float64 sums, 0 where all w are 0.

    Equal values count as no difference, also where they are not finite. Raises BitsmithError if the shapes
    differ.
    """
    if source.shape != stored.shape:
        raise BitsmithError(
            f"has the shape {list(stored.shape)}, its source {list(source.shape)}", tensor=stored.name
        )
    error = energy = 0.0
    for start, stop in source.slices(SLICE_BYTES):
        weights = source.read(start, stop).astype(np.float32, copy=False)
        decoded = stored.read(start, stop).astype(np.float32, copy=False)
        if not np.array_equal(weights, decoded, equal_nan=True):
            error += _squares(decoded - weights)
        energy += _squares(weights)
    return error / energy if energy else error


def gguf_sources(
    checkpoint: Checkpoint, found: Sequence[tuple[Transform, Vectors]]
) -> Mapping[str, SourceTensor]:
    """Return what the tensors of a GGUF are made of, by their names in it, the transforms `found` done.

    Raises BitsmithError for transforms that are not of the model.
    """
    source = open_source(checkpoint, [transform for transform, _ in found], allow_requantize=True)
    model = model_of(checkpoint)
    for transform, vectors in found:
        model = model.applying(transform, vectors)
    return {tensor.gguf_name: tensor for tensor in resolved(source, model).tensors}


def gguf_errors(
    model: Path, artifact: Path, applied: Sequence[Applied], progress: Progress = silent
) -> dict[str, float]:
    """Return the error of every tensor of a GGUF against the checkpoint that it was made of, by GGUF name.

    Raises BitsmithError for a GGUF of another model, and as `gguf_sources` does.
    """
    with open_checkpoint(model) as checkpoint, open_gguf(artifact) as stored:
        sources = gguf_sources(checkpoint, [(one.transform, one.vectors) for one in applied])
        errors = {}
        for done, (name, ref) in enumerate(stored.items()):
            progress("read back", done, len(stored))
            if name not in sources:
                raise BitsmithError(f"is not made of a tensor of {model}", path=artifact, tensor=name)
            errors[name] = relative_error(sources[name].ref, ref)
    return errors


def _squares(values: Rows) -> float:
    flat = np.ascontiguousarray(values).reshape(-1)
    return float(np.einsum("i,i->", flat, flat, dtype=np.float64))
