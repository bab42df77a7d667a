"""YAML as people write it, read strictly: no key twice, no aliases; every value with its line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from bitsmith.errors import BitsmithError, printable

MAX_BYTES = 1 << 20
Place = tuple[str | int, ...]


class Document(NamedTuple):
    """What a file says, and the line (from 1) of every value by the keys and indices that lead to it."""

    value: Any
    lines: dict[Place, int]

    def line(self, place: Sequence[str | int]) -> int | None:
        """Return the line of a value, or of the nearest one around it that is there."""
        found = (self.lines.get(tuple(place[:end])) for end in range(len(place), -1, -1))
        return next((line for line in found if line is not None), None)


def read_yaml(path: Path, what: str, max_bytes: int = MAX_BYTES) -> Document:
    """Read the YAML file `path`; `what` it is goes into the errors.

    Raises BitsmithError with the line for a file that cannot be read, is larger than `max_bytes`, no YAML, or
    has a key twice or an alias.
    """
    text = _text(path, what, max_bytes)
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return Document(None, {})
            lines = dict(_lines(node, ()))
            return Document(loader.construct_document(node), lines)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        where = f" at line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise BitsmithError(f"is not YAML{where}: {printable(str(error.problem))}", path=path) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise BitsmithError(f"is not {what}: {printable(str(error))}", path=path) from error


def _text(path: Path, what: str, max_bytes: int) -> str:
    try:
        if not path.is_file() and path.exists():
            raise BitsmithError(f"is a folder or a device, not {what}", path=path)
        if path.stat().st_size > max_bytes:
            raise BitsmithError(f"is larger than {max_bytes} bytes, so it is not {what}", path=path)
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BitsmithError(f"is not UTF-8 at offset {error.start}", path=path) from error
    except (OSError, ValueError) as error:  # a name with a NUL is no OSError
        said = printable(getattr(error, "strerror", None) or str(error))
        raise BitsmithError(f"cannot be read: {said}", path=path) from error


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without aliases and without a key given twice."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.YAMLError(f"aliases are not allowed, line {event.start_mark.line + 1}")
        return super().compose_node(parent, index)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value = super().construct_scalar(node)
        line = node.start_mark.line + 1
        if "\0" in value or any("\ud800" <= one <= "\udfff" for one in value):
            raise yaml.YAMLError(f"a value holds what no text does, line {line}")
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.YAMLError(f"a key is no name, line {line}")
            if key.value in seen:
                raise yaml.YAMLError(f"{printable(str(key.value))!r} is there twice, line {line}")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _lines(node: yaml.Node, place: Place) -> Iterator[tuple[Place, int]]:
    yield place, node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from _lines(value, (*place, str(key.value)))
            yield (*place, str(key.value)), key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _lines(value, (*place, index))
