"""What `study formats` finds: a row per format, claims with their outcomes, and how all was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from bitsmith import __version__
from bitsmith.run.coherence import SAMPLED, Coherence, rule
from bitsmith.run.evaluation import Measure, Protocol
from bitsmith.run.studied_formats import Family

ORIGINAL = "original"
Outcome = Literal["HELD", "NOT HELD", "NOT TESTED"]
Source = Literal["published", "ours"]


@dataclass(frozen=True)
class FormatRow:
    """One format on this model.

    `bpw` counts every byte of the weight files over every weight they hold; `float_bytes` are those of the
    matrices left in 16 or 32 bits, by part of the model. `measures` are `evaluate`'s, `chunk_kld_nats` the
    mean KLD of each chunk, which comparisons are paired by. What is not there says why in `unmeasured`.
    """

    name: str
    family: Family
    what: str
    rounding: str = ""
    file_bytes: int | None = None
    weights: int | None = None
    float_bytes: Mapping[str, int] = field(default_factory=dict)
    measures: Mapping[str, Measure] = field(default_factory=dict)
    chunk_kld_nats: tuple[float, ...] = ()
    coherence: Coherence | None = None
    seconds: float = 0.0
    unmeasured: str | None = None

    @property
    def bpw(self) -> float | None:
        """Bits of the files per weight, None where nothing was written."""
        return 8 * self.file_bytes / self.weights if self.file_bytes and self.weights else None


@dataclass(frozen=True)
class ClaimCheck:
    """A claim, whether it held here, and the figure that says so, with its interval where there is one."""

    claim: str
    source: Source
    outcome: Outcome
    found: str
    measure: Measure | None = None


@dataclass(frozen=True)
class FormatsStudy:
    """All rows, the original's first, and how they were measured; prompts are text as tokenized back."""

    model: str
    rows: tuple[FormatRow, ...]
    protocol: Protocol
    prompts: tuple[str, ...]
    prompt_tokens: int
    written_tokens: int
    statistics: str | None
    resumed: int
    seconds: float
    claims: tuple[ClaimCheck, ...] = ()

    def row(self, name: str) -> FormatRow | None:
        """Return the row called `name`, None where it is not in the study."""
        return next((row for row in self.rows if row.name == name), None)

    def ratio(self, row: FormatRow, to: str) -> float | None:
        """Return how many times smaller a row's files are than those of the row `to`."""
        base = self.row(to)
        if base is None or base.file_bytes is None or not row.file_bytes:
            return None
        return base.file_bytes / row.file_bytes

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready record."""
        rows = [
            {
                **asdict(row),
                "bpw": row.bpw,
                **{f"ratio_to_{to}": self.ratio(row, to) for to in ("f16", ORIGINAL)},
            }
            for row in self.rows
        ]
        return {
            "kind": "formats study",
            "bitsmith": __version__,
            **asdict(self),
            "rows": rows,
            "coherence_rule": rule(),
            "sampling": asdict(SAMPLED),
        }
