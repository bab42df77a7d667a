"""What a merge's maps do, measured on held-out states of both models, with the targets beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from bitsmith.numerics.divergence import Estimate
from bitsmith.numerics.higher_order import Information, kurtosis_gap, pairwise_information
from bitsmith.numerics.resampling import ratio_of_sums
from bitsmith.numerics.threads import one_blas_thread
from bitsmith.passes.merge_heads import HeadMap
from bitsmith.passes.merge_maps import PairMoments, ResidualMap, ridge_map, transition_cost
from bitsmith.progress import Progress, silent
from bitsmith.run.evaluation import INTERVAL, Measure
from bitsmith.run.merge_alpha import PlaceFacts
from bitsmith.run.merge_attention import attention_kl, head_entropy
from bitsmith.run.merge_plan import MergePlan
from bitsmith.run.merge_trial import UNMEASURED, figure
from bitsmith.store.paired import CrossMoments, Paired

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

CHANNELS = 128
"""Channels of the student's stream that kurtosis and mutual information are taken of, evenly spread."""
_ENTROPY = "teacher_head_entropy"
_RANK = 1e-12
_BAND_TOKENS = 2  # in the moments for each of the teacher's dimensions, for the least-squares map to be one
_NO_INTERVAL = "of maps alone: held-out text does not enter"
_NO_LOGITS = "a DeltaNet layer has no attention logits"
_NO_TURNS = "these heads have no block rotations"
_ONE_CHUNK = "the held-out states are a single chunk"
_CONSTANT = "the channels do not vary"


@dataclass(frozen=True)
class Band:
    """Where a figure should lie; an end of None is open."""

    low: float | None
    high: float | None

    def holds(self, value: float) -> bool:
        """Tell whether a value lies within."""
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)


_TARGETS = {
    "transition_cost": Band(None, 0.1),
    "transition_cost_normalised": Band(None, 0.1),
    "variance_kept": Band(0.95, None),
    "cosine": Band(0.8, None),
}


@dataclass(frozen=True)
class PlaceDiagnostics:
    """Figures of one place: the states that enter a layer of the student, or its final norm.

    `figures` and the `reference`, the same by the least-squares map of this place, are by name; a list has
    one figure for each KV group (of `teacher_head_entropy`: each query head). `unmeasured` says by name why
    a figure is missing.
    """

    facts: Mapping[str, Any]
    figures: Mapping[str, Measure | list[Measure]]
    null: Measure
    reference: Mapping[str, Measure]
    unmeasured: Mapping[str, str]

    def to_json(self, bands: Mapping[str, Band | None]) -> dict[str, Any]:
        """Return the place as plain values, with what meets its target."""
        return {
            **self.facts,
            **{name: _plain(value) for name, value in self.figures.items()},
            "pairwise_mi_null": figure(self.null),
            "reference": {name: figure(value) for name, value in self.reference.items()},
            "met": self._met(bands),
            "unmeasured": dict(self.unmeasured),
        }

    def _met(self, bands: Mapping[str, Band | None]) -> dict[str, bool | None]:
        """Return by figure whether it meets its target; None where the target is unmeasured."""
        bounds = {name: bands.get(name, _TARGETS.get(name)) for name in (*_TARGETS, *bands)}
        figures = {name: value for name, value in self.figures.items() if isinstance(value, Measure)}
        return {
            name: None if band is None else band.holds(figures[name].value)
            for name, band in bounds.items()
            if name in figures
        }


@dataclass(frozen=True)
class MergeDiagnostics:
    """A merge's diagnostics: by layer of the student, and before the final norms.

    `bands` are the tolerances of kurtosis gap and mutual information, None where they are unmeasured.
    """

    protocol: Mapping[str, Any]
    bands: Mapping[str, Band | None]
    layers: tuple[PlaceDiagnostics, ...]
    final: PlaceDiagnostics

    def to_json(self) -> dict[str, Any]:
        """Return the diagnostics as plain values."""
        return {
            "kind": "merge-diagnostics",
            "targets": {name: _bounds(band) for name, band in _TARGETS.items()}
            | {name: None if band is None else asdict(band) for name, band in self.bands.items()},
            "protocol": dict(self.protocol),
            "layers": [one.to_json(self.bands) for one in self.layers],
            "final": self.final.to_json(self.bands),
        }


