"""Reads safetensors, one file or shards with an index: every header is checked before it is used."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import chain
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from bitsmith.errors import DamagedFileError, UnsupportedError, printable
from bitsmith.store.checkpoint import Bytes, Rows, TensorRef
from bitsmith.store.stored import PLAIN, Decoder, SourceFile, StoredCheckpoint, StoredTensor, plain_decoder

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000
MAX_JSON_BYTES = 100_000_000
MAX_DIMS = 32
MAX_TENSOR_BYTES = (1 << 63) - 1
MAX_ELEMENTS = 1 << 48
"""Elements of an empty tensor, axes of length 0 taken as 1: numpy cannot shape many more, even of none."""
MAX_FILE_NAME_BYTES = 255
LISTED = 50
ITEM_BYTES = {name: int(bits[2:]) for name, bits in PLAIN.items()} | {"F8_E4M3": 1, "F8_E5M2": 1}
SHARD_PATTERN = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
_TRUST_KEYS = {"auto_map", "trust_remote_code"}


def open_safetensors(path: Path) -> StoredCheckpoint:
    """Open a .safetensors file, or a folder with one or with shards and an index; every header is checked.

    Raises DamagedFileError naming the file, tensor, what was found and what was expected; UnsupportedError
    for a dtype that is not handled and for a folder with pickle files only.
    """
    folder = path if path.is_dir() else path.parent
    weight_map: dict[str, str] | None = None
    if not path.is_dir():
        sources = [SourceFile(path)]
    elif (index := folder / INDEX_NAME).exists():
        weight_map = _weight_map(index)
        sources = _shards(folder, index, weight_map)
    else:
        file = _only_file(folder)
        _refuse_leaving(folder, file)
        sources = [SourceFile(file)]
    regions = {source.path: _regions(source) for source in sources}
    if weight_map is not None:
        _match_index(folder, regions, weight_map)
    opened = StoredCheckpoint(path, dict(chain.from_iterable(r.items() for r in regions.values())), sources)
    opened.config = read_config(folder)
    opened._identity = opened.config
    return opened


def load_json(data: bytes, path: Path, what: str, *, ignore: Iterable[str] = ()) -> dict[str, Any]:
    """Parse a JSON object whose keys are unique at every level; keys to `ignore` are left out.

    Raises DamagedFileError.
    """
    dropped = frozenset(ignore)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise DamagedFileError(f"{what} has the key {printable(twice)!r} twice", path=path)
        return {key: value for key, value in pairs if key not in dropped}

    try:
        parsed = json.loads(data.decode(), object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        raise DamagedFileError(f"{what} is not UTF-8 at byte {error.start}", path=path) from error
    except RecursionError as error:
        raise DamagedFileError(f"{what} is nested too deep", path=path) from error
    except ValueError as error:
        raise DamagedFileError(f"{what} is not JSON: {printable(str(error))}", path=path) from error
    if not isinstance(parsed, dict):
        raise DamagedFileError(f"{what} is not a JSON object", path=path)
    return parsed


def is_unicode(name: str) -> bool:
    """Tell whether `name` has no lone surrogates, which no file format can hold."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def side_file(folder: Path, name: str) -> bytes | None:
    """Return a small file that lies beside the weights, None where there is none.

    Raises DamagedFileError for one of more than 100 MB and for a link out of the folder.
    """
    path = folder / name
    if not path.exists():
        return None
    _refuse_leaving(folder, path)
    return _small_file(path)


