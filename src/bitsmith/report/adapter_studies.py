"""`study formats` and `study spi` as studies in the report's schema."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from bitsmith.report.adapter_parts import (
    ORIGINAL,
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
from bitsmith.run import study_claims as _registered  # noqa: F401 (importing it registers the claims)
from bitsmith.run.seed_claims import chosen_claims
from bitsmith.run.study_lines import claim_lines


def from_formats(study: Json) -> Study:
    """Return a study of what `FormatsStudy.to_json()` gave."""
    rows, protocol = study["rows"], study["protocol"]
    return study_of(
        study,
        f"Formats of {name_of(study['model'])}",
        artifacts=[_format_row(study, row) for row in rows],
        protocols=[protocol_part(protocol)],
        claims=study.get("claims", ()),
        samples=list(_samples(study)),
        digests=[text_digest(protocol)],
        commands=[_formats_command(study)],
        notes=[
            f"verdict: {study['coherence_rule']}",
            f"statistics: {study.get('statistics') or 'none'}",
            *UNSAID,
        ],
    )


def from_spi(study: Json) -> Study:
    """Return a study of what `SpiStudy.to_json()` gave; rows are named by what their table holds equal."""
    protocol, original = study["protocol"], study["original"]
    rows = [_spi_row(study, table, row) for table in study["tables"] for row in table["rows"]]
    reference = {"ppl_cand": study["tables"][0]["rows"][0]["measures"]["ppl_ref"]}
    first = original_row(original, reference, str(study["model"]))
    alone = [row for row in rows if row["name"].startswith("NF4,")]
    if alone:
        alone[0]["layers"] = list(_alone(study["linears"]))
    return study_of(
        study,
        f"SPI on {name_of(study['model'])}",
        artifacts=[first, *rows],
        protocols=[protocol_part(protocol)],
        claims=study.get("claims", ()),
        spectra=[_spi_spectrum(linear) for linear in study["linears"]],
        digests=[text_digest(protocol)],
        commands=[_spi_command(study)],
        notes=[
            f"calibration: {study['calibration'] or 'none'}",
            *map(_comparison, study["comparisons"]),
            *UNSAID,
        ],
    )


def from_claims(study: Json) -> Study:
    """Return a study of what `ClaimsStudy.to_json()` gave: the claims, what they rest on, the command."""
    text = study["text"]
    return study_of(
        study,
        f"Claims on {name_of(study['model'])}",
        summary=["One model says nothing of others: NOT HELD here is not held here."],
        claims=list(claim_lines(study["claims"], "")),
        digests=[] if text is None else [{"what": f"text {text}", "sha256": study["text_sha256"]}],
        commands=[_claims_command(study)],
        notes=[f"{one['name']}: tested by: {one['test']}; {one['rule']}" for one in study["claims"]]
        + list(UNSAID),
    )


def _claims_command(study: Json) -> str:
    given = (("--text", "text"), ("--calibration", "calibration"), ("--stats", "statistics"))
    options = [word for option, name in given if study[name] is not None for word in (option, study[name])]
    window = ["--ctx", study["ctx_tokens"], "--chunks", study["chunks"]]
    seed = ["--seed", study["seed"]] if study["seed"] else []
    names, known = [one["name"] for one in study["claims"]], {one.name for one in chosen_claims(None)}
    only = [] if known <= set(names) else ["--only", ",".join(names)]
    return command("study", "claims", study["model"], *options, *window, *seed, *only)


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
        "protocol": PROTOCOL,
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
    return command(
        "study", "formats", study["model"], *text_options(study["protocol"]), *options,
        "--formats", ",".join(names),
    )  # fmt: skip


def _spi_command(study: Json) -> str:
    counted = [table for table in study["tables"] if table["equal"] == "count"]
    asked = str(next((table["asked"] for table in counted), ""))
    names = [str(row["name"]) for table in counted for row in table["rows"]]
    critical = ["--critical", asked.split(maxsplit=1)[0]] if asked.endswith(" linears") else []
    learned = re.match(r"text (.+) \(SHA-256 ", study["calibration"] or "")
    calibration = [] if learned is None else ["--calibration", learned[1]]
    random = ["--random", sum(name.startswith("random ") for name in names)]
    return command(
        "study", "spi", study["model"], *text_options(study["protocol"]), *calibration, *critical, *random
    )


def _spi_row(study: Json, table: Json, row: Json) -> dict[str, Any]:
    kept = len(row["names"])
    group = "random" if row["name"].startswith("random") else row["name"]
    return {
        "name": f"{row['name']}, equal {table['equal']}",
        "group": group,
        "what": f"{kept} of {len(study['linears'])} linears kept in 16 bits, {row['kept_bytes']:,} bytes",
        "model": str(study["model"]),
        "recipe": "spi",
        **size(row["file_bytes"], study["original"]["weights"]),
        "measures": row["measures"],
        "protocol": PROTOCOL,
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
    said = {True: "better", False: "worse", None: "no telling: the interval is on both sides"}
    figure, verdict = measured(found["measure"]), said[found["better"]]
    return f"equal {found['equal']}: {found['rule']} against {found['control']}: {figure}: {verdict}"
