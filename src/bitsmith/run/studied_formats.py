"""The formats of `study formats`: those of a published study of .cellm files, ours in their bytes, today's.

The published table names nine files. f16, int8, int4, int2 and 1-bit are what cellm's converter writes at its
last public commit, with its choice of tensors: int4 leaves DeltaNet's projections in float16, int2 the
embedding and the head. int4 in groups of columns is what its `quantize` tool writes: embedding and head stay
in float16. Which tensors "mixed int4" and "int4 g128" hold was not said; of Qwen3-0.6B's shapes (440.4 M
weights in its layers, 155.6 M each in embedding and head) the published sizes follow from

    g32 830 MiB    = layers in groups of 32, embedding and head float16
    mixed 810 MiB  = layers in groups of 128, embedding and head float16: the tool's own default
    int8 866 MiB   = layers and one of embedding and head, the other float16; the last commit takes both
    g128 590 MiB   = layers and one of embedding and head in groups of 128, the other float16
    int4 360 MiB   = a scale per row, everything: the converter's rule where there is no DeltaNet

so `int4-mixed` is the tool's default; `int4-g128` here takes every matrix of the text model, since which of
the two was left out is not public.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bitsmith.errors import BitsmithError, printable
from bitsmith.progress import Progress
from bitsmith.run.cellm import write_cellm
from bitsmith.run.execute import compress
from bitsmith.run.folder import FolderRecord, write_folder
from bitsmith.run.spi import write_spi

Family = Literal["original", "seed", "scales", "feedback", "today"]
"""`seed`: cellm's encodings; `scales`: ours without statistics, `feedback`: with; `today`: other formats."""

Make = Callable[[Path, Path, "Path | None", Progress], str]
"""`make(model, out, statistics, progress)` writes the artifact and returns how its weights were rounded."""


@dataclass(frozen=True)
class StudiedFormat:
    """One row: how its artifact is made, from statistics where `guided`, and the `suffix` of its name."""

    name: str
    family: Family
    what: str
    suffix: str
    make: Make

    @property
    def guided(self) -> bool:
        """Whether the row needs statistics of activations."""
        return self.name.endswith(FEEDBACK)


FEEDBACK = "-feedback"
SCALES = "-scales"

_ALL = {"selection": "text"}
_CELLM: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("int4-row", "int4, a scale per row", {"kind": "i4"}),
    ("int4-g32", "int4 in groups of 32, layers only", {"kind": "i4", "group": 32}),
    ("int4-g128", "int4 in groups of 128, all of the text model", {"kind": "i4", "group": 128, **_ALL}),
    ("int4-mixed", "int4 in groups of 128, layers only", {"kind": "i4", "group": 128}),
    ("int4-all", "int4, a scale per row, all of the text model", {"kind": "i4", **_ALL}),
    ("int2", "int2, a scale per row, layers only", {"kind": "i2"}),
    ("1-bit", "1 bit, a scale per 128", {"kind": "q1"}),
)  # fmt: skip


def _cellm(*, seed: bool, **options: Any) -> Make:
    def make(model: Path, out: Path, statistics: Path | None, progress: Progress) -> str:
        record = write_cellm(
            model, out, like_seed=seed, statistics=statistics, overwrite=True, progress=progress,
            **{"selection": "cellm", **options},
        )  # fmt: skip
        rounders = Counter(tensor.rounder for tensor in record.tensors if tensor.grid is not None)
        if seed or not rounders:
            return "cellm's" if rounders else "float16"
        return _tally(rounders)

    return make


def _folder(scheme: str) -> Make:
    def make(model: Path, out: Path, statistics: Path | None, progress: Progress) -> str:
        rounder = "nearest" if statistics is None else "auto"  # the first is what the formats' own tools do
        return _packed(
            write_folder(
                model, out, scheme, statistics=statistics, rounder=rounder, overwrite=True, progress=progress
            )
        )

    return make


def _gguf(type_name: str) -> Make:
    def make(model: Path, out: Path, statistics: Path | None, progress: Progress) -> str:
        record = compress(model, out, type_name, statistics=statistics, overwrite=True, progress=progress)
        floats = ("F32", "F16", "BF16")
        return _tally(Counter(one.rounding.rounder for one in record.tensors if one.type not in floats))

    return make


def _spi(model: Path, out: Path, statistics: Path | None, progress: Progress) -> str:
    record = write_spi(model, out, overwrite=True, progress=progress)
    return f"{_packed(record.folder)}, {len(record.selection.names)} kept in BF16"


def _packed(record: FolderRecord) -> str:
    return _tally(Counter(tensor.rounder for tensor in record.tensors if tensor.rounder))


def _tally(rounders: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(rounders.items()))


def _variants() -> list[StudiedFormat]:
    """Return the seed's row of each integer format and, in the same layout, ours."""
    found = [
        StudiedFormat("f16", "seed", "float16", ".cellm", _cellm(seed=True, kind="f16")),
        StudiedFormat("int8", "seed", "int8, a scale per row", ".cellm", _cellm(seed=True, kind="i8")),
    ]
    for name, what, options in _CELLM:
        found.append(StudiedFormat(name, "seed", what, ".cellm", _cellm(seed=True, **options)))
        if name in ("int4-row", "int2", "1-bit"):
            said = f"{what}; scales of least error"
            found.append(
                StudiedFormat(name + SCALES, "scales", said, ".cellm", _cellm(seed=False, **options))
            )
        said = f"{what}; error feedback"
        found.append(
            StudiedFormat(name + FEEDBACK, "feedback", said, ".cellm", _cellm(seed=False, **options))
        )
    return found


def _others() -> list[StudiedFormat]:
    found: list[StudiedFormat] = []
    plain: tuple[tuple[str, str, str, Make], ...] = (
        ("NF4", "NF4 in blocks of 64, bitsandbytes", "", _folder("NF4")),
        ("W4A16", "int4 in groups of 128, compressed-tensors", "", _folder("W4A16")),
        *((name, f"llama.cpp's mix {name}", ".gguf", _gguf(name)) for name in ("Q1_0", "Q2_0", "Q4_K_M")),
    )
    for name, what, suffix, make in plain:
        found.append(StudiedFormat(name, "today", what, suffix, make))
        guided = f"{what}; error feedback"
        found.append(StudiedFormat(name + FEEDBACK, "feedback", guided, suffix, make))
    return [StudiedFormat("SPI", "today", "NF4 with critical layers in BF16", "", _spi), *found]


STUDIED = {one.name: one for one in (*_variants(), *_others())}
"""Every row by its name, in the order of the table."""


def studied(names: Sequence[str] | None) -> list[StudiedFormat]:
    """Return the rows called `names` in that order, each once; all of them for None.

    Raises BitsmithError that lists the known names.
    """
    unknown = [name for name in names or () if name not in STUDIED]
    if unknown:
        raise BitsmithError(f"unknown format {printable(unknown[0])!r}; known: {' '.join(STUDIED)}")
    return list(STUDIED.values()) if names is None else [STUDIED[name] for name in dict.fromkeys(names)]
