"""Calibrate: run a text through a model and keep what every matrix sees, layer by layer, resumably."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from bitsmith import __version__
from bitsmith.archs import TensorSpec
from bitsmith.errors import BitsmithError, OutputError
from bitsmith.formats.accelerator import device_facts
from bitsmith.log import event
from bitsmith.numerics.threads import one_blas_thread
from bitsmith.progress import Progress, silent
from bitsmith.run.device import on_device
from bitsmith.run.evaluate import open_model, text_chunks
from bitsmith.run.evaluation import Protocol
from bitsmith.run.forward import TextModel, Tokens
from bitsmith.run.moments import Exported, export_imatrix
from bitsmith.run.record import seal, source_facts
from bitsmith.run.saliency import Saliency, token_saliency
from bitsmith.run.site_sums import SiteSums
from bitsmith.run.sites import SiteForward, States
from bitsmith.store.atomic import Content, atomic_folder, link_file, refuse_full, refuse_taken, sync_path
from bitsmith.store.hub import local
from bitsmith.store.imatrix import is_imatrix_name, write_imatrix
from bitsmith.store.journal import Journal, content_key, key_digest, remove_work
from bitsmith.store.statistics import (
    SiteStatistics,
    imatrix_of,
    open_statistics,
    site_widths,
    write_saliency,
    write_sites,
    write_tokens,
)
from bitsmith.store.statistics_manifest import (
    MANIFEST_NAME,
    SALIENCY_NAME,
    TOKENS_NAME,
    Manifest,
    SiteEntry,
    entries_from_json,
    write_manifest,
)

HELD_EVERY = 8
"""Every so many chunks one is held out; of two to seven chunks the last."""
HELD_ROWS = 2048
WIDEST_BLOCK = 4096
_BLOCK_MULTIPLE = 256
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
    (see `token_saliency`), which takes a backward pass, about four times the forward. Where `out` ends in
    `.gguf` or `.dat` it gets llama.cpp's imatrix instead: E[x²] over all chunks.

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
    return Room(run.kept_bytes, run.expect_bytes)


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


def held_out(chunks: int) -> list[int]:
    """Return which of `chunks` are held out: every eighth, at least one of two."""
    return list(range(HELD_EVERY - 1, chunks, HELD_EVERY)) or list(range(1, chunks))[-1:]


def block_columns(columns: int, block: int | None) -> int:
    """Return the size of the diagonal blocks kept of `columns` × `columns` second moments.

    Raises BitsmithError for a `block` that does not divide `columns`.
    """
    if block is not None:
        if block < 1 or (columns > block and columns % block):
            raise BitsmithError(f"blocks of {block} do not divide {columns} columns")
        return min(block, columns)
    if columns <= WIDEST_BLOCK:
        return columns
    divisors = [size for size in range(1, WIDEST_BLOCK + 1) if columns % size == 0]
    return max(divisors, key=lambda size: (size % _BLOCK_MULTIPLE == 0, size))


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
        self.forward = SiteForward(model, self.specs)
        self.blocks = {
            site: block_columns(width, block) if moments else 0
            for site, width in site_widths(self.specs).items()
        }
        self.held = held_out(len(tokens))
        self.sample = _sample(self.held, tokens.shape[1], seed)

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
                "blocks": self.blocks,
                "seed": self.seed,
                "saliency": self.saliency,
                **device_facts(),
            },
        )

    @property
    def states_bytes(self) -> int:
        """Bytes of the hidden states of all tokens."""
        return 4 * int(self.tokens.size) * self.forward.hidden_size

    @property
    def kept_bytes(self) -> int:
        """Bytes of the statistics, nearly."""
        held = min(HELD_ROWS, len(self.held) * self.tokens.shape[1])
        return sum(
            4 * width * (self.blocks[site] + held + 3) for site, width in site_widths(self.specs).items()
        )

    @property
    def expect_bytes(self) -> int:
        """What the run needs on the disk, nearly: statistics and states, all layers' in a backward."""
        backward = (self.forward.n_layers + 2) * self.states_bytes if self.saliency else 0
        return max(self.kept_bytes + (2 + bool(self.forward.mtp_layers)) * self.states_bytes, backward)

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
            with _Work(self, out, overwrite) as work:
                sites = work.run(progress)
                for name in sorted({entry.file for entry in sites.values()}):
                    link_file(work.folder / name, part / name)
            tokens = write_tokens(part / TOKENS_NAME, *self._split(self.tokens))
            manifest = self._manifest(sites, tokens)
            if work.saliency:
                kept = {site: np.concatenate(self._split(found)) for site, found in work.saliency.items()}
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
        with _named_errors(out), _Work(self, out, overwrite) as work:
            sites = work.run(progress)
            tokens = write_tokens(work.folder / TOKENS_NAME, *self._split(self.tokens))
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
            "held_chunks": len(self.held),
            "saliency": self.saliency,
            "seed": self.seed,
            **device_facts(),
        }
        seal(out, kind, content, {"model": source_facts(self.model.source, out)}, **options)

    def _split(self, chunks: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        fit = np.setdiff1d(np.arange(len(chunks)), self.held)
        return chunks[fit], chunks[self.held]

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
            held_chunks=len(self.held),
            fit_tokens=(chunks - len(self.held)) * ctx,
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


class _Work:
    """The folder of a run under way: a journal, the states before the next step, and finished layers."""

    def __init__(self, run: _Run, out: Path, overwrite: bool) -> None:
        self._run, self._overwrite = run, overwrite
        self.folder = out.absolute().with_name(f".{out.name}.calibration")
        self.resumed = 0

    def __enter__(self) -> Self:
        self.folder.mkdir(exist_ok=True)
        self._journal = Journal(self.folder / "journal", self._run.key, overwrite=self._overwrite)
        entries = self._journal.entries
        kept = {value["file"] for value in entries.values()} | {self._states(len(entries) - 1).path.name}
        kept.add(self._saliency_file.name)
        for path in self.folder.iterdir():
            if path != self._journal.path and path.name not in kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._journal.__exit__(kind, error, trace)

    def remove(self) -> None:
        """Delete the folder: the run it served is whole."""
        remove_work(self.folder)

    def run(self, progress: Progress) -> dict[str, SiteEntry]:
        """Do all steps that are not in the journal; return the manifest's entries of all sites."""
        forward, entries = self._run.forward, self._journal.entries
        names = ["embed", *(f"layers.{n}" for n in range(forward.n_layers)), "head"]
        names += ["mtp"] if forward.mtp_layers else []
        self._weigh(progress)
        self.resumed = max(0, min(len(entries) - 1, forward.n_layers))
        per_step = self._run.tokens.size
        done, total = max(0, len(entries) - 1) * per_step, (len(names) - 1) * per_step
        for number, name in enumerate(names):
            if name in entries:
                continue
            event("calibrate", step=name)
            for chunks in self._step(number, name):
                done += chunks * self._run.tokens.shape[1]
                progress("calibrate", done, total)
        sites: dict[str, SiteEntry] = {}
        for value in entries.values():
            sites |= entries_from_json(value["sites"])
        return sites

    @property
    def _saliency_file(self) -> Path:
        return self.folder / f"saliency-{key_digest(self._run.key)[:16]}.safetensors"

    def _weigh(self, progress: Progress) -> None:
        """Find the tokens' weights, or read what a killed run found."""
        self.saliency: Saliency = {}
        if not self._run.saliency:
            return
        run, path = self._run, self._saliency_file
        if not path.exists():
            found = token_saliency(
                run.model, run.specs, run.tokens, self.folder / "backward", seed=run.seed, progress=progress
            )
            part = path.with_suffix(".part")
            save_file({site: np.ascontiguousarray(weights) for site, weights in found.items()}, part)
            sync_path(part)
            part.replace(path)
        self.saliency = load_file(path)

    def _states(self, number: int) -> States:
        return States(self.folder / f"states.{number}", self._shape())

    def _shape(self, fewer: int = 0) -> tuple[int, int, int]:
        chunks, ctx = self._run.tokens.shape
        return chunks, ctx - fewer, self._run.forward.hidden_size

    def _step(self, number: int, name: str) -> Iterator[int]:
        """Do one step from the states of the one before; keep its sites and states, then drop the old."""
        run, source, target = self._run, self._states(number - 1), self._states(number)
        if name == "mtp":
            target = States(target.path, self._shape(fewer=1))
        target.create()
        sites = [site for site in run.blocks if site.startswith(f"{name}.")]
        gather = _Gather(run, sites, self.saliency)
        if name == "embed":
            run.forward.embed(run.tokens, target)
        elif name == "head":
            yield from run.forward.head(source, target, gather.take)
        elif name == "mtp":
            yield from run.forward.mtp(run.tokens, source, target, gather.take)
        else:
            yield from run.forward.layer(int(name.split(".")[1]), source, target, gather.take)
        target.sync()
        file = self.folder / f"{name}.safetensors"
        entries = write_sites(file, gather.results()) if sites else {}
        if sites:
            sync_path(file)
        sync_path(self.folder)
        kept = {site: asdict(entry) for site, entry in entries.items()}
        self._journal.add(name, {"file": file.name, "sites": kept})
        source.path.unlink(missing_ok=True)


class _Gather:
    """Sums over the tokens of one step's sites."""

    def __init__(self, run: _Run, sites: Sequence[str], saliency: Saliency) -> None:
        self._run = run
        device = run.forward.network.device
        self._saliency = {site: torch.from_numpy(found).to(device) for site, found in saliency.items()}
        widths = site_widths(run.specs)
        self._sums = {site: SiteSums(widths[site], run.blocks[site], device) for site in sites}
        self._is_held = np.zeros(len(run.tokens), bool)
        self._is_held[run.held] = True

    def take(self, site: str, first: int, inputs: torch.Tensor) -> None:
        """Add `inputs` (`B T in`) of the chunks from `first` on."""
        sums = self._sums[site]
        held = self._is_held[first : first + len(inputs)]
        weights = self._saliency.get(site)
        weights = None if weights is None else weights[first : first + len(inputs)]
        fit = torch.from_numpy(~held).to(inputs.device)
        sums.fit(inputs[fit].flatten(0, 1), None if weights is None else weights[fit].flatten())
        for chunk in np.flatnonzero(held):
            positions = self._run.sample.get(first + int(chunk), np.empty(0, np.int64))
            positions = positions[positions < inputs.shape[1]]
            sums.hold(inputs[chunk], positions, None if weights is None else weights[chunk])

    def results(self) -> Iterator[SiteStatistics]:
        """Yield what was gathered, site by site.

        Raises BitsmithError for a site that was not reached, or whose squares leave float32.
        """
        for site in list(self._sums):
            found = self._sums.pop(site).result(site)
            parts = (found.diagonal, found.moment, found.held_diagonal)
            if not all(part is None or np.isfinite(part).all() for part in parts):
                raise BitsmithError(
                    f"what enters {site} is not finite, or its squares are beyond float32",
                    path=self._run.model.checkpoint.path,
                )
            yield found


@contextmanager
def _named_errors(out: Path) -> Iterator[None]:
    """Turn what the disk says into an error that names the output."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror or error}", path=out) from error


def _sample(held: Sequence[int], ctx: int, seed: int) -> dict[int, NDArray[np.int64]]:
    """Draw up to 2048 positions of the held-out chunks; return those of each chunk in their order."""
    total = len(held) * ctx
    drawn = np.random.default_rng(seed).permutation(total)[:HELD_ROWS]
    return {chunk: np.sort(drawn[drawn // ctx == n] % ctx) for n, chunk in enumerate(held)}


def _is_ours(name: str) -> bool:
    return name in (MANIFEST_NAME, TOKENS_NAME, SALIENCY_NAME) or _OURS.fullmatch(name) is not None
