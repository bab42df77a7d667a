"""One decoder layer's tensors, named on both sides: the shared vocabulary of the Qwen architectures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bitsmith.archs.arch import Component, Step, TensorSpec

Axis = tuple[str, int]
Norm = Literal["w", "1+w"]


@dataclass(frozen=True)
class Block:
    """A layer: Hugging Face prefix (`model.layers.3.`), GGUF block number, site prefix (`layers.3`)."""

    prefix: str
    number: int
    site: str
    component: Component = "text"

    def matrix(
        self,
        name: str,
        role: str,
        rows: Axis,
        columns: Axis,
        gguf: str,
        site: str,
        steps: tuple[Step, ...] = (),
    ) -> TensorSpec:
        """Return the spec of a weight matrix `rows columns` that reads the activation `site`."""
        return TensorSpec(
            f"{self.prefix}{name}.weight",
            (rows[1], columns[1]),
            role,
            (rows[0], columns[0]),
            f"blk.{self.number}.{gguf}.weight",
            component=self.component,
            site=f"{self.site}.{site}",
            steps=steps,
            layer=self.number,
        )

    def norm(
        self, name: str, role: str, axis: Axis, gguf: str, norm: Norm, steps: tuple[Step, ...] = ()
    ) -> TensorSpec:
        """Return the spec of a norm weight."""
        return self.small(f"{name}.weight", role, (axis,), f"{gguf}.weight", steps, norm)

    def small(
        self,
        name: str,
        role: str,
        axes: tuple[Axis, ...],
        gguf: str,
        steps: tuple[Step, ...] = (),
        norm: Norm | None = None,
    ) -> TensorSpec:
        """Return the spec of a tensor that is too small to quantize and stays F32; names are whole."""
        return TensorSpec(
            f"{self.prefix}{name}",
            tuple(size for _, size in axes),
            role,
            tuple(label for label, _ in axes),
            f"blk.{self.number}.{gguf}",
            component=self.component,
            norm=norm,
            steps=steps,
            layer=self.number,
            float_only=True,
        )

    def attention(
        self,
        q_rows: Axis,
        head_dim: int,
        kv_heads: int,
        o_columns: int,
        hidden: int,
        norm: Norm,
        steps: tuple[Step, ...] = (),
    ) -> list[TensorSpec]:
        """Return q, k, v, o of grouped-query attention and q's and k's norms, exported by `steps`."""
        residual, channel, kv = ("residual", hidden), ("head.channel", head_dim), kv_heads * head_dim
        return [
            self.matrix("self_attn.q_proj", "attn.q", q_rows, residual, "attn_q", "mixer.in"),
            self.matrix("self_attn.k_proj", "attn.k", ("head.k", kv), residual, "attn_k", "mixer.in"),
            self.matrix("self_attn.v_proj", "attn.v", ("head.v", kv), residual, "attn_v", "mixer.in"),
            self.matrix(
                "self_attn.o_proj", "attn.o", residual, ("head.o", o_columns), "attn_output", "mixer.mid"
            ),
            self.norm("self_attn.q_norm", "norm.q", channel, "attn_q_norm", norm, steps),
            self.norm("self_attn.k_norm", "norm.k", channel, "attn_k_norm", norm, steps),
        ]

    def mlp(self, ffn: int, hidden: int) -> list[TensorSpec]:
        """Return gate, up and down of a gated feed-forward layer."""
        wide, residual = ("ffn", ffn), ("residual", hidden)
        return [
            self.matrix("mlp.gate_proj", "ffn.gate", wide, residual, "ffn_gate", "ffn.in"),
            self.matrix("mlp.up_proj", "ffn.up", wide, residual, "ffn_up", "ffn.in"),
            self.matrix("mlp.down_proj", "ffn.down", residual, wide, "ffn_down", "ffn.mid"),
        ]


def trunk(
    prefix: str, vocab: int, hidden: int, tied: bool, norm: Norm, steps: tuple[Step, ...] = ()
) -> tuple[TensorSpec, list[TensorSpec]]:
    """Return the token embedding, and what follows the layers: the final norm and an untied head."""
    table = ("vocab", "residual")
    embed = TensorSpec(f"{prefix}embed_tokens.weight", (vocab, hidden), "embed", table, "token_embd.weight")
    final = TensorSpec(
        f"{prefix}norm.weight",
        (hidden,),
        "norm.final",
        ("residual",),
        "output_norm.weight",
        norm=norm,
        steps=steps,
        float_only=True,
    )
    head = TensorSpec("lm_head.weight", (vocab, hidden), "head", table, "output.weight", site="head.in")
    return embed, [final] if tied else [final, head]
