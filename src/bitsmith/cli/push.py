"""The command that publishes an output on a hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitsmith.cli.options import JsonOut, write_json


def push(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="What bitsmith wrote, OUT.sha256 beside it.")],
    repo: Annotated[str, typer.Argument(metavar="ORG/NAME", help="The repository; made if it is not there.")],
    revision: Annotated[
        str, typer.Option("--revision", help="The branch; made of main's state if it is not there.")
    ] = "main",
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    message: Annotated[str, typer.Option("--message", "-m", help="Of the commit.")] = "",
    measured: Annotated[
        list[Path] | None,
        typer.Option(
            "--measured",
            metavar="PATH",
            help="What `evaluate --json`, a study or a merge wrote of OUT: its figures come into the card, "
            "which says `unmeasured` without. May be repeated.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files of the repository that are other ones.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be pushed.")] = False,
    json_out: JsonOut = None,
) -> None:
    """Verify OUT by its digests and push it to the hub as one commit, with a model card.

    The token is HF_TOKEN's, or that of `hf auth login`. Files that are there with other bytes are not
    replaced without --overwrite.
    """
    from bitsmith.report.pushed import card_files, print_push
    from bitsmith.run.push import push as run

    card = card_files(out, measured or [])
    found = run(
        out,
        repo,
        card,
        revision=revision,
        private=private,
        message=message,
        overwrite=overwrite,
        dry_run=dry_run,
    )
    print_push(found)
    write_json(json_out, found.to_json())
