"""What goes with an output to a hub: its model card and report; and what was pushed, on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from bitsmith.errors import BitsmithError, printable
from bitsmith.report.adapter_parts import size, study_of
from bitsmith.report.model_card import write_report
from bitsmith.report.study_adapters import load_study
from bitsmith.report.study_json import Study
from bitsmith.report.terminal import table
from bitsmith.run.push import Push
from bitsmith.store.atomic import files_in
from bitsmith.store.manifest import listed_files, read_record, record_of


def card_files(out: Path, measured: Sequence[Path] = ()) -> dict[str, bytes]:
    """Return the model card, page and JSON of an output by their names.

    Figures are those that `measured` (JSON of `evaluate`, of studies, of merges) has of it; without, they are
    unmeasured. Raises BitsmithError as `load_study` does, and for sources that tell nothing of the output.
    """
    study = load_study(measured) if measured else _unmeasured(out)
    if not any(Path(row.path).name == out.name and not row.is_original for row in study.artifacts):
        raise BitsmithError(
            f"{', '.join(map(str, measured))} measured another output than {printable(out.name)}", path=out
        )
    study = _from_hub(out, study)
    with TemporaryDirectory() as folder:
        return {path.name: path.read_bytes() for path in write_report(Path(folder), study)}


def print_push(found: Push) -> None:
    """Print the files, what of them is new, and the commit."""
    console = Console()
    rows = [(printable(one.name), f"{one.size_bytes:,}", one.state) for one in found.files]
    console.print(table(("file", "bytes", "on the hub"), rows, right=("bytes",)))
    if found.commit is None:
        made = "the repository would be made; " if found.creates else ""
        said = f"{found.repo}, {found.revision}: {made}nothing pushed (dry run)"
    elif all(one.state == "same" for one in found.files):
        said = f"{found.repo}@{found.commit} holds all of it already"
    else:
        said = f"pushed {found.repo}@{found.commit}, {found.revision}; the hub's digests agree"
    console.print(said, markup=False, highlight=False, soft_wrap=True)


def _unmeasured(out: Path) -> Study:
    """Return an output as a study of one row, by its record."""
    record = read_record(out) if record_of(out).exists() else {}
    made = str(record.get("options", {}).get("type") or record.get("kind") or "")
    weights = sum(prod(one.get("shape", ())) for one in record.get("tensors", ()))
    nbytes = sum(path.stat().st_size for path in files_in(out).values())
    row = {
        "name": out.name,
        "group": made or "output",
        "recipe": made,
        "path": out.name,
        **size(nbytes, weights or None),
        "unmeasured": "divergence: unmeasured",
        "sha256": listed_files(out).get(out.name, ""),
    }
    return study_of(record, out.stem if out.is_file() else out.name, artifacts=[row])


def _from_hub(out: Path, study: Study) -> Study:
    """Return the study with the repository and commit of what each output was made of, as its record says."""
    if not record_of(out).exists():
        return study
    hubs = [source.get("hub") for source in read_record(out).get("sources", {}).values()]
    found = next((str(one) for one in hubs if one), None)
    if found is None:
        return study
    rows = tuple(
        row if row.is_original else row.model_copy(update={"model": found}) for row in study.artifacts
    )
    return study.model_copy(update={"artifacts": rows})
