"""GGUF files in parts, `NAME-00001-of-00003.gguf`, as llama.cpp's tools split them: one checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bitsmith.errors import DamagedFileError, printable

SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")
"""Keys of a part alone: its number from 0, how many there are, and the tensors of all of them."""

_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})", re.DOTALL)
_LISTED = 10


def part_count(metadata: Mapping[str, Any]) -> int:
    """Return how many parts a file belongs to, 1 for a whole one.

    Raises DamagedFileError for a count that is no integer from 0 to 65535.
    """
    count = metadata.get("split.count", 0)
    if type(count) is not int or not 0 <= count < 1 << 16:
        raise DamagedFileError(f"split.count is {printable(repr(count), 40)}, expected an integer")
    return max(1, count)


def whole_stem(path: Path) -> str:
    """Return the name of a file without its suffix, and without the number that a part has.

    >>> whole_stem(Path("model-00001-of-00003.gguf"))
    'model'
    """
    found = _NAME.fullmatch(path.stem)
    return found["stem"] if found else path.stem


def are_one_file(paths: Sequence[Path]) -> bool:
    """Tell whether the names are those of one file, or of the parts of one."""
    found = [_NAME.fullmatch(path.stem) for path in paths]
    wholes = {None if match is None else (match["stem"], match["count"]) for match in found}
    return len(paths) == 1 or (len(wholes) == 1 and None not in wholes)


def part_paths(path: Path, count: int) -> list[Path]:
    """Return the paths of all `count` parts in order, from any of them.

    Raises DamagedFileError for a name that does not tell the others', and for parts that are missing.
    """
    found = _NAME.fullmatch(path.stem)
    if found is None or path.suffix != ".gguf" or int(found["count"]) != count:
        raise DamagedFileError(
            f"is one of {count} parts: its name must end in -00001-of-{count:05}.gguf, by which the others "
            "are found"
        )
    paths = [path.with_name(f"{found['stem']}-{n:05}-of-{count:05}.gguf") for n in range(1, count + 1)]
    missing = [printable(part.name) for part in paths if not part.exists()]
    if missing:
        more = f" and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
        listed = ", ".join(missing[:_LISTED])
        raise DamagedFileError(f"{len(missing)} of {count} parts are missing beside it: {listed}{more}")
    return paths


def check_part(metadata: Mapping[str, Any], number: int, count: int) -> None:
    """Raise DamagedFileError unless a part says that it is `number` (from 0) of `count`."""
    found = metadata.get("split.no"), metadata.get("split.count")
    if found != (number, count):
        said = " of ".join(printable(str(value), 20) for value in found)
        raise DamagedFileError(f"says that it is part {said}, its name {number} of {count} (from 0)")


def check_total(metadata: Mapping[str, Any], tensors: int) -> None:
    """Raise DamagedFileError where all parts hold another number of tensors than the first says."""
    if (said := metadata.get("split.tensors.count", tensors)) != tensors:
        found = printable(str(said), 20)
        raise DamagedFileError(f"says that all parts hold {found} tensors, they hold {tensors}")
