"""Qwen3.5 (`qwen3_5`, `qwen3_5_text`): gated DeltaNet layers with a full-attention layer every fourth.

Linear attention keeps V heads grouped by their K head; llama.cpp broadcasts K heads tiled, so V heads are
reordered `[K, V/K, d] -> [V/K, K, d]` wherever they are an axis. All norms but `linear_attn.norm` act as
`1 + w`.
Layouts checked against transformers' modeling_qwen3_5.py and llama.cpp's src/models/qwen35.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from bitsmith.archs.arch import Architecture, Component, Step, TensorSpec
from bitsmith.archs.block import Block, trunk
from bitsmith.archs.llama_keys import gguf_int, real, rope_of, shared_config, shared_metadata
from bitsmith.archs.steps import AddOne, NegativeExp, Permutation, PermuteColumns, PermuteRows, SqueezeKernel
from bitsmith.errors import BitsmithError, UnsupportedError, printable
from bitsmith.store.checkpoint import TensorRef

_DEFAULT_MROPE_SECTION = [11, 11, 10, 0]
_LAYER_TYPES = ("linear_attention", "full_attention")
_PREFIXES = ("model.language_model.", "model.", "language_model.", "")
_ROTARY_SHARE = 0.25
_MAX_CHANNELS = 1 << 22
_ADD_ONE = (AddOne(),)


def tiled_order(k_heads: int, v_heads: int, head_dim: int) -> Permutation:
    """Return the row order that turns V heads grouped by K head into llama.cpp's tiled order.

    Row `(r, k, d)` of `[V/K, K, d]` is row `(k, r, d)` of `[K, V/K, d]`.
    """
    grouped = np.arange(v_heads * head_dim, dtype=np.intp).reshape(k_heads, v_heads // k_heads, head_dim)
    return grouped.transpose(1, 0, 2).reshape(-1)


class Qwen35(Architecture):
    """Qwen3.5: text alone, or nested in a vision-language checkpoint, with its MTP layer where stored."""

    model_types = ("qwen3_5", "qwen3_5_text")
    gguf_arch = "qwen35"
    transformers_module = "transformers.models.qwen3_5.modeling_qwen3_5"
    config_class = "Qwen3_5TextConfig"
    layer_class = "Qwen3_5DecoderLayer"
    norm_class = "Qwen3_5RMSNorm"
    rotary_class = "Qwen3_5TextRotaryEmbedding"
    default_head_dim = 256

    @property
    def text_prefix(self) -> str:
        """`model.language_model.` beside vision, else `model.`; a bare model was saved without `model.`."""
        if self.names is None:
            return _PREFIXES[0] if "text_config" in self.config else _PREFIXES[1]
        return next((p for p in _PREFIXES if f"{p}embed_tokens.weight" in self.names), _PREFIXES[1])

    @property
    def layer_types(self) -> list[str]:
        """`linear_attention` or `full_attention` for each text layer."""
        layers = self.number("num_hidden_layers")
        given = self.text_config.get("layer_types")
        if given is None:
            interval = self.number("full_attention_interval", 4)
            return [_LAYER_TYPES[(n + 1) % interval == 0] for n in range(layers)]
        if not isinstance(given, list) or len(given) != layers or any(k not in _LAYER_TYPES for k in given):
            raise BitsmithError(
                f"config.json: layer_types is {printable(repr(given))}, "
                f"expected {layers} of {' and '.join(_LAYER_TYPES)}"
            )
        return given

    @property
    def mtp_layers(self) -> int:
        """Number of MTP layers: as many as are stored, or as the config says where nothing is stored yet."""
        if self.names is None:
            said = self.text_config.get("mtp_num_hidden_layers") or 0
            return self.number("mtp_num_hidden_layers") if said else 0
        found = [int(m[1]) for m in map(re.compile(r"mtp\.layers\.(\d+)\.").match, self.names) if m]
        return min(max(found, default=-1) + 1, len(self.names))

    def set_aside(self, name: str) -> Component | None:
        """Vision tensors are claimed by prefix: they belong to llama.cpp's separate mmproj file."""
        return "vision" if name.startswith(("model.visual.", "visual.")) else None

    @property
    def rotary_dim(self) -> int:
        """Leading channels of a head that RoPE turns."""
        return int(self.head_dim * real(rope_of(self), "partial_rotary_factor", _ROTARY_SHARE))

    def axes_aside(self, name: str, shape: tuple[int, ...]) -> tuple[str, ...]:
        """Return labels: the merger's last layer writes image tokens into the residual stream."""
        return ("residual" if "visual.merger.linear_fc2." in name else "", *("",) * (len(shape) - 1))

    def specs(self) -> list[TensorSpec]:
        """Return every text and MTP tensor, in block order, then the vision tensors of `vision_config`."""
        hidden, prefix = self.number("hidden_size"), self.text_prefix
        embed, after = trunk(prefix, self.number("vocab_size"), hidden, self.tied, "1+w", _ADD_ONE)
        delta = _DeltaShapes(self)
        text = [
            spec
            for n, kind in enumerate(self.layer_types)
            for spec in self._layer(Block(f"{prefix}layers.{n}.", n, f"layers.{n}"), kind, delta)
        ]
        vision = self.config.get("vision_config")
        seen = _vision_specs(vision) if self.names is None and isinstance(vision, Mapping) else []
        return [embed, *text, *self._mtp(), *after, *seen]

    def _layer(self, block: Block, kind: str, delta: _DeltaShapes) -> list[TensorSpec]:
        hidden = self.number("hidden_size")
        residual = ("residual", hidden)
        mixer = self._attention(block) if kind == "full_attention" else delta.specs(block)
        return [
            block.norm("input_layernorm", "norm.mixer", residual, "attn_norm", "1+w", _ADD_ONE),
            *mixer,
            block.norm(
                "post_attention_layernorm", "norm.ffn", residual, "post_attention_norm", "1+w", _ADD_ONE
            ),
            *block.mlp(self.number("intermediate_size"), hidden),
        ]

    def _attention(self, block: Block) -> list[TensorSpec]:
        # q_proj holds, per head, head_dim query rows and then head_dim gate rows; GGUF keeps them so
        q = self.number("num_attention_heads") * self.head_dim
        kv_heads, hidden = self.number("num_key_value_heads"), self.number("hidden_size")
        return block.attention(("head.q+gate", 2 * q), self.head_dim, kv_heads, q, hidden, "1+w", _ADD_ONE)

    def _mtp(self) -> list[TensorSpec]:
        if self.mtp_layers == 0:
            return []
        first, hidden = self.number("num_hidden_layers"), self.number("hidden_size")
        head = Block("mtp.", first, "mtp", "mtp")
        residual = ("residual", hidden)
        layers = [
            spec
            for n in range(self.mtp_layers)
            for spec in self._layer(
                Block(f"mtp.layers.{n}.", first + n, f"mtp.layers.{n}", "mtp"),
                "full_attention",
                _DeltaShapes(self),
            )
        ]
        norms = {
            "pre_fc_norm_embedding": ("norm.mtp.embedding", "nextn.enorm"),
            "pre_fc_norm_hidden": ("norm.mtp.hidden", "nextn.hnorm"),
            "norm": ("norm.mtp.final", "nextn.shared_head_norm"),
        }
        return [
            *layers,
            head.matrix("fc", "mtp.fc", residual, ("mtp.pair", 2 * hidden), "nextn.eh_proj", "fc.in"),
            *(head.norm(name, role, residual, gguf, "1+w", _ADD_ONE) for name, (role, gguf) in norms.items()),
        ]

    def gguf_metadata(self) -> dict[str, Any]:
        """Return the architecture's GGUF key/values; the block count includes the MTP layers."""
        name, layers, mtp = self.gguf_arch, self.number("num_hidden_layers"), self.mtp_layers
        delta = _DeltaShapes(self)
        if delta.k_dim != delta.v_dim:
            raise UnsupportedError(
                f"linear_key_head_dim {delta.k_dim} differs from linear_value_head_dim {delta.v_dim}, "
                "which llama.cpp's qwen35 cannot hold"
            )
        keys = shared_metadata(self, layers + mtp)
        keys.setdefault(f"{name}.rope.dimension_sections", list(_DEFAULT_MROPE_SECTION))
        keys |= {
            f"{name}.ssm.conv_kernel": delta.width,
            f"{name}.ssm.state_size": delta.k_dim,
            f"{name}.ssm.group_count": delta.k_heads,
            f"{name}.ssm.time_step_rank": delta.v_heads,
            f"{name}.ssm.inner_size": delta.v_heads * delta.v_dim,
        }
        if self.text_config.get("layer_types") is not None:
            recurrent = [kind == "linear_attention" for kind in self.layer_types]
            keys[f"{name}.attention.recurrent_layers"] = recurrent + [False] * mtp
        keys[f"{name}.full_attention_interval"] = self.number("full_attention_interval", 4)
        keys[f"{name}.rope.dimension_count"] = self.rotary_dim
        if mtp:
            keys[f"{name}.nextn_predict_layers"] = mtp
        return keys

    @classmethod
    def config_from_gguf(
        cls, metadata: Mapping[str, Any], tensors: Mapping[str, TensorRef]
    ) -> dict[str, Any]:
        """Return the Hugging Face config of a text-only checkpoint that exports to `metadata`."""
        name = cls.gguf_arch
        config = shared_config(name, metadata, tensors)
        layers, v_heads = config["num_hidden_layers"], gguf_int(metadata, f"{name}.ssm.time_step_rank")
        interval = gguf_int(metadata, f"{name}.full_attention_interval", 4)
        recurrent = metadata.get(f"{name}.attention.recurrent_layers")
        if not isinstance(recurrent, list):
            recurrent = [(n + 1) % interval != 0 for n in range(layers)]
        config["rope_parameters"] |= {
            "partial_rotary_factor": gguf_int(metadata, f"{name}.rope.dimension_count") / config["head_dim"],
            "mrope_interleaved": True,
        }
        mtp = gguf_int(metadata, f"{name}.nextn_predict_layers", 0)
        return {
            "architectures": ["Qwen3_5ForCausalLM"],
            "model_type": "qwen3_5_text",
            **config,
            "layer_types": [_LAYER_TYPES[not linear] for linear in recurrent[:layers]],
            "full_attention_interval": interval,
            "linear_conv_kernel_dim": gguf_int(metadata, f"{name}.ssm.conv_kernel"),
            "linear_key_head_dim": gguf_int(metadata, f"{name}.ssm.state_size"),
            "linear_value_head_dim": gguf_int(metadata, f"{name}.ssm.inner_size") // v_heads,
            "linear_num_key_heads": gguf_int(metadata, f"{name}.ssm.group_count"),
            "linear_num_value_heads": v_heads,
            **({"mtp_num_hidden_layers": mtp} if mtp else {}),
        }


