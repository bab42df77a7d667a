"""Transforms on their way into a file: solved for a plan's types, kept beside the file, undone again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from bitsmith.archs import TensorSpec
from bitsmith.archs.export import renamed
from bitsmith.errors import BitsmithError, DamagedFileError
from bitsmith.formats import Format, format_named
from bitsmith.formats.blocks import BlockFormat
from bitsmith.numerics.threads import one_blas_thread
from bitsmith.passes.transform import (
    Applied,
    Context,
    Model,
    Transform,
    Vector,
    Vectors,
    model_of,
    parse_transforms,
    transform_of,
    transformed,
)
from bitsmith.progress import Progress, silent
from bitsmith.run.plan import TRANSFORMS_DIGEST_KEY, TRANSFORMS_KEY, Plan, Source
from bitsmith.store import open_checkpoint, open_gguf, open_safetensors
from bitsmith.store.checkpoint import TensorRef
from bitsmith.store.gguf import GgufCheckpoint
from bitsmith.store.hub import local
from bitsmith.store.statistics import Statistics

SIDECAR_SUFFIX = ".transforms"
"""Follows a GGUF's name: a safetensors file of the vectors that lead its tensors back to the source's."""

AUTO, NONE = "auto", "none"
"""What may be asked for instead of names."""


@dataclass(frozen=True)
class WeightError:
    """How far an artifact's tensor is from the source's, in the source's coordinates.

    `relative_error` is `sum (w - decoded)² / sum w²` over what is stored; the transforms are undone first.
    """

    hf_name: str
    gguf_name: str
    type: str
    relative_error: float


def asked_for(text: str | None) -> tuple[Transform, ...]:
    """Return the transforms that a user names; none for `none`, `auto` and nothing.

    Raises as `parse_transforms` does.
    """
    return () if text in (None, AUTO, NONE) else tuple(parse_transforms(str(text)))


def block_formats(plan: Plan) -> dict[str, Format]:
    """Return the formats of the tensors that a plan stores in blocks, by Hugging Face name."""
    formats = {row.hf_name: format_named(row.type) for row in plan.rows}
    return {name: form for name, form in formats.items() if isinstance(form, BlockFormat)}


def solved(
    source: Source,
    plan: Plan,
    statistics: Statistics | None,
    known: Mapping[str, Vectors] | None = None,
    progress: Progress = silent,
) -> tuple[Source, tuple[Applied, ...]]:
    """Return `source` with its transforms solved for the plan's types, and what they came to.

    `known` has the vectors of transforms, by name, that need no solving. Raises UnsupportedError that names
    a transform and says why it would not be exact.
    """
    if not source.transforms:
        return source, ()
    context, model = Context(block_formats(plan), statistics), model_of(source.checkpoint)
    for done, transform in enumerate(source.transforms):
        progress(f"transform {transform.name}", done, len(source.transforms))
        vectors = (known or {}).get(transform.name)
        if vectors is None:
            model = transformed(model, [transform], context)
        else:
            model = model.applying(transform, vectors)
    return resolved(source, model), model.applied


def refuse_inexact(source: Source) -> None:
    """Raise UnsupportedError for a transform that would not be exact, as far as shows without a search."""
    model = model_of(source.checkpoint)
    for transform in source.transforms:
        if transform.searches:
            model.check(transform)
        else:
            model = transformed(model, [transform], Context())


def resolved(source: Source, model: Model) -> Source:
    """Return `source` with every tensor as the transforms of `model`, which have been applied, leave it."""
    tensors = []
    for tensor in source.tensors:
        spec, ref = model.tensors[tensor.hf_name]
        if spec.transforms:
            changed = renamed(spec.to_gguf(ref), tensor.gguf_name)
            tensor = replace(tensor, spec=spec, ref=changed)  # noqa: PLW2901
        tensors.append(tensor)
    metadata = {**source.metadata, TRANSFORMS_DIGEST_KEY: vectors_digest(model.applied)}
    return replace(source, tensors=tuple(tensors), metadata=metadata)


def vectors_digest(applied: Sequence[Applied]) -> str:
    """Return the SHA-256 of transforms and their vectors."""
    digest = hashlib.sha256()
    for one in applied:
        for instance, vector in sorted(one.vectors.items()):
            digest.update(json.dumps([str(one.transform), instance, str(vector.dtype)]).encode())
            digest.update(np.ascontiguousarray(vector).tobytes())
        digest.update(str(one.transform).encode())
    return digest.hexdigest()


def sidecar_of(artifact: Path) -> Path:
    """Return where the vectors of a GGUF's transforms lie."""
    return artifact.with_name(artifact.name + SIDECAR_SUFFIX)


