"""Residual maps that lie in an unnamed temporary file and are read when they are asked for.

With a map for each place a plan would hold two matrices of both widths for every layer; in a file they take
memory while they are used.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bitsmith.errors import OutputError
from bitsmith.passes.merge_maps import ResidualMap

Float64 = NDArray[np.float64]


class MapFile:
    """A temporary file that maps are put into; it goes with the last of them."""

    def __init__(self) -> None:
        descriptor, path = tempfile.mkstemp()
        Path(path).unlink()
        self._descriptor, self._end = descriptor, 0
        weakref.finalize(self, os.close, descriptor)

    def put(self, mapping: ResidualMap) -> ResidualMap:
        """Return the same map, read from here.

        Raises OutputError if the temporary folder has no room for it.
        """
        start = self._end
        try:
            for part in (mapping.forward, mapping.backward):
                self._write(np.ascontiguousarray(part, np.float64))
        except OSError as error:
            raise OutputError(f"no room in the temporary folder for a map: {error.strerror}") from error
        return _Kept(self, start, mapping.shape, mapping.method)

    def _write(self, part: Float64) -> None:
        view, done = part.reshape(-1).view(np.uint8), 0
        while done < part.nbytes:
            done += os.pwrite(self._descriptor, view[done:].data, self._end + done)
        self._end += part.nbytes

    def read(self, start: int, shape: tuple[int, int]) -> Float64:
        """Return a matrix that begins at byte `start`."""
        made = np.empty(shape)
        view, done = made.reshape(-1).view(np.uint8), 0
        while done < made.nbytes:
            count = os.preadv(self._descriptor, [view[done:].data], start + done)
            if not count:
                raise OutputError("a map is no longer whole in its temporary file")
            done += count
        return made


class _Kept(ResidualMap):
    """A map in a file."""

    _file: MapFile
    _start: int
    _shape: tuple[int, int]

    def __init__(self, file: MapFile, start: int, shape: tuple[int, int], method: str) -> None:
        for name, value in (("_file", file), ("_start", start), ("_shape", shape), ("method", method)):
            object.__setattr__(self, name, value)

    @property
    def shape(self) -> tuple[int, int]:
        """`D_t`, `D_s`."""
        return self._shape

    @property
    def forward(self) -> Float64:
        """Read A."""
        return self._file.read(self._start, self._shape)

    @property
    def backward(self) -> Float64:
        """Read B."""
        return self._file.read(self._start + 8 * self._shape[0] * self._shape[1], self._shape)
