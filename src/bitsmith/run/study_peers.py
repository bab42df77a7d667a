"""Figures, and points of others beside a study's own: read before anything runs, shown in the report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from bitsmith.errors import BitsmithError, printable

MAX_BYTES = 1 << 20


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Figure(_Part):
    """A measured value; `low` and `high` are None where the interval is unmeasured, `interval` is its kind.

    The fields are those of `bitsmith.run.evaluate.Measure`.
    """

    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    interval: str | None = None


class Peer(_Part):
    """A point that others published or that was measured of their file; `source` says where it is from.

    `same_protocol` is whether its figures were measured on the text and positions of this study's; where
    not, its place beside ours means little, and the report says so.
    """

    name: str
    source: str
    same_protocol: bool
    file_bytes: int | None = None
    bpw: float | None = None
    measures: Mapping[str, Figure] = {}


def read_peers(path: Path) -> list[dict[str, Any]]:
    """Return the peers in a JSON list, as plain values.

    Raises BitsmithError for a file that cannot be read, and that names the first field that is not as
    documented.
    """
    try:
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            raise BitsmithError(f"is no file of at most {MAX_BYTES} bytes, so it holds no peers", path=path)
        found = TypeAdapter(list[Peer]).validate_python(json.loads(path.read_bytes()))
    except OSError as error:
        raise BitsmithError(f"cannot be read: {error.strerror or error}", path=path) from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise BitsmithError(
            f"is no list of peers: {printable(where)}: {printable(first['msg'])}", path=path
        ) from error
    except (ValueError, RecursionError) as error:
        raise BitsmithError(f"is not JSON: {printable(str(error))}", path=path) from error
    return [peer.model_dump(mode="json") for peer in found]
