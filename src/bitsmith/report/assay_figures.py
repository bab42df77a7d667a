"""The assay's plots as plotly figures: plain dictionaries, colours that read on light and on dark pages."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any, Protocol

from bitsmith.errors import printable
from bitsmith.report.page import Figure
from bitsmith.run.assay_result import Assay, ComponentRow, Curve, MatrixAssay, RateRow, Rival, Whitened

Trace = dict[str, Any]
Line = tuple[Sequence[float], Sequence[float]]
View = tuple[str, list[Trace], dict[str, Any]]
Measured = Callable[["MatrixAssay"], "MatrixAssay | Whitened | None"]

ROLE_COLOURS = (
    "#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#eeca3b", "#9d755d",
    "#ff9da6", "#8c9bd9", "#2f9e8f", "#c2571a", "#a0cbe8", "#7f9c3b", "#d37295", "#59a8c9",
)  # fmt: skip
_DEPTH_COLOURS = ((94, 60, 190), (58, 120, 200), (40, 160, 150), (110, 190, 80), (240, 190, 50))
_GREY = "#8a93a3"
_GATE_COLOUR = "#e45756"
_DASHED = {"color": _GREY, "width": 1.5, "dash": "dash"}


class Site(Protocol):
    """What an activation's spectrum shows, as `bitsmith.run.activations.SiteSpectrum` has it."""

    @property
    def site(self) -> str:
        """`residual`, `k` or `v`."""

    @property
    def layer(self) -> int:
        """The layer entered."""

    @property
    def head(self) -> int | None:
        """One KV head, or None for all."""

    @property
    def dim(self) -> int:
        """Values per vector."""

    @property
    def plain(self) -> Any:
        """Directions about the origin."""

    @property
    def centred(self) -> Any:
        """Directions about the mean."""


def label(text: str) -> str:
    """Return hostile text as plotly shows it literally: no control characters, no markup, no TeX."""
    return html.escape(printable(text, 80), quote=False).replace("$", "&#36;")


