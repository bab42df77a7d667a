"""What `sahc` finds: the schema of `sahc.json`. It holds no times, so that equal runs write equal files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bitsmith import __version__
from bitsmith.errors import BitsmithError
from bitsmith.run.evaluate import Artifact, Measure, Protocol


@dataclass(frozen=True)
class Attempt:
    """One method tried on one row: its gates (`Judged.to_json`) and what was decided."""

    method: str
    scheme: str
    stored_bytes: int
    gates: tuple[Mapping[str, Any], ...]
    decision: str

    @property
    def failed(self) -> Mapping[str, Any] | None:
        """The first gate that did not pass."""
        return next((gate for gate in self.gates if gate["outcome"] != "PASS"), None)


@dataclass(frozen=True)
class SahcRow:
    """One tensor: what became of it, and everything that was tried before.

    `ratio` is to 16 bits, None for a method that has not passed every gate; what is kept as stored needs
    none. `total_error` is |W - W'| / |W|.
    """

    name: str
    component: str
    role: str
    layer: int | None
    shape: tuple[int, ...]
    method: str
    scheme: str
    stored_bytes: int
    ratio: float | None
    total_error: float | None
    attempts: tuple[Attempt, ...] = ()

    @property
    def replans(self) -> int:
        """How many methods were given up."""
        return max(0, len(self.attempts) - 1)


@dataclass(frozen=True)
class ComponentRow:
    """One line of the result table; ratios are to 16 bits.

    `theory_ratio` is what the planned method takes at this model's shapes, `actual_bytes` what is stored,
    `ratio` None where a row of it has none; `methods` counts tensors by method.
    """

    name: str
    what: str
    parameters: int
    share: float
    claimed_ratio: float
    theory_ratio: float | None
    actual_bytes: int
    ratio: float | None
    published_ratio: str
    methods: Mapping[str, int]


@dataclass(frozen=True)
class Written:
    """One artifact as written and read back; `sha256` is of its shards, in their order."""

    artifact: Artifact
    ratio: float | None
    measures: Mapping[str, Measure]
    chunk_nll_nats: tuple[float, ...]
    gates: tuple[Mapping[str, Any], ...]
    sha256: str


@dataclass(frozen=True)
class SahcResult:
    """The recipe on one model against row-int4 alone, which is written and measured the same way.

    `ppl_over_int4` is the ratio of perplexities, paired by chunk; `bytes_over_int4` of file bytes.
    `quantizer` compares the planned SVD + int4 with its low rank alone, over the rows it was tried on.
    """

    model: str
    original: Artifact
    protocol: Protocol
    probe: str
    rows: tuple[SahcRow, ...]
    components: tuple[ComponentRow, ...]
    rounds: int
    sahc: Written
    int4: Written
    ppl_over_int4: Measure
    bytes_over_int4: float
    quantizer: Mapping[str, Measure]
    gates_passed: int
    gates_failed: int
    gates_unmeasured: int
    replans: int
    same_as_int4: bool
    resumed: int = 0
    seconds: float = 0.0

    @property
    def failed(self) -> tuple[Mapping[str, Any], ...]:
        """The gates of the artifact that did not pass; with any there is no output."""
        return tuple(gate for gate in self.sahc.gates if gate["outcome"] != "PASS")

    @property
    def ratio(self) -> float | None:
        """File bytes of the original over those of the artifact; None where a gate did not pass."""
        return self.sahc.ratio

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready record."""
        found = {"kind": "sahc", "bitsmith": __version__, **asdict(self)}
        del found["resumed"], found["seconds"]
        return found


@dataclass(frozen=True)
class SahcRecord:
    """What `bitsmith compress --recipe sahc` wrote, and where: the model `out`, and all else in `work`."""

    out: Path
    work: Path
    audit: Path
    result: SahcResult

    def refuse_failed(self) -> None:
        """Raise BitsmithError that names the model's gates that did not pass, if there are any."""
        if not self.result.failed:
            return
        said = ", ".join(
            f"{gate['name']} {'unmeasured' if gate['value'] is None else format(gate['value'], '.4g')} "
            f"({gate['direction']} {gate['limit']:g} passes)"
            for gate in self.result.failed
        )
        left = "; what was there is left as it was" if self.out.exists() else ""
        raise BitsmithError(
            f"is not written, gates did not pass: {said}{left}; see {self.audit}", path=self.out
        )

    def to_json(self) -> dict[str, Any]:
        """Return the result with its places and times."""
        places = {name: str(getattr(self, name)) for name in ("out", "work", "audit")}
        times = {"resumed": self.result.resumed, "seconds": self.result.seconds}
        return {**self.result.to_json(), **places, **times}
