"""Correct a GGUF's norms in closed form: least squares on the compressed stream, no gradients, no bytes.

For files whose norms do not suit their matrices. On the bundled model in Q2_K it finds gains that lower the
held-out squared errors of the matrices' outputs, of the head's by 13 %, and that all raise the KLD: least
squares shrinks outputs that carry noise, and flatter predictions cost more than the noise. LOG.md has the
figures; the recipe therefore does not use it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bitsmith import __version__
from bitsmith.archs import TensorSpec
from bitsmith.archs.export import ImportedView
from bitsmith.errors import BitsmithError, OutputError, UnsupportedError
from bitsmith.progress import Progress, silent
from bitsmith.run.evaluate import MIN_CTX_TOKENS, open_model
from bitsmith.run.execute import check_output
from bitsmith.run.forward import TextModel, check_heads, compare, final_hidden_states
from bitsmith.run.sequential import _Encoded, _Stream
from bitsmith.run.sites import States
from bitsmith.store import GgufCheckpoint, TensorInfo, write_gguf
from bitsmith.store.checkpoint import Bytes, ComputedTensor, TensorRef
from bitsmith.store.statistics import HEAD_SITE

Tokens = NDArray[np.int64]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

_DAMPINGS = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01)
_SLICE_BYTES = 64 << 20
_FORMS = {"norm.mixer": "mixer.in", "norm.ffn": "ffn.in", "norm.final": HEAD_SITE}


@dataclass(frozen=True)
class CorrectionRecord:
    """What one correction did; KLD is KL(original‖file) in nats per token over `held_tokens` positions.

    `gains` has for each site the damping that its held-out error chose (None: left alone) and that error
    after over before; `tried` the held-out KLD of each combination. `kept` names the one in `out`: `none`
    where the candidate was best, whose bytes `out` then holds.
    """

    out: Path
    kept: str
    held_kld_before_nats: float
    held_kld_after_nats: float
    held_tokens: int
    fit_tokens: int
    gains: Mapping[str, tuple[float | None, float]]
    tried: Mapping[str, float]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain values."""
        return {"kind": "correction", "bitsmith": __version__, **asdict(self), "out": str(self.out)}


