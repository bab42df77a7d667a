"""Move a merge's shares one after the other, as long as held-out text says that it helps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from bitsmith.passes.merge_fold import LayerAlpha
from bitsmith.run.merge_recipe import Alphas, listed

LEAST_SHARE = 1 / 16
"""What a share of 0 begins with when it is moved up; a smaller one that is moved down becomes 0."""

_MIXER, _FFN = "mixer", "ffn"


class Scored(Protocol):
    """Shares with the loss that they gave."""

    @property
    def alphas(self) -> Alphas:
        """The shares."""

    @property
    def nll(self) -> float:
        """The loss in nats."""


_Found = TypeVar("_Found", bound=Scored)


@dataclass(frozen=True)
class Coordinate:
    """Shares that are moved together: of mixers by (layer, group), of FFNs by layer, of the ends."""

    label: str
    mixers: frozenset[tuple[int, int]] = frozenset()
    ffns: frozenset[int] = frozenset()
    embedding: bool = False
    head: bool = False

    def moved(self, alphas: Alphas, up: bool) -> Alphas:
        """Return `alphas` with these shares twice as large, or half as large."""

        def share(value: float, is_mine: bool) -> float:
            if not is_mine:
                return value
            if up:
                return min(1.0, max(LEAST_SHARE, 2 * value))
            return value / 2 if value > LEAST_SHARE else 0.0

        layers = tuple(
            LayerAlpha(
                tuple(share(one, (n, g) in self.mixers) for g, one in enumerate(listed(layer.mixer))),
                share(layer.ffn, n in self.ffns),
            )
            for n, layer in enumerate(alphas.layers)
        )
        return replace(
            alphas,
            layers=layers,
            embedding=share(alphas.embedding, self.embedding),
            head=share(alphas.head, self.head),
        )


def coordinates(alphas: Alphas, ends: bool) -> list[Coordinate]:
    """Return what a sweep moves: head, mixers, FFNs, embedding; then single layers; then single groups."""
    groups = [len(listed(layer.mixer)) for layer in alphas.layers]
    mixers = [frozenset((n, g) for g in range(count)) for n, count in enumerate(groups)]
    found = [
        *([Coordinate("head", head=True)] if ends else []),
        Coordinate("all mixers", mixers=frozenset().union(*mixers)),
        Coordinate("all FFNs", ffns=frozenset(range(len(groups)))),
        *([Coordinate("embedding", embedding=True)] if ends else []),
    ]
    for n in range(len(groups)):
        found.append(Coordinate(f"layer {n} mixer", mixers=mixers[n]))
        found.append(Coordinate(f"layer {n} FFN", ffns=frozenset([n])))
    for n, count in enumerate(groups):
        single = range(count) if count > 1 else ()
        found += [Coordinate(f"layer {n} group {g}", mixers=frozenset([(n, g)])) for g in single]
    return found


def sweep(best: _Found, try_out: Callable[[str, Alphas], _Found], budget: int, ends: bool) -> _Found:
    """Return the best of at most `budget` trials that move one coordinate at a time, the coarse ones first.

    Each coordinate goes the way that last helped it, else up, else down; a move that lowers the loss stays.
    Ends early when a whole round helps nowhere.
    """
    upwards: dict[str, bool] = {}
    while True:
        before = best
        for one in coordinates(best.alphas, ends):
            first = upwards.get(one.label, True)
            for up in (first, not first):
                moved = one.moved(best.alphas, up)
                if moved.to_json() == best.alphas.to_json():
                    continue
                if budget < 1:
                    return best
                budget -= 1
                tried = try_out(f"{one.label} {'up' if up else 'down'}", moved)
                if tried.nll < best.nll:
                    best, upwards[one.label] = tried, up
                    break
        if best is before:
            return best
