"""Any run as a study: files and folders of studies, `compress`, `evaluate`, assays, claims and audit logs.

What a source does not say stays empty; nothing is made up, no machine's environment is put in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bitsmith.errors import BitsmithError, printable
from bitsmith.report.adapter_merge import from_merge, from_merge_experiments
from bitsmith.report.adapter_parts import Json, dicts
from bitsmith.report.adapter_records import from_record, from_records, paired
from bitsmith.report.adapter_sahc import from_assay, from_sahc
from bitsmith.report.adapter_studies import from_claims, from_formats, from_spi
from bitsmith.report.study_json import Artifact, Spectrum, Study, read_study
from bitsmith.run.audit import read_audit
from bitsmith.run.study_lines import gate_line
from bitsmith.run.study_peers import read_peers

__all__ = [
    "from_audit", "from_claims", "from_formats", "from_merge", "from_merge_experiments", "from_record",
    "from_sahc", "from_spi", "load_study",
]  # fmt: skip

_NAMES = (
    "report.json", "formats.json", "spi.json", "claims.json", "merge-experiments.json", "sahc.json",
    "merge.json", "assay.json", "record.json", "evaluation.json",
)  # fmt: skip
_STATE, _AUDIT, _BESIDE, _EVIDENCE = "state.json", "audit.jsonl", (".sahc", ".merge"), "evidence"
_KINDS: dict[str, Callable[[Json, Path], Study]] = {
    "study": lambda value, path: _found_again(read_study(value, path), path.parent),
    "formats study": lambda value, _: from_formats(value),
    "spi study": lambda value, _: from_spi(value),
    "claims study": lambda value, _: from_claims(value),
    "sahc": from_sahc,
    "merge": from_merge,
    "merge-experiments": lambda value, _: from_merge_experiments(value),
    "assay": lambda value, _: from_assay(value),
}
_EXPECTED = (
    "expected what study, study formats, study spi, study claims, study merge, merge, compress --json, "
    "compress --recipe sahc, evaluate --json or assay writes"
)


class _Source(NamedTuple):
    path: Path
    kind: str
    value: Json


def load_study(paths: Sequence[Path], audit: Path | None = None, peers: Path | None = None) -> Study:
    """Return the study in JSON files or folders of any run; several sources make one.

    A file is the JSON of a study (`report.json`), of `study formats`, `study spi`, `study claims`, `study
    merge`, an assay, a merge, recipe `sahc`, a record of `compress` or an evaluation; a folder holds such
    files by their usual names, or has them beside it (`OUT.sahc`, `OUT.merge` of `OUT`). An evaluation
    belongs to the record whose output it measured, by name. An assay gives spectra to the others. `audit` is
    an audit log (default: those beside `sahc.json`), `peers` a JSON list of `Peer`s.

    Raises BitsmithError naming a path that is none of these, and for sources that were measured by different
    protocols: their figures are not of one study.
    """
    if not paths:
        raise BitsmithError(f"nothing to report: {_EXPECTED}")
    sources = [_source(path) for given in paths for path in _files(given)]
    study = _joined(list(_studies(sources)), paths[0])
    logs = [audit] if audit is not None else _audits_beside(sources)
    more: dict[str, Any] = {}
    if logs:
        kept = [] if audit is not None else [line for line in dicts(study.gates) if line["when"]]
        more["gates"] = [*kept, *_placed([line for log in logs for line in from_audit(log)], study)]
    if peers is not None:
        more["peers"] = read_peers(peers)
    return read_study(study.to_json() | more, peers or audit or paths[0]) if more else study


def from_audit(path: Path) -> list[dict[str, Any]]:
    """Return the gate lines of an audit log, as a study holds them. Raises as `read_audit` does."""
    return [gate_line(asdict(line)) for line in read_audit(path)]


def _files(given: Path) -> list[Path]:
    """Return the files that a path stands for: itself, or what a folder holds by its usual names."""
    if not given.is_dir():
        return [given]
    for folder in (given, *(given.with_name(given.name + suffix) for suffix in _BESIDE)):
        found = [folder / name for name in _NAMES if (folder / name).is_file()]
        if (folder / _NAMES[0]) in found:
            return found[:1]
        if (folder / _STATE).is_file():
            raise BitsmithError("holds a study that has not come to its end; go on with --resume", path=given)
        if found:
            inside = sorted(path for name in _NAMES for path in (folder / _EVIDENCE).glob(f"*/{name}"))
            return [*found, *inside]
    raise BitsmithError(f"holds nothing to report: none of {', '.join(_NAMES)}", path=given)


def _source(path: Path) -> _Source:
    value = _json(path)
    kind = value.get("kind")
    if not isinstance(kind, str) or kind not in (*_KINDS, "evaluation"):
        if "matrices" in value and "verdict" in value:
            kind = "assay"
        elif "tensors" in value or "folder" in value:
            kind = "record"
        else:
            raise BitsmithError(f"is nothing to report; {_EXPECTED}", path=path)
    return _Source(path, kind, value)


def _studies(sources: Sequence[_Source]) -> Iterator[Study]:
    """Yield the study of each source; records and evaluations are of one, an assay comes last."""
    single = {kind: [one.value for one in sources if one.kind == kind] for kind in ("record", "evaluation")}
    own = [one for one in sources if one.kind not in single]
    tested = {one.path.parent / _EVIDENCE for one in own if one.kind == "claims study"}
    for one in sorted(own, key=lambda one: one.kind == "assay"):
        found = _read(one.path, partial(_KINDS[one.kind], one.value, one.path))
        is_evidence = one.path.parent.parent in tested  # the claims are those of the study that rests on it
        yield found.model_copy(update={"claims": ()}) if is_evidence else found
    if any(single.values()):
        first = next(one.path for one in sources if one.kind in single)
        yield _read(first, lambda: from_records(paired(single["record"], single["evaluation"])))


def _read(path: Path, read: Callable[[], Study]) -> Study:
    try:
        return read()
    except BitsmithError as error:
        raise error if error.path is not None else BitsmithError(error.message, path=path) from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        what = printable(f"{type(error).__name__}: {error}")
        raise BitsmithError(f"is not what bitsmith writes: {what}", path=path) from error


def _joined(studies: Sequence[Study], path: Path) -> Study:
    """Return the sources' parts behind each other, under the title of the first."""
    _refuse_mixed(studies, path)
    first = studies[0]
    if len(studies) == 1:
        return first
    parts = (
        "summary",
        "gates",
        "tasks",
        "claims",
        "merges",
        "experiments",
        "samples",
        "digests",
        "commands",
        "notes",
    )
    joined: dict[str, Any] = {
        name: tuple(_distinct(one for study in studies for one in getattr(study, name))) for name in parts
    }
    seconds = [study.seconds for study in studies if study.seconds is not None]
    return first.model_copy(
        update={
            **joined,
            "artifacts": _artifacts(studies),
            "spectra": _spectra(studies),
            "protocols": next((study.protocols for study in studies if study.protocols), ()),
            "environment": {
                name: said for study in reversed(studies) for name, said in study.environment.items()
            },
            "seconds": sum(seconds) if seconds else None,
        }
    )


