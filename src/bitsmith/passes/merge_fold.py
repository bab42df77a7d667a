"""Teacher weights folded into a student's shapes, and mixed with the student's own: W = α W' + (1 - α) W_s.

With a residual map `x_t A ≈ x_s`, `x_s Bᵀ ≈ x_t` a matrix that reads the stream becomes `W' = c W diag(γ) B`,
γ the gain of the norm in front and c what RMSNorm loses by the width; one that writes it `W' = Aᵀ W`, the
embedding `E' = E A`. Rows and columns on inner axes (heads, neurons) go by their maps. Where a norm has a
reader with α > 0, all its readers take the norm's gain up, the student's own too, and the norm becomes one.
Where α is 0 tensors stay as they are stored.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bitsmith.archs import TensorSpec
from bitsmith.errors import BitsmithError
from bitsmith.numerics.threads import in_order, one_blas_thread
from bitsmith.passes.axes import Layer, layers_of
from bitsmith.passes.fold import DropMtp, Untie
from bitsmith.passes.merge_axes import AxisMap, Mixing, is_selection
from bitsmith.passes.merge_heads import DeltaMap, HeadMap
from bitsmith.passes.merge_maps import ResidualMap, SolvedReading
from bitsmith.passes.merge_rows import as_matrix, folded
from bitsmith.passes.transform import Model
from bitsmith.store.checkpoint import Checkpoint, Rows, TensorRef, View
from bitsmith.store.stored import FLOATS

Float64 = NDArray[np.float64]

_TABLE_ROWS = 1024
_NORMS = {"mixer.in": "norm.mixer", "ffn.in": "norm.ffn"}


@dataclass(frozen=True)
class LayerAlpha:
    """The teacher's share in a layer: of the mixer (one for all, or by KV group or K head), of the FFN."""

    mixer: float | Sequence[float] = 1.0
    ffn: float = 1.0

    def groups(self, count: int) -> Float64:
        """Return the mixer's shares (`count`).

        Raises BitsmithError for another number of them or a share outside 0 … 1.
        """
        given = np.atleast_1d(np.asarray(self.mixer, np.float64))
        if given.size not in (1, count) or not ((given >= 0) & (given <= 1)).all() or not 0 <= self.ffn <= 1:
            raise BitsmithError(
                f"shares {self.mixer} and {self.ffn}: expected 1 or {count} of 0 … 1, and one"
            )
        return np.broadcast_to(given, count).copy()


@dataclass(frozen=True)
class LayerMerge:
    """What a student's layer takes from layer `teacher`: maps of its residual states and its inner axes.

    `before`, `between` and `after` map the states in front of the mixer, in front of the FFN and behind the
    layer; `gains` are c of the two norms (`merge_maps.norm_gain`).
    """

    teacher: int
    before: ResidualMap
    between: ResidualMap
    after: ResidualMap
    heads: HeadMap | DeltaMap
    ffn: AxisMap
    gains: tuple[float, float] = (1.0, 1.0)
    alpha: LayerAlpha = field(default_factory=LayerAlpha)


@dataclass(frozen=True)
class EndsMerge:
    """What the embedding and the head take: their maps, c of the final norm, and their shares.

    With `solved` the head is not the teacher's mapped, but solved for from the normed states.
    """

    embedding: ResidualMap
    final: ResidualMap
    gain: float = 1.0
    alpha: float = 1.0
    head_alpha: float = 1.0
    solved: SolvedReading | None = None


class _Merged(TensorRef):
    """A merged tensor of the stored one's name, shape and type; where that is packed, of type BF16."""

    def __init__(self, stored: TensorRef) -> None:
        self.name, self.shape = stored.name, stored.shape
        self.dtype = stored.dtype if stored.dtype in FLOATS else "BF16"

    @property
    def nbytes(self) -> int:
        """Bytes as float32: a computed tensor is stored nowhere."""
        return 4 * self.size


