"""What the maps of a merge are found from: kept activations of both models, or their weights alone.

Places are numbered by the student: `p` is the state that enters its layer p (and the teacher's layer beside
it), the last that before the final norms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bitsmith.errors import BitsmithError
from bitsmith.numerics.threads import one_blas_thread
from bitsmith.passes.axes import Layer, layers_of
from bitsmith.passes.merge_inner import (
    HeadsSeen,
    NeuronsSeen,
    heads_by_activations,
    heads_by_weights,
    neurons_by_activations,
    neurons_by_weights,
)
from bitsmith.passes.merge_layers import proportional_layers
from bitsmith.passes.merge_maps import PairMoments, ResidualMap
from bitsmith.passes.transform import Model
from bitsmith.store.paired import CrossMoments, Paired, SideName

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Samples = tuple[Float32, Float32]
"""States of the same tokens in teacher and student, in pieces (`n T D_t`, `n T D_s`)."""

PIECE_TOKENS = 64
"""Tokens in a row that are drawn together when a mean over samples gets its interval."""


class Evidence(Protocol):
    """What is known of a teacher and a student; moments come with a share where several texts are blended."""

    @property
    def layer_map(self) -> tuple[int, ...]:
        """The teacher's layer beside each of the student's."""

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of each text; they sum to 1."""

    def moments(self, place: int) -> list[PairMoments]:
        """Return the moments of a place's states, one for each text."""

    def embedded(self) -> list[PairMoments]:
        """Return the moments of the states behind the embeddings, one for each text."""

    def samples(self, place: int) -> Samples:
        """Return states of a place that are not in the moments."""

    def between(self, pair: int) -> Samples:
        """Return states between mixer and FFN of a pair of layers that are not in the moments."""

    def normed(self) -> list[PairMoments]:
        """Return the moments of the final states by their root mean squares, one for each text."""

    def embedded_samples(self) -> Samples:
        """Return states behind the embeddings that are not in the moments."""

    def heads(self, pair: int, theirs: Layer, ours: Layer, mapping: ResidualMap) -> HeadsSeen:
        """Return what the heads of a pair of layers are compared by."""

    def neurons(self, pair: int, theirs: Layer, ours: Layer, mapping: ResidualMap) -> NeuronsSeen:
        """Return what the neurons of a pair of layers are compared by."""


@dataclass(frozen=True)
class TextEvidence:
    """Paired activations of one text, or of several by their shares.

    Raises BitsmithError for activations of other models, and where texts paired other layers.
    """

    teacher: Model
    student: Model
    parts: tuple[tuple[Paired, float], ...]

    def __post_init__(self) -> None:
        """Check that all belong to the two models."""
        for one, _ in self.parts:
            for model, said in ((self.teacher, one.manifest.teacher), (self.student, one.manifest.student)):
                if model.checkpoint.source_digest != said.sha256:
                    raise BitsmithError(
                        f"was made of {said.path}, which is not {model.checkpoint.path} as it is now",
                        path=one.path,
                    )
            if one.layer_map != self.layer_map:
                raise BitsmithError(
                    f"pairs layers {list(one.layer_map)}, {self.parts[0][0].path} {list(self.layer_map)}: "
                    "to blend them, pair both with the same layers",
                    path=one.path,
                )

    @property
    def layer_map(self) -> tuple[int, ...]:
        """The teacher's layer beside each of the student's."""
        return self.parts[0][0].layer_map

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of each text."""
        return tuple(share for _, share in self.parts)

    def moments(self, place: int) -> list[PairMoments]:
        """Return the moments of a place's states, one for each text."""
        last = place == len(self.layer_map)
        return [_checked(one.final() if last else one.states(place)) for one, _ in self.parts]

    def embedded(self) -> list[PairMoments]:
        """Return the moments of the states behind the embeddings, one for each text."""
        return [_checked(one.embedded()) for one, _ in self.parts]

    def normed(self) -> list[PairMoments]:
        """Return the moments of the final states by their root mean squares, one for each text."""
        return [_checked(one.normed()) for one, _ in self.parts]

    def samples(self, place: int) -> Samples:
        """Return the held-out states of a place."""
        teacher = (*self.layer_map, self.parts[0][0].manifest.teacher.layers)[place]
        return self._samples(teacher, place)

    def between(self, pair: int) -> Samples:
        """Return the held-out states between mixer and FFN of a pair of layers."""

        def side(name: SideName, layer: int) -> Float32:
            return np.concatenate([in_pieces(one.samples_between(name, layer)) for one, _ in self.parts])

        return side("teacher", self.layer_map[pair]), side("student", pair)

    def embedded_samples(self) -> Samples:
        """Return the held-out states behind the embeddings."""
        return self._samples(0, 0)

    def heads(self, pair: int, theirs: Layer, ours: Layer, mapping: ResidualMap) -> HeadsSeen:
        """Return what the heads of a pair of layers are compared by: their outputs."""
        del mapping
        mean = self._mean([one.mixer(pair) for one, _ in self.parts])
        return heads_by_activations((theirs, self.teacher), (ours, self.student), mean)

    def neurons(self, pair: int, theirs: Layer, ours: Layer, mapping: ResidualMap) -> NeuronsSeen:
        """Return what the neurons of a pair of layers are compared by: their activations."""
        del ours, mapping
        mean = self._mean([one.ffn(pair) for one, _ in self.parts])
        return neurons_by_activations((theirs, self.teacher), mean)

    def _samples(self, teacher: int, student: int) -> Samples:
        def side(name: SideName, layer: int) -> Float32:
            return np.concatenate([in_pieces(one.samples(name, layer)) for one, _ in self.parts])

        return side("teacher", teacher), side("student", student)

    def _mean(self, moments: Sequence[CrossMoments]) -> CrossMoments:
        if len(moments) == 1:
            return moments[0]
        parts = {
            part: sum(share * getattr(one, part) for share, one in zip(self.shares, moments, strict=True))
            for part in ("tt", "ss", "ts", "mean_t", "mean_s")
        }
        return CrossMoments(sum(one.tokens for one in moments), **parts)


