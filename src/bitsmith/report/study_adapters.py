"""Any run as a study: `study formats`, `study spi`, records of `compress`, evaluations, assays, audit logs.

What a source does not say stays empty; nothing is made up, no machine's environment is put in.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bitsmith.archs.generic import role_of
from bitsmith.errors import BitsmithError, printable
from bitsmith.report.study_json import Study, read_study
from bitsmith.run.audit import read_audit

Json = Mapping[str, Any]

ORIGINAL = "original"
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blk|blocks?)\.(\d+)\.")
_DELTA = {
    "in_proj_qkv": "delta.in_qkv", "in_proj_z": "delta.in_z", "in_proj_a": "delta.in_a",
    "in_proj_b": "delta.in_b", "conv1d": "delta.conv", "out_proj": "delta.out",
}  # fmt: skip
_PROTOCOL = "evaluation"
_CURVE_POINTS = 60


def from_formats(study: Json) -> Study:
    """Return a study of what `FormatsStudy.to_json()` gave."""
    rows, protocol = study["rows"], study["protocol"]
    return _study(
        study,
        f"Formats of {_name(study['model'])}",
        artifacts=[_format_row(study, row) for row in rows],
        protocols=[_protocol(protocol)],
        claims=study.get("claims", ()),
        samples=list(_samples(study)),
        digests=[_text_digest(protocol)],
        commands=[_formats_command(study)],
        notes=[
            f"verdict: {study['coherence_rule']}",
            f"statistics: {study.get('statistics') or 'none'}",
            *_UNSAID,
        ],
    )


def from_spi(study: Json) -> Study:
    """Return a study of what `SpiStudy.to_json()` gave; rows are named by what their table holds equal."""
    protocol, original = study["protocol"], study["original"]
    rows = [_spi_row(study, table, row) for table in study["tables"] for row in table["rows"]]
    reference = {"ppl_cand": study["tables"][0]["rows"][0]["measures"]["ppl_ref"]}
    first = _original(original, reference, str(study["model"]))
    alone = [row for row in rows if row["name"].startswith("NF4,")]
    if alone:
        alone[0]["layers"] = list(_alone(study["linears"]))
    return _study(
        study,
        f"SPI on {_name(study['model'])}",
        artifacts=[first, *rows],
        protocols=[_protocol(protocol)],
        claims=study.get("claims", ()),
        spectra=[_spi_spectrum(linear) for linear in study["linears"]],
        digests=[_text_digest(protocol)],
        commands=[_spi_command(study)],
        notes=[
            f"calibration: {study['calibration'] or 'none'}",
            *map(_comparison, study["comparisons"]),
            *_UNSAID,
        ],
    )


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
        rows.insert(0, _original(found["reference"], own, str(found["reference"]["path"])))
    return _study(
        next(iter([*evaluations, *(record for record, _ in pairs)]), {}),
        f"Compression of {_name(rows[0]['path'])}" if rows else "Compression",
        artifacts=rows,
        protocols=[_protocol(found["protocol"]) for found in evaluations[:1]],
        spectra=[] if assay is None else list(_spectra(assay)),
        digests=list(_record_digests(pairs)),
        commands=[command for row in rows for command in row.get("commands", ())],
        notes=[warning for found in evaluations for warning in found.get("warnings", ())] + list(_UNSAID),
    )


def from_audit(path: Path) -> list[dict[str, Any]]:
    """Return the gate lines of an audit log, as a study holds them. Raises as `read_audit` does."""
    return [gate_line(asdict(line)) for line in read_audit(path)]


def gate_line(line: Json) -> dict[str, Any]:
    """Return one audit line (`run.audit`) as a `GateLine`: a gate's verdict is spread over its fields."""
    evidence = line["evidence"]
    if not isinstance(evidence, Mapping) or "outcome" not in evidence:
        return dict(line)
    more = {key: evidence.get(key) for key in ("outcome", "low", "high")}
    unit = str(evidence.get("unit") or "")
    found = evidence.get("found") or f"limit: {evidence.get('direction', '')}"
    return {**line, **more, "unit": unit, "evidence": found, "artifact": str(evidence.get("subject") or "")}


