"""Allocation: which format each tensor gets, so that the file keeps a size and loses least.

Sensitivities come from `bitsmith.run.sensitivity`, the choice from the exact knapsack. A sum of measured KLDs
is still a model of a whole plan, so several plans near the optimum are returned, to be written, measured on
held-out text and chosen from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bitsmith.errors import BitsmithError
from bitsmith.numerics.divergence import Estimate, estimates
from bitsmith.passes.knapsack import Option, pack
from bitsmith.passes.transform import Transform
from bitsmith.progress import Progress, silent
from bitsmith.run.budget import Limit, Target, limit_of
from bitsmith.run.evaluate import open_model
from bitsmith.run.forward import TextModel, Tokens, compare, final_hidden_states
from bitsmith.run.groups import FORMATS, Group, groups_of
from bitsmith.run.mixes import ALIASES, MIXES
from bitsmith.run.plan import Plan, Source, open_source, plan_of_types, plan_source
from bitsmith.run.sensitivity import (
    DEFAULT_BUDGET,
    Budget,
    Moments,
    Sensitivities,
    measure_sensitivities,
)
from bitsmith.store import TensorInfo, open_checkpoint
from bitsmith.store.gguf_layout import ALIGNMENT_KEY, DEFAULT_ALIGNMENT, padded

NEAR = 1.15
"""How many times the optimum's predicted KLD a plan of another kind may have to be a candidate."""
BENDS = {"flatter": 1.15, "bolder": 0.87}
"""Exponents on the sensitivities for further candidates: coarse types cost more than measured, or less."""
PERTURBATION = 0.3
"""Standard deviation of the logarithm by which sensitivities are shaken for still further candidates."""

_SHAKES = 32


class HeldOutStatistics(Moments, Protocol):
    """Calibration statistics: moments per tensor and the tokens they came from."""

    def tokens(self) -> tuple[Tokens, Tokens] | None:
        """Return fit and held-out tokens (`chunks T` each), None where only moments are known."""


@dataclass(frozen=True)
class Candidate:
    """A plan to try; `predicted_nats` is its mean KLD by the additive model.

    `gap_nats` certifies of the optimum that no allocation within the limit is predicted to be better by more;
    None for the others. `tensor_nats` shares each group's KLD out over its tensors by size.
    """

    name: str
    plan: Plan
    predicted_nats: float
    gap_nats: float | None
    tensor_nats: Mapping[str, float]


@dataclass(frozen=True)
class Allocation:
    """Candidates near the optimum, the best predicted one first, and what they rest on."""

    limit: Limit
    candidates: tuple[Candidate, ...]
    sensitivities: Sensitivities

    @property
    def plans(self) -> list[Plan]:
        """The candidates' plans."""
        return [candidate.plan for candidate in self.candidates]

    def to_json(self) -> dict[str, Any]:
        """Return the allocation as plain values."""
        return {
            "target": str(self.limit.target),
            "limit_of": self.limit.of,
            "limit_bytes": self.limit.limit_bytes,
            "memory": None if self.limit.memory is None else self.limit.memory.to_json(),
            "sensitivities": self.sensitivities.to_json(),
            "candidates": [
                {
                    "name": candidate.name,
                    "file_bytes": candidate.plan.file_bytes,
                    "bpw": candidate.plan.bpw,
                    "predicted_nats": candidate.predicted_nats,
                    "gap_nats": candidate.gap_nats,
                    "types": {row.gguf_name: row.type for row in candidate.plan.rows},
                }
                for candidate in self.candidates
            ],
        }


def allocate(
    model: Path,
    statistics: HeldOutStatistics | None,
    target: Target,
    *,
    formats: Sequence[str] = FORMATS,
    candidates: int = 3,
    budget: Budget = DEFAULT_BUDGET,
    tokens: Tokens | None = None,
    transforms: Sequence[Transform] = (),
    progress: Progress = silent,
) -> Allocation:
    """Measure sensitivities of `model` and return up to `candidates` plans that keep `target`.

    They are measured on `tokens` (`chunks T`), else on the statistics' held-out ones. The choice is exact to
    the byte of the file: header and padding are counted. Of `transforms` only the tensors that they add and
    remove are taken account of. See `plans_within` for the candidates.

    Raises BitsmithError for a target below the smallest possible file and where there are no tokens to
    measure with; else as `open_source` and `open_model` do.
    """
    used = held_out_tokens(model, statistics) if tokens is None else tokens
    with open_checkpoint(model) as checkpoint, open_model(model) as network:
        source = open_source(checkpoint, transforms, allow_requantize=True)
        limit = limit_of(source, target)
        groups = groups_of(source, formats)
        Costs(source, groups, limit).refuse_too_small()
        found = measure_sensitivities(network, groups, used, statistics, budget, progress)
        return plans_within(source, groups, found, limit, candidates, has_imatrix=statistics is not None)


