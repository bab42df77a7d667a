"""Weights of a GGUF as functions of what costs no bytes: float16 block scales and mins, F32 values, codes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bitsmith.archs import TensorSpec
from bitsmith.archs.arch import Step
from bitsmith.archs.steps import AddOne, NegativeExp, PermuteColumns, PermuteRows, SqueezeKernel
from bitsmith.errors import UnsupportedError
from bitsmith.formats.blocks import BlockFormat, Fields
from bitsmith.numerics.half import HALF_MAX
from bitsmith.store.checkpoint import Bytes, ComputedTensor, TensorRef

Float32 = NDArray[np.float32]

_MARGIN = 0.05  # of a step: how far inside its cell a latent weight starts


class FreeWeight(ABC):
    """One stored tensor as a differentiable function of free parameters.

    `parameters` are the leaves by kind (`scale`, `value`, `code`); all start where they reproduce the file.
    `value()` is the tensor in Hugging Face layout, `packed()` the bytes to store, which decode to it.
    """

    def __init__(self, spec: TensorSpec) -> None:
        self.spec = spec
        self.parameters: dict[str, torch.Tensor] = {}

    @abstractmethod
    def value(self) -> torch.Tensor:
        """Return the tensor in Hugging Face layout, differentiable in the parameters."""

    @abstractmethod
    def packed(self) -> Bytes:
        """Return the stored bytes of the present value, flat."""

    @abstractmethod
    def decoded(self) -> torch.Tensor:
        """Return the tensor in Hugging Face layout as decoding `packed()` gives it."""


class FreeFloats(FreeWeight):
    """An F32 tensor: `w = w0 + s a` in Hugging Face layout, `s` its root mean square as the file stores it.

    Where the file stores `-exp(w)`, `s` is 1: the stored value then changes by a factor.
    """

    def __init__(self, spec: TensorSpec, ref: TensorRef) -> None:
        super().__init__(spec)
        self._start = torch.from_numpy(_float32(spec.from_gguf(ref).read()))
        stored = _float32(ref.read())
        relative = any(isinstance(step, NegativeExp) for step in spec.steps)
        self._scale = 1.0 if relative else float(np.sqrt(np.mean(np.square(stored, dtype=np.float64))))
        self.parameters["value"] = torch.zeros_like(self._start, requires_grad=True)

    def value(self) -> torch.Tensor:
        """Return `w0 + s a`."""
        return self._start + self._scale * self.parameters["value"]

    def packed(self) -> Bytes:
        """Return the float32 values in GGUF layout."""
        ref = _computed(self.spec, self.value().detach().numpy())
        return _float32(self.spec.to_gguf(ref).read()).reshape(-1).view(np.uint8)

    def decoded(self) -> torch.Tensor:
        """Return the values that the stored ones give."""
        stored = self.packed().view(np.float32).reshape(self.spec.gguf_shape)
        return torch.from_numpy(_float32(self.spec.from_gguf(_computed(self.spec, stored)).read()))


class FreeBlocks(FreeWeight):
    """A tensor of blocks: `w = d scale level[code] - m min`, `d = half(d0 (1 + a))`, `m = half(m0 (1 + b))`.

    The rounding to float16 passes gradients straight through. With `codes`, a code is the one whose level is
    nearest to a latent `x` (in mean gaps between levels), and gradients pass straight through that too; `x`
    starts within the stored code's cell, as near as it gets to where `original` (`out in`, GGUF layout) lies.
    """

    def __init__(
        self, spec: TensorSpec, ref: TensorRef, form: BlockFormat, original: Float32 | None = None
    ) -> None:
        super().__init__(spec)
        self._form, self._shape = form, ref.shape
        fields, codes = form.unpack(ref.raw().reshape(-1, form.block_bytes))
        self._fields = fields
        self._codes = codes
        split = (len(codes), form.subs, -1)
        self._d, self._m = torch.from_numpy(fields.d), torch.from_numpy(fields.m)
        self._scales = torch.from_numpy(fields.scales.astype(np.float32))[..., None]
        self._mins = torch.from_numpy(fields.mins.astype(np.float32))[..., None]
        self._levels = torch.from_numpy(np.ascontiguousarray(form.levels))
        self._has_mins = bool(fields.m.any())
        self.parameters["scale"] = torch.zeros_like(self._d, requires_grad=True)
        if self._has_mins:
            self.parameters["min"] = torch.zeros_like(self._m, requires_grad=True)
        self._unit = torch.from_numpy(form.levels[codes].reshape(split)) * self._scales
        self._gap = float(form.levels[-1] - form.levels[0]) / (len(form.levels) - 1)
        if original is not None:
            latent = latent_places(form, fields, codes, original) / np.float32(self._gap)
            self.parameters["code"] = torch.from_numpy(latent).reshape(split).requires_grad_()

    def value(self) -> torch.Tensor:
        """Return the weights in Hugging Face layout."""
        d = _half(self._d * (1 + self.parameters["scale"]))
        unit = self._unit
        if "code" in self.parameters:
            latent = self.parameters["code"]
            levels = self._levels[self._nearest(latent.detach())]
            unit = _straight(self._gap * latent, levels) * self._scales
        weights = d[:, None, None] * unit
        if self._has_mins:
            m = _half(self._m * (1 + self.parameters["min"]))
            weights = weights - m[:, None, None] * self._mins
        return unapplied(self.spec.steps, weights.reshape(self._shape))

    def packed(self) -> Bytes:
        """Return the blocks."""
        with torch.no_grad():
            d = _half(self._d * (1 + self.parameters["scale"])).numpy()
            m = self._fields.m
            if self._has_mins:
                m = _half(self._m * (1 + self.parameters["min"])).numpy()
            codes = self._codes
            if "code" in self.parameters:
                near = self._nearest(self.parameters["code"])
                codes = near.reshape(codes.shape).to(torch.uint8).numpy()
        return self._form.pack(Fields(d, m, self._fields.scales, self._fields.mins), codes).reshape(-1)

    def decoded(self) -> torch.Tensor:
        """Return what the format decodes the blocks to."""
        rows = self._form.decode(self.packed().reshape(self._shape[0], -1)).reshape(self._shape)
        return torch.from_numpy(_float32(self.spec.from_gguf(_computed(self.spec, rows)).read()))

    def spacing(self) -> tuple[float, float]:
        """Return the sums over weights of squared step between levels and of squared weight."""
        with torch.no_grad():
            steps = self._gap * self._d[:, None, None] * self._scales
            per_step = self._unit.shape[-1]
            return per_step * float(steps.square().sum()), float(self.value().square().sum())

    def _nearest(self, latent: torch.Tensor) -> torch.Tensor:
        edges = (self._levels[1:] + self._levels[:-1]) / 2
        if self._form.first_code:
            edges[: self._form.first_code] = -torch.inf
        return torch.bucketize(latent, edges / self._gap)


def latent_places(form: BlockFormat, fields: Fields, codes: Bytes, original: Float32) -> Float32:
    """Return where `original` lies on the grid of levels (`n block_size`), moved into its code's cell.

    A block or sub-block with a step of 0 gives the level itself.
    """
    levels = form.levels
    split = (len(codes), form.subs, -1)
    step, offset = fields.steps()[..., None], fields.offsets()[..., None]
    at = levels[codes].reshape(split)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        places = (np.asarray(original, np.float32).reshape(split) + offset) / step
    places = np.where(np.isfinite(places), places, at)
    edges = (levels[1:] + levels[:-1]) / 2
    low = np.concatenate([2 * levels[:1] - edges[:1], edges])[codes].reshape(split)
    high = np.concatenate([edges, 2 * levels[-1:] - edges[-1:]])[codes].reshape(split)
    margin = _MARGIN * (high - low)
    result: Float32 = np.clip(places, low + margin, high - margin).astype(np.float32)
    return result


def unapplied(steps: tuple[Step, ...], weights: torch.Tensor) -> torch.Tensor:
    """Undo a spec's export steps on a tensor, differentiably; `TensorSpec.from_gguf` in torch.

    Raises UnsupportedError for a step that is not known here.
    """
    for step in reversed(steps):
        undo = _UNDO.get(type(step))
        if undo is None:
            raise UnsupportedError(f"tuning does not know the export step {type(step).__name__}")
        weights = undo(step, weights)
    return weights


def _rows(step: PermuteRows, weights: torch.Tensor) -> torch.Tensor:
    return weights.index_select(0, torch.from_numpy(step.inverse))


def _columns(step: PermuteColumns, weights: torch.Tensor) -> torch.Tensor:
    return weights.index_select(-1, torch.from_numpy(step.inverse))


_UNDO: Mapping[type[Step], Callable[[Any, torch.Tensor], torch.Tensor]] = {
    PermuteRows: _rows,
    PermuteColumns: _columns,
    AddOne: lambda _, weights: weights - 1,
    NegativeExp: lambda _, weights: torch.log(-weights),
    SqueezeKernel: lambda _, weights: weights[:, None, :],
}


def _straight(through: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return `value` with the gradient of `through`."""
    result: torch.Tensor = _Straight.apply(through, value)  # type: ignore[no-untyped-call]
    return result


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(_: object, through: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        del through
        return value

    @staticmethod
    def backward(_: object, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def _half(values: torch.Tensor) -> torch.Tensor:
    limit = float(HALF_MAX)
    rounded = values.detach().clamp(-limit, limit).to(torch.float16).to(torch.float32)
    return _straight(values, rounded)


def _computed(spec: TensorSpec, values: Float32) -> TensorRef:
    return ComputedTensor(spec.name, values.shape, "F32", lambda start, stop: values[start:stop])


def _float32(values: NDArray[np.generic]) -> Float32:
    return np.require(values, dtype=np.float32, requirements=["C", "W"])
