"""How alike the attention of two layers is: KL divergence of their heads' weights, and heads' entropy.

A head's weights for a query are `softmax(q · k / √d)` over the tokens up to it; q and k are taken from
transformers' own attention, behind norms and rotary embedding. A chunk's first token has nothing to choose
from and does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AttentionInterface

from bitsmith.errors import BitsmithError
from bitsmith.numerics.divergence import Estimate
from bitsmith.numerics.resampling import ratio_of_sums
from bitsmith.passes.merge_axes import Index, is_selection
from bitsmith.passes.merge_fold import LayerAlpha, LayerMerge, merged_view
from bitsmith.passes.merge_heads import Groups, HeadMap
from bitsmith.passes.transform import Model
from bitsmith.run.forward import Network, TextModel, quiet_transformers
from bitsmith.run.sites import aligned, site_workers
from bitsmith.store.checkpoint import Checkpoint, View

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

_NAME = "bitsmith_queries_and_keys"
_UNREAD = ("v_proj.", "o_proj.")
_BLOCK_ENTRIES = 1 << 22  # attention weights at a time


@dataclass(frozen=True)
class AttentionKl:
    """Mean KL(student‖other) of a query's attention by KV group, in nats.

    `teacher` is of the teacher's heads that the student's are taken from, each model on its own states; the
    others are of the student's layer with the teacher's weights in it, on the student's states: `merged` at
    the shares it has, `folded` wholly the teacher's, `unturned` the same without its block rotations (None:
    it has none).
    """

    teacher: list[Estimate]
    merged: list[Estimate]
    folded: list[Estimate]
    unturned: list[Estimate] | None


def attention_kl(
    teacher: Model, student: Model, layer: int, merge: LayerMerge, states: tuple[Float32, Float32]
) -> AttentionKl:
    """Measure attention layer `layer` of the student on states that enter it and the teacher's layer.

    `states` are `chunks T D_t` and `chunks T D_s` of the same tokens; `merge.alpha` is the share. Intervals
    draw chunks, and are unmeasured for a single one. Raises BitsmithError for a DeltaNet layer, which has no
    attention weights, and as `merged_view` does.
    """
    if not isinstance(merge.heads, HeadMap):
        raise BitsmithError(f"layer {layer} of the student is a DeltaNet layer: it has no attention logits")
    heads = merge.heads
    own = AttentionLayer(student, student.view(), layer)
    theirs = AttentionLayer(teacher, teacher.view(), merge.teacher)
    places = mapped_heads(heads)

    def merged(alpha: LayerAlpha, mapping: HeadMap) -> list[Estimate]:
        changed = replace(merge, alpha=alpha, heads=mapping)
        view = merged_view(teacher, student, {layer: changed})
        other = AttentionLayer(student, view, layer)
        return _by_group(own, other, np.arange(heads.student.heads), (states[1], states[1]))

    whole = LayerAlpha(1.0, 0.0)
    plain = replace(heads, value_turns=None, query_turns=None)
    turned = heads.value_turns is not None or heads.query_turns is not None
    return AttentionKl(
        teacher=_by_group(own, theirs, places, (states[1], states[0])),
        merged=merged(LayerAlpha(merge.alpha.mixer, 0.0), heads),
        folded=merged(whole, heads),
        unturned=merged(whole, plain) if turned else None,
    )


def head_entropy(model: Model, layer: int, states: Float32) -> list[Estimate]:
    """Return the mean entropy of each query head's attention in nats, on states (`chunks T D`).

    Low for a head that looks at few tokens, at most the mean of `ln t`. Intervals draw chunks. Raises
    BitsmithError for a layer without attention.
    """
    attention = AttentionLayer(model, model.view(), layer)

    def entropy(chunk: int) -> Float64:
        seen = attention.seen(states[chunk])
        found = torch.zeros(attention.groups.heads, dtype=torch.float64)
        for heads in _each_group(attention.groups):
            for logs in seen.logarithms(heads):
                found[heads] -= (logs.exp() * logs.nan_to_num(neginf=0.0)).sum((1, 2))
        return np.asarray(found.numpy())

    return _means(_by_chunk(entropy, len(states), attention, states.shape[1]), max(1, states.shape[1] - 1))


def mapped_heads(heads: HeadMap) -> Index:
    """Return the teacher's head that each of the student's is taken from; of a mixture, its largest part."""
    if is_selection(heads.query):
        return np.asarray(heads.query, np.intp)
    found: Index = np.abs(np.asarray(heads.query)).argmax(0).astype(np.intp)
    return found


@dataclass(frozen=True)
class Seen:
    """Queries (`H T d`, scaled) and keys (`K T d`) of a chunk, as the logits are made of them."""

    queries: torch.Tensor
    keys: torch.Tensor

    def logarithms(self, heads: Index) -> Iterator[torch.Tensor]:
        """Yield the logarithms of some heads' weights (`H' R T`, float64) for queries 1 … T-1, in parts.

        -inf for tokens behind a query.
        """
        tokens = self.queries.shape[1]
        each = len(self.queries) // len(self.keys)
        keys = self.keys[heads // each].transpose(1, 2)
        step = max(1, _BLOCK_ENTRIES // (len(heads) * tokens))
        places = torch.arange(tokens)
        for start in range(1, tokens, step):
            rows = places[start : start + step]
            logits = (self.queries[heads][:, rows] @ keys).double()
            yield logits.masked_fill(places > rows[:, None], -torch.inf).log_softmax(-1)


class AttentionLayer:
    """The queries and keys of one attention layer; only what they are made of is read.

    `checkpoint` holds the weights under the names of `model`. Raises BitsmithError for a layer without
    attention.
    """

    def __init__(self, model: Model, checkpoint: Checkpoint, layer: int) -> None:
        prefix = f"{model.arch.text_prefix}layers.{layer}."
        kept = {
            name: ref
            for name, ref in checkpoint.items()
            if not name.startswith(tuple(f"{prefix}self_attn.{part}" for part in _UNREAD))
        }
        text = TextModel(View(checkpoint, kept), model.arch, model.checkpoint)
        with quiet_transformers():
            self.network = Network(text)
            if self.network.config.layer_types[layer] != "full_attention":
                raise BitsmithError(f"layer {layer} has no attention logits", path=model.checkpoint.path)
            self.network.config._attn_implementation = _NAME
            with torch.device("meta"):
                built = getattr(self.network.module, model.arch.layer_class)(self.network.config, layer)
            self._norm = aligned(self.network.filled(built.input_layernorm, f"{prefix}input_layernorm."))
            attention = built.self_attn
            attention.v_proj = attention.o_proj = torch.nn.Identity()
            self._attention = aligned(self.network.filled(attention, f"{prefix}self_attn."))
            self._attention.v_proj = self._attention.k_proj  # its values are not looked at
        config = self.network.config
        self.groups = Groups(int(config.num_attention_heads), int(config.num_key_value_heads))

    @torch.inference_mode()
    def seen(self, states: Float32) -> Seen:
        """Return the queries and keys of one chunk (`T D`)."""
        hidden = torch.from_numpy(np.ascontiguousarray(states))[None]
        positions = torch.arange(len(states))[None]
        _, found = self._attention(
            hidden_states=self._norm(hidden),
            position_embeddings=self.network.rotary(hidden, positions),
            attention_mask=None,
        )
        return Seen(*found)


def _queries_and_keys(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Stand in for an attention function of transformers: return what the logits are made of."""
    del module, value, attention_mask
    return torch.zeros_like(query).transpose(1, 2), (query[0] * scaling, key[0])


AttentionInterface.register(_NAME, _queries_and_keys)


def _by_group(
    own: AttentionLayer, other: AttentionLayer, places: Index, states: tuple[Float32, Float32]
) -> list[Estimate]:
    """Return the mean KL by KV group of `own`, whose head h stands beside head `places[h]` of `other`."""

    def sums(chunk: int) -> Float64:
        ours, theirs = own.seen(states[0][chunk]), other.seen(states[1][chunk])
        return np.array(
            [_divergence(ours, theirs, heads, places[heads]) for heads in _each_group(own.groups)]
        )

    chunks, tokens = states[0].shape[:2]
    return _means(_by_chunk(sums, chunks, own, tokens), own.groups.each * max(1, tokens - 1))


def _means(sums: Sequence[Float64], rows: int) -> list[Estimate]:
    """Return the mean of each column of every chunk's sums over `rows`, with its interval."""
    counts = np.full(len(sums), rows)
    return [ratio_of_sums(column, counts) or Estimate(0.0, None, None) for column in np.stack(sums).T]


def _divergence(ours: Seen, theirs: Seen, heads: Index, places: Index) -> float:
    """Return the sum over heads and queries of KL(ours‖theirs)."""
    total = 0.0
    for own, other in zip(ours.logarithms(heads), theirs.logarithms(places), strict=True):
        gap = (own - other).masked_fill(own.isneginf(), 0.0)
        total += float((own.exp() * gap).sum())
    return max(total, 0.0)


def _each_group(groups: Groups) -> list[Index]:
    return [np.arange(groups.heads, dtype=np.intp)[groups.of(group)] for group in range(groups.groups)]


def _by_chunk(
    work: Callable[[int], Float64], chunks: int, layer: AttentionLayer, tokens: int
) -> Sequence[Float64]:
    """Return what `work` makes of each chunk; on several threads, one of torch's each."""
    task_bytes = 64 * _BLOCK_ENTRIES + 4 * layer.network.bytes_per_token * tokens

    @torch.inference_mode()
    def task(chunk: int) -> Float64:
        return work(chunk)

    with quiet_transformers(), site_workers(task_bytes) as pool:
        return list(pool.map(task, range(chunks)))
