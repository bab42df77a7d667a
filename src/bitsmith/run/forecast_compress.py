"""What a compression will take, whatever it writes."""

from __future__ import annotations

from bitsmith.numerics.threads import one_blas_thread
from bitsmith.run.compress import Planned
from bitsmith.run.forecast import Forecast
from bitsmith.run.forecast_gguf import forecast_gguf
from bitsmith.run.job import Job
from bitsmith.run.plan import Plan


@one_blas_thread()
def forecast(job: Job, planned: Planned) -> Forecast | None:
    """Predict what `compress` takes for a job and its plan; None where that is not known how to."""
    if isinstance(planned, Plan):
        return forecast_gguf(job, planned)
    return None
