"""The commands that measure a whole question: `study FILE`, `study claims`, `study merge` …."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from bitsmith.cli.options import JsonOut, Model, Overwrite, progress_bars, write_json


class _Studies(TyperGroup):
    """Takes a first word that is no command, or an option of one, as `run`'s."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["run", *args]
        return super().parse_args(ctx, args)


study = typer.Typer(
    cls=_Studies,
    help="Run a study that a YAML file describes (bitsmith study STUDY.yaml), or one of these.",
    no_args_is_help=True,
)

_Text = Annotated[Path, typer.Option("--text", help="UTF-8 text to measure on.")]
_Ctx = Annotated[int, typer.Option("--ctx", min=8, help="Tokens per chunk.")]
_Chunks = Annotated[int | None, typer.Option("--chunks", min=1, help="Chunks at most; default all.")]
_Keep = Annotated[bool, typer.Option("--keep", help="Keep every artifact in the folder.")]


@study.command("run")
def study_run(
    file: Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="Models, recipes, evaluations, gates.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder of the study; default STUDY-study.")
    ] = None,
    engine: Annotated[
        Literal["local", "ray"], typer.Option("--engine", help="Processes here, or a Ray cluster.")
    ] = "local",
    address: Annotated[
        str | None, typer.Option("--address", help="Of the Ray cluster; default one started here.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=1, help="Tasks at once; default one a core, each with one thread."),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option("--memory", help="Of all local tasks together, as 8GiB; default most of what is free."),
    ] = None,
    cache: Annotated[
        Path | None, typer.Option("--cache", help="Folder of artifacts that other studies share.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a study that was begun; what is done stays.")
    ] = False,
) -> None:
    """Run the study in STUDY.yaml, the word `run` may be left out; writes its report, page and model card.

    The exit code is 1 if a task failed or a gate did not pass.
    """
    from bitsmith.report.model_card import write_report
    from bitsmith.report.study_json import read_study
    from bitsmith.report.study_terminal import print_study
    from bitsmith.run.budget import parse_memory
    from bitsmith.run.record import seal
    from bitsmith.run.study import run_study

    folder = out or Path(f"{file.stem}-study")
    with progress_bars() as progress:
        result = run_study(
            file,
            folder,
            engine=engine,
            workers=workers,
            memory_bytes=None if memory is None else parse_memory(memory),
            address=address,
            cache=cache,
            resume=resume,
            progress=progress,
        )
    shown = read_study(result.to_json())
    print_study(shown, write_report(folder, shown))
    seal(folder, "study")
    if not result.is_whole:
        raise typer.Exit(1)


@study.command("status")
def study_status(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of a study.")],
    json_out: JsonOut = None,
) -> None:
    """Show where the study in OUT stands, also while it runs."""
    from bitsmith.report.study_terminal import print_study_status
    from bitsmith.run.study import study_status as run

    found = run(folder)
    print_study_status(found)
    write_json(json_out, found.to_json())


@study.command("claims")
def study_claims(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for claims.json and claims.md.")] = Path(
        "claims-study"
    ),
    text: Annotated[
        Path | None,
        typer.Option("--text", help="UTF-8 text to measure on; default the lab's held-out text."),
    ] = None,
    stats: Annotated[
        Path | None, typer.Option("--stats", help="Statistics from calibrate, or an imatrix.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", help="Text to learn from; without --stats too, Python's own sources."),
    ] = None,
    only: Annotated[str | None, typer.Option("--only", metavar="NAME,…", help="Only these claims.")] = None,
    ctx: _Ctx = 512,
    chunks: Annotated[int, typer.Option("--chunks", min=1, help="Chunks at most.")] = 8,
    seed: Annotated[int, typer.Option("--seed", help="Of the bootstrap.")] = 0,
    overwrite: Overwrite = False,
    json_out: JsonOut = None,
) -> None:
    """Check the published claims on MODEL: HELD, NOT HELD or NOT TESTED, each with figure and interval."""
    from bitsmith.lab.claims import claims_study_of
    from bitsmith.report.claims_table import print_claims, print_cost, write_claims_page

    with progress_bars() as progress:
        found = claims_study_of(
            model,
            out,
            print_cost,
            text=text,
            statistics=stats,
            calibration=calibration,
            only=None if only is None else only.split(","),
            ctx_tokens=ctx,
            chunks=chunks,
            seed=seed,
            overwrite=overwrite,
            progress=progress,
        )
    page = write_claims_page(found, out)
    print_claims(found)
    typer.echo(f"wrote {page}")
    write_json(json_out, found.to_json())


