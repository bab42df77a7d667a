"""A study's tables as plain cells, for the page and the model card alike."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from math import prod, sqrt
from typing import NamedTuple

from bitsmith.errors import printable
from bitsmith.report.markdown import UNMEASURED, measure_text
from bitsmith.report.study_json import Artifact, GateLine, Spectrum, Study, Tensor
from bitsmith.run.evaluation import Measure
from bitsmith.run.inspect import COMPONENTS
from bitsmith.run.study_peers import Figure, Peer

WEIGHTS_ERROR = "relative error of the weights"
OUTPUTS_ERROR = "relative error of the outputs, held-out inputs"


class Shown(NamedTuple):
    """How a measure is shown: its name, the style of its figures, whether less is better, its axis."""

    label: str
    style: str
    falling: bool = True
    log: bool = True


MEASURES = {
    "mean_kld": Shown("mean KLD (nats)", "{:.5f}"),
    "ppl_cand": Shown("perplexity", "{:.3f}"),
    "ppl_ratio": Shown("perplexity / original's", "{:.5f}"),
    "kld_99_9": Shown("99.9 % KLD (nats)", "{:.4f}"),
    "kld_99": Shown("99 % KLD (nats)", "{:.4f}"),
    "median_kld": Shown("median KLD (nats)", "{:.5f}"),
    "max_kld": Shown("largest KLD (nats)", "{:.4f}"),
    "top1_agreement": Shown("top-1 agreement", "{:.2%}", falling=False, log=False),
    "kld_to_teacher": Shown("mean KLD from the teacher (nats)", "{:.5f}"),
}
_TABLE = ("mean_kld", "ppl_cand", "ppl_ratio", "kld_99_9", "top1_agreement", "kld_to_teacher")
_SIZES = ("bytes", "bpw", "times smaller")
_ITSELF = {"ppl_ratio": 1.0, "top1_agreement": 1.0}
"""Measures of the original against itself that are not 0."""
_SKIPPED = ("ppl_ref", "ppl_difference")


class Cell(NamedTuple):
    """One cell: its text, the number it sorts by, and how it is coloured where its text does not say so."""

    text: str
    value: float | None = None
    mark: str = ""


class Table(NamedTuple):
    """Columns and rows; `rows[i]` belongs to the artifact `artifacts[i]` (None: to none)."""

    columns: tuple[str, ...]
    rows: Sequence[tuple[Cell, ...]]
    artifacts: Sequence[int | None]


def measures_of(study: Study) -> dict[str, Shown]:
    """Return the measures that some artifact or peer has, known ones first, by name.

    `NAME @ WHERE` is the measure NAME on another text, shown as NAME is.
    """
    found = dict.fromkeys(key for row in _rows(study) for key in row.measures)
    known = {key: shown for key, shown in MEASURES.items() if key in found}
    others = [key for key in found if key not in MEASURES and key.split(" @ ")[0] not in _SKIPPED]
    return known | {key: _shown(study, key) for key in others}


def _rows(study: Study) -> list[Artifact | Peer]:
    return [*study.artifacts, *study.peers]


def _shown(study: Study, key: str) -> Shown:
    name, _, where = key.partition(" @ ")
    if name in MEASURES:
        return MEASURES[name]._replace(label=printable(f"{MEASURES[name].label}, {where}"))
    return Shown(_label(study, key), "{:.4g}", log=False)


def _label(study: Study, key: str) -> str:
    units = [row.measures[key].unit for row in study.artifacts if key in row.measures]
    return printable(f"{key.replace('_', ' ')}{f' ({units[0]})' if units and units[0] else ''}")


def figure_text(figure: Figure | None, style: str) -> str:
    """Return a figure as `value (low … high)`."""
    return measure_text(None if figure is None else Measure(**dict(figure)), style)


def artifact_table(study: Study) -> Table:
    """Return a row per artifact: sizes, the main measures with intervals, the verdict."""
    shown = {key: one for key, one in measures_of(study).items() if key in _TABLE}
    original = next((row for row in study.artifacts if row.is_original and row.file_bytes), None)
    optional: dict[str, Callable[[Artifact], str]] = {
        "verdict": lambda row: row.verdict,
        "made by": lambda row: row.recipe,
        "what": lambda row: row.what,
        "unmeasured because": lambda row: row.unmeasured,
    }
    kept = {name: get for name, get in optional.items() if any(get(row) for row in study.artifacts)}
    rows = [
        (
            Cell(printable(row.name)),
            Cell(printable(row.group)),
            _count(row.file_bytes),
            _number(row.bpw, "{:.3f}"),
            _number(_ratio(original, row), "{:.2f}"),
            *(_measure(row, key, one) for key, one in shown.items()),
            *(Cell(printable(get(row), 500)) for get in kept.values()),
        )
        for row in study.artifacts
    ]
    columns = ("artifact", "group", *_SIZES, *(one.label for one in shown.values()), *kept)
    table = Table(columns, rows, list(range(len(rows))))
    is_sized = any(row.file_bytes or row.bpw for row in study.artifacts) or not study.merges
    return table if is_sized else _without(table, set(_SIZES))


def peer_table(study: Study) -> Table:
    """Return a row per point of others."""
    shown = {
        key: one for key, one in measures_of(study).items() if any(key in p.measures for p in study.peers)
    }
    rows = [
        (
            Cell(printable(peer.name)),
            _count(peer.file_bytes),
            _number(peer.bpw, "{:.3f}"),
            *(_measure(peer, key, one) for key, one in shown.items()),
            Cell("as here" if peer.same_protocol else "another: compare with care"),
            Cell(printable(peer.source, 500)),
        )
        for peer in study.peers
    ]
    columns = ("peer", "bytes", "bpw", *(one.label for one in shown.values()), "protocol", "source")
    return Table(columns, rows, [None] * len(rows))


def gate_table(study: Study) -> Table:
    """Return the audit log, a row per line."""
    names = {row.name: at for at, row in enumerate(study.artifacts)}
    rows = [
        (
            Cell(printable(_time(line.when))),
            Cell(printable(line.who)),
            Cell(line.outcome or "decision"),
            Cell(printable(line.gate)),
            Cell(printable(_judged(line), 500)),
            _gate_value(line),
            _gate_limit(line),
            Cell(printable(line.decision, 1000)),
            Cell(printable(line.artifact)),
            Cell(printable(line.tensor)),
            Cell(_evidence(line)),
        )
        for line in study.gates
    ]
    columns = (
        "when (UTC)", "who", "outcome", "gate", "what", "value", "limit", "decision", "artifact", "tensor",
        "evidence",
    )  # fmt: skip
    table = Table(columns, rows, [names.get(line.artifact) for line in study.gates])
    return without_empty(table, {"gate", "artifact", "tensor", "evidence"})


def task_table(study: Study) -> Table:
    """Return a row per task of the graph."""
    rows = [
        (
            Cell(printable(task.name)),
            Cell(printable(task.action)),
            Cell(task.status),
            Cell(str(task.attempts), task.attempts),
            _number(task.seconds, "{:.1f}"),
            Cell(printable(", ".join(task.needs), 500)),
            Cell(printable(task.key[:12])),
            Cell(printable(task.why, 1000)),
        )
        for task in study.tasks
    ]
    columns = ("task", "action", "status", "attempts", "seconds", "needs", "key", "why")
    return Table(columns, rows, [None] * len(rows))


def claim_table(study: Study) -> Table:
    """Return every claim with its outcome and figure."""
    rows = [
        (
            Cell(printable(one.claim, 1000)),
            Cell(printable(one.source)),
            Cell(one.outcome),
            Cell(printable(one.found, 1000)),
            Cell(_claimed(one.measure)),
        )
        for one in study.claims
    ]
    return Table(("claim", "of", "outcome", "found", "figure"), rows, [None] * len(rows))


def component_table(study: Study) -> Table:
    """Return a row per artifact and component: bytes, bits per weight, errors."""
    rows: list[tuple[Cell, ...]] = []
    owners: list[int | None] = []
    for at, artifact in enumerate(study.artifacts):
        for name, tensors in by_component(artifact).items():
            nbytes, count = sum(one.nbytes for one in tensors), sum(map(weights, tensors))
            rows.append(
                (
                    Cell(printable(artifact.name)),
                    Cell(name),
                    Cell(f"{len(tensors)}", len(tensors)),
                    _count(nbytes),
                    _number(8 * nbytes / count if count else None, "{:.3f}"),
                    _number(error_of(tensors, held=False), "{:.4g}"),
                    _number(error_of(tensors, held=True), "{:.4g}"),
                )
            )
            owners.append(at)
    columns = ("artifact", "component", "tensors", "bytes", "bpw", WEIGHTS_ERROR, OUTPUTS_ERROR)
    return Table(columns, rows, owners)


def tensor_table(study: Study) -> Table:
    """Return a row per artifact and tensor."""
    rows: list[tuple[Cell, ...]] = []
    owners: list[int | None] = []
    for at, artifact in enumerate(study.artifacts):
        for one in artifact.tensors:
            rows.append(
                (
                    Cell(printable(artifact.name)),
                    Cell(printable(one.name)),
                    Cell(printable(one.role)),
                    Cell("" if one.layer is None else str(one.layer), one.layer),
                    Cell(" × ".join(map(str, one.shape)), weights(one)),
                    Cell(printable(one.type)),
                    _count(one.nbytes),
                    _number(8 * one.nbytes / weights(one) if weights(one) else None, "{:.3f}"),
                    _number(error_of([one], held=False), "{:.4g}"),
                    _number(error_of([one], held=True), "{:.4g}"),
                    Cell(printable(f"{one.rounder} {one.note}".strip(), 300)),
                )
            )
            owners.append(at)
    columns = (
        "artifact", "tensor", "role", "layer", "shape", "type", "bytes", "bpw", "error of the weights",
        "error of the outputs", "rounder, note",
    )  # fmt: skip
    return Table(columns, rows, owners)


def spectrum_table(study: Study) -> Table:
    """Return a row per matrix whose spectrum is known."""
    rows = [
        (
            Cell(printable(one.name)),
            Cell(printable(one.model)),
            Cell(printable(one.role)),
            Cell("" if one.layer is None else str(one.layer), one.layer),
            Cell(" × ".join(map(str, one.shape)), prod(one.shape)),
            _number(one.alpha, "{:.3f}"),
            _number(one.effective_rank, "{:.1f}"),
            _number(one.stable_rank, "{:.2f}"),
            Cell(UNMEASURED if one.r90 is None else f"{one.r90} of {_short(one)}", one.r90),
        )
        for one in study.spectra
    ]
    columns = ("matrix", "model", "role", "layer", "shape", "α", "effective rank", "stable rank", "r90")
    return without_empty(Table(columns, rows, [None] * len(rows)), {"model"})


def by_component(artifact: Artifact) -> dict[str, list[Tensor]]:
    """Return an artifact's tensors by part of the model, in the order of their first."""
    found: dict[str, list[Tensor]] = {}
    for tensor in artifact.tensors:
        head = tensor.role.split(".")[0]
        found.setdefault(COMPONENTS.get(head, "other"), []).append(tensor)
    return found


