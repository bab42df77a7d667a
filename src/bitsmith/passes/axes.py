"""A model's layers by role, and which channel of an axis each row or column of a tensor carries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitsmith.archs import TensorSpec
from bitsmith.passes.transform import Model

Channels = NDArray[np.intp]


@dataclass(frozen=True)
class Layer:
    """One decoder layer, text or MTP: its specs by role, and the prefix of its sites (`layers.3`)."""

    instance: str
    specs: Mapping[str, TensorSpec]

    def has(self, *roles: str) -> bool:
        """Tell whether the layer has a tensor of each role."""
        return all(role in self.specs for role in roles)

    def readers(self, site: str) -> list[TensorSpec]:
        """Return the matrices that read a site of the layer (`mixer.in`, `ffn.in`)."""
        return [spec for spec in self.specs.values() if spec.site == f"{self.instance}.{site}"]

    @property
    def heads(self) -> Heads:
        """The sizes of the layer's attention, by the shapes of its tensors."""
        dim = self.specs["norm.q"].shape[0]
        return Heads(self.specs["attn.o"].shape[1] // dim, self.specs["attn.v"].shape[0] // dim, dim)

    @property
    def delta_heads(self) -> Heads:
        """The V heads of the layer's DeltaNet, which share their gated norm's weight."""
        dim = self.specs["norm.delta"].shape[0]
        return Heads(self.specs["delta.out"].shape[1] // dim, 1, dim)


@dataclass(frozen=True)
class Heads:
    """`query` heads that share `shared` sets of `dim` channels, consecutive heads one set."""

    query: int
    shared: int
    dim: int

    def channels(self) -> Channels:
        """Return the channel (`shared dim`) that each of `query dim` columns carries.

        >>> Heads(4, 2, 2).channels().tolist()
        [0, 1, 0, 1, 2, 3, 2, 3]
        """
        sets = np.arange(self.shared * self.dim, dtype=np.intp).reshape(self.shared, 1, self.dim)
        return np.broadcast_to(sets, (self.shared, self.query // self.shared, self.dim)).reshape(-1)

    def spread(self, order: Channels) -> Channels:
        """Return the order of the columns that an order of the channels, within their sets, makes.

        >>> Heads(4, 2, 2).spread(np.array([1, 0, 2, 3])).tolist()
        [1, 0, 3, 2, 4, 5, 6, 7]
        """
        inside = order[self.channels()].reshape(self.query, self.dim) % self.dim
        return (np.arange(self.query, dtype=np.intp)[:, None] * self.dim + inside).reshape(-1)


def layers_of(model: Model) -> list[Layer]:
    """Return the decoder layers in block order, those of MTP after the text's."""
    found: dict[int, dict[str, TensorSpec]] = {}
    for spec, _ in model.tensors.values():
        if spec.layer is not None:
            found.setdefault(spec.layer, {})[spec.role] = spec
    layers = []
    for number in sorted(found):
        down = found[number].get("ffn.down")
        if down is not None and down.site is not None:
            layers.append(Layer(down.site.removesuffix(".ffn.mid"), found[number]))
    return layers


def shared_mean(values: NDArray[np.float64], channels: Channels) -> NDArray[np.float64]:
    """Return the mean of `values` over the entries that carry the same channel."""
    return np.bincount(channels, values) / np.bincount(channels)
