"""Ends or starves a real command at its n-th change of the disk: a warm process is forked for each run.

The counting is done by `crash_points.c`, preloaded into the process, so that every write, sync, rename, link
and removal counts that Python, safetensors or the C library makes, those of worker processes too.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitsmith.errors import BitsmithError
from bitsmith.store.manifest import check_manifest

KILL, FULL, FULL_ONCE, PAUSE = 0, 1, 2, 3
"""At the n-th change: the process ends; the disk is full from there on; it is full for that one; it waits."""

MEMORY = Path("/dev/shm")  # noqa: S108 (a folder of its own is made there)
"""A disk that syncs at once: what is synced is counted, not waited for."""
_STATE = struct.Struct("5q")  # count, stop, kind, process that ends too, armed
_SOURCE = Path(__file__).with_name("crash_points.c")
Scene = Callable[[bool], object]


@dataclass(frozen=True)
class Done:
    """How a run ended: exit code, or minus the signal; how often it changed the disk; what it said."""

    code: int
    changes: int
    said: str


def built(folder: Path) -> Path:
    """Compile the preloaded library into `folder`."""
    made = folder / "crash_points.so"
    command = ["cc", "-O1", "-shared", "-fPIC", "-o", str(made), str(_SOURCE), "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return made


class Stage:
    """A warm process that forks for each run; a run's changes under `root` are counted.

    `program` names a Python file with `SCENES`, functions by name; any other words are bitsmith's own.
    """

    def __init__(self, folder: Path, program: Path | None = None, warm: Sequence[Sequence[str]] = ()) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="crash-", dir=MEMORY if MEMORY.is_dir() else folder))
        self.log = folder / "changes"
        self._state = folder / "state"
        self._state.write_bytes(bytes(_STATE.size))
        changed = {
            "LD_PRELOAD": str(built(folder)),
            "CRASH_ROOT": str(self.root),
            "CRASH_STATE": str(self._state),
            "CRASH_LOG": str(self.log),
            "OMP_NUM_THREADS": "1",  # a pool of threads does not survive a fork
            "NUMBA_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
        }
        self._said = folder / "said"
        self._process = subprocess.Popen(
            [
                sys.executable,
                __file__,
                str(self._state),
                str(self._said),
                *([str(program)] if program else []),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | changed,
            text=True,
            start_new_session=True,
        )
        for number, words in enumerate(warm):
            place = folder / f"warm{number}"
            place.mkdir()
            self._ask({"words": list(words), "cwd": str(place), "here": True})

    def run(self, words: Sequence[str], cwd: Path, stop: int = 0, kind: int = KILL) -> Done:
        """Run a command in `cwd`; 0 never stops it."""
        self.log.write_bytes(b"")
        found = self._ask({"words": list(words), "cwd": str(cwd), "stop": stop, "kind": kind})
        return Done(found["code"], found["changes"], self._said.read_text(errors="replace"))

    def run_twice(self, words: Sequence[str], cwd: Path, stop: int) -> tuple[Done, Done]:
        """Run a command, and once more while the first waits at a change; return how the two ended."""
        request = {"words": list(words), "cwd": str(cwd), "stop": stop, "kind": PAUSE}
        found = self._ask(request)
        said = [path.read_text(errors="replace") for path in (self._said, _beside(self._said))]
        return Done(found["code"], found["changes"], said[0]), Done(found["second"], 0, said[1])

    def changes(self) -> list[tuple[str, str]]:
        """Return what the last run changed under `root`, in order: what was done, and to which path."""
        rows = (line.split("\t") for line in self.log.read_text(errors="replace").splitlines())
        return [(what, path) for _, what, path in rows]

    def close(self) -> None:
        """End the warm process."""
        with self._process:  # closes its pipes, and waits
            pass
        shutil.rmtree(self.root, ignore_errors=True)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        found: dict[str, Any] = json.loads(stdout.readline())
        return found


@contextmanager
def stage(folder: Path, program: Path | None = None, warm: Sequence[Sequence[str]] = ()) -> Iterator[Stage]:
    """Yield a `Stage` that ends with the block."""
    folder.mkdir(exist_ok=True)
    made = Stage(folder, program, warm)
    try:
        yield made
    finally:
        made.close()


@dataclass(frozen=True)
class Play:
    """A command, what is there before it, and what may differ: `varying` keys of its JSON files.

    `works` are names under which it works in the open, and `out` is the output that a manifest lies beside.
    `timed` files tell seconds (or digests of what does), and `replaces` tells whether there is an
    `--overwrite`.
    """

    words: tuple[str, ...]
    before: Path | None = None
    works: tuple[str, ...] = ()
    out: str | None = None
    timed: tuple[str, ...] = ()
    replaces: bool = True
    varying: frozenset[str] = field(
        default_factory=lambda: frozenset(
            {"seconds", "peak_memory_bytes", "resumed", "time", "size_bytes", "command"}
        )
    )


def fresh(play: Play, folder: Path) -> None:
    """Make the folder as it is before the play."""
    shutil.rmtree(folder, ignore_errors=True)
    if play.before is None:
        folder.mkdir()
    else:
        shutil.copytree(play.before, folder)


def files_under(folder: Path, play: Play | None = None) -> dict[str, str]:
    """Return the digests of all files by their paths; with the play, of what does not vary in them."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            name = path.relative_to(folder).as_posix()
            is_timed = play is not None and name in play.timed
            content = b"" if is_timed else _content(path, frozenset() if play is None else play.varying)
            found[name] = hashlib.sha256(content).hexdigest()
    return found