class _DeltaShapes:
    """The sizes of a gated DeltaNet layer and the steps of its export, shared by all layers."""

    def __init__(self, arch: Architecture) -> None:
        self.hidden = arch.number("hidden_size")
        self.k_heads = arch.number("linear_num_key_heads", 16)
        self.v_heads = arch.number("linear_num_value_heads", 32)
        self.k_dim = arch.number("linear_key_head_dim", 128)
        self.v_dim = arch.number("linear_value_head_dim", 128)
        self.width = arch.number("linear_conv_kernel_dim", 4)
        if self.v_heads % self.k_heads:
            raise BitsmithError(
                f"config.json: linear_num_value_heads {self.v_heads} is not a multiple of "
                f"linear_num_key_heads {self.k_heads}"
            )
        self.qk, self.v = 2 * self.k_heads * self.k_dim, self.v_heads * self.v_dim
        if self.qk + self.v > _MAX_CHANNELS:
            raise BitsmithError(
                f"config.json: {self.qk + self.v} linear attention channels are beyond any model"
            )
        self.qkv_steps: tuple[Step, ...] = ()
        self.v_steps: tuple[Step, ...] = ()
        self.head_steps: tuple[Step, ...] = ()
        self.out_steps: tuple[Step, ...] = ()
        if self.k_heads != self.v_heads:
            channels = tiled_order(self.k_heads, self.v_heads, self.v_dim)
            mixed = np.concatenate([np.arange(self.qk, dtype=np.intp), self.qk + channels])
            self.qkv_steps = (PermuteRows(mixed),)
            self.v_steps = (PermuteRows(channels),)
            self.head_steps = (PermuteRows(tiled_order(self.k_heads, self.v_heads, 1)),)
            self.out_steps = (PermuteColumns(channels),)

    def specs(self, block: Block) -> list[TensorSpec]:
        """Return the specs of `linear_attn.*`."""
        residual, heads = ("residual", self.hidden), ("delta.head", self.v_heads)
        qkv, v = ("delta.qkv", self.qk + self.v), ("delta.v", self.v)
        kernel = (qkv, ("one", 1), ("kernel", self.width))
        at, site = "linear_attn.", "mixer.in"
        decay = (*self.head_steps, NegativeExp())
        return [
            block.matrix(f"{at}in_proj_qkv", "delta.in_qkv", qkv, residual, "attn_qkv", site, self.qkv_steps),
            block.matrix(f"{at}in_proj_z", "delta.in_z", v, residual, "attn_gate", site, self.v_steps),
            block.matrix(f"{at}in_proj_b", "delta.in_b", heads, residual, "ssm_beta", site, self.head_steps),
            block.matrix(f"{at}in_proj_a", "delta.in_a", heads, residual, "ssm_alpha", site, self.head_steps),
            block.small(
                f"{at}conv1d.weight",
                "delta.conv",
                kernel,
                "ssm_conv1d.weight",
                (SqueezeKernel(), *self.qkv_steps),
            ),
            block.small(f"{at}A_log", "delta.decay", (heads,), "ssm_a", decay),
            block.small(f"{at}dt_bias", "delta.dt", (heads,), "ssm_dt.bias", self.head_steps),
            block.norm(f"{at}norm", "norm.delta", ("delta.channel", self.v_dim), "ssm_norm", "w"),
            block.matrix(f"{at}out_proj", "delta.out", residual, v, "ssm_out", "mixer.mid", self.out_steps),
        ]


