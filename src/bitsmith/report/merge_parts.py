"""A merge as a part of the page: what was decided, its diagnostics with targets beside them, its shares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from bitsmith.errors import printable
from bitsmith.report.charts import Block, Chart, Curve, Mark, Part, curve_of
from bitsmith.report.markdown import UNMEASURED
from bitsmith.report.study_json import Merge, MergeLayer, MergeTarget, Study
from bitsmith.report.study_tables import Cell, Table, figure_text, without_empty
from bitsmith.run.study_peers import Figure

MET, NOT_MET = "met", "not met"
PROFILE, TAKEN = "Merge profile", "Merge profile as taken"
TARGET_RULE = (
    "A target is met where the worse end of the interval meets it, or the value where no interval was "
    "measured."
)

_LABELS = {
    "transition_cost": "transition cost ‖T − I‖",
    "transition_cost_normalised": "transition cost / √D",
    "variance_kept": "variance kept",
    "cosine": "cosine of mapped and own states",
    "certainty": "certainty",
    "kurtosis_gap": "kurtosis gap",
    "pairwise_mi": "pairwise mutual information",
}
_ATTENTION_KL = "attention_kl"
_FFN = "FFN"
_TAKEN_WAY = "merged"
_WAYS = {
    "teacher": "the teacher's heads on its own states",
    "merged": "the layer as merged",
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


def met(figure: Figure | None, target: MergeTarget) -> str:
    """Return whether a figure's worse end lies within a target: `met`, `not met`, `unmeasured`."""
    if figure is None:
        return UNMEASURED
    low = figure.value if figure.low is None else figure.low
    high = figure.value if figure.high is None else figure.high
    above = target.low is None or low > target.low
    return MET if above and (target.high is None or high < target.high) else NOT_MET


def diagnostics_table(merge: Merge) -> Table:
    """Return a row per layer: its diagnostics, each with whether its target is met."""
    names = _names(merge)
    targets = {one.figure: one for one in merge.targets}
    columns = ["layer", "teacher's", "kind", *(_head(name, targets.get(name)) for name in names)]
    rows = [
        (
            Cell(str(one.layer), one.layer),
            Cell("" if one.teacher_layer is None else str(one.teacher_layer), one.teacher_layer),
            Cell(printable(one.kind)),
            *(_judged(one.figures.get(name), targets.get(name)) for name in names),
        )
        for one in merge.layers
    ]
    if merge.final:
        behind = (Cell("behind all layers"), Cell(""), Cell(""))
        rows.append((*behind, *(_judged(merge.final.get(name), targets.get(name)) for name in names)))
    return Table(tuple(columns), rows, [None] * len(rows))


def tally_table(merge: Merge) -> Table:
    """Return a row per target: on how many layers it is met, not met, unmeasured."""
    rows = []
    for target in merge.targets:
        found = [met(figure, target) for figure in _figures(merge, target.figure)]
        counts = [found.count(word) for word in (MET, NOT_MET, UNMEASURED)]
        rows.append(
            (
                Cell(_label(target.figure)),
                Cell(_bounds(target)),
                *(Cell(str(count), count) for count in counts),
                Cell(printable(target.words, 500)),
            )
        )
    columns = ("diagnostic", "target", MET, NOT_MET, UNMEASURED, "where the target is from")
    return Table(columns, rows, [None] * len(rows))


def _part(anchor: str, merge: Merge) -> Part:
    blocks = [
        Block("", "", table=_facts(merge), id=f"{anchor}-facts", caption=f"Merge {merge.name}: what was done")
    ]
    if merge.trials:
        caption = f"Shares tried for {merge.name}, and what was decided"
        blocks.append(Block("", "", table=_trials(merge), id=f"{anchor}-trials", caption=caption))
    if merge.targets:
        caption = f"Targets of {merge.name}: layers that meet them"
        blocks.append(
            Block("Targets", TARGET_RULE, table=tally_table(merge), id=f"{anchor}-targets", caption=caption)
        )
    if merge.layers:
        blocks += _layer_blocks(anchor, merge)
    return Part(anchor, f"Merge: {printable(merge.name)}", (outcome_of(merge),), blocks)


def _layer_blocks(anchor: str, merge: Merge) -> Iterator[Block]:
    charts = [_by_layer(anchor, merge, name) for name in _names(merge)]
    yield Block(
        "Diagnostics by layer",
        "Bars are intervals; a dashed line is a target. " + "; ".join(_intervals(merge)),
        [chart for chart in charts if chart.curves],
        diagnostics_table(merge),
        f"{anchor}-layers",
        f"Diagnostics of {merge.name} by layer, targets in the head",
    )
    ways = dict.fromkeys(way for one in merge.layers for way in one.attention_kl)
    if ways:
        yield Block(
            "Attention logits",
            "Mean KL divergence of a query's attention weights from the student's, by layer and KV group.",
            [_attention(anchor, merge, way) for way in ways],
            _attention_table(merge),
            f"{anchor}-attention",
            f"Attention KL of {merge.name} by layer and KV group, nats",
            is_folded=True,
        )
    if any(one.mixer or one.ffn is not None for one in merge.layers):
        yield Block(
            PROFILE,
            "The teacher's share α by layer: of the mixer by KV group (or K head), and of the FFN.",
            _profiles(anchor, merge),
            _profile_table(merge),
            f"{anchor}-profile",
            f"Teacher's shares α of {merge.name} by layer and group",
            is_folded=True,
        )


def _facts(merge: Merge) -> Table:
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
        *((name.replace("_", " "), _full(figure)) for name, figure in merge.measures.items()),
        ("protocol", protocol),
    ]
    rows = [(Cell(printable(name)), Cell(printable(said, 1000))) for name, said in pairs if said]
    return Table(("what", "value"), rows, [None] * len(rows))