def held_out_tokens(model: Path, statistics: HeldOutStatistics | None) -> Tokens:
    """Return the tokens that plans are measured on: held-out ones, of a single chunk the fitted ones.

    Raises BitsmithError for statistics that hold none, such as an imatrix.
    """
    kept = None if statistics is None else statistics.tokens()
    if kept is None:
        raise BitsmithError(
            "allocation measures on tokens, and an imatrix holds none; pass statistics made by calibrate",
            path=model,
        )
    fitted, held_out = kept
    return held_out if len(held_out) else fitted


def plans_within(
    source: Source,
    groups: Sequence[Group],
    sensitivities: Sensitivities,
    limit: Limit,
    count: int = 3,
    *,
    has_imatrix: bool = False,
    seed: int = 0,
) -> Allocation:
    """Return different plans that keep `limit`, best predicted first: the optimum and what may beat it.

    In this order, until there are `count`:

    - `optimum`: the least summed KLD, with the certificate of the knapsack;
    - the best plan that follows a stock mix of llama.cpp (protected tensors kept), and the best that stores
      every group in one of two neighbouring types, where predicted to be within 15 % of the optimum;
    - `flatter` and `bolder`: optima of sensitivities raised to 1.15 and 0.87, as if coarse types cost more
      than was measured, or less;
    - `shaken`: optima after every sensitivity is multiplied by `exp(0.3 z)`, z seeded normal.

    Raises BitsmithError where not even the smallest formats fit.
    """
    chooser = _Chooser(source, groups, sensitivities, limit)
    best = chooser.best()
    others = [*chooser.stock(has_imatrix), *chooser.two_types()]
    found = [best, *(other for other in others if other.predicted_nats <= NEAR * best.predicted_nats)]
    rng = np.random.default_rng(seed)
    further = chain(map(chooser.bent, BENDS), (chooser.shaken(rng) for _ in range(_SHAKES)))
    while len(_different(found)) < count and (candidate := next(further, None)) is not None:
        found.append(candidate)
    kept = _different(found)[: max(1, count)]
    return Allocation(limit, tuple(sorted(kept, key=lambda c: c.predicted_nats)), sensitivities)


