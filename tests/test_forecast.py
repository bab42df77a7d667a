"""Dry runs tell what a run takes: exact bytes, rates that were measured, refusals before it starts."""

from __future__ import annotations

import json
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from bitsmith.cli.main import app
from bitsmith.errors import BitsmithError, OutputError
from bitsmith.lab.models import DEMO_MODEL
from bitsmith.report.forecast_lines import forecast_lines
from bitsmith.run.compress import compress
from bitsmith.run.compress import plan as plan_of
from bitsmith.run.forecast import Forecast, Io, Part, folder_of, io_so_far
from bitsmith.run.forecast_assay import Law, _makespan
from bitsmith.run.forecast_compress import forecast
from bitsmith.run.forecast_forward import Line, Spent
from bitsmith.run.forecast_gguf import Rehearsal
from bitsmith.run.forecast_guided import _through
from bitsmith.run.job import Job
from bitsmith.run.machine_rates import MachineRates, cached_bytes, disk_read_rate
from bitsmith.run.partial import first_rows
from bitsmith.store import open_checkpoint

MODEL = Path(str(DEMO_MODEL))
RATES = MachineRates(2, 1e9, 1e9, 1e10, 1e11, 1e9)


def _forecast(**changes: object) -> Forecast:
    plain = Forecast("compress", 10.0, 1 << 20, 100, 50, 1000, 200, (), RATES, 1.0, folder=Path("/"))
    return replace(plain, **changes)  # type: ignore[arg-type]


def test_a_gguf_s_forecast_has_the_bytes_that_the_run_writes_and_reads(tmp_path: Path) -> None:
    job = Job(MODEL, tmp_path / "out.gguf", type_name="Q4_K_M")
    planned = plan_of(job)
    imported = io_so_far().read
    found = forecast(job, planned)
    assert found is not None
    assert list(tmp_path.iterdir()) == []  # nothing is left of the rehearsal
    before = io_so_far()
    record = compress(job)
    moved = io_so_far().since(before)
    assert found.output_bytes == (tmp_path / "out.gguf").stat().st_size
    assert found.written_bytes == pytest.approx(moved.written, rel=0.05)
    assert found.read_bytes - imported == pytest.approx(moved.read, rel=0.3)
    kinds = [part for part in found.parts if part.unit == "weights"]
    small = sum(prod(row.shape) for row in planned.rows if prod(row.shape) <= 1 << 16)
    assert sum(part.amount for part in kinds) + small == record.plan.parameters
    assert found.seconds == pytest.approx(sum(part.seconds for part in found.parts))


@pytest.mark.parametrize(("name", "type_name"), [("out.cellm", "i4"), ("out", "W4A16")])
def test_packed_outputs_have_forecasts(name: str, type_name: str, tmp_path: Path) -> None:
    job = Job(MODEL, tmp_path / name, type_name=type_name)
    found = forecast(job, plan_of(job))
    assert found is not None
    weights = sum(part.amount for part in found.parts if part.unit == "weights")
    with open_checkpoint(MODEL) as checkpoint:
        assert weights == sum(ref.size for ref in checkpoint.values())
    assert list(tmp_path.iterdir()) == []


def test_factors_have_none(tmp_path: Path) -> None:
    job = Job(MODEL, tmp_path / "out", type_name="SVD:r=4")
    assert forecast(job, plan_of(job)) is None


def test_a_run_that_nothing_can_hold_is_refused(tmp_path: Path) -> None:
    _forecast(folder=tmp_path).refuse_too_large()
    with pytest.raises(OutputError, match="needs 1,000,000,000,000,050 bytes of disk"):
        _forecast(folder=tmp_path, output_bytes=10**15).refuse_too_large()
    with pytest.raises(BitsmithError, match="needs 1,000,000,000,000,000 bytes of memory"):
        _forecast(folder=tmp_path, peak_memory_bytes=10**15).refuse_too_large()


def test_what_is_unmeasured_is_neither_promised_nor_refused(tmp_path: Path) -> None:
    found = _forecast(folder=tmp_path, unmeasured=("tuning",), peak_memory_bytes=10**15)
    found.refuse_too_large()
    assert found.seconds_interval is None
    assert found.memory_interval is None
    lines = forecast_lines(found)
    assert "without what is unmeasured: 10.0 s" in lines[0]
    assert "  tuning: unmeasured" in lines
    assert not any("promised within" in line for line in lines)
    with pytest.raises(OutputError, match="bytes of disk"):
        replace(found, output_bytes=10**15).refuse_too_large()


