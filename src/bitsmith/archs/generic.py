"""Checkpoints without an architecture file: roles guessed from the names that model families share."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from bitsmith.archs.arch import Component, TensorSpec
from bitsmith.store.checkpoint import Checkpoint, ComputedTensor, Rows, TensorRef

_PATTERNS: tuple[tuple[str, str], ...] = (
    ("norm", r"norm|(^|[._])ln(_?(f|\d+))?[._]|layer_?norm"),
    ("embed.position", r"position|wpe\.|token_type|pos_embed|rel_pos|relative_attention_bias"),
    (
        "embed",
        r"embed_tokens|word_embeddings?|wte\.|tok_embeddings|token_embd|shared\.|embed_in|embeddings?\.",
    ),
    ("head", r"lm_head|embed_out|(^|\.)output\.weight$|predictions\.decoder|(^|\.)(classifier|score)\."),
    ("delta.in_qkv", r"linear_attn\.in_proj_qkvz?\."),
    ("delta.in_z", r"linear_attn\.in_proj_z\."),
    ("delta.in_b", r"linear_attn\.in_proj_ba?\."),
    ("delta.in_a", r"linear_attn\.in_proj_a\."),
    ("delta.out", r"linear_attn\.out_proj\."),
    ("delta.conv", r"linear_attn\.conv1d\."),
    ("attn.qkv", r"c_attn|qkv|query_key_value|in_proj_weight"),
    ("attn.q", r"q_proj|query|attn_q|(^|\.)wq\.|q_lin|(attn|attention)\.to_q|attention\.q\."),
    ("attn.k", r"k_proj|\.key\.|attn_k|(^|\.)wk\.|k_lin|(attn|attention)\.to_k|attention\.k\."),
    ("attn.v", r"v_proj|\.value\.|attn_v|(^|\.)wv\.|v_lin|(attn|attention)\.to_v|attention\.v\."),
    (
        "attn.o",
        r"o_proj|attention\.output|attn_output|(attn|attention)\.(c_proj|proj|dense|out|to_out|out_proj|wo)|out_lin"
        r"|attention\.o\.|self_attention\.dense",
    ),
    ("ffn.router", r"router|mlp\.gate\.|ffn_gate_inp|block_sparse_moe\.gate|shared_expert_gate"),
    ("ffn.gate", r"gate_proj|ffn_gate|(^|\.)w1\.|wi_0|gate_up_proj|linear_v"),
    ("ffn.up", r"up_proj|ffn_up|(^|\.)w3\.|fc1|c_fc|intermediate\.dense|dense_h_to_4h|lin1|(^|\.)wi(_1)?\."),
    (
        "ffn.down",
        r"down_proj|ffn_down|(^|\.)w2\.|fc2|mlp\.c_proj|output\.dense|dense_4h_to_h|lin2|(^|\.)wo\.",
    ),
)
_VISION = re.compile(r"(^|\.)(visual|vision|vision_tower|vision_model|image_encoder)\.")
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blk|blocks?)\.(\d+)\.")
_EXPERTS = re.compile(r"(^|\.)experts\.|_exps\.")
_READERS = ("ffn.gate", "ffn.up", "attn.qkv", "attn.q", "attn.k", "attn.v")
_COMPILED = tuple((role, re.compile(pattern)) for role, pattern in _PATTERNS)


def named_specs(checkpoint: Checkpoint) -> list[tuple[TensorSpec, TensorRef]]:
    """Return every tensor of any checkpoint with a role guessed from its name and shape; nothing is refused.

    Roles are those of the architecture files where a name says so (`embed`, `head`, `attn.q`, `ffn.down`,
    `norm`), else `other`; a vector is never a matrix of a projection: it is a `norm` or `other`. A stack of
    experts (`E out in`) is `E` matrices, `NAME[0]` and on, and a projection that the config's hidden size
    shows to be stored `in out`, as GPT-2's and Llama 4's are, is turned.
    """
    hidden = _hidden_size(checkpoint)
    return [
        (spec, _turned(spec, ref, hidden))
        for name, stored in checkpoint.items()
        for spec, ref in _matrices(spec_by_name(name, stored), stored)
    ]


def _matrices(spec: TensorSpec, ref: TensorRef) -> Iterator[tuple[TensorSpec, TensorRef]]:
    stacked = 2 if spec.name.endswith("bias") else 3
    if len(ref.shape) != stacked or not _EXPERTS.search(spec.name):
        yield spec, ref
        return
    for n in range(ref.shape[0]):
        name, shape = f"{spec.name}[{n}]", ref.shape[1:]
        yield replace(spec, name=name, shape=shape, axes=("",) * len(shape)), _expert(ref, n, name)


def _expert(stack: TensorRef, n: int, name: str) -> TensorRef:
    def read(start: int, stop: int) -> Rows:
        expert: Rows = stack.read(n, n + 1)[0]
        return expert[start:stop]

    return ComputedTensor(name, stack.shape[1:], stack.dtype, read)


def _turned(spec: TensorSpec, ref: TensorRef, hidden: int | None) -> TensorRef:
    """Return a matrix as `out in`: what reads the residual stream has its size last, what writes it first."""
    residual = {"ffn.down": 0, "attn.o": 0}.get(spec.role, 1 if spec.role in _READERS else None)
    if residual is None or len(ref.shape) != 2 or ref.shape[residual] == hidden:
        return ref
    if ref.shape[1 - residual] != hidden:
        return ref
    return ComputedTensor(ref.name, ref.shape[::-1], ref.dtype, lambda a, b: ref.read()[:, a:b].T)


def _hidden_size(checkpoint: Checkpoint) -> int | None:
    nested = checkpoint.config.get("text_config")
    config = nested if isinstance(nested, Mapping) else checkpoint.config
    found = next((config[key] for key in ("hidden_size", "n_embd", "d_model") if config.get(key)), None)
    return found if type(found) is int else None


def role_of(name: str, dimensions: int) -> str:
    """Return the role that a tensor's name suggests.

    >>> role_of("encoder.layer.3.attention.self.query.weight", 2)
    'attn.q'
    """
    lowered = name.lower()
    if dimensions < 2:
        return "norm" if _COMPILED[0][1].search(lowered) else "other"
    return next((role for role, pattern in _COMPILED[1:] if pattern.search(lowered)), "other")


def spec_by_name(name: str, ref: TensorRef) -> TensorSpec:
    """Return what a tensor's name and shape suggest that it is."""
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