def correct(
    model: Path,
    candidate: Path,
    out: Path,
    fit: Tokens,
    held: Tokens,
    *,
    overwrite: bool = False,
    progress: Progress = silent,
) -> CorrectionRecord:
    """Write `candidate` (a GGUF of `model`) to `out`, RMSNorm weights moved so that matrices' outputs fit.

    In the order of the forward, with everything before already corrected: the weight before the matrices
    `W_m` of a site becomes `w c`, where c minimises `Σ_m E|W_m x − Ŵ_m diag(c) x̂|² / E|W_m x|²`; x are the
    original's inputs of the site, x̂ the compressed model's, over the tokens `fit` (`chunks ctx`). c is drawn
    towards 1 by the damping that is best on `held` (`chunks ctx`); the norm stays where none is better than
    c = 1. The final norm, the layers' norms, both or none are kept: what has the lowest KLD on `held`. Types
    and bytes stay. The cost is about 4 forwards; one layer's weights are in memory.

    Raises BitsmithError where the two are not the same model, OutputError as `write_gguf` does.
    """
    started = time.monotonic()
    check_output(out, overwrite)
    _check_tokens(fit, held)
    with open_model(model) as original, open_model(candidate) as coded:
        if not isinstance(coded.source, GgufCheckpoint) or not isinstance(coded.checkpoint, ImportedView):
            raise UnsupportedError("is no GGUF; a correction changes one in place", path=candidate)
        check_heads(original, coded)
        with _folder(out.with_name(f".{out.name}.correcting")) as folder:
            found = _Correction(original, coded, coded.checkpoint, fit, held, folder, progress)
            found.walk()
        tried = found.measure(held)
        kept = min(tried, key=lambda name: tried[name])
        packed = found.packed(kept)
        stored = coded.source
        write_gguf(
            out,
            stored.typed_metadata(),
            [TensorInfo(name, ref.shape, ref.dtype) for name, ref in stored.items()],
            lambda info: [packed[info.name] if info.name in packed else stored[info.name].raw()],
            overwrite=overwrite,
            sources=[candidate, *original.source.files],
        )
    return CorrectionRecord(
        out=out,
        kept=kept,
        held_kld_before_nats=tried["none"],
        held_kld_after_nats=tried[kept],
        held_tokens=held[:, held.shape[1] // 2 + 1 :].size,
        fit_tokens=fit.size,
        gains=found.gains,
        tried=tried,
        seconds=time.monotonic() - started,
    )


class _Correction:
    """One walk through the sites; what was found for each norm."""

    def __init__(
        self,
        original: TextModel,
        coded: TextModel,
        view: ImportedView,
        fit: Tokens,
        held: Tokens,
        folder: Path,
        progress: Progress,
    ) -> None:
        self._original, self._coded, self._progress = original, coded, progress
        self._specs = [spec for spec in view.specs.values() if spec.component == "text"]
        self._local = view.arch.text_prefix
        self._fit_chunks, self._folder = len(fit), folder
        self._tokens: Tokens = np.concatenate([fit, held])
        self._view = _Encoded(coded.checkpoint, coded.checkpoint)
        self._corrected: dict[str, tuple[TensorSpec, TensorRef]] = {}
        self.gains: dict[str, tuple[float | None, float]] = {}

    def walk(self) -> None:
        """Correct every norm that matrices read, in the order of the forward."""
        plain = _Stream(self._original, self._renamed(), self._tokens, self._folder / "original")
        model = TextModel(self._view, self._coded.arch, self._coded.source)
        coded = _Stream(model, self._specs, self._tokens, self._folder / "compressed")
        norms = [spec for spec in self._specs if spec.role in _FORMS]
        for done, norm in enumerate(sorted(norms, key=_place)):
            site = _site(norm)
            sums = self._gather(plain, coded, site, norm.shape[0])
            damping, gain, ratio = _gain(self._pairs(site), *sums)
            self.gains[site] = damping, ratio
            if damping is not None:
                ref = _scaled(norm, self._view[norm.name], gain)
                self._view.put(norm.name, ref)
                self._corrected[norm.name] = norm, ref
            self._progress("correct", done + 1, len(norms))

    def _renamed(self) -> list[TensorSpec]:
        """Return the specs under the original's names, whose text prefix may be longer."""
        prefix, own = self._original.arch.text_prefix, self._local
        return [
            _named(spec, prefix + spec.name.removeprefix(own)) if spec.name.startswith(own) else spec
            for spec in self._specs
        ]

    def _gather(self, plain: _Stream, coded: _Stream, site: str, columns: int) -> tuple[_Sums, _Sums]:
        """Return the moments of both models' inputs of `site`, of the fit and of the held-out chunks."""
        inputs = States(self._folder / "inputs", (*self._tokens.shape, columns))
        inputs.create()
        plain.show(site, lambda first, rows: inputs.write(first, rows.numpy()))
        sums = _Sums(columns), _Sums(columns)

        def take(first: int, rows: torch.Tensor) -> None:
            original = torch.from_numpy(inputs.read(first, first + len(rows)))
            for chunk in range(len(rows)):
                sums[first + chunk >= self._fit_chunks].add(original[chunk], rows[chunk])

        coded.show(site, take)
        inputs.path.unlink()
        return sums

    def _pairs(self, site: str) -> list[tuple[TensorRef, TensorRef]]:
        """Return the matrices that read `site`, of the original and of the file."""
        if site == HEAD_SITE:
            return [(self._original.head, self._coded.head)]
        prefix, own = self._original.arch.text_prefix, self._local
        names = [spec.name for spec in self._specs if spec.site == site]
        return [
            (self._original.checkpoint[prefix + name.removeprefix(own)], self._view[name]) for name in names
        ]

    def measure(self, held: Tokens) -> dict[str, float]:
        """Return the KLD of each combination on `held`, positions T/2…T-2."""
        first = held.shape[1] // 2
        targets = held[:, first + 1 :].reshape(-1)
        states = final_hidden_states(self._original, held, first).reshape(len(targets), -1)
        tried, seen = {}, []
        for name in ("none", "layers", "final", "all"):
            chosen = self._chosen(name)
            if (name != "none" and not chosen) or chosen in seen:
                continue
            seen.append(chosen)
            view = _Encoded(self._coded.checkpoint, self._coded.checkpoint)
            for spec, ref in chosen.values():
                view.put(spec.name, ref)
            model = TextModel(view, self._coded.arch, self._coded.source)
            found = final_hidden_states(model, held, first).reshape(len(targets), -1)
            tried[name] = float(compare(self._original, model, (states, found), targets).kld.mean())
        return tried

    def _chosen(self, which: str) -> dict[str, tuple[TensorSpec, TensorRef]]:
        return {
            name: pair
            for name, pair in self._corrected.items()
            if which == "all"
            or (which == "final" and pair[0].role == "norm.final")
            or (which == "layers" and pair[0].role != "norm.final")
        }

    def packed(self, which: str) -> dict[str, Bytes]:
        """Return the stored bytes of the corrected norms by GGUF name."""
        return {
            str(spec.gguf_name): np.ascontiguousarray(spec.to_gguf(ref).read(), np.float32).view(np.uint8)
            for spec, ref in self._chosen(which).values()
        }


class _Sums:
    """Σ x x̂ᵀ, Σ x̂ x̂ᵀ and Σ x xᵀ over tokens in float64."""

    def __init__(self, columns: int) -> None:
        self.tokens = 0
        self.cross, self.coded, self.original = torch.zeros((3, columns, columns), dtype=torch.float64)

    def add(self, original: torch.Tensor, coded: torch.Tensor) -> None:
        """Add a chunk's inputs (`T in` each)."""
        self.tokens += len(coded)
        self.cross += original.T @ coded
        self.coded += coded.T @ coded
        self.original += original.T @ original


def _gain(
    pairs: list[tuple[TensorRef, TensorRef]], fit: _Sums, held: _Sums
) -> tuple[float | None, Float64, float]:
    """Return the damping, the gain c (`in`) and the held-out error after over before; None: nothing helps.

    The error is `cᵀA c − 2 bᵀc + const` with `A = Σ ŴᵀŴ ∘ E[x̂x̂ᵀ]`, `b = diag(Σ ŴᵀW E[x x̂ᵀ])`.
    """
    systems = _System(fit), _System(held)
    for original, coded in pairs:
        _add_pair(systems, original, coded)
    learned, judge = systems
    one = torch.ones_like(learned.right)
    step = torch.diag(learned.matrix.diagonal())
    best, gain, before = None, one, judge.error(one)
    lowest = before
    for damping in _DAMPINGS:
        moved = torch.linalg.solve(learned.matrix + damping * step, learned.right - learned.matrix @ one)
        error = judge.error(one + moved)
        if error < lowest:
            best, gain, lowest = damping, one + moved, error
    return best, gain.numpy(), lowest / before if before > 0 else 1.0


class _System:
    """The quadratic form of one split's error."""

    def __init__(self, sums: _Sums) -> None:
        self.sums, columns = sums, len(sums.cross)
        self.matrix = torch.zeros((columns, columns), dtype=torch.float64)
        self.right = torch.zeros(columns, dtype=torch.float64)
        self.constant = 0.0

    def add(self, square: torch.Tensor, mixed: torch.Tensor, own: torch.Tensor) -> None:
        """Add a matrix by its ŴᵀŴ, ŴᵀW and WᵀW."""
        energy = float((own * self.sums.original).sum())
        if energy <= 0:
            return
        self.matrix += square * self.sums.coded / energy
        self.right += (mixed * self.sums.cross.T).sum(1) / energy
        self.constant += 1.0

    def error(self, gain: torch.Tensor) -> float:
        """Return Σ_m of the squared error over the output's energy."""
        return float(gain @ self.matrix @ gain - 2 * self.right @ gain) + self.constant


def _add_pair(systems: tuple[_System, _System], original: TensorRef, coded: TensorRef) -> None:
    columns = original.shape[1]
    square, mixed, own = torch.zeros((3, columns, columns), dtype=torch.float64)
    step = max(1, _SLICE_BYTES // (4 * columns))
    for start in range(0, original.shape[0], step):
        stop = min(start + step, original.shape[0])
        rows, moved = _rows(original, start, stop), _rows(coded, start, stop)
        square += moved.T @ moved
        mixed += moved.T @ rows
        own += rows.T @ rows
    for system in systems:
        system.add(square, mixed, own)


def _rows(ref: TensorRef, start: int, stop: int) -> torch.Tensor:
    return torch.from_numpy(np.array(ref.read(start, stop), np.float32))


def _scaled(spec: TensorSpec, ref: TensorRef, gain: Float64) -> TensorRef:
    """Return the norm weight whose effect is `gain` times as large, as float32 keeps it in the file."""
    shift = 1.0 if spec.norm == "1+w" else 0.0
    values = ((ref.read().astype(np.float64) + shift) * gain - shift).astype(np.float32)
    stored = spec.to_gguf(_computed(spec.name, values)).read()
    return spec.from_gguf(_computed(spec.name, np.asarray(stored, np.float32)))


def _computed(name: str, values: Float32) -> TensorRef:
    return ComputedTensor(name, values.shape, "F32", lambda start, stop: values[start:stop])


def _named(spec: TensorSpec, name: str) -> TensorSpec:
    return replace(spec, name=name)


def _site(norm: TensorSpec) -> str:
    form = _FORMS[norm.role]
    return form if norm.layer is None or form == HEAD_SITE else f"layers.{norm.layer}.{form}"


def _place(norm: TensorSpec) -> tuple[int, int]:
    order = list(_FORMS)
    return (1 << 30 if norm.role == "norm.final" else norm.layer or 0), order.index(norm.role)


def _check_tokens(fit: Tokens, held: Tokens) -> None:
    if fit.ndim != 2 or held.ndim != 2 or not len(fit) or fit.shape[1] != held.shape[1]:
        raise BitsmithError(
            f"fit and held-out tokens are {fit.shape} and {held.shape}, not chunks of a length"
        )
    if not len(held) or held.shape[1] < MIN_CTX_TOKENS:
        raise BitsmithError(f"held-out tokens are {held.shape}: no chunk to judge the correction on")


@contextmanager
def _folder(path: Path) -> Iterator[Path]:
    shutil.rmtree(path, ignore_errors=True)
    try:
        path.mkdir()
    except OSError as error:
        raise OutputError(f"cannot be made: {error.strerror or error}", path=path) from error
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
