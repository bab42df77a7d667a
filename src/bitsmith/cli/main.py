"""The command line: each command reads its options, calls one public function and prints what it returns."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from bitsmith import __version__
from bitsmith.cli.generate import chat, generate
from bitsmith.errors import BitsmithError
from bitsmith.progress import Progress

app = typer.Typer(
    help="Measure, compress and verify LLM checkpoints.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
lab = typer.Typer(
    help="Make tiny real models and synthetic checkpoints of real shapes.", no_args_is_help=True
)
app.add_typer(lab, name="lab")
app.command()(generate)
app.command()(chat)

Model = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A Hugging Face folder, a .safetensors file or a .gguf file.")
]
JsonOut = Annotated[Path | None, typer.Option("--json", help="Also write the result as JSON to this file.")]
_INTERRUPTED = 130  # typer's exit code for Ctrl-C
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]


@contextmanager
def _progress() -> Iterator[Progress]:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield report


def _write_json(path: Path | None, record: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")


def _tensor_types(rules: list[str]) -> list[tuple[str, str]]:
    pairs = [rule.rpartition("=") for rule in rules]
    for rule, (pattern, equals, name) in zip(rules, pairs, strict=True):
        if not (pattern and equals and name):
            raise BitsmithError(f"--tensor-type {rule!r} is not of the form REGEX=TYPE")
    return [(pattern, name) for pattern, _, name in pairs]


@app.command()
def inspect(model: Model, json_out: JsonOut = None) -> None:
    """Show what is in MODEL: components, shares, roles, and its size in every stock mix."""
    from bitsmith.report.terminal import print_inspection
    from bitsmith.run.inspect import inspect as run

    inspection = run(model)
    print_inspection(inspection)
    _write_json(json_out, inspection.to_json())


@app.command()
def assay(
    model: Annotated[Path | None, typer.Argument(metavar="MODEL", help="As for inspect; any family.")] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder for assay.json and assay.html.")
    ] = None,
    match: Annotated[
        str | None, typer.Option("--match", metavar="REGEX", help="Only matrices whose name matches.")
    ] = None,
    stats: Annotated[
        Path | None,
        typer.Option("--stats", help="Statistics or imatrix: also judge by what the outputs see."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option("--text", help="UTF-8 text: also the spectra of K, V and residual states.")
    ] = None,
    seed_table: Annotated[
        bool, typer.Option("--seed-table", help="Hold the published SVD plan against its own numbers.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Tell whether low rank can beat int4 here: spectra, ranks, bounds and α of MODEL's matrices.

    With -o every finished matrix is kept, so that a killed run goes on where it was.
    """
    from bitsmith.report.assay_terminal import print_assay, print_seed_checks
    from bitsmith.run.assay import PAGE_NAME, RESULT_NAME
    from bitsmith.run.assay import assay as run
    from bitsmith.run.claims import seed_checks

    if seed_table:
        print_seed_checks(seed_checks())
    if model is None:
        if not seed_table:
            raise BitsmithError("name a MODEL, or ask for --seed-table")
        return
    with _progress() as progress:
        result = run(
            model, out, match=match, statistics=stats, text=text, overwrite=overwrite, progress=progress
        )
    print_assay(result)
    if out is not None:
        from bitsmith.report.assay_page import write_assay_page

        typer.echo(f"wrote {out / RESULT_NAME} and {write_assay_page(out / PAGE_NAME, result)}")


@app.command()
def calibrate(
    model: Model,
    out: Annotated[
        Path,
        typer.Option("-o", "--out", help="Folder for the statistics, or an imatrix: a .gguf or a .dat file."),
    ],
    text: Annotated[Path | None, typer.Option("--text", help="UTF-8 text to run through the model.")] = None,
    stats: Annotated[
        Path | None, typer.Option("--stats", help="Statistics to convert to an imatrix, without a forward.")
    ] = None,
    ctx: Annotated[int, typer.Option("--ctx", min=8, help="Tokens per chunk.")] = 512,
    chunks: Annotated[
        int | None, typer.Option("--chunks", min=1, help="Chunks at most; default all.")
    ] = None,
    block: Annotated[
        int | None,
        typer.Option("--block", min=1, help="Keep moments in diagonal blocks of this many columns."),
    ] = None,
    saliency: Annotated[
        bool,
        typer.Option(help="Weigh each token by what its errors cost the predictions; takes a backward pass."),
    ] = True,
    overwrite: Overwrite = False,
    json_out: JsonOut = None,
) -> None:
    """Run a text through MODEL and keep what its matrices see; reads and writes llama.cpp's imatrix too."""
    from bitsmith.report.terminal import print_calibration
    from bitsmith.run.calibrate import calibrate_or_convert as run

    with _progress() as progress:
        found = run(
            model,
            out,
            text=text,
            statistics=stats,
            ctx_tokens=ctx,
            chunks=chunks,
            block=block,
            saliency=saliency,
            overwrite=overwrite,
            progress=progress,
        )
    print_calibration(found)
    _write_json(json_out, found.to_json())


