"""Weights as factors: low rank, low rank beside integer codes, pruned blocks, Tensor-Trains.

bitsmith alone reads what this writes (`store.factored`): its evaluate and generate work on such a folder,
transformers and vLLM refuse its `quant_method`. Schemes are described in `run.factored_scheme`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bitsmith.errors import BitsmithError, printable
from bitsmith.formats.format import Bytes, Float32
from bitsmith.numerics.threads import one_blas_thread
from bitsmith.passes.factorize import (
    ErrorMetric,
    Factored,
    Rounded,
    factorize,
    with_remainder,
    without_columns,
)
from bitsmith.passes.trains import divisors, factor_code, rounded_train, rounded_trains
from bitsmith.run.factored_scheme import GROUPS, KINDS, form_of, is_factored, parse_scheme
from bitsmith.run.guide import FiniteRows, Total
from bitsmith.run.packer import Assigned, Matrix, Outcome, Part
from bitsmith.store.compressed_tensors import pack_words
from bitsmith.store.factored import (
    FLOAT_CODES,
    LEFT,
    METHOD,
    REST,
    RIGHT,
    SCALE,
    VERSION,
    WHOLE,
    FactoredForm,
    Form,
    TrainForm,
    TrainsForm,
    code_grid,
)
from bitsmith.store.statistics import SiteStatistics, dense_moment

_OFTEN = 0.25
"""Power of how often a token occurs that weighs its row; 1 leaves rare ones too wrong for the sum."""


class FactoredPacker:
    """Low rank, remainders, pruned blocks and Tensor-Trains, with F16 scales; embeddings too, where asked."""

    schemes = KINDS
    tables = costly = True

    def takes(self, scheme: str) -> bool:
        """Tell whether a scheme's kind is one of `schemes`."""
        return is_factored(scheme)

    def group(self, scheme: str, asked: int | None, shape: tuple[int, ...]) -> int | None:
        """Return `asked` (default 128): the last group of a row may be shorter.

        Raises BitsmithError for another group than 32, 64, 128 or 0, and as `parse_scheme` does.
        """
        parse_scheme(scheme)
        group = 128 if asked is None else asked
        if group not in GROUPS:
            known = ", ".join(map(str, GROUPS[1:]))
            raise BitsmithError(
                f"{printable(scheme)} has groups of {known} columns, or 0 for whole rows, not {group}"
            )
        return group

    def parts(self, row: Assigned) -> Sequence[Part]:
        """Return codes or floats, then scales."""
        return [Part(*part) for part in _form(row).parts()]

    def encode(self, row: Assigned, matrix: Matrix) -> _Encoding:
        """Return the matrix's parts to be."""
        return _Encoding(row, matrix)

    def config(self, rows: Sequence[Assigned], kept: Sequence[str]) -> Mapping[str, Any]:
        """Return the `quantization_config`: the form of every packed module."""
        del kept
        modules = {row.module: _form(row).to_json() for row in rows}
        return {"quant_method": METHOD, "version": VERSION, "modules": modules}


