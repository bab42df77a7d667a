"""What must happen to a model before its residual axis can be turned: fold norms, untie, drop MTP layers."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from bitsmith.archs import Step, TensorSpec
from bitsmith.archs.steps import ConstantNorm, ScaleColumns
from bitsmith.formats import FORMATS
from bitsmith.passes.transform import Claimed, Context, Model, Transform, Vector, Vectors
from bitsmith.store.checkpoint import TensorRef

_HEAD = "lm_head.weight"
_READ_SITES = {
    "norm.mixer": ".mixer.in",
    "norm.ffn": ".ffn.in",
    "norm.mtp.embedding": ".fc.in",
    "norm.mtp.hidden": ".fc.in",
}


class Fold(Transform):
    """Norm weights on the residual axis move into what reads the normed state: `W -> W diag(g)`, norm -> 1.

    `g` is `w`, or `1 + w` where a norm acts so. Where `g` has a zero the forward pass is exact, but undoing
    leaves zeros in that column of the readers.
    """

    name = "fold"
    axis = "residual"
    summary = "norm weights folded into the matrices that read the normed state"

    def notes(self, model: Model) -> tuple[str, ...]:
        """Say that the final norm keeps its weight, where it does."""
        reason = _final_stays(model)
        return (f"{reason}: the final norm keeps its weight",) if reason else ()

    def vectors(self, model: Model, context: Context) -> dict[str, Vector]:
        """Return `g` by the name of the norm tensor; norms that act as one already are left out."""
        del context
        found = {
            spec.name: _acts_as(model, spec) for spec, _ in model.tensors.values() if _readers(model, spec)
        }
        return {name: factors for name, factors in found.items() if (factors != 1).any()}

    def steps(self, model: Model, vectors: Vectors) -> dict[str, Step]:
        """Return the steps of the norms in `vectors` and of their readers."""
        steps: dict[str, Step] = {}
        factors: dict[str, NDArray[np.float64]] = {}
        for name, vector in vectors.items():
            norm = model.spec(name)
            steps[name] = ConstantNorm(model.ref(name), norm.norm == "1+w")
            for reader in _readers(model, norm):
                whole = factors.setdefault(reader.name, np.ones(reader.shape[1]))
                whole[_columns(norm)] = vector
        return steps | {name: ScaleColumns(whole) for name, whole in factors.items()}


class _Restructuring(Transform):
    """A transform that adds or removes tensors and changes the values of none."""

    def vectors(self, model: Model, context: Context) -> dict[str, Vector]:
        """Return no vectors: there is nothing to solve."""
        del model, context
        return {}

    def steps(self, model: Model, vectors: Vectors) -> dict[str, Step]:
        """Return no steps: every tensor keeps its values."""
        del model, vectors
        return {}


class Untie(_Restructuring):
    """A model whose token embedding is its output head gets a head of its own, a copy."""

    name = "untie"
    axis = "residual"
    summary = "a tied output head becomes a tensor of its own"

    def notes(self, model: Model) -> tuple[str, ...]:
        """Say what the second copy costs."""
        if not model.arch.tied:
            return ("the output head is a tensor of its own already: nothing to untie",)
        _, ref = _embedding(model)
        said = f"{_HEAD} is added, a copy of {ref.name}: {ref.size:,} parameters"
        return (f"{said}, {_stored_bytes([ref]):,} bytes as {ref.dtype}",)

    def restructured(self, model: Model) -> Model:
        """Return the model with the head after the final norm."""
        if not model.arch.tied:
            return model
        embedding, ref = _embedding(model)
        untied = type(model.arch)(model.arch.config, {*model.tensors, _HEAD})
        head = next(spec for spec in untied.specs() if spec.name == _HEAD)
        copied = copy.copy(ref)
        copied.name = _HEAD
        tensors: dict[str, Claimed] = {}
        for name, (spec, stored) in model.tensors.items():
            tensors[name] = spec, stored
            if spec.role == "norm.final":
                tensors[_HEAD] = replace(head, transforms=embedding.transforms), copied
        return model.with_tensors(tensors)


class DropMtp(_Restructuring):
    """A model without its layers for multi-token prediction, which the text model does not need."""

    name = "drop-mtp"
    axis = "residual"
    summary = "the layers for multi-token prediction are left out"

    def notes(self, model: Model) -> tuple[str, ...]:
        """Say what is dropped."""
        dropped = [ref for spec, ref in model.tensors.values() if spec.component == "mtp"]
        if not dropped:
            return ("there are no MTP tensors: nothing to drop",)
        size = f"{sum(ref.size for ref in dropped):,} parameters, {_stored_bytes(dropped):,} bytes"
        return (f"{len(dropped)} MTP tensors are dropped: {size}",)

    def restructured(self, model: Model) -> Model:
        """Return the model without the tensors of the MTP layers."""
        kept = {name: pair for name, pair in model.tensors.items() if pair[0].component != "mtp"}
        return model if len(kept) == len(model.tensors) else model.with_tensors(kept)


def _final_stays(model: Model) -> str | None:
    """Return why the final norm cannot move into the head, None where it can."""
    if model.arch.tied:
        return "the output head is the token embedding (tied)"
    if model.has("mtp"):
        return "MTP layers read the state behind the final norm"
    return None


def _readers(model: Model, norm: TensorSpec) -> list[TensorSpec]:
    """Return the matrices that alone read the state behind `norm`; none where they are not all known."""
    if norm.norm is None or norm.axes != ("residual",):
        return []
    if norm.role == "norm.final":
        return [] if _final_stays(model) else model.readers("head.in")
    site = _READ_SITES.get(norm.role)
    specs = [spec for spec, _ in model.tensors.values()]
    block = [spec for spec in specs if (spec.layer, spec.component) == (norm.layer, norm.component)]
    return [spec for spec in block if site is not None and spec.site is not None and spec.site.endswith(site)]


def _columns(norm: TensorSpec) -> slice:
    """Return the columns that read the state behind `norm`; MTP's fc reads two, embedding first."""
    width = norm.shape[0]
    first = width if norm.role == "norm.mtp.hidden" else 0
    return slice(first, first + width)


def _acts_as(model: Model, norm: TensorSpec) -> NDArray[np.float64]:
    weight: NDArray[np.float64] = model.ref(norm.name).read().astype(np.float64)
    return weight + float(norm.norm == "1+w")


def _embedding(model: Model) -> Claimed:
    return model.tensors[model.having("embed")[0].name]


def _stored_bytes(refs: Iterable[TensorRef]) -> int:
    """Return the bytes of `refs` in the types they are stored in."""
    formats = ((ref, FORMATS.get(ref.dtype)) for ref in refs)
    return sum(
        ref.nbytes if stored is None else ref.size // stored.block_size * stored.block_bytes
        for ref, stored in formats
    )
