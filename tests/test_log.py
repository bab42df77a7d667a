"""The log as JSON lines, the global flags wherever they stand, and exit codes as they are documented."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from bitsmith.cli import invocation
from bitsmith.cli.main import main
from bitsmith.errors import BitsmithError, OutputError
from bitsmith.lab.models import DEMO_MODEL
from bitsmith.log import LOGGER, event, latest_place, reading, to_json_lines, warn
from bitsmith.run.engine import LocalEngine
from bitsmith.run.task import Task

HOSTILE = 'a\x1b]0;t\x07\u202e</script>\n"'


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def log(tmp_path: Path):
    """A log that goes again with the test."""
    level = LOGGER.level
    path = tmp_path / "log.jsonl"
    handler = to_json_lines(path)
    yield path
    LOGGER.removeHandler(handler)
    LOGGER.setLevel(level)
    handler.close()


def called(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str | Path
) -> tuple[int, str, str]:
    """Return the exit code, stdout and stderr of a command line run in this process."""
    monkeypatch.setattr(sys, "argv", ["bitsmith", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    seen = capsys.readouterr()
    return int(stop.value.code or 0), seen.out, seen.err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("inspect M --quiet", "--quiet inspect M"),
        ("inspect --offline M --log-json", "--offline --log-json=- inspect M"),
        ("--log-json inspect M", "--log-json=- inspect M"),
        ("compress M --log-json run.jsonl -o x", "--log-json=run.jsonl compress M -o x"),
        ("compress M --log-json=any -o x", "--log-json=any compress M -o x"),
        ("compress M --log-json -o x.log", "--log-json=- compress M -o x.log"),
        ("generate M -p --quiet --quiet", "--quiet generate M -p --quiet"),
        ("generate M --prompt --log-json", "generate M --prompt --log-json"),
        ("inspect -- --quiet", "inspect -- --quiet"),
    ],
)
def test_global_flags_stand_anywhere(words: str, expected: str) -> None:
    assert invocation.hoisted(words.split()) == expected.split()


def test_a_record_is_a_line_of_ascii_at_once(log: Path) -> None:
    event("encode", tensor=HOSTILE, bytes=3, path=Path("p"))
    reading("w", Path("f"), 4)
    reading("w", Path("f"), 4)
    warn(f"odd {HOSTILE}")
    raw = log.read_bytes()
    assert raw.isascii() and raw.count(b"\n") == 3
    told = lines_of(log)
    assert [one["event"] for one in told] == ["encode", "read", "warning"]
    assert told[0]["tensor"] == HOSTILE and told[0]["path"] == "p" and told[1]["bytes"] == 4
    assert latest_place() == f"encode, tensor {HOSTILE.encode('unicode_escape').decode()!r}"


def test_nothing_is_made_where_nobody_listens(caplog: pytest.LogCaptureFixture) -> None:
    event("encode", tensor="w")
    assert not caplog.records


def test_a_log_goes_on_and_no_other_file_is_written_into(tmp_path: Path, log: Path) -> None:
    event("first")
    again = to_json_lines(log)
    LOGGER.removeHandler(again)
    again.close()
    event("second")
    assert [one["event"] for one in lines_of(log)] == ["first", "second"]
    other = tmp_path / "config.json"
    other.write_text('{"a": 1}')
    with pytest.raises(OutputError, match=r"config\.json: is no log of bitsmith's"):
        to_json_lines(other)
    assert other.read_text() == '{"a": 1}'
    with pytest.raises(OutputError, match=r"no/log: cannot be written"):
        to_json_lines(tmp_path / "no" / "log")


def test_a_run_tells_of_every_tensor_before_it_and_how_it_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log, out = tmp_path / "run.jsonl", tmp_path / "out.gguf"
    before = list(LOGGER.handlers), LOGGER.level
    words = ("compress", DEMO_MODEL, "-o", out, "--type", "Q8_0", "--json", tmp_path / "r.json")
    code, shown, errors = called(capsys, monkeypatch, *words, "--quiet", "--log-json", log)
    assert (code, errors) == (0, "") and "wrote" in shown
    told = lines_of(log)
    assert (told[0]["event"], told[-1]["event"], told[-1]["exit_code"]) == ("start", "end", 0)
    assert told[0]["command"][0] == "compress"
    names = [row["hf_name"] for row in json.loads((tmp_path / "r.json").read_text())["tensors"]]
    encoded = [one["tensor"] for one in told if one["event"] == "encode"]
    assert sorted(encoded) == sorted(names)
    at = {one["tensor"]: number for number, one in enumerate(told) if one["event"] == "encode"}
    for number, one in enumerate(told):
        if one["event"] == "progress" and one["done"] < one["total"]:
            assert at[one["tensor"]] < number
    assert (list(LOGGER.handlers), LOGGER.level) == before
    code, _, errors = called(capsys, monkeypatch, *words, "--log-json")
    assert code == 1
    told = [json.loads(line) for line in errors.splitlines()]
    assert [one["event"] for one in told] == ["start", "error", "end"]
    assert "out.gguf: exists; pass --overwrite" in told[1]["message"] and told[2]["exit_code"] == 1


def test_help_and_documentation_name_the_same_exit_codes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, shown, _ = called(capsys, monkeypatch, "--help")
    assert code == 0 and invocation.EXIT_CODES.split() == shown.split()[-len(invocation.EXIT_CODES.split()) :]
    page = (Path(__file__).parents[1] / "docs" / "reliability.md").read_text()
    table = page.partition("## Exit codes")[2].partition("\n## ")[0]
    for number in (0, BitsmithError.exit_code, 2, invocation.OUT_OF_MEMORY, 4, invocation.INTERRUPTED, 137):
        assert f"{number} " in invocation.EXIT_CODES and f"\n| {number} |" in table
    assert called(capsys, monkeypatch, "nonsense")[0] == 2
    assert called(capsys, monkeypatch, "inspect", "absent", "--quiet")[::2] == (
        1,
        "error: absent: does not exist\n",
    )


def die_at_tensor(params, inputs, out, progress):
    """Begin a tensor, then end as the system ends what takes too much memory."""
    event("encode", tensor="big\x1b.weight")
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_has_told_its_parent_of_the_tensor(tmp_path: Path, log: Path) -> None:
    engine = LocalEngine(1)
    attempt = engine.start(Task("t", "die", {}), die_at_tensor, {}, tmp_path / "out")
    try:
        while not engine.wait(60):
            pass
    finally:
        engine.stop()
    assert attempt.failure is not None and attempt.failure.kind == "killed"
    assert attempt.failure.evidence["at"] == "encode, tensor 'big\\\\x1b.weight'"
    assert {"event": "encode", "task": "t", "tensor": "big\x1b.weight"}.items() <= lines_of(log)[-1].items()


def test_levels_are_those_of_logging(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "bitsmith"):
        event("begins", layer=3)
        warn("odd")
    assert [record.levelno for record in caplog.records] == [logging.INFO, logging.WARNING]
