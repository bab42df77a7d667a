"""The teacher's shares that a merge ends with: chosen on half of the held-out chunks, judged on the others.

Whatever is chosen is written only if it is no worse than the student on chunks that did not choose it, by the
worse end of two 95 % intervals of the perplexity's ratio: the paired bootstrap over chunks, and Student's t
over at most ten stretches of the text, which is wider where few chunks or few subjects say so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from bitsmith.errors import BitsmithError, DamagedFileError, OutputError
from bitsmith.passes.merge_fold import MergedView
from bitsmith.run.evaluation import Protocol
from bitsmith.run.merge_recipe import Alphas
from bitsmith.run.merge_sweep import sweep
from bitsmith.run.merge_text import MOST_SHARED
from bitsmith.run.merge_trial import HeldOut, Kept, TrialMeasure

Half = Literal["choose", "judge"]

FACTORS = (1.0, 0.5, 0.25, 0.125, 0.0625)
"""What the rule's shares are multiplied by until they help."""
RULED_OUT = "the shares asked for are 0 everywhere: by the rule the map is too poor; the student is kept"
NO_HELP = "no share that was tried is better than the student on the chunks that choose; the student is kept"
REPEATS = (
    "the held-out text repeats itself or what is paired ({:.0%}): it judges nothing; the student is kept"
)
STRETCHES = 10
_ALL, _HEAD = "the shares asked for", "the head's share alone"
_TAIL = 0.975


@dataclass(frozen=True)
class Tried:
    """One set of shares on one half; `measure` is None where `refused` says why there is none."""

    label: str
    half: Half
    alphas: Alphas
    measure: TrialMeasure | None
    refused: str = ""

    @property
    def nll(self) -> float:
        """Mean over chunks in nats; infinite where the model gave no numbers."""
        return float("inf") if self.measure is None else float(self.measure.nll.mean())

    @property
    def worst(self) -> float:
        """The worse end of the perplexity over the student's, its value where there is no interval."""
        if self.measure is None:
            return float("inf")
        end = worst_end(self.measure)
        return self.measure.ppl_over_student.value if end is None else end

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values; those that judge tell their worse end."""
        found: dict[str, Any] = {"label": self.label, "half": self.half, "alphas": self.alphas.to_json()}
        if self.measure is None:
            return found | {"refused": self.refused}
        if self.half == "judge":
            found["worst_end"] = worst_end(self.measure)
        return found | self.measure.to_json()


@dataclass(frozen=True)
class Decision:
    """What is written and why: `alphas` of none at all is the student itself.

    `factor` multiplies the shares that were asked for; None where a sweep moved them apart, or where only the
    head's was kept.
    """

    adopted: bool
    alphas: Alphas
    factor: float | None
    reason: str
    tried: tuple[Tried, ...]

    def whole(self, student: TrialMeasure) -> TrialMeasure | None:
        """Return the measure of what is written on all chunks, those that chose it included.

        `student` is the student's; None where what is written gives no numbers.
        """
        if not self.adopted:
            return student
        found = {one.half: one.measure for one in self.tried if one.alphas == self.alphas}
        choose, judge = found.get("choose"), found.get("judge")
        if choose is None or judge is None:
            return None
        nll = _interleaved(choose.nll, judge.nll)
        paired = choose.kld is not None and judge.kld is not None
        return replace(student, nll=nll, kld=_interleaved(choose.kld, judge.kld) if paired else None)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "adopted": self.adopted,
            "factor": self.factor,
            "reason": self.reason,
            "trials": [one.to_json() for one in self.tried],
        }


def worst_end(measure: TrialMeasure) -> float | None:
    """Return the upper end of the perplexity over the student's, the larger of both intervals'.

    None where it is unmeasured, as for a single chunk.
    """
    ends = [measure.ppl_over_student.high, stretched_end(measure.nll - measure.student_nll)]
    return None if None in ends else max(end for end in ends if end is not None)


def stretched_end(differences: NDArray[np.float64]) -> float | None:
    """Return the upper end of exp(mean difference) by Student's t over stretches of neighbouring chunks.

    `differences` (`chunks`) are in nats, in the order of the text. Chunks of one document are alike; a mean
    over stretches does not take them for independent. None for a single chunk.
    """
    if len(differences) < 2:
        return None
    parts = np.array_split(differences, min(STRETCHES, len(differences)))
    means = np.array([part.mean() for part in parts])
    half = float(stdtrit(len(means) - 1, _TAIL)) * float(means.std(ddof=1)) / len(means) ** 0.5
    return float(np.exp(differences.mean() + half))


class Bench:
    """Measures shares on the halves of held-out chunks, each once: what a killed run measured is `kept`."""

    def __init__(
        self, trial: HeldOut, view: Callable[[Alphas], MergedView], kept: Kept | None = None
    ) -> None:
        choose, judge = trial.split()
        self._halves: dict[Half, HeldOut] = {"choose": choose, "judge": judge}
        self._view, self._kept = view, kept
        self.tried: list[Tried] = []

    def try_out(self, label: str, alphas: Alphas, half: Half = "choose") -> Tried:
        """Measure shares on a half; a model that gives NaN or infinity counts as infinitely bad."""
        name = f"trial {half} {_digest(alphas)}"
        found = None if self._kept is None else self._kept.entries.get(name)
        if found is None:
            found = self._measured(alphas, half)
            if self._kept is not None:
                self._kept.add(name, found)
        self.tried.append(Tried(label, half, alphas, self._read(found, half), found.get("refused", "")))
        return self.tried[-1]

    def student(self) -> TrialMeasure:
        """Return the student's own measure on the chunks that choose."""
        return self._halves["choose"].student

    def student_as_tried(self, nothing: Alphas) -> Tried:
        """Return the student as shares of none at all."""
        return Tried("the student", "choose", nothing, self.student())

    def protocol(self, half: Half) -> Protocol:
        """Return how a half is measured."""
        return self._halves[half].protocol

    def _measured(self, alphas: Alphas, half: Half) -> dict[str, Any]:
        try:
            measure = self._halves[half].measure(self._view(alphas))
        except (DamagedFileError, OutputError):
            raise
        except BitsmithError as error:
            return {"refused": error.message}
        return {
            "nll": measure.nll.tolist(),
            "kld": None if measure.kld is None else measure.kld.tolist(),
        }

    def _read(self, found: dict[str, Any], half: Half) -> TrialMeasure | None:
        if "refused" in found:
            return None
        kld = None if found["kld"] is None else np.array(found["kld"])
        own = self._halves[half]
        return TrialMeasure(np.array(found["nll"]), own.student.nll, kld, own.protocol)


