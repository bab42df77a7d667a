"""Permutations: the channels of an axis in another order, everywhere at once.

A block format rounds neighbouring columns together and error feedback meets the first columns first, so the
order of columns decides how well a matrix is stored; it takes no byte of the file. Which order is good is
measured, not known: with sensitive columns side by side a sub-block's scale has none that it may neglect.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from bitsmith.archs import Step, TensorSpec
from bitsmith.archs.steps import Permutation, PermuteColumns, PermuteRows
from bitsmith.errors import BitsmithError, printable
from bitsmith.formats.blocks import BlockFormat
from bitsmith.passes.axes import Channels, Layer, layers_of, shared_mean
from bitsmith.passes.column_trial import ColumnTrial, gain_of
from bitsmith.passes.transform import Context, Model, Transform, Vector, Vectors
from bitsmith.passes.trial import column_squares, inputs_of, sample, stored_form
from bitsmith.store.checkpoint import TensorRef
from bitsmith.store.statistics import Statistics

Reader = tuple[TensorSpec, Channels]
"""A matrix, and the channel that each of its columns carries."""

BY = ("best", "moment", "scale", "both", "spread")

_SUB = 32  # width of a sub-block where no format says


class PermuteBoth(PermuteColumns):
    """Rows and columns in new orders."""

    def __init__(self, rows: Permutation, columns: Permutation) -> None:
        super().__init__(columns)
        self._rows = PermuteRows(rows)

    def apply(self, ref: TensorRef) -> TensorRef:
        """Return rows and columns in the new orders."""
        return self._rows.apply(super().apply(ref))

    def unapply(self, ref: TensorRef) -> TensorRef:
        """Return rows and columns in the source's orders."""
        return super().unapply(self._rows.unapply(ref))


class Permute(Transform):
    """An order for each instance of an axis: new position `i` takes what was at `order[i]`.

    `by` says what decides. `moment` puts channels of a large E[x²] first (of what the matrices behind them
    read), `scale` those of a large RMS of those matrices' columns, `both` those of a large RMS² E[x²].
    `spread` makes sub-blocks of like RMS, each with channels of every degree of E[x²], so that a sub-block's
    scale can favour a few of them. `best` tries them all on samples of the matrices, rounded with weights
    E[x²], and takes the one of least error, none where none is surely better than the order that is there.
    Without statistics of the site only `scale` is left, and without formats `best` is `moment`.
    """

    keeps_values = True
    defaults: ClassVar[Mapping[str, Any]] = {"by": "best"}

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(options)
        if self.options["by"] not in BY:
            raise BitsmithError(
                f"transform {self.name}: by is {printable(self.options['by'])}, expected {', '.join(BY)}"
            )

    @abstractmethod
    def sizes(self, model: Model) -> dict[str, tuple[int, int]]:
        """Return by instance how many groups of how many channels an order has; it stays inside groups."""

    @abstractmethod
    def instance_steps(self, model: Model, instance: str, order: Permutation) -> dict[str, Step]:
        """Return the steps of one instance."""

    def steps(self, model: Model, vectors: Vectors) -> dict[str, Step]:
        """Return the permutation of each tensor.

        Raises BitsmithError for an instance that the model does not have, and for a vector that is no order
        of its channels within their groups.
        """
        sizes, found = self.sizes(model), {}
        for instance, vector in vectors.items():
            if instance not in sizes:
                raise BitsmithError(f"{self.name}: the model has no {printable(instance)}")
            groups, size = sizes[instance]
            order = np.asarray(vector).astype(np.intp)
            expected = np.arange(groups * size).reshape(groups, size)
            if order.shape != (groups * size,) or (np.sort(order.reshape(groups, size)) != expected).any():
                raise BitsmithError(
                    f"{self.name}: {instance} is no order of {groups} × {size} channels within their groups"
                )
            found.update(self.instance_steps(model, instance, order))
        return found

    @abstractmethod
    def readers(self, model: Model, instance: str) -> list[Reader]:
        """Return the matrices whose columns are reordered, with the channel that each column carries."""

    def vectors(self, model: Model, context: Context) -> dict[str, Vector]:
        """Return the orders by instance, ties as they stand.

        Left out is an instance that is in order already, or, where formats are given, has no matrix that is
        rounded.
        """
        found: dict[str, Vector] = {}
        for instance, (groups, size) in self.sizes(model).items():
            readers = self.readers(model, instance)
            if context.formats:
                readers = [one for one in readers if stored_form(one[0].name, context) is not None]
            if not readers:
                continue
            ranking = _Ranking.of(model, context, readers, groups)
            order = self._order(model, context, instance, ranking, readers)
            if (order != np.arange(groups * size)).any():
                found[instance] = order
        return found

    def _order(
        self, model: Model, context: Context, instance: str, ranking: _Ranking, readers: Sequence[Reader]
    ) -> Permutation:
        by = self.options["by"]
        if by != "best" or not context.formats:
            return ranking.order("moment" if by == "best" else by)
        trials = ColumnTrial.of(model, [(spec.name, channels) for spec, channels in readers], context)
        before = [one.errors() for one in trials]
        best, gain = np.arange(ranking.scale.size), 0.0
        for kind in BY[1:] if ranking.moment is not None else ("scale",):
            order = ranking.order(kind)
            steps = self.instance_steps(model, instance, order)
            found = gain_of(before, [_reordered(one, steps) for one in trials])
            if found > gain:
                best, gain = order, found
        return best


