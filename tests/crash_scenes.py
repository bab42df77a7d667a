"""Small runs of the store, for `crash_points`: each writes in the current folder what it says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bitsmith.errors import OutputError
from bitsmith.store.artifacts import FILES, ArtifactStore, seal
from bitsmith.store.atomic import Content, atomic_file, atomic_folder
from bitsmith.store.journal import Journal, write_result
from bitsmith.store.manifest import write_manifest
from bitsmith.store.parts import Parts, finished_parts
from bitsmith.store.safetensors_writer import TensorData, write_safetensors

NAMES = ("a", "b", "c")


def file(overwrite: bool) -> None:
    """A file with its manifest, over an earlier one if there is one."""
    out = Path("out")

    def finish(content: Content) -> None:
        write_manifest(out, {"output": "file"}, content=content, beside={".vectors": b"v" * 9})

    with atomic_file(out, overwrite=overwrite, finish=finish) as stream:
        for number in range(3):
            stream.write(bytes([number]) * 700_000)


def folder(overwrite: bool) -> None:
    """A checkpoint of two shards and an index, over an earlier one of other shards if there is one."""
    out = Path("out")
    tensors = [TensorData(name, "F32", (4, 4), [np.full(16, n, np.float32)]) for n, name in enumerate(NAMES)]
    write_safetensors(out, tensors, {"model_type": "new"}, shard_bytes=128, overwrite=overwrite)


def nested(overwrite: bool) -> None:
    """A folder with a folder in it."""
    with atomic_folder(Path("out"), last="last", stale=lambda _: True, overwrite=overwrite) as part:
        (part / "in").mkdir()
        for name in ("in/one", "last"):
            (part / name).write_bytes(name.encode() * 100)


def journal(overwrite: bool) -> None:
    """Pieces noted one by one, and a result made of them."""
    if Path("result.json").exists() and not overwrite:
        raise OutputError("exists", path="result.json")
    with Journal(Path(".journal"), {"source": "s"}) as kept:
        for name in NAMES:
            if name not in kept.entries:
                kept.add(name, name * 3)
        write_result(Path("result.json"), {"pieces": list(kept.entries.values())})
        kept.remove()


def parts(overwrite: bool) -> None:
    """Pieces with bytes, and a file made of them."""

    def make(kept: Parts, name: str) -> tuple[Sequence[str], dict[str, Any]]:
        kept.write(name, [name.encode() * 1000, name.encode()])
        return [name], {"of": name}

    def chunks(kept: Parts) -> Iterator[bytes]:
        for name in NAMES:
            for chunk in kept.read(name):
                yield chunk.tobytes()

    out = Path("out")
    made = finished_parts(out, {"source": "s"}, NAMES, make)
    with made as kept, atomic_file(out, overwrite=overwrite) as stream:
        for chunk in chunks(kept):
            stream.write(chunk)


def artifacts(overwrite: bool) -> None:
    """An artifact that appears in a store."""
    store = ArtifactStore(Path("store"))
    with store.writing():
        if not store.has("k" * 8):
            staged = store.stage("k" * 8, 1)
            try:
                (staged / FILES).mkdir(parents=True)
                (staged / FILES / "file").write_bytes(b"1" * 100)
            except OSError as error:  # an action's own
                raise OutputError(f"cannot be written: {error.strerror}", path=staged) from error
            seal(staged, {"value": 1})
            store.put("k" * 8, staged, {"seconds": 1})


SCENES: dict[str, Callable[[bool], object]] = {
    one.__name__: one for one in (file, folder, nested, journal, parts, artifacts)
}
