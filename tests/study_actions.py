"""Cheap actions for tests of engines: a module of their own, so that other processes find them."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitsmith.errors import BitsmithError
from bitsmith.progress import Progress

Params = Mapping[str, Any]
Inputs = Mapping[str, Path]


def blend(params: Params, inputs: Inputs, out: Path, progress: Progress) -> dict[str, Any]:
    """Write bytes that depend on `seed`, the text and all inputs; note each start in the file `notes`."""
    if "notes" in params:
        with Path(params["notes"]).open("a") as stream:
            stream.write(f"{params['seed']}\n")
    state = hashlib.sha256(str(params["seed"]).encode())
    if "text" in params:
        state.update(Path(params["text"]).read_bytes())
    for name in sorted(inputs):
        state.update((inputs[name] / "deep" / "bytes").read_bytes())
    progress("blend", 1, 2)
    time.sleep(params.get("seconds", 0.0))
    (out / "deep").mkdir()
    (out / "deep" / "bytes").write_bytes(state.digest() * 1000)
    (out / "empty").write_bytes(b"")
    return {"digest": state.hexdigest()}


def refuse(params: Params, inputs: Inputs, out: Path, progress: Progress) -> dict[str, Any]:
    """Refuse with one line."""
    raise BitsmithError("is not to be", path=Path("model"), tensor="w")


def threads(params: Params, inputs: Inputs, out: Path, progress: Progress) -> dict[str, Any]:
    """Tell how many threads it is to compute with."""
    return {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")}


def hog(params: Params, inputs: Inputs, out: Path, progress: Progress) -> dict[str, Any]:
    """Hold memory until it is ended for it, at most a minute."""
    held = bytearray(os.urandom(1 << 20) * 400)
    time.sleep(60)
    return {"bytes": len(held)}


ACTIONS = {"blend": blend, "refuse": refuse, "threads": threads, "hog": hog}
