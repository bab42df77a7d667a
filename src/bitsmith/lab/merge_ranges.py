"""Several figures as one: their mean, and between which ends they lie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from bitsmith.run.merge_trial import UNMEASURED

OVER_LAYERS = "range over layers"
OVER_GROUPS = "range over layers and KV groups"


def ranged(values: ArrayLike, unit: str, interval: str) -> dict[str, Any]:
    """Return the mean with the range of what is not one value alone."""
    found = np.asarray(values, np.float64)
    several = found.size > 1
    return {
        "value": float(found.mean()),
        "unit": unit,
        "low": float(found.min()) if several else None,
        "high": float(found.max()) if several else None,
        "interval": interval if several else UNMEASURED,
    }


def over_layers(diagnostics: Mapping[str, Any]) -> dict[str, Any]:
    """Return diagnostics of a merge as figures over its layers, and how many places meet each target."""
    layers = diagnostics["layers"]
    names = dict.fromkeys(name for layer in layers for name in layer)
    found: dict[str, Any] = {}
    for name in names:
        figures = [one for layer in layers for one in _figures(layer.get(name))]
        if figures:
            grouped = any(isinstance(layer.get(name), list) for layer in layers)
            values = [one["value"] for one in figures]
            found[name] = ranged(values, figures[0]["unit"], OVER_GROUPS if grouped else OVER_LAYERS)
    places = [*layers, diagnostics["final"]]
    for name in dict.fromkeys(name for place in places for name in place["met"]):
        told = [place["met"][name] for place in places if place["met"].get(name) is not None]
        found[f"{name}_met"] = f"{sum(told)} of {len(told)}" if told else UNMEASURED
    return found


def _figures(value: Any) -> Iterator[Mapping[str, Any]]:
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, Mapping) and {"value", "unit"} <= one.keys():
            yield one