def sidecar_bytes(applied: Sequence[Applied]) -> bytes | None:
    """Return the content of `OUT.transforms`, the vectors of transforms; None where there are none."""
    vectors = {
        f"{one.transform.name}/{instance}": np.ascontiguousarray(vector)
        for one in applied
        for instance, vector in one.vectors.items()
    }
    return save(vectors) if vectors else None


def read_sidecar(artifact: GgufCheckpoint) -> list[tuple[Transform, Vectors]]:
    """Return a GGUF's transforms with their vectors; none where it is as its source.

    Raises BitsmithError where the sidecar is missing, DamagedFileError where it is not the file's own.
    """
    names = artifact.metadata.get(TRANSFORMS_KEY)
    if not names:
        return []
    if not isinstance(names, list):
        raise DamagedFileError(f"metadata {TRANSFORMS_KEY} is no list of names", path=artifact.path)
    try:
        transforms = [transform_of(str(name)) for name in names]
    except BitsmithError as error:
        raise DamagedFileError(f"metadata {TRANSFORMS_KEY}: {error.message}", path=artifact.path) from error
    path = sidecar_of(artifact.path)
    kept: dict[str, Vector] = {}
    if path.exists():
        with open_safetensors(path) as stored:
            kept = {name: ref.read() for name, ref in stored.items()}
    found = [(transform, _vectors_of(transform, kept)) for transform in transforms]
    digest = vectors_digest([Applied(transform, vectors) for transform, vectors in found])
    if digest != artifact.metadata.get(TRANSFORMS_DIGEST_KEY):
        if not path.exists():
            raise BitsmithError("is missing; it leads the file's tensors back to the source's", path=path)
        raise DamagedFileError("does not belong to the file beside it", path=path)
    return found


def _vectors_of(transform: Transform, kept: Vectors) -> Vectors:
    prefix = f"{transform.name}/"
    return {name.removeprefix(prefix): kept[name] for name in kept if name.startswith(prefix)}


@one_blas_thread()
def compare_weights(model: Path, artifact: Path, progress: Progress = silent) -> tuple[WeightError, ...]:
    """Compare every tensor of a GGUF with the checkpoint it was made of, its transforms undone.

    Raises BitsmithError for a GGUF whose transforms cannot be undone, and for one of another model.
    """
    model, artifact = local(model, progress), local(artifact, progress)
    with open_checkpoint(model) as checkpoint, open_gguf(artifact) as stored:
        rewritten = model_of(checkpoint)
        for transform, vectors in read_sidecar(stored):
            rewritten = rewritten.applying(transform, vectors)
        pairs = [pair for pair in rewritten.tensors.values() if pair[0].gguf_name is not None]
        errors = []
        for done, (spec, ref) in enumerate(pairs):
            progress("compare", done, len(pairs))
            errors.append(_weight_error(spec, ref, stored))
    return tuple(errors)


def _weight_error(spec: TensorSpec, ref: TensorRef, stored: GgufCheckpoint) -> WeightError:
    name = str(spec.gguf_name)
    if name not in stored or stored[name].shape != spec.gguf_shape:
        raise BitsmithError("is not there in the source's shape", path=stored.path, tensor=name)
    back, error, energy = spec.from_gguf(stored[name]), 0.0, 0.0
    for start, stop in ref.slices():
        original = ref.read(start, stop).astype(np.float64)
        error += float(np.sum((back.read(start, stop) - original) ** 2))
        energy += float(np.sum(original**2))
    return WeightError(spec.name, name, stored[name].dtype, error / energy if energy else 0.0)