class MergedTensor(_Merged):
    """A tensor computed whole when it is first read, and let go once its last row was."""

    def __init__(self, stored: TensorRef, compute: Callable[[], Float64]) -> None:
        super().__init__(stored)
        self._compute = compute
        self._lock = threading.Lock()
        self._kept: Rows | None = None

    def read(self, start: int = 0, stop: int | None = None) -> Rows:
        """Return rows `[start, stop)` in float32."""
        stop = self.n_rows if stop is None else stop
        with self._lock:
            if self._kept is None:
                self._kept = self._computed()
            rows = self._kept[start:stop].copy()
            if stop >= self.n_rows:
                self._kept = None
        return rows

    def _computed(self) -> Rows:
        with one_blas_thread():
            return self._compute().reshape(self.shape).astype(np.float32)


class RowwiseTensor(_Merged):
    """A tensor whose rows are each computed of the same rows of others: a table of the vocabulary.

    Rows are computed a slice at a time.
    """

    def __init__(self, stored: TensorRef, compute: Callable[[int, int], Float64]) -> None:
        super().__init__(stored)
        self._compute = compute

    def read(self, start: int = 0, stop: int | None = None) -> Rows:
        """Return rows `[start, stop)` in float32."""
        stop = self.n_rows if stop is None else stop
        made: Rows = np.empty((stop - start, *self.shape[1:]), np.float32)

        def piece(first: int) -> None:
            last = min(first + _TABLE_ROWS, stop)
            made[first - start : last - start] = self._compute(first, last)

        with one_blas_thread():
            for _ in in_order(piece, range(start, stop, _TABLE_ROWS)):
                pass
        return made


class MergedView(View):
    """A student with another model's weights in it; its digest covers what is read from it."""

    source_digest = Checkpoint.source_digest


def merged_view(
    teacher: Model, student: Model, layers: Mapping[int, LayerMerge], ends: EndsMerge | None = None
) -> MergedView:
    """Return the student with teacher weights folded in, computed on read, under the student's names.

    `layers` is by student layer; layers that it leaves out, and ends of None, stay as they are. A student's
    MTP layers are left out, as they read what the final norm made. A tied student stays tied: its embedding
    is mapped, and its final norm's weight is fitted by column so that the head meets the teacher's best; only
    a head that is solved for becomes a tensor of its own.
    Raises BitsmithError for vocabularies, layers or maps that do not fit.
    """
    student = DropMtp().restructured(student)
    if ends is not None and ends.solved is not None and ends.head_alpha > 0:
        student = Untie().restructured(student)
    changed: dict[str, TensorRef] = {}
    theirs, ours = (
        [layer for layer in layers_of(model) if layer.instance.startswith("layers.")]
        for model in (teacher, student)
    )
    for number, merge in layers.items():
        if not (0 <= number < len(ours) and 0 <= merge.teacher < len(theirs)):
            raise BitsmithError(
                f"layer {number} from {merge.teacher}: there are {len(ours)} and {len(theirs)}"
            )
        pair = _LayerPair(teacher, student, theirs[merge.teacher], ours[number], merge)
        changed |= pair.tensors()
    if ends is not None:
        changed |= _Ends(teacher, student, ends).tensors()
    base = student.view()
    kept = {name: ref for name, (spec, ref) in student.tensors.items() if not spec.transforms}
    return MergedView(base, {name: (kept | changed).get(name, ref) for name, ref in base.items()})


