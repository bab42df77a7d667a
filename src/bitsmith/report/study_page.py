"""A study, or any run, as one self-contained page: plots that filter, their tables, how to repeat it."""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment
from markupsafe import Markup

from bitsmith.errors import printable
from bitsmith.report import study_tables as tables
from bitsmith.report.assay_figures import ROLE_COLOURS, label
from bitsmith.report.charts import chart_data
from bitsmith.report.experiment_parts import experiment_parts
from bitsmith.report.markdown import lines_of
from bitsmith.report.merge_parts import merge_parts, outcome_of
from bitsmith.report.page import FIGURE_STYLE, POLICY, STYLE, TOOLS_LEFT_OUT, plotly_source, script_json
from bitsmith.report.study_figures import ALL_ROLES, groups_of, layer_choices, plot_data
from bitsmith.report.study_json import Study
from bitsmith.report.study_tables import OUTPUTS_ERROR, WEIGHTS_ERROR, Table
from bitsmith.store.atomic import atomic_file

PAGE_ROWS = 100
"""Rows of a table in the page; the script turns to the others."""

_TEXT_CHARACTERS = 4000
_MOST_CHOICES = 200
_FIRST_MEASURES = (("mean_kld", "kld_99_9"), ("ppl_cand", "ppl_ratio"))

_IDS = {"components": "component-table", "spectra": "spectrum-table"}
"""What a table is called in the page where that differs from the part's name."""

_MARKS = frozenset(
    ("PASS", "FAIL", "UNMEASURED", "HELD", "NOT HELD", "NOT TESTED", "done", "failed", "blocked")
)


class _Card(NamedTuple):
    artifact: int | None
    name: str
    how: str
    note: str
    text: str


def write_study_page(path: Path, study: Study) -> Path:
    """Write the study as one HTML page that needs no network, over an earlier one, and return its path.

    Names, samples and whatever else the study holds are text: escaped in the page, in the plots and in the
    data. Every plot has a table with its figures, every control works from the keyboard.
    """
    data = plot_data(study) | {
        "all_roles": ALL_ROLES,
        "weights_error": WEIGHTS_ERROR,
        "palette": ROLE_COLOURS,
    }
    parts = _parts(study, data)
    data |= {
        "charts": chart_data(parts["found"]),
        "page_rows": PAGE_ROWS,
        "tools": TOOLS_LEFT_OUT,
        "marks": sorted(_MARKS),
        "tables": _long_tables(parts),
    }
    page = Environment(autoescape=True, keep_trailing_newline=True).from_string(_part("study.html.jinja"))
    text = page.render(
        **parts,
        page_rows=PAGE_ROWS,
        marks=_MARKS,
        choices_of=_choices_of,
        title=printable(study.title),
        version=printable(study.bitsmith),
        policy=POLICY + "; script-src 'unsafe-inline'",
        style=Markup(STYLE + FIGURE_STYLE + _part("study.css")),  # noqa: S704  our own
        plotly=Markup(plotly_source()),  # noqa: S704  plotly's own source
        script=Markup(_part("study.js")),  # noqa: S704  our own
        data=Markup(script_json(data)),  # noqa: S704  escaped for a script element
    )
    with atomic_file(path, overwrite=True) as file:
        file.write(text.encode("utf-8", "backslashreplace"))
    return path


