"""Writes safetensors as a stream, in shards when it is large, with the index last."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from bitsmith.errors import BitsmithError, OutputError
from bitsmith.store.atomic import (
    Chunk,
    Finish,
    atomic_folder,
    refuse_full,
    refuse_taken,
    sync_folder,
    sync_path,
    write_chunk,
)
from bitsmith.store.journal import Journal, Key, remove_work
from bitsmith.store.safetensors import (
    INDEX_NAME,
    ITEM_BYTES,
    MAX_HEADER_BYTES,
    SHARD_PATTERN,
    SINGLE_NAME,
    is_unicode,
)

SHARD_BYTES = 5_000_000_000
_METADATA = {"format": "pt"}


class TensorData(NamedTuple):
    """A tensor to write: `chunks` are its stored bytes in order, made when they are asked for."""

    name: str
    dtype: str
    shape: Sequence[int]
    chunks: Iterable[Chunk]

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return ITEM_BYTES[self.dtype] * prod(self.shape)


def write_safetensors(
    folder: Path,
    tensors: Iterable[TensorData],
    config: Mapping[str, Any] | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
    files: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
    sources: Iterable[Path] = (),
    finish: Finish | None = None,
) -> None:
    """Write a checkpoint folder, atomically: config.json, shards of at most `shard_bytes`, and their index.

    One shard is `model.safetensors` without an index. A tensor larger than `shard_bytes` gets a shard of its
    own. `files` (tokenizer and the like) are written beside them by name, and `finish` is told of the whole
    folder before it appears. Raises OutputError as `atomic_folder` does, BitsmithError for a tensor given
    twice, of an unknown dtype or whose chunks do not add up to its size.
    """
    layout = _Layout(tensors, config, shard_bytes, metadata or _METADATA, files or {})
    with atomic_folder(
        folder,
        last=layout.last,
        stale=_is_model_file,
        overwrite=overwrite,
        expect_bytes=layout.nbytes,
        sources=sources,
        finish=finish,
    ) as part:
        for name, header, shard in layout.shards:
            _write_shard(part / name, header, shard, folder / name)
        layout.write_texts(part)


def write_shard_by_shard(
    folder: Path,
    tensors: Iterable[TensorData],
    config: Mapping[str, Any],
    key: Key,
    *,
    shard_bytes: int = SHARD_BYTES,
    files: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
    finish: Finish | None = None,
) -> None:
    """Write a checkpoint folder as `write_safetensors` does, and go on with the shards that are not finished.

    Finished ones are kept beside `folder`, valid for one `key`: what the tensors' values depend on. Raises as
    `write_safetensors` and `Journal` do.
    """
    layout = _Layout(tensors, config, shard_bytes, _METADATA, files or {})
    refuse_taken(folder, overwrite, (), folder=True)
    work = folder.with_name(f".{folder.name}.shards")
    made = work / "files"
    with _made(made), Journal(work / "journal", key, overwrite=overwrite) as journal:
        kept = {name for name in journal.entries if (made / name).exists()}
        done = sum((made / name).stat().st_size for name in kept)
        refuse_full(folder, layout.nbytes - done)
        for name, header, shard in layout.shards:
            if name not in kept:
                _write_shard(made / name, header, shard, folder / name)
                sync_path(made / name)
                sync_folder(made)
                journal.add(name, len(header))
        layout.write_texts(made)
        move_checkpoint(made, folder, overwrite=overwrite, finish=finish)
        journal.remove()
    remove_work(work)


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a folder; what the system refuses, also meanwhile, is said to be of the output."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror or error}", path=folder) from error


class _Layout:
    """What goes into which file of a checkpoint: shards with their headers, and small files."""

    def __init__(
        self,
        tensors: Iterable[TensorData],
        config: Mapping[str, Any] | None,
        shard_bytes: int,
        metadata: Mapping[str, str],
        files: Mapping[str, bytes],
    ) -> None:
        listed = [TensorData(*tensor) for tensor in tensors]
        _refuse_unsound(listed)
        shards = _sharded(listed, shard_bytes)
        names = _shard_names(len(shards))
        headers = [_header(shard, metadata) for shard in shards]
        self.shards = list(zip(names, headers, shards, strict=True))
        self._texts = _side_files(config, files, dict(zip(names, shards, strict=True)))
        self.last = INDEX_NAME if INDEX_NAME in self._texts else SINGLE_NAME
        small = sum(map(len, [*headers, *self._texts.values()]))
        self.nbytes = small + sum(tensor.nbytes for tensor in listed)

    def write_texts(self, folder: Path) -> None:
        """Write the small files, the index last."""
        for name in sorted(self._texts, key=lambda name: (name == self.last, name)):
            (folder / name).write_bytes(self._texts[name])


def move_checkpoint(
    made: Path,
    folder: Path,
    *,
    overwrite: bool = False,
    sources: Iterable[Path] = (),
    finish: Finish | None = None,
) -> None:
    """Move all files of a checkpoint folder into `folder`, which appears as `write_safetensors` makes it.

    Both are on one file system. Raises OutputError as `atomic_folder` does.
    """
    files = sorted(made.iterdir())
    last = INDEX_NAME if made / INDEX_NAME in files else SINGLE_NAME
    with atomic_folder(
        folder, last=last, stale=_is_model_file, overwrite=overwrite, sources=sources, finish=finish
    ) as part:
        for path in files:
            path.replace(part / path.name)
    made.rmdir()


def safetensors_size_bytes(
    tensors: Iterable[TensorData],
    *,
    shard_bytes: int = SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Return the bytes of all shards that `write_safetensors` would write; no chunk is asked for."""
    listed = [TensorData(*tensor) for tensor in tensors]
    headers = (_header(shard, metadata or _METADATA) for shard in _sharded(listed, shard_bytes))
    return sum(map(len, headers)) + sum(tensor.nbytes for tensor in listed)


