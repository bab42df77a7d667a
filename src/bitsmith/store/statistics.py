"""What a model's matrices see on a text, site by site: kept in a folder, or read from llama.cpp's imatrix.

A folder holds `statistics.json`, written last, `tokens.safetensors` with the token ids, where they were
weighed `saliency.safetensors` with their weights, and one safetensors file for each layer, whose tensors are
`SITE.diagonal`, `SITE.mean`, `SITE.moment`, `SITE.held` and `SITE.held_diagonal`, columns in Hugging Face
order.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bitsmith.errors import BitsmithError, DamagedFileError, printable
from bitsmith.log import warn
from bitsmith.store.checkpoint import Checkpoint, TensorRef
from bitsmith.store.imatrix import Imatrix, read_imatrix
from bitsmith.store.safetensors import open_safetensors
from bitsmith.store.safetensors_writer import TensorData, write_safetensors_file
from bitsmith.store.site_statistics import SiteSpec, SiteStatistics, dense_moment
from bitsmith.store.statistics_manifest import (
    MANIFEST_NAME,
    SALIENCY_NAME,
    TOKENS_NAME,
    SiteEntry,
    parse_manifest,
)

__all__ = [
    "HEAD_SITE",
    "SiteSpec",
    "SiteStatistics",
    "Statistics",
    "dense_moment",
    "head_site_for",
    "imatrix_of",
    "is_tied",
    "open_statistics",
    "site_widths",
    "write_saliency",
    "write_sites",
    "write_tokens",
]

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

HEAD_SITE = "head.in"
_KINDS = ("diagonal", "mean", "moment", "held", "held_diagonal")


class Statistics:
    """Statistics of a model's activation sites, looked up tensor by tensor; one site is in memory at a time.

    Protocol fields are None where an imatrix does not say. `digest` is the SHA-256 of the manifest, which
    covers every tensor, or of the imatrix file. `notes` say in words what could not be used.
    """

    path: Path
    digest: str
    model: str | None = None
    model_sha256: str | None = None
    text: str | None = None
    text_sha256: str | None = None
    ctx_tokens: int | None = None
    chunks: int | None = None
    held_chunks: int | None = None
    fit_tokens: int | None = None
    notes: tuple[str, ...] = ()

    def __init__(self, path: Path, specs: Iterable[SiteSpec], partial: bool) -> None:
        self.path = path
        self._specs = list(specs)
        self._tied = is_tied(self._specs) and not partial
        self._kept: SiteStatistics | None = None
        self._lock = threading.Lock()

    def of(self, spec: SiteSpec) -> SiteStatistics | None:
        """Return what `spec`'s inputs are like, in the order of its GGUF columns; None if that is unknown.

        Raises DamagedFileError naming the tensor if what is stored is not what was written.
        """
        found = self.hugging_face(spec)
        return None if found is None else found.moved(spec.column_steps)

    def look_up(self, specs: Iterable[SiteSpec]) -> None:
        """Answer for `specs` from now on: the model with a head of its own, or without its MTP layers."""
        self._specs = list(specs)
        self._tied = is_tied(self._specs)

    def knows(self, spec: SiteSpec) -> bool:
        """Tell whether `of` has an answer for `spec`, reading nothing."""
        raise NotImplementedError

    def hugging_face(self, spec: SiteSpec) -> SiteStatistics | None:
        """Return what `of` does in the order of the Hugging Face columns."""
        site = self._site(spec)
        if site is None:
            return None
        with self._lock:
            if self._kept is None or self._kept.site != site:
                self._kept = None  # before the next is read: one at a time
                self._kept = self._load(site)
            return self._kept

    def tokens(self) -> tuple[Int64, Int64] | None:
        """Return the token ids of the fit and of the held-out chunks (`chunks ctx` each); None if unknown."""
        return None

    def saliency(self, site: str) -> Float32 | None:
        """Return the weight of each token at `site` (`chunks ctx`), the fit chunks first, as in `tokens`.

        None where tokens were not weighed, or their weights not kept.
        """
        del site
        return None

    def place(self, spec: SiteSpec) -> int:
        """Return where in the order of encoding `spec` stands; tensors of one place keep the file's order."""
        del spec
        return 0

    def encoded(self, spec: SiteSpec, ref: TensorRef) -> None:
        """Take note of `spec`'s tensor as the output holds it (GGUF layout); see `run.sequential`."""

    def _site(self, spec: SiteSpec) -> str | None:
        return head_site_for(spec) if self._tied else spec.site

    def _load(self, site: str) -> SiteStatistics | None:
        raise NotImplementedError


