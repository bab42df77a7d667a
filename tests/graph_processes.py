"""What tests of killed runs ask of processes and of a store's folder."""

import time
from pathlib import Path


def is_gone(pid):
    """Whether a process has ended, be it that nobody has taken note yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def children(pid):
    """Return the processes that a process started and that still are its."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def wait_for(what, seconds=120):
    """Wait until `what` returns something true, and return that."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.01)
    return found


def artifacts(store):
    """Return the bytes of every file of every artifact but those of what making it took."""
    return {
        str(path.relative_to(store / "objects")): path.read_bytes()
        for path in (store / "objects").rglob("*")
        if path.is_file() and path.name not in ("cost.json", "audit.jsonl")
    }


def finished(store):
    """Return the keys of the artifacts that are there."""
    return {path.parent.name for path in store.glob("objects/*/*/manifest.json")}