def decide(
    bench: Bench,
    alphas: Alphas,
    *,
    factors: Sequence[float] = FACTORS,
    sweep_budget: int | None = None,
    ends: bool = True,
    apart: bool = True,
    fallback: bool = True,
    repeated: float = 0.0,
) -> Decision:
    """Return what of `alphas` is written.

    Of the shares times each of the falling `factors`, and (`apart`) of the head's alone, those with the best
    worse end on the chunks that choose, as it is the worse end that judges; with `sweep_budget`
    so many further trials move single shares from there (`ends`: those of embedding and head too). What is
    chosen is judged once, on the other chunks. Without `fallback` it is written whatever they say, and shares
    that are not swept are taken as they were asked for. Chunks that judge are no judges where more than half
    of them, `repeated`, is in what was seen before.
    """
    nothing = alphas.scaled(0.0)
    if fallback and repeated > MOST_SHARED:
        return Decision(False, nothing, 0.0, REPEATS.format(repeated), ())
    if alphas.is_zero and sweep_budget is None:
        return Decision(False, nothing, 0.0, RULED_OUT, ())
    if not fallback and sweep_budget is None:
        factors = (1.0,)
    best, factor = _backed_off(bench, _ALL, alphas, factors)
    if apart and alphas.head > 0 and alphas != alphas.head_alone:
        head, _ = _backed_off(bench, _HEAD, alphas.head_alone, factors)
        if best is None or (head is not None and head.worst < best.worst):
            best, factor = head, None
    if sweep_budget is not None:
        start = _least(best, bench.student_as_tried(nothing))
        best = sweep(start, bench.try_out, sweep_budget, ends)
        factor = factor if best.alphas is start.alphas else None
    if best is None or best.alphas.is_zero or (fallback and best.nll >= _mean(bench.student().nll)):
        return Decision(False, nothing, 0.0, NO_HELP, tuple(bench.tried))
    judged = bench.try_out(best.label, best.alphas, "judge")
    end = None if judged.measure is None else worst_end(judged.measure)
    good = end is not None and end <= 1
    said = _verdict(judged, end, good, bench.protocol("judge").chunks)
    if good or not fallback:
        said += "" if good else "; written all the same, as no fallback was asked for"
        return Decision(True, best.alphas, factor, said, tuple(bench.tried))
    return Decision(False, nothing, 0.0, f"{said}: the student is kept", tuple(bench.tried))


def _backed_off(
    bench: Bench, said: str, alphas: Alphas, factors: Sequence[float]
) -> tuple[Tried | None, float | None]:
    """Return the best of the shares times falling factors; ends when less no longer helps."""
    best: Tried | None = None
    found: float | None = None
    for factor in () if alphas.is_zero else factors:
        tried = bench.try_out(f"{factor:g} × {said}", alphas.scaled(factor))
        if best is None or tried.worst < best.worst:
            best, found = tried, factor
        elif best.nll < _mean(bench.student().nll):
            break
    return best, found


def _interleaved(even: Any, odd: Any) -> NDArray[np.float64]:
    """Return the values of all chunks in the order of the text."""
    whole = np.empty(len(even) + len(odd))
    whole[::2], whole[1::2] = even, odd
    return whole


def _least(one: Tried | None, other: Tried) -> Tried:
    return other if one is None or other.nll <= one.nll else one


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean())


def _verdict(judged: Tried, end: float | None, good: bool, chunks: int) -> str:
    if judged.measure is None:
        return f"on the {chunks} chunks that judge it gives no numbers: {judged.refused}"
    ratio = judged.measure.ppl_over_student.value
    found = f"perplexity over the student's is {ratio:.5f} on the {chunks} chunks that judge"
    if end is None:
        return f"{found}, its interval unmeasured"
    return f"{found}, at worst {end:.5f}, {'no more' if good else 'more'} than 1"


def _digest(alphas: Alphas) -> str:
    return hashlib.sha256(json.dumps(alphas.to_json()).encode()).hexdigest()[:16]
