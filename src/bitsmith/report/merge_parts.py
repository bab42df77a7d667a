"""A merge as a part of the page: what was decided, its diagnostics with targets beside them, its shares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bitsmith.errors import printable
from bitsmith.report.charts import Block, Chart, Curve, Mark, Part, curve_of
from bitsmith.report.markdown import UNMEASURED
from bitsmith.report.study_json import Merge, MergePlace, MergeTarget, Study
from bitsmith.report.study_tables import Cell, Table, figure_text, without_empty
from bitsmith.run.study_peers import Figure

MET, NOT_MET = "met", "not met"
PROFILE, TAKEN = "Merge profile", "Merge profile as taken"
TARGET_RULE = (
    "A target is met by the figure itself; its interval stands beside it. The bands of kurtosis gap and "
    "mutual information are what this pair of models shows by itself, under its least-squares maps."
)
LEAST_SQUARES = "least-squares map"

_LABELS = {
    "transition_cost": "transition cost ‖T − I‖",
    "transition_cost_normalised": "transition cost / √D",
    "variance_kept": "variance kept",
    "cosine": "cosine of mapped and own states",
    "certainty": "certainty",
    "kurtosis_gap": "kurtosis gap",
    "pairwise_mi": "pairwise mutual information",
    "pairwise_mi_null": "the same of shifted tokens",
}
_MEASURES = {
    "ppl_student": "perplexity of the student",
    "ppl_teacher": "perplexity of the teacher",
    "ppl_merged": "perplexity of what was written",
    "ppl_merged_over_student": "perplexity of it over the student's",
    "kld_student": "mean KLD from the teacher, student",
    "kld_merged": "mean KLD from the teacher, what was written",
}
_UNDRAWN = ("pairwise_mi_null",)
_FFN = "FFN"
_BEHIND = "behind all layers"
_WAYS = {
    "teacher": "the teacher's heads on its own states",
    "merged": "the layer at the shares asked for",
    "folded": "the layer wholly the teacher's",
    "unturned": "the same without block rotations",
}


def merge_parts(study: Study) -> list[Part]:
    """Return a part for each merge of a study."""
    return [_part(f"merge-{at}", one) for at, one in enumerate(study.merges)]


def outcome_of(merge: Merge) -> str:
    """Return in one sentence what was merged of what, and what came of it."""
    made = f"{merge.name}: {merge.teacher} merged into {merge.student}"
    came = "adopted" if merge.is_adopted else "not adopted: the student's own tensors, bit for bit"
    return printable(f"{made}: {came}{f' ({merge.reason})' if merge.reason else ''}", 1000)


def diagnostics_table(merge: Merge) -> Table:
    """Return a row per layer, and one behind all: diagnostics, each with whether its target is met."""
    names = _names(merge)
    targets = {one.figure: one for one in merge.targets}
    columns = ["layer", "teacher's", "kind", *(_head(name, targets.get(name)) for name in names)]
    rows = [
        (
            _layer(one),
            Cell("" if one.teacher_layer is None else str(one.teacher_layer), one.teacher_layer),
            Cell(printable(one.kind.replace("_", " "))),
            *(_judged(one, name) for name in names),
        )
        for one in merge.places
    ]
    return Table(tuple(columns), rows, [None] * len(rows))


def tally_table(merge: Merge) -> Table:
    """Return a row per target: in how many places it is met, not met, unmeasured."""
    rows = []
    for target in merge.targets:
        told = [one.met[target.figure] for one in merge.places if target.figure in one.met]
        counts = [told.count(outcome) for outcome in (True, False, None)]
        cells = [Cell(str(count), count) for count in counts]
        rows.append((Cell(_label(target.figure)), Cell(_bounds(target)), *cells))
    return Table(("diagnostic", "target", MET, NOT_MET, UNMEASURED), rows, [None] * len(rows))


def _part(anchor: str, merge: Merge) -> Part:
    name = printable(merge.name)
    blocks = [
        Block(
            "",
            "",
            table=facts_table(merge),
            id=f"{anchor}-facts",
            caption=f"Merge {name}: what was done",
        )
    ]
    if merge.trials:
        caption = f"Shares tried for {name}, and what was decided"
        blocks.append(Block("", "", table=_trials(merge), id=f"{anchor}-trials", caption=caption))
    if merge.targets:
        caption = f"Targets of {name}: layers that meet them"
        blocks.append(
            Block("Targets", TARGET_RULE, table=tally_table(merge), id=f"{anchor}-targets", caption=caption)
        )
    if merge.places:
        blocks += _layer_blocks(anchor, merge)
    return Part(anchor, f"Merge: {name}", (outcome_of(merge),), blocks)


def _layer_blocks(anchor: str, merge: Merge) -> Iterator[Block]:
    name = printable(merge.name)
    charts = [_by_layer(anchor, merge, one) for one in _names(merge) if one not in _UNDRAWN]
    yield Block(
        "Diagnostics by layer",
        _note(merge),
        [chart for chart in charts if chart.curves],
        diagnostics_table(merge),
        f"{anchor}-layers",
        f"Diagnostics of {name} by layer, targets in the head",
    )
    ways = dict.fromkeys(way for one in merge.places for way in one.attention_kl)
    if ways:
        yield Block(
            "Attention logits",
            "Mean KL divergence of a query's attention weights from the student's, by layer and KV group.",
            [_attention(anchor, merge, way) for way in ways],
            _attention_table(merge),
            f"{anchor}-attention",
            f"Attention KL of {name} by layer and KV group, nats",
            is_folded=True,
        )
    if any(one.mixer or one.ffn is not None for one in merge.places):
        yield Block(
            PROFILE,
            "The teacher's share α by layer: of the mixer by KV group (or K head), and of the FFN.",
            _profiles(anchor, merge),
            _profile_table(merge),
            f"{anchor}-profile",
            f"Teacher's shares α of {name} by layer and group",
            is_folded=True,
        )


def facts_table(merge: Merge) -> Table:
    """Return what was merged, how, and what came of it."""
    settings = ", ".join(f"{name} {value}" for name, value in merge.settings.items() if value is not None)
    protocol = ", ".join(f"{name} {value}" for name, value in merge.protocol.items() if value is not None)
    pairs = [
        ("teacher", merge.teacher),
        ("student", merge.student),
        ("outcome", "adopted" if merge.is_adopted else "not adopted"),
        ("why", merge.reason),
        ("recipe", settings),
        ("layers", _mapped(merge)),
        *((f"share of the {name}", f"{share:.4g}") for name, share in merge.shares.items()),
        *((_MEASURES.get(name, name), _full(figure)) for name, figure in merge.measures.items()),
        ("protocol", protocol),
    ]
    rows = [(Cell(printable(name)), Cell(printable(said, 1000))) for name, said in pairs if said]
    return Table(("what", "value"), rows, [None] * len(rows))


def _mapped(merge: Merge) -> str:
    return ", ".join(
        f"{one.layer}←{one.teacher_layer}" for one in merge.places if one.teacher_layer is not None
    )


def _trials(merge: Merge) -> Table:
    rows = [
        (
            Cell(printable(one.label, 200)),
            Cell(printable(one.half)),
            Cell(
                UNMEASURED if one.figure is None else figure_text(one.figure, "{:.5f}"),
                None if one.figure is None else one.figure.value,
            ),
            Cell("" if one.worst_end is None else f"{one.worst_end:.5f}", one.worst_end),
            Cell(printable(one.why, 500)),
        )
        for one in merge.trials
    ]
    columns = ("tried", "chunks that", "perplexity / student's", "worst end", "why unmeasured")
    return without_empty(Table(columns, rows, [None] * len(rows)), {"worst end", "why unmeasured"})


def _names(merge: Merge) -> list[str]:
    """Return the diagnostics that some place has, known ones first."""
    found = dict.fromkeys(name for one in merge.places for name in one.figures)
    return [name for name in _LABELS if name in found] + [name for name in found if name not in _LABELS]


def _by_layer(anchor: str, merge: Merge, name: str) -> Chart:
    places = {one.layer: one for one in merge.places if one.layer is not None}
    lines = {
        merge.name: {layer: one.figures.get(name) for layer, one in places.items()},
        LEAST_SQUARES: {layer: one.reference.get(name) for layer, one in places.items()},
    }
    curves = [curve_of(said, points) for said, points in lines.items() if any(points.values())]
    unit = next((one.figures[name].unit for one in places.values() if name in one.figures), "")
    marks = [_mark(one) for one in merge.targets if one.figure == name and one.low != one.high]
    title = _label(name)
    y = f"{title} ({unit})" if unit and unit not in title else title
    return Chart(f"{anchor}-{_anchor(name)}", "lines", f"{title} by layer", "layer", y, curves, marks)


def _mark(target: MergeTarget) -> Mark:
    said = "the pair's band" if target.is_band else "target"
    return Mark(f"{said}: {_bounds(target)}", target.low, target.high)


def _attention(anchor: str, merge: Merge, way: str) -> Chart:
    rows = [
        Curve(
            f"layer {one.layer}",
            [f"group {at}" for at in range(len(found))],
            [None if figure is None else figure.value for figure in found],
        )
        for one in merge.places
        if (found := one.attention_kl.get(way))
    ]
    return Chart(
        f"{anchor}-attention-{_anchor(way)}", "cells", f"attention KL, {_way(way)}", "", "nats", rows
    )


def _attention_table(merge: Merge) -> Table:
    most = max(len(found) for one in merge.places for found in one.attention_kl.values())
    rows = []
    for one in merge.places:
        for way, found in one.attention_kl.items():
            figures = [*found, *[None] * (most - len(found))]
            cells = [
                Cell(UNMEASURED) if kl is None else Cell(figure_text(kl, "{:.4g}"), kl.value)
                for kl in figures
            ]
            rows.append((_layer(one), Cell(_way(way)), *cells))
    columns = ("layer", "of", *(f"group {at}" for at in range(most)))
    return Table(columns, rows, [None] * len(rows))


def _way(way: str) -> str:
    return _WAYS.get(way, printable(way.replace("_", " ")))


def _profiles(anchor: str, merge: Merge) -> list[Chart]:
    layers = [one for one in merge.places if one.layer is not None]
    asked = [_shares(one, one.mixer, one.ffn) for one in layers]
    taken = [_shares(one, one.taken_mixer, one.taken_ffn) for one in layers]
    same = taken == asked
    says = PROFILE if same else "Merge profile as asked for"
    return [
        Chart(f"{anchor}-profile-map", "cells", says, "", "α", asked),
        *([] if same else [Chart(f"{anchor}-taken-map", "cells", TAKEN, "", "α", taken)]),
    ]


def _shares(layer: MergePlace, mixer: Sequence[float], ffn: float | None) -> Curve:
    names = [f"group {at}" for at in range(len(mixer))]
    shares: list[float | None] = list(mixer)
    return Curve(
        f"layer {layer.layer}",
        [*names, *([] if ffn is None else [_FFN])],
        [*shares, *([] if ffn is None else [ffn])],
    )


def _profile_table(merge: Merge) -> Table:
    rows = [
        (
            _layer(one),
            Cell(_listed(one.mixer)),
            _share(one.ffn),
            Cell(_listed(one.taken_mixer)),
            _share(one.taken_ffn),
        )
        for one in merge.places
        if one.layer is not None
    ]
    columns = ("layer", "α of the mixer, by group", "α of the FFN", "mixer as taken", "FFN as taken")
    return Table(columns, rows, [None] * len(rows))


def _layer(one: MergePlace) -> Cell:
    return Cell(_BEHIND) if one.layer is None else Cell(f"layer {one.layer}", one.layer)


def _listed(shares: Sequence[float]) -> str:
    return ", ".join(f"{share:.3g}" for share in shares)


def _share(share: float | None) -> Cell:
    return Cell("") if share is None else Cell(f"{share:.3g}", share)


def _judged(one: MergePlace, name: str) -> Cell:
    figure = one.figures.get(name)
    if figure is None:
        return Cell(UNMEASURED if one.layer is not None else "")
    text = figure_text(figure, "{:.4g}") if figure.low is not None else f"{figure.value:.4g}"
    if name not in one.met:
        return Cell(text, figure.value)
    outcome = one.met[name]
    said = {True: MET, False: NOT_MET, None: f"target {UNMEASURED}"}[outcome]
    return Cell(f"{text}: {said}", figure.value, said.replace(" ", "-") if outcome is not None else "")


def _head(name: str, target: MergeTarget | None) -> str:
    return _label(name) if target is None else f"{_label(name)} [{_bounds(target)}]"


def _bounds(target: MergeTarget) -> str:
    if target.low is not None and target.high is not None:
        return f"{target.low:.4g} … {target.high:.4g}"
    if target.low is not None:
        return f"≥ {target.low:.4g}"
    return UNMEASURED if target.high is None else f"≤ {target.high:.4g}"


def _label(name: str) -> str:
    return _LABELS.get(name, printable(name.replace("_", " ")))


def _anchor(name: str) -> str:
    return "".join(one if one.isascii() and one.isalnum() else "-" for one in name)


def _full(figure: Figure) -> str:
    return f"{figure_text(figure, '{:.5g}')} {figure.unit}".strip()


def _note(merge: Merge) -> str:
    """Return how the diagnostics were measured, and what was not."""
    said = ", ".join(f"{name} {value}" for name, value in merge.diagnosed.items() if value is not None)
    lost = dict.fromkeys(
        f"{_label(name)}: {why}" for one in merge.places for name, why in one.unmeasured.items()
    )
    missing = f" Unmeasured: {'; '.join(lost)}." if lost else ""
    return printable(f"Bars are intervals; a dashed line is a target. Measured on: {said}.{missing}", 2000)
