"""What a claim of a seed is, how one is judged, and the schema of `claims.json`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from bitsmith import __version__
from bitsmith.errors import BitsmithError, printable
from bitsmith.numerics.divergence import Estimate
from bitsmith.run.evaluate import Measure
from bitsmith.run.format_rows import Outcome

if TYPE_CHECKING:
    from bitsmith.run.claim_evidence import Evidence

EXACT = "exact: all were measured"
OVER_MATRICES = "95 % bootstrap over matrices"
OVER_CHUNKS = "95 % paired bootstrap over chunks"

SAHC = "S0, spectral hybrid compression of Qwen3.5-9B"
SPI = "S1, SPI mixed precision of Qwen3.5-4B"
TRUNK = "S2, trunk and residual, Qwen3-32B into Qwen3-4B"
SBGQ = "S3, SBGQ IQ4_XS of Qwen3.5-9B"
CELLM = "S4, cellm formats of Qwen3.5-0.8B"


class LackingError(BitsmithError):
    """The model or the options lack what a claim is judged by."""


class Judged(NamedTuple):
    """A claim's outcome, what was found, the figure that decides and how that was measured.

    `published` is what the write-up's own numbers make of its claim, without any model.
    """

    outcome: Outcome
    found: str
    measure: Measure | None = None
    protocol: str = ""
    published: str = ""


class SeedClaim(ABC):
    """One claim of a seed; defining a subclass registers it under `name`.

    `words` are the seed's own, `test` says what is measured here and `rule` when that bears the claim out.
    `needs` are the pieces of `Evidence` it reads, for the cost that is said first.
    """

    name: ClassVar[str]
    seed: ClassVar[str]
    words: ClassVar[str]
    test: ClassVar[str]
    rule: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.name in SEED_CLAIMS:
            raise TypeError(f"two claims are called {cls.name}")
        SEED_CLAIMS[cls.name] = cls()

    @abstractmethod
    def judge(self, evidence: Evidence) -> Judged:
        """Return the outcome. Raises BitsmithError where the evidence cannot be had."""


SEED_CLAIMS: dict[str, SeedClaim] = {}
"""Every claim by its name; `chosen_claims` sorts them by seed."""


@dataclass(frozen=True)
class TestedClaim:
    """A claim as tested on one model; `measure` is None where there is no figure."""

    name: str
    seed: str
    words: str
    test: str
    rule: str
    outcome: Outcome
    found: str
    measure: Measure | None
    protocol: str
    published: str
    seconds: float


@dataclass(frozen=True)
class Cost:
    """What one piece of evidence takes: `work` in words, `multiply_adds` in all, `claims` that read it."""

    piece: str
    claims: tuple[str, ...]
    work: str
    multiply_adds: float


@dataclass(frozen=True)
class ClaimsStudy:
    """Claims tested on one model; `text`, `statistics` and `calibration` are None where none were given."""

    model: str
    text: str | None
    text_sha256: str | None
    calibration: str | None
    statistics: str | None
    ctx_tokens: int
    chunks: int
    seed: int
    cost: tuple[Cost, ...]
    claims: tuple[TestedClaim, ...]
    resumed: int
    seconds: float

    def count(self, outcome: Outcome) -> int:
        """Return how many claims came out so."""
        return sum(one.outcome == outcome for one in self.claims)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready record."""
        return {"kind": "claims study", "bitsmith": __version__, **asdict(self)}


def chosen_claims(names: Sequence[str] | None) -> list[SeedClaim]:
    """Return the claims called `names` in that order, each once; all of them for None.

    Raises BitsmithError that lists the known names.
    """
    unknown = [name for name in names or () if name not in SEED_CLAIMS]
    if unknown:
        raise BitsmithError(f"unknown claim {printable(unknown[0])!r}; known: {' '.join(SEED_CLAIMS)}")
    if names is None:
        return sorted(SEED_CLAIMS.values(), key=lambda one: one.seed)
    return [SEED_CLAIMS[name] for name in dict.fromkeys(names)]


def exact(value: float, unit: str) -> Measure:
    """Return a figure without uncertainty: everything it speaks of was measured."""
    return Measure(value, unit, value, value, EXACT)


def measured(estimate: Estimate, unit: str, interval: str) -> Measure:
    """Return an estimate as a figure; `interval` says what its interval is over."""
    known = None if estimate.low is None else interval
    return Measure(estimate.value, unit, estimate.low, estimate.high, known)


def above(measure: Measure, limit: float) -> bool | None:
    """Return whether a figure is at least `limit` with its whole interval; None if it is on both sides."""
    if measure.low is None or measure.high is None:
        return None
    return True if measure.low >= limit else False if measure.high < limit else None


def within(measure: Measure, low: float, high: float) -> bool | None:
    """Return whether a figure is in `[low, high]` with its whole interval; None if part of it is outside."""
    if measure.low is None or measure.high is None:
        return None
    if low <= measure.low and measure.high <= high:
        return True
    return False if measure.high < low or high < measure.low else None


def outcome_of(held: bool | None) -> Outcome:
    """Return the word for an outcome; one that the interval leaves open was not tested well enough."""
    return "NOT TESTED" if held is None else "HELD" if held else "NOT HELD"


def undecided(measure: Measure | None) -> str:
    """Return why a figure that was measured decides nothing, empty where there is none."""
    if measure is None or measure.interval == EXACT:
        return ""
    why = "no interval" if measure.low is None else "the interval is on both sides of the rule's limit"
    return f"open, {why}; "


def opposite(side: bool | None) -> bool | None:
    """Return the other side; None stays None."""
    return None if side is None else not side
