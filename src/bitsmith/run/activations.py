"""Spectra of residual states, K and V on a text, and whether low rank suits a KV cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bitsmith.formats import FORMATS, Format
from bitsmith.progress import Progress, silent
from bitsmith.run.assay_result import Curve
from bitsmith.run.evaluate import open_model, text_chunks
from bitsmith.run.forward import TextModel, observe

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Site = Literal["residual", "k", "v"]

ERRORS = (0.5, 0.2, 0.1, 0.05, 0.01)
FRACTIONS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
CACHE_FORMATS = ("Q8_0", "Q4_0")
"""What llama.cpp's `--cache-type-k` and `--cache-type-v` offer at 8 and at 4 bits."""

_EXACT_BITS = 16.0  # of a coefficient in a low-rank cache
_LEAST_BITS = 8.5  # Q8_0's, taken for exact: a bound in low rank's favour
_CURVE_POINTS = 200


@dataclass(frozen=True)
class Directions:
    """The principal directions of N vectors of `dim` values.

    `sigma` is √(λ_i / N), the root mean square along direction i, with λ the eigenvalues of Σ x xᵀ
    (`dim dim`, float64). `rank_for_error` maps a relative error √(Σ_{i>r} λ / Σ λ) to the smallest such r;
    `energy_at` a fraction of the directions to their share of Σ λ. `effective_rank` is exp(−Σ p ln p),
    p = σ/Σσ (Roy, Vetterli 2007), `stable_rank` Σ λ / λ₁; both None where all vectors are zero.
    """

    sigma: Curve
    effective_rank: float | None
    stable_rank: float | None
    rank_for_error: tuple[tuple[float, int], ...]
    energy_at: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class CacheRival:
    """Low rank against one quantized format for the entries of a KV cache.

    `error` is the format's measured relative error on these entries (bitsmith's encoder, blocks along the
    head). A low-rank cache keeps r coefficients per token in a fixed basis about a fixed mean; basis and mean
    are not charged, as all tokens share them. `rank_needed` is the smallest r with exact coefficients within
    `error`, `bytes_ratio` its bytes per token with 16-bit coefficients over the format's, `least_bytes_ratio`
    the same if 8.5-bit coefficients (Q8_0) were exact. `equal_bytes_error` is low rank's error in the
    format's bytes with 16-bit coefficients. `low_rank_wins` is None where only exact coefficients of 8.5 bits
    would do: that takes a measurement.
    """

    format: str
    bpw: float
    error: float
    rank_needed: int
    bytes_ratio: float
    least_bytes_ratio: float
    equal_bytes_rank: int
    equal_bytes_error: float
    low_rank_wins: bool | None


@dataclass(frozen=True)
class SiteSpectrum:
    """One place in the forward, and the spectrum of the vectors that pass it.

    `residual` is the state entering `layer`, where the final norm counts as one layer more; `k` is taken
    behind its norm and rotary embedding and `v` as projected: as they enter the KV cache. `head` is None for
    all KV heads together. `plain` is about the origin, `centred` about the mean, which holds `mean_share` of
    the energy Σ x². With fewer tokens than `dim`, the tokens bound every rank. `rivals` is None where there
    is no cache, no energy, or the head does not split into the formats' blocks.
    """

    site: Site
    layer: int
    head: int | None
    dim: int
    tokens: int
    mean_share: float | None
    plain: Directions
    centred: Directions
    rivals: tuple[CacheRival, ...] | None


@dataclass(frozen=True)
class ActivationProtocol:
    """What was run: the text, cut as llama.cpp's perplexity does; all positions of each chunk are counted."""

    text: str
    text_sha256: str
    text_tokens: int
    ctx_tokens: int
    chunks: int
    chunks_available: int
    tokens: int
    dtype: str = "float32"


@dataclass(frozen=True)
class Activations:
    """Every site's spectra with how they were measured, and in words what they say about KV caches."""

    protocol: ActivationProtocol
    sites: tuple[SiteSpectrum, ...]
    verdicts: tuple[str, ...]


def activation_spectra(
    model: Path | TextModel,
    text: Path,
    *,
    ctx_tokens: int = 512,
    chunks: int | None = 8,
    progress: Progress = silent,
) -> Activations:
    """Run a UTF-8 text and return the spectra of the state entering each layer and of each layer's K and V.

    Streams: one layer's weights and the second moments of one layer's sites (8 dim² bytes each) are held
    beside the hidden states. Only full-attention layers have K and V.

    Raises BitsmithError as `open_model` and `text_chunks` do, and for states that are not finite.
    """
    with nullcontext(model) if isinstance(model, TextModel) else open_model(model) as opened:
        tokens, used = text_chunks(opened, text, ctx_tokens, chunks)
        watcher = _Watcher()
        observe(opened, tokens, watcher, progress, "activations")
    sites = watcher.sites()
    protocol = ActivationProtocol(
        text=used.text,
        text_sha256=used.text_sha256,
        text_tokens=used.text_tokens,
        ctx_tokens=used.ctx_tokens,
        chunks=used.chunks,
        chunks_available=used.chunks_available,
        tokens=int(tokens.size),
    )
    return Activations(protocol, sites, _verdicts(sites))


