"""The command line run in the tests' own process, which spares a start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bitsmith.cli.main import main


def completed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str | Path
) -> subprocess.CompletedProcess[str]:
    """Run `main` here, which spares a start."""
    monkeypatch.setattr(sys, "argv", ["bitsmith", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return subprocess.CompletedProcess(sys.argv, int(stop.value.code or 0), *capsys.readouterr())


def in_process(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str | Path
) -> tuple[int, str]:
    """Return the exit code of `main` and what is on stderr."""
    done = completed(capsys, monkeypatch, *arguments)
    return done.returncode, done.stderr
