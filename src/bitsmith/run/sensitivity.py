"""What storing a group of tensors in a format costs: KL divergence measured through the real forward.

For one group at a time the weights are replaced by `decode(encode(w, importance))`, the hidden states that
enter its layer are taken up again, the layers from there on run, and the mean KLD from the original model is
measured. That is done for a few anchor formats per group, as many as the budget allows; the other formats are
interpolated over the relative output error

    noise(f) = sum_t tr(E_t H_t E_t^T) / sum_t tr(W_t H_t W_t^T),     E = decode(encode(W)) - W

in logarithms of both: linear between anchors, in proportion beyond them. `H` is the second moment of the
group's inputs where it is known, else its diagonal, else the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bitsmith.archs import TensorSpec
from bitsmith.formats import format_named
from bitsmith.progress import Progress, silent
from bitsmith.run.forward import Steps, TextModel, Tokens, compare
from bitsmith.run.groups import EMBEDDING, Group
from bitsmith.run.plan import SourceTensor
from bitsmith.store import ComputedTensor, TensorRef, View

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

_NOISE_ROWS = 512
_LEAST_NATS = 1e-12


class SiteMoments(Protocol):
    """What is known of one activation site: its columns in GGUF order."""

    @property
    def diagonal(self) -> Float32:
        """Mean of x² (`in`)."""

    @property
    def moment(self) -> Float32 | None:
        """Mean of x xᵀ, whole (`in in`) or its diagonal blocks (`n b b`)."""


class Moments(Protocol):
    """Statistics by tensor, as `bitsmith.store.statistics` reads them."""

    def of(self, spec: TensorSpec) -> SiteMoments | None:
        """Return what is known of the tensor's inputs, in GGUF columns."""


@dataclass(frozen=True)
class Budget:
    """How much measuring may cost: tokens per forward, and forwards of the whole model in all.

    A group of layer `i` of `L` costs `(L - i) / L` forwards per anchor. Three anchors per group are measured
    if that fits, else two, else one, else one for as many layers of each kind, evenly spread, as fit; the
    last of each kind always is. Besides, each anchor costs a forward with all groups changed.
    """

    tokens: int = 4096
    forwards: float = 64.0


DEFAULT_BUDGET = Budget()


@dataclass(frozen=True)
class Sensitivity:
    """One group's mean KLD per format in nats: `measured` as found, `nats` with the rest interpolated.

    `noise` is the relative output error per format. `borrowed` names the groups whose response to noise
    stands in where nothing was measured.
    """

    group: str
    kind: str
    tensors: tuple[str, ...]
    measured: Mapping[str, float]
    noise: Mapping[str, float]
    nats: Mapping[str, float]
    borrowed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sensitivities:
    """All groups, and how their sum relates to whole plans: `total = scale sum^exponent` (nats).

    `uniform` holds what that is fitted to: (sum of the groups' KLD, KLD of the plan), every group at its k-th
    anchor. `tokens` were scored per measurement; `forwards` is what was spent.
    """

    groups: tuple[Sensitivity, ...]
    uniform: tuple[tuple[float, float], ...]
    scored_tokens: int
    forwards: float
    scale: float = field(default=1.0)
    exponent: float = field(default=1.0)

    def predicted(self, formats: Mapping[str, str]) -> float:
        """Return the mean KLD predicted for a plan that gives each group (by name) a format."""
        return self.total(sum(group.nats[formats[group.group]] for group in self.groups))

    def total(self, summed_nats: float) -> float:
        """Return the KLD predicted for groups whose own KLDs add up to `summed_nats`."""
        return float(self.scale * summed_nats**self.exponent) if summed_nats > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the table as plain values."""
        return asdict(self)


class Storage(Protocol):
    """What becomes of a tensor's values in a format; a `Noise`, or anything else that can tell."""

    def stored(self, tensor: SourceTensor, name: str) -> TensorRef:
        """Return the tensor (`out in`, GGUF layout) as the format of that name stores it."""


