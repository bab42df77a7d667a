"""Statistics taken from the compressed model itself: every site's behind the tensors already encoded."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bitsmith import __version__
from bitsmith.archs import TensorSpec
from bitsmith.errors import BitsmithError, OutputError
from bitsmith.run.device import current_device
from bitsmith.run.evaluate import open_model
from bitsmith.run.forward import TextModel, Tokens
from bitsmith.run.site_sums import CrossSums, SiteSums
from bitsmith.run.sites import SiteForward, States
from bitsmith.run.turns import Turn
from bitsmith.store.checkpoint import TensorRef, View
from bitsmith.store.statistics import HEAD_SITE, SiteSpec, SiteStatistics, Statistics

HELD_ROWS = 2048
_ORDER = ("mixer.in", "mixer.mid", "ffn.in", "ffn.mid")


@contextmanager
def sequential(
    model: Path, statistics: Statistics, specs: Iterable[TensorSpec], folder: Path
) -> Iterator[SequentialStatistics]:
    """Give statistics for one run of `compress`, whose encoder tells them of every tensor it has encoded.

    `folder` holds hidden states meanwhile and is removed at the end. Raises BitsmithError for statistics
    without tokens (an imatrix), OutputError where the folder cannot be made, else as `open_model` does.
    """
    tokens = statistics.tokens()
    if tokens is None:
        raise BitsmithError(
            "holds no tokens, which sequential statistics run again; pass what calibrate wrote",
            path=statistics.path,
        )
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir()
    except OSError as error:
        raise OutputError(f"cannot be made: {error.strerror or error}", path=folder) from error
    try:
        with open_model(model) as opened:
            yield SequentialStatistics(opened, statistics, tokens, list(specs), folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class SequentialStatistics(Statistics):
    """What enters a matrix once all before it are compressed, computed when it is first asked for.

    The tokens, their split, their weights and the size of diagonal blocks are those of the statistics
    underneath; inputs are those of the layers as `encoded` so far, with original weights for the rest, and
    the original model's run beside them. One layer's weights are in memory; both models' hidden states before
    it, and the original's inputs of one site, are on the disk. Sites must be asked for in the order of
    `place`. A tied embedding is encoded before all else, so it keeps the original model's statistics.
    """

    def __init__(
        self,
        model: TextModel,
        base: Statistics,
        tokens: tuple[Tokens, Tokens],
        specs: list[TensorSpec],
        folder: Path,
    ) -> None:
        super().__init__(base.path, specs, partial=False)
        self._base, self._split, self._folder = base, tokens, folder
        for name in ("model", "model_sha256", "text", "text_sha256", "ctx_tokens", "chunks", "held_chunks"):
            setattr(self, name, getattr(base, name))
        self.fit_tokens, self.notes = base.fit_tokens, base.notes
        facts = ["sequential", __version__, torch.__version__, base.digest]
        self.digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        self._tied = model.arch.tied
        self._view = Encoded(model.checkpoint, model.checkpoint)
        self._tokens: Tokens = np.concatenate(tokens)
        coded = TextModel(self._view, model.arch, model.source)
        self._coded = _Stream(coded, specs, self._tokens, folder / "compressed")
        self._plain = _Stream(model, specs, self._tokens, folder / "original")

    def tokens(self) -> tuple[Tokens, Tokens]:
        """Return the token ids of the fit and of the held-out chunks."""
        return self._split

    def saliency(self, site: str) -> NDArray[np.float32] | None:
        """Return the weight of each token at `site`, found in the original model."""
        return self._base.saliency(site)

    def knows(self, spec: SiteSpec) -> bool:
        """Tell whether the statistics underneath know `spec`'s site."""
        return self._base.knows(spec)

    def hugging_face(self, spec: SiteSpec) -> SiteStatistics | None:
        """Return the compressed model's statistics; the original's of a tied embedding."""
        return self._base.hugging_face(spec) if spec.role == "embed" else super().hugging_face(spec)

    def place(self, spec: SiteSpec) -> int:
        """Return the forward's order: the embedding, layer by layer site by site, the head, MTP layers."""
        site, last = spec.site, 1 + len(_ORDER) * self._coded.n_layers
        if site is None or spec.role == "embed":
            return 0
        if site == HEAD_SITE:
            return last
        component, number, kind = [*site.split(".", 2), "", ""][:3]
        if component != "layers":
            return last + 1
        return 1 + len(_ORDER) * int(number) + _ORDER.index(kind)

    def encoded(self, spec: SiteSpec, ref: TensorRef) -> None:
        """Let the forward read `ref`, in GGUF layout, in the place of `spec`'s original."""
        if spec.name in self._view and isinstance(spec, TensorSpec):
            self._view.put(spec.name, spec.from_gguf(ref))

    def _load(self, site: str) -> SiteStatistics | None:
        spec = next((spec for spec in self._specs if spec.site == site), None)
        known = None if spec is None else self._base.hugging_face(spec)
        if known is None:
            return None
        block = 0 if known.moment is None else known.moment.shape[-1]
        columns = len(known.diagonal)
        del known
        chunks, ctx = self._tokens.shape
        shape = chunks, ctx - (not site.startswith("layers.") and site != HEAD_SITE), columns
        original = States(self._folder / "inputs", shape)
        original.create()
        self._plain.show(site, lambda first, inputs, _: original.write(first, inputs.cpu().numpy()))
        gather = _Gather(columns, block, original, self._split, self.saliency(site))
        self._coded.show(site, gather.take)
        original.path.unlink()
        return gather.result(site, self.path)


