"""The command line: each command reads its options, calls one public function and prints what it returns."""

from __future__ import annotations

import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from bitsmith import __version__
from bitsmith.cli import invocation
from bitsmith.cli.compress import compress
from bitsmith.cli.generate import chat, generate
from bitsmith.cli.merge import merge
from bitsmith.cli.options import (
    Device,
    DryRun,
    JsonOut,
    Model,
    Overwrite,
    Workers,
    fetched,
    progress_bars,
    show_forecast,
    write_json,
)
from bitsmith.cli.push import push
from bitsmith.cli.study import study
from bitsmith.cli.verify import verify
from bitsmith.errors import BitsmithError

app = typer.Typer(
    help="Measure, compress and verify LLM checkpoints.",
    epilog=f"The global flags are understood behind the command's name too. {invocation.EXIT_CODES}",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
lab = typer.Typer(
    help="Make tiny real models and synthetic checkpoints of real shapes.", no_args_is_help=True
)
app.add_typer(study, name="study")
app.add_typer(lab, name="lab")


@app.command()
def inspect(model: Model, json_out: JsonOut = None) -> None:
    """Show what is in MODEL: components, shares, roles, and its size in every stock mix."""
    from bitsmith.report.terminal import print_inspection
    from bitsmith.run.inspect import inspect as run

    inspection = run(fetched(model))
    print_inspection(inspection)
    write_json(json_out, inspection.to_json())


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
    sample: Annotated[
        int | None,
        typer.Option(
            "--sample",
            min=1,
            metavar="N",
            help="Only N matrices of each role, spread over the layers, in float32 and on fewer rows.",
        ),
    ] = None,
    workers: Workers = None,
    dry_run: DryRun = False,
    json_out: JsonOut = None,
    seed_table: Annotated[
        bool, typer.Option("--seed-table", help="Hold the published SVD plan against its own numbers.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Tell whether low rank can beat int4 here: spectra, ranks, bounds and α of MODEL's matrices.

    With -o every finished matrix is kept, so that a killed run goes on where it was.
    """
    from bitsmith.report.assay_page import write_assay_page
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
    if dry_run:
        from bitsmith.run.forecast_assay import forecast_assay

        asked: dict[str, Any] = {"match": match, "statistics": stats, "text": text, "sample": sample}
        show_forecast(forecast_assay(fetched(model), out, workers=workers, **asked), json_out)
        return
    page = None if out is None else partial(write_assay_page, out / PAGE_NAME)
    with progress_bars() as progress:
        result = run(
            model,
            out,
            match=match,
            statistics=stats,
            text=text,
            sample=sample,
            workers=workers,
            page=page,
            overwrite=overwrite,
            progress=progress,
        )
    print_assay(result)
    if out is not None:
        typer.echo(f"wrote {out / RESULT_NAME} and {out / PAGE_NAME}")
    write_json(json_out, result.to_json())


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
    device: Device = "cpu",
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    json_out: JsonOut = None,
) -> None:
    """Run a text through MODEL and keep what its matrices see; reads and writes llama.cpp's imatrix too."""
    from bitsmith.report.terminal import print_calibration
    from bitsmith.run.calibrate import calibrate_or_convert as run

    if dry_run:
        from bitsmith.run.forecast_forward import forecast_calibrate

        if text is None:
            raise BitsmithError("--dry-run tells what a forward takes: pass a --text")
        sizes: dict[str, Any] = {"ctx_tokens": ctx, "chunks": chunks, "block": block, "saliency": saliency}
        show_forecast(forecast_calibrate(fetched(model), text, out, **sizes), json_out)
        return
    with progress_bars() as progress:
        found = run(
            model,
            out,
            text=text,
            statistics=stats,
            ctx_tokens=ctx,
            chunks=chunks,
            block=block,
            saliency=saliency,
            device=device,
            overwrite=overwrite,
            progress=progress,
        )
    print_calibration(found)
    write_json(json_out, found.to_json())


app.command()(compress)


@app.command()
def evaluate(
    ref: Annotated[Path, typer.Argument(metavar="REF", help="The reference: HF folder, GGUF, org/name.")],
    candidate: Annotated[
        Path, typer.Argument(metavar="CANDIDATE", help="What is compared with it: HF folder, GGUF, org/name.")
    ],
    text: Annotated[Path, typer.Option("--text", help="UTF-8 text to measure on.")],
    ctx: Annotated[int, typer.Option("--ctx", min=8, help="Tokens per chunk.")] = 512,
    chunks: Annotated[
        int | None, typer.Option("--chunks", min=1, help="Chunks at most; default all.")
    ] = None,
    device: Device = "cpu",
    products: Annotated[
        Literal["float32", "bfloat16"],
        typer.Option("--products", help="Matrix products: bfloat16 on CPUs that have AVX-512 BF16 or AMX."),
    ] = "float32",
    dry_run: DryRun = False,
    json_out: JsonOut = None,
) -> None:
    """Measure perplexity, KL divergence and top-1 agreement of CANDIDATE against REF, with intervals."""
    from bitsmith.report.terminal import print_evaluation
    from bitsmith.run.evaluate import evaluate as run

    if dry_run:
        from bitsmith.run.forecast_forward import forecast_evaluate

        show_forecast(forecast_evaluate(fetched(ref), fetched(candidate), text, ctx, chunks), json_out)
        return
    with progress_bars() as progress:
        evaluation = run(
            ref,
            candidate,
            text,
            ctx_tokens=ctx,
            chunks=chunks,
            progress=progress,
            device=device,
            products=products,
        )
    print_evaluation(evaluation)
    write_json(json_out, evaluation.to_json())


@app.command()
def compare(
    ref: Annotated[Path, typer.Argument(metavar="REF", help="The original: a path or org/name.")],
    candidate: Annotated[Path, typer.Argument(metavar="CANDIDATE", help="A .gguf that compress wrote.")],
    json_out: JsonOut = None,
) -> None:
    """Compare every tensor of CANDIDATE with REF's, its transforms undone."""
    from bitsmith.report.terminal import print_weight_errors
    from bitsmith.run.transforms import compare_weights as run

    with progress_bars() as progress:
        errors = run(ref, candidate, progress)
    print_weight_errors(errors)
    write_json(json_out, {"tensors": [asdict(error) for error in errors]})


app.command()(verify)
app.command()(push)
app.command()(merge)
app.command()(generate)
app.command()(chat)


@app.command()
def report(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH…", help="JSON files or folders that studies, runs and --json wrote."),
    ],
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Folder for report.html, report.json and README.md.")
    ] = Path("report"),
    audit: Annotated[Path | None, typer.Option("--audit", help="An audit log, audit.jsonl.")] = None,
    peers: Annotated[
        Path | None, typer.Option("--peers", help="Points of others to plot: a JSON list.")
    ] = None,
) -> None:
    """Make one page, a model card and report.json of what any study or run wrote."""
    from bitsmith.report.model_card import write_report
    from bitsmith.report.study_adapters import load_study
    from bitsmith.report.study_terminal import print_study
    from bitsmith.run.record import seal

    shown = load_study(paths, audit, peers)
    print_study(shown, write_report(out, shown))
    seal(out, "report")


@app.command()
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the demo's files.")] = Path("demo-out"),
    type_name: Annotated[str, typer.Option("--type", help="Stock mix.")] = "Q4_K_M",
) -> None:
    """Compress the bundled tiny Qwen3.5, evaluate it against the original, generate a few tokens, report."""
    from bitsmith.lab.demo import demo as run
    from bitsmith.report.demo_report import write_demo_report
    from bitsmith.report.terminal import print_demo

    with progress_bars() as progress:
        result = run(out, type_name, progress=progress)
    print_demo(result, write_demo_report(result)[0])


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
    with progress_bars() as progress:
        train(out, spec, progress=progress)
    typer.echo(f"wrote {out}; losses in {out / 'training_log.jsonl'}")


