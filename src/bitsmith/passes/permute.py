"""Permutations: the channels of an axis in another order, everywhere at once.

A block format rounds neighbouring columns together and error feedback meets the first columns first, so the
order of columns decides how well a matrix is stored; it takes no byte of the file.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from bitsmith.archs import Step, TensorSpec
from bitsmith.archs.steps import Permutation, PermuteColumns, PermuteRows
from bitsmith.errors import BitsmithError, printable
from bitsmith.passes.axes import Layer, layers_of
from bitsmith.passes.transform import Context, Model, Transform, Vector, Vectors
from bitsmith.store.checkpoint import TensorRef

BY = ("moment", "scale", "both")


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

    `by` says what puts channels first: `moment` a large E[x²] of what the matrices behind them read, `scale`
    a large RMS of those matrices' columns, `both` a large product of the two (RMS² E[x²]). Without statistics
    of the site `moment` and `both` fall back to `scale`.
    """

    defaults: ClassVar[Mapping[str, Any]] = {"by": "moment"}

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

    def vectors(self, model: Model, context: Context) -> dict[str, Vector]:
        """Return the orders by instance."""
        del model, context
        return {}


class _PermuteLayer(Permute):
    """A permutation whose instances are layers."""

    @abstractmethod
    def size(self, layer: Layer) -> tuple[int, int] | None:
        """Return groups and channels of a layer; None where it has none."""

    @abstractmethod
    def layer_steps(self, layer: Layer, order: Permutation) -> dict[str, Step]:
        """Return the steps of a layer."""

    def sizes(self, model: Model) -> dict[str, tuple[int, int]]:
        """Return groups and channels of the layers that have the axis."""
        sizes = {layer.instance: self.size(layer) for layer in layers_of(model)}
        return {instance: size for instance, size in sizes.items() if size is not None}

    def instance_steps(self, model: Model, instance: str, order: Permutation) -> dict[str, Step]:
        """Return the steps of a layer."""
        layer = next(layer for layer in layers_of(model) if layer.instance == instance)
        return self.layer_steps(layer, order)


class PermuteFfn(_PermuteLayer):
    """Rows of gate and up and columns of down."""

    name = "permute-ffn"
    axis = "ffn"
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
    summary = "reorder value channels within each KV head"

    def size(self, layer: Layer) -> tuple[int, int] | None:
        """Return KV heads and their channels."""
        if not layer.has("attn.q", "attn.v", "attn.o", "norm.q"):
            return None
        return layer.heads.shared, layer.heads.dim

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
    summary = "reorder DeltaNet's value channels within the heads"

    def size(self, layer: Layer) -> tuple[int, int] | None:
        """Return one group of a head's channels."""
        if not layer.has("delta.in_qkv", "delta.in_z", "delta.conv", "norm.delta", "delta.out"):
            return None
        return 1, layer.delta_heads.dim

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

    def notes(self, model: Model) -> tuple[str, ...]:
        """Say what becomes of the vision tower."""
        if not any(spec.component == "vision" for spec, _ in model.tensors.values()):
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