@study.command("merge")
def study_merge(
    teacher: Annotated[
        Path | None, typer.Argument(metavar="TEACHER", help="The bigger model; default the lab's own pair.")
    ] = None,
    student: Annotated[Path | None, typer.Argument(metavar="STUDENT", help="The smaller model.")] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the result and its page.")] = Path(
        "merge-study"
    ),
    text: Annotated[
        Path | None, typer.Option("--text", help="UTF-8 text that maps are found on; default Python's code.")
    ] = None,
    held: Annotated[Path | None, typer.Option("--held", help="Text of that task to measure on.")] = None,
    other: Annotated[
        Path | None, typer.Option("--other", help="Text of a second task; default Python's docstrings.")
    ] = None,
    other_held: Annotated[Path | None, typer.Option("--other-held", help="The same to measure on.")] = None,
    only: Annotated[
        str | None, typer.Option("--only", metavar="NAME,…", help="Only these experiments.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens to pair at most.")] = 140_000,
    ctx: Annotated[int, typer.Option("--ctx", min=8, help="Tokens per chunk.")] = 256,
    chunks: Annotated[int, typer.Option("--chunks", min=1, help="Held-out chunks at most.")] = 32,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the bootstrap and random folds.")] = 0,
    overwrite: Overwrite = False,
    json_out: JsonOut = None,
) -> None:
    """Run every experiment of the merging write-up on a pair of models: baselines, ablations, rivals, sweeps.

    Nothing but the result and its page is written. A killed run goes on with the rows it had.
    """
    from bitsmith.lab.merge_experiments import RESULT_NAME, merge_experiments
    from bitsmith.report.claims_table import print_cost
    from bitsmith.report.model_card import write_report
    from bitsmith.report.study_adapters import load_study
    from bitsmith.report.study_terminal import print_study

    with progress_bars() as progress:
        found = merge_experiments(
            teacher,
            student,
            out,
            text=text,
            held=held,
            other=other,
            other_held=other_held,
            tokens=tokens,
            ctx_tokens=ctx,
            chunks=chunks,
            seed=seed,
            only=None if only is None else only.split(","),
            overwrite=overwrite,
            progress=progress,
            say_cost=print_cost,
        )
    shown = load_study([out / RESULT_NAME])
    print_study(shown, write_report(out, shown))
    write_json(json_out, found.to_json())


@study.command("formats")
def study_formats(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for formats.json and formats.md.")] = Path(
        "formats-study"
    ),
    text: Annotated[
        Path | None, typer.Option("--text", help="UTF-8 text to measure on; default the lab's held-out text.")
    ] = None,
    stats: Annotated[
        Path | None,
        typer.Option(
            "--stats", help="Statistics from calibrate; without, rows that need them are unmeasured."
        ),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option("--calibration", help="Text to collect statistics on where there are none.")
    ] = None,
    formats: Annotated[
        str | None, typer.Option("--formats", metavar="NAME,…", help="Only these rows, in this order.")
    ] = None,
    ctx: _Ctx = 512,
    chunks: _Chunks = None,
    seed: Annotated[int, typer.Option("--seed", help="Of bootstrap and samples.")] = 0,
    keep: _Keep = False,
    overwrite: Overwrite = False,
    json_out: JsonOut = None,
) -> None:
    """Write MODEL in every small format, and measure size, divergence and coherence of each."""
    from bitsmith.lab.formats import formats_study_of
    from bitsmith.report.formats_table import print_formats, write_formats_markdown

    with progress_bars() as progress:
        found = formats_study_of(
            model,
            text,
            out,
            formats=None if formats is None else formats.split(","),
            statistics=stats,
            calibration=calibration,
            ctx_tokens=ctx,
            chunks=chunks,
            seed=seed,
            keep=keep,
            overwrite=overwrite,
            progress=progress,
        )
    page = write_formats_markdown(found, out)
    print_formats(found)
    typer.echo(f"wrote {page}")
    write_json(json_out, found.to_json())


@study.command("spi")
def study_spi(
    model: Model,
    text: _Text,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for spi.json and spi.md.")] = Path(
        "spi-study"
    ),
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration", help="Text that --by kld measures on; without, those rows are unmeasured."
        ),
    ] = None,
    critical: Annotated[
        str | None, typer.Option("--critical", help="Linears kept; default 129 of 248 of the model's.")
    ] = None,
    random: Annotated[int, typer.Option("--random", min=0, help="Random choices, seeds from 0.")] = 5,
    ctx: _Ctx = 512,
    chunks: _Chunks = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the bootstrap.")] = 0,
    keep: _Keep = False,
    overwrite: Overwrite = False,
    json_out: JsonOut = None,
) -> None:
    """Hold the SPI recipe (critical linears in 16 bits, the rest NF4) against the controls it lacked."""
    from bitsmith.report.spi_table import print_spi_study, write_spi_page
    from bitsmith.run.study_spi import study_spi as run

    with progress_bars() as progress:
        found = run(
            model,
            text,
            out,
            calibration=calibration,
            critical=critical,
            random_seeds=range(random),
            ctx_tokens=ctx,
            chunks=chunks,
            seed=seed,
            keep=keep,
            overwrite=overwrite,
            progress=progress,
        )
    page = write_spi_page(found, out)
    print_spi_study(found)
    typer.echo(f"wrote {page}")
    write_json(json_out, found.to_json())