def weights(tensor: Tensor) -> int:
    """Return the number of weights of a tensor, 0 where its shape is unknown."""
    return prod(tensor.shape) if tensor.shape else 0


def is_matrix(tensor: Tensor) -> bool:
    """Return whether a tensor has two dimensions of more than one."""
    return sum(size > 1 for size in tensor.shape) > 1


def error_of(tensors: Sequence[Tensor], *, held: bool) -> float | None:
    """Return √(Σ n e² / Σ n) over the matrices, of n weights and relative error e; vectors alone count too.

    None where one is unmeasured. What is stored exactly leaves the outputs exact.
    """
    matrices = [one for one in tensors if is_matrix(one)] or list(tensors)
    errors = [
        one.held_squared_error if held and one.squared_error != 0 else one.squared_error for one in matrices
    ]
    if held and all(one.held_squared_error is None for one in matrices):
        return None
    total = sum(map(weights, matrices))
    known = [value for value in errors if value is not None]
    if not known or len(known) < len(errors) or not total:
        return None
    return sqrt(sum(n * e for n, e in zip(map(weights, matrices), known, strict=True)) / total)


def _measure(row: Artifact | Peer, key: str, shown: Shown) -> Cell:
    figure = row.measures.get(key)
    name = key.split(" @ ", maxsplit=1)[0]
    if (
        figure is None
        and isinstance(row, Artifact)
        and row.is_original
        and name in MEASURES
        and name not in ("ppl_cand", "kld_to_teacher")
    ):
        itself = _ITSELF.get(name, 0.0)
        return Cell(f"{shown.style.format(itself)} (itself)", itself)
    return Cell(figure_text(figure, shown.style), None if figure is None else figure.value)