def side_files(folder: Path, names: Iterable[str]) -> dict[str, bytes]:
    """Return those of the small files `names` that lie in a folder. Raises as `side_file` does."""
    found = {name: side_file(folder, name) for name in names}
    return {name: data for name, data in found.items() if data is not None}


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json if there is one; what would let remote code run is left out.

    Raises as `side_file` and `load_json` do.
    """
    data = side_file(folder, "config.json")
    return {} if data is None else load_json(data, folder / "config.json", "config", ignore=_TRUST_KEYS)


def _small_file(path: Path) -> bytes:
    source = SourceFile(path)
    try:
        if source.size_bytes > MAX_JSON_BYTES:
            raise DamagedFileError(
                f"has {source.size_bytes} bytes, expected at most {MAX_JSON_BYTES}", path=path
            )
        return source.read(0, source.size_bytes).tobytes()
    finally:
        source.close()


def _only_file(folder: Path) -> Path:
    """Find the one safetensors file of a folder without an index."""
    found = sorted(folder.glob("*.safetensors"))
    if folder / SINGLE_NAME in found:
        return folder / SINGLE_NAME
    if not found:
        pickles = sorted(entry.name for entry in folder.iterdir() if entry.suffix in _PICKLES)
        if pickles:
            raise UnsupportedError(
                f"has only pickle files ({_listed(pickles)}), which can run code: convert to safetensors",
                path=folder,
            )
        raise UnsupportedError("has no .safetensors or .gguf file", path=folder)
    shard = SHARD_PATTERN.fullmatch(found[0].name)
    if shard is not None:
        count = int(shard["count"])
        present = {file.name for file in found}
        numbers = range(1, min(count, 99_999) + 1)
        expected = [f"{shard['stem']}-{n:05}-of-{count:05}.safetensors" for n in numbers]
        missing = [INDEX_NAME, *(name for name in expected if name not in present)]
        raise DamagedFileError(f"missing {_listed(missing)}: download again", path=folder)
    if len(found) > 1:
        names = _listed([file.name for file in found])
        raise DamagedFileError(f"has several safetensors files and no {INDEX_NAME}: {names}", path=folder)
    return found[0]


def _weight_map(index: Path) -> dict[str, str]:
    _refuse_leaving(index.parent, index)
    weight_map = load_json(_small_file(index), index, "index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DamagedFileError("has no weight_map", path=index)
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise DamagedFileError(f"names the shard {printable(repr(shard))}", path=index, tensor=name)
        parts = PurePosixPath(shard).parts
        outside = not parts or ".." in parts or shard.startswith("/") or bool(PureWindowsPath(shard).drive)
        unusual = "\\" in shard or not shard.isprintable() or len(shard.encode()) > MAX_FILE_NAME_BYTES
        if outside or unusual:
            raise DamagedFileError(
                f"names the shard {printable(shard)!r}, expected a plain name of a file in the folder",
                path=index,
                tensor=name,
            )
    return weight_map


def _shards(folder: Path, index: Path, weight_map: Mapping[str, str]) -> list[SourceFile]:
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise DamagedFileError(f"names missing shards: {_listed(missing)}: download again", path=index)
    for name in names:
        _refuse_leaving(folder, folder / name)
    return [SourceFile(folder / name) for name in names]


def _refuse_leaving(folder: Path, file: Path) -> None:
    """Refuse a link out of the model folder, except into the hub cache's own `blobs`."""
    inside, real = folder.resolve(), file.resolve()
    roots = [inside, *(parent.parent / "blobs" for parent in inside.parents if parent.name == "snapshots")]
    if not any(real.is_relative_to(root) for root in roots):
        raise DamagedFileError(f"links out of the model folder, to {real}", path=file)


def _match_index(
    folder: Path, regions: Mapping[Path, Mapping[str, TensorRef]], weight_map: Mapping[str, str]
) -> None:
    index = folder / INDEX_NAME
    found: dict[str, Path] = {}
    for path, tensors in regions.items():
        for name in tensors:
            if name in found:
                raise DamagedFileError(f"is in {found[name].name} as well", path=path, tensor=name)
            found[name] = path
    complaints = {
        "names tensors that its shards lack": [
            n for n, s in weight_map.items() if found.get(n) != folder / s
        ],
        "lacks tensors of its shards": [name for name in found if name not in weight_map],
    }
    if any(complaints.values()):
        said = "; ".join(f"{what}: {_listed(names)}" for what, names in complaints.items() if names)
        raise DamagedFileError(said, path=index)


def _listed(names: list[str]) -> str:
    rest = len(names) - LISTED
    return ", ".join(printable(name) for name in names[:LISTED]) + (f" and {rest} more" if rest > 0 else "")


class _Entry(NamedTuple):
    begin: int
    end: int
    name: str
    dtype: str
    shape: tuple[int, ...]


