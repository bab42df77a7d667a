"""The command that holds an output against its manifest and what it was made of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitsmith.cli.options import JsonOut, fetched, progress_bars, write_json


def verify(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="What a command of bitsmith wrote.")],
    source: Annotated[
        Path | None,
        typer.Option("--source", help="The model it was made of; default where the record says it lies."),
    ] = None,
    digests_only: Annotated[
        bool, typer.Option("--digests-only", help="Check files against OUT.sha256 alone.")
    ] = False,
    json_out: JsonOut = None,
) -> None:
    """Check OUT's files against OUT.sha256, and decode every tensor against its error in OUT.record.json."""
    from bitsmith.report.verification import print_verification
    from bitsmith.run.verify import verify as run
    from bitsmith.store.hub import parse_hub_id
    from bitsmith.store.manifest import manifest_of

    if not out.exists() and not manifest_of(out).exists() and parse_hub_id(out.as_posix()) is not None:
        out = fetched(out)
    with progress_bars() as progress:
        found = run(out, source, digests_only=digests_only, progress=progress)
    print_verification(found)
    write_json(json_out, found.to_json())
    found.refuse()
