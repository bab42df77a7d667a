"""Dense Qwen3 (`Qwen3ForCausalLM`): grouped-query attention with plain RMS norms on q and k."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitsmith.archs.arch import Architecture, TensorSpec
from bitsmith.archs.block import Block, trunk
from bitsmith.archs.llama_keys import shared_config, shared_metadata
from bitsmith.errors import UnsupportedError
from bitsmith.store.checkpoint import TensorRef


class Qwen3(Architecture):
    """Dense Qwen3; every norm acts as `w` and no value changes on export."""

    model_types = ("qwen3",)
    gguf_arch = "qwen3"
    transformers_module = "transformers.models.qwen3.modeling_qwen3"
    config_class = "Qwen3Config"
    layer_class = "Qwen3DecoderLayer"
    norm_class = "Qwen3RMSNorm"
    rotary_class = "Qwen3RotaryEmbedding"
    default_head_dim = 128

    @property
    def text_prefix(self) -> str:
        """Prefix of the text model's tensor names: `model.`, none where `Qwen3Model` alone was saved."""
        return "" if "embed_tokens.weight" in (self.names or ()) else "model."

    def specs(self) -> list[TensorSpec]:
        """Return every tensor the config calls for, in block order."""
        vocab, hidden = self.number("vocab_size"), self.number("hidden_size")
        embed, after = trunk(self.text_prefix, vocab, hidden, self.tied, "w")
        layers = range(self.number("num_hidden_layers"))
        return [embed, *(spec for n in layers for spec in self._layer(n)), *after]

    def _layer(self, n: int) -> list[TensorSpec]:
        block = Block(f"{self.text_prefix}layers.{n}.", n, f"layers.{n}")
        hidden, q = self.number("hidden_size"), self.number("num_attention_heads") * self.head_dim
        residual, kv_heads = ("residual", hidden), self.number("num_key_value_heads")
        return [
            block.norm("input_layernorm", "norm.mixer", residual, "attn_norm", "w"),
            *block.attention(("head.q", q), self.head_dim, kv_heads, q, hidden, "w"),
            block.norm("post_attention_layernorm", "norm.ffn", residual, "ffn_norm", "w"),
            *block.mlp(self.number("intermediate_size"), hidden),
        ]

    def gguf_metadata(self) -> dict[str, Any]:
        """Return the architecture's GGUF key/values."""
        layer_types = self.text_config.get("layer_types") or []
        if self.text_config.get("use_sliding_window") or "sliding_attention" in layer_types:
            raise UnsupportedError("sliding window attention is not supported by llama.cpp's qwen3")
        return shared_metadata(self, self.number("num_hidden_layers"))

    @classmethod
    def config_from_gguf(
        cls, metadata: Mapping[str, Any], tensors: Mapping[str, TensorRef]
    ) -> dict[str, Any]:
        """Return the Hugging Face config that exports to `metadata`."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            **shared_config(cls.gguf_arch, metadata, tensors),
        }
