"""What several commands share: arguments, the progress bars, JSON beside what is printed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from bitsmith.cli.invocation import flags
from bitsmith.errors import printable
from bitsmith.log import event, progressed
from bitsmith.progress import Progress

if TYPE_CHECKING:
    from bitsmith.run.forecast import Forecast

Model = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        help="A Hugging Face folder, a .safetensors, .gguf or .cellm file, or org/name[@revision] of the hub "
        "(one GGUF of several: org/name:Q4_K_M, org/name/file.gguf).",
    ),
]
JsonOut = Annotated[Path | None, typer.Option("--json", help="Also write the result as JSON to this file.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only tell time, memory and disk that it will take.")]
Device = Annotated[
    Literal["cpu", "cuda", "auto"],
    typer.Option("--device", help="Where to compute: cuda is a GPU, auto a GPU where torch finds one."),
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="Threads of compiled loops; default the cores it may run on."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]
Workers = Annotated[
    int | None, typer.Option("--workers", min=1, help="Processes; default one for each core where it pays.")
]

_TOLD_SECONDS = 1.0


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """Show a bar with the time left for each stage, on a terminal's stderr, and tell of it in the log."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    console = Console(stderr=True)
    hidden = not (console.is_terminal and flags.shows_progress)
    with Progress(*columns, console=console, transient=True, disable=hidden) as bars:
        tasks: dict[str, Any] = {}
        told: dict[str, float] = {}

        def report(stage: str, done: int, total: int) -> None:
            now = time.monotonic()
            if done >= total or now - told.get(stage, -_TOLD_SECONDS) >= _TOLD_SECONDS:
                told[stage] = now
                progressed(stage, done, total)
            if stage not in tasks:
                tasks[stage] = bars.add_task(printable(stage), total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield report


def fetched(model: Path) -> Path:
    """Return where a model lies; one of a hub is brought into the cache first."""
    from bitsmith.store.hub import local

    with progress_bars() as progress:
        return local(model, progress)


def remark(text: str) -> None:
    """Say something beside the result, on stderr, and in the log."""
    event("remark", text=text)
    if flags.shows_progress:
        typer.echo(printable(text, 2000), err=True)


def show_forecast(
    forecast: Forecast | None, json_out: Path | None, beside: dict[str, Any] | None = None
) -> None:
    """Print what a run would take, also as JSON where that is asked for, `beside` its plan.

    Raises BitsmithError where disk or memory cannot hold it.
    """
    from bitsmith.report.forecast_lines import UNMEASURED, forecast_lines

    typer.echo(UNMEASURED if forecast is None else "\n".join(forecast_lines(forecast)))
    told = None if forecast is None else forecast.to_json()
    write_json(json_out, (told or {}) if beside is None else {**beside, "forecast": told})
    if forecast is not None:
        forecast.refuse_too_large()


def write_json(path: Path | None, record: dict[str, Any]) -> None:
    """Write a record as JSON where a file is asked for."""
    if path is not None:
        path.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", "utf-8")
