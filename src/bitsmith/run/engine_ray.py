"""The engine on a Ray cluster: each task runs on some node as it would here, and leaves the same bytes.

A node that sees the study's folder (a marker file in it tells) and the task's sources works there. To any
other the inputs and sources go through Ray's object store, and the artifact comes back that way. The task
itself runs in a process of the node's own `LocalEngine`, so limits, kinds of failure and numbers of threads
are those of a local run. Every node needs bitsmith in this version.
"""

from __future__ import annotations

import os
import platform
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bitsmith import __version__
from bitsmith.errors import BitsmithError, UnsupportedError, printable
from bitsmith.run.engine import Attempt, Failure, LocalEngine, thread_settings
from bitsmith.run.task import Action, Task
from bitsmith.run.worker import action_at, reference_of
from bitsmith.store.artifacts import remove_folder, sealed_result, verify_sealed

Storage = Literal["auto", "shared", "push"]
CHUNK_BYTES = 64 << 20
POLL_SECONDS = 0.2
CONNECT_SECONDS = 10.0
LOST_TIMES = 3
"""How often a task starts again because its node died; that is no failure of the task."""


class Packed(NamedTuple):
    """A file or folder in the object store: its name, and the chunks of each file by its path inside."""

    name: str
    files: tuple[tuple[str, tuple[Any, ...]], ...]
    is_folder: bool


class Order(NamedTuple):
    """All that a node needs for one attempt; `marker` is a file and what it says, to know the storage by.

    `threads` are the variables that say how many threads it computes with.
    """

    task: Task
    action: str
    inputs: dict[str, str]
    out: str
    version: str
    marker: tuple[str, str]
    may_share: bool
    threads: dict[str, str]


class Pushed(NamedTuple):
    """What travels along to a node without the storage: artifacts by task, sources by parameter."""

    inputs: dict[str, Packed]
    sources: dict[str, Packed]


