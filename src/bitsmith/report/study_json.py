"""What a report is made of: the schema of `report.json`, which a study writes and any run can be turned into.

Every figure is a `Figure`: value, unit, interval. What was not measured is null or left out, and `unmeasured`
says why; NaN and infinity are refused, a divergence that is not finite is unmeasured. Unknown fields are
refused, so that a misspelt one is not silently lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from bitsmith.errors import BitsmithError, printable
from bitsmith.run.study_peers import Figure, Peer

SCHEMA = 1
"""Version of the JSON; grows when a field changes its meaning."""

Outcome = Literal["PASS", "FAIL", "UNMEASURED", ""]
"""Of a gate; empty for a line of the audit log that only tells a decision."""

Status = Literal["pending", "running", "done", "failed", "blocked"]
Held = Literal["HELD", "NOT HELD", "NOT TESTED"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Tensor(_Part):
    """One tensor of an artifact as written.

    `squared_error` is ‖W − W'‖² / ‖W‖² (no unit), `held_squared_error` Σ‖(W − W') x‖² / Σ‖W x‖² over held-out
    inputs x. `layer` is None outside the layers; `shape` is `out in`; `bpw` = 8 nbytes / weights.
    """

    name: str
    role: str
    layer: int | None
    shape: tuple[int, ...]
    type: str
    nbytes: int
    squared_error: float | None = None
    held_squared_error: float | None = None
    rounder: str = ""
    note: str = ""


class LayerFigure(_Part):
    """A figure of one layer, such as the cosine of its output with the original's; `what` names it.

    `role` is that of a single tensor in the layer, empty for the whole layer.
    """

    layer: int
    what: str
    figure: Figure
    role: str = ""


class Artifact(_Part):
    """One row of the study: what was made, and its figures.

    `bpw` = 8 × bytes of stored tensors / weights, as `evaluate` has it; rows of `study formats` and of
    `study spi` count whole files. `group` is what the legend filters by (a family, a recipe), `is_original`
    marks the yardstick. `measures` are by `evaluate`'s names (`mean_kld`, `ppl_cand`, `kld_99_9`, …), others
    may be added. `protocol` names one of the study's protocols. `verdict` is one word on what was found,
    `unmeasured` why a figure is missing; `tensors` and `layers` may be empty.
    """

    name: str
    group: str
    what: str = ""
    model: str = ""
    recipe: str = ""
    path: str = ""
    is_original: bool = False
    file_bytes: int | None = None
    weights: int | None = None
    bpw: float | None = None
    measures: Mapping[str, Figure] = Field(default_factory=dict)
    protocol: str = ""
    verdict: str = ""
    unmeasured: str = ""
    seconds: float | None = None
    sha256: str = ""
    tensors: tuple[Tensor, ...] = ()
    layers: tuple[LayerFigure, ...] = ()
    commands: tuple[str, ...] = ()


class GateLine(_Part):
    """One line of the audit log: who judged what, the value against its limit, and what was decided.

    `artifact` and `tensor` say where, empty for the whole; `gate` by which gate, `direction` on which side of
    the limit it passes (`below`, `at most`, `at least`). `evidence` is any JSON, `when` ISO 8601, UTC.
    """

    when: str
    who: str
    what: str
    outcome: Outcome = ""
    value: float | str | None = None
    limit: float | str | None = None
    unit: str = ""
    low: float | None = None
    high: float | None = None
    evidence: JsonValue = None
    decision: str = ""
    artifact: str = ""
    tensor: str = ""
    gate: str = ""
    direction: str = ""


class Spectrum(_Part):
    """Singular values of one matrix at `index` (1-based), for plots: at most some hundred points.

    `alpha` is the exponent of the power law of λ = σ², `r90` the smallest k with Σ_{i≤k} σ ≥ 0.9 Σσ, both as
    `bitsmith.run.assay_result` has them; `effective_rank` exp(entropy of σ²/Σσ²). `model` is for studies of
    several.
    """

    name: str
    role: str
    layer: int | None
    shape: tuple[int, ...]
    index: tuple[int, ...] = ()
    sigma: tuple[float, ...] = ()
    alpha: float | None = None
    effective_rank: float | None = None
    stable_rank: float | None = None
    r90: int | None = None
    model: str = ""


class Passage(_Part):
    """What one artifact wrote after a prompt; `how` says how it was sampled, `note` what is to know of it."""

    artifact: str
    how: str
    text: str
    note: str = ""


class Sample(_Part):
    """One prompt and what each artifact wrote after it."""

    prompt: str
    passages: tuple[Passage, ...]


class Protocol(_Part):
    """How a row's figures were measured: `settings` are names and values, shown as they are."""

    name: str
    settings: Mapping[str, JsonValue] = Field(default_factory=dict)


class TaskLine(_Part):
    """The state of one task of the graph; `why` says why it failed or what blocks it."""

    name: str
    action: str
    status: Status
    attempts: int = 0
    seconds: float | None = None
    needs: tuple[str, ...] = ()
    key: str = ""
    why: str = ""


