"""Commands killed, or out of disk, at the changes they make: no partial output, and the same bytes after."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from bitsmith.lab.models import STUDENT_MODEL, TEACHER_MODEL
from crash_points import FULL, KILL, Play, Stage, files_under, in_the_open, stage, sweep

MODEL, TEACHER = str(STUDENT_MODEL), str(TEACHER_MODEL)
CALIBRATE = ("calibrate", MODEL, "--text", "TEXT", "--ctx", "64", "--chunks", "6", "--no-saliency")

WRITERS: dict[str, Play] = {
    "gguf": Play(("compress", MODEL, "-o", "out.gguf", "--type", "Q4_K_M"), out="out.gguf"),
    "gguf with statistics": Play(
        ("compress", MODEL, "-o", "out.gguf", "--type", "Q3_K_M", "--stats", "STATS", "--rounder", "gptq"),
        out="out.gguf",
    ),
    "gguf with transforms": Play(
        ("compress", MODEL, "-o", "out.gguf", "--type", "Q4_0", "--transforms", "rotate"), out="out.gguf"
    ),
    "cellm": Play(("compress", MODEL, "-o", "out.cellm", "--type", "i4"), out="out.cellm"),
    "cellm with statistics": Play(
        ("compress", MODEL, "-o", "out.cellm", "--type", "i2", "--stats", "STATS"), out="out.cellm"
    ),
    "packed folder": Play(("compress", MODEL, "-o", "out", "--type", "W4A16"), out="out"),
    "packed folder with statistics": Play(
        ("compress", MODEL, "-o", "out", "--type", "NF4", "--stats", "STATS"), out="out"
    ),
    "factored folder": Play(
        ("compress", MODEL, "-o", "out", "--type", "BF16", "--tensor-type", "layers.0.mlp=LR4-0.5"), out="out"
    ),
    "spi": Play(("compress", MODEL, "-o", "out", "--recipe", "spi", "--critical", "3"), out="out"),
    "statistics": Play((*CALIBRATE, "-o", "out"), out="out"),
    "imatrix": Play((*CALIBRATE, "-o", "out.gguf"), out="out.gguf"),
    "assay": Play(
        ("assay", MODEL, "-o", "out", "--match", "layers.0.self_attn"),
        works=("out",),  # a folder that the journal lies in too
    ),
    "embed": Play(("lab", "embed", MODEL, "out", "--hidden", "256"), out="out"),
    "synth": Play(("lab", "synth", "out", "--size", "tiny", "--no-vision"), out="out"),
    "text": Play(("lab", "text", "out.txt", "--limit-bytes", "20000")),
}
LONG: dict[str, Play] = {
    "merge": Play(
        (
            *("merge", TEACHER, MODEL, "-o", "out", "--text", "TEXT", "--ctx", "64", "--tokens", "2048"),
            *("--chunks", "4", "--samples", "256"),
        ),
        out="out",
        works=("out.merge",),
    ),
    "sahc": Play(
        (
            *("compress", MODEL, "-o", "out", "--recipe", "sahc", "--text", "TEXT", "--ctx", "64"),
            *("--chunks", "4", "--ppl-limit", "1e9"),
        ),
        out="out",
        works=("out.sahc",),
    ),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A text, and statistics of it."""
    folder = tmp_path_factory.mktemp("made")
    text = folder / "text.txt"
    text.write_text("".join(f"def f{n}(x):\n    return {n} * x + {n * n % 977}\n\n" for n in range(400)))
    words = [str(text) if word == "TEXT" else word for word in CALIBRATE]
    command = [sys.executable, "-m", "bitsmith.cli.main", *words, "-o", str(folder / "stats")]
    subprocess.run(command, check=True, capture_output=True)
    return {"TEXT": str(text), "STATS": str(folder / "stats")}


@pytest.fixture(scope="module")
def on(tmp_path_factory: pytest.TempPathFactory, made: dict[str, str]) -> Iterator[Stage]:
    warm = [filled(WRITERS[name], made).words for name in ("gguf with statistics", "cellm", "statistics")]
    with stage(tmp_path_factory.mktemp("crash"), warm=warm) as ready:
        yield ready


def filled(play: Play, made: dict[str, str]) -> Play:
    return Play(
        tuple(made.get(word, word) for word in play.words),
        before=play.before,
        works=play.works,
        out=play.out,
        varying=play.varying,
    )


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", WRITERS)
def test_killed_at_its_changes(on: Stage, made: dict[str, str], name: str) -> None:
    assert sweep(on, filled(WRITERS[name], made), most=40) > 4


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_fills(on: Stage, made: dict[str, str], name: str) -> None:
    assert sweep(on, filled(WRITERS[name], made), kind=FULL, most=15) > 4


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", [KILL, FULL])
@pytest.mark.parametrize("name", LONG)
def test_long_runs(on: Stage, made: dict[str, str], name: str, kind: int) -> None:
    assert sweep(on, filled(LONG[name], made), kind=kind, most=20) > 4


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["gguf", "cellm", "packed folder", "statistics"])
def test_killed_while_it_replaces_an_earlier_output(
    on: Stage, made: dict[str, str], tmp_path: Path, name: str
) -> None:
    """The same command on another model was there before."""
    play = filled(WRITERS[name], made)
    before = on.root / "before"
    shutil.rmtree(before, ignore_errors=True)
    before.mkdir()
    old = tuple(TEACHER if word == MODEL else word for word in play.words)
    assert on.run(old, before).code == 0
    shutil.copytree(before, tmp_path / "before")
    again = Play((*play.words, "--overwrite"), before=tmp_path / "before", out=play.out)
    assert sweep(on, again, most=40) > 4
