"""Rotation of the residual stream by a randomized Hadamard matrix: no channel keeps an outlier to itself.

With `Q` orthogonal every writer becomes `Qᵀ W`, every reader, the embedding and the head `W Q`; a root mean
square does not change under `Q`, so norms that act as one commute with it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from bitsmith.archs import Step, TensorSpec
from bitsmith.numerics.hadamard import Floats, RandomHadamard, hadamard_factor
from bitsmith.passes.transform import Context, Model, Transform, Vector, Vectors
from bitsmith.store.checkpoint import ComputedTensor, Rows, TensorRef

RESIDUAL = "residual"


class RotateColumns(Step):
    """`W -> W Q`, row by row; columns that are several copies of the axis side by side turn one by one."""

    changes_columns = True

    def __init__(self, rotation: RandomHadamard) -> None:
        self.rotation = rotation

    def apply(self, ref: TensorRef) -> TensorRef:
        """Return `W Q`."""
        return ComputedTensor(
            ref.name, ref.shape, ref.dtype, lambda start, stop: self.inputs(ref.read(start, stop))
        )

    def unapply(self, ref: TensorRef) -> TensorRef:
        """Return `W Qᵀ`."""
        backward = self.rotation.backward
        return ComputedTensor(
            ref.name, ref.shape, ref.dtype, lambda start, stop: self._each(ref.read(start, stop), backward)
        )

    def inputs(self, x: Floats) -> Floats:
        """Return `x Q`, as Q is its own `Q^-T`."""
        return self._each(x, self.rotation.forward)

    def importance(self, vector: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the mean of each copy of the axis: of the rotated E[x²] the old diagonal tells no more."""
        means = vector.reshape(-1, self.rotation.n).mean(axis=1, dtype=np.float64)
        return np.repeat(means.astype(np.float32), self.rotation.n)

    def importance_back(self, vector: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the mean of each copy of the axis, as `importance` does."""
        return self.importance(vector)

    def _each(self, rows: Floats, turn: Callable[[Floats], Floats]) -> Floats:
        n = self.rotation.n
        return turn(rows.reshape(*rows.shape[:-1], rows.shape[-1] // n, n)).reshape(rows.shape)


class RotateRows(Step):
    """`W -> Qᵀ W`, for a bias `b -> b Q`.

    Every row of the result needs all rows: the tensor is computed whole when it is first read and kept while
    its rows are read. One such tensor is held at a time in the process.
    """

    def __init__(self, rotation: RandomHadamard) -> None:
        self.rotation = rotation

    def apply(self, ref: TensorRef) -> TensorRef:
        """Return `Qᵀ W`."""
        whole = _Whole(ref, self.rotation.forward_first)
        return ComputedTensor(ref.name, ref.shape, ref.dtype, whole.read)

    def unapply(self, ref: TensorRef) -> TensorRef:
        """Return `Q W`."""
        whole = _Whole(ref, self.rotation.backward_first)
        return ComputedTensor(ref.name, ref.shape, ref.dtype, whole.read)


class Rotate(Transform):
    """A randomized Hadamard rotation of the residual axis, the same for the same seed."""

    name = "rotate"
    axis = RESIDUAL
    summary = "randomized Hadamard rotation of the residual axis"
    needs = ("untie", "drop-mtp", "fold")
    defaults: ClassVar = {"seed": 0}

    def refusal(self, model: Model) -> str | None:
        """Return why the rotation would not be exact: ties, MTP, a norm with a gain, or the hidden size."""
        return _refused_tensors(model) or _refused_size(model) or _refused_norm(model)

    def notes(self, model: Model) -> tuple[str, ...]:
        """Say that a vision tower's last layer turns too."""
        if not model.has("vision"):
            return ()
        return (
            "the vision merger is rotated too: an mmproj file made from the original checkpoint "
            "does not fit this model",
        )

    def vectors(self, model: Model, context: Context) -> dict[str, Vector]:
        """Return the signs of Q (`residual`), drawn from the seed."""
        del context
        return {RESIDUAL: RandomHadamard(_hidden(model), self.options["seed"]).signs}

    def steps(self, model: Model, vectors: Vectors) -> dict[str, Step]:
        """Return a step for every tensor that writes or reads the residual axis; norms stay."""
        if RESIDUAL not in vectors:
            return {}
        rotation = RandomHadamard(_hidden(model), signs=vectors[RESIDUAL])
        rows, columns = RotateRows(rotation), RotateColumns(rotation)
        return {spec.name: rows if spec.axes[0] == RESIDUAL else columns for spec in _turned(model)}


class _Whole:
    """A tensor that is computed in one piece and read by rows."""

    def __init__(self, ref: TensorRef, turn: Callable[[Floats], None]) -> None:
        self._ref, self._turn = ref, turn

    def read(self, start: int, stop: int) -> Rows:
        """Return rows `[start, stop)`."""
        return _HELD.read(self, start, stop)

    def computed(self) -> Rows:
        """Return all rows."""
        rows: Rows | None = None
        for start, stop in self._ref.slices():
            read = self._ref.read(start, stop)
            if rows is None:
                rows = np.empty(self._ref.shape, np.float64 if read.dtype == np.float64 else np.float32)
            rows[start:stop] = read
        if rows is None:
            return self._ref.read()
        self._turn(rows)
        return rows


class _Held:
    """The one tensor held whole; another takes its place, and it goes with the last reference to it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # computing may read another tensor of this kind
        self._kept: tuple[weakref.ref[_Whole], Rows] | None = None

    def read(self, whole: _Whole, start: int, stop: int) -> Rows:
        """Return a copy of rows `[start, stop)` of `whole`."""
        with self._lock:
            kept = self._kept
            if kept is None or kept[0]() is not whole:
                self._kept = kept = None  # the old rows go before the new ones come
                kept = weakref.ref(whole, self._drop), whole.computed()
                self._kept = kept
            return kept[1][start:stop].copy()

    def _drop(self, gone: weakref.ref[_Whole]) -> None:
        """Let the rows go; without the lock, as this may run in any thread and while another waits for it."""
        kept = self._kept
        if kept is not None and kept[0] is gone:
            self._kept = None


_HELD = _Held()


def _turned(model: Model) -> list[TensorSpec]:
    """Return the specs of what the rotation changes, in block order."""
    specs = [spec for spec, _ in model.tensors.values()]
    return [spec for spec in specs if spec.norm is None and RESIDUAL in (spec.axes[:1] + spec.axes[-1:])]


def _hidden(model: Model) -> int:
    return model.arch.number("hidden_size")


def _refused_tensors(model: Model) -> str | None:
    specs = [spec for spec, _ in model.tensors.values()]
    if model.arch.tied:
        embed = model.having("embed")[0].name
        return (
            f"{embed} is the output head too (tied), and only the head takes up the final norm: untie first"
        )
    if mtp := [spec.name for spec in specs if spec.component == "mtp"]:
        return (
            f"{len(mtp)} MTP tensors ({mtp[0]}, ...) read the state behind the final norm, "
            "whose weight is folded away: drop-mtp first"
        )
    merger = [spec for spec in _turned(model) if spec.component == "vision"]
    vision = [spec.name for spec in specs if spec.component == "vision"]
    if vision and not merger:
        return f"of {len(vision)} vision tensors ({vision[0]}, ...) none is known to write the residual axis"
    both = [s.name for s in _turned(model) if len(s.axes) > 1 and s.axes[0] == s.axes[-1]]
    return f"{both[0]} has the residual axis on both sides" if both else None


def _refused_size(model: Model) -> str | None:
    hidden = _hidden(model)
    if hadamard_factor(hidden) is not None:
        return None
    return f"hidden size {hidden} has no Hadamard matrix of a known construction"


def _refused_norm(model: Model) -> str | None:
    for spec, _ in model.tensors.values():
        if spec.norm is None or spec.axes != (RESIDUAL,):
            continue
        acts_as = model.ref(spec.name).read().astype(np.float64) + float(spec.norm == "1+w")
        if (acts_as != 1).any():
            least, most = acts_as.min(), acts_as.max()
            reason = f"{spec.name} still scales channels by {least:.4g} to {most:.4g}: fold first"
            return f"{reason}, after untie and drop-mtp" if spec.role == "norm.final" else reason
    return None
