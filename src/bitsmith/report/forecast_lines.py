"""A forecast in words: what a run will take, with the interval that is promised, and from what."""

from __future__ import annotations

from bitsmith.report.terminal import bytes_text
from bitsmith.run.forecast import MARGIN, Forecast, Part

UNMEASURED = "what the run will take is unmeasured: no forecast of its kind has been held against runs"


def forecast_lines(forecast: Forecast) -> list[str]:
    """Return a forecast, line by line."""
    rates = forecast.rates
    read = "unmeasured" if rates.disk_read is None else f"{rates.disk_read / 1e6:,.0f}"
    return [
        _promise(forecast),
        f"disk: {bytes_text(forecast.output_bytes)} of output, {bytes_text(forecast.scratch_bytes)} besides "
        f"meanwhile; {bytes_text(forecast.read_bytes)} read, {bytes_text(forecast.written_bytes)} written",
        *(_part(part) for part in forecast.parts if part.seconds >= forecast.seconds / 1000),
        *(f"  {one}: unmeasured" for one in forecast.unmeasured),
        f"measured in {forecast.calibrated_seconds:.1f} s, {rates.threads} threads: disk {read} MB/s read, "
        f"{rates.disk_write / 1e6:,.0f} MB/s written, memory {rates.memory / 1e9:.1f} GB/s, float32 products "
        f"{rates.matrix / 1e9:,.0f} GFLOP/s, SHA-256 {rates.sha256 / 1e6:,.0f} MB/s",
        "nothing is promised: part of the run is unmeasured"
        if forecast.unmeasured
        else f"promised within {MARGIN:.0%} on a machine that does nothing else",
    ]


def _promise(forecast: Forecast) -> str:
    seconds, memory = duration(forecast.seconds), mib(forecast.peak_memory_bytes)
    time, peak = forecast.seconds_interval, forecast.memory_interval
    if time is None or peak is None:
        told = f"{seconds}, peak memory {memory}"
        return f"{forecast.command}, by a rehearsal and without what is unmeasured: {told}"
    return (
        f"{forecast.command} will take {seconds} ({duration(time[0])} … {duration(time[1])}), "
        f"peak memory {memory} ({mib(peak[0])} … {mib(peak[1])})"
    )


def _part(part: Part) -> str:
    return f"  {part.name}: {duration(part.seconds)}, {part.amount:,.0f} {part.unit} at {part.rate:,.3g}/s"


def duration(seconds: float) -> str:
    """Return seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def mib(nbytes: int) -> str:
    """Return bytes in MiB."""
    return f"{nbytes / 2**20:,.0f} MiB"
