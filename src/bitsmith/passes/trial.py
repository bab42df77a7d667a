"""What storing a tensor in its format does to its outputs, tried on a sample of rows; nothing is written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bitsmith.archs import TensorSpec
from bitsmith.errors import BitsmithError, printable
from bitsmith.formats.format import Float32, Format
from bitsmith.numerics.input_metric import DAMPING, InputMetric
from bitsmith.passes.choice import SAMPLE_ROWS
from bitsmith.passes.rounding import round_rows
from bitsmith.passes.transform import Context, Model
from bitsmith.store.checkpoint import TensorRef
from bitsmith.store.statistics import SiteStatistics, Statistics

Float64 = NDArray[np.float64]
Measure = Literal["held", "moment", "diagonal", "plain"]

_RUN_ROWS = 16  # rows next to each other in the sample
_ROUNDERS = ("nearest", "weighted", "gptq")


@dataclass(frozen=True)
class Trial:
    """The error of a tensor's outputs relative to the outputs, `sum |E x|² / sum |W x|²`, on `rows` rows.

    `measure` says over what: `held` over held-out inputs; of the fit split by E[x xᵀ] (`moment`) or by E[x²]
    alone (`diagonal`); `plain`, over inputs of which nothing is known. With `held`, `token_errors` and
    `token_energies` have |E x|² and |W x|² input by input (`tokens`), for intervals over tokens.
    """

    error: float
    measure: Measure
    rows: int
    token_errors: Float64 | None = None
    token_energies: Float64 | None = None


def output_errors(
    model: Model,
    names: Iterable[str],
    context: Context,
    *,
    sample_rows: int = SAMPLE_ROWS,
    rounder: str = "weighted",
    split: Literal["fit", "held"] = "held",
) -> dict[str, Trial]:
    """Return a trial of each of the tensors (Hugging Face names) that the context stores in a block format.

    `rounder` is `nearest`, `weighted` (by E[x²]) or `gptq` (error feedback with the default damping; without
    second moments `weighted`). `split` is the split that measures; the fit split, which guides the rounding,
    measures where nothing is held out. Trials of two models look at the same rows unless a transform has
    changed their order. Raises BitsmithError for an unknown rounder.
    """
    if rounder not in _ROUNDERS:
        raise BitsmithError(f"unknown rounder {printable(rounder)!r}; known: {', '.join(_ROUNDERS)}")
    found: dict[str, Trial] = {}
    for name in names:
        form = stored_form(name, context)
        if form is None:
            continue
        spec, ref = model.tensors[name]
        inputs = inputs_of(spec, context.statistics, moment=rounder == "gptq" or split == "fit")
        rows = sample(spec.to_gguf(ref), sample_rows)
        errors = rows - form.decode(_encoded(form, rows, inputs, rounder))
        found[name] = _trial(rows, errors, inputs, split)
    return found


def stored_form(name: str, context: Context) -> Format | None:
    """Return the format that a tensor is rounded to; None where it stays float32."""
    form = context.formats.get(name)
    return None if form is None or form.name == "F32" else form


def inputs_of(spec: TensorSpec, statistics: Statistics | None, *, moment: bool) -> SiteStatistics | None:
    """Return the statistics of what a tensor reads, in its GGUF columns and behind its transforms.

    Without `moment` its diagonal alone is moved where no transform mixes columns; `importance` is the same.
    """
    found = None if statistics is None else statistics.hugging_face(spec)
    if found is None:
        return None
    steps = spec.column_steps
    if not moment and all(step.column_order is not None or step.column_factors is not None for step in steps):
        found = replace(found, diagonal=found.importance, moment=None, cross=None)
    return found.moved(steps)


def sample(ref: TensorRef, rows: int = SAMPLE_ROWS) -> Float32:
    """Return runs of rows spread evenly over a matrix, `rows` at most (`rows in`)."""
    return np.concatenate([np.asarray(ref.read(*run), np.float32) for run in sample_runs(ref.n_rows, rows)])


def sample_runs(count: int, rows: int = SAMPLE_ROWS) -> list[tuple[int, int]]:
    """Return `(start, stop)` of runs spread evenly over `count` rows, `rows` of them at most."""
    if count <= rows:
        return [(0, count)]
    size, runs = min(_RUN_ROWS, rows), max(1, rows // _RUN_ROWS)
    return [(start, start + size) for start in np.linspace(0, count - size, runs).astype(int).tolist()]


def column_squares(rows: NDArray[Any]) -> Float64:
    """Return the mean square of each column of `rows` (`out in`)."""
    found: Float64 = np.einsum("ij,ij->j", rows, rows, dtype=np.float64) / max(1, len(rows))
    return found


def _encoded(form: Format, rows: Float32, inputs: SiteStatistics | None, rounder: str) -> NDArray[np.uint8]:
    if inputs is None or rounder == "nearest":
        return form.encode(rows)
    if rounder == "gptq" and inputs.moment is not None:
        return round_rows(form, rows, InputMetric(inputs.moment, DAMPING))
    return form.encode(rows, inputs.importance)


def _trial(rows: Float32, errors: Float32, inputs: SiteStatistics | None, split: str) -> Trial:
    if inputs is not None and split == "held" and inputs.held is not None and len(inputs.held):
        by_token, energies = _by_token(errors, inputs.held), _by_token(rows, inputs.held)
        error = _ratio(float(by_token.sum()), float(energies.sum()))
        return Trial(error, "held", len(rows), by_token, energies)
    if inputs is not None and inputs.moment is not None:
        lost, whole = (_by_moment(part, inputs.moment) for part in (errors, rows))
        return Trial(_ratio(lost, whole), "moment", len(rows))
    weights = np.ones(rows.shape[-1], np.float32) if inputs is None else inputs.importance
    lost, whole = (float(squares(part, weights).sum()) for part in (errors, rows))
    return Trial(_ratio(lost, whole), "plain" if inputs is None else "diagonal", len(rows))


def squares(rows: Float32, weights: Float32 | Float64) -> Float64:
    """Return `sum_j weights_j rows_ij²` by row."""
    found: Float64 = np.einsum("ij,ij,j->i", rows, rows, weights, dtype=np.float64)
    return found


def _by_token(rows: Float32, held: Float32) -> Float64:
    produced = np.asarray(held, np.float32) @ rows.T
    found: Float64 = np.einsum("ij,ij->i", produced, produced, dtype=np.float64)
    return found


def _by_moment(rows: Float32, moment: Float32) -> float:
    """Return `tr(R H Rᵀ)`; `moment` is whole or in diagonal blocks."""
    blocks = moment[None] if moment.ndim == 2 else moment
    parts = rows.reshape(len(rows), len(blocks), -1).transpose(1, 0, 2)
    return float(np.einsum("brc,brc->", parts @ blocks, parts, dtype=np.float64))


def _ratio(lost: float, whole: float) -> float:
    return lost / whole if whole > 0 else lost