def load_study(paths: Sequence[Path], audit: Path | None = None, peers: Path | None = None) -> Study:
    """Return the study in JSON files of any run: one study, or records of `compress` with their evaluations.

    A study is a `report.json`, `formats.json` or `spi.json`. An evaluation belongs to the record whose output
    it measured, by name; an evaluation without a record is a row of its own. An
    `assay.json` gives spectra to either. `audit` is an audit log, `peers` a JSON list of `Peer`s. Raises
    BitsmithError naming a file that is none of these.
    """
    kinds: dict[str, list[Json]] = {"study": [], "record": [], "evaluation": [], "assay": []}
    for path in paths:
        value = _json(path)
        kinds[_kind(value, path)].append(value)
    if len(kinds["study"]) > 1 or (kinds["study"] and (kinds["record"] or kinds["evaluation"])):
        raise BitsmithError("a report is of one study, or of records and evaluations", path=paths[0])
    assay = kinds["assay"][0] if kinds["assay"] else None
    if kinds["study"]:
        study = _converted(kinds["study"][0], paths[0])
    else:
        study = from_records(_paired(kinds["record"], kinds["evaluation"]), assay)
    more: dict[str, Any] = {}
    if assay is not None:
        more["spectra"] = list(_spectra(assay))
    if audit is not None:
        more["gates"] = from_audit(audit)
    if peers is not None:
        more["peers"] = _json(peers, list)
    return read_study(study.to_json() | more, peers or paths[0]) if more else study


_UNSAID = ("The source of this report does not say on which machine it was made.",)


def _study(source: Json, title: str, **parts: Any) -> Study:
    version = str(source.get("bitsmith", "unknown"))
    return read_study(
        {
            "bitsmith": version,
            "title": title,
            "environment": {"bitsmith": version},
            "seconds": source.get("seconds"),
            **parts,
        }
    )


def _format_row(study: Json, row: Json) -> dict[str, Any]:
    coherence = row.get("coherence") or {}
    measures = dict(row["measures"])
    for way in ("greedy", "sampled"):
        for figure in ("repetition", "nll"):
            found = coherence.get(way, {}).get(figure)
            if found is not None:
                measures[f"{figure}_{way}"] = found
    return {
        "name": row["name"],
        "group": row["family"],
        "what": row["what"],
        "model": str(study["model"]),
        "recipe": row["rounding"],
        "is_original": row["name"] == ORIGINAL,
        "file_bytes": row["file_bytes"],
        "weights": row["weights"],
        "bpw": row["bpw"],
        "measures": measures,
        "protocol": _PROTOCOL,
        "verdict": coherence.get("verdict", ""),
        "unmeasured": row["unmeasured"] or "",
        "seconds": row["seconds"],
    }


def _samples(study: Json) -> Iterator[dict[str, Any]]:
    temperature = study["sampling"]["temperature"]
    ways = {"greedy": "greedy", "sampled": f"sampled at temperature {temperature:g}"}
    for at, prompt in enumerate(study["prompts"]):
        passages = []
        for way, how in ways.items():
            for row in study["rows"]:
                written = (row.get("coherence") or {}).get(way, {}).get("passages", ())
                if at < len(written):
                    passages.append(_passage(row["name"], how, written[at]))
        yield {"prompt": prompt, "passages": passages}


def _passage(artifact: str, how: str, written: Json) -> dict[str, Any]:
    tokens = len(written["tokens"])
    nll = f"{written['nll_nats'] / tokens:.2f} nats/token to the original" if tokens else "nothing written"
    share = f"{written['repeats']} of {written['grams']} 4-grams repeat"
    return {"artifact": artifact, "how": how, "text": written["text"], "note": f"{nll}; {share}"}


