"""The command that merges a big teacher into a small student."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from bitsmith.cli.options import JsonOut, Overwrite, progress_bars, write_json
from bitsmith.errors import BitsmithError, printable

_TRIALS = 24
_NAMES = {
    "map": "tiered, joint, svd, cross, cca, ridge, random-fold or sparse-fold",
    "heads": "match, pair, prune, turn, frozen-kv or regress",
    "ffn": "match, strongest, solve, tie or regress",
}  # as in run.merge_recipe, which checks them


def merge(
    teacher: Annotated[
        Path,
        typer.Argument(
            metavar="TEACHER", help="The bigger model, path or org/name: weights are taken of it."
        ),
    ],
    student: Annotated[
        Path,
        typer.Argument(metavar="STUDENT", help="The smaller one, a folder or org/name: what is made."),
    ],
    text: Annotated[Path, typer.Option("--text", help="UTF-8 text that both are run on.")],
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Folder to write; OUT.merge beside it tells how it was made.")
    ],
    held: Annotated[
        Path | None,
        typer.Option("--held", help="Text of the task to judge on; default: the last part of --text."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=1, help="Tokens of --text to pair; default all.")
    ] = None,
    ctx: Annotated[int, typer.Option("--ctx", min=8, help="Tokens per chunk.")] = 512,
    chunks: Annotated[
        int | None, typer.Option("--chunks", min=4, help="Held-out chunks at most; default all.")
    ] = None,
    map_name: Annotated[
        str, typer.Option("--map", help=f"The residual stream's map: {_NAMES['map']}.")
    ] = "tiered",
    basis: Annotated[
        str, typer.Option("--basis", help="One map for all layers, or each its own: global|layer.")
    ] = "global",
    trunk: Annotated[
        int | None,
        typer.Option("--trunk", min=1, help="Dimensions of the trunk; default half the student's."),
    ] = None,
    layers: Annotated[
        str, typer.Option("--layers", help="Teacher's layers: cka, proportional, or a list as 0,2,5.")
    ] = "cka",
    heads: Annotated[
        str, typer.Option("--heads", help=f"How heads come together: {_NAMES['heads']}.")
    ] = "match",
    ffn: Annotated[str, typer.Option("--ffn", help=f"How neurons do: {_NAMES['ffn']}.")] = "match",
    alpha: Annotated[
        str, typer.Option("--alpha", help="The teacher's share: rule, sweep, or a number of 0 … 1 for all.")
    ] = "rule",
    alpha_max: Annotated[float, typer.Option("--alpha-max", help="The rule's largest share.")] = 0.5,
    budget: Annotated[
        int | None, typer.Option("--budget", min=1, help=f"Trials of --alpha sweep; default {_TRIALS}.")
    ] = None,
    blend: Annotated[
        list[str] | None,
        typer.Option(
            "--blend", metavar="PAIRED=WEIGHT", help="Another text's paired activations, its share."
        ),
    ] = None,
    ends: Annotated[bool, typer.Option("--ends/--no-ends", help="Merge embedding and head too.")] = True,
    head: Annotated[
        str,
        typer.Option(
            "--head",
            help="map it, solve it from the teacher's logits (unties a tied student), or auto: "
            "solve where the student has a head of its own.",
        ),
    ] = "auto",
    activations: Annotated[
        bool, typer.Option("--activations/--no-activations", help="Find maps by activations, or by weights.")
    ] = True,
    fallback: Annotated[
        bool,
        typer.Option("--fallback/--no-fallback", help="Keep the student where the merge is no better."),
    ] = True,
    paired: Annotated[
        Path | None,
        typer.Option("--paired", help="Paired activations of an earlier merge: OUT.merge/paired."),
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", min=1, help="Tokens that stay out of the moments, to compare by.")
    ] = 2048,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of intervals and of random-fold.")] = 0,
    type_name: Annotated[
        str | None, typer.Option("--type", help="Compress the merge to OUT as compress --type does.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the cost; write nothing.")] = False,
    overwrite: Overwrite = False,
    json_out: JsonOut = None,
) -> None:
    """Merge TEACHER into STUDENT without gradients; the student stays as it is where that does not help.

    Both are run on --text, layer beside layer. A killed run goes on where it was.
    """
    from bitsmith.report.merge_terminal import cost_lines, print_merge
    from bitsmith.report.model_card import PAGE_NAME
    from bitsmith.report.study_adapters import load_study
    from bitsmith.report.study_page import write_study_page
    from bitsmith.run.merge import RESULT_NAME, merge_cost
    from bitsmith.run.merge import merge as run
    from bitsmith.run.merge_inputs import MergeAsk
    from bitsmith.run.merge_recipe import MergeRecipe

    sweeps = alpha == "sweep"
    if budget is not None and not sweeps:
        raise BitsmithError("--budget is for --alpha sweep")
    named: dict[str, Any] = {"map": map_name, "basis": basis, "heads": heads, "ffn": ffn, "head": head}
    recipe = MergeRecipe(
        **named,
        trunk=trunk,
        alpha="rule" if sweeps else _share(alpha),
        alpha_max=alpha_max,
        ends=ends,
        activations=activations,
        seed=seed,
    )
    options: dict[str, Any] = {
        "recipe": recipe,
        "held": held,
        "tokens": tokens,
        "ctx_tokens": ctx,
        "chunks": chunks,
        "samples": samples,
        "layer_map": _layers(layers),
        "paired": paired,
        "blend": tuple(map(_blended, blend or [])),
        "sweep_budget": (budget or _TRIALS) if sweeps else None,
        "fallback": fallback,
        "seed": seed,
    }
    if dry_run:
        cost = merge_cost(MergeAsk(teacher, student, text, **options))
        typer.echo("\n".join([*cost_lines(cost), "nothing written (dry run)"]))
        write_json(json_out, cost.to_json())
        return
    with progress_bars() as progress:
        result = run(
            teacher,
            student,
            text,
            out,
            **options,
            type_name=type_name,
            command=shlex.join(["bitsmith", *sys.argv[1:]]),
            overwrite=overwrite,
            progress=progress,
            say_cost=lambda cost: typer.echo("\n".join(cost_lines(cost))),
        )
    page = write_study_page(result.folder / PAGE_NAME, load_study([result.folder / RESULT_NAME]))
    print_merge(result, page)
    write_json(json_out, result.to_json())


def _share(alpha: str) -> Any:
    if alpha == "rule":
        return alpha
    try:
        return float(alpha)
    except ValueError:
        raise BitsmithError(
            f"--alpha is {printable(alpha)!r}, expected rule, sweep, or a number of 0 … 1"
        ) from None


def _layers(given: str) -> str | tuple[int, ...]:
    if given in ("cka", "proportional"):
        return given
    try:
        return tuple(int(part) for part in given.split(","))
    except ValueError:
        raise BitsmithError(
            f"--layers is {printable(given)!r}, expected cka, proportional, or a list as 0,2,5"
        ) from None


def _blended(given: str) -> tuple[Path, float]:
    path, _, share = given.rpartition("=")
    try:
        return Path(path), float(share)
    except ValueError:
        raise BitsmithError(f"--blend {printable(given)!r} is not of the form PAIRED=WEIGHT") from None