def open_statistics(path: Path, specs: Iterable[SiteSpec], *, partial: bool = False) -> Statistics:
    """Open what `calibrate` wrote, or llama.cpp's imatrix (GGUF or legacy .dat), for the model of `specs`.

    Headers, shapes and sites are checked here, a tensor's bytes against their SHA-256 when it is read. With
    `partial`, `specs` are some of the model's, and sites of others are passed over. An entry of an imatrix
    that cannot be used (see `Imatrix.left_out`, or one for another number of columns than its matrix has) is
    left out, and its tensor is rounded as without statistics: `notes` name each, a warning tells so once.

    Raises BitsmithError naming file and tensor for a site that the model does not have, one of another width,
    and where nothing is held of any; DamagedFileError for a damaged or incomplete file.
    """
    path = Path(path)
    if not path.exists():
        raise BitsmithError("does not exist", path=path)
    opened = _FolderStatistics if path.is_dir() else _ImatrixStatistics
    return opened(path, specs, partial)


def is_tied(specs: Iterable[SiteSpec]) -> bool:
    """Tell whether a whole model's tensors leave the output head to the token embedding."""
    return all(spec.site != HEAD_SITE for spec in specs)


def head_site_for(spec: SiteSpec) -> str | None:
    """Return the site of a tensor of a model with tied embeddings: the embedding reads the head's."""
    return HEAD_SITE if spec.role == "embed" else spec.site


def site_widths(specs: Iterable[SiteSpec], tied: bool | None = None) -> dict[str, int]:
    """Return the columns of every activation site; `tied` embeddings read the head's (None: look)."""
    listed = list(specs)
    tied = is_tied(listed) if tied is None else tied
    sites = ((head_site_for(spec) if tied else spec.site, spec.shape[-1]) for spec in listed)
    return {site: width for site, width in sites if site is not None}


def write_sites(path: Path, sites: Iterable[SiteStatistics]) -> dict[str, SiteEntry]:
    """Write one layer's sites to a safetensors file, not atomically, and return their manifest entries."""
    tensors, entries = [], {}
    for found in sites:
        arrays = {kind: array for kind in _KINDS if (array := getattr(found, kind)) is not None}
        tensors += [_tensor_data(f"{found.site}.{kind}", array) for kind, array in arrays.items()]
        entries[found.site] = SiteEntry(
            path.name,
            len(found.diagonal),
            found.tokens,
            found.held_tokens,
            {kind: _sha256(array) for kind, array in arrays.items()},
        )
    write_safetensors_file(path, tensors)
    return entries


def write_tokens(path: Path, fit: Int64, held: Int64) -> dict[str, str]:
    """Write the token ids of both splits (`chunks ctx`), not atomically; return the SHA-256 of each."""
    splits = {"fit": fit, "held": held}
    write_safetensors_file(path, [_tensor_data(name, ids) for name, ids in splits.items()])
    return {name: _sha256(ids) for name, ids in splits.items()}


def write_saliency(path: Path, weights: Mapping[str, Float32]) -> dict[str, str]:
    """Write tokens' weights by site (`chunks ctx`, fit chunks first), not atomically; return the SHA-256s."""
    write_safetensors_file(path, [_tensor_data(site, array) for site, array in weights.items()])
    return {site: _sha256(array) for site, array in weights.items()}


