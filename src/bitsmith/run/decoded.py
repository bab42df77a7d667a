"""Tensors of an output as they are read back, and how far they are from what they were made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from bitsmith.errors import BitsmithError
from bitsmith.numerics.squares import add_squares
from bitsmith.numerics.threads import ahead, in_order
from bitsmith.passes.transform import Applied, Transform, Vectors, model_of
from bitsmith.progress import Progress, silent
from bitsmith.run.encode import SLICE_BYTES
from bitsmith.run.plan import SourceTensor, open_source
from bitsmith.run.transforms import resolved
from bitsmith.store import open_checkpoint, open_gguf
from bitsmith.store.checkpoint import Checkpoint, Rows, TensorRef

_UNIT = 1 << 15  # weights whose squares are summed at a time


def relative_error(source: TensorRef, stored: TensorRef) -> float:
    """Return `sum (w - decoded)² / sum w²` in float32 weights and float64 sums, 0 where all w are 0.

    Equal values count as no difference, also where they are not finite. Raises BitsmithError if the shapes
    differ.
    """
    if source.shape != stored.shape:
        raise BitsmithError(
            f"has the shape {list(stored.shape)}, its source {list(source.shape)}", tensor=stored.name
        )

    def compared(piece: tuple[int, int, Rows]) -> tuple[float, float]:
        start, stop, weights = piece
        return _squares(weights, stored.read(start, stop).astype(np.float32, copy=False))

    error = energy = 0.0
    for own, all_ in in_order(compared, ahead(_slices(source), 2)):
        error, energy = error + own, energy + all_
    return error / energy if energy else error


def _slices(ref: TensorRef) -> Iterator[tuple[int, int, Rows]]:
    for start, stop in ref.slices(SLICE_BYTES):
        yield start, stop, ref.read(start, stop).astype(np.float32, copy=False)


def _squares(weights: Rows, decoded: Rows) -> tuple[float, float]:
    """Return `sum (w - decoded)²`, 0 if they are equal where they are not finite too, and `sum w²`."""
    sums = np.zeros((max(1, -(-weights.size // _UNIT)), 2))
    own, other = (np.ascontiguousarray(values).reshape(-1) for values in (weights, decoded))
    add_squares(own, other, _UNIT, sums)
    error, energy = sums.sum(axis=0).tolist()
    is_same = not np.isfinite(error) and np.array_equal(weights, decoded, equal_nan=True)
    return 0.0 if is_same else error, energy


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