def _gate_value(line: GateLine) -> Cell:
    if line.value is None:
        return Cell("" if line.outcome == "" else UNMEASURED)
    text = _plain(line.value)
    if line.low is not None and line.high is not None:
        text += f" ({line.low:.4g} … {line.high:.4g})"
    return Cell(f"{text} {printable(line.unit)}".strip(), None if isinstance(line.value, str) else line.value)


def _judged(line: GateLine) -> str:
    """Return what was judged, less the tensor and the gate, which have columns of their own."""
    what = line.what.removeprefix(f"{line.tensor}: ") if line.tensor else line.what
    return what.removesuffix(f": {line.gate}") if line.gate else what


def _gate_limit(line: GateLine) -> Cell:
    return Cell("" if line.limit is None else f"{printable(line.direction)} {_plain(line.limit)}".strip())


def _evidence(line: GateLine) -> str:
    if line.evidence is None or isinstance(line.evidence, str):
        return printable(line.evidence or "", 1000)
    return printable(json.dumps(line.evidence, ensure_ascii=False), 1000)


def _time(when: str) -> str:
    """Return a time in UTC to the second; what is none as it is.

    >>> _time("2026-01-02T03:04:05.678+00:00"), _time("noon")
    ('2026-01-02 03:04:05', 'noon')
    """
    found = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d:\d\d)(?:\.\d+)?(?:Z|\+00:00)", when)
    return f"{found[1]} {found[2]}" if found else when