def _formats_command(study: Json) -> str:
    names = [row["name"] for row in study["rows"] if row["name"] != ORIGINAL]
    options = [] if study["statistics"] is None else ["--stats", study["statistics"]]
    return _command(
        "study", "formats", study["model"], *_text_options(study["protocol"]), *options,
        "--formats", ",".join(names),
    )  # fmt: skip


def _spi_command(study: Json) -> str:
    asked = next((table["asked"] for table in study["tables"] if table["equal"] == "count"), "")
    critical = ["--critical", asked.split()[0]] if asked.endswith(" linears") else []
    learned = re.match(r"text (.+) \(SHA-256 ", study["calibration"] or "")
    calibration = [] if learned is None else ["--calibration", learned[1]]
    return _command(
        "study", "spi", study["model"], *_text_options(study["protocol"]), *calibration, *critical
    )


def _text_options(protocol: Json) -> list[str]:
    options = ["--text", protocol["text"], "--ctx", str(protocol["ctx_tokens"])]
    options += ["--chunks", str(protocol["chunks"])]
    return options + (["--seed", str(protocol["seed"])] if protocol["seed"] else [])


def _command(*words: str) -> str:
    return printable(shlex.join(["bitsmith", *map(str, words)]), 4000)


def _spi_row(study: Json, table: Json, row: Json) -> dict[str, Any]:
    kept = len(row["names"])
    group = "random" if row["name"].startswith("random") else row["name"]
    return {
        "name": f"{row['name']}, equal {table['equal']}",
        "group": group,
        "what": f"{kept} of {len(study['linears'])} linears kept in 16 bits, {row['kept_bytes']:,} bytes",
        "model": str(study["model"]),
        "recipe": "spi",
        "file_bytes": row["file_bytes"],
        "weights": study["original"]["weights"],
        "bpw": _bpw(row["file_bytes"], study["original"]["weights"]),
        "measures": row["measures"],
        "protocol": _PROTOCOL,
    }


def _alone(linears: Sequence[Json]) -> Iterator[dict[str, Any]]:
    for linear in linears:
        if linear["kld_nats"] is not None:
            yield {
                "layer": linear["layer"],
                "role": linear["role"],
                "what": "mean KLD, this linear alone in NF4",
                "figure": {"value": linear["kld_nats"], "unit": "nats"},
            }


def _spi_spectrum(linear: Json) -> dict[str, Any]:
    short = min(linear["shape"])
    return {
        "name": linear["name"],
        "role": linear["role"],
        "layer": linear["layer"],
        "shape": linear["shape"],
        "alpha": linear["alpha"],
        "r90": None if linear["r90"] is None else round(linear["r90"] * short),
    }


def _comparison(found: Json) -> str:
    measure = found["measure"]
    said = {True: "better", False: "worse", None: "no telling: the interval is on both sides"}
    return (
        f"equal {found['equal']}: {found['rule']} against {found['control']}: {measure['value']:.4g} "
        f"{measure['unit']} ({measure['low']:.4g} … {measure['high']:.4g}): {said[found['better']]}"
    )


def _original(artifact: Json, measures: Json, model: str) -> dict[str, Any]:
    return {
        "name": ORIGINAL,
        "group": ORIGINAL,
        "what": "as stored",
        "model": model,
        "path": str(artifact["path"]),
        "is_original": True,
        "file_bytes": artifact["file_bytes"],
        "weights": artifact["weights"],
        "bpw": _bpw(artifact["file_bytes"], artifact["weights"]),
        "measures": measures,
        "protocol": _PROTOCOL,
    }


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
        "name": _name(out),
        "group": made or "evaluated",
        "recipe": made,
        "path": out,
        "model": "" if evaluation is None else str(evaluation["reference"]["path"]),
        "file_bytes": nbytes,
        "weights": weights,
        "bpw": _bpw(nbytes, weights),
        "measures": {} if evaluation is None else evaluation["measures"],
        "protocol": "" if evaluation is None else _PROTOCOL,
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
        yield _command("compress", model, "-o", out, "--type", plan["type"], *pure, *rules)
    paths = (evaluation[which]["path"] for which in ("reference", "candidate"))
    yield _command("evaluate", *paths, *_text_options(evaluation["protocol"]))


