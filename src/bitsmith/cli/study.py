"""The commands that measure a whole question: `study formats`, `study spi`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitsmith.cli.options import JsonOut, Model, Overwrite, progress_bars, write_json

study = typer.Typer(help="Measure a whole question on a model, with controls.", no_args_is_help=True)

_Text = Annotated[Path, typer.Option("--text", help="UTF-8 text to measure on.")]
_Ctx = Annotated[int, typer.Option("--ctx", min=8, help="Tokens per chunk.")]
_Chunks = Annotated[int | None, typer.Option("--chunks", min=1, help="Chunks at most; default all.")]
_Keep = Annotated[bool, typer.Option("--keep", help="Keep every artifact in the folder.")]


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