def _content(path: Path, varying: frozenset[str]) -> bytes:
    raw = path.read_bytes()
    if varying and path.suffix in (".json", ".jsonl"):
        with suppress(ValueError):
            lines = (
                [json.loads(line) for line in raw.splitlines()]
                if path.suffix == ".jsonl"
                else json.loads(raw)
            )
            return json.dumps(_without(lines, varying), sort_keys=True).encode()
    return raw


def _without(value: Any, names: frozenset[str]) -> Any:
    if isinstance(value, dict):
        return {name: _without(one, names) for name, one in value.items() if name not in names}
    return [_without(one, names) for one in value] if isinstance(value, list) else value


def in_the_open(files: Mapping[str, str], works: Sequence[str]) -> dict[str, str]:
    """Return those a user would take for results: not hidden, not in a work folder."""
    return {
        name: digest
        for name, digest in files.items()
        if not any(part.startswith(".") for part in name.split("/")) and name.split("/")[0] not in works
    }


def chosen(count: int, most: int | None) -> list[int]:
    """Return the points to stop at: all of 1 … count, or `most`, evenly spread."""
    if most is None or count <= most:
        return list(range(1, count + 1))
    return sorted({1 + round(place * (count - 1) / (most - 1)) for place in range(most)})


def sweep(on: Stage, play: Play, *, kind: int = KILL, most: int | None = None) -> int:
    """Stop a play at its points, look at what is left, run it again; return at how many points.

    After each: what is in the open is as before or as after an undisturbed run, file by file; the same
    command then ends well, or says that the output exists where it is whole; and the folder is byte for byte
    that of an undisturbed run, with nothing left over.
    """
    folder = on.root / "play"
    fresh(play, folder)
    old = files_under(folder, play)
    whole = on.run(play.words, folder)
    assert whole.code == 0, whole.said
    done = files_under(folder, play)
    points = chosen(whole.changes, most)
    for point in points:
        fresh(play, folder)
        stopped = on.run(play.words, folder, point, kind)
        where = f"{' '.join(play.words)}: change {point} of {whole.changes}: {_last(on.log)}"
        if kind == KILL:
            assert stopped.code == -signal.SIGKILL, (where, stopped.said)
        else:
            _check_refused(stopped, where)
        _check_left(play, folder, (old, done), where)
        if kind != KILL and stopped.code == 0:
            assert files_under(folder, play) == done, where
            continue
        _check_again(on, play, folder, done, where)
    return len(points)


def _check_refused(stopped: Done, where: str) -> None:
    """A full disk is one line that says so, and another exit code; or something that was not needed."""
    assert "Traceback" not in stopped.said, (where, stopped.said)
    assert stopped.code in (0, 1), (where, stopped)
    if stopped.code:
        assert "No space left on device" in stopped.said, (where, stopped.said)


