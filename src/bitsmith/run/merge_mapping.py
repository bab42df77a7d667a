"""The map of each place by a merge's recipe: one for all or one each, of one text or blended of several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitsmith.errors import BitsmithError
from bitsmith.passes.merge_kept import MapFile
from bitsmith.passes.merge_maps import (
    PairMoments,
    ResidualMap,
    along_axes,
    blended_map,
    cross_map,
    geodesic_map,
    pooled,
    procrustes_map,
    random_fold,
    ridge_map,
    sparse_fold,
    subspace_map,
    tiered_map,
    whitened_map,
)
from bitsmith.run.merge_evidence import Evidence
from bitsmith.run.merge_recipe import MergeRecipe

Float64 = NDArray[np.float64]

_PLAIN = {
    "joint": procrustes_map,
    "svd": subspace_map,
    "cross": cross_map,
    "cca": whitened_map,
    "ridge": ridge_map,
}
_OBLIQUE = ("cca", "ridge")
_SPILL_BYTES = 64 << 20


class Mapper:
    """Finds maps; the global one once."""

    def __init__(self, evidence: Evidence, recipe: MergeRecipe) -> None:
        self._evidence, self._recipe = evidence, recipe
        self._count = len(evidence.layer_map)

    @cached_property
    def _file(self) -> MapFile:
        return MapFile()

    def at(self, place: int) -> ResidualMap:
        """Return the map of a place's states."""
        return self._global if self._is_global else self._kept(self._evidence.moments(place), [place])

    def embedding(self) -> ResidualMap:
        """Return the map of the states behind the embeddings."""
        return self._global if self._is_global else self._kept(self._evidence.embedded(), [0])

    def between(self, number: int) -> ResidualMap:
        """Return the map of the states between a layer's mixer and its FFN: of both ends' mean moments."""
        if self._is_global:
            return self._global
        places = number, number + 1
        ends = [self._evidence.moments(place) for place in places]
        return self._kept([pooled(both) for both in zip(*ends, strict=True)], places)

    def mean(self, moments: Sequence[PairMoments]) -> PairMoments:
        """Return the mean of several texts' moments by their shares."""
        shares = self._evidence.shares
        if len(moments) == 1:
            return moments[0]
        return PairMoments(
            *(
                np.sum([w * getattr(one, part) for w, one in zip(shares, moments, strict=True)], axis=0)
                for part in ("tt", "ss", "ts")
            )
        )

    @property
    def _is_global(self) -> bool:
        return self._recipe.basis == "global"

    @cached_property
    def _global(self) -> ResidualMap:
        """The map of all places' moments and the embeddings', each counted alike."""
        texts = range(len(self._evidence.shares))
        return self._found([pooled(self._all(text)) for text in texts], range(self._count + 1))

    def _all(self, text: int) -> Iterator[PairMoments]:
        """Yield one text's moments of every place and of the embeddings, so that one is in memory."""
        for place in range(self._count + 1):
            yield self._evidence.moments(place)[text]
        yield self._evidence.embedded()[text]

    def _kept(self, moments: Sequence[PairMoments], places: Sequence[int]) -> ResidualMap:
        """Return one of many maps: in a file where all of them would take much memory."""
        found = self._found(moments, places)
        many_bytes = (2 * self._count + 2) * 2 * 8 * found.forward.size
        return self._file.put(found) if many_bytes > _SPILL_BYTES else found

    def _found(self, moments: Sequence[PairMoments], places: Sequence[int]) -> ResidualMap:
        maps = [self._map(one, places) for one in moments]
        return maps[0] if len(maps) == 1 else self._blended(maps)

    def _map(self, moments: PairMoments, places: Sequence[int]) -> ResidualMap:
        """Return the recipe's map of one text's moments."""
        recipe = self._recipe
        if recipe.map in _PLAIN:
            return _PLAIN[recipe.map](moments)
        trunk = moments.width // 2 if recipe.trunk is None else recipe.trunk
        wide = len(moments.tt)
        if not 0 < trunk < moments.width:
            raise BitsmithError(f"the trunk has {trunk} dimensions, expected 1 … {moments.width - 1}")
        fold: Float64 | None = None
        if recipe.map == "random-fold":
            fold = random_fold(wide - trunk, moments.width - trunk, recipe.seed)
        elif recipe.map == "sparse-fold":
            fold = sparse_fold(along_axes(self._rows(places), moments, trunk), moments.width - trunk)
        return tiered_map(moments, trunk, fold)

    def _rows(self, places: Sequence[int]) -> NDArray[Any]:
        """Return sample states of the teacher at some places, each place's of one mean square."""
        rows = []
        for place in places:
            states = self._evidence.samples(place)[0]
            size = float(np.sqrt(np.mean(np.square(states, dtype=np.float64)))) or 1.0
            rows.append(states.reshape(-1, states.shape[-1]) / size)
        return np.concatenate(rows)

    def _blended(self, maps: Sequence[ResidualMap]) -> ResidualMap:
        """Return what lies between several texts' maps, by their shares."""
        shares = self._evidence.shares
        if self._recipe.map in _OBLIQUE:
            forward, backward = (
                np.sum([w * getattr(one, part) for w, one in zip(shares, maps, strict=True)], axis=0)
                for part in ("forward", "backward")
            )
            return ResidualMap(forward, backward, f"{maps[0].method} mean")
        if len(maps) == 2:
            try:
                return geodesic_map(maps[0], maps[1], shares[1])
            except BitsmithError:  # a reflection lies between them: only the chord is left
                return blended_map(maps, shares)
        return blended_map(maps, shares)