class Claim(_Part):
    """A published or own claim, what was found of it, and the figure that says so."""

    claim: str
    source: str
    outcome: Held
    found: str
    measure: Figure | None = None


class MergeTarget(_Part):
    """What a diagnostic of a merge should be: `low` at least, `high` at most; None is no bound.

    `is_band` tells that the bounds are what the pair of models shows by itself.
    """

    figure: str
    low: float | None = None
    high: float | None = None
    is_band: bool = False


class MergePlace(_Part):
    """A layer of a student, or (`layer` None) what is behind all: the teacher's, diagnostics, shares.

    `figures` are by the names of `bitsmith.run.merge_diagnostics`, `reference` the same by the pair's
    least-squares map; `met` tells which targets are met, None where that cannot be told. `attention_kl` is
    one figure per KV group for each way of comparing, as `bitsmith.run.merge_attention` names them. `mixer`
    and `ffn` are the shares α that were asked for, `taken_mixer` and `taken_ffn` those of the result; a
    mixer's are by KV group or K head.
    """

    layer: int | None
    teacher_layer: int | None = None
    kind: str = ""
    figures: Mapping[str, Figure] = Field(default_factory=dict)
    reference: Mapping[str, Figure] = Field(default_factory=dict)
    met: Mapping[str, bool | None] = Field(default_factory=dict)
    attention_kl: Mapping[str, tuple[Figure | None, ...]] = Field(default_factory=dict)
    mixer: tuple[float, ...] = ()
    ffn: float | None = None
    taken_mixer: tuple[float, ...] = ()
    taken_ffn: float | None = None
    unmeasured: Mapping[str, str] = Field(default_factory=dict)


class MergeTrial(_Part):
    """Shares that were tried on a `half` of the held-out chunks, that which chooses or that which judges.

    `figure` is the perplexity over the student's, None where `why` says why; `worst_end` is the larger of the
    upper ends by which it is judged.
    """

    label: str
    half: str = ""
    figure: Figure | None = None
    worst_end: float | None = None
    why: str = ""


class Merge(_Part):
    """How an artifact was merged: of what, by which recipe, what was decided and why, place by place.

    `is_adopted` tells whether anything of the teacher is in it; where not, it is the student as it was.
    `settings` are the recipe's, `shares` of embedding and head. `protocol` is of `measures` and trials,
    `diagnosed` of the diagnostics.
    """

    name: str
    teacher: str
    student: str
    is_adopted: bool
    reason: str = ""
    settings: Mapping[str, JsonValue] = Field(default_factory=dict)
    protocol: Mapping[str, JsonValue] = Field(default_factory=dict)
    diagnosed: Mapping[str, JsonValue] = Field(default_factory=dict)
    shares: Mapping[str, float] = Field(default_factory=dict)
    measures: Mapping[str, Figure] = Field(default_factory=dict)
    trials: tuple[MergeTrial, ...] = ()
    targets: tuple[MergeTarget, ...] = ()
    places: tuple[MergePlace, ...] = ()


class ExperimentRow(_Part):
    """One row of an experiment: its figures, and whatever else is to be said of it."""

    label: str
    figures: Mapping[str, Figure] = Field(default_factory=dict)
    facts: Mapping[str, JsonValue] = Field(default_factory=dict)


class Experiment(_Part):
    """A question, in `words`, and what each row of it came to."""

    name: str
    words: str = ""
    rows: tuple[ExperimentRow, ...] = ()


class Digest(_Part):
    """SHA-256 of a source, a text, statistics or an artifact."""

    what: str
    sha256: str


class Study(_Part):
    """Everything a report shows; each part may be empty. `commands` repeat the study, in order."""

    kind: Literal["study"] = "study"
    schema_version: Literal[1] = 1
    bitsmith: str
    title: str
    summary: tuple[str, ...] = ()
    artifacts: tuple[Artifact, ...] = ()
    peers: tuple[Peer, ...] = ()
    protocols: tuple[Protocol, ...] = ()
    gates: tuple[GateLine, ...] = ()
    tasks: tuple[TaskLine, ...] = ()
    claims: tuple[Claim, ...] = ()
    merges: tuple[Merge, ...] = ()
    experiments: tuple[Experiment, ...] = ()
    spectra: tuple[Spectrum, ...] = ()
    samples: tuple[Sample, ...] = ()
    environment: Mapping[str, str] = Field(default_factory=dict)
    digests: tuple[Digest, ...] = ()
    commands: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the study as plain values, ready for `json.dumps(..., allow_nan=False)`."""
        return self.model_dump(mode="json")


def read_study(value: object, path: Path | None = None) -> Study:
    """Return a study of its JSON. Raises BitsmithError naming the first field that is not as documented."""
    try:
        return Study.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise BitsmithError(
            f"is not a study's JSON: {printable(where)}: {printable(first['msg'])}", path=path
        ) from error
