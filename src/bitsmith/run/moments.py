"""Second moments of matrices' inputs, from what `calibrate` wrote or from llama.cpp's `imatrix`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitsmith.archs import TensorSpec, claim, import_view
from bitsmith.errors import BitsmithError
from bitsmith.run.record import seal
from bitsmith.store import open_checkpoint
from bitsmith.store.atomic import Content
from bitsmith.store.checkpoint import Checkpoint
from bitsmith.store.imatrix import is_imatrix_name, write_imatrix
from bitsmith.store.statistics import Statistics, dense_moment, imatrix_of, open_statistics

Moments = Mapping[str, NDArray[np.float64]]
"""By tensor name: E[x xᵀ] (`in in`), or its diagonal E[x²] (`in`)."""


class StoredMoments(Mapping[str, NDArray[np.float64]]):
    """Moments by Hugging Face name, in the order of its columns, read when they are asked for."""

    def __init__(self, statistics: Statistics, specs: Iterable[TensorSpec]) -> None:
        self._statistics = statistics
        self._specs = {spec.name: spec for spec in specs if statistics.knows(spec)}
        self.digest = statistics.digest

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        found = self._statistics.hugging_face(self._specs[name])
        if found is None:
            raise KeyError(name)
        moment = found.diagonal if found.moment is None else dense_moment(found.moment)
        return moment.astype(np.float64)

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)


def stored_moments(path: Path, specs: Iterable[TensorSpec]) -> StoredMoments:
    """Return the moments of some of a model's matrices; those that `path` does not hold are left out.

    `path` is a folder of `calibrate` or an imatrix. Raises as `open_statistics` does.
    """
    listed = list(specs)
    return StoredMoments(open_statistics(path, listed, partial=True), listed)


@dataclass(frozen=True)
class Exported:
    """An imatrix written from statistics: how many matrices it covers."""

    path: Path
    source: Path
    entries: int

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready record."""
        return {
            "kind": "imatrix",
            "path": str(self.path),
            "source": str(self.source),
            "entries": self.entries,
        }


def export_imatrix(model: Path, statistics: Path, out: Path, *, overwrite: bool = False) -> Exported:
    """Write statistics as llama.cpp's imatrix for `model`'s GGUF, without a forward.

    E[x²] is over fit and held-out tokens together. `out` ends in `.gguf` or `.dat`. Raises BitsmithError for
    another ending and as `open_statistics` does, OutputError as `atomic_file` does.
    """
    if not is_imatrix_name(out):
        raise BitsmithError("is no name of an imatrix: expected .gguf or .dat", path=out)
    with open_checkpoint(model) as checkpoint:
        specs = model_specs(checkpoint)
        opened = open_statistics(statistics, specs)
        found = imatrix_of(opened, specs)
    files = statistics.iterdir() if statistics.is_dir() else [statistics]

    def finish(content: Content) -> None:
        seal(out, "imatrix", content, statistics_sha256=opened.digest)

    write_imatrix(out, found, overwrite=overwrite, sources=files, finish=finish)
    return Exported(out, statistics, len(found.entries))


def model_specs(checkpoint: Checkpoint) -> list[TensorSpec]:
    """Return the specs of a Hugging Face checkpoint's or a GGUF's tensors.

    Raises as `claim` and `import_view` do.
    """
    if checkpoint.config:
        return [spec for spec, _ in claim(checkpoint)]
    return list(import_view(checkpoint).specs.values())