class RayEngine:
    """Runs tasks on the Ray cluster at `address`, `cpus` each.

    Without an address that is the cluster which RAY_ADDRESS names, else one that is started on this machine
    and ends with `stop`. At most `workers` tasks run at once, by default as many as the cluster's CPUs allow.
    `storage` says whether nodes see this machine's files: `auto` asks each, with `shared` one that does not
    is an error, `push` sends everything. A task whose node dies starts again elsewhere. `start` and `wait`
    belong to one thread.

    Raises UnsupportedError without the `ray` extra, BitsmithError if the cluster cannot be reached, and for a
    process that is connected to another one.
    """

    def __init__(
        self,
        address: str | None = None,
        workers: int | None = None,
        *,
        cpus: float = 1,
        storage: Storage = "auto",
    ) -> None:
        self._ray = _ray()
        self._owns = _connect(self._ray, address)
        self._remote = self._ray.remote(_on_node)
        self._workers, self._cpus, self._storage = workers, cpus, storage
        self._running: list[_Run] = []
        self._packed: dict[str, Packed] = {}
        self._marker: tuple[str, str] | None = None
        self._pushes = storage == "push"

    def has_room(self, task: Task) -> bool:
        """Whether `task` can be started now. Raises BitsmithError if it declares more than any node has."""
        declared = task.limits.memory_bytes or 0
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        most = max((node.get("memory", 0) for node in nodes), default=0)
        if declared > most:
            raise BitsmithError(
                f"task {printable(task.name)!r} may use {declared} bytes, no node has more than {int(most)}"
            )
        room = int(sum(node.get("CPU", 0) for node in nodes) // self._cpus) or 1
        return len(self._running) < (room if self._workers is None else min(room, self._workers))

    def start(self, task: Task, action: Action, inputs: Mapping[str, Path], out: Path) -> Attempt:
        """Begin one attempt on some node."""
        out.parent.mkdir(parents=True, exist_ok=True)
        order = Order(
            task,
            reference_of(action),
            {name: str(path) for name, path in inputs.items()},
            str(out),
            __version__,
            self._mark(out.parent),
            self._storage != "push",
            thread_settings(),
        )
        run = _Run(Attempt(task, out), order)
        self._submit(run)
        self._running.append(run)
        return run.attempt

    def wait(self, timeout_seconds: float) -> Sequence[Attempt]:
        """Return the attempts that ended; what nodes send meanwhile is taken in."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            left = max(0.0, deadline - time.monotonic())
            patience = min(left, POLL_SECONDS)
            waiting = [run.told for run in self._running]
            if not waiting:
                time.sleep(patience)
            ready = self._ray.wait(waiting, timeout=patience)[0] if waiting else []
            for run in [run for run in self._running if run.told in ready]:
                self._take(run)
            ended = [run for run in self._running if run.attempt.seconds]
            if ended or left == 0.0:
                self._running = [run for run in self._running if run not in ended]
                return [run.attempt for run in ended]

    def stop(self) -> None:
        """End what runs, and the cluster if it was started here."""
        for run in self._running:
            self._ray.cancel(run.told, force=True)
            remove_folder(run.place)
        self._running = []
        if self._marker is not None:
            Path(self._marker[0]).unlink(missing_ok=True)
            self._marker = None
        self._packed.clear()
        if self._owns:
            self._ray.shutdown()
            self._owns = False

    def _submit(self, run: _Run) -> None:
        pushed = None
        if self._pushes:
            inputs = {name: self._pack(Path(path)) for name, path in run.order.inputs.items()}
            task = run.attempt.task
            pushed = Pushed(inputs, {name: self._pack(Path(task.params[name])) for name in task.sources})
        options: dict[str, Any] = {"num_cpus": self._cpus, "max_retries": 0, "num_returns": "streaming"}
        if run.attempt.task.limits.memory_bytes is not None:
            options["memory"] = run.attempt.task.limits.memory_bytes
        order = run.order._replace(out=str(run.place))
        run.told = self._remote.options(**options).remote(order, pushed)

    def _take(self, run: _Run) -> None:
        """Take in the next thing that a node told."""
        errors = self._ray.exceptions
        try:
            message = self._ray.get(next(run.told))
        except errors.OutOfMemoryError as error:
            run.end(Failure("memory", _first_line(error)))
        except errors.RayTaskError as error:
            run.end(Failure("error", f"the node could not run it: {_first_line(error)}"))
        except (errors.RayError, StopIteration) as error:
            self._lost(run, _first_line(error) or "it ended without a word")
        else:
            if message[0] == "push" and self._storage == "shared":
                said = f"node {run.node} does not see {run.attempt.out.parent} or the task's sources"
                run.end(Failure("error", said))
            elif message[0] == "push":
                self._pushes = True
                self._submit(run)
            else:
                run.hear(message)

    def _lost(self, run: _Run, why: str) -> None:
        """Start a task again whose node or worker died."""
        remove_folder(run.place)
        run.lost += 1
        if run.lost >= LOST_TIMES:
            run.end(Failure("killed", f"its node died {run.lost} times: {why}", {"node": run.node}))
        else:
            self._submit(run)

    def _mark(self, folder: Path) -> tuple[str, str]:
        """Return the marker's path and text, writing it if it is not there."""
        if self._marker is None or not Path(self._marker[0]).exists():
            path, text = folder / f".marker-{uuid.uuid4().hex}", uuid.uuid4().hex
            path.write_text(text, "utf-8")
            self._marker = str(path), text
        return self._marker

    def _pack(self, path: Path) -> Packed:
        """Return what is at `path` in the object store, put there once."""
        if str(path) not in self._packed:
            self._packed[str(path)] = _pack(self._ray, path)
        return self._packed[str(path)]


@dataclass(eq=False)
class _Run:
    """One attempt on the cluster; what it leaves lies at `place` until it is whole."""

    attempt: Attempt
    order: Order
    told: Any = None
    lost: int = 0
    node: str = ""
    began: float = field(default_factory=time.monotonic)

    @property
    def place(self) -> Path:
        """Where the artifact is made, another place for every start: a dead node may not be dead."""
        return self.attempt.out.with_name(f"{self.attempt.out.name}.{self.lost}")

    def hear(self, message: tuple[Any, ...]) -> None:
        """Take in progress, a piece of a file, or the end."""
        kind, *rest = message
        if kind == "progress":
            self.attempt.latest = rest[0]
        elif kind == "node":
            self.node = rest[0]
        elif kind == "file":
            name, data = rest
            path = self.place / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as stream:
                stream.write(data)
        else:
            failure, seconds, self.attempt.peak_bytes = rest
            self.end(failure, seconds)

    def end(self, failure: Failure | None, seconds: float = 0.0) -> None:
        """Fill in the attempt: the artifact takes its place, or why there is none."""
        if failure is None:
            try:
                verify_sealed(self.place)
                self.place.rename(self.attempt.out)
                self.attempt.result = sealed_result(self.attempt.out)
            except (BitsmithError, OSError) as error:
                failure = Failure("error", printable(str(error)))
        if failure is not None:
            remove_folder(self.place)
            self.attempt.failure = failure._replace(evidence={**failure.evidence, "node": self.node})
        self.attempt.seconds = max(seconds or time.monotonic() - self.began, 1e-9)


def _ray() -> Any:
    if find_spec("ray") is None:
        raise UnsupportedError("the Ray engine needs Ray: install bitsmith[ray]")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell Ray's makers of the cluster
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    return import_module("ray")


def _connect(ray: Any, address: str | None) -> bool:
    """Connect to the cluster, unless this process is; return whether it was done here."""
    wanted = address or os.environ.get("RAY_ADDRESS") or "local"
    if ray.is_initialized():
        found = ray.get_runtime_context().gcs_address
        if wanted not in ("local", "auto", found):
            raise BitsmithError(f"this process is connected to the Ray cluster at {printable(found)} already")
        return False
    where: dict[str, Any] = {"address": wanted}
    if wanted == "local":
        where["include_dashboard"] = False
    try:
        _refuse_deaf(wanted)
        ray.init(log_to_driver=False, logging_level="ERROR", **where)
    except (ConnectionError, RuntimeError, ValueError, OSError, ImportError) as error:
        raise BitsmithError(f"no Ray cluster at {printable(wanted)}: {_first_line(error)}") from error
    return True


def _refuse_deaf(address: str) -> None:
    """Raise OSError or ValueError for a `host:port` where nobody listens: Ray would try for minutes."""
    if address in ("local", "auto"):
        return
    if "://" in address:
        raise ValueError("expected host:port, as `ray start --head` says it")
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isascii() and port.isdecimal() and 0 < int(port) < 1 << 16):
        raise ValueError("expected host:port")
    socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()