class _FolderStatistics(Statistics):
    """A folder that `calibrate` wrote."""

    def __init__(self, path: Path, specs: Iterable[SiteSpec], partial: bool) -> None:
        super().__init__(path, specs, partial)
        manifest_path = path / MANIFEST_NAME
        if not manifest_path.is_file():
            raise BitsmithError(f"holds no {MANIFEST_NAME}: no finished calibration", path=path)
        raw = manifest_path.read_bytes()
        self.digest = hashlib.sha256(raw).hexdigest()
        self._manifest = parse_manifest(raw, manifest_path)
        self._tied = self._manifest.tied if partial else self._tied
        for name in (
            "model",
            "model_sha256",
            "text",
            "text_sha256",
            "ctx_tokens",
            "chunks",
            "held_chunks",
            "fit_tokens",
        ):
            setattr(self, name, getattr(self._manifest, name))
        self._files: dict[str, Checkpoint] = {
            name: open_safetensors(path / name) for name in self._file_names()
        }
        self._check_sites(partial)
        self._check_tokens()

    def _file_names(self) -> list[str]:
        names = {entry.file for entry in self._manifest.sites.values()} | {TOKENS_NAME}
        names |= {SALIENCY_NAME} if self._manifest.saliency_sha256 else set()
        for name in names:
            if Path(name).name != name or not (self.path / name).is_file():
                raise DamagedFileError(f"lacks its file {printable(name)}", path=self.path)
        return sorted(names)

    def _check_sites(self, partial: bool) -> None:
        widths = site_widths(self._specs, self._tied)
        expected: dict[str, set[str]] = {name: set() for name in self._files}
        for site, entry in self._manifest.sites.items():
            if site not in widths:
                if not partial:
                    raise BitsmithError("is no site of this model", path=self.path, tensor=site)
            elif entry.columns != widths[site]:
                raise BitsmithError(
                    f"has {entry.columns} columns, this model's has {widths[site]}",
                    path=self.path / entry.file,
                    tensor=site,
                )
            _check_tensors(self._files[entry.file], site, entry)
            expected[entry.file] |= {f"{site}.{kind}" for kind in entry.tensors}
        if not any(site in widths for site in self._manifest.sites):
            raise BitsmithError("holds no statistics of this model's matrices", path=self.path)
        for name, wanted in expected.items():
            if name not in (TOKENS_NAME, SALIENCY_NAME) and (
                extra := sorted(set(self._files[name]) - wanted)
            ):
                raise DamagedFileError("is not in the manifest", path=self.path / name, tensor=extra[0])

    def _check_tokens(self) -> None:
        file, manifest = self._files[TOKENS_NAME], self._manifest
        chunks = {"fit": manifest.chunks - manifest.held_chunks, "held": manifest.held_chunks}
        for name, count in chunks.items():
            shape = (count, manifest.ctx_tokens)
            if name not in file or file[name].shape != shape or name not in manifest.tokens:
                raise DamagedFileError(f"is not there as {shape}", path=file.path, tensor=name)
        shape = manifest.chunks, manifest.ctx_tokens
        for site in manifest.saliency_sha256:
            file = self._files[SALIENCY_NAME]
            if site not in file or file[site].shape != shape or file[site].dtype != "F32":
                raise DamagedFileError(f"is not there as F32 {shape}", path=file.path, tensor=site)

    def saliency(self, site: str) -> Float32 | None:
        """Return the weight of each token at `site`."""
        expected = self._manifest.saliency_sha256.get(site)
        return None if expected is None else _verified(self._files[SALIENCY_NAME], site, expected)

    def tokens(self) -> tuple[Int64, Int64] | None:
        """Return the token ids of both splits."""
        fit, held = (
            _verified(self._files[TOKENS_NAME], name, self._manifest.tokens[name]) for name in ("fit", "held")
        )
        return fit.astype(np.int64), held.astype(np.int64)

    def knows(self, spec: SiteSpec) -> bool:
        """Tell whether the manifest has `spec`'s site."""
        return self._site(spec) in self._manifest.sites

    def _load(self, site: str) -> SiteStatistics | None:
        entry = self._manifest.sites.get(site)
        if entry is None:
            return None
        file = self._files[entry.file]
        arrays = {
            kind: _verified(file, f"{site}.{kind}", expected) for kind, expected in entry.tensors.items()
        }
        return SiteStatistics(site, entry.tokens, held_tokens=entry.held_tokens, **arrays)


