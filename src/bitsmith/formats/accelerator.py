"""What encodes in the place of the compiled searches while a command runs on another device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from bitsmith.formats.format import Format
    from bitsmith.numerics.input_metric import InputMetric

Float32 = NDArray[np.float32]
Bytes = NDArray[np.uint8]


class Accelerator(Protocol):
    """Encodes to the bytes that the compiled searches give; `name` is for records."""

    @property
    def name(self) -> str:
        """The device."""

    @property
    def slice_bytes(self) -> int:
        """Float32 bytes of rows that it wants at a time."""

    def encode(self, form: Format, rows: Float32, importance: Float32 | None) -> Bytes | None:
        """Encode as `Format.encode` does, or return None for a format that it does not know."""

    def round_rows(self, form: Format, rows: Float32, metric: InputMetric, effort: Any) -> Bytes | None:
        """Do as `passes.rounding.round_rows` with its `Effort`, or return None for an unknown format."""


_current: Accelerator | None = None


def accelerator() -> Accelerator | None:
    """Return what encodes now in the place of the compiled searches, None if these do."""
    return _current


def device_facts() -> dict[str, str]:
    """Return what a record or a key says of the device that encodes: nothing of the processor."""
    return {} if _current is None else {"device": _current.name}


@contextmanager
def accelerated_by(found: Accelerator | None) -> Iterator[None]:
    """Let `found` encode, in the whole process; None for the compiled searches. May be nested."""
    global _current  # noqa: PLW0603 (one device at a time, like the limit of BLAS threads)
    before, _current = _current, found
    try:
        yield
    finally:
        _current = before
