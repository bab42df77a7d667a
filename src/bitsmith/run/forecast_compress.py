"""What a compression will take, whatever it writes."""

from __future__ import annotations

from dataclasses import replace

from bitsmith.numerics.threads import one_blas_thread
from bitsmith.run.cellm import CellmPlan
from bitsmith.run.compress import Planned
from bitsmith.run.folder import FolderPlan
from bitsmith.run.forecast import Forecast
from bitsmith.run.forecast_gguf import forecast_gguf
from bitsmith.run.forecast_packed import forecast_cellm, forecast_folder
from bitsmith.run.job import Job
from bitsmith.run.plan import Plan
from bitsmith.store.hub import local


@one_blas_thread()
def forecast(job: Job, planned: Planned) -> Forecast | None:
    """Predict what `compress` takes for a job and its plan; None for factors and for recipes spi and sahc.

    Those search as they go: how long is not known before.
    """
    job = replace(job, model=local(job.model))
    if isinstance(planned, Plan):
        return forecast_gguf(job.resolved(), planned)
    if isinstance(planned, CellmPlan):
        return forecast_cellm(job, planned)
    if isinstance(planned, FolderPlan):
        return forecast_folder(job, planned)
    return None