@app.command()
def compress(
    model: Model,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="The .gguf to write.")] = None,
    type_name: Annotated[
        str | None,
        typer.Option("--type", help="A stock mix by llama.cpp's name, e.g. IQ4_XS; default Q4_K_M."),
    ] = None,
    recipe: Annotated[
        Literal["auto", "sbgq-iq4xs"] | None,
        typer.Option(
            "--recipe",
            help="auto: every tensor's type by measurement, within --target or --fit; "
            "sbgq-iq4xs: rotation, gauges, importance (with --stats or --text) and its table of types.",
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
    ctx: Annotated[int, typer.Option("--ctx", min=1, help="Tokens of context for --fit.")] = 8192,
    stats: Annotated[
        Path | None, typer.Option("--stats", help="Statistics from calibrate, or an imatrix (.gguf, .dat).")
    ] = None,
    text: Annotated[
        Path | None, typer.Option("--text", help="Text to calibrate on where there are no --stats.")
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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan with exact bytes; write nothing else.")
    ] = False,
    overwrite: Overwrite = False,
    json_out: JsonOut = None,
) -> None:
    """Compress MODEL to a GGUF that llama.cpp runs."""
    from bitsmith.report.terminal import print_plan, print_record
    from bitsmith.run.job import Job, run, run_dry

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
        tensor_types=tuple(_tensor_types(tensor_type or [])),
        no_fallback=no_fallback,
        overwrite=overwrite,
    )
    if dry_run:
        with _progress() as progress:
            planned = run_dry(job, progress)
        print_plan(planned)
        _write_json(json_out, planned.to_json())
        return
    with _progress() as progress:
        record = run(job, progress)
    print_record(record)
    _write_json(json_out, record.to_json())


@app.command()
def evaluate(
    ref: Annotated[Path, typer.Argument(metavar="REF", help="The reference: HF folder or GGUF.")],
    candidate: Annotated[
        Path, typer.Argument(metavar="CANDIDATE", help="What is compared with it: HF folder or GGUF.")
    ],
    text: Annotated[Path, typer.Option("--text", help="UTF-8 text to measure on.")],
    ctx: Annotated[int, typer.Option("--ctx", min=8, help="Tokens per chunk.")] = 512,
    chunks: Annotated[
        int | None, typer.Option("--chunks", min=1, help="Chunks at most; default all.")
    ] = None,
    json_out: JsonOut = None,
) -> None:
    """Measure perplexity, KL divergence and top-1 agreement of CANDIDATE against REF, with intervals."""
    from bitsmith.report.terminal import print_evaluation
    from bitsmith.run.evaluate import evaluate as run

    with _progress() as progress:
        evaluation = run(ref, candidate, text, ctx_tokens=ctx, chunks=chunks, progress=progress)
    print_evaluation(evaluation)
    _write_json(json_out, evaluation.to_json())


@app.command()
def compare(
    ref: Annotated[Path, typer.Argument(metavar="REF", help="The checkpoint that CANDIDATE was made of.")],
    candidate: Annotated[Path, typer.Argument(metavar="CANDIDATE", help="A .gguf that compress wrote.")],
    json_out: JsonOut = None,
) -> None:
    """Compare every tensor of CANDIDATE with REF's, its transforms undone."""
    from bitsmith.report.terminal import print_weight_errors
    from bitsmith.run.transforms import compare_weights as run

    with _progress() as progress:
        errors = run(ref, candidate, progress)
    print_weight_errors(errors)
    _write_json(json_out, {"tensors": [asdict(error) for error in errors]})


