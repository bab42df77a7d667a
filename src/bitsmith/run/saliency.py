"""How much a token's errors matter to the model's predictions: one backward pass, a layer at a time."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bitsmith.archs import TensorSpec
from bitsmith.errors import BitsmithError
from bitsmith.progress import Progress, silent
from bitsmith.run.device import CPU
from bitsmith.run.forward import TextModel, Tokens, quiet_transformers
from bitsmith.run.sites import SiteForward, States, aligned, site_workers
from bitsmith.store.statistics import HEAD_SITE

Float32 = NDArray[np.float32]
Saliency = Mapping[str, Float32]
"""By activation site: a weight of each token (`chunks T`), 1 on average."""

_HEAD_SLICE_BYTES = 32 << 20
_LOGIT_COST = 48  # bytes of a logit, its noise, and what softmax takes in float64
_BACKWARD_COST = 6  # memory of a layer's graph over that of its forward, measured, rounded up


def token_saliency(
    model: TextModel,
    specs: Sequence[TensorSpec],
    tokens: Tokens,
    folder: Path,
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> Saliency:
    """Return for each site s of the text layers and each token t of `tokens` (`chunks T`) its weight.

    `w_st ∝ Σ_W |∂ log p(y) / ∂(W x_st)|²`, over the matrices W that read the site, with every next token y
    drawn by `seed` from the model's own distribution p: the trace of the Fisher information of their outputs,
    which is the Hessian of KL(p‖·) there. An error that a prediction does not notice weighs little. Weights
    are 1 on average over a site's tokens; sites of other components (MTP) are not in the result.

    One forward that keeps every layer's input in `folder` (`4 layers tokens hidden` bytes, removed at the
    end), then one backward: one layer's weights and the graphs of a chunk per thread in memory. Raises
    as `SiteForward` does, and BitsmithError for gradients that are not finite.
    """
    with quiet_transformers():
        run = _Backward(model, specs, tokens, folder, seed, progress)
        try:
            return run.weights()
        finally:
            shutil.rmtree(folder, ignore_errors=True)


class _Backward:
    """One pass: states of every layer on the disk, and the gradients that replace one another."""

    def __init__(
        self,
        model: TextModel,
        specs: Sequence[TensorSpec],
        tokens: Tokens,
        folder: Path,
        seed: int,
        progress: Progress,
    ) -> None:
        self._model, self._tokens, self._seed = model, tokens, seed
        self._specs = [spec for spec in specs if spec.component == "text"]
        self._forward = SiteForward(model, specs)
        self._folder = folder
        folder.mkdir(exist_ok=True)
        self._shape = (*tokens.shape, self._forward.hidden_size)
        self._steps = 4 * self._forward.n_layers * tokens.size
        self._done, self._progress = 0, progress
        self._found: dict[str, Float32] = {}

    def weights(self) -> Saliency:
        """Run forward and backward; return the normalised weights."""
        forward = self._forward
        self._states(0).create()
        forward.embed(self._tokens, self._states(0))
        for index in range(forward.n_layers):
            target = self._states(index + 1)
            target.create()
            for chunks in forward.layer(index, self._states(index), target, lambda *_: None):
                self._count(chunks)
        gradients = States(self._folder / "gradients", self._shape)
        gradients.create()
        self._through_head(gradients)
        for index in reversed(range(forward.n_layers)):
            self._through_layer(index, gradients)
            self._states(index).path.unlink()
        return {site: _normalised(found) for site, found in self._found.items()}

    def _states(self, number: int) -> States:
        return States(self._folder / f"layer.{number}", self._shape)

    def _count(self, chunks: int, cost: int = 1) -> None:
        self._done += cost * chunks * self._shape[1]
        self._progress("saliency", self._done, self._steps)

    def _through_head(self, gradients: States) -> None:
        """Write the gradient of log p(y) by the last layer's output, through the head and the final norm."""
        states = self._states(self._forward.n_layers)
        norm = aligned(self._forward.network.norm(f"{self._model.arch.text_prefix}norm."))
        norm.requires_grad_(False)
        weights = self._found[HEAD_SITE] = np.zeros(self._tokens.shape, np.float32)
        device = self._forward.network.device
        head = _Head(self._model, device)

        def task(chunk: int) -> None:
            hidden = torch.from_numpy(states.read(chunk, chunk + 1)[0]).to(device).requires_grad_()
            normed = norm(hidden)
            by_normed, weights[chunk] = head.gradient(normed.detach(), (self._seed, chunk))
            normed.backward(by_normed)
            gradients.write(chunk, _grad(hidden)[None])

        with site_workers(head.token_bytes * self._shape[1], device) as pool:
            list(pool.map(task, range(self._shape[0])))

    def _through_layer(self, index: int, gradients: States) -> None:
        """Replace the gradient by a layer's output with that by its input; note what its matrices' get."""
        prefix = f"{self._model.arch.text_prefix}layers.{index}."
        network = self._forward.network
        layer = aligned(network.layer(index)).requires_grad_(False)
        watch = _Watch(layer, self._modules(prefix))
        for site in watch.sites:
            self._found[site] = np.zeros(self._tokens.shape, np.float32)
        source, device = self._states(index), network.device

        def task(chunk: int) -> bool:
            hidden = torch.from_numpy(source.read(chunk, chunk + 1)).to(device).requires_grad_()
            after = torch.from_numpy(gradients.read(chunk, chunk + 1)).to(device)
            with torch.enable_grad():
                made = layer(
                    hidden, attention_mask=None, past_key_values=None, **network.positions(hidden.detach())
                )
                seen = watch.during(lambda: made.backward(after))
            for site, weight in seen.items():
                self._found[site][chunk] = weight.cpu().numpy()
            before = _grad(hidden)
            gradients.write(chunk, before)
            return bool(np.isfinite(before).all())

        task_bytes = _BACKWARD_COST * network.bytes_per_token * self._shape[1]
        with site_workers(task_bytes, device) as pool:
            for finite in pool.map(task, range(self._shape[0])):
                if not finite:
                    raise BitsmithError(
                        f"layer {index} makes NaN or infinite gradients", path=self._model.checkpoint.path
                    )
                self._count(1, 3)

    def _modules(self, prefix: str) -> dict[str, str]:
        """Return the site of every matrix under `prefix`, by its module's path."""
        return {
            spec.name.removeprefix(prefix).removesuffix(".weight"): spec.site
            for spec in self._specs
            if spec.site is not None and spec.name.startswith(prefix)
        }