class _LayerPair:
    """A layer of each model, and the student's tensors that come of it."""

    def __init__(self, teacher: Model, student: Model, theirs: Layer, ours: Layer, merge: LayerMerge) -> None:
        self._teacher, self._student, self._merge = teacher, student, merge
        self._theirs, self._ours = theirs, ours
        if ours.has("attn.o") != isinstance(merge.heads, HeadMap) or not theirs.has(*ours.specs):
            raise BitsmithError(
                f"{ours.instance} of the student and {theirs.instance} of the teacher are of different kinds"
            )
        self._groups = merge.alpha.groups(merge.heads.student.groups)
        for mapping in (merge.before, merge.between, merge.after):
            _expect_map(mapping, teacher, student)
        for role, spec in ours.specs.items():
            axes = (0, -1) if len(spec.shape) > 1 else (0,)
            for mixing, axis in zip(self._inner(role), axes, strict=False):
                _expect_axis(mixing, theirs.specs[role], spec, axis)

    def tensors(self) -> dict[str, TensorRef]:
        """Return what changes, by the student's names."""
        alphas = {role: self._alpha(role) for role in self._ours.specs if not self._is_outer_norm(role)}
        folded = {
            norm
            for site, norm in _NORMS.items()
            if any(alphas[spec.role].any() for spec in self._ours.readers(site))
        }
        made: dict[str, TensorRef] = {}
        for role, spec in self._ours.specs.items():
            stored = self._student.ref(spec.name)
            if role in folded:
                made[spec.name] = _constant(stored, 0.0 if spec.norm == "1+w" else 1.0)
            elif role in alphas and (alphas[role].any() or self._norm_of(spec) in folded):
                made[spec.name] = MergedTensor(stored, self._mixture(spec, alphas[role]))
        return made

    def _is_outer_norm(self, role: str) -> bool:
        return role in _NORMS.values()

    def _alpha(self, role: str) -> Float64:
        if role.startswith("ffn."):
            kept = self._merge.ffn.keeps_producers and role != "ffn.down"
            return np.asarray(0.0 if kept else self._merge.alpha.ffn, np.float64)
        return self._merge.heads.share(role, self._groups)

    def _norm_of(self, spec: TensorSpec) -> str | None:
        """Return the role of the norm that a matrix reads behind."""
        found = [norm for site, norm in _NORMS.items() if str(spec.site).endswith(f".{site}")]
        return found[0] if found else None

    def _mixture(self, spec: TensorSpec, alpha: Float64) -> Callable[[], Float64]:
        """Return what computes `α W' + (1 - α) W_s`."""
        stored, norm = self._student.ref(spec.name), self._norm_of(spec)

        def own(start: int, stop: int) -> Float64:
            rows = as_matrix(stored.read(start, stop))
            return rows if norm is None else rows * _gain(self._student, self._ours.specs[norm])

        def compute() -> Float64:
            if not alpha.any():
                return own(0, stored.n_rows)
            made = self._folded(spec.role)
            share = np.broadcast_to(alpha[:, None] if alpha.ndim == 1 else alpha, made.shape)
            for start, stop in stored.slices():
                part = slice(start, stop)
                made[part] *= share[part]
                made[part] += (1 - share[part]) * own(start, stop)
            return made

        return compute

    def _folded(self, role: str) -> Float64:
        """Return the teacher's tensor of a role in the student's shape (`out in`)."""
        spec, merge = self._theirs.specs[role], self._merge
        ref = self._teacher.ref(spec.name)
        rows, columns = self._inner(role)
        norm = self._norm_of(spec)
        if norm is not None:
            mapping = merge.before if norm == "norm.mixer" else merge.between
            gain = merge.gains[norm == "norm.ffn"] * _gain(self._teacher, self._theirs.specs[norm])
            return folded(ref, rows, gain[:, None] * mapping.backward)
        if spec.axes[0] == "residual" and len(spec.axes) > 1:
            mapping = merge.between if role != "ffn.down" else merge.after
            return folded(ref, mapping.forward, columns)
        return folded(ref, rows, columns)

    def _inner(self, role: str) -> tuple[Mixing | None, Mixing | None]:
        """Return how rows and columns on the layer's inner axes are made."""
        if role.startswith("ffn."):
            ffn = self._merge.ffn
            return (None, ffn.reading) if role == "ffn.down" else (ffn.producing, None)
        return self._merge.heads.rows(role), self._merge.heads.columns(role)