class _Moments:
    """Sum and second moment (`dim dim`) of vectors that come in parts, in float64."""

    def __init__(self, dim: int) -> None:
        self.tokens = 0
        self.total: Float64 = np.zeros(dim)
        self.square: Float64 = np.zeros((dim, dim))

    def add(self, vectors: Float32) -> None:
        """Take `N dim` vectors."""
        wide = vectors.astype(np.float64)
        self.tokens += len(wide)
        self.total += wide.sum(axis=0)
        self.square += wide.T @ wide

    def spectra(self, part: slice = slice(None)) -> tuple[float | None, Float64, Float64]:
        """Return the mean's share of the energy and the λ, plain and centred, descending, of some axes."""
        square, mean = self.square[part, part], self.total[part] / self.tokens
        energy = float(np.trace(square))
        centred = square - self.tokens * np.outer(mean, mean)
        share = float(self.tokens * (mean @ mean)) / energy if energy else None
        return share, _eigenvalues(square), _eigenvalues(centred)


def _eigenvalues(square: Float64) -> Float64:
    found: Float64 = np.maximum(np.linalg.eigvalsh(square)[::-1], 0.0)
    return found


class _Cached:
    """Moments of one layer's K or V, and the squared errors of the cache formats by head."""

    def __init__(self, site: Site, layer: int, heads: int, head_dim: int) -> None:
        self.site, self.layer, self.heads, self.head_dim = site, layer, heads, head_dim
        self.moments = _Moments(heads * head_dim)
        formats = [FORMATS[name] for name in CACHE_FORMATS]
        self.errors = {form: np.zeros(heads) for form in formats if form.fits(head_dim)}

    def add(self, entries: Float32) -> None:
        """Take entries (`B heads T head_dim`)."""
        rows = np.ascontiguousarray(entries.transpose(0, 2, 1, 3)).reshape(-1, self.head_dim)
        self.moments.add(rows.reshape(-1, self.heads * self.head_dim))
        for form in self.errors:
            wrong = (rows - form.decode(form.encode(rows))).astype(np.float64)
            self.errors[form] += (wrong * wrong).sum(axis=1).reshape(-1, self.heads).sum(axis=0)

    def sites(self) -> Iterator[SiteSpectrum]:
        """Return all heads together, then each by itself; a head's moments are a block of the whole's."""
        yield self._site(None, slice(None), list(range(self.heads)))
        if self.heads > 1:
            for head in range(self.heads):
                part = slice(head * self.head_dim, (head + 1) * self.head_dim)
                yield self._site(head, part, [head])

    def _site(self, head: int | None, part: slice, heads: list[int]) -> SiteSpectrum:
        mean_share, plain, centred = self.moments.spectra(part)
        energy = plain.sum()
        rivals = [
            _rival(form, float(np.sqrt(errors[heads].sum() / energy)), centred, energy)
            for form, errors in self.errors.items()
            if energy
        ]
        return _site(
            self.site,
            self.layer,
            head,
            self.moments.tokens,
            (mean_share, plain, centred),
            tuple(rivals) or None,
        )


class _Watcher:
    """Gathers one layer's moments at a time and turns them into spectra when the next layer begins."""

    def __init__(self) -> None:
        self._sites: list[SiteSpectrum] = []
        self._layer = 0
        self._residual: _Moments | None = None
        self._cached: dict[Site, _Cached] = {}

    def entering(self, layer: int, states: Float32) -> None:
        if self._residual is None or self._layer != layer:
            self._finish_layer()
            self._layer, self._residual = layer, _Moments(states.shape[-1])
        self._residual.add(states.reshape(-1, states.shape[-1]))

    def cached(self, layer: int, keys: Float32, values: Float32) -> None:
        both: tuple[tuple[Site, Float32], ...] = (("k", keys), ("v", values))
        for site, entries in both:
            if site not in self._cached:
                self._cached[site] = _Cached(site, layer, entries.shape[1], entries.shape[3])
            self._cached[site].add(entries)

    def sites(self) -> tuple[SiteSpectrum, ...]:
        """Return what was seen, in the order of the layers."""
        self._finish_layer()
        return tuple(self._sites)

    def _finish_layer(self) -> None:
        if self._residual is not None:
            tokens, spectra = self._residual.tokens, self._residual.spectra()
            self._sites.append(_site("residual", self._layer, None, tokens, spectra, None))
            self._residual = None
        for cached in self._cached.values():
            self._sites.extend(cached.sites())
        self._cached.clear()


