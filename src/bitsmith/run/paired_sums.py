"""Second and cross moments of what passes one place in two models on the same tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from bitsmith.errors import BitsmithError

Float64 = NDArray[np.float64]
Part = Literal["tt", "ss", "ts"]
PARTS: tuple[Part, ...] = ("tt", "ss", "ts")

_STRIPE = 512


@dataclass(frozen=True)
class PlaceShape:
    """Widths of one place in teacher and student, and in blocks of how many columns each is squared.

    A block of the whole width keeps E[x xᵀ] whole (`w w`), of 1 its diagonal alone (`w`), any other in
    diagonal blocks (`w/b b b`).
    """

    teacher: int
    student: int
    teacher_block: int
    student_block: int

    @property
    def values(self) -> int:
        """Numbers kept: both squares, the cross moment and both means."""
        squares = self.teacher * self.teacher_block + self.student * self.student_block
        return squares + self.teacher * self.student + self.teacher + self.student

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds for a token; of a square the upper triangle is summed."""
        squares = self.teacher * self.teacher_block + self.student * self.student_block
        return squares // 2 + self.teacher * self.student


class PlaceSums:
    """Σ t tᵀ, Σ s sᵀ, Σ t sᵀ, Σ t and Σ s in float64, of t in the teacher and s in the student.

    Products of a batch are taken in the precision of the rows. Parts may be added by several threads at once,
    each part in the order of the batches.
    """

    def __init__(self, shape: PlaceShape) -> None:
        self._squares = {
            "tt": _square(shape.teacher, shape.teacher_block),
            "ss": _square(shape.student, shape.student_block),
        }
        self._cross = torch.zeros((shape.teacher, shape.student), dtype=torch.float64)
        self._sums = {
            "tt": torch.zeros(shape.teacher, dtype=torch.float64),
            "ss": torch.zeros(shape.student, dtype=torch.float64),
        }
        self._tokens = 0

    def add(self, part: Part, teacher: torch.Tensor, student: torch.Tensor) -> None:
        """Add rows (`N t`, `N s`) to one part."""
        if part == "ts":
            self._tokens += len(teacher)
            for start in range(0, teacher.shape[1], _STRIPE):
                stop = start + _STRIPE
                self._cross[start:stop] += teacher[:, start:stop].T @ student
            return
        rows = teacher if part == "tt" else student
        self._sums[part] += rows.sum(0, dtype=torch.float64)
        _add_square(self._squares[part], rows)

    def result(self, place: str) -> dict[str, Float64]:
        """Return the means over the tokens by name, and let go of the sums.

        Raises BitsmithError where something is not finite.
        """
        sums = {**self._squares, "ts": self._cross, "mean_t": self._sums["tt"], "mean_s": self._sums["ss"]}
        found: dict[str, Float64] = {}
        for name, total in sums.items():
            found[name] = total.div_(self._tokens).numpy()
            if name in self._squares:
                _mirror(found[name])
            if not np.isfinite(total.sum().item()):
                raise BitsmithError(f"{place} holds values whose products are not finite")
        return found


def _square(width: int, block: int) -> torch.Tensor:
    shape = (width,) if block == 1 else (width // block, block, block) if block < width else (width, width)
    return torch.zeros(shape, dtype=torch.float64)


def _add_square(square: torch.Tensor, rows: torch.Tensor) -> None:
    """Add Σ x xᵀ of `rows`: of whole and blocked squares the upper triangle, in stripes."""
    if square.ndim == 1:
        square += (rows * rows).sum(0, dtype=torch.float64)
        return
    blocks = square if square.ndim == 3 else square[None]
    size = blocks.shape[1]
    for number, block in enumerate(blocks):
        part = rows[:, number * size : (number + 1) * size]
        for start in range(0, size, _STRIPE):
            stop = start + _STRIPE
            block[start:stop, start:] += part[:, start:stop].T @ part[:, start:]


def _mirror(square: Float64) -> None:
    """Copy upper triangles, summed in stripes, below the diagonal."""
    if square.ndim == 1:
        return
    for block in square if square.ndim == 3 else square[None]:
        for start in range(0, len(block), _STRIPE):
            stop = start + _STRIPE
            block[stop:, start:stop] = block[start:stop, stop:].T
            corner = block[start:stop, start:stop]
            corner[...] = np.triu(corner) + np.triu(corner, 1).T
