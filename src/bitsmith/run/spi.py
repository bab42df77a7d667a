"""The SPI recipe: critical linears stay as they are stored, the other linears become NF4."""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitsmith.numerics.threads import one_blas_thread
from bitsmith.progress import Progress, silent
from bitsmith.run.critical import CHUNKS, CTX_TOKENS, Linear, Selection, critical_linears, parse_critical
from bitsmith.run.folder import FolderPlan, FolderRecord, plan_folder, write_folder

SCHEME, KEPT = "NF4", "BF16"
"""Schemes of `run.folder`: of the rest, and of what is kept as it is stored."""


@dataclass(frozen=True)
class SpiPlan:
    """What `write_spi` would write, tensor by tensor."""

    selection: Selection
    folder: FolderPlan

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain values."""
        return {"selection": self.selection.to_json(), "folder": self.folder.to_json()}


@dataclass(frozen=True)
class SpiRecord:
    """What `write_spi` wrote."""

    selection: Selection
    folder: FolderRecord
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain values."""
        parts = {"selection": self.selection.to_json(), "folder": self.folder.to_json()}
        return {"kind": "spi", **parts, "seconds": self.seconds}


@one_blas_thread()
def plan_spi(
    model: Path,
    *,
    critical: str | None = None,
    by: str | None = None,
    seed: int = 0,
    assay: Path | None = None,
    text: Path | None = None,
    ctx_tokens: int = CTX_TOKENS,
    chunks: int = CHUNKS,
    statistics: Path | None = None,
    rounder: str = "nearest",
    progress: Progress = silent,
) -> SpiPlan:
    """Return what `write_spi` would write, with exact bytes; the linears are ranked for it.

    Options and errors are `write_spi`'s.
    """
    selection = _selected(model, critical, by, seed, assay, text, ctx_tokens, chunks, progress)
    folder = plan_folder(
        model,
        SCHEME,
        tensor_types=tensor_types(selection.linears, selection.names),
        statistics=statistics,
        rounder=rounder,
    )
    return SpiPlan(selection, folder)


@one_blas_thread()
def write_spi(
    model: Path,
    out: Path,
    *,
    critical: str | None = None,
    by: str | None = None,
    seed: int = 0,
    assay: Path | None = None,
    text: Path | None = None,
    ctx_tokens: int = CTX_TOKENS,
    chunks: int = CHUNKS,
    statistics: Path | None = None,
    rounder: str = "nearest",
    overwrite: bool = False,
    progress: Progress = silent,
) -> SpiRecord:
    """Write `model` (a Hugging Face folder) to the folder `out`: critical linears as stored, the rest NF4.

    `critical` says how many are kept (`129`, `3.9GB`, `alpha>0.8`; default: 129/248 of the linears of the
    text model), `by` how they are ranked (one of `run.critical.BY`; default `alpha-high`), `seed` draws the
    random ranking. `assay` spares the spectra, `text` is the calibration text that `kld` measures on. The
    published recipe used no calibration, so codes are `nearest` unless `statistics` and a `rounder` are
    given.

    Raises as `run.critical.critical_linears` and `run.folder.write_folder` do; nothing is written then.
    """
    started = time.monotonic()
    selection = _selected(model, critical, by, seed, assay, text, ctx_tokens, chunks, progress)
    folder = write_folder(
        model,
        out,
        SCHEME,
        tensor_types=tensor_types(selection.linears, selection.names),
        statistics=statistics,
        rounder=rounder,
        overwrite=overwrite,
        recipe={"recipe": "spi", "critical": critical, "by": by, "seed": seed},
        progress=progress,
    )
    return SpiRecord(selection, folder, time.monotonic() - started)


def tensor_types(linears: Sequence[Linear], kept: Collection[str]) -> list[tuple[str, str]]:
    """Return the rules of `write_folder` by which `kept` linears stay as stored and all the others are NF4.

    Also DeltaNet's in_proj_a and in_proj_b, which `write_folder` alone would keep: the recipe counts them.
    """
    return [(f"^{re.escape(linear.name)}$", KEPT if linear.name in kept else SCHEME) for linear in linears]


def _selected(
    model: Path,
    amount: str | None,
    by: str | None,
    seed: int,
    assay: Path | None,
    text: Path | None,
    ctx_tokens: int,
    chunks: int,
    progress: Progress,
) -> Selection:
    return critical_linears(
        model,
        by=by,
        amount=None if amount is None else parse_critical(amount),
        seed=seed,
        assay=assay,
        text=text,
        ctx_tokens=ctx_tokens,
        chunks=chunks,
        progress=progress,
    )
