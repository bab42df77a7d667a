"""The rounding error of a sample of a matrix under changes of its columns, by which gauges are solved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray

from bitsmith.formats.format import Float32, Format
from bitsmith.passes.axes import Channels, shared_mean
from bitsmith.passes.choice import SAMPLE_ROWS
from bitsmith.passes.transform import Context, Model
from bitsmith.passes.trial import column_squares, inputs_of, sample, squares, stored_form

Float64 = NDArray[np.float64]

SAMPLE_WEIGHTS = 1 << 20
"""Weights that all matrices of one search round for each candidate."""

LEAST_ROWS = 16
"""Rows of each matrix that are looked at, however many weights those have."""

SURE = 2.0
"""Standard errors, over the sampled rows, that a gain must exceed."""


class ColumnTrial:
    """Sampled rows of a matrix (Hugging Face columns, behind its transforms) and E[x²] of what they read.

    Column `j` carries channel `channels[j]` of an axis.
    """

    def __init__(
        self, model: Model, name: str, form: Format, channels: Channels, context: Context, rows: int
    ) -> None:
        spec = model.spec(name)
        transformed = model.ref(name)
        self.name, self.form, self.channels = name, form, channels
        self.rows = sample(transformed, rows)
        inputs = inputs_of(spec, context.statistics, moment=False)
        self.importance = None if inputs is None else spec.importance_from_gguf(inputs.importance)
        layout = np.arange(len(channels), dtype=np.float32)  # exact: there are fewer than 2^24 columns
        for step in spec.steps:
            layout = step.importance(layout)
        self._layout = layout.astype(np.intp)
        whole = float(self._squares(self.rows, self.importance).sum())
        looked_up = spec.role == "embed" and inputs is None  # a token's outputs are one row's columns
        outputs = transformed.shape[1] if looked_up else transformed.n_rows
        self._unit = outputs / whole if whole > 0 else 0.0

    @classmethod
    def of(cls, model: Model, matrices: list[tuple[str, Channels]], context: Context) -> list[Self]:
        """Return trials of those matrices (name, channels) that the context rounds."""
        stored = [
            (name, form, channels)
            for name, channels in matrices
            if (form := stored_form(name, context)) is not None
        ]
        weights = SAMPLE_WEIGHTS // max(1, sum(len(channels) for _, _, channels in stored))
        rows = max(LEAST_ROWS, min(SAMPLE_ROWS, weights))
        return [cls(model, name, form, channels, context, rows) for name, form, channels in stored]

    @property
    def mean_squares(self) -> Float64:
        """Mean square of the columns by channel."""
        return shared_mean(column_squares(self.rows), self.channels)

    @property
    def moments(self) -> Float64:
        """E[x²] of the inputs by channel; 1 where that is unknown."""
        if self.importance is None:
            return np.ones(int(self.channels.max()) + 1)
        return shared_mean(self.importance.astype(np.float64), self.channels)

    def scaled(self, factors: Float64) -> Float64:
        """Return `errors` of the columns times `factors` (`in`), in the units of the unscaled ones."""
        rows = (self.rows * factors).astype(np.float32)
        if self.importance is None:
            return self._errors(rows, None, factors**-2.0)
        importance = (self.importance / factors**2).astype(np.float32)
        return self._errors(rows, importance, importance)

    def ordered(self, order: Channels) -> Float64:
        """Return `errors` of the columns in another order (`in`)."""
        importance = None if self.importance is None else self.importance[order]
        return self._errors(self.rows[:, order], importance, importance)

    def errors(self) -> Float64:
        """Return `n sum_j E[x_j²] e_j² / sum_ij E[x_j²] w_ij²` row by row (`rows`), `n` the matrix's outputs.

        Their sum is the relative error times the outputs: in a sum over matrices each output counts alike.
        """
        return self._errors(self.rows, self.importance, self.importance)

    def _errors(
        self, rows: Float32, importance: Float32 | None, weights: Float32 | Float64 | None
    ) -> Float64:
        rows = rows[:, self._layout]
        guide = None if importance is None else importance[self._layout]
        errors = rows - self.form.decode(self.form.encode(rows, guide))
        return self._unit * self._squares(errors, None if weights is None else weights[self._layout])

    @staticmethod
    def _squares(rows: Float32, weights: Float32 | Float64 | None) -> Float64:
        return squares(rows, np.ones(rows.shape[-1]) if weights is None else weights)


def gain_of(before: Sequence[Float64], after: Sequence[Float64]) -> float:
    """Return the errors before less those after, both by matrix and row; 0 for a gain that is not sure.

    Sure is one of more than `SURE` standard errors, those of rows drawn from each matrix by itself.
    """
    gains = [old - new for old, new in zip(before, after, strict=True)]
    total = float(sum(part.sum() for part in gains))
    deviation = float(np.sqrt(sum(len(part) * part.var() for part in gains)))
    return total if total > SURE * deviation else 0.0