def _regions(source: SourceFile) -> dict[str, TensorRef]:
    """Return the tensors of one file: they must fill it without holes or overlaps."""
    header, data_start = _header(source)
    entries = sorted(_entry(source.path, name, value) for name, value in header.items())
    end = 0
    for entry in entries:
        if entry.begin != end:
            what = (
                "overlaps the one before, which ends" if entry.begin < end else "leaves a hole: the last ends"
            )
            raise DamagedFileError(
                f"starts at {entry.begin}, {what} at {end}", path=source.path, tensor=entry.name
            )
        end = entry.end
    if data_start + end > source.size_bytes:
        raise DamagedFileError(
            f"the file is truncated: it has {source.size_bytes} bytes, its header needs {data_start + end}; "
            "download it again",
            path=source.path,
            tensor=next(entry.name for entry in entries if data_start + entry.end > source.size_bytes),
        )
    if data_start + end < source.size_bytes:
        raise DamagedFileError(
            f"has {source.size_bytes} bytes, expected {data_start + end}: "
            f"{source.size_bytes - data_start - end} bytes belong to no tensor",
            path=source.path,
        )
    return {
        e.name: StoredTensor(
            e.name, e.shape, e.dtype, source, data_start + e.begin, e.end - e.begin, _decoder(source, e)
        )
        for e in entries
    }


def _header(source: SourceFile) -> tuple[dict[str, Any], int]:
    """Return the header without its metadata, and where the data starts."""
    if source.size_bytes < 8:
        raise DamagedFileError(
            f"has {source.size_bytes} bytes, no header: download it again", path=source.path
        )
    length = int(source.read(0, 8).view("<u8")[0])
    if length > min(MAX_HEADER_BYTES, source.size_bytes - 8):
        raise DamagedFileError(
            f"says its header has {length} bytes, expected at most {MAX_HEADER_BYTES} "
            f"and {source.size_bytes - 8} that follow; download it again",
            path=source.path,
        )
    data = source.read(8, length).tobytes()
    if not data.startswith(b"{"):
        raise DamagedFileError(f"header starts with {data[:1]!r}, expected b'{{'", path=source.path)
    if data.endswith(b"\0"):
        raise DamagedFileError("header is padded with NUL, expected spaces", path=source.path)
    header = load_json(data, source.path, "header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise DamagedFileError("__metadata__ is not a map of strings", path=source.path)
    return header, 8 + length


def _entry(path: Path, name: str, value: Any) -> _Entry:
    if not is_unicode(name):
        raise DamagedFileError("has a name that is not Unicode", path=path, tensor=name)
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise DamagedFileError("needs dtype, shape and data_offsets, nothing else", path=path, tensor=name)
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise UnsupportedError(
            f"has dtype {printable(str(dtype))}, known: {' '.join(ITEM_BYTES)}", path=path, tensor=name
        )
    if not _are_sizes(shape) or len(shape) > MAX_DIMS:
        raise DamagedFileError(f"has shape {printable(str(shape), 80)}", path=path, tensor=name)
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise DamagedFileError(f"has data_offsets {printable(str(offsets), 80)}", path=path, tensor=name)
    sides = prod(length or 1 for length in shape)
    if ITEM_BYTES[dtype] * sides > MAX_TENSOR_BYTES or (0 in shape and sides > MAX_ELEMENTS):
        raise DamagedFileError(f"has shape {shape}: its size overflows", path=path, tensor=name)
    expected, found = ITEM_BYTES[dtype] * prod(shape), offsets[1] - offsets[0]
    if expected != found:
        raise DamagedFileError(f"has {found} bytes, {dtype} {shape} needs {expected}", path=path, tensor=name)
    return _Entry(offsets[0], offsets[1], name, dtype, tuple(shape))


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item <= MAX_TENSOR_BYTES for item in value
    )


def _decoder(source: SourceFile, entry: _Entry) -> Decoder:
    if entry.dtype in PLAIN:
        return plain_decoder(entry.dtype)

    def refuse(_: Bytes) -> Rows:
        raise UnsupportedError(
            f"is {entry.dtype}: its scales must be applied, which is not supported; "
            "give a BF16 or F16 checkpoint",
            path=source.path,
            tensor=entry.name,
        )

    return refuse
