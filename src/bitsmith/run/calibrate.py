"""Calibrate: run a text through a model and keep what every matrix sees, layer by layer, resumably."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bitsmith import __version__
from bitsmith.archs import TensorSpec
from bitsmith.errors import BitsmithError, OutputError
from bitsmith.formats.accelerator import device_facts
from bitsmith.numerics.threads import one_blas_thread
from bitsmith.progress import Progress, silent
from bitsmith.run.calibration_work import Passes, Work
from bitsmith.run.device import on_device
from bitsmith.run.evaluate import open_model, text_chunks
from bitsmith.run.evaluation import Protocol
from bitsmith.run.forward import TextModel, Tokens
from bitsmith.run.gather import Kept
from bitsmith.run.moments import Exported, export_imatrix
from bitsmith.run.record import seal, source_facts
from bitsmith.store.atomic import Content, atomic_folder, link_file, refuse_full, refuse_taken
from bitsmith.store.hub import local
from bitsmith.store.imatrix import is_imatrix_name, write_imatrix
from bitsmith.store.journal import content_key
from bitsmith.store.statistics import imatrix_of, open_statistics, write_saliency, write_tokens
from bitsmith.store.statistics_manifest import (
    MANIFEST_NAME,
    SALIENCY_NAME,
    TOKENS_NAME,
    Manifest,
    SiteEntry,
    write_manifest,
)

_OURS = re.compile(r"(layers\.\d+|head|mtp)\.safetensors")


@dataclass(frozen=True)
class Calibration:
    """A finished calibration: where it lies, what was run, and how many layers an earlier run had left."""

    path: Path
    model: str
    text: str
    text_sha256: str
    ctx_tokens: int
    chunks: int
    held_chunks: int
    fit_tokens: int
    sites: int
    size_bytes: int
    resumed_layers: int

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready record."""
        return {"kind": "calibration", "bitsmith": __version__, **asdict(self), "path": str(self.path)}


@one_blas_thread()
def calibrate(
    model: Path,
    text: Path,
    out: Path,
    *,
    ctx_tokens: int = 512,
    chunks: int | None = None,
    block: int | None = None,
    saliency: bool = True,
    seed: int = 0,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress = silent,
) -> Calibration:
    """Run a UTF-8 text through `model`, a Hugging Face folder or a GGUF, and keep what enters its matrices.

    The text is cut into chunks of `ctx_tokens` as `evaluate` and llama-imatrix do, at most `chunks` of them;
    every eighth is held out. Of each activation site x the folder `out` gets E[x xᵀ], E[x²] and E[x] over the
    others, and up to 2048 held-out inputs drawn by `seed`. Moments of more than `block` columns are kept as
    diagonal blocks of that size (`n b b`); by default, of more than 4096 columns as blocks of their largest
    divisor up to 4096 that is a multiple of 256. MTP layers and the head are run too. With
    `saliency` second moments and held-out inputs weigh each token by what its errors cost the predictions
    (see `run.saliency.Backward`), which takes a backward pass, about three times the forward in all. Where
    `out` ends in `.gguf` or `.dat` it gets llama.cpp's imatrix instead: E[x²] over all chunks.

    One layer's weights and moments are in memory; states and finished layers lie in `.NAME.calibration`
    beside `out`, so that a killed run goes on at its layer, with the same bytes. Sums do not depend on the
    number of threads. `device` is one of `run.device`: a GPU's sums differ in the last bits.

    Raises BitsmithError for a text that is not UTF-8 or too short, for states that are not finite, and for a
    `block` that does not divide a site's columns; OutputError if `out` exists (unless `overwrite`), is an
    input, is being written by another run, or does not fit on the disk.
    """
    refuse_taken(out, overwrite, [], folder=not is_imatrix_name(out))
    with on_device(device), open_model(local(model, progress)) as opened:
        tokens, protocol = text_chunks(opened, text, ctx_tokens, chunks)
        options: dict[str, Any] = {"block": block, "saliency": saliency, "seed": seed, "overwrite": overwrite}
        return calibrate_tokens(opened, tokens, protocol, out, **options, progress=progress)