def _distinct(parts: Iterable[Any]) -> list[Any]:
    known = {part if isinstance(part, str) else part.model_dump_json(): part for part in parts}
    return list(known.values())


def _artifacts(studies: Sequence[Study]) -> tuple[Artifact, ...]:
    """Return all rows: an original once, and equal names told apart by a number."""
    rows: dict[str, Artifact] = {}
    for row in (row for study in studies for row in study.artifacts):
        known = rows.get(row.name)
        if known is not None and known.is_original and row.is_original and known.file_bytes == row.file_bytes:
            rows[row.name] = known.model_copy(update={"measures": {**row.measures, **known.measures}})
            continue
        name, number = row.name, 1
        while name in rows:
            number += 1
            name = f"{row.name} ({number})"
        rows[name] = row.model_copy(update={"name": name})
    return tuple(rows.values())


def _spectra(studies: Sequence[Study]) -> tuple[Spectrum, ...]:
    """Return every matrix once, the one with singular values where there are two."""
    found: dict[tuple[str, str], Spectrum] = {}
    for one in (one for study in studies for one in study.spectra):
        known = found.get((one.model, one.name))
        if known is None or (one.sigma and not known.sigma):
            found[one.model, one.name] = one
    return tuple(found.values())


def _refuse_mixed(studies: Sequence[Study], path: Path) -> None:
    settings = [
        [one.settings for one in study.protocols]
        for study in studies
        if any(row.measures for row in study.artifacts)
    ]
    if any(one != settings[0] for one in settings[1:]):
        raise BitsmithError(
            "the sources were measured by different protocols, they make two reports", path=path
        )


def _audits_beside(sources: Sequence[_Source]) -> list[Path]:
    """Return the audit logs beside sources that keep one."""
    sahc = [one for one in sources if one.kind == "sahc"]
    logs = [Path(str(one.value.get("audit", one.path.with_name(_AUDIT)))) for one in sahc]
    return [log for log in logs if log.is_file()]


def _placed(lines: Sequence[dict[str, Any]], study: Study) -> Iterator[dict[str, Any]]:
    """Yield gate lines with the artifact that a line of a tensor is of, where only one has tensors."""
    listed = [row.name for row in study.artifacts if row.tensors]
    for line in lines:
        yield {"artifact": listed[0], **line} if line.get("tensor") and len(listed) == 1 else line


def _found_again(study: Study, folder: Path) -> Study:
    """Return a study with the paths of artifacts that lie in its folder as they are from here."""
    rows = [row.model_copy(update={"path": _from_here(row.path, folder)}) for row in study.artifacts]
    return study.model_copy(update={"artifacts": tuple(rows)})


def _from_here(path: str, folder: Path) -> str:
    parts = Path(path).parts
    if not path or Path(path).is_absolute() or Path(path).exists():
        return path
    ends = (folder.joinpath(*parts[at:]) for at in range(len(parts)))
    return str(next((one for one in ends if one.exists()), path))


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes(), parse_constant=_no_number)
    except OSError as error:
        raise BitsmithError(f"cannot be read: {error.strerror or error}", path=path) from error
    except (ValueError, RecursionError) as error:
        raise BitsmithError(f"is not JSON: {printable(str(error))}", path=path) from error
    if not isinstance(value, dict):
        raise BitsmithError(f"is nothing to report; {_EXPECTED}", path=path)
    return value


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")
