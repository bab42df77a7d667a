"""The wheel, installed into a virtual environment of its own, runs the demo from anywhere."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command without what this process's environment says about Python, and return what it says."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_wheel_in_a_clean_environment_runs_the_demo(tmp_path: Path) -> None:
    pip = ("-m", "pip", "--disable-pip-version-check", "--quiet")
    run(sys.executable, *pip, "wheel", "--no-deps", "-w", tmp_path, ROOT, cwd=tmp_path)
    (wheel,) = tmp_path.glob("bitsmith-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"bitsmith", f"bitsmith-{version('bitsmith')}.dist-info"}
    run(sys.executable, "-m", "venv", tmp_path / "clean", cwd=tmp_path)
    python = tmp_path / "clean" / "bin" / "python"
    run(python, *pip, "install", "-c", ROOT / "constraints.txt", wheel, cwd=tmp_path)
    code = "import bitsmith, torch; print(bitsmith.__file__); print(torch.__version__)"
    where, build = run(python, "-c", code, cwd=tmp_path).splitlines()
    assert Path(where).is_relative_to(tmp_path / "clean")
    assert build == version("torch")  # a CPU build stays one
    run(python.with_name("bitsmith"), "demo", cwd=tmp_path)
    assert "Q4_K_M" in (tmp_path / "demo-out" / "report.html").read_text("utf-8")
    run(python.with_name("bitsmith"), "verify", "demo-out/demo-Q4_K_M.gguf", cwd=tmp_path)
