"""Checkpoints without an architecture file: roles guessed from the names that model families share."""

from __future__ import annotations

import re

from bitsmith.archs.arch import Component, TensorSpec
from bitsmith.store.checkpoint import Checkpoint, TensorRef

_PATTERNS: tuple[tuple[str, str], ...] = (
    ("norm", r"norm|(^|[._])ln(_?(f|\d+))?[._]|layer_?norm"),
    ("embed.position", r"position|wpe\.|token_type|pos_embed|rel_pos|relative_attention_bias"),
    (
        "embed",
        r"embed_tokens|word_embeddings?|wte\.|tok_embeddings|token_embd|shared\.|embed_in|embeddings?\.",
    ),
    ("head", r"lm_head|embed_out|(^|\.)output\.weight$|predictions\.decoder|(^|\.)(classifier|score)\."),
    ("attn.qkv", r"c_attn|qkv|query_key_value|in_proj_weight"),
    ("attn.q", r"q_proj|query|attn_q|(^|\.)wq\.|q_lin|(attn|attention)\.to_q|attention\.q\."),
    ("attn.k", r"k_proj|\.key\.|attn_k|(^|\.)wk\.|k_lin|(attn|attention)\.to_k|attention\.k\."),
    ("attn.v", r"v_proj|\.value\.|attn_v|(^|\.)wv\.|v_lin|(attn|attention)\.to_v|attention\.v\."),
    (
        "attn.o",
        r"o_proj|attention\.output|attn_output|(attn|attention)\.(c_proj|proj|dense|out|to_out|out_proj|wo)|out_lin"
        r"|attention\.o\.|self_attention\.dense",
    ),
    ("ffn.router", r"router|mlp\.gate\.|ffn_gate_inp|block_sparse_moe\.gate"),
    ("ffn.gate", r"gate_proj|ffn_gate|(^|\.)w1\.|wi_0|gate_up_proj|linear_v"),
    ("ffn.up", r"up_proj|ffn_up|(^|\.)w3\.|fc1|c_fc|intermediate\.dense|dense_h_to_4h|lin1|(^|\.)wi(_1)?\."),
    (
        "ffn.down",
        r"down_proj|ffn_down|(^|\.)w2\.|fc2|mlp\.c_proj|output\.dense|dense_4h_to_h|lin2|(^|\.)wo\.",
    ),
)
_VISION = re.compile(r"(^|\.)(visual|vision|vision_tower|vision_model|image_encoder)\.")
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blk|blocks?)\.(\d+)\.")
_COMPILED = tuple((role, re.compile(pattern)) for role, pattern in _PATTERNS)


def named_specs(checkpoint: Checkpoint) -> list[tuple[TensorSpec, TensorRef]]:
    """Return every tensor of any checkpoint with a role guessed from its name and shape; nothing is refused.

    Roles are those of the architecture files where a name says so (`embed`, `head`, `attn.q`, `ffn.down`,
    `norm`), else `other`; a vector is never a matrix of a projection: it is a `norm` or `other`.
    """
    return [(_spec(name, ref), ref) for name, ref in checkpoint.items()]


def role_of(name: str, dimensions: int) -> str:
    """Return the role that a tensor's name suggests.

    >>> role_of("encoder.layer.3.attention.self.query.weight", 2)
    'attn.q'
    """
    lowered = name.lower()
    if dimensions < 2:
        return "norm" if _COMPILED[0][1].search(lowered) else "other"
    return next((role for role, pattern in _COMPILED[1:] if pattern.search(lowered)), "other")


def _spec(name: str, ref: TensorRef) -> TensorSpec:
    component: Component = "vision" if _VISION.search(name) else "text"
    number = _LAYER.search(name)
    return TensorSpec(
        name,
        ref.shape,
        role_of(name, len(ref.shape)),
        ("",) * len(ref.shape),
        None,
        component=component,
        layer=int(number[1]) if number else None,
    )
