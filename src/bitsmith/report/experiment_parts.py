"""Experiments as a part of the page: a table and a figure each, perplexities over the student's."""

from __future__ import annotations

import json
from collections.abc import Sequence

from pydantic import JsonValue

from bitsmith.errors import printable
from bitsmith.report.charts import Block, Chart, Mark, Part, curve_of
from bitsmith.report.markdown import UNMEASURED
from bitsmith.report.study_json import Experiment, ExperimentRow, Study
from bitsmith.report.study_tables import MEASURES, Cell, Table, figure_text
from bitsmith.run.study_peers import Figure

PART = "experiments"
STUDENT = "the student"

_DRAWN = ("ppl_over_student", "ppl", "kld_to_teacher")
_STYLES = {"ppl": "{:.3f}", "ppl_over_student": "{:.5f}", "kld_to_teacher": "{:.5f}"}
_LABELS = {
    "ppl": "perplexity",
    "ppl_over_student": "perplexity / student's",
    "kld_to_teacher": "KLD to the teacher (nats)",
}
_ACROSS = {"tokens": "tokens of the pairing", "alpha": "α", "layer": "layer", "trunk": "trunk dimensions"}
"""Facts that rows are drawn over, where each has its own."""
_LOGARITHMIC = ("tokens",)
_SERIES = "series"
"""The fact that tells rows of one line from those of another."""


def experiment_parts(study: Study) -> list[Part]:
    """Return the part of a study's experiments; none without any."""
    if not study.experiments:
        return []
    kinds = dict.fromkeys(
        figure.interval
        for one in study.experiments
        for row in one.rows
        for figure in row.figures.values()
        if figure.interval and figure.interval != UNMEASURED
    )
    lead = (
        "Below 1 a row predicts held-out text better than the student alone does; a bar that crosses 1 shows "
        "no difference. Whatever was found is shown.",
        f"Bars are {'; '.join(map(printable, kinds)) or UNMEASURED}.",
    )
    blocks = [_block(f"experiment-{at}", one) for at, one in enumerate(study.experiments)]
    return [Part(PART, "Experiments", lead, blocks)]


def experiment_table(one: Experiment) -> Table:
    """Return a row per row of an experiment: its figures with intervals, then its facts."""
    figures = list(dict.fromkeys(name for row in one.rows for name in row.figures))
    facts = list(dict.fromkeys(name for row in one.rows for name in row.facts))
    rows = [
        (
            Cell(printable(row.label, 200)),
            *(_cell(row.figures.get(name), name) for name in figures),
            *(_fact(row.facts.get(name)) for name in facts),
        )
        for row in one.rows
    ]
    columns = ("row", *(_head(one, name) for name in figures), *(name.replace("_", " ") for name in facts))
    return Table(tuple(map(printable, columns)), rows, [None] * len(rows))


def _block(anchor: str, one: Experiment) -> Block:
    drawn = next((name for name in _DRAWN if any(name in row.figures for row in one.rows)), None)
    charts = [] if drawn is None else [_chart(anchor, one, drawn)]
    title = printable(one.name.replace("_", " ").replace("-", " "))
    caption = f"Experiment {title}"
    return Block(
        title[:1].upper() + title[1:],
        printable(one.words, 1000),
        charts,
        experiment_table(one),
        anchor,
        caption,
    )


def _chart(anchor: str, one: Experiment, drawn: str) -> Chart:
    over = _label(drawn)
    marks = [Mark(STUDENT, None, 1.0)] if drawn == "ppl_over_student" else []
    across = _across(one.rows)
    if across is not None:
        series: dict[str, dict[float, Figure | None]] = {}
        for row in one.rows:
            x = row.facts.get(across)
            if isinstance(x, int | float) and drawn in row.figures:
                series.setdefault(_series(row), {})[x] = row.figures[drawn]
        curves = [curve_of(name, dict(sorted(points.items()))) for name, points in series.items()]
        says = f"{over} over {_ACROSS[across]}"
        return Chart(
            f"{anchor}-plot", "lines", says, _ACROSS[across], over, curves, marks, across in _LOGARITHMIC
        )
    points = {row.label: row.figures.get(drawn) for row in one.rows}
    return Chart(f"{anchor}-plot", "points", f"{over} by row", over, "", [curve_of(one.name, points)], marks)


def _across(rows: Sequence[ExperimentRow]) -> str | None:
    """Return the fact that the rows are drawn over: a number of most rows, several values in each series."""
    for name in _ACROSS:
        placed = [row for row in rows if _is_number(row.facts.get(name))]
        series: dict[str, list[JsonValue]] = {}
        for row in placed:
            series.setdefault(_series(row), []).append(row.facts[name])
        several = all(len(xs) > 1 and len(set(map(str, xs))) == len(xs) for xs in series.values())
        if len(placed) > 2 and 2 * len(placed) > len(rows) and several:
            return name
    return None


def _series(row: ExperimentRow) -> str:
    return printable(str(row.facts.get(_SERIES, "merged")))


def _is_number(value: JsonValue) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _head(one: Experiment, name: str) -> str:
    units = {row.figures[name].unit for row in one.rows if name in row.figures}
    known = name in _LABELS or len(units) != 1 or not "".join(units)
    return _label(name) if known else f"{_label(name)} ({units.pop()})"


def _label(name: str) -> str:
    if name in _LABELS:
        return _LABELS[name]
    return MEASURES[name].label if name in MEASURES else printable(name.replace("_", " "))


def _cell(figure: Figure | None, name: str) -> Cell:
    style = _STYLES.get(name, "{:.4g}")
    return Cell(figure_text(figure, style), None if figure is None else figure.value)


def _fact(value: JsonValue) -> Cell:
    if value is None:
        return Cell("")
    if isinstance(value, bool):
        return Cell("yes" if value else "no")
    if isinstance(value, int | float):
        return Cell(f"{value:,}" if isinstance(value, int) else f"{value:.4g}", value)
    return Cell(printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), 500))