@lab.command("pair")
def lab_pair(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write: OUT/teacher, OUT/student.")],
    teacher_minutes: Annotated[
        float | None, typer.Option(min=0.01, help="Training of the teacher; default as for the bundled one.")
    ] = None,
    student_minutes: Annotated[
        float | None, typer.Option(min=0.01, help="Distillation of the student; default alike.")
    ] = None,
) -> None:
    """Train a tiny dense Qwen3 teacher and distil a student of half its width and depth from it."""
    from bitsmith.lab.pair import train_pair

    given: dict[str, Any] = {"teacher_minutes": teacher_minutes, "student_minutes": student_minutes}
    with progress_bars() as progress:
        train_pair(out, progress=progress, **{k: v for k, v in given.items() if v is not None})
    typer.echo(f"wrote {out / 'teacher'} and {out / 'student'}")


@lab.command("embed")
def lab_embed(
    student: Annotated[
        Path, typer.Argument(metavar="STUDENT", help="A Qwen3 or Qwen3.5: folder or org/name.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write: the bigger teacher.")],
    hidden: Annotated[int, typer.Option(min=1, help="Hidden size of the teacher.")],
    layers: Annotated[int | None, typer.Option(min=1, help="Its layers; default the student's.")] = None,
    ffn: Annotated[int | None, typer.Option(min=1, help="Its FFN size; default the student's.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the embedding.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Write a wider, deeper teacher that is STUDENT turned by a rotation: what a merge has to find again."""
    from bitsmith.lab.embedded import Sizes, embed_student

    embed_student(fetched(student), out, Sizes(hidden, layers, ffn), seed=seed, overwrite=overwrite)
    typer.echo(f"wrote {out}")


@lab.command("synth")
def lab_synth(
    model: Annotated[
        str,
        typer.Argument(
            metavar="NAME|OUT",
            help="Published shapes: qwen3.5-0.8b -2b -4b -9b -27b -tiny, or dense qwen3-0.6b -1.7b -4b -32b "
            "-tiny; the folder to write where --size says them.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="Folder to write, Hugging Face layout; default NAME."),
    ] = None,
    size: Annotated[str | None, typer.Option(help="The shapes, if the argument is the folder.")] = None,
    mtp: Annotated[bool, typer.Option("--mtp/--no-mtp", help="With the MTP layer.")] = True,
    vision: Annotated[bool, typer.Option("--vision/--no-vision", help="With the vision tower.")] = True,
    tied: Annotated[bool | None, typer.Option("--tied/--untied", help="Default: as published.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Default: as published.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the weights.")] = 0,
    planted: Annotated[
        bool,
        typer.Option(
            "--planted/--random", help="Plant spectra with power laws, or plain independent values."
        ),
    ] = True,
    virtual: Annotated[
        bool, typer.Option("--virtual", help="Write no weights: every command computes them as it reads.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Write a checkpoint of a published model's exact shapes with seeded weights."""
    from bitsmith.archs.published import SIZES, size_named
    from bitsmith.lab.synth import synth

    named = size_named(model) if size is None else None
    if size is None and named is None and out is not None:
        raise BitsmithError(
            f"unknown model {model!r}; known: {', '.join(SIZES)}, Qwen3.5's as qwen3.5-9b too"
        )
    folder = out or Path(model)
    with progress_bars() as progress:
        synth(
            folder,
            size or named or "2B",
            seed=seed,
            mtp=mtp,
            vision=vision,
            tied=tied,
            layers=layers,
            planted=planted,
            virtual=virtual,
            overwrite=overwrite,
            progress=progress,
        )
    typer.echo(f"wrote {folder}")


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
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Show nothing on stderr but errors; results stay on stdout.")
    ] = False,
    log_json: Annotated[
        str | None,
        typer.Option(
            "--log-json",
            metavar="[FILE]",
            help="Tell of each step before it is done, a line of JSON each, at FILE's end or on stderr.",
        ),
    ] = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Use only what is on this machine; ask no hub.")
    ] = False,
) -> None:
    invocation.begin(quiet=quiet, log_json=log_json, offline=offline)


def main() -> None:
    """Run the command line; every foreseeable failure is one line on stderr and a non-zero exit."""
    try:
        invocation.run(app)
    except KeyboardInterrupt:  # between two of the places that answer one
        sys.stderr.write("error: interrupted; no unfinished output is left; the same command goes on\n")
        sys.exit(invocation.INTERRUPTED)


if __name__ == "__main__":
    main()
