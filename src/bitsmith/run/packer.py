"""How matrices become the tensors of a packed folder: what `run.folder` asks of each way of packing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from bitsmith.formats.format import Float32
from bitsmith.run.encode import SLICE_BYTES, Rounder
from bitsmith.run.guide import Guide, finite_rows
from bitsmith.store.atomic import Chunk
from bitsmith.store.checkpoint import TensorRef

NESTED, _ALONE = "model.language_model.", "model."
"""Prefixes of a text model's modules: inside a multimodal model, and alone."""


class Part(NamedTuple):
    """One stored tensor of a packed matrix, `MODULE.suffix`: `weight_packed`, `weight.absmax`."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Assigned:
    """A matrix (`out in`) and its scheme; `group` columns share a scale (0: a row, or the scheme's own).

    `dtype` is the source's.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    scheme: str
    group: int

    @property
    def module(self) -> str:
        """The module's name: without `.weight`."""
        return self.name.removesuffix(".weight")


@dataclass(frozen=True)
class Matrix:
    """The weights to pack, what guides the rounding (None: nothing does), and the rounder asked for."""

    ref: TensorRef
    path: Path
    guide: Guide | None = None
    rounder: Rounder = "auto"

    def slices(self) -> Iterator[Float32]:
        """Yield all rows in order, some at a time, finite and as float32; from the start at every call.

        Raises DamagedFileError for a weight that is not finite.
        """
        for start, stop in self.ref.slices(SLICE_BYTES):
            yield finite_rows(self.ref, start, stop, self.path)


@dataclass(frozen=True)
class Outcome:
    """How codes were found, and their errors: `sum (w - q)² / sum w²`, `sum |E x|² / sum |W x|²` held out."""

    rounder: str
    relative_error: float
    held_error: float | None = None


class Encoding(Protocol):
    """One matrix on its way into the file.

    Files are written by falling width of the elements, then by name, and a part may go to a later shard than
    the ones before it in `Packer.parts`. What the part asked for first needs is made then, by passing over
    `Matrix.slices` (again, if need be); no more than vectors (a scale per row or block) may wait in memory.
    """

    def chunks(self, suffix: str) -> Iterator[Chunk]:
        """Yield a part's bytes in order; asked once for each part, in the file's order."""

    def outcome(self) -> Outcome:
        """Return what was done; asked when all parts have been taken."""


class Packer(Protocol):
    """One way of packing (`quant_method`) with its schemes."""

    @property
    def schemes(self) -> tuple[str, ...]:
        """The names of its schemes."""

    @property
    def tables(self) -> bool:
        """Whether embeddings can be packed, where they are asked for by name."""

    @property
    def costly(self) -> bool:
        """Whether matrices take long enough to be kept for the run after a killed one."""

    def takes(self, scheme: str) -> bool:
        """Tell whether a scheme is one of its own, options included."""

    def group(self, scheme: str, asked: int | None, shape: tuple[int, ...]) -> int | None:
        """Return the columns that share a scale in a matrix of `shape`: as `asked`, or the next that divides.

        None: it cannot be packed and stays as it is. Raises BitsmithError for a group that the scheme lacks.
        """

    def parts(self, row: Assigned) -> Sequence[Part]:
        """Return the tensors that hold the matrix; what fills the file most comes first."""

    def encode(self, row: Assigned, matrix: Matrix) -> Encoding:
        """Return the matrix's parts to be; nothing is read before the first is asked for."""

    def config(self, rows: Sequence[Assigned], kept: Sequence[str]) -> Mapping[str, Any]:
        """Return the `quantization_config` for the packed `rows`, and modules of linears that are `kept`."""


def names_in_both(modules: Sequence[str]) -> list[str]:
    """Return `modules` and, of a text model nested in a multimodal one, the names that it has when alone.

    transformers loads such a folder either way: `AutoModelForCausalLM` takes the text model out of it.
    """
    alone = [_ALONE + name.removeprefix(NESTED) for name in modules if name.startswith(NESTED)]
    return [*modules, *alone]
