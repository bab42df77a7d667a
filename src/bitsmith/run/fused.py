"""Leaner forwards for transformers' own layers: the same modules and sums, without copies between them."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch

from bitsmith.numerics.delta import convolve, delta_rule, gate_linear

_SILU = ("SiLU", "SiLUActivation")


def fused(layer: torch.nn.Module) -> torch.nn.Module:
    """Let a decoder layer's gated DeltaNet and MLP run in place; for float32 on the CPU, without gradients.

    Between the matrix products, which stay torch's and whose inputs hooks still see, what transformers does
    in a dozen operations over whole arrays is done where it lies. Equal to transformers' up to rounding. A
    call with a cache or a mask takes transformers' own way, as do layers of other kinds. BLAS must be held at
    one thread (`one_blas_thread`).
    """
    return recast(layer, _DeltaNet, _Mlp)


def recast(layer: torch.nn.Module, delta_net: type[Any], mlp: type[Any]) -> torch.nn.Module:
    """Let a layer's gated DeltaNet and gated MLP take the forwards of these classes; others stay."""
    for module in layer.modules():
        kind = delta_net if _is_delta_net(module) else mlp if _is_mlp(module) else None
        if kind is not None:  # by class: an attribute that knows its module would keep the layer alive
            module.__class__ = _with_forward_of(kind, type(module))  # type: ignore[arg-type]
    return layer


def _is_delta_net(module: Any) -> bool:
    named = type(module).__name__.endswith("GatedDeltaNet")
    return named and module.conv1d.bias is None and module.activation == "silu"


def _is_mlp(module: Any) -> bool:
    parts = {name for name, _ in module.named_children()}
    return parts >= {"gate_proj", "up_proj", "down_proj"} and type(module.act_fn).__name__ in _SILU


@cache
def _with_forward_of(lean: type[Any], kind: type[Any]) -> type[Any]:
    return type(lean.__name__, (lean, kind), {})


class _Mlp:
    """A gated MLP whose product of gate and input lies where the gate was."""

    gate_proj: torch.nn.Module
    up_proj: torch.nn.Module
    down_proj: torch.nn.Module

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(inputs), self.up_proj(inputs)
        gate_linear(gate.flatten(0, -2).numpy(), up.flatten(0, -2).numpy())
        found: torch.Tensor = self.down_proj(gate)
        return found


class _DeltaNet:
    """A gated DeltaNet over whole sequences, each from an empty state."""

    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        cache_params: Any = None,
        attention_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        if cache_params is not None or attention_mask is not None:
            plain: torch.Tensor = super().forward(hidden_states, cache_params, attention_mask, **options)  # type: ignore[misc]
            return plain
        mixed, gates = self.in_proj_qkv(hidden_states), self.in_proj_z(hidden_states)
        beta = self.in_proj_b(hidden_states).sigmoid()
        steps = torch.nn.functional.softplus(self.in_proj_a(hidden_states) + self.dt_bias)
        log_decay = -self.A_log.exp() * steps
        taps = np.ascontiguousarray(self.conv1d.weight.detach()[:, 0].T.numpy())
        shape = self.num_k_heads, self.head_k_dim, self.num_v_heads, self.head_v_dim
        weight, epsilon = self.norm.weight.detach().numpy(), float(self.norm.variance_epsilon)
        for sequence in zip(mixed, log_decay, beta, gates, strict=True):
            values, decays, rates, gate = (part.numpy() for part in sequence)
            convolve(values, taps)
            delta_rule(values, shape, decays, rates, weight, epsilon, gate)
        found: torch.Tensor = self.out_proj(gates)
        return found
