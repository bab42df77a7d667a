"""How much a token's errors matter to the model's predictions: one backward pass, a layer at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from bitsmith.archs import TensorSpec
from bitsmith.errors import BitsmithError
from bitsmith.run.device import CPU
from bitsmith.run.differentiable import differentiable
from bitsmith.run.forward import Network, TextModel, quiet_transformers
from bitsmith.run.sites import States, aligned, site_threads, site_workers
from bitsmith.run.turns import Turn, Turns
from bitsmith.store.statistics import HEAD_SITE

Float32 = NDArray[np.float32]
Saliency = Mapping[str, Float32]
"""By activation site: a weight of each token (`chunks T`), 1 on average."""
TakeWeighed = Callable[[str, int, torch.Tensor, Turn, torch.Tensor], None]
"""Takes as `sites.Take` does, and the tokens' weights (`B T`) up to one factor of the site."""

_HEAD_SLICE_BYTES = 32 << 20
_HEAD_BLOCK = 1024  # rows of the vocabulary whose logits are at hand at a time
_GROUP_BYTES = 192 << 20  # of what the head keeps for the chunks that share one reading of it
_BACKWARD_COST = 4  # memory of a layer's graph over that of its forward, measured, rounded up


class Backward:
    """One model's backward pass, step by step between files of states and of gradients (`chunks T hidden`).

    It weighs each token t of each site s of the text layers: `w_st ∝ Σ_W |∂ log p(y) / ∂(W x_st)|²`, over the
    matrices W that read the site, with every next token y drawn by `seed` from the model's own distribution
    p: the trace of the Fisher information of their outputs, which is the Hessian of KL(p‖·) there. An error
    that a prediction does not notice weighs little.

    One layer's weights and the graphs of a chunk per thread are in memory; gradients of weights are not
    computed. Every task runs on one thread of torch, so that results do not depend on how many there are.
    """

    def __init__(self, model: TextModel, specs: Sequence[TensorSpec], network: Network, seed: int) -> None:
        self._model, self._network, self._seed = model, network, seed
        self._specs = [spec for spec in specs if spec.component == "text"]

    def head(self, source: States, normed: States, by_source: States, take: TakeWeighed) -> Iterator[int]:
        """Write the final norm of `source`, and the gradient of log p(y) by `source`; yield chunks done.

        Raises BitsmithError for a norm that is not finite.
        """
        network, turns = self._network, Turns()
        norm = aligned(network.norm(f"{self._model.arch.text_prefix}norm.")).requires_grad_(False)
        chunks, tokens = source.shape[:2]
        head = _Head(self._model, network.device)

        def begin(chunk: int) -> _Prediction:
            rows = norm(torch.from_numpy(source.read(chunk, chunk + 1)[0]).to(network.device))
            if not bool(torch.isfinite(rows).all()):
                self._refuse("the final norm makes NaN or infinite hidden states")
            normed.write(chunk, rows.cpu().numpy()[None])
            return _Prediction(rows, (self._seed, chunk))

        def end(chunk: int, prediction: _Prediction) -> None:
            by_normed, weights = prediction.gradient()
            hidden = torch.from_numpy(source.read(chunk, chunk + 1)[0]).to(network.device).requires_grad_()
            norm(hidden).backward(by_normed)
            by_source.write(chunk, _grad(hidden)[None])
            with turns.task(chunk):
                take(HEAD_SITE, chunk, prediction.rows[None], turns.under(HEAD_SITE), weights[None])

        with site_workers(head.token_bytes * tokens, network.device) as pool:
            workers = site_threads(head.token_bytes * tokens, network.device)
            group = max(1, _GROUP_BYTES // (workers * head.token_bytes * tokens)) * workers
            for first in range(0, chunks, group):
                numbers = range(first, min(first + group, chunks))
                predictions = list(pool.map(begin, numbers))
                for weight in head.slices():
                    list(pool.map(lambda one, rows=weight: one.add(rows), predictions))
                list(pool.map(end, numbers, predictions))
                yield len(numbers)

    def layer(
        self, index: int, source: States, by_target: States, by_source: States, take: TakeWeighed
    ) -> Iterator[int]:
        """Write the gradient by layer `index`'s input from that by its output; yield the chunks of each task.

        Raises BitsmithError for gradients that are not finite.
        """
        prefix = f"{self._model.arch.text_prefix}layers.{index}."
        network, turns = self._network, Turns()
        device = network.device
        with quiet_transformers():
            plain = aligned(network.layer(index)).requires_grad_(False)
        layer = differentiable(plain) if device.type == "cpu" else plain
        watch = _Watch(layer, self._modules(prefix))

        def task(chunk: int) -> int:
            hidden = torch.from_numpy(source.read(chunk, chunk + 1)).to(device).requires_grad_()
            after = torch.from_numpy(by_target.read(chunk, chunk + 1)).to(device)
            places = network.positions(hidden.detach())
            with turns.task(chunk):
                with torch.enable_grad():
                    inputs, weights = watch.during(
                        lambda: layer(hidden, attention_mask=None, past_key_values=None, **places), after
                    )
                found = _grad(hidden)
                if not np.isfinite(found).all():
                    self._refuse(f"layer {index} makes NaN or infinite gradients")
                by_source.write(chunk, found)
                for site in watch.sites:
                    take(site, chunk, inputs[site], turns.under(site), weights[site])
            return 1

        task_bytes = _BACKWARD_COST * network.bytes_per_token * source.shape[1]
        with quiet_transformers(), site_workers(task_bytes, device) as pool:
            yield from pool.map(task, range(source.shape[0]))

    def _refuse(self, why: str) -> None:
        raise BitsmithError(why, path=self._model.checkpoint.path)

    def _modules(self, prefix: str) -> dict[str, str]:
        """Return the site of every matrix under `prefix`, by its module's path."""
        return {
            spec.name.removeprefix(prefix).removesuffix(".weight"): spec.site
            for spec in self._specs
            if spec.site is not None and spec.name.startswith(prefix)
        }


class _Watch:
    """Keeps what enters a site, and sums over its matrices the squared gradients of their outputs."""

    def __init__(self, module: torch.nn.Module, sites: Mapping[str, str]) -> None:
        self.sites = sorted(set(sites.values()))
        self._here = threading.local()
        for path, site in sites.items():
            module.get_submodule(path).register_forward_hook(
                lambda _module, inputs, output, site=site: self._follow(inputs[0], output, site)
            )

    def _follow(self, inputs: torch.Tensor, output: torch.Tensor, site: str) -> None:
        self._here.inputs[site] = inputs.detach()
        self._here.weights.setdefault(site, torch.zeros(inputs.shape[:-1], device=inputs.device))
        output.register_hook(  # type: ignore[no-untyped-call]
            lambda gradient, site=site: self._took(site, gradient)
        )

    def _took(self, site: str, gradient: torch.Tensor) -> None:
        self._here.weights[site] += torch.linalg.vector_norm(gradient, dim=-1).square_()

    def during(
        self, forward: Callable[[], torch.Tensor], by_made: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Run forward and backward on this thread; return by site its inputs and its tokens' weights."""
        self._here.inputs, self._here.weights = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
        forward().backward(by_made)  # type: ignore[no-untyped-call]
        return self._here.inputs, self._here.weights


class _Head:
    """The output head, read in slices of the vocabulary."""

    def __init__(self, model: TextModel, device: torch.device = CPU) -> None:
        self._head, self._device = model.head, device
        columns = self._head.shape[1]
        self._rows = max(1, _HEAD_SLICE_BYTES // (4 * columns) // _HEAD_BLOCK) * _HEAD_BLOCK
        self.token_bytes = 16 * (min(_HEAD_BLOCK, self._head.n_rows) + columns)

    def slices(self) -> Iterator[torch.Tensor]:
        """Yield the rows of the vocabulary (`rows hidden`), whole blocks but for the last."""
        for start in range(0, self._head.n_rows, self._rows):
            rows = self._head.read(start, min(start + self._rows, self._head.n_rows))
            yield torch.from_numpy(np.require(rows, np.float32, ["C", "W"])).to(self._device)


class _Prediction:
    """What a chunk's logits come to, gathered block by block of the vocabulary: no logit is computed twice.

    With m the largest logit so far: Σ e^(l - m), its squares, Σ e^(l - m) W, as m grows. The drawn token's
    block has the largest logarithm of its mass plus Gumbel noise; within it, the token is where a uniform
    number falls among the cumulated masses. So y is drawn from the softmax.
    """

    def __init__(self, rows: torch.Tensor, seed: tuple[int, int]) -> None:
        self.rows = rows
        self._rng = np.random.default_rng(seed)
        tokens, device = len(rows), rows.device
        self._top = torch.full((tokens,), -torch.inf, device=device)
        self._best = torch.full((tokens,), -torch.inf, dtype=torch.float64, device=device)
        self._mass, self._squares = torch.zeros((2, tokens), dtype=torch.float64, device=device)
        self._pull, self._drawn = torch.zeros_like(rows), torch.zeros_like(rows)
        self._drawn_logit = torch.zeros(tokens, device=device)

    def add(self, weight: torch.Tensor) -> None:
        """Take the next rows of the head (`rows hidden`)."""
        for start in range(0, len(weight), _HEAD_BLOCK):
            self._add(weight[start : start + _HEAD_BLOCK])

    def _add(self, weight: torch.Tensor) -> None:
        logits = self.rows @ weight.T
        top = torch.maximum(self._top, logits.amax(1))
        fade, self._top = (self._top - top).exp_(), top
        powers = torch.exp(logits - top[:, None])
        mass = powers.sum(1)
        self._draw(weight, logits, powers, mass)
        self._mass = self._mass * fade + mass
        self._squares = self._squares * fade.square() + torch.linalg.vector_norm(powers, dim=1).square_()
        self._pull.mul_(fade[:, None]).addmm_(powers, weight)

    def _draw(
        self, weight: torch.Tensor, logits: torch.Tensor, powers: torch.Tensor, mass: torch.Tensor
    ) -> None:
        """Let the block take the place of an earlier one, and draw its token, where its noise says so."""
        tokens, device = len(mass), mass.device
        noise = torch.from_numpy(self._rng.gumbel(size=tokens)).to(device)
        uniform = torch.from_numpy(self._rng.random(tokens)).to(device)
        key = self._top + mass.double().log() + noise
        rows = (key > self._best).nonzero()[:, 0]
        self._best = torch.maximum(self._best, key)
        cumulated = powers[rows].double().cumsum(1)
        at = torch.searchsorted(cumulated, uniform[rows, None] * cumulated[:, -1:], right=True)
        place = at[:, 0].clamp_max(len(weight) - 1)
        self._drawn[rows], self._drawn_logit[rows] = weight[place], logits[rows, place]

    def gradient(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradient of Σ log p(y) by the rows, and |∂ log p(y)/∂ logits|² (`T`)."""
        likely = torch.exp(self._drawn_logit - self._top) / self._mass
        squares = self._squares / self._mass.square() + 1 - 2 * likely
        gradient = self._drawn - self._pull / self._mass[:, None].float()
        return gradient, squares.clamp_min(0).float()


def _grad(leaf: torch.Tensor) -> Float32:
    if leaf.grad is None:
        return np.zeros(tuple(leaf.shape), np.float32)
    found: Float32 = leaf.grad.cpu().numpy()
    return found


def normalised(weights: Float32) -> Float32:
    """Divide by the mean; weights that are all zero, or not finite, become 1."""
    mean = float(weights.mean(dtype=np.float64))
    if not np.isfinite(mean) or mean <= 0:
        return np.ones_like(weights)
    scaled: Float32 = (weights / mean).astype(np.float32)
    return scaled