def _different(found: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates without later ones of the same types."""
    by_types: dict[tuple[str, ...], Candidate] = {}
    for candidate in found:
        by_types.setdefault(tuple(row.type for row in candidate.plan.rows), candidate)
    return list(by_types.values())


class Costs:
    """Bytes of every group in every format, counted as the limit counts."""

    def __init__(self, source: Source, groups: Sequence[Group], limit: Limit) -> None:
        self._source, self._groups, self.limit = source, groups, limit
        alignment = source.metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
        self._alignment = int(getattr(alignment, "value", alignment))
        self.by_group = [[self._bytes(group, name) for name in group.formats] for group in groups]
        free = {tensor.gguf_name for group in groups for tensor in group.tensors}
        infos = [
            TensorInfo(tensor.gguf_name, tensor.ref.shape, "F32")
            for tensor in source.tensors
            if tensor.gguf_name not in free
        ]
        self.fixed = sum(map(self._one, infos))
        if limit.of == "file":
            header = [TensorInfo(tensor.gguf_name, tensor.ref.shape, "F32") for tensor in source.tensors]
            self.fixed += source.file_bytes(header) - sum(map(self._one, header))

    @property
    def left(self) -> int:
        """Bytes that the groups may take together."""
        return self.limit.limit_bytes - self.fixed

    def refuse_too_small(self) -> None:
        """Raise BitsmithError where the smallest formats are too large."""
        least = self.fixed + sum(min(costs) for costs in self.by_group)
        if least > self.limit.limit_bytes:
            raise BitsmithError(
                f"{self.limit} is too small: the smallest formats offered take {least:,} bytes",
                path=self._source.checkpoint.path,
            )

    def _bytes(self, group: Group, name: str) -> int:
        return sum(self._one(TensorInfo(t.gguf_name, t.ref.shape, name)) for t in group.tensors)

    def _one(self, info: TensorInfo) -> int:
        return padded(info.nbytes, self._alignment) if self.limit.of == "file" else info.nbytes


class _Chooser:
    """Finds plans within a limit."""

    def __init__(
        self, source: Source, groups: Sequence[Group], sensitivities: Sensitivities, limit: Limit
    ) -> None:
        self._source, self._groups, self._sensitivities = source, groups, sensitivities
        self._costs = Costs(source, groups, limit)
        self._costs.refuse_too_small()
        self._nats = [dict(entry.nats) for entry in sensitivities.groups]

    def best(self) -> Candidate:
        """Return the plan of the least summed KLD."""
        formats, bound = self._packed(self._nats)
        chosen = self._candidate("optimum", formats)
        summed = sum(nats[form] for nats, form in zip(self._nats, formats, strict=True))
        total = self._sensitivities.total
        return replace(chosen, gap_nats=total(summed) - total(min(summed, bound)))

    def bent(self, name: str) -> Candidate:
        """Return the optimum of sensitivities raised to a power of `BENDS`."""
        nats = [{form: value ** BENDS[name] for form, value in row.items()} for row in self._nats]
        return self._candidate(name, self._packed(nats)[0])

    def shaken(self, rng: np.random.Generator) -> Candidate:
        """Return the optimum of sensitivities that are off by a random factor per group."""
        factors = np.exp(PERTURBATION * rng.standard_normal(len(self._groups)))
        nats = [
            {form: value * factor for form, value in row.items()}
            for row, factor in zip(self._nats, factors, strict=True)
        ]
        return self._candidate("shaken", self._packed(nats)[0])

    def two_types(self) -> list[Candidate]:
        """Return the best plan that stores all groups in two neighbouring types, if there is one.

        Groups that offer neither, protected ones among them, keep all their formats.
        """
        ladder = list(dict.fromkeys(name for group in self._groups for name in group.formats))
        found = []
        for pair in pairwise(ladder):
            allowed = [[f for f in g.formats if f in pair] or list(g.formats) for g in self._groups]
            if sum(self._least(allowed)) <= self._costs.left:
                formats = self._packed(self._nats, allowed)[0]
                found.append(self._candidate(f"{pair[0]} and {pair[1]}", formats))
        return sorted(found, key=lambda candidate: candidate.predicted_nats)[:1]

    def stock(self, has_imatrix: bool) -> list[Candidate]:
        """Return the best predicted plan that fits and follows a stock mix, if there is one."""
        found = []
        for name in MIXES:
            mix = plan_source(self._source, name, has_imatrix=has_imatrix)
            candidate = self._candidate(f"like {name}", self._formats_like(mix))
            if self._costs.limit.holds(candidate.plan.tensor_bytes, candidate.plan.file_bytes):
                found.append(candidate)
        return sorted(found, key=lambda candidate: candidate.predicted_nats)[:1]

    def _formats_like(self, plan: Plan) -> list[str]:
        """Return the formats of a plan: a group's largest type, or the next larger one that it offers."""
        nbytes = {row.gguf_name: row.nbytes for row in plan.rows}
        types = {row.gguf_name: row for row in plan.rows}
        formats = []
        for group in self._groups:
            largest = max((types[tensor.gguf_name] for tensor in group.tensors), key=lambda row: row.bpw).type
            wanted = sum(nbytes[tensor.gguf_name] for tensor in group.tensors)
            formats.append(largest if largest in group.formats else _least_above(group, wanted))
        return formats

    def _least(self, allowed: Sequence[Sequence[str]]) -> list[int]:
        return [
            min(cost for cost, form in zip(costs, group.formats, strict=True) if form in names)
            for costs, group, names in zip(self._costs.by_group, self._groups, allowed, strict=True)
        ]

    def _packed(
        self, nats: Sequence[Mapping[str, float]], allowed: Sequence[Sequence[str]] | None = None
    ) -> tuple[list[str], float]:
        names = [list(group.formats) for group in self._groups] if allowed is None else allowed
        options = [
            [
                Option(cost, row[form])
                for cost, form in zip(costs, group.formats, strict=True)
                if form in offered
            ]
            for costs, group, row, offered in zip(
                self._costs.by_group, self._groups, nats, names, strict=True
            )
        ]
        found = pack(options, self._costs.left)
        return [offered[pick] for offered, pick in zip(names, found.picks, strict=True)], found.bound

    def _reasons(self, formats: Sequence[str]) -> dict[str, str]:
        """Return per tensor how its KLD is known."""
        reasons = {}
        for entry, form in zip(self._sensitivities.groups, formats, strict=True):
            known = "measured" if form in entry.measured else "interpolated"
            if entry.borrowed:
                known = f"guessed from {', '.join(entry.borrowed[:2])}"
            reasons.update(dict.fromkeys(entry.tensors, f"allocated, KLD {known}"))
        return reasons

    def _candidate(self, name: str, formats: Sequence[str]) -> Candidate:
        types = dict.fromkeys((tensor.gguf_name for tensor in self._source.tensors), "F32")
        nats: dict[str, float] = {}
        for group, form, row in zip(self._groups, formats, self._nats, strict=True):
            weights = sum(tensor.ref.size for tensor in group.tensors)
            types |= dict.fromkeys((tensor.gguf_name for tensor in group.tensors), form)
            nats.update((t.gguf_name, row[form] * t.ref.size / weights) for t in group.tensors)
        reasons = self._reasons(formats)
        plan = plan_of_types(self._source, types, mix=_mix_name(self._source, types), reasons=reasons)
        return Candidate(name, plan, self._sensitivities.total(sum(nats.values())), None, nats)


def _least_above(group: Group, wanted_bytes: int) -> str:
    """Return the smallest format of `group` that takes `wanted_bytes`, its largest where none does."""
    sizes = {
        name: sum(TensorInfo(t.gguf_name, t.ref.shape, name).nbytes for t in group.tensors)
        for name in group.formats
    }
    by_size = sorted(sizes, key=lambda name: sizes[name])
    return next((name for name in by_size if sizes[name] >= wanted_bytes), by_size[-1])


def _mix_name(source: Source, types: Mapping[str, str]) -> str:
    """Return the stock mix to name the file after: that of the type most weights have."""
    weights: Counter[str] = Counter()
    for tensor in source.tensors:
        weights[types[tensor.gguf_name]] += tensor.ref.size
    base = weights.most_common(1)[0][0]
    return ALIASES.get(base, base)


def held_out_scores(
    reference: Path, candidates: Sequence[Path], tokens: Tokens, progress: Progress = silent
) -> list[dict[str, Estimate]]:
    """Return every measure of each candidate file against `reference` on `tokens` (`chunks T`).

    Positions T/2…T-2 are scored; measures and intervals are `bitsmith.numerics.divergence.estimates`'. The
    reference runs once.
    """
    with open_model(reference) as original:
        states = _final(original, tokens, progress, "reference")
        return [_scores(original, states, path, tokens, progress) for path in candidates]


def held_out_kld(
    reference: Path, candidate: Path, tokens: Tokens, progress: Progress = silent
) -> dict[str, Estimate]:
    """Return every measure of one candidate file; see `held_out_scores`."""
    return held_out_scores(reference, [candidate], tokens, progress)[0]


def _scores(
    original: TextModel, states: np.ndarray[Any, Any], path: Path, tokens: Tokens, progress: Progress
) -> dict[str, Estimate]:
    targets = tokens[:, tokens.shape[1] // 2 + 1 :].reshape(-1)
    with open_model(path) as model:
        found = compare(original, model, (states, _final(model, tokens, progress, "candidate")), targets)
    return estimates(found.reshape(len(tokens)))


def _final(model: TextModel, tokens: Tokens, progress: Progress, stage: str) -> np.ndarray[Any, Any]:
    states = final_hidden_states(model, tokens, tokens.shape[1] // 2, progress, stage)
    return states.reshape(-1, states.shape[-1])


@dataclass(frozen=True)
class Tried:
    """A candidate as measured on held-out tokens; `mean_kld` and `kld_99_9` are in nats."""

    name: str
    plan: Plan
    file: Path
    predicted_nats: float
    measures: Mapping[str, Estimate]

    @property
    def mean_nats(self) -> float:
        """The measured mean KLD."""
        return self.measures["mean_kld"].value


def pick(
    model: Path,
    allocation: Allocation,
    write: Callable[[Plan, int], Path],
    tokens: Tokens,
    progress: Progress = silent,
) -> tuple[Tried, ...]:
    """Write every candidate with `write(plan, number)`, measure it, and return them best first.

    The best has the lowest mean KLD on `tokens` as written; of equals the one predicted to be better.
    """
    files = [write(candidate.plan, number) for number, candidate in enumerate(allocation.candidates)]
    scores = held_out_scores(model, files, tokens, progress)
    tried = [
        Tried(candidate.name, candidate.plan, file, candidate.predicted_nats, measures)
        for candidate, file, measures in zip(allocation.candidates, files, scores, strict=True)
    ]
    return tuple(sorted(tried, key=lambda found: found.mean_nats))