class _Encoding:
    """One matrix, made when its first part is asked for; codes come at once, scales wait for their place.

    The matrix is held as float32, a Tensor-Train's is read in slabs.
    """

    def __init__(self, row: Assigned, matrix: Matrix) -> None:
        self._row, self._matrix, self._form = row, matrix, _form(row)
        self._waiting: dict[str, Bytes] | None = None
        self._outcome = Outcome("nearest", 0.0)

    def chunks(self, suffix: str) -> Iterator[Bytes]:
        """Yield a part's bytes."""
        if self._waiting is None:
            self._waiting = self._made()
        yield self._waiting.pop(suffix)

    def outcome(self) -> Outcome:
        """Return how codes were found, and their errors."""
        return self._outcome

    @one_blas_thread()
    def _made(self) -> dict[str, Bytes]:
        """Return the bytes of all parts."""
        form, total = self._form, Total(self._inputs)
        if isinstance(form, FactoredForm):
            rounder, parts = self._factored(form, total)
        else:
            rounder, parts = self._trains(form, total)
        self._outcome = Outcome(rounder, *total.errors())
        return _stored(parts, form)

    def _factored(self, form: FactoredForm, total: Total) -> tuple[str, dict[str, Rounded]]:
        """Return the rounder and the parts of low rank and codes; errors go to `total`."""
        whole = np.concatenate(list(self._matrix.slices()))
        rounder, metric = error_metric(self._matrix, form)
        rows = np.arange(len(whole)) if form.rows is None else form.rows.index
        columns = np.arange(whole.shape[1]) if form.columns is None else form.columns.index
        kept, inner = whole[rows], metric
        if form.columns is not None:
            kept, inner = without_columns(kept, columns, metric)
        found = _found(form, kept, inner)
        decoded = np.zeros_like(whole)
        decoded[rows[:, None], columns] = _decoded(form, found)
        total.add(whole, decoded)
        parts = {LEFT: found.left, RIGHT: found.right, REST: found.rest}
        return rounder, {suffix: part for suffix, part in parts.items() if part is not None}

    def _trains(self, form: TrainForm | TrainsForm, total: Total) -> tuple[str, dict[str, Rounded]]:
        """Return the rounder and the parts of Tensor-Trains; errors go to `total`."""
        source = FiniteRows(self._matrix.ref, self._matrix.path)
        rounder, right = "nearest", None
        if isinstance(form, TrainsForm):
            rounder, metric = error_metric(self._matrix, form)
            trains = rounded_trains(source, form, metric)
            right = trains[RIGHT].rows()
        elif form.scales:
            rounder, trains = "weighted", {WHOLE: rounded_train(source, form, self._divisors(form.shape))}
        else:
            trains = {WHOLE: rounded_train(source, form)}
        [first, *_], start = trains.values(), 0
        for rows in self._matrix.slices():
            found = first.rows(start, start + len(rows))
            total.add(rows, found if right is None else found @ right)
            start += len(rows)
        return rounder, {
            begin + suffix: part for begin, train in trains.items() for suffix, part in train.parts.items()
        }

    def _divisors(self, shape: tuple[int, int]) -> tuple[Float32, Float32]:
        """Return what rows and columns are divided by: by how often tokens occur, and by E[x²]."""
        guide, inputs = self._matrix.guide, self._inputs
        counts = None if guide is None else guide.token_counts(self._row.name)
        often = None if counts is None else (counts + 0.5) ** _OFTEN
        importance = None if inputs is None else inputs.importance
        return divisors(often, shape[0]), divisors(importance, shape[1])

    @property
    def _inputs(self) -> SiteStatistics | None:
        guide = self._matrix.guide
        return None if guide is None else guide.inputs(self._row.name)


def error_metric(matrix: Matrix, form: Form) -> tuple[str, ErrorMetric]:
    """Return the rounder and how errors are weighed, as statistics and the rounder asked for say.

    Damping and shrinkage are those that suit the grid of the codes on held-out inputs.
    """
    guide = matrix.guide
    inputs = None if guide is None else guide.inputs(matrix.ref.name)
    if guide is None or inputs is None or guide.rounder == "nearest":
        return "nearest", ErrorMetric()
    if inputs.moment is None:
        return "weighted", ErrorMetric(importance=inputs.importance)
    moment = dense_moment(inputs.moment)
    grid = code_grid(form.rest or form.factors or "f32") if isinstance(form, FactoredForm) else None
    if grid is None:
        return "weighted", ErrorMetric(moment)
    choice = guide.choice(matrix.ref, grid)
    if choice.damping is None:
        return "weighted", ErrorMetric(moment, feed=False)
    return "gptq", ErrorMetric(moment, choice.damping, shrink=choice.shrink)


def _form(row: Assigned) -> Form:
    return form_of(parse_scheme(row.scheme), row.shape, row.group)


def _found(form: FactoredForm, kept: Float32, metric: ErrorMetric) -> Factored:
    """Return the parts of a matrix's kept rows and columns."""
    grid = None if form.rest is None else code_grid(form.rest)
    if form.factors is None or grid is None:
        if form.factors is not None:
            return factorize(kept, form.rank, factor_code(form.factors), metric)
        if grid is None:
            raise BitsmithError(f"nothing is stored of a matrix as {form.name}")
        return Factored(None, None, metric.rounded(kept, grid), 0.0)
    if form.kernel is None:
        return with_remainder(kept, form.rank, factor_code(form.factors), grid, metric)
    found = factorize(kept[: form.kernel], form.rank, factor_code(form.factors), metric)
    return Factored(found.left, found.right, metric.rounded(kept[form.kernel :], grid), 0.0)


def _decoded(form: FactoredForm, found: Factored) -> Float32:
    if form.kernel is None or found.left is None or found.right is None or found.rest is None:
        return found.decoded
    return np.concatenate([found.left.decoded @ found.right.decoded, found.rest.decoded])


def _stored(parts: Mapping[str, Rounded], form: Form) -> dict[str, Bytes]:
    """Return the bytes of codes and scales, or of floats, by suffix."""
    found = {}
    for suffix, part in parts.items():
        code = form.code_of(suffix)
        grid = code_grid(code)
        if grid is None or part.coded is None:
            kind = "<f2" if FLOAT_CODES[code] == "F16" else "<f4"
            found[suffix] = np.ascontiguousarray(part.decoded, kind).reshape(-1).view(np.uint8)
        else:
            found[suffix] = pack_words(part.coded.codes, grid.bits).reshape(-1)
            found[suffix + SCALE] = part.coded.scales.astype("<f2").reshape(-1).view(np.uint8)
    return found