def _part(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def summary_of(study: Study) -> list[str]:
    """Return what the study says of itself, and how many artifacts, verdicts and tasks there are."""
    counts = []
    if study.artifacts:
        missing = sum(bool(row.unmeasured) for row in study.artifacts)
        counts.append(f"{len(study.artifacts)} artifacts, {missing} of them with figures unmeasured")
    outcomes: dict[str, list[str]] = {
        "gates": [line.outcome for line in study.gates if line.outcome],
        "tasks": [task.status for task in study.tasks],
        "claims": [one.outcome for one in study.claims],
    }
    for name, words in outcomes.items():
        if words:
            found = ", ".join(f"{count} {word}" for word, count in Counter(words).items())
            counts.append(f"{name}: {found}")
    if study.seconds is not None:
        counts.append(f"{study.seconds:,.0f} s")
    said = [printable(line, _TEXT_CHARACTERS) for line in study.summary]
    said += [outcome_of(one) for one in study.merges]
    return [*said, "; ".join(counts)] if counts else said


def _parts(study: Study, data: dict[str, Any]) -> dict[str, Any]:
    whats, roles = layer_choices(data)
    found: dict[str, Any] = {
        "summary": summary_of(study),
        "legend": [(printable(name), colour) for name, colour in groups_of(study).items()],
        "artifacts": tables.artifact_table(study),
        "is_sized": any(row.file_bytes or row.bpw for row in study.artifacts) or not study.merges,
        "peers": tables.peer_table(study),
        "claims": tables.claim_table(study),
        "found": [*merge_parts(study), *experiment_parts(study)],
        "gates": tables.gate_table(study),
        "components": tables.component_table(study),
        "tensors": tables.tensor_table(study),
        "spectra": tables.spectrum_table(study),
        "tasks": tables.task_table(study),
        "intervals": _intervals(study),
        "whats": _choices(whats),
        "roles": _choices(roles),
        "component_whats": [("weights", WEIGHTS_ERROR), ("outputs", OUTPUTS_ERROR)],
        "mapped": [(at, printable(row.name)) for at, row in enumerate(study.artifacts) if row.tensors],
        **_spectral(study, data),
        **_measures(study),
        **_samples(study),
        "commands": [lines_of(line) for line in study.commands],
        "own_commands": _own_commands(study),
        "facts": _facts(study),
        "notes": [printable(note, _TEXT_CHARACTERS) for note in study.notes],
    }
    return found | {"parts": _contents(found)}


def _contents(found: dict[str, Any]) -> list[tuple[str, str]]:
    parts = (
        ("sizes", "Size against divergence", found["artifacts"].rows and found["is_sized"]),
        ("artifacts-h", "Artifacts", found["artifacts"].rows),
        *((one.id, one.title, True) for one in found["found"]),
        ("claims-h", "Claims", found["claims"].rows),
        ("gates-h", "Gate log", found["gates"].rows),
        ("layers-h", "Errors by layer", found["whats"]),
        ("components-h", "Errors by component", found["components"].rows),
        ("allocation-h", "Allocation", found["components"].rows),
        ("spectra-h", "Spectra", found["spectra"].rows),
        ("samples-h", "Samples", found["samples"]),
        ("tasks-h", "Tasks", found["tasks"].rows),
        ("repeat", "How to repeat it", True),
    )
    return [(anchor, name) for anchor, name, there in parts if there]


def _choices(labels: Sequence[str]) -> list[tuple[str, str]]:
    """Return the options of a list: what the data calls it, and the same as text."""
    return [(one, html.unescape(one)) for one in labels]


def _choices_of(table: Table, columns: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield the columns that a table has and their values, to choose rows by."""
    for column in columns:
        if column in table.columns:
            at = table.columns.index(column)
            values = list(dict.fromkeys(row[at].text for row in table.rows))
            if len(values) <= _MOST_CHOICES:
                yield column, values


def _measures(study: Study) -> dict[str, Any]:
    found = tables.measures_of(study)
    first = [next((key for key in wanted if key in found), "") for wanted in _FIRST_MEASURES]
    return {"measures": [(key, one.label) for key, one in found.items()], "first_measures": first}


def _intervals(study: Study) -> str:
    kinds = dict.fromkeys(
        figure.interval for row in study.artifacts for figure in row.measures.values() if figure.interval
    )
    return printable("; ".join(kinds) or "unmeasured", 500)


def _spectral(study: Study, data: dict[str, Any]) -> dict[str, Any]:
    roles = dict.fromkeys(one.role for one in study.spectra)
    curves = any(one.sigma for one in study.spectra)
    figures = [one["name"] for one in data["spectral"]]
    return {
        "spectral": ([("sigma", "singular values")] if curves else []) + [(name, name) for name in figures],
        "spectrum_roles": [(ALL_ROLES, ALL_ROLES), *((label(role), printable(role)) for role in roles)],
    }


def _samples(study: Study) -> dict[str, Any]:
    names = {row.name: at for at, row in enumerate(study.artifacts)}
    ways = dict.fromkeys(one.how for sample in study.samples for one in sample.passages)
    return {
        "prompts": [(at, f"{at + 1}: {printable(s.prompt, 60)}") for at, s in enumerate(study.samples)],
        "ways": [(printable(how), printable(how)) for how in ways],
        "samples": [
            (
                lines_of(sample.prompt[:_TEXT_CHARACTERS]),
                [
                    _Card(
                        names.get(one.artifact),
                        printable(one.artifact),
                        printable(one.how),
                        printable(one.note, 500),
                        lines_of(one.text[:_TEXT_CHARACTERS]),
                    )
                    for one in sample.passages
                ],
            )
            for sample in study.samples
        ],
    }


def _facts(study: Study) -> list[tuple[str, Table]]:
    said = {one.sha256 for one in study.digests}
    digests = [row for row in study.artifacts if row.sha256 and row.sha256 not in said]
    return [
        ("Environment", _pairs(("what", "value"), list(study.environment.items()))),
        *(
            (f"Protocol: {printable(one.name)}", _pairs(("setting", "value"), list(one.settings.items())))
            for one in study.protocols
        ),
        (
            "Digests",
            _pairs(
                ("what", "SHA-256"),
                [*((one.what, one.sha256) for one in study.digests), *((r.name, r.sha256) for r in digests)],
            ),
        ),
    ]


def _own_commands(study: Study) -> list[tuple[str, list[str]]]:
    """Return the commands of each artifact that are not among the study's."""
    own = [
        (row.name, [line for line in row.commands if line not in study.commands]) for row in study.artifacts
    ]
    return [(printable(name), [lines_of(line) for line in lines]) for name, lines in own if lines]


def _long_tables(parts: dict[str, Any]) -> dict[str, Any]:
    """Return the rows of tables that are longer than a page: a cell is its text, or text and number."""
    ids = {_IDS.get(name, name): found for name, found in parts.items() if isinstance(found, Table)}
    ids |= {one.id: one.table for part in parts["found"] for one in part.blocks if one.table is not None}
    ids |= {f"facts-{at}": found for at, (_, found) in enumerate(parts["facts"])}
    return {
        name: {
            "rows": [[_stored(cell) for cell in row] for row in found.rows],
            "artifacts": list(found.artifacts),
        }
        for name, found in ids.items()
        if len(found.rows) > PAGE_ROWS
    }


def _stored(cell: tables.Cell) -> Any:
    """Return a cell as the page's script takes it: its text alone, or with its number and mark."""
    return cell.text if cell.value is None and not cell.mark else cell


def _pairs(columns: tuple[str, str], pairs: Sequence[tuple[str, Any]]) -> Table:
    rows = [
        (tables.Cell(printable(key, 500)), tables.Cell(printable(_plain(value), _TEXT_CHARACTERS)))
        for key, value in dict.fromkeys((key, _plain(value)) for key, value in pairs)
    ]
    return Table(columns, list(rows), [None] * len(rows))


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
