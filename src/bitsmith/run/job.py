"""What a user asks `compress` for, in one place, and the function that does it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitsmith.errors import BitsmithError
from bitsmith.numerics.divergence import Estimate
from bitsmith.passes.transform import model_of, transform_of
from bitsmith.progress import Progress, silent
from bitsmith.run.budget import DEFAULT_CTX_TOKENS, Target, parse_fit, parse_target
from bitsmith.run.cellm import Selection
from bitsmith.run.execute import Record, compress, plan_for, statistics_of
from bitsmith.run.plan import Plan, open_source
from bitsmith.run.plan_file import write_plan
from bitsmith.run.sbgq import SBGQ, SBGQ_BASE, SBGQ_TRANSFORMS, sbgq_types
from bitsmith.run.transforms import AUTO, asked_for
from bitsmith.store import open_checkpoint
from bitsmith.store.atomic import refuse_taken
from bitsmith.store.hub import called

if TYPE_CHECKING:  # these load torch, which a plain compression must not
    from bitsmith.run.allocate import Allocation, Tried
    from bitsmith.run.calibrate import Calibration
    from bitsmith.run.transform_search import Search
    from bitsmith.run.tune import TuneRecord


@dataclass(frozen=True)
class Made(Record):
    """What the recipe did beside writing a file; a step that was not asked for is None.

    `measured` are the finished file's measures on the held-out part of the calibration text: the candidates
    and the tuning's best step were chosen on the same tokens, so a text of its own should confirm them.
    """

    calibration: Calibration | None = None
    allocation: Allocation | None = None
    tried: tuple[Tried, ...] = ()
    search: Search | None = None
    tuning: TuneRecord | None = None
    measured: Mapping[str, Estimate] = field(default_factory=dict)
    protocol: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            **super().to_json(),
            "calibration": None if self.calibration is None else self.calibration.to_json(),
            "allocation": None if self.allocation is None else self.allocation.to_json(),
            "candidates": [_tried(one) for one in self.tried],
            "transform_search": None if self.search is None else self.search.to_json(),
            "tuning": None if self.tuning is None else self.tuning.to_json(),
            "measured": {name: asdict(value) for name, value in self.measured.items()},
            "protocol": self.protocol,
        }


SPI, SAHC = "spi", "sahc"
SEQUENTIAL_WORK = 6e12
"""Weights times tokens up to which sequential statistics are the default: about 15 minutes on two cores."""


_SEARCHED = "transforms are searched for when the file is written; its header will name those that help"


@dataclass(frozen=True)
class Job:
    """The options of `bitsmith compress`; see `run.execute.compress` and `run.recipe.make` for each.

    Those after `overwrite` are for outputs other than GGUF: see `write_cellm`, `write_folder`, `write_spi`
    and `sahc`, but for `device`, one of `run.device`, and `threads`. `ctx_tokens` are those that `fit` makes
    room for, or of a chunk of recipe `sahc`.
    """

    model: Path
    out: Path | None = None
    type_name: str | None = None
    recipe: str | None = None
    transforms: str | None = None
    target: str | None = None
    fit: str | None = None
    ctx_tokens: int | None = None
    statistics: Path | None = None
    text: Path | None = None
    rounder: str = "auto"
    sequential: bool | None = None
    tune: bool = False
    tune_steps: int | None = None
    plan_file: Path | None = None
    plan_out: Path | None = None
    pure: bool = False
    tensor_types: tuple[tuple[str, str], ...] = ()
    no_fallback: bool = False
    allow_requantize: bool = False
    overwrite: bool = False
    group: int | None = None
    like_seed: bool = False
    selection: Selection | None = None
    ignore: tuple[str, ...] = ()
    critical: str | None = None
    by: str | None = None
    seed: int = 0
    chunks: int | None = None
    ppl_limit: float | None = None
    device: str = "cpu"
    threads: int | None = None

    def goal(self) -> Target | None:
        """Return the size to allocate, None where types are given.

        Raises BitsmithError for a malformed one, for two, and for the recipe without any.
        """
        if self.target is not None and self.fit is not None:
            raise BitsmithError("--target and --fit exclude each other")
        if self.target is not None:
            return parse_target(self.target)
        if self.fit is not None:
            return parse_fit(self.fit, self.ctx_tokens or DEFAULT_CTX_TOKENS)
        if self.recipe == "auto" and not (self.type_name or self.plan_file):
            raise BitsmithError("recipe auto needs a size: --target 4.66bpw, --target 4.86GiB or --fit 8GiB")
        return None

    @property
    def destination(self) -> Path:
        """The file to write: `out`, or a name made of the model's and the type's in the current folder."""
        size = self.target or self.fit
        what = f"auto-{size}" if size else (self.type_name or "Q4_K_M").upper()
        what = SBGQ if self.recipe == SBGQ else what
        what = self.plan_file.stem if self.plan_file else what
        return self.out or Path(f"{called(self.model)}-{what}.gguf")

    @property
    def types(self) -> dict[str, Any]:
        """The arguments that say which types and transforms are wanted, for `compress` and `plan_for`."""
        names = ("type_name", "plan_file", "pure", "tensor_types", "no_fallback", "allow_requantize")
        return {**{name: getattr(self, name) for name in names}, "transforms": asked_for(self.transforms)}

    @property
    def searches(self) -> bool:
        """Whether the transforms that help are to be found by trying them."""
        return self.transforms == AUTO

    def resolved(self) -> Job:
        """Return the job with the recipe `sbgq-iq4xs` spelled out; any other as it is.

        Raises BitsmithError for types or a size beside that recipe, which names them itself.
        """
        if self.recipe != SBGQ:
            return self
        if self.type_name or self.plan_file or self.pure or self.tensor_types or self.target or self.fit:
            raise BitsmithError(f"recipe {SBGQ} names every type; pass it without types, a plan and a size")
        with open_checkpoint(self.model) as checkpoint:
            rules = sbgq_types(model_of(checkpoint))
        chosen = SBGQ_TRANSFORMS if self.transforms is None else self.transforms
        return replace(
            self,
            out=self.destination,
            recipe=None,
            type_name=SBGQ_BASE,
            pure=True,
            tensor_types=rules,
            transforms=chosen,
        )

    @property
    def needs_forward(self) -> bool:
        """Whether something beside a target asks for the model's forward, and so for torch."""
        learns = self.text is not None and self.statistics is None
        asked = self.tune or self.searches or self.recipe == "auto" or learns
        return asked or self.follows(self.statistics)

    def follows(self, statistics: Path | None) -> bool:
        """Tell whether statistics are taken behind the compressed layers: as asked, else where that is cheap.

        Cheap is up to `SEQUENTIAL_WORK` weights times tokens, and only rounder `auto`, whose guard compares.
        """
        if self.sequential is not None or statistics is None or self.rounder != "auto":
            return bool(self.sequential)
        with open_checkpoint(self.model) as checkpoint:
            source = open_source(checkpoint, allow_requantize=True)
            tokens = statistics_of(source, statistics).tokens()
        weights = sum(tensor.ref.size for tensor in source.tensors)
        return tokens is not None and weights * sum(part.size for part in tokens) <= SEQUENTIAL_WORK

    def check(self) -> None:
        """Raise BitsmithError for options that contradict each other, OutputError for a plan in the way."""
        if self.tune_steps is not None and not self.tune:
            raise BitsmithError("--tune-steps is for --tune")
        if self.text is not None and self.statistics is not None:
            raise BitsmithError("--text and --stats exclude each other")
        if self.plan_file is not None and self.transforms is not None:
            raise BitsmithError("a plan names its transforms; pass it without --transforms")
        asked_for(self.transforms)
        if self.plan_out is not None:
            refuse_taken(self.plan_out, self.overwrite, [self.model], folder=False)


