"""What a study's plots are drawn from: plain numbers and names, which the page's script turns into traces.

Names come twice: as text, and escaped for plotly, which reads its own markup in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from bitsmith.errors import printable
from bitsmith.report.assay_figures import ROLE_COLOURS, label
from bitsmith.report.study_json import Artifact, Spectrum, Study, Tensor
from bitsmith.report.study_tables import (
    OUTPUTS_ERROR,
    WEIGHTS_ERROR,
    by_component,
    error_of,
    is_matrix,
    measures_of,
    weights,
)
from bitsmith.run.study_peers import Figure, Peer

ALL_ROLES = "all roles"
_OUTSIDE = "outside"
_ORIGINAL_COLOUR = "#8a93a3"
_SPECTRAL: dict[str, Callable[[Spectrum], float | None]] = {
    "α of the tail of σ²": lambda one: one.alpha,
    "effective rank / n": lambda one: _over_n(one, one.effective_rank),
    "stable rank / n": lambda one: _over_n(one, one.stable_rank),
    "r90 / n": lambda one: _over_n(one, one.r90),
}

Data = dict[str, Any]


def plot_data(study: Study) -> Data:
    """Return everything the page's script draws, JSON-ready; parts without figures are empty."""
    groups = groups_of(study)
    roles = dict.fromkeys(one.role for row in study.artifacts for one in row.tensors if is_matrix(one))
    return {
        "artifacts": [_artifact(row, groups, list(roles)) for row in study.artifacts],
        "peers": [_peer(peer) for peer in study.peers],
        "groups": [{"name": label(name), "colour": colour} for name, colour in groups.items()],
        "measures": [
            {"key": key, "label": shown.label, "falling": shown.falling, "log": shown.log}
            for key, shown in measures_of(study).items()
        ],
        "roles": [label(role) for role in roles],
        "role_names": [printable(role) for role in roles],
        "spectra": [_spectrum(one) for one in study.spectra],
        "spectral": [one for one in _spectral(study) if any(value is not None for value in one["values"])],
    }


def _spectral(study: Study) -> Iterator[Data]:
    for name, get in _SPECTRAL.items():
        yield {"name": name, "values": [get(one) for one in study.spectra]}


def groups_of(study: Study) -> dict[str, str]:
    """Return the legend: every group in order, with its colour."""
    names = dict.fromkeys(row.group for row in study.artifacts)
    grey = {row.group for row in study.artifacts if row.is_original}
    coloured = [name for name in names if name not in grey]
    return {
        name: _ORIGINAL_COLOUR if name in grey else ROLE_COLOURS[coloured.index(name) % len(ROLE_COLOURS)]
        for name in names
    }


def layer_choices(data: Data) -> tuple[list[str], list[str]]:
    """Return the figures that `plot_data` has by layer, and the roles, both as it names them."""
    lines = [line for row in data["artifacts"] for line in row["layers"]]
    roles = dict.fromkeys([ALL_ROLES, *(line["role"] for line in lines)]) if lines else {}
    return list(dict.fromkeys(line["what"] for line in lines)), list(roles)


def _artifact(row: Artifact, groups: Mapping[str, str], roles: Sequence[str]) -> Data:
    return {
        "name": printable(row.name),
        "label": label(row.name),
        "group": list(groups).index(row.group),
        "original": row.is_original,
        "bytes": row.file_bytes,
        "bpw": row.bpw,
        "measures": _measures(row.measures),
        "layers": list(_by_layer(row)),
        "components": _components(row),
        "cells": _cells(row, roles),
    }


def _peer(peer: Peer) -> Data:
    same = "" if peer.same_protocol else "<br>measured by another protocol"
    return {
        "name": printable(peer.name),
        "label": label(peer.name) + same,
        "bytes": peer.file_bytes,
        "bpw": peer.bpw,
        "measures": _measures(peer.measures),
    }


def _measures(measures: Mapping[str, Figure]) -> Data:
    return {key: [one.value, one.low, one.high] for key, one in measures.items()}


def _by_layer(row: Artifact) -> Iterator[Data]:
    """Yield lines of a figure by layer: the weights' and outputs' errors, then figures of the layers."""
    placed: dict[str, dict[int, list[Tensor]]] = {ALL_ROLES: {}}
    for one in row.tensors:
        if one.layer is not None and is_matrix(one):
            for role in (ALL_ROLES, one.role):
                placed.setdefault(role, {}).setdefault(one.layer, []).append(one)
    for what, held in ((WEIGHTS_ERROR, False), (OUTPUTS_ERROR, True)):
        for role, layers in placed.items():
            errors = [(layer, error_of(layers[layer], held=held)) for layer in sorted(layers)]
            points = [(layer, error) for layer, error in errors if error is not None]
            if points:
                none = [None] * len(points)
                xs, ys = ([point[at] for point in points] for at in (0, 1))
                yield {"what": what, "role": label(role), "x": xs, "y": ys, "low": none, "high": none}
    for what, role in dict.fromkeys((one.what, one.role) for one in row.layers):
        found = sorted(
            (one for one in row.layers if (one.what, one.role) == (what, role)), key=lambda one: one.layer
        )
        units = found[0].figure.unit
        yield {
            "what": label(f"{what} ({units})" if units else what),
            "role": label(role or ALL_ROLES),
            "x": [one.layer for one in found],
            "y": [one.figure.value for one in found],
            "low": [one.figure.low for one in found],
            "high": [one.figure.high for one in found],
        }


def _components(row: Artifact) -> list[Data]:
    return [
        {"name": name, "weights": error_of(tensors, held=False), "outputs": error_of(tensors, held=True)}
        for name, tensors in by_component(row).items()
    ]


def _cells(row: Artifact, roles: Sequence[str]) -> Data | None:
    """Return bits per weight of the matrices by layer and role, and the types behind each."""
    cells: dict[tuple[int | None, str], list[Tensor]] = {}
    for one in row.tensors:
        if is_matrix(one):
            cells.setdefault((one.layer, one.role), []).append(one)
    if not cells:
        return None
    layers = sorted({layer for layer, _ in cells}, key=lambda layer: -1 if layer is None else layer)
    grid = [[cells.get((layer, role), []) for role in roles] for layer in layers]
    return {
        "layers": [_OUTSIDE if layer is None else f"layer {layer}" for layer in layers],
        "bpw": [[_bits(tensors) for tensors in line] for line in grid],
        "types": [
            [label(", ".join(dict.fromkeys(one.type for one in tensors))) for tensors in line]
            for line in grid
        ],
    }


def _bits(tensors: Sequence[Tensor]) -> float | None:
    return round(8 * sum(one.nbytes for one in tensors) / sum(map(weights, tensors)), 4) if tensors else None


def _spectrum(one: Spectrum) -> Data:
    first = one.sigma[0] if one.sigma and one.sigma[0] > 0 else None
    full = min(one.shape, default=1)
    pairs = () if first is None else zip(one.index, one.sigma, strict=True)
    points = [(float(f"{x / full:.5g}"), float(f"{y / (first or 1):.5g}")) for x, y in pairs if y > 0]
    return {
        "name": printable(one.name),
        "label": label(f"{one.model}: {one.name}" if one.model else one.name),
        "role": label(one.role),
        "layer": one.layer,
        "x": [x for x, _ in points],
        "y": [y for _, y in points],
    }


def _over_n(one: Spectrum, value: float | None) -> float | None:
    return None if value is None or not one.shape else value / min(one.shape)