def _bpw(file_bytes: int | None, weights: int | None) -> float | None:
    return 8 * file_bytes / weights if file_bytes and weights else None


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


def _spectra(assay: Json) -> Iterator[dict[str, Any]]:
    for matrix in assay["matrices"]:
        found, law = matrix["spectrum"], matrix["power_law"]
        if found is None:
            continue
        kept = slice(None, None, max(1, -(-len(found["sigma"]["x"]) // _CURVE_POINTS)))
        yield {
            "name": matrix["name"],
            "role": matrix["role"],
            "layer": matrix["layer"],
            "shape": matrix["shape"],
            "index": found["sigma"]["x"][kept],
            "sigma": found["sigma"]["y"][kept],
            "alpha": None if law is None else law["alpha"],
            "effective_rank": found["effective_rank"],
            "stable_rank": found["stable_rank"],
            "r90": found["r90"],
        }


def _record_digests(pairs: Iterable[tuple[Json, Json | None]]) -> Iterator[dict[str, str]]:
    texts: set[str] = set()
    for record, evaluation in pairs:
        if record.get("statistics_sha256"):
            what = f"statistics of {_name(str(record['out']))}"
            yield {"what": what, "sha256": record["statistics_sha256"]}
        if evaluation is not None and evaluation["protocol"]["text_sha256"] not in texts:
            texts.add(evaluation["protocol"]["text_sha256"])
            yield _text_digest(evaluation["protocol"])


def _text_digest(protocol: Json) -> dict[str, str]:
    return {"what": f"text {protocol['text']}", "sha256": protocol["text_sha256"]}


def _protocol(protocol: Json) -> dict[str, Any]:
    return {"name": _PROTOCOL, "settings": dict(protocol)}


def _refuse_mixed(evaluations: Sequence[Json]) -> None:
    for found in evaluations[1:]:
        for part in ("reference", "protocol"):
            if found[part] != evaluations[0][part]:
                raise BitsmithError(
                    f"evaluations of one report share their {part}; that of "
                    f"{printable(str(found['candidate']['path']))} has another"
                )


def _paired(records: Sequence[Json], evaluations: Sequence[Json]) -> list[tuple[Json, Json | None]]:
    left = list(evaluations)
    pairs: list[tuple[Json, Json | None]] = []
    for record in records:
        out = _name(str((record.get("folder") or record).get("out")))
        match = next((one for one in left if _name(str(one["candidate"]["path"])) == out), None)
        if match is not None:
            left.remove(match)
        pairs.append((record, match))
    return [*pairs, *(({}, one) for one in left)]


def _kind(value: Json, path: Path) -> str:
    kind = value.get("kind")
    if kind in ("study", "formats study", "spi study"):
        return "study"
    if kind == "evaluation":
        return "evaluation"
    if "matrices" in value and "verdict" in value:
        return "assay"
    if "tensors" in value or "folder" in value:
        return "record"
    raise BitsmithError(
        "is no study, evaluation, assay or record of compress; expected the JSON that one of them writes",
        path=path,
    )


def _converted(value: Json, path: Path) -> Study:
    if value["kind"] == "study":
        return read_study(value, path)
    try:
        return from_formats(value) if value["kind"] == "formats study" else from_spi(value)
    except (KeyError, TypeError) as error:
        raise BitsmithError(f"is not what study writes: {error!r}", path=path) from error


def _json(path: Path, expected: type = dict) -> Any:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise BitsmithError(f"cannot be read: {error.strerror or error}", path=path) from error
    except ValueError as error:
        raise BitsmithError(f"is not JSON: {error}", path=path) from error
    if not isinstance(value, expected):
        raise BitsmithError("is JSON of another kind than a report is made of", path=path)
    return value


def _name(path: Any) -> str:
    return printable(Path(str(path)).name or str(path))