class _Ends:
    """The embedding, the final norm and the head of both models."""

    def __init__(self, teacher: Model, student: Model, merge: EndsMerge) -> None:
        self._teacher, self._student, self._merge = teacher, student, merge
        self._embed, self._norm = student.having("embed")[0], student.having("norm.final")[0]
        for share in (merge.alpha, merge.head_alpha):
            if not 0 <= share <= 1:
                raise BitsmithError(f"share {share} of the ends: expected 0 … 1")
        wide, own = teacher.having("embed")[0].shape[0], self._embed.shape[0]
        if wide != own:
            raise BitsmithError(f"the teacher's vocabulary has {wide} tokens, the student's {own}")
        for mapping in (merge.embedding, merge.final):
            _expect_map(mapping, teacher, student)

    def tensors(self) -> dict[str, TensorRef]:
        """Return what changes, by the student's names."""
        made: dict[str, TensorRef] = {}
        stored = self._student.ref(self._embed.name)
        if self._merge.alpha > 0:
            made[self._embed.name] = RowwiseTensor(stored, self._embedding)
        if self._merge.head_alpha <= 0 and not (self._student.arch.tied and made):
            return made
        norm = self._student.ref(self._norm.name)
        if self._student.arch.tied:
            return made | {self._norm.name: MergedTensor(norm, self._tied_norm)}
        head = self._student.having("head")[0]
        return made | {
            head.name: RowwiseTensor(self._student.ref(head.name), self._head),
            self._norm.name: _constant(norm, 0.0 if self._norm.norm == "1+w" else 1.0),
        }

    def _embedding(self, start: int, stop: int) -> Float64:
        theirs = self._teacher.ref(self._teacher.having("embed")[0].name).read(start, stop)
        own = self._student.ref(self._embed.name).read(start, stop).astype(np.float64)
        alpha = self._merge.alpha
        return alpha * (theirs.astype(np.float64) @ self._merge.embedding.forward) + (1 - alpha) * own

    def _head(self, start: int, stop: int) -> Float64:
        """Return rows of the head that reads a norm of one."""
        own_name = (self._student.having("head") or [self._embed])[0].name
        own = self._student.ref(own_name).read(start, stop) * _gain(self._student, self._norm)
        alpha = self._merge.head_alpha
        if alpha <= 0:
            return np.asarray(own, np.float64)
        spec = (self._teacher.having("head") or self._teacher.having("embed"))[0]
        gain = _gain(self._teacher, self._teacher.having("norm.final")[0])
        theirs = self._teacher.ref(spec.name).read(start, stop).astype(np.float64)
        if self._merge.solved is None:
            folded = theirs @ ((self._merge.gain * gain)[:, None] * self._merge.final.backward)
        else:
            folded = (theirs * gain) @ self._merge.solved.theirs + own @ self._merge.solved.own
        return np.asarray(alpha * folded + (1 - alpha) * own)

    def _tied_norm(self) -> Float64:
        """Return the weight g for which `E' diag(g)` comes nearest to the head, column by column."""
        table = self._student.ref(self._embed.name)

        def piece(first: int) -> tuple[Float64, Float64]:
            last = min(first + _TABLE_ROWS, table.n_rows)
            rows = (
                self._embedding(first, last) if self._merge.alpha > 0 else as_matrix(table.read(first, last))
            )
            return (rows * self._head(first, last)).sum(0), (rows**2).sum(0)

        inner, power = np.zeros(self._embed.shape[1]), np.zeros(self._embed.shape[1])
        for products, squares in in_order(piece, range(0, table.n_rows, _TABLE_ROWS)):
            inner += products
            power += squares
        fitted = np.divide(inner, power, out=_gain(self._student, self._norm), where=power > 0)
        return np.asarray(fitted - float(self._norm.norm == "1+w"))


def _gain(model: Model, norm: TensorSpec) -> Float64:
    """Return what a norm multiplies its channels by."""
    return model.ref(norm.name).read().astype(np.float64) + float(norm.norm == "1+w")


def _constant(stored: TensorRef, value: float) -> TensorRef:
    return MergedTensor(stored, lambda: np.full(stored.shape, value))


def _expect_map(mapping: ResidualMap, teacher: Model, student: Model) -> None:
    expected = teacher.arch.number("hidden_size"), student.arch.number("hidden_size")
    if mapping.shape != expected:
        raise BitsmithError(f"a residual map has shape {mapping.shape}, the models call for {expected}")


def _expect_axis(mixing: Mixing | None, theirs: TensorSpec, ours: TensorSpec, axis: int) -> None:
    """Refuse what does not make the student's rows or columns of the teacher's."""
    wide, narrow = theirs.shape[axis], ours.shape[axis]
    if ours.axes[axis] == "residual":
        return
    if mixing is None:
        fits, found = wide == narrow, (wide, wide)
    elif is_selection(mixing):
        within = mixing.min(initial=0) >= 0 and mixing.max(initial=-1) < wide
        fits, found = within and len(mixing) == narrow, (int(mixing.max(initial=-1)) + 1, len(mixing))
    else:
        fits, found = mixing.shape == (wide, narrow), mixing.shape
    if not fits:
        raise BitsmithError(
            f"{ours.axes[axis]} goes from {wide} to {narrow}, its map {found}", tensor=ours.name
        )