@dataclass(frozen=True)
class WeightEvidence:
    """The weights alone: both embeddings over the vocabulary stand for the states of every place.

    Layers are paired proportionally. Raises BitsmithError for vocabularies of different sizes.
    """

    teacher: Model
    student: Model

    @property
    def shares(self) -> tuple[float, ...]:
        """One share: there is one vocabulary."""
        return (1.0,)

    @cached_property
    def layer_map(self) -> tuple[int, ...]:
        """The teacher's layer beside each of the student's."""
        return proportional_layers(layer_kinds(self.teacher), layer_kinds(self.student))

    def moments(self, place: int) -> list[PairMoments]:
        """Return the moments of the embeddings."""
        del place
        return self.embedded()

    def embedded(self) -> list[PairMoments]:
        """Return the moments of the embeddings: every token counts alike."""
        return [self._vocabulary]

    def normed(self) -> list[PairMoments]:
        """Return nothing: weights tell no final states."""
        return []

    def samples(self, place: int) -> Samples:
        """Return embeddings."""
        del place
        return self.embedded_samples()

    def between(self, pair: int) -> Samples:
        """Return embeddings."""
        del pair
        return self.embedded_samples()

    def embedded_samples(self) -> Samples:
        """Return embeddings of tokens, evenly spread over the vocabulary."""
        return self._rows

    def heads(self, pair: int, theirs: Layer, ours: Layer, mapping: ResidualMap) -> HeadsSeen:
        """Return what the heads of a pair of layers are compared by: what they do to a state."""
        del pair
        return heads_by_weights((theirs, self.teacher), (ours, self.student), mapping)

    def neurons(self, pair: int, theirs: Layer, ours: Layer, mapping: ResidualMap) -> NeuronsSeen:
        """Return what the neurons of a pair of layers are compared by: their weights."""
        del pair
        return neurons_by_weights((theirs, self.teacher), (ours, self.student), mapping)

    @cached_property
    def _vocabulary(self) -> PairMoments:
        theirs, ours = self._tables()
        sums: list[Any] = [0.0, 0.0, 0.0]
        for start, stop in theirs.slices():
            t, s = (table.read(start, stop).astype(np.float64) for table in (theirs, ours))
            with one_blas_thread():
                sums = [total + part for total, part in zip(sums, (t.T @ t, s.T @ s, t.T @ s), strict=True)]
        return PairMoments(*(np.asarray(total) / theirs.n_rows for total in sums))

    @cached_property
    def _rows(self) -> Samples:
        theirs, ours = self._tables()
        pieces = min(_VOCABULARY_PIECES, theirs.n_rows // PIECE_TOKENS) or 1
        each = min(PIECE_TOKENS, theirs.n_rows)
        starts = np.linspace(0, theirs.n_rows - each, pieces).astype(int)
        t, s = (np.stack([table.read(a, a + each) for a in starts]) for table in (theirs, ours))
        return t, s

    def _tables(self) -> tuple[Any, Any]:
        theirs, ours = (model.ref(model.having("embed")[0].name) for model in (self.teacher, self.student))
        if theirs.n_rows != ours.n_rows:
            raise BitsmithError(
                f"the teacher's vocabulary has {theirs.n_rows} tokens, the student's {ours.n_rows}"
            )
        return theirs, ours


_VOCABULARY_PIECES = 32


def in_pieces(states: Float32) -> Float32:
    """Return chunks of states (`chunks T D`) cut into pieces of `PIECE_TOKENS` (`n T' D`), without a rest."""
    chunks, tokens, width = states.shape
    each = min(PIECE_TOKENS, tokens)
    count = tokens // each
    return states[:, : count * each].reshape(chunks * count, each, width)


def layer_kinds(model: Model) -> list[str]:
    """Return the kind of each of a model's layers."""
    return ["attention" if layer.has("attn.o") else "delta" for layer in text_layers(model)]


def text_layers(model: Model) -> list[Layer]:
    """Return a model's layers without those of MTP."""
    return [layer for layer in layers_of(model) if layer.instance.startswith("layers.")]


def _checked(moments: CrossMoments) -> PairMoments:
    return PairMoments(moments.tt, moments.ss, moments.ts)