def _check_left(play: Play, folder: Path, allowed: Sequence[Mapping[str, str]], where: str) -> None:
    """Each file is the old one or the new one; where an output is some of both, its manifest says so."""
    found = in_the_open(files_under(folder, play), play.works)
    for name, digest in found.items():
        assert any(one.get(name) == digest for one in allowed), f"{where}: leaves a partial {name}"
    if play.out is None or not (folder / play.out).exists():
        return
    own = {name: digest for name, digest in found.items() if name.split("/")[0] == play.out}
    wholes = [{name: one[name] for name in one if name.split("/")[0] == play.out} for one in allowed]
    if own not in wholes:
        assert check_manifest(folder / play.out), f"{where}: is torn, and its manifest does not say so"


def _check_again(on: Stage, play: Play, folder: Path, done: Mapping[str, str], where: str) -> None:
    again = on.run(play.words, folder)
    if again.code == 1 and "exists" in again.said:  # it had been finished, all but what tidies up
        left = files_under(folder, play)
        missing = {*in_the_open(done, play.works)} - {*in_the_open(left, play.works)}
        assert not missing, (where, missing)
        if not play.replaces:
            return
        again = on.run([*play.words, "--overwrite"], folder)
    assert again.code == 0, (where, again.said)
    left = files_under(folder, play)
    assert {*left} == {*done}, (where, {*left} ^ {*done})
    assert left == done, (where, [name for name in done if left[name] != done[name]])


def _last(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return lines[-1] if lines else "nothing"


def _serve(state: Path, said: Path, program: Path | None) -> None:
    """Answer requests on stdin, one JSON line each, until it ends."""
    scenes = _scenes(program)
    for line in sys.stdin:
        request = json.loads(line)
        if request.get("here"):
            code = _performed(scenes, request, said)
            sys.stdout.write(json.dumps({"code": code, "changes": 0}) + "\n")
        else:
            sys.stdout.write(json.dumps(_forked(scenes, request, state, said)) + "\n")
        sys.stdout.flush()


def _scenes(program: Path | None) -> dict[str, Scene]:
    if program is None:
        return {}
    sys.path.insert(0, str(program.parent))
    found: dict[str, Scene] = __import__(program.stem).SCENES
    return found


def _forked(scenes: Mapping[str, Scene], request: dict[str, Any], state: Path, said: Path) -> dict[str, Any]:
    _write_state(state, (0, request["stop"], request["kind"], 0, 0))
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.setsid()
            _write_state(state, (0, request["stop"], request["kind"], os.getpid(), 1))
            code = _performed(scenes, request, said)
        finally:
            os._exit(code)
    second = None
    _, status = os.waitpid(child, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        second = os.fork()
        if second == 0:
            _write_state(state, (0, 0, 0, 0, 0))
            os._exit(_performed(scenes, request, _beside(said)))
        second = os.waitstatus_to_exitcode(os.waitpid(second, 0)[1])
        os.kill(child, signal.SIGCONT)
        _, status = os.waitpid(child, 0)
    count = _STATE.unpack(state.read_bytes())[0]
    _write_state(state, (0, 0, 0, 0, 0))
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # its workers
    return {"code": os.waitstatus_to_exitcode(status), "changes": count, "second": second}


def _beside(said: Path) -> Path:
    return said.with_name("said by the second")


def _write_state(path: Path, values: tuple[int, ...]) -> None:
    with path.open("r+b", buffering=0) as stream:
        stream.write(_STATE.pack(*values))


def _performed(scenes: Mapping[str, Scene], request: dict[str, Any], said: Path) -> int:
    """Run a scene or a command with its output in the file `said`; return the exit code."""
    kept = [os.dup(number) for number in (1, 2)]
    with said.open("wb") as stream:
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
    os.chdir(request["cwd"])
    words = request["words"]
    try:
        if words[0] in scenes:
            scenes[words[0]]("--overwrite" in words)
            return 0
        from bitsmith.cli.main import main

        sys.argv = ["bitsmith", *words]
        main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BitsmithError as error:
        os.write(2, f"error: {error}\n".encode())
        return 1
    except Exception:  # told as Python would
        traceback.print_exc()
        return 70
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, file in zip((1, 2), kept, strict=True):
            os.dup2(file, number)
            os.close(file)
    return 0


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else None)