class _ImatrixStatistics(Statistics):
    """llama.cpp's imatrix, GGUF or legacy: E[x²] by GGUF tensor name."""

    def __init__(self, path: Path, specs: Iterable[SiteSpec], partial: bool) -> None:
        super().__init__(path, specs, partial)
        self._imatrix = read_imatrix(path)
        self.digest = self._imatrix.sha256
        self.text = ", ".join(self._imatrix.datasets) or None
        self.ctx_tokens, self.chunks = self._imatrix.chunk_tokens, self._imatrix.chunks
        self._entries = self._checked(partial)
        _warn(path, self.digest, self.notes)

    def _checked(self, partial: bool) -> dict[str, tuple[Float32, float]]:
        """Return the entries that fit the model; refuse those of no matrix of it, note what is left out."""
        known = {spec.gguf_name: spec for spec in self._specs if len(spec.shape) > 1}
        left_out = dict(self._imatrix.left_out)
        for name, (sums, _) in self._imatrix.entries.items():
            if name not in known:
                if not partial:
                    raise BitsmithError("is no matrix of this model", path=self.path, tensor=name)
            elif sums.size != known[name].shape[-1]:
                left_out[name] = f"holds {sums.size} sums, expected {known[name].shape[-1]}"
        self.notes = tuple(
            f"{printable(name)}: {why}; left out, so it is rounded as without statistics"
            for name, why in left_out.items()
        )
        entries = {name: entry for name, entry in self._imatrix.entries.items() if name not in left_out}
        if not known.keys() & entries.keys():
            for name, why in left_out.items():
                raise BitsmithError(f"{why}; no entry of the file is of use", path=self.path, tensor=name)
            raise BitsmithError("holds no statistics of this model's matrices", path=self.path)
        return entries

    def knows(self, spec: SiteSpec) -> bool:
        """Tell whether the imatrix has an entry of `spec`'s GGUF name."""
        return spec.gguf_name in self._entries

    def hugging_face(self, spec: SiteSpec) -> SiteStatistics | None:
        """Return E[x²] of the entry of `spec`'s GGUF name."""
        if not self.knows(spec):
            return None
        sums, count = self._entries[str(spec.gguf_name)]
        mean = spec.importance_from_gguf((sums.astype(np.float64) / count).astype(np.float32))
        return SiteStatistics(self._site(spec) or str(spec.gguf_name), int(count), mean)


@lru_cache(maxsize=256)
def _warn(path: Path, digest: str, notes: tuple[str, ...]) -> None:
    """Warn of what a file's entries lack: once, however often a run opens it."""
    del digest  # another content under the same name is told of again
    for note in notes:
        warn(f"{path}: {note}")


def imatrix_of(statistics: Statistics, specs: Iterable[SiteSpec]) -> Imatrix:
    """Return llama.cpp's imatrix of every matrix in a GGUF, over fit and held-out tokens together.

    Columns are in GGUF order. A tied head counts as `token_embd.weight`, which llama-quantize looks up.
    """
    entries: dict[str, tuple[Float32, float]] = {}
    for spec in specs:
        if spec.gguf_name is None or (found := statistics.of(spec)) is None:
            continue
        mean, count = found.all_tokens()
        sums = np.minimum(mean.astype(np.float64) * count, np.finfo(np.float32).max)
        entries[spec.gguf_name] = sums.astype(np.float32), float(count)
    if not entries:
        raise BitsmithError("holds no statistics of this model's matrices", path=statistics.path)
    return Imatrix(
        entries,
        (statistics.text,) if statistics.text else (),
        statistics.chunks or 0,
        statistics.ctx_tokens or 0,
    )


def _tensor_data(name: str, array: NDArray[np.float32] | Int64) -> TensorData:
    dtype = "I64" if array.dtype == np.int64 else "F32"
    return TensorData(name, dtype, array.shape, [np.ascontiguousarray(array)])


def _sha256(array: NDArray[np.float32] | Int64) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


def _check_tensors(file: Checkpoint, site: str, entry: SiteEntry) -> None:
    """Refuse tensors that are missing, of another type, or whose shapes do not fit the site's columns."""
    if "diagonal" not in entry.tensors or not set(entry.tensors) <= set(_KINDS) or entry.tokens < 1:
        raise DamagedFileError("has an unsound manifest entry", path=file.path, tensor=site)
    for kind in entry.tensors:
        name = f"{site}.{kind}"
        if name not in file:
            raise DamagedFileError("is missing", path=file.path, tensor=name)
        shape, wide = file[name].shape, entry.columns
        if kind == "moment":
            sound = shape == (wide, wide) or (
                len(shape) == 3 and shape[1] == shape[2] and shape[0] * shape[1] == wide
            )
        else:
            sound = shape == (wide,) if kind != "held" else len(shape) == 2 and shape[1] == wide
        if not sound or file[name].dtype != "F32":
            raise DamagedFileError(
                f"is {file[name].dtype} {shape}, expected F32 over {wide} columns",
                path=file.path,
                tensor=name,
            )


def _verified(file: Checkpoint, name: str, expected: str) -> NDArray[np.float32]:
    ref = file[name]
    raw = ref.raw()
    if hashlib.sha256(raw.data).hexdigest() != expected:
        raise DamagedFileError("is damaged: its SHA-256 is not the manifest's", path=file.path, tensor=name)
    bits: Mapping[str, str] = {"F32": "<f4", "I64": "<i8"}
    return raw.view(bits[ref.dtype]).reshape(ref.shape)
