"""What compressed weights do to one layer of the real forward, on the original's hidden states."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from bitsmith.errors import BitsmithError
from bitsmith.numerics.resampling import ratio_of_sums
from bitsmith.run.forward import (
    Network,
    TextModel,
    Tokens,
    _workers,
    _zeros,
    embed,
    quiet_transformers,
    weight_of,
)

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Changed = Mapping[str, Float32]
"""Weights (`out in`) by tensor name, in place of the original's."""

_BATCH_TOKENS = 512
_ACTIVATION_BYTES = 1 << 30
_HEAD_ROWS = 8192


@dataclass(frozen=True)
class Cosine:
    """The mean over tokens with its 95 % interval over chunks (None: too few); `evidence` says of what."""

    value: float | None
    low: float | None
    high: float | None
    evidence: str


class LayerProbe:
    """The original's forward on `tokens` (`chunks T`), entered layer by layer in rising order.

    Cosines are those of what a layer adds to the hidden states, token by token, at the original's states;
    with what it adds to them, states would be close to themselves whatever the layer does. A token to whose
    state the original adds nothing is left out, one that the compressed layer alone leaves at 0 counts 0.
    Raises BitsmithError as `final_hidden_states` does.
    """

    def __init__(self, model: TextModel, tokens: Tokens) -> None:
        self._model, self._tokens = model, tokens
        with quiet_transformers():
            self._network = Network(model)
        self._states = _zeros((*tokens.shape, self._network.hidden_size))
        embed(model, tokens, self._states)
        self._layer, self._module = -1, torch.nn.Module()
        self._after = self._states

    @property
    def layers(self) -> int:
        """Number of layers."""
        return self._network.n_layers

    def names(self) -> list[str]:
        """Return the names of the tensors of the layer entered."""
        prefix = f"{self._model.arch.text_prefix}layers.{self._layer}."
        return [prefix + name for name, _ in self._module.named_parameters()]

    def enter(self, layer: int) -> None:
        """Go on to `layer`; those before it run with the original's weights."""
        while self._layer < layer:
            self._states, self._layer = self._after, self._layer + 1
            with quiet_transformers():
                self._module = self._network.layer(self._layer)
            self._after = self._through(self._states)

    def layer(self, changed: Changed) -> Cosine:
        """Return the cosine for the layer entered, with some of its weights changed."""
        prefix = f"{self._model.arch.text_prefix}layers.{self._layer}."
        parameters = dict(self._module.named_parameters())
        kept = {name: parameters[name.removeprefix(prefix)].data for name in changed}
        try:
            for name, values in changed.items():
                parameters[name.removeprefix(prefix)].data = torch.from_numpy(np.ascontiguousarray(values))
            after = self._through(self._states)
        finally:
            for name, values_before in kept.items():
                parameters[name.removeprefix(prefix)].data = values_before
        whole = _cosine(self._after, after, "").value
        said = f"what layer {self._layer} adds to {self._tokens.size} states; output itself {whole:.4f}"
        return _cosine(self._after - self._states, after - self._states, said)

    def embedding(self, values: Float32) -> Cosine:
        """Return the cosine of the embeddings of the tokens."""
        ref = self._model.embedding
        unique, inverse = np.unique(self._tokens, return_inverse=True)
        rows = np.stack([ref.read(int(token), int(token) + 1)[0] for token in unique]).astype(np.float32)
        at = inverse.reshape(self._tokens.shape)
        return _cosine(rows[at], values[unique][at], f"embeddings of {self._tokens.size} tokens")

    def head(self, values: Float32) -> Cosine:
        """Return the cosine of the logits behind the last layer, each token's less their mean."""
        self.enter(self.layers - 1)
        with torch.inference_mode():
            normed = self._network.normed(self._after)
        sums = [self._logit_sums(chunk, values) for chunk in normed]
        return _estimate(sums, f"logits of {self._tokens.size} tokens, less their mean")

    def _logit_sums(self, states: Float32, values: Float32) -> tuple[float, int]:
        head, moments = self._model.head, np.zeros((5, len(states)))
        path = self._model.checkpoint.path
        exact = torch.from_numpy(np.ascontiguousarray(states))
        with torch.inference_mode():
            for start in range(0, head.n_rows, _HEAD_ROWS):
                stop = min(start + _HEAD_ROWS, head.n_rows)
                one = (exact @ weight_of(head, path, start, stop).T).numpy().astype(np.float64)
                part = torch.from_numpy(np.ascontiguousarray(values[start:stop]))
                other = (exact @ part.T).numpy().astype(np.float64)
                sums = one.sum(1), other.sum(1), (one * one).sum(1), (other * other).sum(1)
                moments += np.stack([*sums, (one * other).sum(1)])
        first, second, squared, other_squared, product = moments / head.n_rows
        variances = np.maximum(squared - first**2, 0), np.maximum(other_squared - second**2, 0)
        return _summed(product - first * second, *variances)

    def _through(self, states: Float32) -> Float32:
        """Return the states behind the layer entered."""
        out = _zeros(states.shape)
        out[...] = states
        batch = max(1, _BATCH_TOKENS // states.shape[1])
        parts = [out[start : start + batch] for start in range(0, len(out), batch)]
        nbytes = self._network.bytes_per_token * states.shape[1] * batch
        with quiet_transformers(), _workers(_ACTIVATION_BYTES // nbytes) as pool:
            finite = list(pool.map(lambda part: self._network.run(self._module, part, None), parts))
        if not all(finite):
            raise BitsmithError(
                f"layer {self._layer} makes NaN or infinite hidden states", path=self._model.checkpoint.path
            )
        return out


def lowest(cosines: list[Cosine]) -> Cosine:
    """Return the lowest of several cosines."""
    return min(cosines, key=lambda one: -2.0 if one.value is None else one.value)


def _cosine(one: Float32, other: Float32, evidence: str) -> Cosine:
    def summed(a: Float32, b: Float32) -> tuple[float, int]:
        dot: Callable[[Float32, Float32], Float64] = lambda x, y: np.einsum(  # noqa: E731
            "ti,ti->t", x, y, dtype=np.float64
        )
        return _summed(dot(a, b), dot(a, a), dot(b, b))

    return _estimate([summed(a, b) for a, b in zip(one, other, strict=True)], evidence)


def _summed(product: Float64, squared: Float64, other: Float64) -> tuple[float, int]:
    """Return the sum of cosines and their number; a vector of zeros has none, against one it is 0."""
    length = np.sqrt(squared * other)
    cosines = np.divide(product, length, out=np.zeros_like(product), where=length > 0)
    return float(cosines[squared > 0].sum()), int(np.count_nonzero(squared > 0))


def _estimate(sums: list[tuple[float, int]], evidence: str) -> Cosine:
    found = ratio_of_sums([total for total, _ in sums], [count for _, count in sums])
    if found is None:
        return Cosine(None, None, None, f"nothing to compare: {evidence}")
    return Cosine(found.value, found.low, found.high, evidence)
