"""A whole text model in memory, its weights handed in: the forward that tuning differentiates."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint as recomputed

from bitsmith.archs import Architecture

Weights = Mapping[str, torch.Tensor]
"""Tensors by Hugging Face name without the text prefix (`layers.0.…`), with `lm_head.weight`."""

_LOGITS = 1 << 25  # of one slice of positions, each model: 128 MiB


class Student:
    """transformers' own layers, without weights of their own."""

    def __init__(self, arch: Architecture) -> None:
        module = importlib.import_module(arch.transformers_module)
        config = getattr(module, arch.config_class).from_dict(dict(arch.text_config))
        config._attn_implementation = "sdpa"
        self.n_layers = int(config.num_hidden_layers)
        with torch.device("meta"):
            layer = getattr(module, arch.layer_class)
            self._layers = [layer(config, index).eval() for index in range(self.n_layers)]
            self._norm = getattr(module, arch.norm_class)(config.hidden_size, eps=config.rms_norm_eps)
        self._rotary = getattr(module, arch.rotary_class)(config)

    def states(self, weights: Weights, tokens: torch.Tensor) -> torch.Tensor:
        """Return the final normed hidden states (`B T hidden`) of `tokens` (`B T`)."""
        hidden = torch.nn.functional.embedding(tokens, weights["embed_tokens.weight"])
        positions = torch.arange(tokens.shape[1])[None]
        rotary = self._rotary(hidden, positions)
        for index in range(self.n_layers):
            hidden = self.layer(index, weights, hidden, positions, rotary)
        normed: torch.Tensor = functional_call(self._norm, _under(weights, "norm."), (hidden,))
        return normed

    def layer(
        self, index: int, weights: Weights, hidden: torch.Tensor, positions: torch.Tensor, rotary: Any
    ) -> torch.Tensor:
        """Return the output (`B T hidden`) of one causal layer."""
        out: torch.Tensor = functional_call(
            self._layers[index],
            _under(weights, f"layers.{index}."),
            (hidden,),
            {
                "position_embeddings": rotary,
                "attention_mask": None,
                "position_ids": positions,
                "past_key_values": None,
            },
        )
        return out


def _under(weights: Weights, prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def divergence(
    states: torch.Tensor, head: torch.Tensor, teacher_states: torch.Tensor, teacher_head: torch.Tensor
) -> torch.Tensor:
    """Return KL(teacher‖student) in nats of each position (`N`), from normed states (`N hidden`) and heads.

    With gradients, logits beyond 128 MiB are computed again in the backward instead of kept.
    """
    step = max(1, _LOGITS // head.shape[0])
    if len(states) <= step:
        return _divergence(states, head, teacher_states, teacher_head)
    parts = [
        recomputed(
            _divergence,
            states[at : at + step],
            head,
            teacher_states[at : at + step],
            teacher_head,
            use_reentrant=False,
        )
        for at in range(0, len(states), step)
    ]
    return torch.cat(parts)


def _divergence(
    states: torch.Tensor, head: torch.Tensor, teacher_states: torch.Tensor, teacher_head: torch.Tensor
) -> torch.Tensor:
    with torch.no_grad():
        wanted = torch.log_softmax(teacher_states @ teacher_head.T, dim=-1)
    found = torch.log_softmax(states @ head.T, dim=-1)
    return torch.nn.functional.kl_div(found, wanted, reduction="none", log_target=True).sum(dim=-1)