def calibrate_tokens(
    model: TextModel,
    tokens: Tokens,
    protocol: Protocol,
    out: Path,
    *,
    block: int | None = None,
    saliency: bool = True,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Calibration:
    """Do as `calibrate` for an opened model and `tokens` (`chunks T`); `protocol` says what they are."""
    full = not is_imatrix_name(out)
    run = _Run(model, tokens, protocol, block, seed, moments=full, saliency=full and saliency)
    sources = [*model.source.files, Path(protocol.text)]
    write = run.to_folder if full else run.to_imatrix
    return write(out, overwrite, sources, progress)


class Room(NamedTuple):
    """Bytes on the disk: of the statistics, and at the most in all while they are made."""

    kept: int
    most: int


def room_for(
    model: TextModel, tokens: Tokens, protocol: Protocol, *, block: int | None, saliency: bool, full: bool
) -> Room:
    """Return the bytes that `calibrate_tokens` takes, nearly; of an imatrix unless `full`."""
    run = _Run(model, tokens, protocol, block, 0, moments=full, saliency=full and saliency)
    return Room(run.kept.nbytes, run.expect_bytes)


def calibrate_or_convert(
    model: Path,
    out: Path,
    *,
    text: Path | None = None,
    statistics: Path | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
    **options: Any,
) -> Calibration | Exported:
    """Do as `calibrate` on `text`, or as `export_imatrix` with `statistics`.

    Raises BitsmithError unless exactly one of the two is given, else as they do.
    """
    if text is not None and statistics is None:
        return calibrate(model, text, out, overwrite=overwrite, progress=progress, **options)
    if statistics is not None and text is None:
        return export_imatrix(model, statistics, out, overwrite=overwrite)
    raise BitsmithError("pass either a text to run through the model, or statistics to convert")


class _Run:
    """One calibration: the model, the tokens, and what a resumed run must agree on."""

    def __init__(
        self,
        model: TextModel,
        tokens: Tokens,
        protocol: Protocol,
        block: int | None,
        seed: int,
        *,
        moments: bool,
        saliency: bool,
    ) -> None:
        self.saliency = saliency
        self.model, self.tokens, self.protocol, self.seed = model, tokens, protocol, seed
        self.specs: list[TensorSpec] = [s for s in model.arch.specs() if s.component != "vision"]
        self.kept = Kept(self.specs, tokens, block, seed, moments=moments)
        self.passes = Passes(model, self.specs, seed, saliency=saliency)

    @property
    def key(self) -> dict[str, Any]:
        """All that the results depend on."""
        return content_key(
            self.model.checkpoint,
            {
                "torch version": torch.__version__,
                "text": self.protocol.text_sha256,
                "tokens": hashlib.sha256(self.tokens.tobytes()).hexdigest(),
                "chunks": self.tokens.shape,
                "blocks": self.kept.blocks,
                "seed": self.seed,
                "saliency": self.saliency,
                "steps": self.passes.steps.names,
                **device_facts(),
            },
        )

    @property
    def expect_bytes(self) -> int:
        """What the run needs on the disk, nearly: statistics and states, all layers' in a backward."""
        states = 4 * int(self.tokens.size) * self.passes.forward.hidden_size
        return max(self.kept.nbytes + 4 * states, self.passes.steps.most_states * states)

    def _work(self, out: Path, overwrite: bool) -> Work:
        return Work(self.passes, self.tokens, self.kept, self.key, out, overwrite=overwrite)

    def to_folder(
        self, out: Path, overwrite: bool, sources: Sequence[Path], progress: Progress
    ) -> Calibration:
        """Run, and let the statistics appear as the folder `out`."""
        with atomic_folder(
            out,
            last=MANIFEST_NAME,
            stale=_is_ours,
            overwrite=overwrite,
            expect_bytes=self.expect_bytes,
            sources=sources,
            finish=lambda content: self._seal(out, "statistics", content),
        ) as part:
            with self._work(out, overwrite) as work:
                sites = work.run(progress)
                for name in sorted({entry.file for entry in sites.values()}):
                    link_file(work.folder / name, part / name)
            tokens = write_tokens(part / TOKENS_NAME, *self.kept.split(self.tokens))
            manifest = self._manifest(sites, tokens)
            if weights := work.saliency():
                kept = {site: np.concatenate(self.kept.split(found)) for site, found in weights.items()}
                manifest = replace(manifest, saliency_sha256=write_saliency(part / SALIENCY_NAME, kept))
            write_manifest(part / MANIFEST_NAME, manifest)
        work.remove()
        return self._result(out, sites, work.resumed)

    def to_imatrix(
        self, out: Path, overwrite: bool, sources: Sequence[Path], progress: Progress
    ) -> Calibration:
        """Run, and write E[x²] of all tokens as llama.cpp's imatrix."""
        refuse_taken(out, overwrite, sources, folder=False)
        if not out.parent.is_dir():
            raise OutputError("is not in a folder that exists", path=out)
        refuse_full(out, self.expect_bytes)
        with _named_errors(out), self._work(out, overwrite) as work:
            sites = work.run(progress)
            tokens = write_tokens(work.folder / TOKENS_NAME, *self.kept.split(self.tokens))
            write_manifest(work.folder / MANIFEST_NAME, self._manifest(sites, tokens))
            statistics = open_statistics(work.folder, self.specs)
            write_imatrix(
                out,
                imatrix_of(statistics, self.specs),
                overwrite=overwrite,
                sources=sources,
                finish=lambda content: self._seal(out, "imatrix", content),
            )
        work.remove()
        return self._result(out, sites, work.resumed)

    def _seal(self, out: Path, kind: str, content: Content) -> None:
        """Write the manifest and the record of what is about to appear."""
        chunks, ctx = self.tokens.shape
        options = {
            "text_sha256": self.protocol.text_sha256,
            "ctx_tokens": ctx,
            "chunks": chunks,
            "held_chunks": len(self.kept.held),
            "saliency": self.saliency,
            "seed": self.seed,
            **device_facts(),
        }
        seal(out, kind, content, {"model": source_facts(self.model.source, out)}, **options)

    def _manifest(self, sites: dict[str, SiteEntry], tokens: dict[str, str]) -> Manifest:
        chunks, ctx = self.tokens.shape
        return Manifest(
            bitsmith=__version__,
            model=str(self.model.source.path),
            model_sha256=self.model.checkpoint.source_digest,
            text=self.protocol.text,
            text_sha256=self.protocol.text_sha256,
            ctx_tokens=ctx,
            chunks=chunks,
            held_chunks=len(self.kept.held),
            fit_tokens=(chunks - len(self.kept.held)) * ctx,
            seed=self.seed,
            tied=self.model.arch.tied,
            saliency=self.saliency,
            tokens=tokens,
            sites=sites,
        )

    def _result(self, out: Path, sites: dict[str, SiteEntry], resumed: int) -> Calibration:
        files = out.iterdir() if out.is_dir() else [out]
        manifest = self._manifest(sites, {})
        return Calibration(
            path=out,
            model=manifest.model,
            text=manifest.text,
            text_sha256=manifest.text_sha256,
            ctx_tokens=manifest.ctx_tokens,
            chunks=manifest.chunks,
            held_chunks=manifest.held_chunks,
            fit_tokens=manifest.fit_tokens,
            sites=len(sites),
            size_bytes=sum(file.stat().st_size for file in files),
            resumed_layers=resumed,
        )


@contextmanager
def _named_errors(out: Path) -> Iterator[None]:
    """Turn what the disk says into an error that names the output."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror or error}", path=out) from error


def _is_ours(name: str) -> bool:
    return name in (MANIFEST_NAME, TOKENS_NAME, SALIENCY_NAME) or _OURS.fullmatch(name) is not None
