"""What a merge and its experiments found, in lines of the report's schema (`bitsmith.report.study_json`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

Json = Mapping[str, Any]

_OWN = ("label", "ppl", "ppl_over_student", "kld_to_teacher")
_ALPHAS = ("alpha_mixer", "alpha_ffn")
_DISTILLED = ("trained_tokens", "best_step", "seconds", "peak_memory_bytes")


def merge_line(record: Json, name: str) -> dict[str, Any]:
    """Return a `merge.json` as a `Merge` of the artifact called `name`."""
    diagnostics, decision = record["diagnostics"], record["decision"]
    alphas = record["alphas"]
    return {
        "name": name,
        "teacher": name_of(record["teacher"]),
        "student": name_of(record["student"]),
        "is_adopted": decision["adopted"],
        "reason": decision["reason"],
        "settings": {**record["recipe"], "layer map": record.get("layer_map"), "factor": decision["factor"]},
        "protocol": record["protocol"],
        "shares": {end: alphas[end] for end in ("embedding", "head")},
        "measures": {key: figure for key, value in record["measures"].items() if (figure := _figure(value))},
        "trials": [_trial(one) for one in decision["trials"]],
        "targets": _targets(diagnostics["targets"]),
        "layers": [
            _layer(one, taken) for one, taken in zip(diagnostics["layers"], alphas["layers"], strict=True)
        ],
        "final": _figures(diagnostics["final"]),
    }


def experiment_lines(record: Json) -> Iterator[dict[str, Any]]:
    """Yield the experiments of a `merge-experiments.json`."""
    for one in record["experiments"]:
        yield {
            "name": one["name"],
            "words": one["words"],
            "rows": [_row(row) for row in one["rows"]],
        }


def name_of(path: Any) -> str:
    """Return what a model is called: the last part of its path."""
    return Path(str(path)).name or str(path)


def _layer(one: Json, taken: Json) -> dict[str, Any]:
    return {
        "layer": one["layer"],
        "teacher_layer": one.get("teacher_layer"),
        "kind": one.get("kind", ""),
        "figures": _figures(one),
        "attention_kl": _attention(one.get("attention_kl") or {}),
        "mixer": one.get("alpha_mixer", ()),
        "ffn": one.get("alpha_ffn"),
        "taken_mixer": taken["mixer"],
        "taken_ffn": taken["ffn"],
    }


def _attention(found: Any) -> dict[str, list[dict[str, Any] | None]]:
    """Return figures by KV group, of each way of comparing."""
    ways = found if isinstance(found, Mapping) else {"teacher": found}
    return {way: [_figure(figure) for figure in figures] for way, figures in ways.items() if figures}


def _targets(targets: Json) -> list[dict[str, Any]]:
    return [{"figure": name, **target} for name, target in targets.items()]


def _trial(one: Json) -> dict[str, Any]:
    return {
        "label": one["label"],
        "half": one["half"],
        "figure": _figure(one.get("ppl_over_student")),
        "worst_end": one.get("worst_end"),
        "why": one.get("refused", ""),
    }


def _figures(one: Json) -> dict[str, Any]:
    return {name: found for name, value in one.items() if name not in _ALPHAS and (found := _figure(value))}


def _figure(value: Any) -> dict[str, Any] | None:
    """Return a measured figure; None for whatever is none."""
    if not isinstance(value, Mapping) or value.get("value") is None or "unit" not in value:
        return None
    return {key: value.get(key) for key in ("value", "unit", "low", "high", "interval")}


def _row(row: Json) -> dict[str, Any]:
    figures = _figures(row) | _figures(row.get("turned") or {})
    facts = {name: value for name, value in row.items() if name not in (*_OWN, *figures) and _is_plain(value)}
    facts |= {name: row["distillation"][name] for name in _DISTILLED if row.get("distillation")}
    facts |= _means(row.get("diagnostics") or {})
    return {"label": row["label"], "figures": figures, "facts": facts}


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool)


def _means(diagnostics: Json) -> dict[str, Any]:
    """Return the mean over layers of each diagnostic that every layer has."""
    layers = [_figures(one) for one in diagnostics.get("layers", ())]
    names = [name for name in (layers[0] if layers else ()) if all(name in one for one in layers)]
    return {f"mean {name}": fmean(one[name]["value"] for one in layers) for name in names}
