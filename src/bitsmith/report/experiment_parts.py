"""Experiments as a part of the page: a table and a figure each, perplexities over the student's."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from pydantic import JsonValue

from bitsmith.errors import printable
from bitsmith.report.charts import Block, Chart, Mark, Part, curve_of
from bitsmith.report.markdown import UNMEASURED
from bitsmith.report.study_json import Experiment, ExperimentRow, Study
from bitsmith.report.study_tables import MEASURES, Cell, Table, figure_text
from bitsmith.run.study_peers import Figure

PART = "experiments"
STUDENT = "the student"

_DRAWN = ("ppl_over_student", "ppl", "explained")
_STYLES = {"ppl": "{:.3f}", "ppl_over_student": "{:.5f}", "kld_to_teacher": "{:.5f}"}
_LABELS = {
    "ppl": "perplexity",
    "ppl_over_student": "perplexity / student's",
    "kld_to_teacher": "KLD to the teacher (nats)",
    "explained": "student's variance explained",
}
_NUMBER = r"(\d[\d,]*(?:\.\d+)?)"
_ACROSS = {
    "layer": (re.compile(rf"layer {_NUMBER}"), "layer", 2),
    "tokens": (re.compile(rf"(?:all )?{_NUMBER} tokens"), "tokens of the text", 3),
    "alpha": (re.compile(rf"α {_NUMBER}"), "the teacher's share α", 4),
}
"""What rows may be drawn over: how their labels say it, the axis, and the points that make a line of it."""
_LOGARITHMIC = ("tokens",)
_ALONE = "merged"


class _Placed(NamedTuple):
    series: str
    x: float
    row: ExperimentRow


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
    same = common_facts(one)
    facts = list(dict.fromkeys(name for row in one.rows for name in row.facts if name not in same))
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


def common_facts(one: Experiment) -> dict[str, JsonValue]:
    """Return the facts that several rows have all alike."""
    first = one.rows[0].facts if len(one.rows) > 1 else {}
    return {
        name: value
        for name, value in first.items()
        if all(name in row.facts and row.facts[name] == value for row in one.rows)
    }


def _block(anchor: str, one: Experiment) -> Block:
    drawn = next((name for name in _DRAWN if any(name in row.figures for row in one.rows)), None)
    charts = [] if drawn is None else [_chart(anchor, one, drawn)]
    title = printable(one.name.replace("_", " ").replace("-", " "))
    caption = f"Experiment {title}"
    return Block(
        title[:1].upper() + title[1:],
        experiment_note(one),
        charts,
        experiment_table(one),
        anchor,
        caption,
    )


def experiment_note(one: Experiment) -> str:
    """Return an experiment's question, and the facts that all its rows have alike."""
    same = common_facts(one).items()
    said = [f"{name.replace('_', ' ')}: {_fact(value).text}" for name, value in same if value != ""]
    every = f" Of all rows: {'; '.join(said)}." if said else ""
    return printable(f"{one.words}{every}", 2000)


def _chart(anchor: str, one: Experiment, drawn: str) -> Chart:
    over = _label(drawn)
    marks = [Mark(STUDENT, None, 1.0)] if drawn == "ppl_over_student" else []
    across, placed = _lines([row for row in one.rows if drawn in row.figures])
    if across:
        series: dict[str, dict[float, Figure | None]] = {}
        for point in sorted(placed, key=lambda point: point.x):
            series.setdefault(point.series, {})[point.x] = point.row.figures[drawn]
        curves = [curve_of(name, points) for name, points in series.items()]
        axis, is_log = _ACROSS[across][1], across in _LOGARITHMIC
        says = f"{over} over {axis}"
        return Chart(f"{anchor}-plot", "lines", says, axis, over, curves, marks, is_log)
    points = {row.label: row.figures.get(drawn) for row in one.rows}
    return Chart(f"{anchor}-plot", "points", f"{over} by row", over, "", [curve_of(one.name, points)], marks)


def _lines(rows: Sequence[ExperimentRow]) -> tuple[str, list[_Placed]]:
    """Return what rows are drawn over and those that are, empty where their labels make no lines.

    A label's parts are divided by commas; those that have one part as a number and the others alike are a
    line. What makes the longest lines wins.
    """
    best, found, longest = "", list[_Placed](), 0.0
    for name, (pattern, _, least) in _ACROSS.items():
        placed = [one for row in rows if (one := _placed(row, pattern)) is not None]
        lines = Counter(one.series for one in placed)
        length = len(placed) / len(lines) if lines else 0.0
        if length >= least and length > longest and len({one[:2] for one in placed}) == len(placed):
            best, found, longest = name, placed, length
    return best, found


def _placed(row: ExperimentRow, pattern: re.Pattern[str]) -> _Placed | None:
    parts = row.label.split(", ")
    for at, part in enumerate(parts):
        said = pattern.fullmatch(part)
        if said is not None:
            rest = ", ".join(parts[:at] + parts[at + 1 :])
            return _Placed(printable(rest or _ALONE), float(said[1].replace(",", "")), row)
    return None


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
