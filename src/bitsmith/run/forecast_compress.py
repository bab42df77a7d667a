"""What a compression will take, whatever it writes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from bitsmith.numerics.threads import at_most, one_blas_thread
from bitsmith.run.cellm import CellmPlan
from bitsmith.run.compress import Planned, device_named
from bitsmith.run.folder import FolderPlan
from bitsmith.run.forecast import OTHER_DEVICE, Forecast
from bitsmith.run.forecast_gguf import forecast_gguf
from bitsmith.run.forecast_packed import forecast_cellm, forecast_folder
from bitsmith.run.job import Job
from bitsmith.run.plan import Plan
from bitsmith.store.hub import local


@one_blas_thread()
def forecast(job: Job, planned: Planned) -> Forecast | None:
    """Predict what `compress` takes for a job and its plan; None for factors and for recipes spi and sahc.

    Those search as they go: how long is not known before. `Forecast.unmeasured` names what the figures of a
    GGUF leave out.
    """
    with device_named(job.device), at_most(job.threads):
        found = _forecast(replace(job, model=local(job.model)), planned)
    if found is None or job.device == "cpu":
        return found
    return replace(found, unmeasured=(*found.unmeasured, OTHER_DEVICE))


def _forecast(job: Job, planned: Planned) -> Forecast | None:
    if isinstance(planned, CellmPlan):
        return forecast_cellm(job, planned)
    if isinstance(planned, FolderPlan):
        return forecast_folder(job, planned)
    if not isinstance(planned, Plan):
        return None
    found = forecast_gguf(job, planned)
    if job.text is not None and job.statistics is None:
        from bitsmith.run.forecast_forward import forecast_calibrate  # noqa: PLC0415 (loads torch)

        found = found.behind(forecast_calibrate(job.model, job.text, job.destination.with_suffix(".stats")))
    return replace(found, unmeasured=(*found.unmeasured, *_left_out(job, planned)))


def _left_out(job: Job, planned: Plan) -> Iterator[str]:
    if job.statistics is None and job.needs_forward:
        yield "rounding by the statistics that are learned, which takes longer than the plain search"
    if job.statistics is not None:
        yield "how near the rounding by --stats comes to this"
        if job.follows(job.statistics):
            yield "statistics behind the compressed layers (--no-sequential takes those of --stats alone)"
    if planned.transforms or job.searches:
        yield "solving the transforms, and searching for them"
    if job.tune or job.recipe == "auto" or job.goal() is not None:
        yield "candidates, their evaluation, and tuning"
