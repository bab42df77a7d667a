"""The multiple-choice knapsack, solved exactly: one option of every group, least summed loss within a cost.

    minimise    sum_g loss_g(o_g)      subject to      sum_g cost_g(o_g) <= budget

The Lagrangian `L(m) = sum_g min_o (loss + m cost) - m budget` bounds the optimum from below for every price
`m >= 0`. With the reduced loss `r_o = loss_o + m cost_o - min_o' (...) >= 0` every choice satisfies

    sum loss = L(m) + sum r + m (budget - sum cost)

so no feasible choice whose reduced losses add up to more than (a known solution - L) can be better. What is
left goes through dynamic programming over the groups, dominated partial choices dropped (Dyer, Kayal and
Walker 1984; Pisinger 1995). Should the list outgrow its cap, the partial choices with the largest bounds are
dropped and the smallest of those bounds limits what may have been missed: the certificate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from bitsmith.errors import BitsmithError

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

MAX_LABELS = 1 << 20
_ROUNDING = 1e-12  # relative: what summing losses in another order may change


@dataclass(frozen=True)
class Option:
    """One way to store a group: what it costs and what it loses, finite and not negative."""

    cost: int
    loss: float


@dataclass(frozen=True)
class Packing:
    """A choice: `picks` are option numbers per group; no choice within the budget loses less than `bound`."""

    picks: tuple[int, ...]
    cost: int
    loss: float
    bound: float

    @property
    def gap(self) -> float:
        """How much better, at most, another choice could be; 0 where the choice is proven optimal."""
        return self.loss - self.bound


@dataclass(frozen=True)
class _Frontier:
    """A group's options that no other beats in both cost and loss, by rising cost."""

    numbers: Int64
    costs: Int64
    losses: Float64

    @classmethod
    def of(cls, options: Sequence[Option]) -> _Frontier:
        order = sorted(range(len(options)), key=lambda o: (options[o].cost, options[o].loss, o))
        kept: list[int] = []
        for number in order:
            if not kept or options[number].loss < options[kept[-1]].loss:
                kept.append(number)
        costs, losses = [options[o].cost for o in kept], [options[o].loss for o in kept]
        return cls(np.array(kept), np.array(costs, dtype=np.int64), np.array(losses, dtype=np.float64))

    def steps(self, group: int) -> list[tuple[float, int, int, int]]:
        """Return `(-saved loss per cost, group, from, to)` along the lower convex hull."""
        hull: list[int] = []
        for point in range(len(self.costs)):
            while len(hull) > 1 and self._slope(hull[-2], hull[-1]) >= self._slope(hull[-2], point):
                hull.pop()
            hull.append(point)
        return [(self._slope(a, b), group, a, b) for a, b in pairwise(hull)]

    def _slope(self, a: int, b: int) -> float:
        return float((self.losses[b] - self.losses[a]) / (self.costs[b] - self.costs[a]))


def pack(groups: Sequence[Sequence[Option]], budget: int, *, max_labels: int = MAX_LABELS) -> Packing:
    """Choose one option of every group with the least summed loss at a summed cost of at most `budget`.

    Exact (`gap` 0) unless more than `max_labels` partial choices stay undecided; `bound` then certifies the
    gap. Deterministic.

    Raises BitsmithError where the cheapest choice costs more than the budget.
    """
    _check(groups)
    frontiers = [_Frontier.of(options) for options in groups]
    least = sum(int(frontier.costs[0]) for frontier in frontiers)
    if least > budget:
        raise BitsmithError(f"a budget of {budget} is below the smallest choice, {least}")
    start, price = _greedy(frontiers, budget)
    local, bound = _Search(frontiers, budget, price, start, max_labels).run()
    picks = tuple(int(f.numbers[o]) for f, o in zip(frontiers, local, strict=True))
    chosen = [options[pick] for options, pick in zip(groups, picks, strict=True)]
    loss = sum(option.loss for option in chosen)
    return Packing(picks, sum(option.cost for option in chosen), loss, min(loss, bound))


def _check(groups: Sequence[Sequence[Option]]) -> None:
    for number, options in enumerate(groups):
        if not options:
            raise BitsmithError(f"group {number} has no options")
        for option in options:
            if not (np.isfinite(option.loss) and option.loss >= 0 and option.cost >= 0):
                raise BitsmithError(
                    f"group {number} has an option with cost {option.cost}, loss {option.loss}"
                )


