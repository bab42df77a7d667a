"""The command that writes compressed models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from bitsmith.cli.options import (
    Device,
    JsonOut,
    Model,
    Overwrite,
    Threads,
    progress_bars,
    show_forecast,
    write_json,
)
from bitsmith.errors import BitsmithError


def compress(
    model: Model,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="What to write: a .gguf, a .cellm, or a folder for packed types."),
    ] = None,
    type_name: Annotated[
        str | None,
        typer.Option(
            "--type",
            help="A stock mix by llama.cpp's name, e.g. IQ4_XS (default Q4_K_M); a .cellm's f16, i8, i4, i2 "
            "or q1; of a folder that transformers and vLLM load: W4A16, W4A16_ASYM, W8A16, NF4 or FP4. "
            "Factors, which bitsmith alone reads: SVD, SVD+INT4, INT4, TT or TT+SVD with options, as "
            "SVD+INT4:bpw=4.5, SVD:error=0.1:int8, INT4:heads=0.5, TT:r=64 (by --stats with "
            ":scales), TT+SVD:core=512:r=32.",
        ),
    ] = None,
    recipe: Annotated[
        Literal["auto", "sbgq-iq4xs", "spi", "sahc"] | None,
        typer.Option(
            "--recipe",
            help="auto: every tensor's type by measurement, within --target or --fit; "
            "sbgq-iq4xs: rotation, gauges, importance (with --stats or --text) and its table of types; "
            "spi: a folder whose critical linears stay in 16 bits, the others become NF4; "
            "sahc: a folder by low rank, Tensor-Trains and int4, every row gated on --text and replanned.",
        ),
    ] = None,
    transforms: Annotated[
        str | None,
        typer.Option(
            "--transforms",
            metavar="auto|none|NAME,…",
            help="Exact changes before rounding: auto keeps what helps on held-out text; or names, as "
            "gauge,permute,rotate:seed=1 (gauge and permute stand for all scale-* and permute-*).",
        ),
    ] = None,
    target: Annotated[
        str | None, typer.Option("--target", help="Size to allocate: 4.66bpw, 4.86GiB, 5.2GB or plain bytes.")
    ] = None,
    fit: Annotated[
        str | None, typer.Option("--fit", help="Memory to fit, weights, KV cache and state together: 8GiB.")
    ] = None,
    ctx: Annotated[
        int | None,
        typer.Option(
            "--ctx", min=1, help="Tokens of context for --fit (default 8192), of a chunk for sahc (512)."
        ),
    ] = None,
    stats: Annotated[
        Path | None, typer.Option("--stats", help="Statistics from calibrate, or an imatrix (.gguf, .dat).")
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text",
            help="Text to calibrate on where there are no --stats; for recipe sahc the text it is judged on.",
        ),
    ] = None,
    rounder: Annotated[
        Literal["nearest", "weighted", "gptq", "auto"],
        typer.Option("--rounder", help="How codes are found; auto takes what does best on held-out text."),
    ] = "auto",
    sequential: Annotated[
        bool | None,
        typer.Option(
            help="Statistics behind the compressed layers before; default where that takes minutes at most."
        ),
    ] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Fit scales, F32 tensors and codes by KL to the original; slow.")
    ] = False,
    tune_steps: Annotated[
        int | None, typer.Option("--tune-steps", min=1, help="Steps of --tune; default as in its record.")
    ] = None,
    plan: Annotated[
        Path | None, typer.Option("--plan", help="A plan as YAML: every tensor's type, as one wrote before.")
    ] = None,
    plan_out: Annotated[
        Path | None, typer.Option("--plan-out", help="Write the plan as YAML, to edit and pass to --plan.")
    ] = None,
    pure: Annotated[
        bool, typer.Option("--pure", help="The mix's base type for every quantized tensor.")
    ] = False,
    tensor_type: Annotated[
        list[str] | None,
        typer.Option("--tensor-type", metavar="REGEX=TYPE", help="Override by regex on the HF or GGUF name."),
    ] = None,
    no_fallback: Annotated[
        bool, typer.Option("--no-fallback", help="Refuse where a row does not fit the type's blocks.")
    ] = False,
    allow_requantize: Annotated[
        bool,
        typer.Option(
            "--allow-requantize",
            help="Also take weights that are rounded already (a quantized GGUF, FP8), which costs quality.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and what it will take; write nothing.")
    ] = False,
    group: Annotated[
        int | None,
        typer.Option(
            "--group", help="Columns that share a scale (.cellm, folder): 32, 64 or 128; 0 for a row."
        ),
    ] = None,
    like_seed: Annotated[
        bool, typer.Option("--like-seed", help="The .cellm that cellm's own converter writes, bit for bit.")
    ] = False,
    select: Annotated[
        Literal["cellm", "text", "layers"] | None,
        typer.Option(
            "--select",
            help="Matrices of a .cellm that are quantized: cellm's rules, the text model, its layers.",
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option("--ignore", metavar="MODULE|re:…", help="Linears of a folder that stay as they are."),
    ] = None,
    critical: Annotated[
        str | None,
        typer.Option("--critical", help="What recipe spi keeps: 129, 3.9GB, or alpha>0.8 (any measure)."),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            "--by", help="How recipe spi ranks linears: alpha-high, alpha-low, tail-…, r90-…, kld, random."
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of --by random.")] = 0,
    chunks: Annotated[
        int | None,
        typer.Option("--chunks", min=1, help="Chunks of --text that recipe sahc uses (default all)."),
    ] = None,
    ppl_limit: Annotated[
        float | None,
        typer.Option(
            "--ppl-limit",
            help="Perplexity that recipe sahc must stay below (default 100, if the original does).",
        ),
    ] = None,
    device: Device = "cpu",
    threads: Threads = None,
    overwrite: Overwrite = False,
    json_out: JsonOut = None,
) -> None:
    """Compress MODEL to a GGUF that llama.cpp runs, a .cellm file, or a folder for transformers and vLLM."""
    from bitsmith.report.written import print_planned, print_written
    from bitsmith.run.compress import compress as run
    from bitsmith.run.compress import plan as run_dry
    from bitsmith.run.forecast_compress import forecast
    from bitsmith.run.job import Job

    job = Job(
        model=model,
        out=out,
        type_name=type_name,
        recipe=recipe,
        transforms=transforms,
        target=target,
        fit=fit,
        ctx_tokens=ctx,
        statistics=stats,
        text=text,
        rounder=rounder,
        sequential=sequential,
        tune=tune,
        tune_steps=tune_steps,
        plan_file=plan,
        plan_out=plan_out,
        pure=pure,
        tensor_types=tuple(_parsed(tensor_type or [])),
        no_fallback=no_fallback,
        allow_requantize=allow_requantize,
        overwrite=overwrite,
        group=group,
        like_seed=like_seed,
        selection=select,
        ignore=tuple(ignore or []),
        critical=critical,
        by=by,
        seed=seed,
        chunks=chunks,
        ppl_limit=ppl_limit,
        device=device,
        threads=threads,
    )
    if dry_run:
        with progress_bars() as progress:
            planned = run_dry(job, progress)
            expected = forecast(job, planned)
        print_planned(planned)
        show_forecast(expected, json_out, planned.to_json())
        return
    with progress_bars() as progress:
        record = run(job, progress)
    print_written(record)
    write_json(json_out, record.to_json())


def _parsed(rules: list[str]) -> list[tuple[str, str]]:
    from bitsmith.run.overrides import split_rule

    pairs = []
    for rule in rules:
        if (pair := split_rule(rule)) is None:
            raise BitsmithError(f"--tensor-type {rule!r} is not of the form REGEX=TYPE")
        pairs.append(pair)
    return pairs