def merge_diagnostics(plan: MergePlan, *, progress: Progress = silent) -> MergeDiagnostics:
    """Measure a plan's maps and heads on the held-out states of its paired activations, layer by layer.

    `|T - I|` of the maps in front of and behind a layer; the share of the teacher's held-out energy within
    the map; the mean cosine of `x_t A` and `x_s`; of `CHANNELS` channels the gap in kurtosis and the mutual
    information of the two; KL of attention by KV group and the entropy of the teacher's heads; and the shares
    that the plan has. The tolerance of the gap and the information is what this pair of models shows by
    itself: the range, over all places, under each place's least-squares map. Intervals draw held-out chunks;
    a single one has none. Raises as `Paired.samples` and `attention_kl` do.
    """
    count = len(plan.layers)
    layers = []
    for number in range(count):
        progress("diagnostics", number, count + 1)
        layers.append(_layer(plan, number))
    progress("diagnostics", count, count + 1)
    final = _final(plan)
    progress("diagnostics", count + 1, count + 1)
    bands = {name: _band([*layers, final], name) for name in ("kurtosis_gap", "pairwise_mi")}
    return MergeDiagnostics(_protocol(plan.paired), bands, tuple(layers), final)


def _protocol(paired: Paired) -> dict[str, Any]:
    said = paired.manifest
    held = len(said.held_chunks)
    return {
        "text": said.text,
        "text_sha256": said.text_sha256,
        "ctx_tokens": said.ctx_tokens,
        "chunks": held,
        "tokens": held * said.ctx_tokens,
        "fit_tokens": said.fit_tokens,
        "channels": min(CHANNELS, said.student.hidden),
        "interval": INTERVAL if held > 1 else UNMEASURED,
    }


def _layer(plan: MergePlan, number: int) -> PlaceDiagnostics:
    merge, alpha = plan.layers[number], plan.alphas.layers[number]
    paired = plan.paired
    states = paired.samples("teacher", merge.teacher), paired.samples("student", number)
    seen = _place(merge.before, states, paired, paired.states(number))
    costs = transition_cost(merge.before, merge.after)
    names = "transition_cost", "transition_cost_normalised"
    figures: dict[str, Any] = {
        name: Measure(cost, "norm", None, None, None) for name, cost in zip(names, costs, strict=True)
    }
    unmeasured = dict.fromkeys((f"{name}.interval" for name in names), _NO_INTERVAL)
    kl, reasons = _attention(plan, number, states)
    facts = {
        "layer": number,
        "teacher_layer": merge.teacher,
        "kind": "full_attention" if isinstance(merge.heads, HeadMap) else "linear_attention",
        "map": merge.before.method,
        "heads": merge.heads.method,
        "alpha_mixer": alpha.groups(merge.heads.student.groups).tolist(),
        "alpha_ffn": alpha.ffn,
    }
    figures["certainty"] = _certainty(plan.facts[number].before)
    return replace(
        seen,
        facts=facts,
        figures={**figures, **seen.figures, **kl},
        unmeasured={**unmeasured, **seen.unmeasured, **reasons},
    )


def _final(plan: MergePlan) -> PlaceDiagnostics:
    paired = plan.paired
    states = (
        paired.samples("teacher", paired.manifest.teacher.layers),
        paired.samples("student", len(plan.layers)),
    )
    seen = _place(plan.final, states, paired, paired.final())
    certainty = _certainty(plan.end_facts[1])
    return replace(
        seen,
        facts={"map": plan.final.method, "alpha_head": plan.alphas.head},
        figures={**seen.figures, "certainty": certainty},
    )


def _certainty(facts: PlaceFacts) -> Measure:
    """Return what the rule for the shares takes for certain: an end of an interval, so without one."""
    return Measure(facts.certainty, "cosine", None, None, None)


def _attention(
    plan: MergePlan, number: int, states: tuple[Float32, Float32]
) -> tuple[dict[str, list[Measure]], dict[str, str]]:
    """Return the KL of attention and the teacher's heads' entropy by name, and why what is missing is."""
    merge = replace(plan.layers[number], alpha=plan.alphas.layers[number])
    names = {"teacher": "attention_kl"} | {
        part: f"attention_kl_{part}" for part in ("merged", "folded", "unturned")
    }
    if not isinstance(merge.heads, HeadMap):
        missing = *names.values(), _ENTROPY
        return {name: [] for name in missing}, dict.fromkeys(missing, _NO_LOGITS)
    found = vars(attention_kl(plan.teacher, plan.student, number, merge, states))
    measured = {name: [_measure(one, "nats") for one in found[part] or []] for part, name in names.items()}
    entropy = head_entropy(plan.teacher, merge.teacher, states[0])
    measured[_ENTROPY] = [_measure(one, "nats") for one in entropy]
    return measured, {} if found["unturned"] else {names["unturned"]: _NO_TURNS}


