"""Which of a deep teacher's layers a student's layer takes its weights from.

Student layer i takes teacher layer `m(i)`, increasing in i and of the same kind (attention, DeltaNet). Layers
that do nothing have an input like that of the layer after them; only their updates (output minus input) tell
them apart, so both are compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitsmith.errors import BitsmithError, printable
from bitsmith.numerics.threads import one_blas_thread

Float64 = NDArray[np.float64]

_TIES = 1e-9


@one_blas_thread()
def cka_matrix(teacher: Iterable[NDArray[Any]], student: Sequence[NDArray[Any]]) -> Float64:
    """Return the linear centred kernel alignment (`L_t L_s`, at most 1) of every teacher and student layer.

    `⟨K, L⟩ / (|K| |L|)` of both kernels `X Xᵀ`, debiased: centred with their diagonals left out, so that
    of unrelated activations it is 0 in the mean also where tokens are fewer than columns (Székely & Rizzo
    2014, Nguyen et al. 2021). 0 where one does not vary; with fewer than 4 tokens biased. Layers are `N D`
    each, of the same tokens; the teacher's are taken one at a time. Memory is N² per student layer. Raises
    BitsmithError for layers of other numbers of tokens.
    """
    grams = [_gram(layer) for layer in student]
    rows = []
    for layer in teacher:
        gram = _gram(layer)
        if any(one.shape != gram.shape for one in grams):
            raise BitsmithError("layers to compare hold different numbers of tokens")
        rows.append([float(np.vdot(gram, one)) for one in grams])
    return np.asarray(rows, np.float64).reshape(len(rows), len(grams))


def proportional_layers(teacher: Sequence[str], student: Sequence[str]) -> tuple[int, ...]:
    """Return the increasing map nearest to `m(i) = i (L_t - 1) / (L_s - 1)` among layers of the same kind.

    `teacher` and `student` list the layers' kinds. Raises as `monotone_layers` does.
    """
    wide, narrow = len(teacher), len(student)
    aim = np.arange(narrow) * ((wide - 1) / max(narrow - 1, 1))
    # halves go to the even neighbour, as in round()
    lean = 1e-6 * np.where(np.arange(wide) % 2, 1.0, 0.0)
    return monotone_layers(-np.abs(np.arange(wide)[:, None] - aim) - lean[:, None], teacher, student)


def monotone_layers(similarity: Float64, teacher: Sequence[str], student: Sequence[str]) -> tuple[int, ...]:
    """Return the increasing map m of same-kind layers that maximises `Σ_i similarity[m(i), i]`.

    By dynamic programming over (`L_t L_s`); of equals, the earlier teacher layer. Raises BitsmithError where
    no such map exists, as for a teacher with fewer layers of a kind.
    """
    wide, narrow = similarity.shape
    if (wide, narrow) != (len(teacher), len(student)):
        raise BitsmithError(
            f"similarity has shape {similarity.shape} for {len(teacher)} and {len(student)} layers"
        )
    same = np.array([[a == b for b in student] for a in teacher]).reshape(wide, narrow)
    score = np.where(same & np.isfinite(similarity), similarity, -np.inf)
    best = np.full((wide + 1, narrow + 1), -np.inf)  # best[t, s]: s student layers within the first t
    best[:, 0] = 0.0
    for t in range(wide):
        taken = best[t, :-1] + score[t]
        best[t + 1, 1:] = np.where(taken > best[t, 1:] + _TIES, taken, best[t, 1:])
    if not np.isfinite(best[wide, narrow]):
        kinds = ", ".join(f"{student.count(k)} {printable(k)}" for k in sorted(set(student)))
        raise BitsmithError(
            f"the teacher's {wide} layers hold no increasing choice of the student's {narrow} ({kinds})"
        )
    return _path(best, narrow)


def layer_similarity(states: Float64, updates: Float64, share: float = 0.5) -> Float64:
    """Return `share` of the layers' likeness by their updates and the rest by their states (`L_t L_s`)."""
    return share * updates + (1 - share) * states


def _path(best: Float64, narrow: int) -> tuple[int, ...]:
    """Return the layers at which the table's last entry was made."""
    path: list[int] = []
    t, s = len(best) - 1, narrow
    while s:
        if best[t - 1, s] != best[t, s]:
            path.append(t - 1)
            s -= 1
        t -= 1
    return tuple(reversed(path))


def _gram(layer: NDArray[Any]) -> NDArray[np.float32]:
    """Return `X Xᵀ` (`N N`), U-centred and divided by its Frobenius norm; zeros for what is constant."""
    x = layer.astype(np.float64)
    x = x - x.mean(0)
    gram = _u_centred(x @ x.T) if len(x) > 3 else x @ x.T
    size, seen = float(np.linalg.norm(gram)), float(np.square(layer.astype(np.float64)).sum())
    if size <= 1e-12 * seen:
        return np.zeros(gram.shape, np.float32)
    normed: NDArray[np.float32] = (gram / size).astype(np.float32)
    return normed


def _u_centred(gram: Float64) -> Float64:
    """Return a kernel without its diagonal, from which the bias comes, and with the rest of it centred."""
    count = len(gram)
    np.fill_diagonal(gram, 0.0)
    rows = gram.sum(0)
    gram -= (rows[:, None] + rows) / (count - 2)
    gram += rows.sum() / ((count - 1) * (count - 2))
    np.fill_diagonal(gram, 0.0)
    return gram
