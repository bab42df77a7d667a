"""The gates of an artifact as written and read back: every shape, finite values, every layer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from bitsmith.errors import BitsmithError
from bitsmith.run.evaluation import Evaluation
from bitsmith.run.gate import BYTES_OVER_PLAN, FINITE, PPL, SHAPES, Gate, Judged
from bitsmith.run.sahc_layer import Cosine, LayerProbe, lowest
from bitsmith.store.checkpoint import Checkpoint


@dataclass(frozen=True)
class Gates:
    """The gates whose limits can be chosen; a `ppl_limit` of None is the usual one where that can judge."""

    cosine: Gate
    ppl_limit: float | None
    ppl_ratio: Gate

    def of_perplexity(self, found: Evaluation) -> list[Judged]:
        """Judge an evaluation's perplexity, and its ratio to the original's.

        Without a `ppl_limit` of its own the absolute limit is left out where the original does not pass it.
        Raises BitsmithError where the original does not pass the `ppl_limit` that was asked for.
        """
        gate = PPL if self.ppl_limit is None else replace(PPL, limit=self.ppl_limit)
        own, cand, ratio = found.ppl_ref, found.ppl_cand, found.ppl_ratio
        if gate.judge(own.value, low=own.low, high=own.high).passed:
            judged, said = [gate.judge(cand.value, low=cand.low, high=cand.high)], ""
        elif self.ppl_limit is None:
            judged = []
            said = (
                f"the original's own perplexity of {own.value:.2f} does not pass the limit of {gate.limit:g}"
            )
        else:
            raise BitsmithError(
                f"the original's own perplexity is {_interval(own.value, own.low, own.high)}, which does not "
                f"pass the limit of {gate.limit:g} that was asked for",
                path=found.reference.path,
            )
        return [*judged, self.ppl_ratio.judge(ratio.value, low=ratio.low, high=ratio.high, evidence=said)]


def artifact_gates(
    source: Checkpoint, written: Checkpoint, probe: LayerProbe, planned: int | None, cosine: Gate
) -> list[Judged]:
    """Judge a checkpoint that was written of `source`; `planned` bytes of tensors were promised (None: none).

    The layers' cosines are those of all weights of a layer as they are read back; the lowest is judged.
    """
    missing = [
        name for name, ref in source.items() if name not in written or written[name].shape != ref.shape
    ]
    said = f"{len(source) - len(missing)} of {len(source)} tensors have the source's shape"
    judged = [SHAPES.judge(len(missing), evidence=", ".join([said, *missing[:5]]))]
    broken = _not_finite(written)
    judged.append(FINITE.judge(broken, evidence=f"all values of {len(written)} tensors read"))
    if planned:
        actual = sum(ref.nbytes for ref in written.values())
        judged.append(BYTES_OVER_PLAN.judge(actual / planned, evidence=f"{actual} of {planned} bytes"))
    if missing or broken:
        return [*judged, cosine.judge(None, evidence="tensors are missing or not finite")]
    found = _layer_cosines(written, probe)
    least = lowest(found)
    said = f"the lowest of {len(found)} layers: {least.evidence}"
    return [*judged, cosine.judge(least.value, low=least.low, high=least.high, evidence=said)]


def _interval(value: float, low: float | None, high: float | None) -> str:
    return f"{value:.2f}" + ("" if low is None or high is None else f" ({low:.2f} … {high:.2f})")


def _not_finite(written: Checkpoint) -> int:
    count = 0
    for ref in written.values():
        for start, stop in ref.slices():
            count += int(np.count_nonzero(~np.isfinite(ref.read(start, stop))))
    return count


def _layer_cosines(written: Checkpoint, probe: LayerProbe) -> list[Cosine]:
    found = []
    for layer in range(probe.layers):
        probe.enter(layer)
        changed = {name: written[name].read() for name in probe.names()}
        found.append(probe.layer(changed))
    return found
