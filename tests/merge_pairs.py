"""A teacher and a student on the same tokens through plain transformers, and what a merge needs of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitsmith.passes.axes import Layer, layers_of
from bitsmith.passes.merge_axes import AxisMap
from bitsmith.passes.merge_fold import EndsMerge, LayerAlpha, LayerMerge
from bitsmith.passes.merge_heads import DeltaMap, HeadMap
from bitsmith.passes.merge_inner import ffn_map, heads_by_activations, most_alike, neurons_by_activations
from bitsmith.passes.merge_layers import cka_matrix, layer_similarity, monotone_layers
from bitsmith.passes.merge_maps import PairMoments, ResidualMap, norm_gain, pooled, tiered_map
from bitsmith.passes.transform import Model, model_of
from bitsmith.store import open_checkpoint
from exact_forward import _load, _model, arrays, weight_of

Rows = np.ndarray


@dataclass(frozen=True)
class Seen:
    """Rows (`N D`) of one model: states before each layer and behind the last, between mixer and FFN, and
    what enters the writers; logits `N vocab`."""

    states: list[Rows]
    between: list[Rows]
    mixer: list[Rows]
    ffn: list[Rows]
    logits: Rows

    @property
    def updates(self) -> list[Rows]:
        return [after - before for before, after in zip(self.states, self.states[1:], strict=False)]


def seen(checkpoint: Any, tokens: Rows) -> Seen:
    """Run a text model in float32 on tokens (`B T`)."""
    config, tensors = _text_alone(checkpoint)
    model = _model(json.dumps(config, sort_keys=True), torch.float32)
    _load(model, {name: weight_of(array, torch.float32) for name, array in tensors.items()})
    layers = model.model.layers
    found: dict[str, list[Rows]] = {"states": [], "between": [], "mixer": [], "ffn": []}
    hooks = []
    for layer in layers:
        writer = layer.self_attn.o_proj if hasattr(layer, "self_attn") else layer.linear_attn.out_proj
        sites = {
            "states": layer.input_layernorm,
            "between": layer.post_attention_layernorm,
            "mixer": writer,
            "ffn": layer.mlp.down_proj,
        }
        hooks += [m.register_forward_pre_hook(partial(_keep, found[name])) for name, m in sites.items()]
    hooks.append(model.model.norm.register_forward_pre_hook(partial(_keep, found["states"])))
    with torch.inference_mode():
        logits = model(input_ids=torch.from_numpy(tokens), use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return Seen(**found, logits=logits.flatten(0, 1).double().numpy())


def _keep(into: list[Rows], module: Any, inputs: Any) -> None:
    del module
    into.append(inputs[0].detach().flatten(0, 1).double().numpy())


def _text_alone(checkpoint: Any) -> tuple[dict[str, Any], dict[str, Rows]]:
    """Return the config and the tensors of the text model, without vision and MTP."""
    config, tensors = dict(checkpoint.config), arrays(checkpoint)
    if "text_config" in config:
        tied = config["tie_word_embeddings"]
        config = {**config["text_config"], "model_type": "qwen3_5_text", "tie_word_embeddings": tied}
    config.pop("mtp_num_hidden_layers", None)
    kept = {
        name.replace("model.language_model.", "model."): array
        for name, array in tensors.items()
        if not name.startswith(("mtp.", "model.visual."))
    }
    return config, kept


class Pair:
    """A teacher and a student with everything measured on the same tokens."""

    def __init__(self, teacher: Path, student: Path, tokens: Rows) -> None:
        self.teacher, self.student = (model_of(open_checkpoint(path)) for path in (teacher, student))
        self.theirs = seen(self.teacher.checkpoint, tokens)
        self.ours = seen(self.student.checkpoint, tokens)
        self.layers = self._layers()
        self._found = [self._inner(n) for n in range(len(self.layers))]

    def _layers(self) -> tuple[int, ...]:
        states, updates = (
            cka_matrix(of(self.theirs), of(self.ours))
            for of in (lambda one: one.states[:-1], lambda one: one.updates)
        )
        kinds = [["attention" if layer.has("attn.o") else "delta" for layer in _text(m)] for m in self.models]
        return monotone_layers(layer_similarity(states, updates), *kinds)

    @property
    def models(self) -> tuple[Model, Model]:
        return self.teacher, self.student

    def moments(self, place: str, number: int) -> PairMoments:
        theirs, ours = getattr(self.theirs, place), getattr(self.ours, place)
        last = number == len(self.layers)
        return PairMoments.of(theirs[-1 if last else self.layers[number]], ours[number])

    def pooled(self) -> PairMoments:
        return pooled([self.moments("states", n) for n in range(len(self.layers) + 1)])

    def heads(self, number: int, *, turn: bool = False) -> HeadMap | DeltaMap:
        theirs, ours = _text(self.teacher)[self.layers[number]], _text(self.student)[number]
        found = heads_by_activations(
            (theirs, self.teacher), (ours, self.student), self.moments("mixer", number)
        )
        sides = (theirs, self.teacher.arch), (ours, self.student.arch)
        return most_alike(*sides, found.turned_likeness if turn else found.likeness)

    def _inner(self, number: int) -> tuple[HeadMap | DeltaMap, AxisMap]:
        theirs = _text(self.teacher)[self.layers[number]], self.teacher
        return self.heads(number), ffn_map(
            "match", neurons_by_activations(theirs, self.moments("ffn", number))
        )

    def merges(
        self, mapping: ResidualMap | None = None, alpha: float = 1.0
    ) -> tuple[dict[int, LayerMerge], EndsMerge]:
        """Return the merge of every layer and of the ends by one global map."""
        one = tiered_map(self.pooled()) if mapping is None else mapping
        made = {}
        for n, t in enumerate(self.layers):
            made[n] = LayerMerge(
                t,
                one,
                one,
                one,
                *self._found[n],
                (norm_gain(one, self.theirs.states[t]), norm_gain(one, self.theirs.between[t])),
                LayerAlpha(alpha, alpha),
            )
        return made, EndsMerge(one, one, norm_gain(one, self.theirs.states[-1]), alpha, alpha)


def _text(model: Model) -> list[Layer]:
    return [layer for layer in layers_of(model) if layer.instance.startswith("layers.")]