def spectra(assay: Assay) -> Figure | None:
    """σ_i / σ_1 against i / n: all roles at mid-depth, or one role at all depths beside a random bulk."""

    def line(matrix: MatrixAssay) -> Line | None:
        found = matrix.spectrum
        return None if found is None else _scaled(found.sigma, min(matrix.shape), found.sigma_max)

    def bulk_edges(matrices: list[MatrixAssay]) -> Iterable[Trace]:
        middle = matrices[len(matrices) // 2]
        if middle.random and middle.spectrum:
            edges = (("largest", middle.random.upper_edge), ("smallest", middle.random.lower_edge))
            for name, edge in edges:
                level = edge / middle.spectrum.sigma_max
                if level > 0:
                    yield _level(level, f"{label(_short(middle))} at random: {name}", _DASHED)

    layout = _layout("index i / full rank", "σ<sub>i</sub> / σ<sub>1</sub>", log_y=True)
    return _by_role(assay.matrices, line, bulk_edges, layout)


def rank_error(assay: Assay) -> Figure | None:
    """Relative error of the best rank r against r / n, with int4's measured error as a line."""

    def line(matrix: MatrixAssay) -> Line | None:
        found = matrix.spectrum
        return None if found is None else _scaled(found.error, min(matrix.shape), 1.0)

    def int4(matrices: list[MatrixAssay]) -> Iterable[Trace]:
        errors = [best.error for m in matrices if (best := closest(m.rivals, "int4"))]
        if errors:
            level = median(errors)
            yield _level(level, f"int4: {level:.3f} (median)", _DASHED)

    layout = _layout("rank kept / full rank", "relative error ‖W − W′‖ / ‖W‖")
    return _by_role(assay.matrices, line, int4, layout, list(int4(list(assay.matrices))))


def low_rank_against_int4(assay: Assay) -> Figure | None:
    """Low rank's error in int4's bytes against int4's error, a point per matrix; below the line it wins."""
    methods = dict.fromkeys(r.method for m in assay.matrices for r in m.rivals if r.kind == "int4")
    kinds = {"low_rank": "low rank", "residual": "low rank + int4 of the rest"}
    choices: tuple[tuple[str, Measured], ...] = (("", lambda m: m), (", by the inputs", lambda m: m.whitened))
    views: list[View] = [
        (label(f"{shown} against {method}{how}"), traces, {})
        for how, measured in choices
        for kind, shown in kinds.items()
        for method in methods
        if (traces := _contest(assay.matrices, method, kind, measured))
    ]
    layout = _layout("int4's relative error", "low rank's relative error in the same bytes", log_y=True)
    layout["xaxis"] |= _log_axis()
    return _with_views(views, layout)


def claims(assay: Assay) -> Figure | None:
    """Measured error against the error that a claimed spectral decay predicts, per low-rank coding."""
    traces = []
    for role, colour in _role_colours(assay.matrices):
        points = [
            (rival.claimed_error, rival.error, f"{label(m.name)}<br>{label(rival.method)}, rank {rival.rank}")
            for m in assay.matrices
            if m.role == role
            for rival in m.rivals
            if rival.claimed_error
        ]
        if points:
            traces.append(_points(points, label(role), colour))
    if not traces:
        return None
    low = min(min(trace["x"]) for trace in traces)
    least = max(low, min(min(trace["y"]) for trace in traces))
    diagonal = _line(((least, 1.0), (least, 1.0)), "as claimed", _DASHED)
    zeros = _level(1.0, "no closer than zeros", {"color": _GATE_COLOUR, "width": 1.5, "dash": "dot"})
    layout = _layout("claimed relative error", "measured relative error", log_y=True)
    layout["xaxis"] |= _log_axis()
    return {"data": [*traces, diagonal, zeros | {"x": [low, 1]}], "layout": layout}


def by_depth(assay: Assay) -> Figure | None:
    """α with its interval by layer and role; other figures of the same matrices by choice."""
    metrics: tuple[tuple[str, str, Callable[[MatrixAssay], float | None]], ...] = (
        ("α of the tail of σ²", "α", lambda m: m.power_law.alpha if m.power_law else None),
        ("log-log slope of σ", "slope", lambda m: m.power_law.slope if m.power_law else None),
        ("effective rank / n", "effective rank / n", lambda m: _over_n(m, "effective_rank")),
        ("stable rank / n", "stable rank / n", lambda m: _over_n(m, "stable_rank")),
        ("r90 / n", "r90 / n", lambda m: _over_n(m, "r90")),
    )
    views = [
        (name, traces, _framed(axis, traces))
        for name, axis, get in metrics
        if (traces := _depth_traces(assay.matrices, get))
    ]
    layout = _layout("layer", "")
    layout["xaxis"]["dtick"] = 1 if max((m.layer or 0 for m in assay.matrices), default=0) < 24 else 4
    return _with_views(views, layout)


def tensor_trains(assay: Assay) -> Figure | None:
    """Mean row cosine against compression ratio for every Tensor-Train, with the gate at 0.95."""
    traces: list[Trace] = []
    for matrix in assay.matrices:
        for method in sorted({row.method for row in matrix.tensor_train or ()}):
            rows = [r for r in matrix.tensor_train or () if r.method == method and r.cosine is not None]
            points = [
                (r.ratio, r.cosine, f"ranks {list(r.ranks)}<br>{r.parameters:,} parameters")
                for r in sorted(rows, key=lambda r: r.ratio)
            ]
            colour = ROLE_COLOURS[len(traces) % len(ROLE_COLOURS)]
            name = f"{label(matrix.name)}<br>{label(method)}"
            traces.append(_points(points, name, colour) | {"mode": "lines+markers"})
    traces = [trace for trace in traces if trace["x"]]
    if not traces:
        return None
    ratios = [x for trace in traces for x in trace["x"]]
    gate = _level(0.95, "gate 0.95", {"color": _GATE_COLOUR, "width": 1.5, "dash": "dash"})
    traces.append(gate | {"x": [min(ratios), max(ratios)]})
    layout = _layout("ratio: weights / Tensor-Train's parameters", "mean row cosine")
    layout["xaxis"] |= _log_axis()
    return {"data": traces, "layout": layout}


def bound_gaps(assay: Assay) -> Figure | None:
    """How many dB each format lies above the Gaussian rate-distortion bounds at its rate."""
    kinds: tuple[tuple[str, Callable[[RateRow], float | None]], ...] = (
        ("independent Gaussian weights", lambda row: row.gap_db),
        ("Gaussian weights of this spectrum", lambda row: row.gap_spectral_db),
    )
    views: list[View] = [(name, boxes, {}) for name, get in kinds if (boxes := _boxes(assay.matrices, get))]
    layout = _layout("format", "distance from the bound (dB)") | {"showlegend": False}
    return _with_views(views, layout)


def _boxes(matrices: Sequence[MatrixAssay], get: Callable[[RateRow], float | None]) -> list[Trace]:
    rows = [(row, m, gap) for m in matrices for row in m.rate if (gap := get(row)) is not None]
    methods = dict.fromkeys(method for _, method in sorted({(row.bpw, row.method) for row, _, _ in rows}))
    boxes = []
    for at, method in enumerate(methods):
        of_method = [found for found in rows if found[0].method == method]
        boxes.append(
            {
                "type": "box",
                "name": f"{label(method)}<br>{median(row.bpw for row, _, _ in of_method):.2f} bpw",
                "y": [_rounded(gap) for _, _, gap in of_method],
                "text": [f"{label(m.name)}<br>error {row.error:.4f}" for row, m, _ in of_method],
                "boxpoints": "all",
                "jitter": 0.5,
                "pointpos": 0,
                "marker": {"size": 4, "opacity": 0.6, "color": ROLE_COLOURS[at % len(ROLE_COLOURS)]},
                "hovertemplate": "%{text}<br>%{y:.2f} dB<extra></extra>",
            }
        )
    return boxes


def shares(components: Sequence[ComponentRow]) -> Figure | None:
    """Every component's true share of the parameters beside the claimed one."""
    names = [label(f"{row.key} {row.name}") for row in components]
    bars = (
        ("in this model", ROLE_COLOURS[0], [100 * row.share for row in components]),
        ("claimed", ROLE_COLOURS[1], [100 * row.seed_share for row in components]),
    )
    traces = [
        {
            "type": "bar", "name": name, "x": names, "y": values, "marker": {"color": colour},
            "hovertemplate": "%{x}<br>%{y:.2f} %<extra>" + name + "</extra>",
        }
        for name, colour, values in bars
    ]  # fmt: skip
    layout = _layout("", "share of all parameters (%)", height=360) | {"barmode": "group"}
    return {"data": traces, "layout": layout} if components else None


def activations(sites: Sequence[Site]) -> Figure | None:
    """Root mean square along each principal direction of residual states, K and V, by depth."""
    names = {"residual": "states entering the layers", "k": "K cache, all heads", "v": "V cache, all heads"}
    views: list[View] = []
    for key, name in names.items():
        of_site = [site for site in sites if site.site == key and site.head is None]
        for part in ("plain", "centred"):
            traces = _site_lines(of_site, part)
            if traces:
                views.append((name if part == "plain" else f"{name}, about the mean", traces, {}))
    layout = _layout("direction i / dimension", "σ<sub>i</sub> / σ<sub>1</sub>", log_y=True)
    return _with_views(views, layout)


def _site_lines(sites: Sequence[Site], part: str) -> list[Trace]:
    last = max((site.layer for site in sites), default=0)
    lines = []
    for site in sites:
        curve: Curve = getattr(site, part).sigma
        if curve.y and curve.y[0] > 0:
            colour = _depth_colour(site.layer / max(1, last))
            scaled = _scaled(curve, site.dim, curve.y[0])
            lines.append(_line(scaled, f"layer {site.layer}", {"color": colour, "width": 2}))
    return lines


def _by_role(
    matrices: Sequence[MatrixAssay],
    line: Callable[[MatrixAssay], Line | None],
    beside: Callable[[list[MatrixAssay]], Iterable[Trace]],
    layout: dict[str, Any],
    overall: Sequence[Trace] = (),
) -> Figure | None:
    """Show every role's matrix of middle depth, or all matrices of a role chosen from a menu."""
    overview: list[Trace] = []
    views: list[View] = [("all roles, middle layer", overview, {})]
    for role, colour in _role_colours(matrices):
        of_role = [m for m in matrices if m.role == role and line(m) is not None]
        traces = []
        for at, matrix in enumerate(of_role):
            curve = line(matrix)
            if curve is not None:
                depth = {"color": _depth_colour(at / max(1, len(of_role) - 1)), "width": 2}
                traces.append(_line(curve, label(_short(matrix)), depth))
        if traces:
            middle = traces[len(traces) // 2]
            overview.append(middle | {"name": label(role), "line": {"color": colour, "width": 2}})
            views.append((label(role), [*traces, *beside(of_role)], {}))
    overview.extend(overall if overview else ())
    return _with_views(views, layout) if overview else None


def _with_views(views: Sequence[View], layout: dict[str, Any]) -> Figure | None:
    """Show one view (name, traces, its axis) at a time, chosen from a menu where there are several."""
    if not views:
        return None
    counts = [len(traces) for _, traces, _ in views]
    layout["yaxis"] |= views[0][2]
    shown = [[at == n for at, count in enumerate(counts) for _ in range(count)] for n in range(len(views))]
    data = [
        trace | {"visible": visible}
        for trace, visible in zip(
            (trace for _, traces, _ in views for trace in traces), shown[0], strict=True
        )
    ]
    if len(views) == 1:
        return {"data": data, "layout": layout}
    buttons = [
        {
            "method": "update",
            "label": name,
            "args": [{"visible": mask}, {f"yaxis.{key}": value for key, value in axis.items()}],
        }
        for (name, _, axis), mask in zip(views, shown, strict=True)
    ]
    menu = {
        "buttons": buttons, "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom",
        "bgcolor": "rgba(128,128,128,0.15)", "bordercolor": _GREY, "pad": {"b": 6},
    }  # fmt: skip
    return {"data": data, "layout": layout | {"updatemenus": [menu]}}


def _contest(matrices: Sequence[MatrixAssay], method: str, kind: str, measured: Measured) -> list[Trace]:
    traces: list[Trace] = []
    for role, colour in _role_colours(matrices):
        points = [
            point
            for matrix in matrices
            if matrix.role == role and (source := measured(matrix))
            for point in _pair(matrix, source.rivals, method, kind)
        ]
        if points:
            traces.append(_points(points, label(role), colour))
    if traces:
        ends = [value for trace in traces for axis in ("x", "y") for value in trace[axis]]
        both = min(ends), max(ends)
        traces.append(_line((both, both), "equal; low rank wins below", _DASHED))
    return traces


def _pair(
    matrix: MatrixAssay, rivals: Sequence[Rival], method: str, kind: str
) -> Iterable[tuple[float, float, str]]:
    int4 = closest((r for r in rivals if r.method == method), "int4")
    low = closest((r for r in rivals if r.budget == method), kind)
    if int4 and low and int4.error > 0 and low.error > 0:
        text = f"{label(matrix.name)}<br>{label(low.method)}, rank {low.rank}, {low.nbytes:,} bytes"
        yield int4.error, low.error, text


def _framed(title: str, traces: Sequence[Trace]) -> dict[str, Any]:
    """Return an axis that shows all points, and of the intervals what fits beside them."""
    values = [y for trace in traces for y in trace["y"]]
    low, high = min(values), max(values)
    pad = 0.08 * (high - low or abs(high) or 1.0)
    return {"title": {"text": title}, "range": [low - pad, high + pad], "autorange": False}


def _depth_traces(matrices: Sequence[MatrixAssay], get: Callable[[MatrixAssay], float | None]) -> list[Trace]:
    traces = []
    for role, colour in _role_colours(matrices):
        found = [(m, value) for m in matrices if m.role == role and (value := get(m)) is not None]
        points = [(-1 if m.layer is None else m.layer, value, label(m.name)) for m, value in found]
        if not points:
            continue
        trace = _points(points, label(role), colour)
        if len(points) > 1:
            trace["mode"] = "lines+markers"
        laws = [m.power_law for m, value in found if m.power_law and m.power_law.alpha == value]
        if len(laws) == len(points) and all(w.alpha_low is not None for w in laws):
            trace["error_y"] = {
                "type": "data", "symmetric": False, "thickness": 1, "width": 3,
                "array": [(w.alpha_high or 0) - (w.alpha or 0) for w in laws],
                "arrayminus": [(w.alpha or 0) - (w.alpha_low or 0) for w in laws],
            }  # fmt: skip
        traces.append(trace)
    return traces


def _over_n(matrix: MatrixAssay, field: str) -> float | None:
    found = matrix.spectrum
    return None if found is None else float(getattr(found, field)) / min(matrix.shape)


def closest(rivals: Iterable[Rival], kind: str) -> Rival | None:
    """Return the rival of a kind with the least error."""
    return min((r for r in rivals if r.kind == kind), key=lambda rival: rival.error, default=None)


def _short(matrix: MatrixAssay) -> str:
    return matrix.name if matrix.layer is None else f"layer {matrix.layer}"


def _role_colours(matrices: Sequence[MatrixAssay]) -> list[tuple[str, str]]:
    roles = dict.fromkeys(matrix.role for matrix in matrices)
    return [(role, ROLE_COLOURS[at % len(ROLE_COLOURS)]) for at, role in enumerate(roles)]


def _depth_colour(share: float) -> str:
    """Return a colour from violet (0, the first layer) to yellow (1, the last)."""
    place = min(max(share, 0.0), 1.0) * (len(_DEPTH_COLOURS) - 1)
    at = min(int(place), len(_DEPTH_COLOURS) - 2)
    pairs = zip(_DEPTH_COLOURS[at], _DEPTH_COLOURS[at + 1], strict=True)
    return "rgb({},{},{})".format(*(round(a + (b - a) * (place - at)) for a, b in pairs))


def _scaled(curve: Curve, full: int, unit: float) -> Line:
    return tuple(x / full for x in curve.x), tuple(y / unit for y in curve.y)


def _line(line: Line, name: str, style: dict[str, Any]) -> Trace:
    return {
        "type": "scatter", "mode": "lines", "name": name, "line": style,
        "x": [_rounded(x) for x in line[0]], "y": [_rounded(y) for y in line[1]],
        "hovertemplate": "%{x:.3f}: %{y:.4g}",
    }  # fmt: skip


def _level(y: float, name: str, line: dict[str, Any]) -> Trace:
    return _line(((0.0, 1.0), (y, y)), name, line) | {"hovertemplate": "%{y:.4g}"}


def _points(points: Sequence[tuple[Any, Any, str]], name: str, colour: str) -> Trace:
    x, y, text = zip(*points, strict=True) if points else ((), (), ())
    return {
        "type": "scatter", "mode": "markers", "name": name, "x": list(x), "y": list(y), "text": list(text),
        "marker": {"color": colour, "size": 8}, "line": {"color": colour, "width": 1.5},
        "hovertemplate": "%{text}<br>%{x:.4g}: %{y:.4g}",
    }  # fmt: skip


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def _log_axis() -> dict[str, Any]:
    return {"type": "log", "tickformat": "~g"}


def _layout(x: str, y: str, log_y: bool = False, height: int = 480) -> dict[str, Any]:
    clear = "rgba(0,0,0,0)"
    y_axis: dict[str, Any] = {"title": {"text": y}, "automargin": True, "zeroline": False}
    if log_y:
        y_axis |= _log_axis()
    return {
        "height": height,
        "margin": {"l": 60, "r": 10, "t": 50, "b": 50},
        "paper_bgcolor": clear,
        "plot_bgcolor": clear,
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": _GREY},
        "xaxis": {"title": {"text": x}, "automargin": True, "zeroline": False},
        "yaxis": y_axis,
        "legend": {"x": 1.02, "y": 1, "bgcolor": clear},
        "hovermode": "closest",
        "hoverlabel": {"namelength": -1},
    }
