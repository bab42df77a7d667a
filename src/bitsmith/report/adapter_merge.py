"""A merge and the experiments on merging as studies in the report's schema."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bitsmith.report.adapter_parts import ORIGINAL, PROTOCOL, UNSAID, Json, command, name_of, study_of
from bitsmith.report.study_json import Study
from bitsmith.run.merge_lines import experiment_lines, merge_line
from bitsmith.run.study_result import MERGED

_SUFFIX, _MODEL = ".merge", "model"
_TEACHER = "teacher"


def from_merge(record: Json, path: Path | None = None) -> Study:
    """Return a study of a `merge.json`: the student, its teacher, and what was made of them.

    `path` is where the record lay.
    """
    out = _made(record, path)
    line = merge_line(record, out.name)
    return study_of(
        record,
        f"{out.name}: {line['teacher']} merged into {line['student']}",
        artifacts=list(_rows(record, out)),
        merges=[line],
        protocols=[{"name": PROTOCOL, "settings": dict(record["protocol"])}],
        commands=[record["command"]] if record.get("command") else [],
        notes=[*_packed(record), *UNSAID],
    )


def from_merge_experiments(record: Json) -> Study:
    """Return a study of a `merge-experiments.json`: a table and a figure for each experiment."""
    names = name_of(record["teacher"]), name_of(record["student"])
    given = [word for task in ("text", "held") for word in _given(record, task)]
    return study_of(
        record,
        f"Merge experiments: {names[0]} into {names[1]}",
        experiments=list(experiment_lines(record)),
        protocols=[{"name": PROTOCOL, "settings": dict(record["protocol"])}],
        digests=[
            {"what": f"text {one['name']}", "sha256": one["sha256"]} for one in record["texts"].values()
        ],
        commands=[command("study", "merge", record["teacher"], record["student"], *given)],
        notes=[
            "One pair says nothing of others: what is worse than the student here is worse here.",
            *UNSAID,
        ],
    )


def _packed(record: Json) -> list[str]:
    if not record["type"]:
        return []
    return [f"Then compressed as {record['type']}: the figures are of what was compressed, before that."]


def _given(record: Json, task: str) -> list[str]:
    found = record["texts"].get(task)
    return [] if found is None else [f"--{task}", found["path"]]


def _made(record: Json, path: Path | None) -> Path:
    """Return the model's folder beside the record: `OUT` of `OUT.merge`, or in it where it was packed."""
    if path is None or path.absolute().parent.suffix != _SUFFIX:
        return Path(MERGED)
    folder = path.absolute().parent
    return folder / _MODEL if record["type"] else folder.with_suffix("")


def _rows(record: Json, out: Path) -> Iterator[dict[str, Any]]:
    measures = record["measures"]

    def of(**names: str) -> dict[str, Any]:
        return {name: measures[key] for name, key in names.items() if measures.get(key)}

    yield {
        "name": ORIGINAL,
        "group": ORIGINAL,
        "what": f"the student {name_of(record['student'])}",
        "model": str(record["student"]),
        "path": str(record["student"]),
        "is_original": True,
        "measures": of(ppl_cand="ppl_student", kld_to_teacher="kld_student"),
        "protocol": PROTOCOL,
    }
    yield {
        "name": _TEACHER,
        "group": _TEACHER,
        "what": f"the teacher {name_of(record['teacher'])}",
        "measures": of(ppl_cand="ppl_teacher"),
        "protocol": PROTOCOL,
    }
    yield {
        "name": out.name,
        "group": MERGED,
        "what": f"{name_of(record['teacher'])} merged into {name_of(record['student'])}",
        "model": str(record["student"]),
        "recipe": "merge",
        "path": str(out),
        "measures": of(
            ppl_cand="ppl_merged", ppl_ratio="ppl_merged_over_student", kld_to_teacher="kld_merged"
        ),
        "protocol": PROTOCOL,
        "verdict": "adopted" if record["decision"]["adopted"] else "the student",
        "seconds": record.get("seconds"),
    }
