"""What enters one activation site, and how it changes where a matrix's columns do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]


class ColumnStep(Protocol):
    """A change of a matrix's columns, and so of what it reads; `bitsmith.archs.Step` is one."""

    column_order: NDArray[np.intp] | None
    column_factors: NDArray[np.float64] | None

    def inputs(self, x: NDArray[Any]) -> NDArray[Any]: ...  # noqa: D102
    def importance(self, vector: Float32) -> Float32: ...  # noqa: D102


class SiteSpec(Protocol):
    """What statistics need to know of a tensor; `bitsmith.archs.TensorSpec` is one."""

    @property
    def name(self) -> str: ...  # noqa: D102 (as in TensorSpec)
    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def role(self) -> str: ...  # noqa: D102
    @property
    def gguf_name(self) -> str | None: ...  # noqa: D102
    @property
    def site(self) -> str | None: ...  # noqa: D102
    @property
    def column_steps(self) -> tuple[ColumnStep, ...]: ...  # noqa: D102
    def importance_from_gguf(self, vector: Float32) -> Float32: ...  # noqa: D102


@dataclass(frozen=True)
class SiteStatistics:
    """What entered one activation site, x (`in`), over `tokens` tokens of the fit split.

    `diagonal` is E[x²] and `mean` E[x] (`in` each); `moment` is E[s x xᵀ] (`in in`), or its diagonal blocks
    (`n b b`), s the token's saliency (1 on average; 1 where it was not asked for). `held` is a seeded sample
    of the held-out chunks' inputs as √s x (`rows in`), `held_diagonal` E[x²] over all `held_tokens` of them.
    None where it was not collected; an imatrix has the diagonal alone.

    In a compressed model x̂ enters where x did in the original. `moment`, `diagonal` and `held` are then x̂'s;
    `cross` is E[s x x̂ᵀ], shaped as `moment`, and `held_original` has the x of `held`'s tokens (`rows in`).
    Both are None for the original model, and neither is ever stored.
    """

    site: str
    tokens: int
    diagonal: Float32
    mean: Float32 | None = None
    moment: Float32 | None = None
    held: Float32 | None = None
    held_tokens: int = 0
    held_diagonal: Float32 | None = None
    cross: Float32 | None = None
    held_original: Float32 | None = None

    @property
    def importance(self) -> Float32:
        """The moment's diagonal (`in`), which weighs what rounding a column costs; E[x²] without a moment."""
        if self.moment is None:
            return self.diagonal
        found: Float32 = np.diagonal(self.moment, axis1=-2, axis2=-1).reshape(-1).copy()
        return found

    def moved(self, steps: Iterable[ColumnStep]) -> SiteStatistics:
        """Return the statistics of what a matrix reads once `steps` have changed its columns.

        Diagonal blocks that a step tears apart become a whole `in in`, zero between them. A diagonal without
        a moment cannot be rotated: what is left of it is what `importance` of the step makes of it.
        """
        found = self
        for step in steps:
            found = found._moved(step)
        return found

    def _moved(self, step: ColumnStep) -> SiteStatistics:
        def rows(x: Float32 | None) -> Float32 | None:
            return None if x is None else step.inputs(x)

        moment = None if self.moment is None else _moment_moved(self.moment, step)
        return replace(
            self,
            diagonal=_diagonal_moved(self.diagonal, moment, step),
            mean=rows(self.mean),
            moment=moment,
            held=rows(self.held),
            held_diagonal=(
                None if self.held_diagonal is None else _diagonal_moved(self.held_diagonal, moment, step)
            ),
            cross=None if self.cross is None else _moment_moved(self.cross, step),
            held_original=rows(self.held_original),
        )

    def all_tokens(self) -> tuple[Float32, int]:
        """Return E[x²] (`in`) over fit and held-out tokens together, and how many those are."""
        if self.held_diagonal is None or self.held_tokens == 0:
            return self.diagonal, self.tokens
        total = self.tokens + self.held_tokens
        sums = self.diagonal.astype(np.float64) * self.tokens
        sums += self.held_diagonal.astype(np.float64) * self.held_tokens
        return (sums / total).astype(np.float32), total


def _moment_moved(moment: Float32, step: ColumnStep) -> Float32:
    """Return E[x xᵀ] of the inputs that `step` moves, in diagonal blocks (`n b b`) where that is exact."""
    if moment.ndim == 3:
        count, size = moment.shape[:2]
        if step.column_factors is not None:
            factors = step.column_factors.reshape(count, size)
            scaled = moment * factors[:, :, None] * factors[:, None, :]
            return scaled.astype(np.float32)
        if step.column_order is not None and (kept := _blocks_moved(moment, step.column_order)) is not None:
            return kept
        moment = dense_moment(moment)
    if step.column_order is not None:
        return moment[np.ix_(step.column_order, step.column_order)]
    return np.ascontiguousarray(step.inputs(np.ascontiguousarray(step.inputs(moment).T)).T)


def _blocks_moved(moment: Float32, order: NDArray[np.intp]) -> Float32 | None:
    """Return diagonal blocks in a new order of columns, None if that tears a block apart."""
    count, size = moment.shape[:2]
    blocks = order.reshape(count, size) // size
    if (blocks != blocks[:, :1]).any():
        return None
    inside = order.reshape(count, size) % size
    return np.stack([moment[b[0]][np.ix_(i, i)] for b, i in zip(blocks, inside, strict=True)])


def _diagonal_moved(diagonal: Float32, moment: Float32 | None, step: ColumnStep) -> Float32:
    """Return E[x²] of the moved inputs; a rotation's takes its shape from the moved moment if there is one.

    The moment weighs tokens and the diagonal does not, so only their proportions are alike.
    """
    if step.column_order is not None or step.column_factors is not None or moment is None:
        return step.importance(diagonal)
    shape = np.diagonal(moment, axis1=-2, axis2=-1).reshape(-1)
    total = float(shape.sum(dtype=np.float64))
    if total <= 0:
        return step.importance(diagonal)
    return (shape * (float(diagonal.sum(dtype=np.float64)) / total)).astype(np.float32)


def dense_moment(moment: Float32) -> Float32:
    """Return E[x xᵀ] as `in in`, zero between its diagonal blocks (`n b b`)."""
    if moment.ndim == 2:
        return moment
    count, size = moment.shape[:2]
    whole = np.zeros((count * size, count * size), np.float32)
    for number, block in enumerate(moment):
        at = slice(number * size, (number + 1) * size)
        whole[at, at] = block
    return whole
