"""What a study's tasks found, in lines of the report's schema (`bitsmith.report.study_json`)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from bitsmith.run.gate import FORWARD_COSINE

Json = Mapping[str, Any]
_WHOLE_LAYER = re.compile(r"layer (\d+), all rows")


def gate_line(line: Json) -> dict[str, Any]:
    """Return one audit line (`run.audit`) as a `GateLine`: a gate's verdict is spread over its fields."""
    evidence = line["evidence"]
    if not isinstance(evidence, Mapping) or "outcome" not in evidence:
        return dict(line)
    more = {key: evidence.get(key) for key in ("outcome", "low", "high")}
    told = {key: str(evidence.get(key) or "") for key in ("gate", "unit", "direction")}
    subject = str(evidence.get("subject") or "")
    tensor, of_tensor, _ = subject.partition(": ")
    where = {"tensor": tensor} if of_tensor else {"artifact": subject}
    return {**line, **more, **told, **where, "evidence": evidence.get("found") or ""}


def row_cosines(rows: Iterable[Json]) -> Iterator[dict[str, Any]]:
    """Yield, of the rows of a `sahc.json`, the cosine of what a layer adds with one of them replaced.

    It is that of the method which was kept.
    """
    for row in rows:
        gates = row["attempts"][-1]["gates"] if row["attempts"] else ()
        for gate in gates:
            if gate["name"] == FORWARD_COSINE.name and gate["value"] is not None and row["layer"] is not None:
                what = "cosine of the layer's output, this tensor alone replaced"
                yield _cosine(row["layer"], row["role"], what, gate["value"], gate)


def layer_cosines(lines: Iterable[Any]) -> list[dict[str, Any]]:
    """Return, of the audit log of a `sahc`, the cosine of each layer with all its rows replaced.

    It is the last that was judged.
    """
    found: dict[int, dict[str, Any]] = {}
    for line in lines:
        evidence = line.evidence if isinstance(line.evidence, Mapping) else {}
        layer = _WHOLE_LAYER.fullmatch(str(evidence.get("subject", "")))
        if layer is not None and isinstance(line.value, float | int):
            number = int(layer[1])
            what = "cosine of the layer's output, all its tensors replaced"
            found[number] = _cosine(number, "", what, line.value, evidence)
    return [found[number] for number in sorted(found)]


def claim_lines(claims: Iterable[Json], model: str) -> Iterator[dict[str, Any]]:
    """Yield the claims of a `claims.json`; `model` is named in each where there are several."""
    for one in claims:
        said = "; ".join(part for part in (one["found"], one["protocol"]) if part)
        yield {
            "claim": f"{one['name']}: {one['words']}",
            "source": one["seed"],
            "outcome": one["outcome"],
            "found": f"{model}: {said}" if model else said,
            "measure": one["measure"],
        }


def _cosine(layer: int, role: str, what: str, value: float, of: Json) -> dict[str, Any]:
    figure = {"value": value, "unit": "", "low": of.get("low"), "high": of.get("high")}
    figure["interval"] = None if of.get("low") is None else "95 % over chunks"
    return {"layer": layer, "role": role, "what": what, "figure": figure}