class _Stream:
    """Hidden states of all tokens on their way through one model, in a folder."""

    def __init__(self, model: TextModel, specs: list[TensorSpec], tokens: Tokens, folder: Path) -> None:
        self._forward = SiteForward(model, specs)
        self._tokens, self._folder, self._path = tokens, folder, model.checkpoint.path
        self._at: int | None = None
        self.n_layers = self._forward.n_layers
        folder.mkdir()

    def show(self, site: str, take: Callable[[int, torch.Tensor, Turn], None]) -> None:
        """Give `take` what enters `site` (first chunk, inputs `B T in`, turn) as the weights are now."""

        def wanted(found: str, first: int, inputs: torch.Tensor, turn: Turn) -> None:
            if found == site:
                take(first, inputs, turn)

        if site.startswith("layers."):
            index = int(site.split(".")[1])
            self._advance(index)
            _exhaust(self._forward.inputs(index, site, self._states(index), wanted))
            return
        self._advance(self.n_layers)
        normed = self._states(self.n_layers + 1)
        normed.create()
        _exhaust(self._forward.head(self._states(self.n_layers), normed, wanted))
        if site != HEAD_SITE:
            embedded = self._states(self.n_layers + 2, fewer=1)
            embedded.create()
            _exhaust(self._forward.mtp(self._tokens, normed, embedded, wanted))

    def _states(self, number: int, fewer: int = 0) -> States:
        chunks, ctx = self._tokens.shape
        return States(self._folder / f"states.{number}", (chunks, ctx - fewer, self._forward.hidden_size))

    def _advance(self, layer: int) -> None:
        """Run the layers before `layer` that have not been run yet."""
        if self._at is None:
            self._states(0).create()
            self._forward.embed(self._tokens, self._states(0))
            self._at = 0
        if layer < self._at:
            raise BitsmithError(f"layer {layer} was asked for behind layer {self._at}", path=self._path)
        while self._at < layer:
            before, after = self._states(self._at), self._states(self._at + 1)
            after.create()
            _exhaust(self._forward.layer(self._at, before, after, lambda *_: None))
            before.path.unlink()
            self._at += 1


def _exhaust(steps: Iterator[int]) -> None:
    for _ in steps:
        pass


class Encoded(View):
    """A checkpoint whose tensors are replaced one by one."""

    def put(self, name: str, ref: TensorRef) -> None:
        """Replace a tensor."""
        self._tensors[name] = ref


class _Gather:
    """Sums over one site's inputs, and the original's, of chunks in the split's order: fit, then held out."""

    def __init__(
        self,
        columns: int,
        block: int,
        original: States,
        split: tuple[Tokens, Tokens],
        saliency: NDArray[np.float32] | None,
    ) -> None:
        device = current_device()
        self._sums, self._block = SiteSums(columns, block, device), block
        self._cross, self._original = CrossSums(columns, block, device), original
        self._fit = len(split[0])
        self._weights = None if saliency is None else torch.from_numpy(saliency).to(device)
        held = split[1]
        drawn = np.random.default_rng(0).permutation(held.size)[:HELD_ROWS]
        ctx = held.shape[1]
        self._positions = [np.sort(drawn[drawn // ctx == n] % ctx) for n in range(len(held))]

    def take(self, first: int, inputs: torch.Tensor, turn: Turn) -> None:
        """Add `inputs` (`B T in`) of the chunks from `first` on."""
        weights = None if self._weights is None else self._weights[first : first + len(inputs)]
        original = torch.from_numpy(self._original.read(first, first + len(inputs))).to(inputs.device)
        fit = max(0, min(self._fit - first, len(inputs)))
        rows, kept = inputs[:fit].flatten(0, 1), None if weights is None else weights[:fit].flatten()
        self._sums.fit(rows, kept, turn)
        with turn("cross"):
            self._cross.fit(original[:fit].flatten(0, 1), rows, kept)
            for chunk in range(fit, len(inputs)):
                positions = self._positions[first + chunk - self._fit]
                positions = positions[positions < inputs.shape[1]]
                own = None if weights is None else weights[chunk]
                self._sums.hold(inputs[chunk], positions, own)
                self._cross.hold(original[chunk], positions, own)

    def result(self, site: str, path: Path) -> SiteStatistics:
        """Return the sums' means.

        Raises BitsmithError if their squares leave float32.
        """
        found = self._sums.result(site)
        found = self._cross.added_to(found) if self._block else found
        for part in (found.diagonal, found.moment, found.held_diagonal, found.cross):
            if part is not None and not np.isfinite(part).all():
                raise BitsmithError("gets inputs that are beyond float32", path=path, tensor=site)
        return found