def _site(
    site: Site,
    layer: int,
    head: int | None,
    tokens: int,
    spectra: tuple[float | None, Float64, Float64],
    rivals: tuple[CacheRival, ...] | None,
) -> SiteSpectrum:
    mean_share, plain, centred = spectra
    return SiteSpectrum(
        site=site,
        layer=layer,
        head=head,
        dim=len(plain),
        tokens=tokens,
        mean_share=mean_share,
        plain=_directions(plain, tokens),
        centred=_directions(centred, tokens),
        rivals=rivals,
    )


def _directions(lambdas: Float64, tokens: int) -> Directions:
    sigma, energy = np.sqrt(lambdas), lambdas.sum()
    at = np.unique(np.geomspace(1, len(sigma), min(_CURVE_POINTS, len(sigma))).round().astype(int))
    curve = Curve(tuple(at.tolist()), tuple((sigma[at - 1] / np.sqrt(tokens)).tolist()))
    if not energy:
        return Directions(curve, None, None, tuple((error, 0) for error in ERRORS), ())
    share = sigma[sigma > 0] / sigma.sum()
    kept = np.cumsum(lambdas) / energy
    return Directions(
        sigma=curve,
        effective_rank=float(np.exp(-(share * np.log(share)).sum())),
        stable_rank=float(energy / lambdas[0]),
        rank_for_error=tuple((error, _rank_needed(lambdas, error, energy)) for error in ERRORS),
        energy_at=tuple((f, float(kept[max(1, round(f * len(kept))) - 1])) for f in FRACTIONS),
    )


def _tails(lambdas: Float64, energy: float) -> Float64:
    """Return relative errors for ranks 0 … n (`n+1`), descending; `energy` is what they are relative to."""
    tails = np.append(np.cumsum(lambdas[::-1])[::-1], 0.0)
    result: Float64 = np.sqrt(tails / energy)
    return result


def _rank_needed(lambdas: Float64, error: float, energy: float) -> int:
    return int(np.argmax(_tails(lambdas, energy) <= error))


def _rival(form: Format, error: float, centred: Float64, energy: float) -> CacheRival:
    dim = len(centred)
    rank = _rank_needed(centred, error, energy)
    ratio, least = (bits * rank / (form.bpw * dim) for bits in (_EXACT_BITS, _LEAST_BITS))
    equal = int(form.bpw * dim / _EXACT_BITS)
    return CacheRival(
        format=form.name,
        bpw=form.bpw,
        error=error,
        rank_needed=rank,
        bytes_ratio=ratio,
        least_bytes_ratio=least,
        equal_bytes_rank=equal,
        equal_bytes_error=float(_tails(centred, energy)[equal]),
        low_rank_wins=True if ratio < 1 else False if least >= 1 else None,
    )


def _verdicts(sites: tuple[SiteSpectrum, ...]) -> tuple[str, ...]:
    """Say for K and V and each format how low rank compares, all heads of a layer together."""
    return tuple(
        _verdict(site, name, found)
        for site in ("k", "v")
        for name in CACHE_FORMATS
        if (found := _rivals(sites, site, name))
    )


def _rivals(sites: tuple[SiteSpectrum, ...], site: str, name: str) -> list[tuple[int, CacheRival]]:
    whole = [s for s in sites if s.site == site and s.head is None]
    return [(s.dim, rival) for s in whole for rival in s.rivals or () if rival.format == name]


def _verdict(site: str, name: str, found: list[tuple[int, CacheRival]]) -> str:
    wins = sum(rival.low_rank_wins is True for _, rival in found)
    unsettled = sum(rival.low_rank_wins is None for _, rival in found)
    dim, hardest = max(found, key=lambda pair: pair[1].bytes_ratio)
    lowest = min(rival.bytes_ratio for _, rival in found)
    ratios = f"{hardest.bytes_ratio:.2f}"
    if f"{lowest:.2f}" != ratios:
        ratios = f"{lowest:.2f} to {ratios}"
    settled = f", {unsettled} unsettled" if unsettled else ""
    return (
        f"{site.upper()} cache: low rank beats {name} in {wins} of {len(found)} layers{settled}; at {name}'s "
        f"error it takes {ratios} times the bytes "
        f"(rank {hardest.rank_needed} of {dim} for {hardest.error:.4f} where it takes most)"
    )
