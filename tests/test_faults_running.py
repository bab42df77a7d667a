"""What a run does when memory, its user or hostile text come in between: faults 36 and 39 to 41."""

from __future__ import annotations

import ast
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from bitsmith.cli.main import main
from bitsmith.lab.models import DEMO_MODEL, STUDENT_MODEL, TEACHER_MODEL
from bitsmith.lab.synth import synth

SOURCES = Path(__file__).parents[1] / "src" / "bitsmith"
LIMITED = Path(__file__).with_name("limited.py")
AT = "model.layers.2.mlp.up_proj.weight"
ESCAPES = "\x1b]0;title\x07[red]\u202e:smile:<script>"
ENVIRONMENT = {
    **os.environ,
    "MALLOC_MMAP_THRESHOLD_": "65536",  # else freed memory is kept, and the limit is not felt
    "MALLOC_ARENA_MAX": "1",  # else each thread has address space of its own to fall back on
    "OMP_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
}


def limited(mode: str, *command: str | Path) -> list[str]:
    """Return a command line that compresses the demo model to `command`'s output up to a tensor."""
    words = ("compress", DEMO_MODEL, "--type", "Q8_0", "--quiet", *command)
    return [sys.executable, str(LIMITED), mode, AT, *map(str, words)]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=280, check=False)


def test_out_of_memory_names_the_tensor_and_keeps_what_is_finished(tmp_path: Path) -> None:
    out, record = tmp_path / "out.gguf", tmp_path / "record.json"
    done = run(limited("memory", "-o", out))
    assert done.returncode == 3, done.stderr
    kept = tmp_path / ".out.gguf.parts" / "journal"
    said = rf"error: out of memory at encode, tensor '{re.escape(AT)}': .*; what is finished is kept in "
    assert re.fullmatch(said + re.escape(f"{kept}: the same command goes on with it\n"), done.stderr)
    assert not out.exists()
    finished = [json.loads(line) for line in kept.read_text().splitlines()][1:]
    assert len(finished) > 3
    again = limited("free", "-o", out, "--json", record)
    assert run(again).returncode == 0
    assert json.loads(record.read_text())["resumed_tensors"] == len(finished)
    assert not kept.parent.exists()


