"""A model of one layer and a cut vocabulary, made of a real one's tensors: what a forward is rehearsed on."""

from __future__ import annotations

import copy
from collections.abc import Iterator

from bitsmith.archs.export import renamed
from bitsmith.run.forward import Network, TextModel, quiet_transformers
from bitsmith.run.partial import first_rows
from bitsmith.store.checkpoint import Checkpoint, TensorRef


def layer_kinds(model: TextModel) -> list[str]:
    """Return the kind of each of a model's layers, as transformers names it."""
    with quiet_transformers():
        return list(Network(model).config.layer_types)


def miniature(model: TextModel, layers: list[int], vocabulary: int) -> TextModel:
    """Return the model of `layers` alone, without MTP, and of the first `vocabulary` tokens.

    Tensors are read from where the model's are.
    """
    kinds = layer_kinds(model)
    checkpoint = Checkpoint(model.checkpoint.path, dict(_tensors(model, layers, vocabulary)))
    checkpoint.files = model.checkpoint.files
    config = copy.deepcopy(model.arch.config)
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    text["num_hidden_layers"] = len(layers)
    text["layer_types"] = [kinds[layer] for layer in layers]
    text["vocab_size"] = vocabulary
    checkpoint.config = config
    return TextModel(checkpoint, type(model.arch)(config, checkpoint), checkpoint)


def _tensors(model: TextModel, layers: list[int], vocabulary: int) -> Iterator[tuple[str, TensorRef]]:
    prefix = f"{model.arch.text_prefix}layers."
    for new, old in enumerate(layers):
        own = f"{prefix}{old}."
        for name, ref in model.checkpoint.items():
            if name.startswith(own):
                called = f"{prefix}{new}.{name.removeprefix(own)}"
                yield called, ref if called == name else renamed(ref, called)
    tables = {model.embedding.name, model.head.name}
    for name in (*sorted(tables), f"{model.arch.text_prefix}norm.weight"):
        ref = model.checkpoint[name]
        yield name, first_rows(ref, vocabulary) if name in tables else ref
