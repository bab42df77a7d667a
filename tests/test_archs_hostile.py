"""Hostile configs, GGUF keys and tokenizer files: each is taken or refused in one line, and soon."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest

from bitsmith.archs import architecture_of, export_view, import_view, tokenizer_metadata
from bitsmith.archs.published import published_config
from bitsmith.archs.tokenizer import tokenizer_from_gguf
from bitsmith.errors import BitsmithError
from bitsmith.lab.models import DEMO_MODEL
from bitsmith.lab.synth import synth_tensors
from bitsmith.store import Checkpoint

JUNK = [None, True, 0, -1, 10**12, 2**64, 0.5, float("nan"), 1e300, "x", "", [], [None], ["x"], {}, {"a": []}]


def tried(action, *arguments) -> bool:
    """Tell whether the action ended well; any error but a one-line BitsmithError fails the test."""
    try:
        action(*arguments)
    except BitsmithError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 5000
        return False
    return True


def paths_of(tree: dict, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for key, value in tree.items():
        found.append((*prefix, key))
        if isinstance(value, dict):
            found += paths_of(value, (*prefix, key))
    return found


def replaced(tree: dict, path: tuple[str, ...], value: object) -> dict:
    tree = copy.deepcopy(tree)
    inner = tree
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return tree


@pytest.mark.parametrize("size", ["tiny", "qwen3-tiny"])
def test_any_config_value_is_taken_or_refused(size):
    config = published_config(size)
    tensors = synth_tensors(config)
    outcomes = set()
    for path in paths_of(config):
        for value in JUNK:
            checkpoint = Checkpoint(Path("folder"), tensors)
            checkpoint.config = replaced(config, path, value)
            outcomes.add(tried(export_view, checkpoint))
    assert outcomes == {True, False}


@pytest.mark.parametrize("rope_type", ["linear", "yarn"])
def test_any_rope_value_is_taken_or_refused(rope_type):
    config = published_config("qwen3-tiny")
    tensors = synth_tensors(config)
    rope = {
        "rope_type": rope_type,
        "rope_theta": 1e6,
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
        "beta_fast": 32.0,
    }
    for path in paths_of(rope):
        for value in JUNK:
            checkpoint = Checkpoint(Path("folder"), tensors)
            checkpoint.config = config | {"rope_parameters": replaced(rope, path, value)}
            tried(export_view, checkpoint)


@pytest.mark.parametrize("size", ["tiny", "qwen3-tiny"])
def test_any_gguf_value_is_taken_or_refused(size):
    config = published_config(size)
    checkpoint = Checkpoint(Path("folder"), synth_tensors(config))
    checkpoint.config = config
    export = export_view(checkpoint)
    refs = {tensor.gguf_name: tensor.ref for tensor in export.tensors}
    outcomes = set()
    for key in export.metadata:
        for value in JUNK:
            changed = Checkpoint(Path("model.gguf"), refs)
            changed.metadata = export.metadata | {key: value}
            outcomes.add(tried(import_view, changed))
    assert outcomes == {True, False}


def test_names_that_ask_for_many_layers_are_refused_soon():
    config = published_config("tiny")
    tensors = synth_tensors(config)
    stray = tensors["mtp.fc.weight"]
    for name in ("mtp.layers.999999999999.mlp.up_proj.weight", "model.layers.999999999999.x.weight"):
        checkpoint = Checkpoint(Path("folder"), tensors | {name: stray})
        checkpoint.config = config
        with pytest.raises(BitsmithError, match="999999999999"):
            export_view(checkpoint)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_any_tokenizer_value_is_taken_or_refused(file, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, tmp_path / name)
    content = json.loads((tmp_path / file).read_text())
    if file == "tokenizer.json":  # a smaller vocabulary of single characters makes many trials quick
        vocab = {token: number for token, number in content["model"]["vocab"].items() if len(token) == 1}
        content["model"] |= {"vocab": vocab, "merges": []}
    checkpoint = Checkpoint(tmp_path, {})
    checkpoint.config = {"model_type": "qwen3", "vocab_size": 5000}
    arch = architecture_of(checkpoint)
    paths = [path for path in paths_of(content) if "vocab" not in path[:-1]]
    for path in paths:
        for value in JUNK:
            (tmp_path / file).write_text(json.dumps(replaced(content, path, value)))
            tried(tokenizer_metadata, checkpoint, arch)


def test_any_gguf_tokenizer_value_is_taken_or_refused():
    keys = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen35",
        "tokenizer.ggml.tokens": ["a", "b", "ab", "<|x|>"],
        "tokenizer.ggml.token_type": [1, 1, 1, 3],
        "tokenizer.ggml.merges": ["a b"],
    }
    assert tokenizer_from_gguf(keys, Path("model.gguf")).encode("ab<|x|>").ids == [2, 3]
    for key in keys:
        for value in JUNK:
            tried(tokenizer_from_gguf, keys | {key: value}, Path("model.gguf"))