def test_tokens_cost_what_the_processor_did_for_them() -> None:
    few, more = Spent(1.0, 1.0, Io(100, 0)), Spent(9.0, 2.7, Io(300, 0))
    line = Line.through(few, more, (10, 110), 2)
    assert line.token == pytest.approx(1.7 / 100 / 1.7)
    assert line.seconds(10) == pytest.approx(1.0)
    assert line.read_bytes(210) == pytest.approx(500)
    assert line.less(line.times(2)) == Line(0.0, 0.0, 0.0, 0.0)


def test_forecasts_follow_one_another() -> None:
    first, second = (
        _forecast(peak_memory_bytes=5),
        _forecast(seconds=1.0, parts=(Part("a", 1.0, 1, "b", 1.0),)),
    )
    both = second.behind(first)
    assert both.seconds == 11.0
    assert both.peak_memory_bytes == second.peak_memory_bytes
    assert both.scratch_bytes == 50 + 100 + 50
    assert both.seconds_interval is not None
    low, high = both.seconds_interval
    assert low == pytest.approx(7.7)
    assert high == pytest.approx(14.3)


def test_the_command_line_writes_the_forecast_as_json(tmp_path: Path) -> None:
    told = tmp_path / "told.json"
    words = ["compress", str(MODEL), "-o", str(tmp_path / "a.gguf"), "--dry-run", "--json", str(told)]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0, shown.output
    found = json.loads(told.read_text())["forecast"]
    assert found["kind"] == "forecast"
    assert found["seconds_interval"] == [
        pytest.approx(0.7 * found["seconds"]),
        pytest.approx(1.3 * found["seconds"]),
    ]
    assert "compress will take" in shown.output
    assert found["calibrated_seconds"] > 0


def test_a_law_goes_through_what_was_measured() -> None:
    def seconds(shape: tuple[int, int]) -> float:
        m, n = shape
        return 3e-10 * m * n * min(m, n) + 2e-9 * min(m, n) ** 3 + 0.05

    shapes = [(256, 256), (512, 256), (512, 512), (1024, 512), (1024, 1024)]
    law = Law.through({shape: seconds(shape) for shape in shapes})
    assert law.seconds((4096, 2048)) == pytest.approx(seconds((4096, 2048)), rel=1e-6)


def test_terms_of_a_width_are_never_negative() -> None:
    assert _through({512: 1.0, 1024: 3.0}) == pytest.approx((0.0009765625, 1.9073486e-06), rel=1e-6)
    linear, square = _through({512: 2.0, 1024: 3.0})  # grows less than linearly: noise
    assert square == 0.0
    assert linear == pytest.approx(5 / 1536)
    assert _through({256: 1.0}) == (1 / 256, 0.0)


def test_the_longest_jobs_begin_first() -> None:
    assert _makespan([1, 1, 1, 3], 2) == 3
    assert _makespan([1, 2, 3], 1) == 6


def test_what_a_file_takes_anyway_is_not_in_a_rate() -> None:
    small, large = Rehearsal(100, 1.1, Io(10, 5), 1.5), Rehearsal(1100, 2.1, Io(110, 55), 3.5)
    assert large.beyond(small) == Rehearsal(1000, 1.0, Io(100, 50), 2.0)
    assert small.beyond(large) is small


def test_first_rows_read_as_the_tensor_does() -> None:
    with open_checkpoint(MODEL) as checkpoint:
        ref = next(ref for ref in checkpoint.values() if len(ref.shape) == 2 and ref.n_rows > 8)
        part = first_rows(ref, 8)
        assert part.shape == (8, ref.shape[1])
        assert part.nbytes == 8 * ref.nbytes // ref.n_rows
        np.testing.assert_array_equal(part.read(), ref.read(0, 8))
        np.testing.assert_array_equal(part.raw(2, 5), ref.raw(2, 5))
        whole = first_rows(ref, ref.n_rows)
        assert whole is not ref  # hashing one must not hash the other
        np.testing.assert_array_equal(whole.read(), ref.read())


def test_the_page_cache_and_the_disk_are_looked_at(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(1 << 20))
    assert 0 <= cached_bytes([file]) <= 1 << 20
    assert (disk_read_rate([file], 0.01) or 0) > 0
    assert disk_read_rate([tmp_path / "absent"], 0.01) is None


def test_an_output_in_no_folder_is_forecast_where_files_may_lie(tmp_path: Path) -> None:
    assert folder_of(tmp_path / "out.gguf") == tmp_path
    assert folder_of(tmp_path / "absent" / "out.gguf").is_dir()
