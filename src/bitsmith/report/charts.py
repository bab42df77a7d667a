"""Parts of a page that are drawn and listed alike: headings, notes, charts as plain numbers, their tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from bitsmith.errors import printable
from bitsmith.report.assay_figures import label
from bitsmith.report.study_tables import Table
from bitsmith.run.study_peers import Figure

Kind = Literal["lines", "points", "cells"]


class Curve(NamedTuple):
    """One line of a chart, or one row of a map of cells; `low` and `high` are None where unmeasured."""

    name: str
    x: Sequence[float | str]
    y: Sequence[float | None]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()


class Mark(NamedTuple):
    """A value that figures are held against, or a band of them: between `low` and `high`."""

    name: str
    low: float | None
    high: float | None


class Chart(NamedTuple):
    """What one plot shows: `lines` over numbers, `points` by name, `cells` as a map of rows and columns."""

    id: str
    kind: Kind
    says: str
    x: str
    y: str
    curves: Sequence[Curve]
    marks: Sequence[Mark] = ()
    is_log: bool = False


class Block(NamedTuple):
    """A heading with its note, charts side by side, and the table with their figures."""

    heading: str
    note: str
    charts: Sequence[Chart] = ()
    table: Table | None = None
    id: str = ""
    caption: str = ""
    is_folded: bool = False


class Part(NamedTuple):
    """A part of the page: its anchor, title, sentences, blocks."""

    id: str
    title: str
    lead: Sequence[str]
    blocks: Sequence[Block]


def chart_data(parts: Iterable[Part]) -> dict[str, Any]:
    """Return what the page's script draws, by the chart's id."""
    charts = (chart for part in parts for block in part.blocks for chart in block.charts)
    return {chart.id: _chart(chart) for chart in charts}


def curve_of(name: str, points: Mapping[Any, Figure | None]) -> Curve:
    """Return a curve of figures by x; those that are None are left out."""
    kept = {x: figure for x, figure in points.items() if figure is not None}
    figures = list(kept.values())
    return Curve(
        name,
        list(kept),
        [one.value for one in figures],
        [one.low for one in figures],
        [one.high for one in figures],
    )


def _chart(chart: Chart) -> dict[str, Any]:
    return {
        "kind": chart.kind,
        "says": chart.says,
        "title": label(chart.says),
        "x": label(chart.x),
        "plain": chart.x,
        "y": label(chart.y),
        "log": chart.is_log,
        "curves": [_curve(one) for one in chart.curves],
        "marks": [
            {"name": label(one.name), "plain": printable(one.name), "low": one.low, "high": one.high}
            for one in chart.marks
        ],
    }


def _curve(one: Curve) -> dict[str, Any]:
    none = [None] * len(one.y)
    return {
        "name": printable(one.name),
        "label": label(one.name),
        "x": [label(x) if isinstance(x, str) else x for x in one.x],
        "names": [printable(x) if isinstance(x, str) else f"{x:,.6g}" for x in one.x],
        "y": list(one.y),
        "low": list(one.low) or none,
        "high": list(one.high) or none,
    }