def _reordered(trial: ColumnTrial, steps: Mapping[str, Step]) -> NDArray[np.float64]:
    order = steps[trial.name].column_order
    return trial.errors() if order is None else trial.ordered(order)


@dataclass(frozen=True)
class _Ranking:
    """What is known of the channels (`groups size`): E[x²], None if that is unknown, and the columns' RMS².

    Both are sums over the matrices that read the axis, each over its mean. `sub` is the width of sub-blocks.
    """

    moment: NDArray[np.float64] | None
    scale: NDArray[np.float64]
    sub: int

    @classmethod
    def of(cls, model: Model, context: Context, readers: Sequence[Reader], groups: int) -> _Ranking:
        known = _of_known_sites(context.statistics, readers)
        moments = [_shares(_moment(spec, context.statistics), channels) for spec, channels in known]
        scales = [
            _shares(column_squares(sample(model.ref(spec.name))), channels) for spec, channels in readers
        ]
        forms = [context.formats.get(spec.name) for spec, _ in readers]
        subs = [form.sub_size for form in forms if isinstance(form, BlockFormat)]
        scale = np.sum(scales, axis=0).reshape(groups, -1)
        return cls(
            np.sum(moments, axis=0).reshape(groups, -1) if moments else None,
            scale,
            math.gcd(max(subs, key=subs.count, default=_SUB), scale.shape[1]),
        )

    def order(self, kind: str) -> Permutation:
        """Return the order that `kind` makes, inside groups."""
        groups, size = self.scale.shape
        inside = [self._inside(kind, group) for group in range(groups)]
        order: Permutation = (np.arange(groups)[:, None] * size + np.stack(inside)).reshape(-1)
        return order

    def _inside(self, kind: str, group: int) -> Permutation:
        scale = self.scale[group]
        if self.moment is None or kind == "scale":
            return _descending(scale)
        moment = self.moment[group]
        if kind != "spread":
            return _descending(moment if kind == "moment" else moment * scale)
        strata = _descending(moment).reshape(self.sub, -1)
        return np.stack([stratum[_descending(scale[stratum])] for stratum in strata], axis=1).reshape(-1)


def _descending(score: NDArray[np.float64]) -> Permutation:
    return np.argsort(-score, kind="stable")


def _shares(columns: NDArray[Any], channels: Channels) -> NDArray[np.float64]:
    score = shared_mean(columns.astype(np.float64), channels)
    return score / max(float(score.mean()), np.finfo(np.float64).tiny)


