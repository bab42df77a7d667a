"""Records of `compress` and evaluations as a study: a row per artifact with its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from bitsmith.archs.generic import role_of
from bitsmith.errors import BitsmithError, printable
from bitsmith.report.adapter_parts import (
    PROTOCOL,
    UNSAID,
    Json,
    command,
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

_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blk|blocks?)\.(\d+)\.")
_DELTA = {
    "in_proj_qkv": "delta.in_qkv", "in_proj_z": "delta.in_z", "in_proj_a": "delta.in_a",
    "in_proj_b": "delta.in_b", "conv1d": "delta.conv", "out_proj": "delta.out",
}  # fmt: skip


def from_record(record: Json, evaluation: Json | None = None, assay: Json | None = None) -> Study:
    """Return a study of one record of `compress`, its evaluation and an assay of the original.

    Without an evaluation the divergence is unmeasured.
    """
    return from_records([(record, evaluation)], assay)


def from_records(pairs: Sequence[tuple[Json, Json | None]], assay: Json | None = None) -> Study:
    """Return a study of several records of `compress`, each with its evaluation where it has one.

    Raises BitsmithError for evaluations against different originals or by different protocols: their figures
    are not of one study.
    """
    evaluations = [found for _, found in pairs if found is not None]
    _refuse_mixed(evaluations)
    rows = [_record_row(record, found) for record, found in pairs]
    if evaluations:
        found = evaluations[0]
        own = {"ppl_cand": found["measures"]["ppl_ref"]}
        rows.insert(0, original_row(found["reference"], own, str(found["reference"]["path"])))
    return study_of(
        next(iter([*evaluations, *(record for record, _ in pairs)]), {}),
        f"Compression of {name_of(rows[0]['path'])}" if rows else "Compression",
        artifacts=rows,
        protocols=[protocol_part(found["protocol"]) for found in evaluations[:1]],
        spectra=[] if assay is None else list(spectrum_lines(assay)),
        digests=list(_record_digests(pairs)),
        commands=[command for row in rows for command in row.get("commands", ())],
        notes=[warning for found in evaluations for warning in found.get("warnings", ())] + list(UNSAID),
    )


def paired(records: Sequence[Json], evaluations: Sequence[Json]) -> list[tuple[Json, Json | None]]:
    """Return each record with the evaluation of its output, by name, and behind them those left over."""
    left = list(evaluations)
    pairs: list[tuple[Json, Json | None]] = []
    for record in records:
        out = name_of(str((record.get("folder") or record).get("out")))
        match = next((one for one in left if name_of(str(one["candidate"]["path"])) == out), None)
        if match is not None:
            left.remove(match)
        pairs.append((record, match))
    return [*pairs, *(({}, one) for one in left)]


def _record_row(record: Json, evaluation: Json | None) -> dict[str, Any]:
    body = record["folder"] if record.get("kind") == "spi" else record
    plan = body.get("plan") or {}
    out = str(body.get("out") or (evaluation or {}).get("candidate", {}).get("path", "unnamed"))
    made = str(plan.get("type") or body.get("scheme") or body.get("kind") or "")
    rows = {row["hf_name"]: row for row in plan.get("rows", ())}
    found = {} if evaluation is None else evaluation["candidate"]
    weights = plan.get("parameters") or body.get("parameters") or found.get("weights")
    nbytes = body.get("file_bytes") or found.get("file_bytes")
    return {
        "name": name_of(out),
        "group": made or "evaluated",
        "recipe": made,
        "path": out,
        "model": "" if evaluation is None else str(evaluation["reference"]["path"]),
        **size(nbytes, weights, found.get("bpw") or plan.get("bpw")),
        "measures": {} if evaluation is None else evaluation["measures"],
        "protocol": "" if evaluation is None else PROTOCOL,
        "unmeasured": "divergence: no evaluation was given" if evaluation is None else "",
        "seconds": record.get("seconds"),
        "sha256": body.get("sha256") or "",
        "tensors": [_tensor(tensor, rows) for tensor in body.get("tensors", ())],
        "commands": list(_record_commands(body, out, evaluation)),
    }


def _record_commands(body: Json, out: str, evaluation: Json | None) -> Iterator[str]:
    """Yield what repeats a row; a record of a folder or a .cellm does not hold all options of `compress`."""
    if evaluation is None:
        return
    plan = body.get("plan") or {}
    if plan and not plan["transforms"] and not body.get("statistics_sha256"):
        rules = [word for rule in plan["tensor_types"] for word in ("--tensor-type", "=".join(rule))]
        pure = ["--pure"] if plan["pure"] else []
        model = evaluation["reference"]["path"]
        yield command("compress", model, "-o", out, "--type", plan["type"], *pure, *rules)
    paths = (evaluation[which]["path"] for which in ("reference", "candidate"))
    yield command("evaluate", *paths, *text_options(evaluation["protocol"]))


def _tensor(tensor: Json, rows: Mapping[str, Json]) -> dict[str, Any]:
    name = str(tensor.get("hf_name") or tensor["name"])
    row = rows.get(name, {})
    shape = tuple(tensor.get("shape") or row.get("shape") or ())
    rounding = tensor.get("rounding") or {}
    held = rounding.get("held_errors", {}).get(rounding.get("rounder"), tensor.get("held_error"))
    group = tensor.get("group")
    kind = tensor.get("type") or tensor.get("grid") or (tensor.get("scheme") if group is not None else None)
    return {
        "name": name,
        "role": tensor_role(name, len(shape)),
        "layer": tensor_layer(name),
        "shape": shape,
        "type": str(kind or tensor.get("dtype")),
        "nbytes": tensor["nbytes"],
        "squared_error": tensor.get("relative_error"),
        "held_squared_error": held,
        "rounder": rounding.get("rounder") or tensor.get("rounder") or "",
        "note": tensor.get("note") or row.get("note") or "",
    }


def tensor_role(name: str, dimensions: int) -> str:
    """Return the role that a tensor's name suggests, DeltaNet's included; MTP and vision say so first."""
    parts = name.split(".")
    prefix = "mtp." if parts[0] == "mtp" else "vision." if "visual" in parts else ""
    if "linear_attn" in parts and dimensions > 1:
        return prefix + _DELTA.get(parts[parts.index("linear_attn") + 1], "delta")
    return prefix + role_of(name, dimensions)


def tensor_layer(name: str) -> int | None:
    """Return the number of the layer that a tensor's name suggests; None for MTP's and vision's."""
    found = _LAYER.search(name)
    return int(found[1]) if found and not name.startswith("mtp.") and "visual" not in name else None


def _record_digests(pairs: Iterable[tuple[Json, Json | None]]) -> Iterator[dict[str, str]]:
    texts: set[str] = set()
    for record, evaluation in pairs:
        if record.get("statistics_sha256"):
            what = f"statistics of {name_of(str(record['out']))}"
            yield {"what": what, "sha256": record["statistics_sha256"]}
        if evaluation is not None and evaluation["protocol"]["text_sha256"] not in texts:
            texts.add(evaluation["protocol"]["text_sha256"])
            yield text_digest(evaluation["protocol"])


def _refuse_mixed(evaluations: Sequence[Json]) -> None:
    for found in evaluations[1:]:
        for part in ("reference", "protocol"):
            if found[part] != evaluations[0][part]:
                raise BitsmithError(
                    f"evaluations of one report share their {part}; that of "
                    f"{printable(str(found['candidate']['path']))} has another"
                )