def _mapped(merge: Merge) -> str:
    return ", ".join(
        f"{one.layer}←{one.teacher_layer}" for one in merge.layers if one.teacher_layer is not None
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
    """Return the diagnostics that some layer has or that have a target, known ones first."""
    found = dict.fromkeys(name for one in merge.layers for name in one.figures)
    found |= dict.fromkeys(name for name in merge.final if name not in found)
    targets = {one.figure for one in merge.targets if one.figure != _ATTENTION_KL}
    known = [name for name in _LABELS if name in found or name in targets]
    return known + [name for name in found if name not in _LABELS]


def _figures(merge: Merge, name: str) -> list[Figure | None]:
    if name == _ATTENTION_KL:
        return [figure for one in merge.layers for figure in one.attention_kl.get(_TAKEN_WAY, ())]
    return [one.figures.get(name) for one in merge.layers]


def _by_layer(anchor: str, merge: Merge, name: str) -> Chart:
    points = {one.layer: one.figures.get(name) for one in merge.layers}
    unit = next((one.unit for one in points.values() if one is not None and one.unit), "")
    curves = [curve_of(merge.name, points)] if any(one is not None for one in points.values()) else []
    marks = [
        Mark(f"target: {_bounds(one)}", one.low, one.high) for one in merge.targets if one.figure == name
    ]
    title = _label(name)
    y = f"{title} ({unit})" if unit and unit not in title else title
    return Chart(f"{anchor}-{_anchor(name)}", "lines", f"{title} by layer", "layer", y, curves, marks)


def _attention(anchor: str, merge: Merge, way: str) -> Chart:
    rows = [
        Curve(
            f"layer {one.layer}",
            [f"group {at}" for at in range(len(found))],
            [None if figure is None else figure.value for figure in found],
        )
        for one in merge.layers
        if (found := one.attention_kl.get(way))
    ]
    return Chart(
        f"{anchor}-attention-{_anchor(way)}", "cells", f"attention KL, {_way(way)}", "", "nats", rows
    )


def _attention_table(merge: Merge) -> Table:
    most = max(len(found) for one in merge.layers for found in one.attention_kl.values())
    rows = []
    for one in merge.layers:
        for way, found in one.attention_kl.items():
            figures = [*found, *[None] * (most - len(found))]
            cells = [Cell(figure_text(figure, "{:.4g}"), figure and figure.value) for figure in figures]
            rows.append((Cell(f"layer {one.layer}", one.layer), Cell(_way(way)), *cells))
    columns = ("layer", "of", *(f"group {at}" for at in range(most)))
    return Table(columns, rows, [None] * len(rows))


def _way(way: str) -> str:
    return _WAYS.get(way, printable(way.replace("_", " ")))


def _profiles(anchor: str, merge: Merge) -> list[Chart]:
    asked = [_shares(one, one.mixer, one.ffn) for one in merge.layers]
    taken = [_shares(one, one.taken_mixer, one.taken_ffn) for one in merge.layers]
    same = taken == asked or not any(one.y for one in taken)
    says = PROFILE if same else "Merge profile by the rule"
    return [
        Chart(f"{anchor}-profile-map", "cells", says, "", "α", asked),
        *([] if same else [Chart(f"{anchor}-taken-map", "cells", TAKEN, "", "α", taken)]),
    ]


def _shares(layer: MergeLayer, mixer: Sequence[float], ffn: float | None) -> Curve:
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
            Cell(f"layer {one.layer}", one.layer),
            Cell(_listed(one.mixer)),
            _share(one.ffn),
            Cell(_listed(one.taken_mixer)),
            _share(one.taken_ffn),
        )
        for one in merge.layers
    ]
    columns = ("layer", "α of the mixer, by group", "α of the FFN", "mixer as taken", "FFN as taken")
    return Table(columns, rows, [None] * len(rows))


def _listed(shares: Sequence[float]) -> str:
    return ", ".join(f"{share:.3g}" for share in shares)


def _share(share: float | None) -> Cell:
    return Cell("") if share is None else Cell(f"{share:.3g}", share)


def _judged(figure: Figure | None, target: MergeTarget | None) -> Cell:
    if figure is None:
        return Cell(UNMEASURED, mark="UNMEASURED" if target else "")
    text = figure_text(figure, "{:.4g}")
    if target is None:
        return Cell(text, figure.value)
    said = met(figure, target)
    return Cell(f"{text}: {said}", figure.value, said.replace(" ", "-"))


def _head(name: str, target: MergeTarget | None) -> str:
    return _label(name) if target is None else f"{_label(name)} [{_bounds(target)}]"


def _bounds(target: MergeTarget) -> str:
    if target.low is not None and target.high is not None:
        return f"{target.low:.4g} … {target.high:.4g}"
    if target.low is not None:
        return f"> {target.low:.4g}"
    return UNMEASURED if target.high is None else f"< {target.high:.4g}"


def _label(name: str) -> str:
    if name == _ATTENTION_KL:
        return "attention KL"
    return _LABELS.get(name, printable(name.replace("_", " ")))


def _anchor(name: str) -> str:
    return "".join(one if one.isascii() and one.isalnum() else "-" for one in name)


def _full(figure: Figure) -> str:
    return f"{figure_text(figure, '{:.5g}')} {figure.unit}".strip()


def _intervals(merge: Merge) -> list[str]:
    figures = (figure for one in merge.layers for figure in one.figures.values())
    kinds: Mapping[str, None] = dict.fromkeys(one.interval for one in figures if one.interval)
    return [printable(f"{kind}.", 300) for kind in kinds if kind != UNMEASURED]