def _of_known_sites(statistics: Statistics | None, readers: Sequence[Reader]) -> list[Reader]:
    if statistics is None:
        return []
    return [(spec, channels) for spec, channels in readers if statistics.knows(spec)]


def _moment(spec: TensorSpec, statistics: Statistics | None) -> NDArray[np.float32]:
    """Return E[x²] of what a matrix reads behind its transforms, in Hugging Face columns."""
    inputs = inputs_of(spec, statistics, moment=False)
    if inputs is None:
        return np.ones(spec.shape[-1], np.float32)
    return spec.importance_from_gguf(inputs.importance)


class _PermuteLayer(Permute):
    """A permutation whose instances are layers."""

    @abstractmethod
    def size(self, layer: Layer) -> tuple[int, int] | None:
        """Return groups and channels of a layer; None where it has none."""

    @abstractmethod
    def layer_steps(self, layer: Layer, order: Permutation) -> dict[str, Step]:
        """Return the steps of a layer."""

    reader: ClassVar[str]

    def channels(self, layer: Layer) -> Channels:
        """Return the channel that each column of the layer's reader carries."""
        return np.arange(layer.specs[self.reader].shape[1], dtype=np.intp)

    def readers(self, model: Model, instance: str) -> list[Reader]:
        """Return the layer's one matrix that reads the axis."""
        layer = _layer(model, instance)
        return [(layer.specs[self.reader], self.channels(layer))]

    def sizes(self, model: Model) -> dict[str, tuple[int, int]]:
        """Return groups and channels of the layers that have the axis."""
        sizes = {layer.instance: self.size(layer) for layer in layers_of(model)}
        return {instance: size for instance, size in sizes.items() if size is not None}

    def instance_steps(self, model: Model, instance: str, order: Permutation) -> dict[str, Step]:
        """Return the steps of a layer."""
        return self.layer_steps(_layer(model, instance), order)


def _layer(model: Model, instance: str) -> Layer:
    return next(layer for layer in layers_of(model) if layer.instance == instance)


class PermuteFfn(_PermuteLayer):
    """Rows of gate and up and columns of down."""

    name = "permute-ffn"
    axis = "ffn"
    reader = "ffn.down"
    summary = "reorder the channels of the feed-forward layers"

    def size(self, layer: Layer) -> tuple[int, int] | None:
        """Return one group of all channels."""
        found = layer.has("ffn.gate", "ffn.up", "ffn.down")
        return (1, layer.specs["ffn.down"].shape[1]) if found else None

    def layer_steps(self, layer: Layer, order: Permutation) -> dict[str, Step]:
        """Return the steps of gate, up and down."""
        return {
            layer.specs["ffn.gate"].name: PermuteRows(order),
            layer.specs["ffn.up"].name: PermuteRows(order),
            layer.specs["ffn.down"].name: PermuteColumns(order),
        }


class PermuteV(_PermuteLayer):
    """Value channels within each KV head: rows of v, columns of o for every query head that reads them.

    Where `q` holds an output gate (`head.q+gate`: per head its query rows, then its gate rows), the gate rows
    go along; the query rows stay.
    """

    name = "permute-v"
    axis = "head.v"
    reader = "attn.o"
    summary = "reorder value channels within each KV head"

    def size(self, layer: Layer) -> tuple[int, int] | None:
        """Return KV heads and their channels."""
        if not layer.has("attn.q", "attn.v", "attn.o", "norm.q"):
            return None
        return layer.heads.shared, layer.heads.dim

    def channels(self, layer: Layer) -> Channels:
        """Return the channel of each column: query heads of a group share theirs."""
        return layer.heads.channels()

    def layer_steps(self, layer: Layer, order: Permutation) -> dict[str, Step]:
        """Return the steps of v and o, and of q where it holds the gate."""
        heads, q = layer.heads, layer.specs["attn.q"]
        columns = heads.spread(order)
        steps: dict[str, Step] = {
            layer.specs["attn.v"].name: PermuteRows(order),
            layer.specs["attn.o"].name: PermuteColumns(columns),
        }
        if q.axes[0] == "head.q+gate":
            rows = np.arange(2 * heads.query * heads.dim, dtype=np.intp).reshape(heads.query, 2, heads.dim)
            inside = columns.reshape(heads.query, heads.dim) % heads.dim
            rows[:, 1] = np.take_along_axis(rows[:, 1], inside, axis=1)
            steps[q.name] = PermuteRows(rows.reshape(-1))
        return steps