def _vision_specs(config: Mapping[str, Any]) -> list[TensorSpec]:
    """Return the vision tower's tensors; shapes from transformers' Qwen3_5VisionModel."""
    hidden, ffn, out = (int(config[key]) for key in ("hidden_size", "intermediate_size", "out_hidden_size"))
    patch, time = int(config.get("patch_size", 16)), int(config.get("temporal_patch_size", 2))
    merged = hidden * int(config.get("spatial_merge_size", 2)) ** 2
    linears = {
        "patch_embed.proj": (hidden, int(config.get("in_channels", 3)), time, patch, patch),
        "merger.norm": (hidden,),
        "merger.linear_fc1": (merged, merged),
        "merger.linear_fc2": (out, merged),
    }
    for n in range(int(config["depth"])):
        linears |= {
            f"blocks.{n}.norm1": (hidden,),
            f"blocks.{n}.norm2": (hidden,),
            f"blocks.{n}.attn.qkv": (3 * hidden, hidden),
            f"blocks.{n}.attn.proj": (hidden, hidden),
            f"blocks.{n}.mlp.linear_fc1": (ffn, hidden),
            f"blocks.{n}.mlp.linear_fc2": (hidden, ffn),
        }
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed.weight": (int(config.get("num_position_embeddings", 2304)), hidden)
    }
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return [
        TensorSpec(f"model.visual.{name}", shape, "vision", ("",) * len(shape), None, component="vision")
        for name, shape in shapes.items()
    ]
