"""Self-contained HTML pages: nothing is fetched, everything is escaped, plotly.js is inlined."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from bitsmith import __version__
from bitsmith.store.atomic import atomic_file

Figure = Mapping[str, Any]
"""A plotly figure: `data` and `layout` as plotly.js takes them."""

POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; form-action 'none'; base-uri 'none'"
)
TOOLS_LEFT_OUT = ("sendChartToCloud", "select2d", "lasso2d", "zoomIn2d", "zoomOut2d", "autoScale2d")
"""Buttons of plotly.js that a page leaves out: the first sends the figures away, the others are of no use."""
STYLE = """\
:root { color-scheme: light dark; --ink: light-dark(#1c2330, #dfe4ec); --paper: light-dark(#ffffff, #14181f);
--panel: light-dark(#f3f5f9, #1f2530); --line: light-dark(#dde2ea, #323a48);
--note: light-dark(#566072, #a3adbd); }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem;
color: var(--ink); background: var(--paper); }
h2 { margin: 2.2rem 0 .4rem; } .lead { font-size: 1.15rem; } .note { color: var(--note); }
.wide { overflow-x: auto; } summary { cursor: pointer; color: var(--note); }
table { border-collapse: collapse; width: 100%; font-size: .92em; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .25rem .6rem; border-bottom: 1px solid var(--line);
overflow-wrap: break-word; }
th { background: var(--panel); overflow-wrap: normal; }
pre { background: var(--panel); padding: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; }
"""
FIGURE_STYLE = """\
.figure { margin: .4rem 0 1.2rem; }
.xtick text, .ytick text, .colorbar text, .xtitle, .ytitle, .legendtext, .legendtitletext, .annotation-text,
.cbaxis text { fill: var(--ink) !important; }
.updatemenu-item-text { fill: var(--ink) !important; } .updatemenu-item-rect { fill: var(--panel) !important;
stroke: var(--line) !important; } .updatemenu-header-arrow { fill: var(--ink) !important; }
.gridlayer path, .zerolinelayer path { stroke: var(--line) !important; }
.scrollbar-handle, .scrollbar { fill: var(--note) !important; }
.modebar-group { background: none !important; } .modebar-btn path { fill: var(--note) !important; }
"""
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<meta http-equiv="Content-Security-Policy" content="{{ policy }}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<style>
{{ style }}{% if figures %}{{ figure_style }}{% endif %}</style>
{% if figures %}<script>{{ plotly }}</script>{% endif %}</head><body>
<h1>{{ title }}</h1>
{% for section in sections %}{% if section.heading %}<h2>{{ section.heading }}</h2>
{% endif %}{% if section.lead %}<p class="lead">{{ section.lead }}</p>
{% endif %}{% if section.points %}<ul>{% for point in section.points %}<li>{{ point }}</li>
{% endfor %}</ul>{% endif %}{% if section.note %}<p class="note">{{ section.note }}</p>
{% endif %}{% if section.figure %}<div class="figure" id="figure-{{ loop.index }}"></div>
{% endif %}{% if section.columns %}{% if section.closed %}<details><summary>{{ section.closed }}</summary>
{% endif %}<div class="wide"><table>
<thead><tr>{% for c in section.columns %}<th>{{ c }}</th>{% endfor %}</tr></thead><tbody>
{% for row in section.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>{% if section.closed %}</details>
{% endif %}{% endif %}{% if section.text %}<pre>{{ section.text }}</pre>{% endif %}
{% endfor %}<p class="note">bitsmith {{ version }}</p>
{% if figures %}<script id="figures" type="application/json">{{ figures }}</script>
<script>for (const [id, figure] of Object.entries(JSON.parse(document.getElementById("figures").textContent)))
Plotly.newPlot(id, figure.data, figure.layout, {responsive: true, displaylogo: false,
plotlyServerURL: "", modeBarButtonsToRemove: {{ tools }}});</script>
{% endif %}</body></html>
"""


@dataclass(frozen=True)
class Section:
    """One part of a page, in this order: heading, sentence, points, note, plot, table, block of text.

    Each may be empty. `closed` folds the table behind that label.
    """

    heading: str
    note: str = ""
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    text: str = ""
    lead: str = ""
    points: Sequence[str] = ()
    figure: Figure | None = None
    closed: str = ""


def write_page(path: Path, title: str, sections: Sequence[Section]) -> Path:
    """Write `sections` as one HTML page that appears whole or not at all.

    Every string is escaped, in the page and in the plots' data; the page's own policy forbids it to fetch
    anything. plotly.js (5 MB) is inlined where a section has a figure.
    """
    figures = {f"figure-{n}": section.figure for n, section in enumerate(sections, 1) if section.figure}
    page = Environment(autoescape=True, keep_trailing_newline=True).from_string(_PAGE)
    text = page.render(
        title=title,
        sections=sections,
        version=__version__,
        style=STYLE,
        figure_style=FIGURE_STYLE,
        policy=POLICY + ("; script-src 'unsafe-inline'" if figures else ""),
        figures=Markup(script_json(figures)) if figures else "",  # noqa: S704  escaped for a script element
        tools=Markup(script_json(TOOLS_LEFT_OUT)),  # noqa: S704  our own
        plotly=Markup(plotly_source()) if figures else "",  # noqa: S704  plotly's own source
    )
    with atomic_file(path, overwrite=True) as file:
        file.write(text.encode("utf-8", "backslashreplace"))
    return path


def script_json(value: Any) -> str:
    """Return JSON that cannot end a script element: no `<`, `>`, `&`, only ASCII. ValueError for NaN."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def plotly_source() -> str:
    """Return plotly.js."""
    return str(importlib.import_module("plotly.offline").get_plotlyjs())