@one_blas_thread()
def _place(
    mapping: ResidualMap, states: tuple[Float32, Float32], paired: Paired, moments: CrossMoments
) -> PlaceDiagnostics:
    """Measure a map on held-out states (`chunks T D_t`, `chunks T D_s`)."""
    channels = _channels(states[1].shape[-1])
    unmeasured = {} if len(states[1]) > 1 else {"intervals": _ONE_CHUNK}
    fitted: Float64 | None = None
    if len(moments.tt) * _BAND_TOKENS > paired.manifest.fit_tokens:
        unmeasured["reference"] = (
            f"{paired.manifest.fit_tokens} tokens in the moments are too few for a least-squares map of "
            f"{len(moments.tt)} dimensions"
        )
    else:
        fitted = ridge_map(PairMoments(moments.tt, moments.ss, moments.ts)).forward[:, channels]
    seen = _Swept(mapping, fitted, channels, states)
    gap, information = seen.higher(seen.mapped)
    null = Measure(0.0, "nats", information.null_low, information.null_high, "95 % band of shifted tokens")
    reference = {} if seen.fitted is None else _named(*seen.higher(seen.fitted))
    if gap is None:
        unmeasured["kurtosis_gap"] = _CONSTANT
    figures = {
        "variance_kept": _measure(_ratio(seen.kept, seen.energy), "share"),
        "cosine": _measure(_ratio(seen.cosines, np.full(len(seen.cosines), states[1].shape[1])), "cosine"),
    }
    return PlaceDiagnostics({}, figures | _named(gap, information), null, reference, unmeasured)


class _Swept:
    """What is kept of held-out states, chunk by chunk: sums by chunk, and some channels of every token.

    `kept` and `energy` are the teacher's energy within the map and all of it, `cosines` the sums over tokens
    (0 for a token where one state is zero); `mapped`, `aim` and `fitted` are `chunks T K`.
    """

    def __init__(
        self,
        mapping: ResidualMap,
        fitted: Float64 | None,
        channels: NDArray[np.intp],
        states: tuple[Float32, Float32],
    ) -> None:
        basis, sizes, _ = linalg.svd(mapping.forward, full_matrices=False)
        basis = basis[:, sizes > _RANK * sizes[0]]
        shape = *states[1].shape[:2], len(channels)
        self.kept, self.energy, self.cosines = np.empty((3, len(states[1])))
        self.mapped, self.aim = np.empty(shape), states[1][..., channels]
        self.fitted = None if fitted is None else np.empty(shape)
        for chunk in range(shape[0]):
            x, y = (side[chunk].astype(np.float64) for side in states)
            mapped = x @ mapping.forward
            self.kept[chunk], self.energy[chunk] = ((x @ basis) ** 2).sum(), (x**2).sum()
            self.cosines[chunk] = _cosines(mapped, y).sum()
            self.mapped[chunk] = mapped[:, channels]
            if self.fitted is not None:
                self.fitted[chunk] = x @ fitted

    def higher(self, mapped: Float64) -> tuple[Estimate | None, Information]:
        """Return kurtosis gap and mutual information of mapped channels and the student's."""
        return kurtosis_gap(mapped, self.aim), pairwise_information(mapped, self.aim)


def _named(gap: Estimate | None, information: Information) -> dict[str, Measure]:
    found = {} if gap is None else {"kurtosis_gap": _measure(gap, "excess kurtosis")}
    return found | {"pairwise_mi": _measure(information.estimate, "nats")}


def _cosines(mapped: Float64, aim: Float64) -> Float64:
    """Return the cosine of each row; 0 where one is zero."""
    sizes = np.linalg.norm(mapped, axis=-1) * np.linalg.norm(aim, axis=-1)
    found: Float64 = np.divide((mapped * aim).sum(-1), sizes, out=np.zeros_like(sizes), where=sizes > 0)
    return found


def _ratio(top: Float64, bottom: NDArray[Any]) -> Estimate:
    return ratio_of_sums(top, bottom) or Estimate(0.0, None, None)


def _channels(width: int) -> NDArray[np.intp]:
    count = min(CHANNELS, width)
    return (np.arange(count, dtype=np.intp) * width) // count


def _band(places: Sequence[PlaceDiagnostics], name: str) -> Band | None:
    """Return the range of the reference's figures over all places, with their intervals."""
    found = [place.reference[name] for place in places if name in place.reference]
    if not found:
        return None
    ends = [(one.value, one.low, one.high) for one in found]
    known = [end for three in ends for end in three if end is not None]
    high = max(known) if name == "kurtosis_gap" else None  # there is no such thing as too much information
    return Band(min(known), high)


def _bounds(band: Band) -> dict[str, float]:
    ends = {"least": band.low, "most": band.high}
    return {name: end for name, end in ends.items() if end is not None}


def _measure(estimate: Estimate, unit: str) -> Measure:
    interval = None if estimate.low is None else INTERVAL
    return Measure(estimate.value, unit, estimate.low, estimate.high, interval)


def _plain(value: Measure | list[Measure]) -> Any:
    return [figure(one) for one in value] if isinstance(value, list) else figure(value)