def test_a_killed_run_has_named_its_tensor(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    command = limited("wait", "-o", tmp_path / "out.gguf", "--log-json", log)
    with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        while f'"event": "encode", "tensor": "{AT}"' not in (log.read_text() if log.exists() else ""):
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
        _, errors = process.communicate(timeout=60)
    last = json.loads(log.read_text().splitlines()[-1])
    assert (last["event"], last["tensor"]) == ("encode", AT)
    said = rf"error: killed or crashed at encode, tensor '{re.escape(AT)}', as when memory runs out; what "
    assert re.fullmatch(said + r"is finished is kept in .*: the same command goes on with it\n", errors)
    assert not (tmp_path / "out.gguf").exists()


def test_hostile_names_are_text_on_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = np.random.default_rng(0).standard_normal((32, 32), np.float32)
    plain = tmp_path / "plain.safetensors"
    save_file({f"{ESCAPES}.weight": weights}, plain)
    orphan = Path(shutil.copytree(DEMO_MODEL, tmp_path / "orphan"))
    named_oddly(orphan / "model.safetensors", "model.norm.weight")
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    alien = tmp_path / "alien"
    alien.mkdir()
    shutil.copy(plain, alien / "model.safetensors")
    (alien / "config.json").write_text(json.dumps({**config, "model_type": ESCAPES}))
    commands = [
        ("inspect", plain),
        ("assay", plain),
        ("inspect", orphan),
        ("compress", orphan, "-o", tmp_path / "out.gguf"),
        ("compress", alien, "-o", tmp_path / "out.gguf"),
        ("compress", DEMO_MODEL, "--tensor-type", f"{ESCAPES}=Q8_0", "--dry-run"),
        ("compress", DEMO_MODEL, "--type", ESCAPES, "--dry-run"),
        ("inspect", tmp_path / ESCAPES.replace("/", "")),
        ("report", tmp_path / f"{ESCAPES.replace('/', '')}.json", "-o", tmp_path / "page"),
        (f"no{ESCAPES}",),
    ]
    shown = ""
    for command in commands:
        monkeypatch.setattr(sys, "argv", ["bitsmith", *map(str, command)])
        with pytest.raises(SystemExit):
            main()
        seen = capsys.readouterr()
        assert not [c for c in seen.out + seen.err if not c.isprintable() and c != "\n"], command
        shown += "".join(seen)
    assert shown.count(r"\x1b") >= len(commands) and "[red]" in shown and ":smile:" in shown


def named_oddly(file: Path, name: str) -> None:
    """Rename a tensor of a safetensors file to what is hostile."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header[ESCAPES] = header.pop(name)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def test_no_assert_guards_anything() -> None:
    """`python -O` drops assertions and what hangs on `__debug__`."""
    found = [
        f"{path}:{node.lineno}"
        for path in SOURCES.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assert) or (isinstance(node, ast.Name) and node.id == "__debug__")
    ]
    assert not found


CALLS = """
import contextlib, io, json, sys
from bitsmith.cli.main import main
found = []
for words in json.loads(sys.argv[1]):
    sys.argv, errors = ["bitsmith", *words], io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            main()
        except SystemExit as stop:
            found.append([stop.code, errors.getvalue()])
print(json.dumps([sys.flags.optimize, found]))
"""


def refused(folder: Path) -> dict[str, list[str]]:
    """Return bad command lines by what they are to be refused with."""
    out = str(folder / "out.gguf")
    cut, holed, wrong = (
        Path(shutil.copytree(DEMO_MODEL, folder / name)) for name in ("cut", "holed", "wrong")
    )
    with (cut / "model.safetensors").open("r+b") as stream:
        stream.truncate(stream.seek(0, os.SEEK_END) - 100)
    raw = (holed / "model.safetensors").read_bytes()
    (holed / "model.safetensors").write_bytes(raw.replace(b'"data_offsets":[0,', b'"data_offsets":[9,', 1))
    config = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps(config | {"hidden_size": 512}))
    (folder / "bad.gguf").write_bytes(b"GGUF" + b"\xff" * 60)
    (folder / "here.gguf").write_bytes(b"precious")
    (folder / "plan.yaml").write_text("version: 1\ntensors: []\nmore: 1\n")
    return {
        r"cut/model\.safetensors": ["compress", str(cut), "-o", out],
        r"holed/model\.safetensors": ["compress", str(holed), "-o", out],
        r"hidden_size|shape": ["compress", str(wrong), "-o", out],
        r"bad\.gguf": ["inspect", str(folder / "bad.gguf")],
        r"exists; pass --overwrite": ["compress", str(DEMO_MODEL), "-o", str(folder / "here.gguf")],
        r"unknown": ["compress", str(DEMO_MODEL), "--type", "Q99", "-o", out],
        r"plan\.yaml": ["compress", str(DEMO_MODEL), "--plan", str(folder / "plan.yaml"), "-o", out],
        r"is not in a folder that exists": ["compress", str(DEMO_MODEL), "-o", str(folder / "no" / "x.gguf")],
        r"absent: does not exist": ["inspect", str(folder / "absent")],
    }


def test_refusals_are_the_same_under_python_o(tmp_path: Path) -> None:
    expected = refused(tmp_path)
    before = sorted(tmp_path.iterdir())
    command = [sys.executable, "-O", "-c", CALLS, json.dumps(list(expected.values()))]
    done = run(command)
    assert done.returncode == 0, done.stderr
    optimize, found = json.loads(done.stdout)
    assert optimize == 1 and len(found) == len(expected)
    for said, (code, errors) in zip(expected, found, strict=True):
        assert code == 1 and re.fullmatch(r"error: [^\n]*\n", errors), (said, errors)
        assert re.search(said, errors), (said, errors)
    assert sorted(tmp_path.iterdir()) == before


HOLDS = """
import ctypes, sys
from pathlib import Path
from bitsmith.cli import invocation
from bitsmith.log import event, keeps
def app(words):
    keeps(Path(words[0]))
    event("assay", tensor="w")
    print("begun", flush=True)
    mutex = ctypes.create_string_buffer(128)
    for _ in range(2):  # for ever, with the interpreter's lock, as LAPACK does through scipy for long
        ctypes.PyDLL(None).pthread_mutex_lock(mutex)
invocation.run(app)
"""


def test_ctrl_c_ends_what_holds_the_interpreters_lock(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDS, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        time.sleep(0.5)  # now it holds the lock
        process.send_signal(signal.SIGINT)
        try:
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL
    kept = f"what is finished is kept in {tmp_path}: the same command goes on with it"
    assert errors == f"error: interrupted; no unfinished output is left; {kept}\n"


STUDY = """
version: 1
models: {tiny: MODEL}
texts: {held: TEXT}
recipes: {plain: {type: Q8_0}}
evaluations: [{text: held, ctx: 64}]
"""

ATTEMPTS = int(os.environ.get("BITSMITH_INTERRUPTS", "3"))
COMMANDS = {
    "compress": "compress BIG --type Q4_K_M -o OUT.gguf",
    "compress by a text": "compress MODEL --text TEXT --target 4.9bpw --recipe auto -o OUT.gguf",
    "compress to factors": "compress MODEL --type SVD+INT4 -o OUT",
    "calibrate": "calibrate MODEL --text TEXT -o OUT",
    "merge": "merge TEACHER STUDENT --text TEXT -o OUT",
    "study": "study STUDY.yaml -o OUT",
    "evaluate": "evaluate MODEL MODEL --text TEXT",
    "assay": "assay BIG -o OUT",
    "sahc": "compress MODEL --recipe sahc --text TEXT --ctx 64 -o OUT",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What stands for the words in capitals."""
    folder = tmp_path_factory.mktemp("inputs")
    text = folder / "text.txt"
    text.write_text("".join(f"def f{n}(x):\n    return {n} * x + {n * n % 977}\n\n" for n in range(2000)))
    big = synth(folder / "big", "0.8B", layers=2, vision=False, mtp=False)
    words = {
        "MODEL": DEMO_MODEL, "TEXT": text, "BIG": big, "TEACHER": TEACHER_MODEL, "STUDENT": STUDENT_MODEL
    }  # fmt: skip
    study = folder / "study.yaml"
    study.write_text(STUDY.replace("MODEL", str(DEMO_MODEL)).replace("TEXT", str(text)))
    return {**{name: str(path) for name, path in words.items()}, "STUDY.yaml": str(study)}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_ends_each_command_within_two_seconds(
    name: str, inputs: dict[str, str], tmp_path: Path
) -> None:
    """From the signal to the end, at random moments of the work; the third second is the machine's."""
    draw = random.Random(name)
    for number in range(ATTEMPTS):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        log = folder / "log.jsonl"
        words = [inputs.get(word, word.replace("OUT", "out")) for word in COMMANDS[name].split()]
        command = [sys.executable, "-m", "bitsmith.cli.main", *words, f"--log-json={log}"]
        with subprocess.Popen(
            command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as process:
            while len(log.read_text().splitlines() if log.exists() else ()) < 3:
                assert process.poll() is None
                time.sleep(0.02)
            time.sleep(draw.uniform(0, 3))
            if process.poll() is None:
                began = time.monotonic()
                process.send_signal(signal.SIGINT)
                errors = process.communicate(timeout=120)[1].decode()
                seconds = time.monotonic() - began
                sys.stdout.write(f"{name}: {seconds:.2f} s, {process.returncode}\n")  # shown with -rP
                assert seconds < 3, errors
                if process.returncode == 0:  # it had ended
                    continue
                assert process.returncode in (130, -signal.SIGKILL)
                said = r"error: interrupted; no unfinished output is left; .*the same command [^\n]*\n"
                assert re.search(said, errors), errors
                assert "Traceback" not in errors or "Exception ignored in" in errors  # lost in a __del__
                assert not (folder / "out.gguf").exists() and not (folder / "out" / "config.json").exists()