@app.command()
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the demo's files.")] = Path("demo-out"),
    type_name: Annotated[str, typer.Option("--type", help="Stock mix.")] = "Q4_K_M",
) -> None:
    """Compress the bundled tiny Qwen3.5, evaluate it against the original, generate a few tokens, report."""
    from bitsmith.lab.demo import demo as run
    from bitsmith.report.html import write_demo_report
    from bitsmith.report.terminal import print_demo

    with _progress() as progress:
        result = run(out, type_name, progress=progress)
    report = write_demo_report(out / "report.html", result)
    print_demo(result, report)


@lab.command("train")
def lab_train(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write, Hugging Face layout.")],
    arch: Annotated[Literal["qwen3_5", "qwen3"], typer.Option(help="Model family.")] = "qwen3_5",
    hidden: Annotated[int, typer.Option(min=128, help="Hidden size, a multiple of 128.")] = 256,
    layers: Annotated[int, typer.Option(min=1, help="Decoder layers.")] = 4,
    ffn: Annotated[int, typer.Option(min=32, help="FFN size.")] = 768,
    vocab: Annotated[int, typer.Option(min=512, help="Vocabulary of the byte-level BPE.")] = 4096,
    tied: Annotated[bool, typer.Option("--tied/--untied", help="Tie the head to the embedding.")] = False,
    minutes: Annotated[float, typer.Option(min=0.01, help="Stop after this many minutes.")] = 60.0,
    steps: Annotated[int, typer.Option(min=1, help="Stop after this many steps.")] = 100_000,
    batch: Annotated[int, typer.Option(min=1, help="Windows of 256 tokens per step.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of weights and batches.")] = 0,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Use torch.compile.")] = True,
) -> None:
    """Train a tiny real model on the Python standard library's sources."""
    from bitsmith.lab.train import TrainSpec, train

    spec = TrainSpec(
        arch=arch,
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=ffn,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        minutes=minutes,
        steps=steps,
        batch_size=batch,
        seed=seed,
        compile=compiled,
    )
    with _progress() as progress:
        train(out, spec, progress=progress)
    typer.echo(f"wrote {out}; losses in {out / 'training_log.jsonl'}")


@lab.command("synth")
def lab_synth(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write, Hugging Face layout.")],
    size: Annotated[
        str,
        typer.Option(
            help="Published shapes: 0.8B 2B 4B 9B 27B tiny, or dense qwen3-0.6B qwen3-1.7B qwen3-4B."
        ),
    ] = "2B",
    mtp: Annotated[bool, typer.Option("--mtp/--no-mtp", help="With the MTP layer.")] = True,
    vision: Annotated[bool, typer.Option("--vision/--no-vision", help="With the vision tower.")] = True,
    tied: Annotated[bool | None, typer.Option("--tied/--untied", help="Default: as published.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Default: as published.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 0,
) -> None:
    """Write a checkpoint of a published model's exact shapes with seeded random weights."""
    from bitsmith.lab.synth import synth

    options: dict[str, Any] = {"mtp": mtp, "vision": vision, "tied": tied, "layers": layers}
    with _progress() as progress:
        synth(out, size, seed=seed, progress=progress, **options)
    typer.echo(f"wrote {out}")


@lab.command("text")
def lab_text(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="File to write.")],
    limit_bytes: Annotated[int, typer.Option(min=1, help="Size at most, in bytes.")] = 200_000,
    overwrite: Overwrite = False,
) -> None:
    """Write the held-out split of the lab's corpus: text the lab's models never saw in training."""
    from bitsmith.lab.corpus import write_held_out_text

    typer.echo(f"wrote {write_held_out_text(out, limit_bytes, overwrite=overwrite)}")


def _version(value: bool) -> None:
    if value:
        typer.echo(f"bitsmith {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; every foreseeable failure is one line on stderr and a non-zero exit."""
    try:
        app()
    except BitsmithError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    except MemoryError as error:
        sys.stderr.write(f"error: out of memory: {error}\n")
        sys.exit(1)
    except OSError as error:
        sys.stderr.write(f"error: {error.filename or 'input/output'}: {error.strerror or error}\n")
        sys.exit(1)
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:
            sys.stderr.write("error: interrupted; no unfinished output is left\n")
        raise


if __name__ == "__main__":
    main()
