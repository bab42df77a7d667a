"""Statistics of a checkpoint's inputs, and what they make of integer grids: rounder, codes, errors."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitsmith.archs import TensorSpec, claim
from bitsmith.errors import BitsmithError
from bitsmith.formats.accelerator import device_facts
from bitsmith.formats.format import Float32
from bitsmith.formats.integer import Coded, GridFormat
from bitsmith.numerics.finite import first_non_finite
from bitsmith.numerics.input_metric import InputMetric
from bitsmith.passes.choice import Choice
from bitsmith.passes.grid_feedback import choose_grid, feedback
from bitsmith.passes.rounding import output_error
from bitsmith.passes.trial import sample
from bitsmith.run.encode import Rounder, check_rounder
from bitsmith.run.finite import finite_weights
from bitsmith.store.checkpoint import Checkpoint, TensorRef
from bitsmith.store.journal import content_key
from bitsmith.store.statistics import SiteStatistics, Statistics, open_statistics

Int64 = NDArray[np.int64]

VOCABULARY = ("embed", "head")
"""Roles of matrices that have a row for each token."""


class Guide:
    """Statistics of what each tensor reads, what they make of it, and the metrics of one site."""

    def __init__(self, checkpoint: Checkpoint, path: Path, rounder: str) -> None:
        self._specs: dict[str, TensorSpec] = {spec.name: spec for spec, _ in claim(checkpoint)}
        self._statistics: Statistics = open_statistics(path, self._specs.values())
        self.rounder: Rounder = check_rounder(rounder, self._statistics, path)
        self._site = ""
        self._metrics: dict[tuple[float, float], InputMetric] = {}

    @property
    def digest(self) -> str:
        """The SHA-256 of the statistics."""
        return self._statistics.digest

    def key(self, checkpoint: Checkpoint, layout: Any) -> dict[str, Any]:
        """Return what the codes of a checkpoint depend on, under a `layout` of plain values."""
        return rounding_key(checkpoint, layout, self.digest, self.rounder)

    def ordered(self, names: Iterable[str]) -> list[str]:
        """Return `names` with the tensors of a site side by side, so that its metrics are made once."""
        sites = {name: spec.site or "" for name, spec in self._specs.items()}
        return sorted(names, key=lambda name: sites.get(name, ""))

    def inputs(self, name: str) -> SiteStatistics | None:
        """Return what a tensor's inputs are like, None where nobody knows."""
        spec = self._specs.get(name)
        return None if spec is None else self._statistics.hugging_face(spec)

    def token_counts(self, name: str) -> Int64 | None:
        """Return how often each token occurred in calibration, of a matrix with a row per token.

        None for other matrices, and where tokens are not known.
        """
        spec, tokens = self._specs.get(name), self._statistics.tokens()
        if spec is None or spec.role not in VOCABULARY or tokens is None:
            return None
        return np.bincount(tokens[0].reshape(-1), minlength=spec.shape[0])

    def choice(self, ref: TensorRef, grid: GridFormat) -> Choice:
        """Return how a tensor is rounded, by a sample of its rows."""
        inputs, rows = self.inputs(ref.name), sample(ref)
        if inputs is None or first_non_finite(rows) is not None:
            return Choice("nearest")
        return choose_grid(
            grid, rows, inputs, self.rounder, metric_for=lambda *key: self.metric(inputs, *key)
        )  # fmt: skip

    def coded(self, name: str, grid: GridFormat, rows: Float32, choice: Choice) -> Coded:
        """Return rows coded as was chosen."""
        inputs = None if choice.rounder == "nearest" else self.inputs(name)
        if inputs is None:
            return grid.quantize(rows)
        if choice.damping is None:
            return grid.quantize(rows, inputs.importance)
        return feedback(grid, rows, self.metric(inputs, choice.damping, choice.shrink))

    def metric(self, inputs: SiteStatistics, damping: float, shrink: float) -> InputMetric:
        """Return the metric of a tensor's inputs; the tensors of a site share it.

        Raises BitsmithError where second moments are missing.
        """
        if inputs.moment is None:
            raise BitsmithError("error feedback needs second moments", path=self._statistics.path)
        if inputs.site != self._site:
            self._site, self._metrics = inputs.site, {}
        key = damping, shrink
        if key not in self._metrics:
            self._metrics[key] = InputMetric(inputs.moment, damping, shrink=shrink)
        return self._metrics[key]


def rounding_key(
    source: Checkpoint | str, layout: Any, statistics: str | None, rounder: str
) -> dict[str, Any]:
    """Return what codes depend on: versions, source, what each tensor becomes, statistics, rounder."""
    return content_key(
        source,
        {
            "numpy version": np.__version__,
            "types or schemes": layout,
            "statistics": statistics,
            "rounder": rounder,
            **device_facts(),
        },
    )


class Total:
    """Sums over a tensor's slices: weights and errors, and what both make of held-out inputs."""

    def __init__(self, inputs: SiteStatistics | None) -> None:
        held = None if inputs is None else inputs.held
        self._held = held if held is not None and len(held) else None
        self._error = self._energy = self._held_error = self._held_energy = 0.0

    def add(self, rows: Float32, decoded: Float32) -> None:
        """Take a slice and what it decodes to."""
        errors = rows - decoded
        self._error += _squares(errors)
        self._energy += _squares(rows)
        if self._held is not None:
            self._held_error += output_error(errors, self._held)
            self._held_energy += output_error(rows, self._held)

    def errors(self) -> tuple[float, float | None]:
        """Return the relative error of the weights, and that of the outputs."""
        outputs = self._held_error / self._held_energy if self._held_energy else 0.0
        weights = self._error / self._energy if self._energy else 0.0
        return weights, None if self._held is None else outputs


def finite_rows(ref: TensorRef, start: int, stop: int, path: Path) -> Float32:
    """Return rows as a float32 matrix (whatever has no columns as one row).

    Raises DamagedFileError for a weight that is not finite.
    """
    values = finite_weights(ref, path, start, stop)
    return values.reshape(len(values), -1) if values.ndim > 1 and values.size else values.reshape(1, -1)


class FiniteRows:
    """A tensor's rows as float32, refused as `finite_rows` does where they are not finite."""

    def __init__(self, ref: TensorRef, path: Path) -> None:
        self._ref, self._path = ref, path

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        return self._ref.shape

    def read(self, start: int = 0, stop: int | None = None) -> Float32:
        """Return rows `[start, stop)`."""
        return finite_rows(self._ref, start, self._ref.shape[0] if stop is None else stop, self._path)


def _squares(values: Float32) -> float:
    flat = values.reshape(-1)
    return float(np.einsum("i,i->", flat, flat, dtype=np.float64))
