"""Spectra of an assay as a report draws them: a line per matrix, its curve thinned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

CURVE_POINTS = 60
"""Singular values kept of one matrix, about evenly by position in the assay's curve; the ends stay."""


def spectrum_lines(assay: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the matrices of an `assay.json` with singular values at some indices, α, and effective ranks.

    The fields are those of `bitsmith.report.study_json.Spectrum`; a matrix without a spectrum is left out.
    """
    for matrix in assay["matrices"]:
        found, law = matrix["spectrum"], matrix["power_law"]
        if found is None:
            continue
        at = _thinned(len(found["sigma"]["x"]))
        yield {
            "name": matrix["name"],
            "role": matrix["role"],
            "layer": matrix["layer"],
            "shape": matrix["shape"],
            "index": [found["sigma"]["x"][i] for i in at],
            "sigma": [found["sigma"]["y"][i] for i in at],
            "alpha": None if law is None else law["alpha"],
            "effective_rank": found["effective_rank"],
            "stable_rank": found["stable_rank"],
            "r90": found["r90"],
        }


def _thinned(count: int) -> list[int]:
    """Return at most `CURVE_POINTS` of the indices below `count`, the first and the last among them.

    >>> len(_thinned(1000)), _thinned(1000)[-1], _thinned(3), _thinned(0)
    (60, 999, [0, 1, 2], [])
    """
    if count <= CURVE_POINTS:
        return list(range(count))
    return [round(i * (count - 1) / (CURVE_POINTS - 1)) for i in range(CURVE_POINTS)]
