"""The same source, recipe and version give the same bytes, whatever the machine and its settings are like.

Each surrounding is a process of its own with a copy of the models in a folder of its own: 1, 2 or 4 threads,
another seed of hashes, umask, time zone, locale, terminal, order in which folders list their files.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from bitsmith.lab.corpus import write_held_out_text
from bitsmith.lab.models import DEMO_MODEL
from bitsmith.run.calibrate import calibrate
from graph_processes import artifacts

STUDENT, TEACHER = DEMO_MODEL.parent / "qwen3-student", DEMO_MODEL.parent / "qwen3-teacher"
TIMED = ("audit.jsonl", "assay.html", "assay.sha256")  # when and how long
THREADS = ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

# Folders listed backwards, and text read or written in the locale's encoding an error.
CHILD = """
import json, os, sys, warnings

class Backwards:
    def __init__(self, entries):
        self.entries = iter(sorted(entries, key=lambda entry: entry.name, reverse=True))
    def __iter__(self): return self
    def __next__(self): return next(self.entries)
    def __enter__(self): return self
    def __exit__(self, *_): pass
    def close(self): pass

os.umask(int(sys.argv[1], 8))
if sys.flags.warn_default_encoding:
    listdir, scandir = os.listdir, os.scandir
    os.listdir = lambda *where: sorted(listdir(*where), reverse=True)
    os.scandir = lambda *where: Backwards(scandir(*where))
    warnings.filterwarnings("error", category=EncodingWarning, module=r"bitsmith\\.")
from bitsmith.cli.main import app
for command in json.loads(sys.argv[2]):
    os.makedirs("out/" + command[0])
    app(command[1], standalone_mode=False)
