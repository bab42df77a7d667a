"""What a merge and its experiments found, in lines of the report's schema (`bitsmith.report.study_json`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bitsmith.store.hub_names import last_name

Json = Mapping[str, Any]

_OWN = ("label", "series")
_DISTILLED = ("trained_tokens", "seconds", "peak_memory_bytes")
_ATTENTION = "attention_kl"
_TEACHER = "teacher"
_BAND = ("low", "high")


def merge_line(record: Json, name: str) -> dict[str, Any]:
    """Return a `merge.json` as a `Merge` of the artifact called `name`."""
    diagnostics, decision = record["diagnostics"], record["decision"]
    alphas = record["alphas"]
    places = zip(diagnostics["layers"], alphas["layers"], strict=True)
    return {
        "name": name,
        "teacher": name_of(record["teacher"]),
        "student": name_of(record["student"]),
        "is_adopted": decision["adopted"],
        "reason": decision["reason"],
        "settings": {**record["recipe"], "factor": decision["factor"]},
        "protocol": record["protocol"],
        "diagnosed": diagnostics["protocol"],
        "shares": {end: alphas[end] for end in ("embedding", "head")},
        "measures": _figures(record["measures"]),
        "trials": [_trial(one) for one in decision["trials"]],
        "targets": [_target(*one) for one in diagnostics["targets"].items()],
        "places": [*(_place(*one) for one in places), _place(diagnostics["final"])],
    }


def experiment_lines(record: Json) -> Iterator[dict[str, Any]]:
    """Yield the experiments of a `merge-experiments.json`."""
    for one in record["experiments"]:
        yield {"name": one["name"], "words": one["words"], "rows": [_row(row) for row in one["rows"]]}


def name_of(path: Any) -> str:
    """Return what a model is called: the last part of its path."""
    return last_name(str(path))


def _place(one: Json, taken: Json | None = None) -> dict[str, Any]:
    known = {key: one[key] for key in ("teacher_layer", "kind") if key in one}
    taken = taken or {"mixer": (), "ffn": None}
    return {
        **known,
        "layer": one.get("layer"),
        "figures": _figures(one),
        "reference": _figures(one["reference"]),
        "met": one["met"],
        _ATTENTION: dict(_attention(one)),
        "mixer": one.get("alpha_mixer", ()),
        "ffn": one.get("alpha_ffn"),
        "taken_mixer": taken["mixer"],
        "taken_ffn": taken["ffn"],
        "unmeasured": one["unmeasured"],
    }


def _attention(one: Json) -> Iterator[tuple[str, list[dict[str, Any] | None]]]:
    """Yield figures by KV group, of each way of comparing."""
    for name, figures in one.items():
        if name.startswith(_ATTENTION) and figures:
            yield name.removeprefix(_ATTENTION).strip("_") or _TEACHER, [_figure(one) for one in figures]


def _target(name: str, bounds: Json | None) -> dict[str, Any]:
    known = bounds or {}
    low, high = (
        known.get(plain, known.get(end)) for plain, end in zip(("least", "most"), _BAND, strict=True)
    )
    return {"figure": name, "low": low, "high": high, "is_band": bounds is None or "low" in known}


def _trial(one: Json) -> dict[str, Any]:
    return {
        "label": one["label"],
        "half": one["half"],
        "figure": _figure(one.get("ppl_over_student")),
        "worst_end": one.get("worst_end"),
        "why": one.get("refused", ""),
    }


def _figures(one: Json) -> dict[str, Any]:
    return {name: found for name, value in one.items() if (found := _figure(value))}


def _figure(value: Any) -> dict[str, Any] | None:
    """Return a measured figure; None for whatever is none."""
    if not isinstance(value, Mapping) or value.get("value") is None or "unit" not in value:
        return None
    return {key: value.get(key) for key in ("value", "unit", "low", "high", "interval")}


def _row(row: Json) -> dict[str, Any]:
    figures = _figures(row)
    facts = {name: value for name, value in row.items() if name not in (*_OWN, *figures) and _is_plain(value)}
    facts |= {name: row["distillation"][name] for name in _DISTILLED if name in row.get("distillation", {})}
    return {"label": row["label"], "figures": figures, "facts": facts}


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool)
