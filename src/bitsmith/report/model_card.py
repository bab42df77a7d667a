"""A study as files to publish: a Markdown model card with snippets to run it, `report.json`, the page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from bitsmith.errors import OutputError
from bitsmith.report import study_tables as tables
from bitsmith.report.card_snippets import block, front_matter, snippets
from bitsmith.report.experiment_parts import experiment_note, experiment_table
from bitsmith.report.markdown import UNMEASURED, markdown_table, plain, write_markdown
from bitsmith.report.merge_parts import facts_table, outcome_of, tally_table
from bitsmith.report.study_json import GateLine, Study
from bitsmith.report.study_page import summary_of, write_study_page
from bitsmith.report.study_tables import Table
from bitsmith.store.journal import write_result

PAGE_NAME, JSON_NAME, CARD_NAME = "report.html", "report.json", "README.md"

_SAMPLE_CHARACTERS = 600
_SAMPLES = 12
_ROWS = 60
"""Rows of a table in the card; the page has all."""


def write_report(out: Path, study: Study) -> tuple[Path, Path, Path]:
    """Write the page, `report.json` and the model card into the folder `out`, over earlier ones.

    Returns their paths in that order. Raises OutputError where the folder cannot be made or written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot be made: {error.strerror or error}", path=out) from error
    page = write_study_page(out / PAGE_NAME, study)
    write_result(out / JSON_NAME, study.to_json())
    return page, out / JSON_NAME, write_markdown(out / CARD_NAME, model_card(study, out))


def model_card(study: Study, folder: Path | None = None) -> str:
    """Return the study as a Markdown model card; names, samples and texts of files are escaped.

    The front matter says what is known. Of each kind of artifact (GGUF, .cellm, folder by its packing) the
    one closest to the original gets the snippets to run it, with its path from `folder`, where the card
    lies; the `config.json` of a folder that is there is quoted.
    """
    parts = [front_matter(study), f"# {plain(study.title)}", *(plain(line) for line in summary_of(study))]
    for title, table in (
        ("Artifacts", tables.artifact_table(study)),
        ("Points of others", tables.peer_table(study)),
        ("Claims", tables.claim_table(study)),
        ("Errors by component", tables.component_table(study)),
    ):
        if table.rows:
            parts += [f"## {title}", *_markdown(table)]
        if title == "Artifacts":
            parts += [*(_measured(study) if table.rows else ()), *_merges(study), *_experiments(study)]
    parts += snippets(study, folder)
    parts += _not_passed(study)
    parts += _samples(study)
    parts += _repeat(study)
    return "\n\n".join(parts) + "\n"


def _measured(study: Study) -> Iterator[str]:
    """Yield how the figures of the table were measured."""
    kinds = dict.fromkeys(
        figure.interval for row in study.artifacts for figure in row.measures.values() if figure.interval
    )
    if kinds:
        yield plain(f"Intervals in brackets: {'; '.join(kinds)}.")
    for protocol in study.protocols[:4]:
        said = ", ".join(f"{name} {value}" for name, value in protocol.settings.items() if value is not None)
        yield plain(f"Protocol {protocol.name}: {said}.")
    yield f"The same with plots, every tensor and every gate: {PAGE_NAME}; as data: {JSON_NAME}."


def _merges(study: Study) -> Iterator[str]:
    """Yield what each merge was made of, what was decided, and which targets its diagnostics meet."""
    for one in study.merges:
        yield f"## Merge: {plain(one.name)}"
        yield plain(outcome_of(one))
        for table in (facts_table(one), tally_table(one)):
            if table.rows:
                yield from _markdown(table)


def _experiments(study: Study) -> Iterator[str]:
    for at, one in enumerate(study.experiments):
        if at == 0:
            yield "## Experiments"
        yield f"### {plain(one.name)}"
        yield plain(experiment_note(one))
        yield from _markdown(experiment_table(one))


def _not_passed(study: Study) -> Iterator[str]:
    """Yield what failed or was not measured: gates, a row for each, and tasks."""
    gates: dict[str, list[GateLine]] = {}
    for line in study.gates:
        if line.outcome:
            gates.setdefault(line.gate or line.what, []).append(line)
    rows = []
    for name, lines in gates.items():
        lost = [line for line in lines if line.outcome != "PASS"]
        if lost:
            one = lost[0]
            said = " ".join((one.artifact, one.tensor, one.what, f"→ {one.decision}" if one.decision else ""))
            failed = sum(line.outcome == "FAIL" for line in lost)
            rows.append((name, str(failed), str(len(lost) - failed), str(len(lines)), " ".join(said.split())))
    tasks = [
        (task.name, task.status, task.why) for task in study.tasks if task.status in ("failed", "blocked")
    ]
    if rows or tasks:
        yield "## What did not pass"
    if rows:
        yield markdown_table(("gate", "FAIL", "UNMEASURED", "of", "the first of them"), rows[:_ROWS])
    if tasks:
        yield markdown_table(("task", "status", "why"), tasks[:_ROWS])


def _samples(study: Study) -> Iterator[str]:
    if study.samples:
        first = study.samples[0]
        how = first.passages[-1].how if first.passages else ""
        yield "## Samples"
        yield f"After the first prompt, {plain(how)}:"
        yield block(first.prompt[:_SAMPLE_CHARACTERS])
        for one in [one for one in first.passages if one.how == how][:_SAMPLES]:
            yield f"{plain(one.artifact)}: {plain(one.note)}"
            yield block(one.text[:_SAMPLE_CHARACTERS])


def _repeat(study: Study) -> Iterator[str]:
    yield "## How to repeat it"
    own = dict.fromkeys(line for row in study.artifacts for line in row.commands)
    commands = study.commands or tuple(own)
    yield block("\n".join(commands) or f"# commands: {UNMEASURED}")
    if study.commands and own.keys() - set(study.commands):
        yield f"The commands that make and measure each artifact alone are in {PAGE_NAME}."
    for protocol in study.protocols:
        rows = [(str(name), str(value)) for name, value in protocol.settings.items()]
        yield f"Protocol {plain(protocol.name)}:"
        yield markdown_table(("setting", "value"), rows)
    if study.environment:
        yield "Environment:"
        yield markdown_table(("what", "value"), list(study.environment.items()))
    digests = [(one.what, one.sha256) for one in study.digests]
    digests += [(row.name, row.sha256) for row in study.artifacts if row.sha256]
    if digests:
        yield markdown_table(("what", "SHA-256"), list(dict.fromkeys(digests)))
    if study.notes:
        yield "\n".join(f"- {plain(note)}" for note in study.notes)


def _markdown(table: Table) -> Iterator[str]:
    yield markdown_table(table.columns, [[cell.text for cell in row] for row in table.rows[:_ROWS]])
    if len(table.rows) > _ROWS:
        yield f"{len(table.rows) - _ROWS:,} more rows in {PAGE_NAME}."