class Noise:
    """A tensor as a format stores it, and how much of its output that changes."""

    def __init__(self, moments: Moments | None, seed: int = 0) -> None:
        self._moments = moments
        self._seed = seed

    def stored(self, tensor: SourceTensor, name: str) -> TensorRef:
        """Return the tensor (`out in`, GGUF layout) as a format stores it, encoded and decoded when read."""
        form, site = format_named(name), self._site(tensor)
        importance = None if site is None else site.diagonal

        def compute(start: int, stop: int) -> Float32:
            rows = np.ascontiguousarray(tensor.ref.read(start, stop), dtype=np.float32)
            return form.decode(form.encode(rows, importance))

        return ComputedTensor(tensor.gguf_name, tensor.ref.shape, "F32", compute)

    def relative(self, group: Group) -> dict[str, float]:
        """Return the noise of every format of the group, over at most 512 seeded rows of each tensor."""
        errors, energy = dict.fromkeys(group.formats, 0.0), 0.0
        for tensor in group.tensors:
            rows, share = self._sample(tensor)
            site = self._site(tensor)
            energy += _output_squares(rows, site) * share
            for name in group.formats:
                form = format_named(name)
                decoded = form.decode(form.encode(rows, None if site is None else site.diagonal))
                errors[name] += _output_squares(decoded - rows, site) * share
        return {name: error / energy if energy else 0.0 for name, error in errors.items()}

    def _site(self, tensor: SourceTensor) -> SiteMoments | None:
        return None if self._moments is None else self._moments.of(tensor.spec)

    def _sample(self, tensor: SourceTensor) -> tuple[Float32, float]:
        count = tensor.ref.n_rows
        if count <= _NOISE_ROWS:
            return np.ascontiguousarray(tensor.ref.read(), dtype=np.float32), 1.0
        # runs of 16 rows: a file is read in runs, and a permuted one in any case
        starts = np.random.default_rng(self._seed).choice(count // 16, _NOISE_ROWS // 16, replace=False)
        runs = [tensor.ref.read(16 * start, 16 * start + 16) for start in sorted(map(int, starts))]
        return np.concatenate(runs).astype(np.float32), count / _NOISE_ROWS


def _output_squares(rows: Float32, site: SiteMoments | None) -> float:
    """Return tr(R H Rᵀ) of `rows` (`out in`)."""
    if site is None:
        return float(np.einsum("oi,oi->", rows, rows, dtype=np.float64))
    if site.moment is None:
        return float(np.einsum("oi,oi,i->", rows, rows, site.diagonal, dtype=np.float64, optimize=True))
    blocks = site.moment if site.moment.ndim == 3 else site.moment[None]
    split = rows.reshape(len(rows), len(blocks), -1).transpose(1, 0, 2)
    return max(0.0, float(np.sum((split @ blocks) * split, dtype=np.float64)))


@dataclass(frozen=True)
class Change:
    """A measurement to make: some groups, each stored in a format."""

    formats: tuple[tuple[Group, str], ...]

    @property
    def layer(self) -> int:
        """The first layer that changes."""
        return min(group.layer for group, _ in self.formats if group.layer is not None)


class Prober:
    """Measures the mean KLD of changed weights, from the states that enter the first changed layer."""

    def __init__(self, model: TextModel, tokens: Tokens, noise: Storage, progress: Progress = silent) -> None:
        self._model, self._noise, self._progress = model, noise, progress
        self._steps = Steps(model)
        self.n_layers = self._steps.n_layers
        first = tokens.shape[1] // 2
        self._tokens, self._scored = tokens, slice(first, tokens.shape[1] - 1)
        self._targets = tokens[:, first + 1 :].reshape(-1)
        self._entering = self._steps.room((self.n_layers + 1, *tokens.shape))
        self._entering[0] = self._steps.embedded(tokens)
        for layer in range(self.n_layers):
            self._entering[layer + 1] = self._entering[layer]
            self._steps.advance(layer, self._entering[layer + 1])
            progress("original", layer + 1, self.n_layers)
        self._reference = self._final(self._entering[-1])

    @property
    def scored_tokens(self) -> int:
        """Tokens scored by every measurement."""
        return len(self._targets)

    def forwards(self, changes: Iterable[Change]) -> float:
        """Return the forwards of the whole model that `changes` cost."""
        return sum((self.n_layers - max(0, change.layer)) / self.n_layers for change in changes)

    def measure(self, changes: Sequence[Change]) -> list[float]:
        """Return the mean KLD in nats of each change by itself."""
        found = [0.0] * len(changes)
        done = 0
        for layer in sorted({change.layer for change in changes}):
            batch = [number for number, change in enumerate(changes) if change.layer == layer]
            for start in range(0, len(batch), self._at_once):
                numbers = batch[start : start + self._at_once]
                for number, nats in zip(numbers, self._batch([changes[n] for n in numbers]), strict=True):
                    found[number] = nats
                done += len(numbers)
                self._progress("sensitivity", done, len(changes))
        return found

    @property
    def _at_once(self) -> int:
        """Changes carried through a layer together, so that its weights are read once for all."""
        entering_bytes: int = self._entering[0].nbytes
        return max(1, (1 << 28) // entering_bytes)

    def _batch(self, changes: Sequence[Change]) -> Iterator[float]:
        """Measure changes that begin in the same layer and lie in it alone, or one that goes through all."""
        layer = changes[0].layer
        whole = [change for change in changes if any(g.layer != layer for g, _ in change.formats)]
        for change in changes if whole or layer in (EMBEDDING, self.n_layers) else ():
            yield self._alone(change)
        if not whole and 0 <= layer < self.n_layers:
            yield from self._together(changes, layer)

    def _together(self, changes: Sequence[Change], layer: int) -> Iterator[float]:
        chunks = len(self._tokens)
        states = self._steps.room((len(changes) * chunks, self._tokens.shape[1]))
        for number, change in enumerate(changes):
            part = states[number * chunks : (number + 1) * chunks]
            part[...] = self._entering[layer]
            Steps(self._changed(change)).advance(layer, part)
        for later in range(layer + 1, self.n_layers):
            self._steps.advance(later, states)
        for number in range(len(changes)):
            yield self._kld(self._model, self._final(states[number * chunks : (number + 1) * chunks]))

    def _alone(self, change: Change) -> float:
        changed = self._changed(change)
        steps = Steps(changed)
        if change.layer == self.n_layers:
            return self._kld(changed, self._reference)
        states = steps.embedded(self._tokens)
        for layer in range(self.n_layers):
            steps.advance(layer, states)
        return self._kld(changed, self._final(states))

    def _final(self, states: Float32) -> Float32:
        final = self._steps.normed(states[:, self._scored])
        return final.reshape(-1, final.shape[-1])

    def _kld(self, changed: TextModel, states: Float32) -> float:
        scores = compare(self._model, changed, (self._reference, states), self._targets)
        return float(np.mean(scores.kld))

    def _changed(self, change: Change) -> TextModel:
        tensors = dict(self._model.checkpoint.items())
        for group, name in change.formats:
            for tensor in group.tensors:
                if tensor.hf_name in tensors or tensor.spec.role == "head":
                    stored = self._noise.stored(tensor, name)
                    tensors[tensor.hf_name] = tensor.spec.from_gguf(stored)
        arch = type(self._model.arch)(self._model.arch.config, tensors)  # a head of its own unties the model
        return TextModel(View(self._model.checkpoint, tensors), arch, self._model.source)


def measure_sensitivities(
    model: TextModel,
    groups: Sequence[Group],
    tokens: Tokens,
    moments: Moments | None = None,
    budget: Budget = DEFAULT_BUDGET,
    progress: Progress = silent,
) -> Sensitivities:
    """Measure and interpolate the mean KLD of every group in every format it offers.

    `tokens` (`chunks T`) are thinned evenly to the budget; positions T/2…T-2 are scored. The result says what
    was measured and what not. Deterministic.
    """
    noise = Noise(moments)
    prober = Prober(model, _thinned(tokens, budget.tokens), noise, progress)
    changes, count = _sampled(groups, prober, budget.forwards)
    uniform = [_uniform(groups, count, k) for k in range(count)]
    nats = prober.measure(changes)
    totals = prober.measure(uniform)
    measured: dict[str, dict[str, float]] = {group.name: {} for group in groups}
    for change, value in zip(changes, nats, strict=True):
        group, name = change.formats[0]
        measured[group.name][name] = max(value, _LEAST_NATS)
    table = _filled(groups, measured, [noise.relative(group) for group in groups])
    sums = [_sum(table, change) for change in uniform]
    scale, exponent = _fit_total(sums, totals)
    return Sensitivities(
        groups=table,
        uniform=tuple(zip(sums, totals, strict=True)),
        scored_tokens=prober.scored_tokens,
        forwards=prober.forwards([*changes, *uniform]),
        scale=scale,
        exponent=exponent,
    )


def _thinned(tokens: Tokens, limit: int) -> Tokens:
    chunks = max(1, min(len(tokens), limit // tokens.shape[1]))
    kept = np.linspace(0, len(tokens) - 1, chunks).round().astype(int)
    chosen: Tokens = tokens[kept]
    return chosen


def _sampled(groups: Sequence[Group], prober: Prober, forwards: float) -> tuple[list[Change], int]:
    """Return the measurements that the budget allows, and the anchors per group."""
    measurable = [group for group in groups if group.layer is not None]
    for count in (3, 2, 1):
        changes = [Change(((g, name),)) for g in measurable for name in g.anchors(count)]
        if prober.forwards(changes) + count <= forwards:
            return changes, count
    for step in range(2, prober.n_layers + 1):
        spread = [change for change in changes if _is_spread(change.formats[0][0], measurable, step)]
        if prober.forwards(spread) + 1 <= forwards:
            break
    return spread, 1


def _is_spread(group: Group, groups: Sequence[Group], step: int) -> bool:
    """Tell whether a group is among every `step`-th of its kind, counted from the last, the cheapest."""
    alike = [other.name for other in groups if other.kind == group.kind]
    return (len(alike) - 1 - alike.index(group.name)) % step == 0


def _uniform(groups: Sequence[Group], count: int, k: int) -> Change:
    anchors = [(group, group.anchors(count)) for group in groups if group.layer is not None]
    return Change(tuple((group, names[min(k, len(names) - 1)]) for group, names in anchors))


def _sum(table: Sequence[Sensitivity], change: Change) -> float:
    by_name = {entry.group: entry for entry in table}
    return sum(by_name[group.name].nats[name] for group, name in change.formats)


def _fit_total(sums: Sequence[float], totals: Sequence[float]) -> tuple[float, float]:
    """Return scale and exponent of `total = scale sum^exponent`, least squares in logarithms."""
    x, y = (np.log(np.maximum(values, _LEAST_NATS)) for values in (sums, totals))
    spread = float(np.sum((x - x.mean()) ** 2))
    slope = float(np.sum((x - x.mean()) * (y - y.mean()))) / spread if len(x) > 1 and spread > 0 else 1.0
    exponent = min(max(slope, 0.5), 2.0)
    return float(np.exp(np.mean(y - exponent * x))), exponent


def _filled(
    groups: Sequence[Group],
    measured: Mapping[str, Mapping[str, float]],
    noises: Sequence[Mapping[str, float]],
) -> tuple[Sensitivity, ...]:
    """Return every group with all its formats: interpolated, or borrowed from its kind."""
    noise = {group.name: values for group, values in zip(groups, noises, strict=True)}
    curves = {
        group.name: _Curve([noise[group.name][f] for f in found], list(found.values()))
        for group in groups
        if (found := measured[group.name])
    }
    return tuple(_entry(group, groups, measured[group.name], noise[group.name], curves) for group in groups)


def _entry(
    group: Group,
    groups: Sequence[Group],
    measured: Mapping[str, float],
    noise: Mapping[str, float],
    curves: Mapping[str, _Curve],
) -> Sensitivity:
    lenders = () if measured else _lenders(group, groups, curves)
    nats: Callable[[float], float] = (
        curves[group.name] if measured else _mean_curve([curves[n] for n in lenders])
    )
    values = {name: measured.get(name, nats(noise[name])) for name in group.formats}
    names = tuple(tensor.gguf_name for tensor in group.tensors)
    return Sensitivity(group.name, group.kind, names, dict(measured), dict(noise), values, lenders)


def _lenders(group: Group, groups: Sequence[Group], curves: Mapping[str, _Curve]) -> tuple[str, ...]:
    """Return the nearest measured groups of the same kind, before and after; else the last ones of any."""
    alike = [other for other in groups if other.kind == group.kind and other.name in curves]
    if not alike:
        return tuple(curves)
    place = list(groups).index(group)
    before = [other.name for other in alike if groups.index(other) < place][-1:]
    after = [other.name for other in alike if groups.index(other) > place][:1]
    return tuple(before + after)


def _mean_curve(curves: Sequence[_Curve]) -> Callable[[float], float]:
    def mean(noise: float) -> float:
        found = [curve(noise) for curve in curves]
        return float(np.exp(np.mean(np.log(found)))) if min(found) > 0 else 0.0

    return mean


class _Curve:
    """KLD over noise through measured points, linear in logarithms, proportional beyond them."""

    def __init__(self, noise: Sequence[float], nats: Sequence[float]) -> None:
        order = np.argsort(noise, kind="stable")
        self._x = np.log(np.maximum(np.array(noise)[order], _LEAST_NATS))
        # measuring noise must not make a coarser format look better
        self._y = np.maximum.accumulate(np.log(np.array(nats)[order]))

    def __call__(self, noise: float) -> float:
        if noise <= 0:
            return 0.0
        x = float(np.log(noise))
        beyond = x - float(np.clip(x, self._x[0], self._x[-1]))
        return float(np.exp(np.interp(x, self._x, self._y) + beyond))
