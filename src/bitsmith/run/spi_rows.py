"""What `study spi` finds: the schema of `spi.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from bitsmith import __version__
from bitsmith.run.evaluation import Artifact, Measure, Protocol
from bitsmith.run.format_rows import ClaimCheck

RULES = ("alpha-high", "alpha-low", "tail-high", "tail-low")
"""The readings of the published rule."""
MEASURED, PURE = "kld-high", "NF4"
"""The row that is chosen by measured KLD, and the one in which every linear is NF4."""

Equal = Literal["count", "bytes"]
Against = Literal["random", "inverse", "measured"]


@dataclass(frozen=True)
class LinearRow:
    """One linear: what its spectrum says, and the mean KLD with it alone in NF4 (None: unmeasured)."""

    name: str
    role: str
    layer: int
    shape: tuple[int, ...]
    nbytes: int
    alpha: float | None
    tail: float | None
    r90: float | None
    kld_nats: float | None


@dataclass(frozen=True)
class SpiRow:
    """One choice as written and measured; `names` are the linears it keeps.

    `measures` are `evaluate`'s, `chunk_kld_nats` the mean KLD of each chunk, by which comparisons are paired.
    """

    name: str
    names: tuple[str, ...]
    kept_bytes: int
    file_bytes: int
    bpw: float
    measures: Mapping[str, Measure]
    chunk_kld_nats: tuple[float, ...]


@dataclass(frozen=True)
class SpiTable:
    """Choices that keep equally many linears, or as many bytes of them as fit one budget."""

    equal: Equal
    asked: str
    rows: tuple[SpiRow, ...]

    def row(self, name: str) -> SpiRow | None:
        """Return the row of that name, None where it is not in the table."""
        return next((row for row in self.rows if row.name == name), None)

    @property
    def random(self) -> tuple[SpiRow, ...]:
        """The random choices."""
        return tuple(row for row in self.rows if row.name.startswith("random"))


@dataclass(frozen=True)
class Comparison:
    """A rule beside a control at equal count or bytes, by mean KLD.

    `measure` is its difference from the control's in nats, paired by chunk; beside random choices the ratio
    to their geometric mean, with the interval in which a further random choice would lie. `better` is None
    where the interval lies on both sides; `rank` 1 is the lowest KLD of `of`.
    """

    equal: Equal
    rule: str
    against: Against
    control: str
    measure: Measure
    better: bool | None
    rank: int | None = None
    of: int | None = None


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation of two figures over the linears that have both."""

    one: str
    other: str
    linears: int
    measure: Measure


@dataclass(frozen=True)
class SpiStudy:
    """The study of one model; `calibration` says what `kld` was measured on, None where it was not."""

    model: str
    original: Artifact
    protocol: Protocol
    calibration: str | None
    linears: tuple[LinearRow, ...]
    tables: tuple[SpiTable, ...]
    comparisons: tuple[Comparison, ...]
    correlations: tuple[Correlation, ...]
    resumed: int
    seconds: float
    claims: tuple[ClaimCheck, ...] = ()

    @property
    def original_ppl(self) -> Measure:
        """The original's perplexity."""
        return self.tables[0].rows[0].measures["ppl_ref"]

    def table(self, equal: Equal) -> SpiTable:
        """Return the table of equal counts or of equal bytes."""
        return next(table for table in self.tables if table.equal == equal)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready record."""
        return {"kind": "spi study", "bitsmith": __version__, **asdict(self)}