def _greedy(frontiers: Sequence[_Frontier], budget: int) -> tuple[list[int], float]:
    """Return a feasible choice and the price at which the linear relaxation breaks.

    Hull steps by falling saved loss per cost, from the cheapest choice; steps that no longer fit are skipped,
    and with them the later steps of their group.
    """
    picks = [0] * len(frontiers)
    left = budget - sum(int(frontier.costs[0]) for frontier in frontiers)
    price, broke = 0.0, False
    for slope, group, before, after in sorted(
        step for g, frontier in enumerate(frontiers) for step in frontier.steps(g)
    ):
        extra = int(frontiers[group].costs[after] - frontiers[group].costs[before])
        if extra <= left and picks[group] == before:
            picks[group], left = after, left - extra
        elif not broke:
            price, broke = -slope, True
    return picks, price


class _Search:
    """Dynamic programming over the groups between a Lagrangian bound and a known solution."""

    def __init__(
        self,
        frontiers: Sequence[_Frontier],
        budget: int,
        price: float,
        start: list[int],
        max_labels: int,
    ) -> None:
        self.frontiers, self.budget, self.price, self.start = frontiers, budget, price, start
        self.max_labels = max_labels
        self.best_loss = sum(float(f.losses[o]) for f, o in zip(frontiers, start, strict=True))
        reduced = [f.losses + price * f.costs for f in frontiers]
        self.lagrangian = float(sum(r.min() for r in reduced) - price * budget)
        self.reduced = [r - r.min() for r in reduced]
        self.tolerance = _ROUNDING * max(self.best_loss, price * budget)
        self.dropped = np.inf

    def run(self) -> tuple[list[int], float]:
        """Return option numbers on the frontiers, and a lower bound of every feasible choice."""
        room = self.best_loss - self.lagrangian + self.tolerance
        order = self._order(room)
        costs = np.zeros(1, dtype=np.int64)
        losses, penalties = np.zeros(1), np.zeros(1)
        remaining = sum(int(self.frontiers[g].costs[0]) for g in order)
        trail: list[tuple[Int64, Int64]] = []
        for group in order:
            remaining -= int(self.frontiers[group].costs[0])
            options = np.flatnonzero(self.reduced[group] <= room)
            frontier = self.frontiers[group]
            costs = (costs[:, None] + frontier.costs[options]).reshape(-1)
            losses = (losses[:, None] + frontier.losses[options]).reshape(-1)
            penalties = (penalties[:, None] + self.reduced[group][options]).reshape(-1)
            kept = self._kept(costs, losses, penalties, room, remaining)
            costs, losses, penalties = costs[kept], losses[kept], penalties[kept]
            trail.append((kept // len(options), options[kept % len(options)]))
        return self._answer(order, trail, costs, losses)

    def _order(self, room: float) -> list[int]:
        """Return the groups, those with the fewest undecided options first, so that the list grows late."""
        open_options = [int((reduced <= room).sum()) for reduced in self.reduced]
        return sorted(range(len(self.frontiers)), key=lambda g: (open_options[g], g))

    def _kept(self, costs: Int64, losses: Float64, penalties: Float64, room: float, remaining: int) -> Int64:
        """Return the partial choices that fit, may beat the known solution and are not dominated."""
        alive = np.flatnonzero((costs + remaining <= self.budget) & (penalties <= room))
        order = alive[np.lexsort((losses[alive], costs[alive]))]
        ordered = losses[order]
        before = np.minimum.accumulate(np.concatenate([[np.inf], ordered[:-1]])) if len(ordered) else ordered
        kept = order[ordered < before]
        if len(kept) > self.max_labels:
            by_bound = np.argsort(penalties[kept], kind="stable")
            self.dropped = min(self.dropped, float(penalties[kept[by_bound[self.max_labels]]]))
            kept = kept[np.sort(by_bound[: self.max_labels])]
        return kept

    def _answer(
        self, order: list[int], trail: list[tuple[Int64, Int64]], costs: Int64, losses: Float64
    ) -> tuple[list[int], float]:
        bound = self.lagrangian + self.dropped
        if not len(costs) or float(losses[-1]) >= self.best_loss:
            return self.start, min(bound, self.best_loss)
        label = len(costs) - 1  # of undominated choices the dearest loses least
        found = list(self.start)
        for group, (parents, options) in zip(reversed(order), reversed(trail), strict=True):
            found[group] = int(options[label])
            label = int(parents[label])
        return found, min(bound, float(losses[-1]))
