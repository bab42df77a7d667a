"""Checkpoints on disk: read lazily after checking, written atomically."""

from __future__ import annotations

from pathlib import Path

from bitsmith.errors import BitsmithError, UnsupportedError, printable
from bitsmith.store.cellm import CELLM_MAGIC, CellmCheckpoint, CellmInfo, open_cellm
from bitsmith.store.cellm_writer import write_cellm_file
from bitsmith.store.checkpoint import Checkpoint, ComputedTensor, TensorRef, View
from bitsmith.store.gguf import GgufCheckpoint, open_gguf
from bitsmith.store.gguf_layout import MAGIC, TensorInfo, Typed
from bitsmith.store.gguf_split import are_one_file
from bitsmith.store.gguf_writer import gguf_size_bytes, write_gguf
from bitsmith.store.hub import local
from bitsmith.store.packings import unpacked
from bitsmith.store.safetensors import open_safetensors
from bitsmith.store.safetensors_writer import TensorData, write_safetensors
from bitsmith.store.stored import SourceFile
from bitsmith.store.virtual import is_virtual, open_virtual

__all__ = [
    "CellmCheckpoint",
    "CellmInfo",
    "Checkpoint",
    "ComputedTensor",
    "GgufCheckpoint",
    "TensorData",
    "TensorInfo",
    "TensorRef",
    "Typed",
    "View",
    "gguf_size_bytes",
    "open_cellm",
    "open_checkpoint",
    "open_gguf",
    "open_safetensors",
    "write_cellm_file",
    "write_gguf",
    "write_safetensors",
]


def open_checkpoint(path: Path) -> Checkpoint:
    """Open whatever checkpoint `path` is: a folder, a .safetensors, GGUF or .cellm file, or one of a hub.

    What does not exist is taken as a hub's `org/name[@revision]`, see `bitsmith.store.hub.local`. A folder
    without safetensors is the one GGUF or .cellm file in it, or is computed on read (`store.virtual`).
    Raises BitsmithError if there is none, UnsupportedError for a file of another kind, DamagedFileError for
    a damaged one.
    """
    path = local(path)
    if path.is_dir():
        return _open_folder(path)
    if path.suffix == ".safetensors":
        return unpacked(open_safetensors(path))
    if path.suffix == ".gguf" or _starts_with(path, MAGIC):
        return open_gguf(path)
    if path.suffix == ".cellm" or _starts_with(path, CELLM_MAGIC):
        return open_cellm(path)
    if _looks_like_safetensors(path):
        return unpacked(open_safetensors(path))
    raise UnsupportedError("is neither a .safetensors nor a .gguf nor a .cellm file", path=path)


def _open_folder(path: Path) -> Checkpoint:
    if not any(path.iterdir()):
        raise BitsmithError("is an empty folder, expected a checkpoint", path=path)
    if is_virtual(path):
        return open_virtual(path)
    files = [*sorted(path.glob("*.gguf")), *sorted(path.glob("*.cellm"))]
    if not files or any(path.glob("*.safetensors*")):
        return unpacked(open_safetensors(path))
    if not are_one_file(files):
        names = ", ".join(printable(file.name) for file in files)
        raise BitsmithError(f"has several model files, name one of them: {names}", path=path)
    return open_gguf(files[0]) if files[0].suffix == ".gguf" else open_cellm(files[0])


def _starts_with(path: Path, magic: bytes, offset: int = 0) -> bool:
    source = SourceFile(path)
    try:
        end = offset + len(magic)
        return source.size_bytes >= end and source.read(offset, len(magic)).tobytes() == magic
    finally:
        source.close()


def _looks_like_safetensors(path: Path) -> bool:
    return _starts_with(path, b"{", offset=8)