def _on_node(order: Order, pushed: Pushed | None) -> Iterator[tuple[Any, ...]]:
    """Run one attempt on this node and tell of it: where, progress, pieces of files, the end."""
    yield "node", platform.node()
    if order.version != __version__:
        said = f"node {platform.node()} has bitsmith {__version__}, the study {order.version}"
        yield "end", Failure("error", said), 0.0, 0
        return
    if order.may_share and _sees(order):
        yield from _performed(order)
        return
    if pushed is None:
        yield ("push",)
        return
    with tempfile.TemporaryDirectory(prefix="bitsmith-") as scratch:
        yield from _performed(_unpacked(import_module("ray"), order, pushed, Path(scratch)), send=True)


def _performed(order: Order, *, send: bool = False) -> Iterator[tuple[Any, ...]]:
    engine, out = LocalEngine(1, threads=order.threads), Path(order.out)
    inputs = {name: Path(path) for name, path in order.inputs.items()}
    try:
        attempt = engine.start(order.task, action_at(order.action), inputs, out)
        latest = None
        while not engine.wait(POLL_SECONDS):
            if attempt.latest != latest:
                latest = attempt.latest
                yield "progress", latest
        if send and attempt.failure is None:
            yield from _pieces(out)
        yield "end", attempt.failure, attempt.seconds, attempt.peak_bytes
    finally:
        engine.stop()
        out.with_name(out.name + ".log").unlink(missing_ok=True)


def _pieces(folder: Path) -> Iterator[tuple[str, str, bytes]]:
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        for chunk in _chunks(path):
            yield "file", path.relative_to(folder).as_posix(), chunk


def _chunks(path: Path) -> Iterator[bytes]:
    """Yield a file's bytes; an empty file is one empty chunk."""
    with path.open("rb") as stream:
        yield stream.read(CHUNK_BYTES)
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk


def _pack(ray: Any, path: Path) -> Packed:
    files = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
    if not path.exists():
        raise BitsmithError("does not exist", path=path)
    packed = []
    for file in files:
        name = file.relative_to(path).as_posix() if path.is_dir() else path.name
        packed.append((name, tuple(ray.put(chunk) for chunk in _chunks(file))))
    return Packed(path.name, tuple(packed), path.is_dir())


def _unpack(ray: Any, packed: Packed, folder: Path) -> Path:
    root = folder / packed.name if packed.is_folder else folder
    root.mkdir(parents=True, exist_ok=True)
    for name, chunks in packed.files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as stream:
            for chunk in chunks:
                stream.write(ray.get(chunk))
    return folder / packed.name


def _unpacked(ray: Any, order: Order, pushed: Pushed, scratch: Path) -> Order:
    """Return the order with what was pushed, unpacked in `scratch`, in the place of what is elsewhere."""
    inputs = {
        name: str(_unpack(ray, packed, scratch / f"input-{index}"))
        for index, (name, packed) in enumerate(pushed.inputs.items())
    }
    params = dict(order.task.params)
    for name, packed in pushed.sources.items():
        params[name] = str(_unpack(ray, packed, scratch / f"source-{name}"))
    return order._replace(
        task=replace(order.task, params=params), inputs=inputs, out=str(scratch / "artifact")
    )


def _sees(order: Order) -> bool:
    """Whether the driver's files are here: its marker, and all that the task reads."""
    path, said = order.marker
    try:
        sources = [Path(order.task.params[name]) for name in order.task.sources]
        return Path(path).read_text("utf-8") == said and all(source.exists() for source in sources)
    except OSError:
        return False


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    cause = getattr(error, "cause", None)
    return printable(f"{type(cause).__name__}: {cause}" if cause is not None else (lines or [""])[0].strip())