class _Watch:
    """Sums over a site's matrices the squared gradients of their outputs, token by token."""

    def __init__(self, module: torch.nn.Module, sites: Mapping[str, str]) -> None:
        self.sites = set(sites.values())
        self._here = threading.local()
        for path, site in sites.items():
            module.get_submodule(path).register_forward_hook(
                lambda _module, _inputs, output, site=site: self._follow(output, site)
            )

    def _follow(self, output: torch.Tensor, site: str) -> None:
        if output.requires_grad:
            output.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient, site=site: self._took(site, gradient)
            )

    def _took(self, site: str, gradient: torch.Tensor) -> None:
        found = self._here.found
        squares = (gradient.double() ** 2).sum(-1).reshape(-1)
        found[site] = found[site] + squares if site in found else squares

    def during(self, backward: Callable[[], None]) -> dict[str, torch.Tensor]:
        """Return what passes in `backward`, on this thread."""
        self._here.found = found = dict[str, torch.Tensor]()
        backward()
        return found


class _Head:
    """The output head, read in slices of the vocabulary."""

    def __init__(self, model: TextModel, device: torch.device = CPU) -> None:
        self._head, self._device = model.head, device
        self._rows = max(1, _HEAD_SLICE_BYTES // (4 * self._head.shape[1]))
        self.token_bytes = _LOGIT_COST * min(self._rows, self._head.n_rows)

    def gradient(self, normed: torch.Tensor, seed: tuple[int, int]) -> tuple[torch.Tensor, Float32]:
        """Return the gradient of Σ log p(y) by `normed` (`T hidden`), and |∂ log p(y)/∂ logits|² (`T`).

        y is drawn by the largest of logit plus Gumbel noise, slice by slice.
        """
        rng = np.random.default_rng(seed)
        device = self._device
        best = torch.full((len(normed),), -torch.inf, device=device)
        drawn = torch.zeros(len(normed), dtype=torch.int64, device=device)
        total = torch.full((len(normed),), -torch.inf, dtype=torch.float64, device=device)
        for start, weight in self._slices():
            logits = normed @ weight.T
            noise = torch.from_numpy(rng.gumbel(size=tuple(logits.shape)).astype(np.float32))
            noisy = logits + noise.to(device)
            value, place = noisy.max(dim=1)
            drawn = torch.where(value > best, place + start, drawn)
            best = torch.maximum(best, value)
            total = torch.logaddexp(total, torch.logsumexp(logits.double(), dim=1))
        gradient, squares = torch.zeros_like(normed), torch.zeros(len(normed), device=device)
        rows = torch.arange(len(normed), device=device)
        for start, weight in self._slices():
            by_logits = -torch.exp((normed @ weight.T).double() - total[:, None]).float()
            inside = (drawn >= start) & (drawn < start + len(weight))
            by_logits[rows[inside], drawn[inside] - start] += 1.0
            gradient += by_logits @ weight
            squares += (by_logits * by_logits).sum(1)
        return gradient, squares.cpu().numpy()

    def _slices(self) -> Iterator[tuple[int, torch.Tensor]]:
        for start in range(0, self._head.n_rows, self._rows):
            rows = self._head.read(start, min(start + self._rows, self._head.n_rows))
            yield start, torch.from_numpy(np.require(rows, np.float32, ["C", "W"])).to(self._device)


def _grad(leaf: torch.Tensor) -> Float32:
    if leaf.grad is None:
        return np.zeros(tuple(leaf.shape), np.float32)
    found: Float32 = leaf.grad.cpu().numpy()
    return found


def _normalised(weights: Float32) -> Float32:
    """Divide by the mean; weights that are all zero, or not finite, become 1."""
    mean = float(weights.mean(dtype=np.float64))
    if not np.isfinite(mean) or mean <= 0:
        return np.ones_like(weights)
    scaled: Float32 = (weights / mean).astype(np.float32)
    return scaled
