"""The table of faults in docs/reliability.md: all of them, each with what is done and tests that exist."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "reliability.md"
N_FAULTS = 41
ROW = re.compile(r"^\| (\d+) \| (.+?) \| (.*?) \| (.*?) \|$", re.MULTILINE)
TEST_ID = re.compile(r"`(test_\w+\.py)::(test_\w+)(\[[^`]*\])?`")


def rows() -> dict[int, tuple[str, str]]:
    """Return behaviour and tests by the fault's number."""
    found = ROW.findall(PAGE.read_text("utf-8"))
    assert [int(number) for number, *_ in found] == list(range(1, N_FAULTS + 1))
    return {int(number): (behaviour.strip(), tests) for number, _, behaviour, tests in found}


@cache
def functions(file: str) -> frozenset[str]:
    tree = ast.parse((TESTS / file).read_text("utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("fault", range(1, N_FAULTS + 1))
def test_every_fault_says_what_happens_and_which_test_shows_it(fault: int) -> None:
    behaviour, tests = rows()[fault]
    assert len(behaviour) > 10
    named = TEST_ID.findall(tests)
    assert named
    assert not [f"{file}::{name}" for file, name, _ in named if name not in functions(file)]


@pytest.mark.slow
def test_pytest_collects_every_test_that_the_table_names() -> None:
    wanted = {"".join(("tests/", file, "::", name, case)) for file, name, case in _all_ids()}
    files = sorted({one.partition("::")[0] for one in wanted})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "slow or not slow", *files]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=TESTS.parent, timeout=280)
    collected = set(done.stdout.splitlines())
    collected |= {one.partition("[")[0] for one in collected}
    assert wanted <= collected, sorted(wanted - collected)


def _all_ids() -> list[tuple[str, str, str]]:
    return [one for _, tests in rows().values() for one in TEST_ID.findall(tests)]