"""


@dataclass(frozen=True)
class Surrounding:
    """How a process is started."""

    threads: int
    umask: str
    variables: dict[str, str]
    flags: tuple[str, ...] = ()


PLAIN = Surrounding(1, "022", {"PYTHONHASHSEED": "0"})
OTHERS = (
    Surrounding(
        2,
        "077",
        {"PYTHONHASHSEED": "1", "TZ": "Asia/Tokyo", "COLUMNS": "50"},
        ("-X", "warn_default_encoding"),
    ),
    Surrounding(
        4, "027", {"PYTHONHASHSEED": "77", "LC_ALL": "C", "TZ": "America/Lima", "NO_COLOR": "1"}, ("-O",)
    ),
)

FEW = {
    "gguf": "compress student -o out/gguf/out.gguf --type Q4_K_M",
    "cellm": "compress student -o out/cellm/out.cellm --type i4 --group 32",
    "rows": "compress student -o out/rows/out --type INT4",
}
GUIDED = {
    "feedback": "compress student -o out/feedback/out.gguf --stats stats --type IQ4_XS",
    "named": "compress student -o out/named/out.gguf --stats stats --type Q2_K --transforms permute,rotate",
    "sequential": "compress student -o out/sequential/out.gguf --stats stats --type Q4_0 --sequential",
    "tuned": "compress student -o out/tuned/out.gguf --stats stats --type Q4_0 --tune --tune-steps 3",
    "auto": "compress student -o out/auto/out.gguf --stats stats --recipe auto --target 5bpw",
    "sbgq": "compress student -o out/sbgq/out.gguf --stats stats --recipe sbgq-iq4xs",
    "tried": "compress student -o out/tried/out.gguf --stats stats --type Q2_K --transforms auto",
}
FOLDERS = {
    "W4A16": "compress student -o out/W4A16/out --type W4A16 --group 32 --stats stats",
    "NF4": "compress student -o out/NF4/out --type NF4 --stats stats",
    "SVD": "compress student -o out/SVD/out --type SVD+INT4:bpw=6 --stats stats",
    "trains": "compress student -o out/trains/out --type TT:r=16",
    "spi": "compress student -o out/spi/out --recipe spi --critical 5",
    "sahc": "compress student -o out/sahc/out --recipe sahc --text held.txt --chunks 4",
}
READ = {
    "calibrate": "calibrate student --text held.txt --ctx 64 --chunks 6 -o out/calibrate/stats",
    "imatrix": "calibrate student --stats stats -o out/imatrix/imatrix.gguf",
    "assay": "assay student -o out/assay/assay --stats stats --match layers.1",
    "evaluate": "evaluate teacher student --text held.txt --ctx 64 --chunks 6 --json out/evaluate/out.json",
    "embed": "lab embed student out/embed/out --hidden 192",
}
MERGE = "merge teacher student --text held.txt --ctx 64 --tokens 3000 --head solve -o out/merge/out"


def files(surrounding: Surrounding, commands: dict[str, str], root: Path) -> dict[str, bytes]:
    """Return what the commands write in a surrounding, by command and path, but for what tells times."""
    variables = dict.fromkeys(THREADS, str(surrounding.threads)) | surrounding.variables
    for name, model in (("student", STUDENT), ("teacher", TEACHER)):
        shutil.copytree(model, root / name, dirs_exist_ok=True)
    asked = [(name, shlex.split(line)) for name, line in commands.items()]
    command = [sys.executable, *surrounding.flags, "-c", CHILD, surrounding.umask, json.dumps(asked)]
    environment = os.environ | variables
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    written = [path for path in (root / "out").rglob("*") if path.is_file() and path.name not in TIMED]
    return {str(path.relative_to(root / "out")): said(path) for path in written}


def said(path: Path) -> bytes:
    """Return a file's bytes; of an assay's results what they say but how long it took."""
    if path.name != "assay.json":
        return path.read_bytes()
    return json.dumps(untimed(json.loads(path.read_bytes()))).encode()


def untimed(found: Any) -> Any:
    if isinstance(found, dict):
        return {name: untimed(value) for name, value in found.items() if name != "seconds"}
    return list(map(untimed, found)) if isinstance(found, list) else found


def differing(commands: dict[str, str], others: tuple[Surrounding, ...], root: Path) -> list[str]:
    """Return the files whose bytes depend on the surrounding, those that only some leave too."""
    with ThreadPoolExecutor() as pool:
        runs = [
            pool.submit(files, surrounding, commands, root / str(number))
            for number, surrounding in enumerate((PLAIN, *others))
        ]
        found = [run.result() for run in runs]
    assert {name.partition("/")[0] for name in found[0]} == set(commands)
    names = {name for one in found for name in one}
    return sorted(name for name in names if len({one.get(name) for one in found}) > 1)


def test_files_do_not_depend_on_threads_or_surroundings(tmp_path: Path) -> None:
    assert differing(FEW, OTHERS[:1], tmp_path) == []


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A held-out text and statistics of the student on it, to be copied into every surrounding."""
    root = tmp_path_factory.mktemp("prepared")
    text = write_held_out_text(root / "held.txt", 60_000)
    calibrate(STUDENT, text, root / "stats", ctx_tokens=64, chunks=40)
    return root


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("commands", [GUIDED, FOLDERS, READ], ids=["ggufs", "folders", "measured"])
def test_everything_written_is_the_same(prepared: Path, tmp_path: Path, commands: dict[str, str]) -> None:
    for number in range(1 + len(OTHERS)):
        shutil.copytree(prepared, tmp_path / str(number))
    assert differing(commands, OTHERS, tmp_path) == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_merged_model_is_the_same(prepared: Path, tmp_path: Path) -> None:
    for number in range(1 + len(OTHERS)):
        shutil.copytree(prepared, tmp_path / str(number))
    differ = differing({"merge": MERGE}, OTHERS, tmp_path)
    assert (tmp_path / "0" / "out" / "merge" / "out" / "model.safetensors").exists()
    assert [name for name in differ if name.startswith("merge/out/")] == []


STUDY = {
    "version": 1,
    "models": {"tiny": str(STUDENT)},
    "texts": {"held": "held.txt"},
    "recipes": {"q4": {"type": "Q4_K_M"}, "i4": {"type": "i4"}, "int4": {"type": "INT4"}},
    "evaluations": [{"text": "held", "ctx": 64, "chunks": 4}],
    "generate": {"prompts": ["import os"], "tokens": 4},
}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_study_on_any_number_of_workers_here_or_on_a_cluster(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(json.dumps(STUDY))
    shutil.copy(prepared / "held.txt", tmp_path)
    ways = {"one": ["--workers", "1"], "two": ["--workers", "2"], "four": ["--workers", "4"]}
    if find_spec("ray"):
        ways["ray"] = ["--engine", "ray"]
    program = "from bitsmith.cli.main import main; main()"
    for name, way in ways.items():
        command = [sys.executable, "-c", program, "study", "study.yaml", "-o", name, *way]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    found = {name: artifacts(tmp_path / name / "artifacts") for name in ways}
    assert len(found["one"]) > 10
    for name in ways:
        assert found[name] == found["one"], name
