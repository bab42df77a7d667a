"""What rounding by statistics will take: the real encoder on cut tensors, and the law in their widths."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from bitsmith.run.encode import SLICE_BYTES, Rounder, TensorEncoder
from bitsmith.run.forecast import Budget, Part
from bitsmith.run.plan import PlanRow, SourceTensor
from bitsmith.store.checkpoint import Bytes, ComputedTensor, TensorRef
from bitsmith.store.site_statistics import SiteSpec, SiteStatistics
from bitsmith.store.statistics import Statistics

_WIDTHS = (512, 1024)
WIDEST_REHEARSED = _WIDTHS[-1]
"""Columns of the widest metric that is made for a forecast."""
_ROWS = 256, 1024


@dataclass(frozen=True)
class GuidedLaw:
    """Seconds of a tensor of some type: two terms each of a row, of the choice, and of a site's metric.

    Of a width n: `row` n and n² for each row on one thread, `choice` the same on the sample, `metric` n² and
    n³ for the first tensor of a site. Wider moments than a block count block by block.
    """

    row: tuple[float, float]
    choice: tuple[float, float]
    metric: tuple[float, float]

    def tensor_seconds(self, rows: int, columns: int, block: int, threads: int) -> float:
        """Return the seconds of one tensor without its site's metric, its slices spread over threads."""
        slices = max(1, -(-4 * rows * columns // SLICE_BYTES))
        share = -(-slices // threads) / slices
        blocks = columns / block
        return blocks * (rows * share * _at(self.row, block) + _at(self.choice, block))

    def site_seconds(self, columns: int, block: int) -> float:
        """Return the seconds of a site's metric."""
        return columns / block * block * _at(self.metric, block)


def _at(terms: tuple[float, float], width: int) -> float:
    return terms[0] * width + terms[1] * width * width


def _through(seconds: Mapping[int, float]) -> tuple[float, float]:
    """Return the terms of `a n + b n²` through one or two measures, none negative."""
    (small, low), *more = seconds.items()
    if not more:
        return low / small, 0.0
    ((large, high),) = more
    b = (high / large - low / small) / (large - small)
    if b <= 0:
        return (low + high) / (small + large), 0.0
    a = low / small - b * small
    return (a, b) if a >= 0 else (0.0, (low + high) / (small**2 + large**2))


class _Narrow(Statistics):
    """Statistics of the first columns of every site."""

    def __init__(self, whole: Statistics, columns: int) -> None:
        super().__init__(whole.path, [], partial=True)
        self._whole, self._columns = whole, columns

    def knows(self, spec: SiteSpec) -> bool:
        """Tell what the whole statistics do."""
        return self._whole.knows(spec)

    def of(self, spec: SiteSpec) -> SiteStatistics | None:
        """Return the first columns of what a site has."""
        found, n = self._whole.of(spec), self._columns
        if found is None:
            return None
        moment = found.moment
        if moment is not None:
            moment = np.ascontiguousarray((moment[0] if moment.ndim == 3 else moment)[:n, :n])

        def cut(values: Any) -> Any:
            return None if values is None else np.ascontiguousarray(values[..., :n])

        return replace(
            found,
            diagonal=cut(found.diagonal),
            mean=cut(found.mean),
            moment=moment,
            held=cut(found.held),
            held_diagonal=cut(found.held_diagonal),
        )


def guided_law(
    statistics: Statistics, rounder: Rounder, tensor: SourceTensor, row: PlanRow, seconds: float
) -> GuidedLaw:
    """Measure a type's law on cuts of one tensor; on one width alone where `seconds` are few."""
    rows: dict[int, float] = {}
    choice: dict[int, float] = {}
    metric: dict[int, float] = {}
    began = time.perf_counter()
    block = _block_of(statistics, tensor, row.shape[-1])
    few, more = (min(count, row.shape[0]) for count in _ROWS)
    for width in _WIDTHS:
        width = min(width, block)  # noqa: PLW2901
        if width in rows or (rows and time.perf_counter() - began > seconds / 4):
            break
        if not rows:
            _encode(
                _encoder(statistics, rounder, width, tensor), tensor, row, (few, width)
            )  # loads its kernels
        encoder = _encoder(statistics, rounder, width, tensor)
        first, again = (_encode(encoder, tensor, row, (few, width)) for _ in range(2))
        whole = _encode(encoder, tensor, row, (more, width)) if more > few else again
        rows[width] = max(0.0, whole - again) / max(1, more - few) if more > few else again / few
        choice[width] = max(0.0, again - few * rows[width])
        metric[width] = max(0.0, first - again) / width
    return GuidedLaw(_through(rows), _through(choice), _through(metric))


def _encoder(statistics: Statistics, rounder: Rounder, width: int, tensor: SourceTensor) -> TensorEncoder:
    return TensorEncoder(_Narrow(statistics, width), rounder, statistics.path)


def _encode(encoder: TensorEncoder, tensor: SourceTensor, row: PlanRow, shape: tuple[int, int]) -> float:
    """Encode a cut of a tensor and return the seconds."""
    part = replace(tensor, ref=_cut(tensor.ref, shape), origin=_cut(tensor.ref, shape))
    narrow = replace(row, shape=shape, nbytes=row.nbytes * prod(shape) // prod(row.shape))
    began = time.perf_counter()
    encoder.encode_guided(part, narrow, _consume)
    return time.perf_counter() - began


def _consume(blocks: Iterable[Bytes]) -> None:
    for _ in blocks:
        pass


def _cut(ref: TensorRef, shape: tuple[int, int]) -> TensorRef:
    m, n = shape
    kept = np.ascontiguousarray(np.asarray(ref.read(0, m), np.float32)[:, :n])
    return ComputedTensor(ref.name, (m, n), ref.dtype, lambda start, stop: kept[start:stop])


def _block_of(statistics: Statistics, tensor: SourceTensor, columns: int) -> int:
    """Return the width of the diagonal blocks that a tensor's moments come in."""
    found = statistics.of(tensor.spec)
    moment = None if found is None else found.moment
    return columns if moment is None or moment.ndim == 2 else moment.shape[1]


def guided_parts(
    statistics: Statistics,
    rounder: Rounder,
    pairs: Sequence[tuple[SourceTensor, PlanRow]],
    threads: int,
    budget: Budget,
) -> list[Part]:
    """Return the parts of all tensors that statistics guide, type by type."""
    types = sorted({row.type for _, row in pairs})
    parts, sites = list[Part](), set[tuple[str | None, Any]]()
    blocks: dict[int, int] = {}
    for number, name in enumerate(types):
        own = [(tensor, row) for tensor, row in pairs if row.type == name]
        tensor, row = max(own, key=lambda pair: pair[1].shape[0] >= _ROWS[1])
        law = guided_law(statistics, rounder, tensor, row, budget.share(len(types) - number))
        total = 0.0
        for tensor, row in own:
            rows, columns = prod(row.shape) // row.shape[-1], row.shape[-1]
            if columns not in blocks:
                blocks[columns] = _block_of(statistics, tensor, columns)
            block = blocks[columns]
            total += law.tensor_seconds(rows, columns, block, threads)
            site = tensor.spec.site, tensor.spec.column_steps
            if site not in sites:
                sites.add(site)
                total += law.site_seconds(columns, block)
        weights = sum(prod(row.shape) for _, row in own)
        parts.append(Part(f"{name} by statistics", total, weights, "weights", weights / max(total, 1e-9)))
    return parts