def write_safetensors_file(path: Path, tensors: Iterable[TensorData]) -> None:
    """Write one safetensors file, not atomically: for files inside a folder that appears as a whole.

    Raises BitsmithError as `write_safetensors` does.
    """
    listed = [TensorData(*tensor) for tensor in tensors]
    _refuse_unsound(listed)
    [shard] = _sharded(listed, sum(tensor.nbytes for tensor in listed))
    _write_shard(path, _header(shard, {}), shard, path)


def _refuse_unsound(tensors: Sequence[TensorData]) -> None:
    seen = set()
    for tensor in tensors:
        if tensor.dtype not in ITEM_BYTES:
            known = " ".join(ITEM_BYTES)
            raise BitsmithError(f"has dtype {tensor.dtype}, known: {known}", tensor=tensor.name)
        if tensor.name in seen or tensor.name == "__metadata__" or not is_unicode(tensor.name):
            raise BitsmithError("is given twice, or has a name that cannot be written", tensor=tensor.name)
        seen.add(tensor.name)


def _sharded(tensors: Iterable[TensorData], shard_bytes: int) -> list[list[TensorData]]:
    """Fill shards in the order given; within one, wide elements come first so that all stay aligned."""
    shards: list[list[TensorData]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return [sorted(shard, key=lambda tensor: (-ITEM_BYTES[tensor.dtype], tensor.name)) for shard in shards]


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE_NAME]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def _header(shard: Iterable[TensorData], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, dtype, shape, _ in shard:
        begin, end = end, end + ITEM_BYTES[dtype] * prod(shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise BitsmithError(
            f"the header of a shard has {len(text)} bytes, the format allows {MAX_HEADER_BYTES}"
        )
    return len(text).to_bytes(8, "little") + text


def _side_files(
    config: Mapping[str, Any] | None, files: Mapping[str, bytes], shards: Mapping[str, Sequence[TensorData]]
) -> dict[str, bytes]:
    texts = dict(files)
    if config is not None:
        texts["config.json"] = _json(config)
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, shard in shards.items() for tensor in shard}
        total = sum(tensor.nbytes for shard in shards.values() for tensor in shard)
        texts[INDEX_NAME] = _json(
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        )
    return texts


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _write_shard(path: Path, header: bytes, shard: Iterable[TensorData], target: Path) -> None:
    with path.open("wb") as stream:
        stream.write(header)
        for tensor in shard:
            done = 0
            for chunk in tensor.chunks:
                done += write_chunk(stream, chunk)
                if done > tensor.nbytes:
                    break
            if done != tensor.nbytes:
                found = "more" if done > tensor.nbytes else f"{done}"
                raise BitsmithError(
                    f"came as {found} bytes, expected {tensor.nbytes}", path=target, tensor=tensor.name
                )


def _is_model_file(name: str) -> bool:
    """Tell whether a file of a folder to overwrite belongs to the checkpoint that is replaced."""
    return name in (SINGLE_NAME, INDEX_NAME) or re.fullmatch(SHARD_PATTERN, name) is not None
