"""A wide teacher's FFN neurons brought to a student's width, matched by what they do on the same tokens.

A neuron is a row of gate and up and a column of down; its activation `SiLU(gate) up` is what down reads.
`cross` is E[h_t h_s] (`n_t n_s`), `power` E[h²] of each (`n_t`, `n_s`). Neurons keep their form: gate and up
are nonlinear in their rows, so rows are only selected; what else is kept goes into the columns of down.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bitsmith.errors import BitsmithError
from bitsmith.numerics.threads import one_blas_thread
from bitsmith.passes.merge_axes import AxisMap, Index, best_matches, correlations, sparse_mixing

Float64 = NDArray[np.float64]

RIDGE = 1e-6


def matched_neurons(cross: Float64, teacher_power: Float64, student_power: Float64) -> AxisMap:
    """Return for each student neuron the teacher's whose activation correlates best, each taken once.

    The sum of `E[h_t h_s] / √(E[h_t²] E[h_s²])` is largest; a neuron that acts against the student's counts
    as its opposite, as SiLU has no sign to turn. Raises BitsmithError for fewer neurons than the student has.
    """
    return AxisMap.selecting(best_matches(correlations(cross, teacher_power, student_power)), "ffn.match")


def strongest_neurons(
    cross: Float64, teacher_power: Float64, student_power: Float64, importance: Float64
) -> AxisMap:
    """Return the teacher's most important neurons (`importance`, `n_t`), in the places that match best.

    For importance take what a neuron adds to the stream, `E[h²] |W_down[:, i]|²`. Raises as
    `matched_neurons`.
    """
    count = cross.shape[1]
    if len(importance) < count:
        raise BitsmithError(f"{len(importance)} neurons of the teacher cannot fill the student's {count}")
    kept = np.sort(np.argsort(-importance, kind="stable")[:count])
    score = correlations(cross[kept], teacher_power[kept], student_power)
    return AxisMap.selecting(kept[best_matches(score)], "ffn.importance")


@one_blas_thread()
def with_rest_solved(chosen: AxisMap, moment: Float64, ridge: float = RIDGE) -> AxisMap:
    """Return the selection with the neurons left out folded into down by least squares.

    `h_t ≈ h_S Mᵀ`, `M = C[:, S] (C[S, S] + λ)⁻¹` with C the teacher's E[h hᵀ] (`n_t n_t`): down reads
    `W M`. `ridge` is λ as a share of the mean power. Selected neurons keep their own columns exactly. Raises
    BitsmithError for a moment that is not kept whole.
    """
    kept: Index = chosen.producing
    _expect_whole(moment)
    inner = moment[np.ix_(kept, kept)]
    unit = float(np.trace(inner)) / len(inner)
    damped = inner + ridge * (unit if unit > 0 else 1.0) * np.eye(len(inner))
    mixing = np.linalg.solve(damped, moment[:, kept].T).T
    mixing[kept] = np.eye(len(kept))
    return AxisMap(kept, mixing, f"{chosen.method}+solve")


def with_rest_tied(chosen: AxisMap, moment: Float64) -> AxisMap:
    """Return the selection with each neuron left out tied to the kept one that it correlates with most.

    Its column of down is added to that neuron's, times `E[h_d h_k] / E[h_k²]`; none where nothing correlates.
    Raises BitsmithError for a moment that is not kept whole.
    """
    kept: Index = chosen.producing
    _expect_whole(moment)
    power = np.diagonal(moment)
    dropped = np.setdiff1d(np.arange(len(power)), kept)
    among = np.abs(correlations(moment[np.ix_(dropped, kept)], power[dropped], power[kept]))
    best = among.argmax(1) if dropped.size else np.empty(0, np.intp)
    partner = power[kept[best]]
    factor = np.divide(moment[dropped, kept[best]], partner, out=np.zeros(dropped.size), where=partner > 0)
    rows = np.concatenate([kept, dropped])
    columns = np.concatenate([np.arange(len(kept)), best])
    values = np.concatenate([np.ones(len(kept)), factor])
    mixing = sparse_mixing(values, rows, columns, (len(power), len(kept)))
    return AxisMap(kept, mixing, f"{chosen.method}+tie")


def _expect_whole(moment: Float64) -> None:
    if moment.ndim != 2:
        raise BitsmithError(
            f"the neurons' second moment is kept as {moment.shape}: what is left out needs all of it"
        )