def _claimed(figure: Figure | None) -> str:
    return "" if figure is None else f"{figure_text(figure, '{:.4g}')} {printable(figure.unit)}"


def without_empty(table: Table, optional: set[str]) -> Table:
    """Return a table without those of the `optional` columns in which no row says anything."""
    empty = {name for at, name in enumerate(table.columns) if not any(row[at].text for row in table.rows)}
    return _without(table, empty & optional)


def _without(table: Table, names: set[str]) -> Table:
    kept = [at for at, name in enumerate(table.columns) if name not in names]
    rows = [tuple(row[at] for at in kept) for row in table.rows]
    return Table(tuple(table.columns[at] for at in kept), rows, table.artifacts)


def _ratio(original: Artifact | None, row: Artifact) -> float | None:
    if original is None or original.file_bytes is None or not row.file_bytes:
        return None
    return original.file_bytes / row.file_bytes


def _short(one: Spectrum) -> int:
    return min(one.shape, default=0)


def _count(value: int | None) -> Cell:
    return Cell(UNMEASURED) if value is None else Cell(f"{value:,}", value)


def _number(value: float | None, style: str) -> Cell:
    return Cell(UNMEASURED) if value is None else Cell(style.format(value), value)


def _plain(value: float | str) -> str:
    return printable(value) if isinstance(value, str) else f"{value:.6g}"
