"""The recipe `sahc` and an assay as studies in the report's schema."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bitsmith.report.adapter_parts import (
    PROTOCOL,
    UNSAID,
    Json,
    command,
    measured,
    name_of,
    original_row,
    protocol_part,
    size,
    study_of,
    text_digest,
    text_options,
)
from bitsmith.report.study_json import Study
from bitsmith.run.spectrum_lines import spectrum_lines
from bitsmith.run.study_lines import row_cosines

_SUFFIX = ".sahc"


def from_sahc(found: Json, path: Path | None = None) -> Study:
    """Return a study of what `SahcResult.to_json()` gave, or a record of it; `path` is where it lay.

    Rows are the recipe's artifact and int4 alone. The gates are those of the rows' attempts, without times;
    an audit log tells more.
    """
    original, sahc, int4 = found["original"], found["sahc"], found["int4"]
    reference = {"ppl_cand": sahc["measures"]["ppl_ref"]} if "ppl_ref" in sahc["measures"] else {}
    made = Path(found["out"]) if "out" in found else _made(path)
    rows = [
        original_row(original, reference, found["model"]),
        {
            **_written("sahc", sahc, found["model"], str(made)),
            "verdict": "PASS" if sahc["ratio"] is not None else "FAIL",
            "unmeasured": "" if sahc["ratio"] is not None else "ratio: a gate did not pass",
            "tensors": [_tensor(row) for row in found["rows"]],
            "layers": list(row_cosines(found["rows"])),
        },
        _written("int4", int4, found["model"], ""),
    ]
    return study_of(
        found,
        f"SAHC on {name_of(found['model'])}",
        summary=list(_summary(found)),
        artifacts=rows,
        protocols=[protocol_part(found["protocol"])],
        gates=list(_gates(found)),
        digests=[text_digest(found["protocol"])],
        commands=[_command(found, made)],
        notes=[
            f"layers' cosines measured on {found['probe']}",
            *map(_component, found["components"]),
            *UNSAID,
        ],
    )


def from_assay(assay: Json) -> Study:
    """Return a study of an assay alone: its verdict and the spectra."""
    name = name_of(assay["path"])
    version = str(assay["protocol"].get("version", "unknown"))
    match = assay["protocol"].get("match")
    return study_of(
        {"bitsmith": version, "seconds": assay["seconds"]},
        f"Assay of {name}",
        summary=[assay["verdict"]["text"]],
        spectra=list(spectrum_lines(assay)),
        commands=[
            command("assay", assay["path"], "-o", f"{name}-assay", *(["--match", match] if match else []))
        ],
        notes=[*assay["notes"], *UNSAID],
    )


def _made(path: Path | None) -> Path:
    """Return the model's folder: `OUT` of `OUT.sahc/sahc.json`, or `model` beside the JSON."""
    if path is None:
        return Path("sahc")
    folder = path.absolute().parent
    return folder.with_suffix("") if folder.suffix == _SUFFIX else folder / "model"


def _written(name: str, one: Json, model: str, path: str) -> dict[str, Any]:
    return {
        "name": name,
        "group": name,
        "what": "every linear in rows of int4" if name == "int4" else "the recipe, every row gated",
        "model": model,
        "recipe": name,
        "path": path,
        "measures": one["measures"],
        "protocol": PROTOCOL,
        "sha256": one["sha256"],
        **size(*(one["artifact"][name] for name in ("file_bytes", "weights", "bpw"))),
    }


def _tensor(row: Json) -> dict[str, Any]:
    error, replans = row["total_error"], max(0, len(row["attempts"]) - 1)
    return {
        **{name: row[name] for name in ("name", "role", "layer", "shape")},
        "type": row["scheme"],
        "nbytes": row["stored_bytes"],
        "squared_error": None if error is None else error**2,
        "note": f"{row['method']}, {replans} replans" if replans else row["method"],
    }


def _gates(found: Json) -> Iterator[dict[str, Any]]:
    for row in found["rows"]:
        for attempt in row["attempts"]:
            for gate in attempt["gates"]:
                yield _gate(
                    gate, f"{row['name']}: {attempt['method']}", "sahc", row["name"], attempt["decision"]
                )
    for name in ("sahc", "int4"):
        for gate in found[name]["gates"]:
            yield _gate(gate, "the artifact as read back", name, "", "")


def _gate(gate: Json, what: str, artifact: str, tensor: str, decision: str) -> dict[str, Any]:
    told = ("outcome", "value", "limit", "unit", "low", "high", "evidence", "direction")
    return {
        "when": "",
        "who": "sahc gate",
        "what": what,
        "artifact": artifact,
        "tensor": tensor,
        "gate": gate["name"],
        "decision": decision,
        **{name: gate[name] for name in told},
    }


def _summary(found: Json) -> Iterator[str]:
    ratio = found["sahc"]["ratio"]
    yield "no ratio: a gate did not pass" if ratio is None else f"{ratio:.3f} times smaller than the original"
    yield (
        f"beside int4 alone: perplexity {measured(found['ppl_over_int4'], '.6g')}, bytes "
        f"{found['bytes_over_int4']:.6g} times; {found['replans']} replans"
    )


def _component(one: Json) -> str:
    planned = "none" if one["theory_ratio"] is None else f"{one['theory_ratio']:.2f}"
    here = "none: a gate did not pass" if one["ratio"] is None else f"{one['ratio']:.2f}"
    methods = ", ".join(f"{count} {name}" for name, count in one["methods"].items())
    return (
        f"{one['name']} ({one['what']}): ratio claimed {one['claimed_ratio']:g}, by the plan at these shapes "
        f"{planned}, as stored {here}; {methods}"
    )


def _command(found: Json, made: Path) -> str:
    options = text_options(found["protocol"])
    return command("compress", found["model"], "--recipe", "sahc", *options, "-o", made.name)
