"""A study on the terminal: its artifacts and what did not pass, where it stands, what a page holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from bitsmith.errors import printable
from bitsmith.report.markdown import UNMEASURED
from bitsmith.report.study_json import Experiment, Study
from bitsmith.report.study_page import summary_of
from bitsmith.report.study_tables import MEASURES, figure_text
from bitsmith.report.terminal import Rows, say, table
from bitsmith.run.study import StudyStatus

_MEASURES = ("mean_kld", "ppl_ratio")
_EXPERIMENT = {"ppl_over_student": "PPL / student's", "kld_to_teacher": "KLD, nats", "explained": "explained"}


def print_study(study: Study, files: tuple[Path, ...]) -> None:
    """Print artifacts and experiments with their figures, the tasks that are not done, and the files."""
    console = Console()
    if study.artifacts:
        console.print(table(*_artifact_rows(study), right=("bytes", "bpw")))
    for one in study.experiments:
        console.print(escape(f"\n{printable(one.name)}: {printable(one.words, 300)}"), soft_wrap=True)
        console.print(table(*_experiment_rows(one)))
    for line in (*summary_of(study), *_not_done(study), f"wrote {', '.join(map(str, files))}"):
        say(console, printable(line, 1000))


def print_study_status(status: StudyStatus) -> None:
    """Print how many tasks are in each status, those that are not simply done, and the latest decision."""
    console = Console()
    said = ", ".join(f"{count} {name}" for name, count in status.counts.items())
    runs = "a run works on it" if status.is_running else "no run works on it"
    console.print(f"{len(status.tasks)} tasks: {said}; {runs}", highlight=False)
    if reasons := status.reasons():
        console.print(table(("task", "status", "why"), reasons))
    if status.decisions:
        last = status.decisions[-1]
        line = f"last: {last.when} {printable(last.task)}: {last.before.value} → {last.after.value}"
        console.print(escape(f"{line}, {printable(last.reason) or UNMEASURED}"), highlight=False)


def _artifact_rows(study: Study) -> Rows:
    """Return a narrow row per artifact; the page has all the columns."""
    shown = {key: MEASURES[key] for key in _MEASURES}
    columns = ("artifact", "bytes", "bpw", *(one.label for one in shown.values()), "verdict")
    return columns, [
        (
            row.name,
            UNMEASURED if row.file_bytes is None else f"{row.file_bytes:,}",
            UNMEASURED if row.bpw is None else f"{row.bpw:.3f}",
            *(
                "original" if row.is_original else figure_text(row.measures.get(key), one.style)
                for key, one in shown.items()
            ),
            row.verdict or row.unmeasured,
        )
        for row in study.artifacts
    ]


def _experiment_rows(one: Experiment) -> Rows:
    """Return a narrow row per row of an experiment; the page has all its figures and facts."""
    kept = [name for name in _EXPERIMENT if any(name in row.figures for row in one.rows)]
    rows: list[Sequence[str]] = [
        (printable(row.label, 100), *(figure_text(row.figures.get(name), "{:.3f}") for name in kept))
        for row in one.rows
    ]
    return ("row", *(_EXPERIMENT[name] for name in kept)), rows


def _not_done(study: Study) -> list[str]:
    return [f"{task.name}: {task.status}: {task.why}" for task in study.tasks if task.status != "done"]
