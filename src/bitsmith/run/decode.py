"""Token by token through a text model in memory, with a KV cache and DeltaNet states."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.cache_utils import DynamicCache

from bitsmith.errors import BitsmithError
from bitsmith.run.forward import Network, TextModel, embed, quiet_transformers, weight_of
from bitsmith.run.machine import available_bytes

_BLOCK_TOKENS = 512  # of a prompt at a time, which bounds what the activations take


class Decoder:
    """transformers' own layers in float32, all in memory, with the states of one sequence.

    `weight_bytes` counts the layers, the final norm and the head; rows of the embedding are read when
    needed. `cache_bytes` is what K, V and the DeltaNet states take when all `ctx_tokens` are used.

    Raises BitsmithError where both together exceed `memory_bytes` (default: what is available now), for a
    `ctx_tokens` beyond the model's positions, and for tensors as `final_hidden_states` does.
    """

    def __init__(
        self, model: TextModel, ctx_tokens: int | None = None, memory_bytes: int | None = None
    ) -> None:
        self._model = model
        with quiet_transformers():
            self._network = Network(model)
        self._config = self._network.config
        self.ctx_tokens = _context(self._config, ctx_tokens, model)
        self.weight_bytes = 4 * sum(model.checkpoint[name].size for name in self._resident())
        self.cache_bytes = self._cache_bytes()
        self._refuse_beyond(available_bytes() if memory_bytes is None else memory_bytes)
        self._layers = [self._network.layer(index) for index in range(self._network.n_layers)]
        self._norm = self._network.norm(f"{model.arch.text_prefix}norm.")
        self._head = weight_of(model.head, model.checkpoint.path)
        self._stepped = False
        self.reset()

    def reset(self) -> None:
        """Forget the sequence."""
        self.n_tokens = 0
        self._cache: Any = DynamicCache(config=self._config)

    @torch.inference_mode()
    def feed(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Append `tokens` to the sequence and return the logits (`vocab`) of what follows the last.

        Raises BitsmithError for no tokens, more than the context has room for, ids without an embedding, and
        logits that are not finite.
        """
        if not tokens:
            raise BitsmithError("there are no tokens to continue", path=self._model.checkpoint.path)
        if self.n_tokens + len(tokens) > self.ctx_tokens:
            raise BitsmithError(
                f"{self.n_tokens + len(tokens)} tokens do not fit in a context of {self.ctx_tokens}",
                path=self._model.checkpoint.path,
            )
        # transformers says what it falls back to in its first steps; to silence it costs a tenth of a step
        with nullcontext() if self._stepped and len(tokens) == 1 else quiet_transformers():
            for start in range(0, len(tokens), _BLOCK_TOKENS):
                hidden = self._through(tokens[start : start + _BLOCK_TOKENS])
        self._stepped = self.n_tokens > len(tokens) == 1
        logits = torch.nn.functional.linear(self._norm(hidden[:, -1:]), self._head)
        found: NDArray[np.float32] = logits[0, 0].numpy()
        if not np.isfinite(found).all():
            raise BitsmithError(
                f"logits after {self.n_tokens} tokens are NaN or infinite", path=self._model.checkpoint.path
            )
        return found

    def _through(self, tokens: Sequence[int]) -> torch.Tensor:
        """Return the states (`1 T hidden`) behind the last layer."""
        stop = self.n_tokens + len(tokens)
        positions = torch.arange(self.n_tokens, stop)[None]
        states = np.empty((1, len(tokens), self._network.hidden_size), np.float32)
        embed(self._model, np.asarray(tokens, np.int64)[None], states)
        hidden = torch.from_numpy(states)
        rotary = self._network.rotary(hidden, positions)
        mask = None
        if self.n_tokens and len(tokens) > 1:  # otherwise scaled_dot_product_attention needs none
            mask = (torch.arange(stop)[None] <= positions[0][:, None])[None, None]
        for layer, kind in zip(self._layers, self._config.layer_types, strict=True):
            hidden = layer(
                hidden,
                position_embeddings=rotary,
                attention_mask=mask if kind == "full_attention" else None,
                position_ids=positions,
                past_key_values=self._cache,
            )
        self.n_tokens = stop
        return hidden

    def _resident(self) -> list[str]:
        """Return the names of the tensors that stay in memory."""
        prefix = self._model.arch.text_prefix
        kept = (f"{prefix}layers.", f"{prefix}norm.")
        layers = [name for name in self._model.checkpoint if name.startswith(kept)]
        return [*layers, self._model.head.name]

    def _cache_bytes(self) -> int:
        config = self._config
        n_full = list(config.layer_types).count("full_attention")
        full = 2 * config.num_key_value_heads * config.head_dim * self.ctx_tokens
        if n_full == len(config.layer_types):
            return int(4 * n_full * full)
        keys = config.linear_num_key_heads * config.linear_key_head_dim
        values = config.linear_num_value_heads * config.linear_value_head_dim
        state = values * config.linear_key_head_dim + (2 * keys + values) * config.linear_conv_kernel_dim
        return int(4 * (n_full * full + (len(config.layer_types) - n_full) * state))

    def _refuse_beyond(self, limit_bytes: int) -> None:
        if self.weight_bytes + self.cache_bytes > limit_bytes:
            raise BitsmithError(
                f"needs {self.weight_bytes} bytes for its weights in float32 and {self.cache_bytes} for the "
                f"states of {self.ctx_tokens} tokens, {limit_bytes} are available",
                path=self._model.checkpoint.path,
            )


def positions(model: TextModel, asked: int | None = None) -> int:
    """Return the positions that `model` has, or `asked`; BitsmithError where more are asked for."""
    with quiet_transformers():
        return _context(Network(model).config, asked, model)


def _context(config: Any, asked: int | None, model: TextModel) -> int:
    has = int(config.max_position_embeddings)
    if asked is not None and not 0 < asked <= has:
        raise BitsmithError(
            f"a context of {asked} tokens is asked for, the model has positions for {has}",
            path=model.checkpoint.path,
        )
    return has if asked is None else asked
