"""A real disk that is too small: a tmpfs, mounted for one command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from bitsmith.lab.models import STUDENT_MODEL
from bitsmith.lab.synth import synth
from bitsmith.run.execute import compress

PAGE_BYTES = 4096
BITSMITH = [sys.executable, "-m", "bitsmith.cli.main"]


def mounting() -> list[str]:
    """Return the words that let a command mount, of those that work here."""
    ways = (
        [["unshare", "-m"]] if os.geteuid() == 0 else [["unshare", "-rm"], ["sudo", "-nE", "unshare", "-m"]]
    )
    for words in ways:
        tried = ["sh", "-c", "mount -t tmpfs -o size=4096 none /mnt"]
        if shutil.which(words[0]) and _works([*words, *tried]):
            return words
    if os.environ.get("CI"):
        pytest.fail("this machine lets nobody mount a tmpfs")
    pytest.skip("this machine lets nobody mount a tmpfs")


def _works(command: Sequence[str]) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def on_a_disk_of(pages: int, folder: Path, scripts: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run shell lines in a tmpfs of so many pages; the folder is its place."""
    mount = f"mount -t tmpfs -o size={pages * PAGE_BYTES} none {folder} && cd {folder}"
    lines = "\n".join([mount, *scripts])
    return subprocess.run([*mounting(), "sh", "-c", lines], capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_disk_too_small_is_told_before_and_when_it_is_full(tmp_path: Path) -> None:
    """Three sizes: too small for the file; enough for it but not for its record; enough for all."""
    words = " ".join([*BITSMITH, "compress", str(STUDENT_MODEL), "-o out.gguf --type Q4_0"])
    nbytes = compress(STUDENT_MODEL, tmp_path / "out.gguf", "Q4_0").file_bytes
    pages = -(-nbytes // PAGE_BYTES)
    place = tmp_path / "disk"
    place.mkdir()
    said = f"{words} 2>&1; echo exit $?; find . -type f -exec stat -c '%n %s' {{}} +"
    small = on_a_disk_of(pages // 2, place, [said]).stdout
    assert f"out.gguf: needs {nbytes} bytes, the disk has {pages // 2 * PAGE_BYTES} free" in small, small
    assert small.endswith("exit 1\n"), small
    tight = on_a_disk_of(pages + 1, place, [said]).stdout
    assert "No space left on device" in tight and "Traceback" not in tight, tight
    assert tight.endswith("exit 1\n"), tight  # no file is listed
    ample = on_a_disk_of(pages + 100, place, [said]).stdout
    assert "exit 0" in ample and f"./out.gguf {nbytes}" in ample and ".part" not in ample, ample


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_disk_with_room_for_the_file_alone_takes_it(tmp_path: Path) -> None:
    """What is kept for a next run takes no more room than the file itself."""
    model = synth(tmp_path / "model", "0.8B", layers=1, vision=False, mtp=False)
    nbytes = compress(model, tmp_path / "out.gguf", "Q4_0").file_bytes
    place = tmp_path / "disk"
    place.mkdir()
    words = " ".join([*BITSMITH, "compress", str(model), "-o out.gguf --type Q4_0"])
    listed = "find . -type f -exec stat -c '%n %s' {} +; sha256sum -c out.gguf.sha256"
    shown = f"{words} 2>&1; echo exit $?; {listed}"
    said = on_a_disk_of(nbytes // PAGE_BYTES * 11 // 10, place, [shown]).stdout
    assert "exit 0" in said and f"./out.gguf {nbytes}" in said and ".part" not in said, said
    assert "out.gguf: OK" in said, said
