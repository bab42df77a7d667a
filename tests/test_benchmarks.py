"""Results of benchmarks have one form, and docs/performance.md is what they give."""

import ast
import json
import sys
from copy import deepcopy
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import performance
from children import ChildFailedError, child
from measuring import (
    OURS,
    Limit,
    Spread,
    Turns,
    alternate,
    problems,
    rate_row,
    report,
    seconds_row,
    value_row,
)

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(
    file
    for file in BENCHMARKS.glob("*.py")
    if 'if __name__ == "__main__"' in file.read_text(encoding="utf-8")
)
NO_RESULT = {"peer", "texts", "performance"}
RESULTS = sorted((BENCHMARKS / "results").glob("*.json"))
TURNS = Turns({OURS: [1.0, 2.0, 4.0], "peer": [3.0, 4.0, 6.0]})
DISK = Limit("disk_read", Spread(100.0, 90.0, 110.0, 3), "bytes/s", "read")


def some_result(**changes: object) -> dict[str, object]:
    rows = [seconds_row("a", TURNS, limit=DISK, limit_amount=50.0), value_row("b", "bytes", {OURS: 3})]
    return report("some", {"statement": "Said."}, rows, {"disk_read": DISK}) | changes


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_kept_results_have_the_one_form(file: Path) -> None:
    result = json.loads(file.read_text(encoding="utf-8"))
    assert problems(result) == []
    assert result["name"] == file.stem


def test_the_page_is_what_the_results_give() -> None:
    assert performance.PAGE.read_text(encoding="utf-8") == performance.page(performance.load())


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.stem)
def test_every_script_reports_in_the_one_form(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module in ("measuring", "result")
        for alias in node.names
    }
    assert file.stem in NO_RESULT or "report" in imported


def test_make_bench_names_scripts() -> None:
    (line,) = (
        line for line in (BENCHMARKS.parent / "Makefile").read_text().splitlines() if "BENCH ?=" in line
    )
    assert set(line.split()[2:]) <= {file.stem for file in SCRIPTS} - NO_RESULT


def test_ratios_are_of_each_turn() -> None:
    assert TURNS.times_faster("peer") == Spread(2.0, 1.5, 3.0, 3)
    row = rate_row("a", TURNS, 8.0, "weights/s", limit=DISK, limit_amount=100.0)
    assert row.sides[OURS] == Spread(4.0, 2.0, 8.0, 3)
    assert row.ratios == {"peer": Spread(2.0, 1.5, 3.0, 3)}
    assert (row.limit, row.limit_fraction) == ("disk_read", 100.0 / 110.0 / 2.0)


@pytest.mark.parametrize(("better", "ratio"), [("lower", 2.0), ("higher", 0.5)])
def test_a_value_is_better_in_its_own_sense(better: str, ratio: float) -> None:
    row = value_row("a", "bytes", {OURS: 10.0, "peer": 20.0}, better=better)
    assert row.ratios["peer"] == Spread(ratio, None, None, 1)


def test_sides_take_turns_in_both_orders() -> None:
    order: list[str] = []
    turns = alternate({OURS: lambda: order.append("a"), "peer": lambda: order.append("b")}, 2, warmups=1)
    assert "".join(order) == "baabba"
    assert {name: spread.n for name, spread in turns.items()} == {OURS: 2, "peer": 2}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": 0}, "schema is 0"),
        ({"protocol": {}}, "no statement"),
        ({"rows": []}, "no rows"),
        ({"limits": {}}, "limit disk_read was not measured"),
        ({"machine": None}, "machine is None"),
        ({"more": 1}, "more is unknown"),
    ],
)
def test_what_has_another_form_is_said(change: dict[str, object], words: str) -> None:
    assert any(words in line for line in problems(some_result(**change)))


def test_a_row_without_its_fields_is_said() -> None:
    result = some_result()
    rows = deepcopy(result["rows"])
    del rows[0]["unit"]
    rows[1]["sides"][OURS]["median"] = "much"
    said = problems(result | {"rows": rows})
    assert said == ["row a: unit is missing", "row b, bitsmith: median is 'much'"]


def test_numbers_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="median is None"):
        report("some", {"statement": "Said."}, [value_row("a", "s", {OURS: float("nan")})])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="Linux counts a process's bytes")
def test_a_child_is_charged_with_what_its_own_children_do(tmp_path: Path) -> None:
    file, size = tmp_path / "file", 5_000_000
    code = (
        "import pathlib, subprocess, sys\n"
        "held = bytearray(60_000_000)\n"
        "held[::4096] = b'1' * len(held[::4096])\n"
        "pathlib.Path(sys.argv[1]).write_bytes(bytes(int(sys.argv[2])))\n"
        "inner = 'import sys; open(sys.argv[1], \"rb\").read()'\n"
        "subprocess.run([sys.executable, '-S', '-c', inner, sys.argv[1]], check=True)\n"
        "print('done')"
    )
    ran = child([sys.executable, "-S", "-c", code, file, str(size)], threads=1)
    assert ran.output == "done\n"
    assert ran.read_bytes is not None and size <= ran.read_bytes < 3 * size
    assert ran.written_bytes is not None and size <= ran.written_bytes < 1.1 * size
    assert 60_000_000 < ran.peak_bytes < 120_000_000
    assert ran.cpu_seconds > 0


def test_a_child_that_fails_is_quoted() -> None:
    with pytest.raises(ChildFailedError, match=r"(?s)status 3.*told"):
        child([sys.executable, "-S", "-c", "print('told'); raise SystemExit(3)"])
