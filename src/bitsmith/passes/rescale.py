"""Gauges: scales that one tensor takes on and another gives back, one factor for each channel of an axis.

Between the two the channel passes nothing but products, so the model's function stays the same at any
precision. Rounding does not: a column of a block format shares its scale with its neighbours.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bitsmith.archs import Step, TensorSpec
from bitsmith.archs.steps import ScaleColumns, ScaleNorm, ScaleRows
from bitsmith.errors import BitsmithError, printable
from bitsmith.passes.axes import Channels, Layer, layers_of, shared_mean
from bitsmith.passes.column_trial import ColumnTrial
from bitsmith.passes.scale_search import best_scales, normalised
from bitsmith.passes.transform import Context, Model, Transform, Vector, Vectors
from bitsmith.passes.trial import column_squares, sample

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Side:
    """One tensor of a gauge: its rows, columns or norm weight take `s ** power`.

    Entry `i` of that axis carries channel `channels[i]` of the gauge.
    """

    spec: TensorSpec
    kind: Literal["rows", "columns", "norm"]
    power: Literal[1, -1]
    channels: Channels

    def step(self, scales: Float64) -> Step:
        """Return the step that scales the tensor."""
        factors = scales[self.channels] ** self.power
        if self.kind == "norm":
            return ScaleNorm(factors, self.spec.norm == "1+w")
        return (ScaleRows if self.kind == "rows" else ScaleColumns)(factors)


class Gauge(Transform):
    """A scale for each channel of an axis; `sides` are the tensors that it changes, by instance.

    An instance's vector has one factor, positive or negative, for each channel. A model without the axis
    has no instances: nothing changes.
    """

    @abstractmethod
    def sides(self, model: Model) -> dict[str, tuple[Side, ...]]:
        """Return the tensors of each instance."""

    def partners(self, model: Model, instance: str) -> Channels | None:
        """Return the channel that must have the same factor as each; None where all are free."""
        del model, instance
        return None

    def steps(self, model: Model, vectors: Vectors) -> dict[str, Step]:
        """Return the scaling of each tensor.

        Raises BitsmithError for an instance that the model does not have, and for factors of another number,
        zero, not finite or unequal where they must be equal.
        """
        known, found = self.sides(model), {}
        for instance, vector in vectors.items():
            if instance not in known:
                raise BitsmithError(f"{self.name}: the model has no {printable(instance)}")
            sides = known[instance]
            scales = self._checked(instance, vector, int(sides[0].channels.max()) + 1)
            partners = self.partners(model, instance)
            if partners is not None and (scales != scales[partners]).any():
                raise BitsmithError(
                    f"{self.name}: {instance} scales two channels that RoPE mixes differently"
                )
            found.update({side.spec.name: side.step(scales) for side in sides})
        return found

    def _checked(self, instance: str, vector: Vector, count: int) -> Float64:
        scales = np.asarray(vector, np.float64)
        if scales.shape != (count,) or not np.isfinite(scales).all() or not scales.all():
            raise BitsmithError(
                f"{self.name}: {instance} has {scales.shape} factors, expected {count} finite ones, none zero"
            )
        return scales

    def vectors(self, model: Model, context: Context) -> dict[str, Vector]:
        """Return the scales by instance; one that gains nothing is left out.

        With formats: what `best_scales` finds for the matrices whose columns take the scales. Rows count for
        nothing, as block formats scale with them, nor do tensors that stay float32. Without formats: the
        scales that make both sides alike (`balance`).
        """
        found: dict[str, Vector] = {}
        for instance, sides in self.sides(model).items():
            partners = self.partners(model, instance)
            columns = [(side.spec.name, side.channels) for side in sides if side.kind == "columns"]
            matrices = ColumnTrial.of(model, columns, context)
            if context.formats and not matrices:
                continue
            scales: Float64 | None = balance(model, sides, partners)
            if scales is not None and matrices:
                scales = best_scales(matrices, sides[-1].power, scales)
            if scales is not None and (scales != 1).any():
                found[instance] = scales
        return found


class ScaleFfn(Gauge):
    """`up` rows times s, `down` columns over s, for each channel of the feed-forward layer.

    The gate is left alone: SiLU does not scale.
    """

    name = "scale-ffn"
    axis = "ffn"
    summary = "scale ffn.up's rows against ffn.down's columns"

    def sides(self, model: Model) -> dict[str, tuple[Side, ...]]:
        """Return up and down of each layer."""
        return {
            layer.instance: _sides(layer, ("ffn.up", "rows"), ("ffn.down", "columns"))
            for layer in layers_of(model)
            if layer.has("ffn.up", "ffn.down")
        }


class ScaleVo(Gauge):
    """`v` rows times s, `o` columns over s, for each channel of each KV head (`kv_heads head_dim`).

    All query heads of a group read the same values. Qwen3.5's output gate acts element by element, so it
    lets the scale through.
    """

    name = "scale-vo"
    axis = "head.v"
    summary = "scale attn.v's rows against attn.o's columns"

    def sides(self, model: Model) -> dict[str, tuple[Side, ...]]:
        """Return v and o of each attention layer."""
        return {
            layer.instance: _sides(
                layer, ("attn.v", "rows"), ("attn.o", "columns"), shared=layer.heads.channels()
            )
            for layer in layers_of(model)
            if layer.has("attn.v", "attn.o", "norm.q")
        }


class ScaleConv(Gauge):
    """`in_qkv` rows times s, the convolution's kernels over s, for each channel, before DeltaNet's SiLU.

    Neither is read by columns of that axis and the convolution stays F32, so rounding gains nothing by it.
    """

    name = "scale-conv"
    axis = "delta.qkv"
    summary = "scale delta.in_qkv's rows against the convolution's"

    def sides(self, model: Model) -> dict[str, tuple[Side, ...]]:
        """Return the projection and the convolution of each DeltaNet layer."""
        return {
            layer.instance: _sides(layer, ("delta.in_qkv", "rows"), ("delta.conv", "rows"))
            for layer in layers_of(model)
            if layer.has("delta.in_qkv", "delta.conv")
        }


class ScaleDelta(Gauge):
    """The gated norm's weight times s, `out` columns over s, for each channel of a V head.

    The heads share the weight, and so the scales.
    """

    name = "scale-delta"
    axis = "delta.channel"
    summary = "scale DeltaNet's gated norm against delta.out's columns"

    def sides(self, model: Model) -> dict[str, tuple[Side, ...]]:
        """Return norm and output of each DeltaNet layer."""
        return {
            layer.instance: _sides(
                layer,
                ("norm.delta", "norm"),
                ("delta.out", "columns"),
                shared=layer.delta_heads.channels(),
            )
            for layer in layers_of(model)
            if layer.has("norm.delta", "delta.out")
        }


class ScaleQk(Gauge):
    """q's norm times s, k's norm over s, for each channel of a head, alike for the two that RoPE mixes.

    Scales of whole heads' rows of `q` or `k` are not offered: the norms behind them undo those only up to
    their epsilon, a relative error of 6e-8 that no precision makes smaller.
    """

    name = "scale-qk"
    axis = "head.channel"
    summary = "scale q's norm against k's"

    def sides(self, model: Model) -> dict[str, tuple[Side, ...]]:
        """Return both norms of each attention layer."""
        return {
            layer.instance: _sides(layer, ("norm.q", "norm"), ("norm.k", "norm"))
            for layer in layers_of(model)
            if layer.has("norm.q", "norm.k")
        }

    def partners(self, model: Model, instance: str) -> Channels:
        """Return for each channel the one that RoPE turns with it: half of the rotary channels away."""
        del instance
        dim, half = model.having("norm.q")[0].shape[0], model.arch.rotary_dim // 2
        order = np.arange(dim, dtype=np.intp)
        order[:half], order[half : 2 * half] = order[half : 2 * half].copy(), order[:half].copy()
        return order


class ScaleNormReaders(Gauge):
    """What a norm's weight acts as over s, the columns of all its readers times s (as AWQ scales).

    Instances are named by the norm's tensor. The final norm is one only where the head reads it alone: not
    with tied embeddings, and not with MTP, which reads it too.
    """

    name = "scale-norm"
    axis = "residual"
    summary = "scale a norm against the columns of all that read it"

    def sides(self, model: Model) -> dict[str, tuple[Side, ...]]:
        """Return each norm with its readers."""
        found: dict[str, tuple[Side, ...]] = {}
        for layer in layers_of(model):
            for role, site in (("norm.mixer", "mixer.in"), ("norm.ffn", "ffn.in")):
                if layer.has(role):
                    found |= _norm_sides(layer.specs[role], layer.readers(site))
        for norm in model.having("norm.final"):
            if not model.has("mtp"):
                found |= _norm_sides(norm, model.readers("head.in"))
        return found


def balance(model: Model, sides: Sequence[Side], partners: Channels | None = None) -> Float64:
    """Return the scales that give both sides the same RMS in each channel, of geometric mean 1.

    `s = sqrt(RMS of the divided / RMS of the multiplied)`; a norm's RMS is what it acts as. Channels of which
    either is zero keep 1. Partners share their geometric mean.
    """
    takes, gives = (
        np.mean([_mean_squares(model, side) for side in sides if side.power == power], axis=0)
        for power in (1, -1)
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        scales = (gives / takes) ** 0.25
    scales = normalised(scales)
    return scales if partners is None else np.sqrt(scales * scales[partners])


def _mean_squares(model: Model, side: Side) -> Float64:
    """Return the mean square of a side's entries by channel."""
    ref = model.ref(side.spec.name)
    if side.kind == "columns":
        return shared_mean(column_squares(sample(ref)), side.channels)
    means = [_row_means(ref.read(*part).reshape(part[1] - part[0], -1), side) for part in ref.slices()]
    return shared_mean(np.concatenate(means), side.channels)


def _row_means(rows: NDArray[Any], side: Side) -> Float64:
    acts = rows.astype(np.float64) + (side.spec.norm == "1+w")
    found: Float64 = np.mean(acts**2, axis=1)
    return found


def _norm_sides(norm: TensorSpec, readers: list[TensorSpec]) -> dict[str, tuple[Side, ...]]:
    if not readers:
        return {}
    channels = np.arange(norm.shape[0], dtype=np.intp)
    columns = (Side(spec, "columns", 1, channels) for spec in readers)
    return {norm.name: (Side(norm, "norm", -1, channels), *columns)}


def _sides(
    layer: Layer,
    takes: tuple[str, Literal["rows", "norm"]],
    gives: tuple[str, Literal["rows", "columns", "norm"]],
    shared: Channels | None = None,
) -> tuple[Side, Side]:
    """Return the side that is multiplied and the one that is divided; the latter's entries may share."""
    first, second = layer.specs[takes[0]], layer.specs[gives[0]]
    channels = np.arange(first.shape[0], dtype=np.intp)
    return Side(first, takes[1], 1, channels), Side(
        second, gives[1], -1, channels if shared is None else shared
    )
