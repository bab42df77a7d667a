"""Commands killed, or out of disk, at the changes they make: no partial output, and the same bytes after."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from bitsmith.lab.models import STUDENT_MODEL, TEACHER_MODEL
from crash_points import FULL, KILL, Play, Stage, files_under, fresh, in_the_open, stage, sweep

MODEL, TEACHER = str(STUDENT_MODEL), str(TEACHER_MODEL)
CALIBRATE = ("calibrate", MODEL, "--text", "TEXT", "--ctx", "64", "--chunks", "6", "--no-saliency")

WRITERS: dict[str, Play] = {
    "gguf": Play(("compress", MODEL, "-o", "out.gguf", "--type", "Q4_K_M"), out="out.gguf"),
    "gguf with statistics": Play(
        (
            *("compress", MODEL, "-o", "out.gguf", "--type", "BF16", "--stats", "STATS"),
            *("--rounder", "gptq", "--tensor-type", r"layers\.0\.self_attn=Q4_0"),
        ),
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
        (
            *("compress", MODEL, "-o", "out", "--type", "BF16", "--stats", "STATS"),
            *("--tensor-type", r"layers\.0\.self_attn=W4A16"),
        ),
        out="out",
    ),
    "factored folder": Play(
        (
            *("compress", MODEL, "-o", "out", "--type", "BF16"),
            *("--tensor-type", r"layers\.0\.mlp\.(gate|up)_proj=SVD:r=16:int4"),
        ),
        out="out",
    ),
    "spi": Play(("compress", MODEL, "-o", "out", "--recipe", "spi", "--critical", "3"), out="out"),
    "statistics": Play((*CALIBRATE, "-o", "out"), out="out"),
    "imatrix": Play((*CALIBRATE, "-o", "out.gguf"), out="out.gguf"),
    "assay": Play(
        ("assay", MODEL, "-o", "out", "--match", "layers.0.self_attn"),
        works=("out",),  # a folder that the journal lies in too
        timed=("out/assay.html", "out.sha256"),
    ),
    "embed": Play(("lab", "embed", MODEL, "out", "--hidden", "256"), out="out"),
    "synth": Play(("lab", "synth", "out", "--size", "tiny", "--no-vision"), out="out", replaces=False),
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
        timed=("out.merge/report.html",),
    ),
    "sahc": Play(
        (
            *("compress", MODEL, "-o", "out", "--recipe", "sahc", "--text", "TEXT", "--ctx", "64"),
            *("--chunks", "4", "--ppl-limit", "1e9"),
        ),
        out="out",
        works=("out.sahc",),
        timed=("out.sahc/audit.jsonl",),
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
    return replace(play, words=tuple(made.get(word, word) for word in play.words))


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


def check_synced(changes: Sequence[tuple[str, str]]) -> None:
    """What appears by a rename was forced to the disk before, and its folder's entry is after."""
    for place, (what, path) in enumerate(changes):
        target = Path(path)
        if what != "rename" or target.name.startswith("."):
            continue
        part = str(target.with_name(f".{target.name}.part"))
        places = f"{part}/", f"{part}s/file/"  # a GGUF is written in the folder of its journal
        own = [index for index in range(place) if f"{changes[index][1]}/".startswith(places)]
        for index in own:
            if changes[index][0] == "write":
                assert ("fsync", changes[index][1]) in changes[index:place], (path, changes[index])
        assert ("fsync", str(target.parent)) in changes[place:], path


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", [*WRITERS, *LONG])
def test_an_output_that_exists_and_a_second_run(on: Stage, made: dict[str, str], name: str) -> None:
    """A run beside another on one output is refused, and so is one after it; neither changes anything."""
    play = filled((WRITERS | LONG)[name], made)
    folder = on.root / "play"
    fresh(play, folder)
    alone = on.run(play.words, folder)
    assert alone.code == 0, alone.said
    done = files_under(folder, play)
    check_synced(on.changes())
    fresh(play, folder)
    first, second = on.run_twice(play.words, folder, 1 + alone.changes // 4)
    assert first.code == 0, first.said
    assert second.code == 1 and "is being written by another run" in second.said, second.said
    assert files_under(folder, play) == done
    again = on.run(play.words, folder)
    assert again.code == 1 and "exists" in again.said and "Traceback" not in again.said, again.said
    assert files_under(folder, play) == done


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize("name", [name for name in (*WRITERS, *LONG) if name not in ("synth", "text")])
def test_an_output_that_is_the_input(
    on: Stage, made: dict[str, str], name: str, overwrite: list[str]
) -> None:
    play = filled((WRITERS | LONG)[name], made)
    folder = on.root / "play"
    fresh(play, folder)
    shutil.copytree(MODEL, folder / "in")
    put = ("compress", "in", "-o", "in.gguf", "--type", "F16")
    assert on.run(put, folder).code == 0
    for out in _inputs_as_outputs(play):
        before = files_under(folder)
        words = [out if word.startswith("out") else word for word in play.words]
        source = "in.gguf" if out == "in.gguf" else "in"
        words = [source if word == MODEL else word for word in words]
        found = on.run([*words, *overwrite], folder)
        assert found.code == 1 and "Traceback" not in found.said, found.said
        assert files_under(folder) == before
        if overwrite:
            assert "input" in found.said, found.said


def _inputs_as_outputs(play: Play) -> list[str]:
    """Return what the play could be told to write that is its input: the folder, or a file of its kind."""
    out = next(word for word in play.words if word.startswith("out"))
    return {".gguf": ["in.gguf"], "": ["in"]}.get(Path(out).suffix, [])


RANDOM_KILLS = 6


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "name", ["gguf with statistics", "packed folder with statistics", "statistics", "assay", *LONG]
)
def test_killed_at_random_moments_until_it_is_done(
    on: Stage, made: dict[str, str], tmp_path: Path, name: str
) -> None:
    """A process of its own, killed again and again at moments drawn, ends with an undisturbed run's bytes."""
    play = filled((WRITERS | LONG)[name], made)
    folder = on.root / "play"
    fresh(play, folder)
    assert on.run(play.words, folder).code == 0
    done = files_under(folder, play)
    fresh(play, folder)
    draw, command = random.Random(name), [sys.executable, "-m", "bitsmith.cli.main", *play.words]
    began = time.monotonic()
    subprocess.run([*command[:3], "inspect", MODEL], check=True, capture_output=True)
    started_seconds = time.monotonic() - began
    for _ in range(RANDOM_KILLS):
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            process.wait(started_seconds * draw.uniform(0.5, 2.5))
        except subprocess.TimeoutExpired:
            process.kill()
        said = process.communicate()[1]
        assert process.returncode in (0, -signal.SIGKILL) or b"exists" in said, said
        left = in_the_open(files_under(folder, play), play.works)
        assert all(done[path] == digest for path, digest in left.items()), name
        if process.returncode != -signal.SIGKILL:
            break
    last = on.run(play.words, folder)
    assert last.code == 0 or "exists" in last.said, last.said
    left = files_under(folder, play)
    if last.code:
        assert in_the_open(left, play.works) == in_the_open(done, play.works)
    else:
        assert left == done