class PermuteDelta(_PermuteLayer):
    """Value channels of DeltaNet, one order for all V heads of a layer, whose gated norm they share.

    The V rows of `in_qkv` and of the convolution, the rows of `in_z`, the norm and the columns of `out`. The
    export to GGUF changes the order of the heads, not the one within them.
    """

    name = "permute-delta"
    axis = "delta.channel"
    reader = "delta.out"
    summary = "reorder DeltaNet's value channels within the heads"

    def size(self, layer: Layer) -> tuple[int, int] | None:
        """Return one group of a head's channels."""
        if not layer.has("delta.in_qkv", "delta.in_z", "delta.conv", "norm.delta", "delta.out"):
            return None
        return 1, layer.delta_heads.dim

    def channels(self, layer: Layer) -> Channels:
        """Return the channel of each column: all heads share theirs."""
        return layer.delta_heads.channels()

    def layer_steps(self, layer: Layer, order: Permutation) -> dict[str, Step]:
        """Return the steps of the DeltaNet tensors."""
        values = layer.delta_heads.spread(order)
        before = layer.specs["delta.in_qkv"].shape[0] - len(values)
        mixed = np.concatenate([np.arange(before, dtype=np.intp), before + values])
        return {
            layer.specs["delta.in_qkv"].name: PermuteRows(mixed),
            layer.specs["delta.conv"].name: PermuteRows(mixed),
            layer.specs["delta.in_z"].name: PermuteRows(values),
            layer.specs["norm.delta"].name: PermuteRows(order),
            layer.specs["delta.out"].name: PermuteColumns(values),
        }


class PermuteResidual(Permute):
    """The residual stream's channels, one order for everything that reads or writes it.

    Exact with tied embeddings and with MTP, whose `fc` reads two residual streams side by side.
    """

    name = "permute-residual"
    axis = "residual"
    summary = "reorder the channels of the residual stream"

    def sizes(self, model: Model) -> dict[str, tuple[int, int]]:
        """Return one group of all channels."""
        return {"residual": (1, model.having("embed")[0].shape[1])}

    def readers(self, model: Model, instance: str) -> list[Reader]:
        """Return every matrix with columns of the residual stream, the embedding too."""
        del instance
        return [
            (spec, np.arange(spec.shape[1], dtype=np.intp))
            for spec, _ in model.tensors.values()
            if len(spec.shape) == 2 and spec.axes[1] == "residual"
        ]

    def notes(self, model: Model) -> tuple[str, ...]:
        """Say what becomes of the vision tower."""
        if not model.has("vision"):
            return ()
        return (
            "the vision merger writes the residual channels in the new order: an mmproj file made from the "
            "original model no longer fits",
        )

    def instance_steps(self, model: Model, instance: str, order: Permutation) -> dict[str, Step]:
        """Return the steps of all tensors that have the axis."""
        del instance
        steps = {spec.name: _residual_step(spec, order) for spec, _ in model.tensors.values()}
        return {name: step for name, step in steps.items() if step is not None}


def _residual_step(spec: TensorSpec, order: Permutation) -> Step | None:
    rows = order if spec.axes[:1] == ("residual",) else None
    columns = None
    if len(spec.shape) > 1 and spec.axes[-1] == "residual":
        columns = order
    elif len(spec.shape) > 1 and spec.axes[-1] == "mtp.pair":
        columns = np.concatenate([order, len(order) + order])
    if rows is not None and columns is not None:
        return PermuteBoth(rows, columns)
    if columns is not None:
        return PermuteColumns(columns)
    return None if rows is None else PermuteRows(rows)