def run(job: Job, progress: Progress = silent) -> Record:
    """Compress as the job says; without a target, a text or tuning, torch is not loaded.

    Raises as `run.execute.compress` and `run.recipe.make` do.
    """
    job = job.resolved()
    job.check()
    goal = job.goal()
    if goal is not None or job.needs_forward:
        from bitsmith.run.recipe import make  # noqa: PLC0415 (loads torch)

        record: Record = make(job, goal, progress)
    else:
        record = compress(
            job.model,
            job.destination,
            statistics=job.statistics,
            rounder=job.rounder,
            overwrite=job.overwrite,
            progress=progress,
            **job.types,
        )
    _write_plan(job, record.plan)
    return record


def run_dry(job: Job, progress: Progress = silent) -> Plan:
    """Return the plan that `run` would carry out; writes nothing but `plan_out`.

    A target is allocated by measuring, which takes time; its candidates are not written, so the one predicted
    to be best is returned. Raises as `run` does.
    """
    job = job.resolved()
    job.check()
    goal = job.goal()
    if goal is not None:
        from bitsmith.run.recipe import plan_target  # noqa: PLC0415 (loads torch)

        planned: Plan = plan_target(job, goal, progress)
    else:
        planned = plan_for(job.model, statistics=job.statistics, **job.types)
    if job.searches:
        planned = replace(planned, notes=(*planned.notes, _SEARCHED))
    _write_plan(job, planned)
    return planned


def _write_plan(job: Job, planned: Plan) -> None:
    if job.plan_out is not None:
        with open_checkpoint(job.model) as checkpoint:
            transforms = [transform_of(one) for one in planned.transforms]
            source = open_source(checkpoint, transforms, allow_requantize=True)
            write_plan(planned, job.plan_out, source, overwrite=job.overwrite)


def _tried(one: Tried) -> dict[str, Any]:
    return {
        "name": one.name,
        "file_bytes": one.plan.file_bytes,
        "predicted_nats": one.predicted_nats,
        "measures": {name: asdict(value) for name, value in one.measures.items()},
    }
