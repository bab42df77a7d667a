"""Decoder layers whose gradients by their inputs cost little: what no gradient needs is not computed."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from bitsmith.numerics.delta import convolve, gate_linear
from bitsmith.numerics.delta_gradient import convolve_gradient, gate_linear_gradient
from bitsmith.run.delta_backward import delta_rule, delta_rule_gradient
from bitsmith.run.fused import recast

_EPSILON = 1e-6  # of the length of q and k


def differentiable(layer: torch.nn.Module) -> torch.nn.Module:
    """Give a decoder layer of transformers gradients by its input alone, without its output's values.

    Gated DeltaNets and MLPs get gradients of their own, for float32 on the CPU; the product of an MLP's last
    matrix, which is added to the residual stream and read by no gradient, is left out. Hooks see all other
    inputs and outputs of matrices, and every gradient.
    """
    for module in recast(layer.requires_grad_(False), _DeltaNet, _Mlp).modules():
        if isinstance(module, _Mlp):
            module.down_proj.__class__ = _Unread
    return layer


class _Mlp:
    """A gated MLP that keeps nothing but its two products for the gradient."""

    gate_proj: torch.nn.Module
    up_proj: torch.nn.Module
    down_proj: torch.nn.Module

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        inner = _GateLinear.apply(self.gate_proj(inputs), self.up_proj(inputs))  # type: ignore[no-untyped-call]
        found: torch.Tensor = self.down_proj(inner)
        return found


class _GateLinear(torch.autograd.Function):
    """silu(gate) · up; its gradients take the place of both."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.gate, ctx.up = gate, up
        found = gate.clone()
        gate_linear(found.flatten(0, -2).numpy(), up.flatten(0, -2).numpy())
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_product: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.gate.detach(), ctx.up.detach()
        gate_linear_gradient(*(part.flatten(0, -2).numpy() for part in (gate, up, by_product)))
        return gate, up


class _Unread(torch.nn.Linear):
    """A linear layer whose gradient is wanted and whose values are not: they are zeros."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = _UnreadProduct.apply(inputs, self.weight)  # type: ignore[no-untyped-call]
        return found


class _UnreadProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.weight = weight
        return inputs.new_zeros(()).expand(*inputs.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_product: torch.Tensor) -> tuple[torch.Tensor, None]:
        return by_product @ ctx.weight, None


class _DeltaNet:
    """A gated DeltaNet over whole sequences, each from an empty state."""

    def forward(self: Any, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        mixed, gates = self.in_proj_qkv(hidden_states), self.in_proj_z(hidden_states)
        beta = self.in_proj_b(hidden_states).sigmoid()
        steps = torch.nn.functional.softplus(self.in_proj_a(hidden_states) + self.dt_bias)
        shape = self.num_k_heads, self.head_k_dim, self.num_v_heads, self.head_v_dim
        taps = self.conv1d.weight[:, 0].T.contiguous()
        log_decay = -self.A_log.exp() * steps
        made = _DeltaRule.apply(mixed, log_decay, beta, taps, shape)  # type: ignore[no-untyped-call]
        normed = self.norm(made.reshape(-1, self.head_v_dim), gates.reshape(-1, self.head_v_dim))
        found: torch.Tensor = self.out_proj(normed.reshape(gates.shape))
        return found


class _DeltaRule(torch.autograd.Function):
    """Convolution, lengths of q and k, and the recurrence of each sequence."""

    @staticmethod
    def forward(
        ctx: Any,
        mixed: torch.Tensor,
        log_decay: torch.Tensor,
        beta: torch.Tensor,
        taps: torch.Tensor,
        shape: tuple[int, int, int, int],
    ) -> torch.Tensor:
        ctx.sequences = [_Sequence(part, taps, shape) for part in mixed]
        parts = zip(ctx.sequences, log_decay, beta, strict=True)
        return torch.stack([sequence.run(decays.T, rates.T) for sequence, decays, rates in parts])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        parts = zip(ctx.sequences, by_out, strict=True)
        found = zip(*(sequence.gradient(by) for sequence, by in parts), strict=True)
        by_mixed, by_decay, by_beta = map(torch.stack, found)
        return by_mixed, by_decay, by_beta, None, None


class _Sequence:
    """One sequence's pass, and what its gradient needs of it."""

    def __init__(self, mixed: torch.Tensor, taps: torch.Tensor, shape: tuple[int, int, int, int]) -> None:
        self._mixed, self._taps, self._shape = mixed, taps, shape

    def run(self, log_decay: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
        """Return the recurrence's output (`T vheads dv`); decays and rates are `vheads T`."""
        k_heads, dk, v_heads, dv = self._shape
        convolved = self._mixed.clone()
        convolve(convolved.numpy(), self._taps.numpy())
        queries, keys, values = torch.split(convolved, [k_heads * dk, k_heads * dk, v_heads * dv], -1)
        self._q, self._k = _Lengths(_heads(queries, k_heads)), _Lengths(_heads(keys, k_heads))
        times = v_heads // k_heads
        of_q, of_k = (part.unit.repeat_interleave(times, 0) for part in (self._q, self._k))
        found, self._saved = delta_rule(of_q * dk**-0.5, of_k, _heads(values, v_heads), log_decay, beta)
        return found.transpose(0, 1)

    def gradient(self, by_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the gradients by what is convolved (`T channels`), decays and rates (`T vheads` each)."""
        k_heads, dk, *_ = self._shape
        by_q, by_k, by_v, by_decay, by_beta = delta_rule_gradient(self._saved, by_out.transpose(0, 1))
        of_q, of_k = (part.reshape(k_heads, -1, *part.shape[1:]).sum(1) for part in (by_q, by_k))
        parts = self._q.gradient(of_q * dk**-0.5), self._k.gradient(of_k), by_v
        by_convolved = torch.cat([part.transpose(0, 1).flatten(1) for part in parts], -1)
        convolve_gradient(self._mixed.numpy(), self._taps.numpy(), by_convolved.numpy())
        return by_convolved, by_decay.T, by_beta.T


class _Lengths:
    """Vectors (`… n`) brought to length 1."""

    def __init__(self, rows: torch.Tensor) -> None:
        self._inverse = torch.rsqrt(rows.square().sum(-1, keepdim=True) + _EPSILON)
        self.unit = rows * self._inverse

    def gradient(self, by_unit: torch.Tensor) -> torch.Tensor:
        along = (by_unit * self.unit).sum(-1, keepdim=True)
        return (by_unit - self.unit * along).mul_(self._inverse)


def _heads(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Return `T heads·n` as `heads T n`."""
    return rows.reshape(len(rows), heads, -1).transpose(0, 1).contiguous()
