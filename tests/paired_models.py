"""Tiny teachers and students, what transformers' whole models see, and moments by brute force."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig, Qwen3Config, Qwen3ForCausalLM

from bitsmith.archs.published import published_config
from bitsmith.formats.minifloat import E4M3
from bitsmith.lab.models import DEMO_MODEL
from bitsmith.lab.synth import synth_tensors
from bitsmith.run.paired_forward import Side
from bitsmith.run.sites import States
from bitsmith.store.paired import CrossMoments
from bitsmith.store.safetensors_writer import TensorData, write_safetensors

Rows = dict[str, list[np.ndarray]]
LINES = [f"def f{n}(x):\n    return {n} * x + {n * n % 977}\n\n" for n in range(200)]
FULL, DELTA = "full_attention", "linear_attention"
DENSE = {"head_dim": 16, "num_key_value_heads": 2}
HYBRID = {"head_dim": 32, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2}
SMALL = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 2}
LARGE = {"hidden_size": 48, "intermediate_size": 72, "num_attention_heads": 4}


def write_model(
    folder: Path, seed: int = 0, tensors: dict[str, np.ndarray] | None = None, **sizes: Any
) -> Path:
    """Write random weights of a tiny model: of Qwen3.5 where `layer_types` are given, else of Qwen3."""
    config = published_config("tiny" if "layer_types" in sizes else "qwen3-tiny", vision=False, mtp=False)
    config |= sizes | {"num_hidden_layers": len(sizes.get("layer_types", ())) or sizes["num_hidden_layers"]}
    found = {name: ref.read() for name, ref in synth_tensors(config, seed, "F32").items()} | (tensors or {})
    data = [TensorData(name, "F32", array.shape, [array]) for name, array in found.items()]
    names = ("tokenizer.json", "tokenizer_config.json")
    write_safetensors(folder, data, config, files={name: (DEMO_MODEL / name).read_bytes() for name in names})
    return folder


def hooked(folder: Path, tokens: np.ndarray) -> Rows:
    """Return float64 rows of every layer of the whole model: states, updates, mixer, ffn, between."""
    config = json.loads((folder / "config.json").read_text())
    dense = config["model_type"] == "qwen3"
    classes = (Qwen3Config, Qwen3ForCausalLM) if dense else (Qwen3_5TextConfig, Qwen3_5ForCausalLM)
    model = classes[1](classes[0].from_dict(config)).float().eval()
    weights = {name: torch.from_numpy(w) for name, w in load_file(folder / "model.safetensors").items()}
    model.load_state_dict(weights, strict=True)
    seen: dict[str, list[np.ndarray]] = {place: [] for place in ("states", "mixer", "ffn", "between")}

    def watch(place: str, module: torch.nn.Module) -> None:
        module.register_forward_pre_hook(lambda _, args: seen[place].append(rows(args[0])))

    for layer in model.model.layers:
        watch("states", layer)
        watch("mixer", layer.self_attn.o_proj if hasattr(layer, "self_attn") else layer.linear_attn.out_proj)
        watch("ffn", layer.mlp.down_proj)
        watch("between", layer.post_attention_layernorm)
    watch("states", model.model.norm)
    with torch.no_grad():
        model(torch.from_numpy(tokens))
    states = seen["states"]
    return {**seen, "updates": [after - before for before, after in pairwise(states)]}


def rows(x: torch.Tensor) -> np.ndarray:
    return x.double().flatten(0, -2).numpy()


def assert_moments(moments: CrossMoments, t: np.ndarray, s: np.ndarray) -> None:
    """Compare with what float64 makes of all rows; squares in blocks or as a diagonal with those parts."""
    assert moments.tokens == len(t) == len(s)
    for x, y, part in ((t, t, moments.tt), (s, s, moments.ss), (t, s, moments.ts)):
        expected = x.T @ y / len(x)
        scale = np.abs(expected).max()
        if part.ndim == 1:
            expected = np.diagonal(expected)
        elif part.ndim == 3:
            size = part.shape[1]
            blocks = [slice(n * size, (n + 1) * size) for n in range(len(part))]
            expected = np.stack([expected[at, at] for at in blocks])
        assert part.dtype == np.float64 and part.shape == expected.shape
        assert np.abs(part - expected).max() < 2e-6 * scale
    for mean, x in ((moments.mean_t, t), (moments.mean_s, s)):
        np.testing.assert_allclose(mean, x.mean(0), atol=2e-6 * np.abs(x).max())
    if moments.tt.ndim == 2:
        np.testing.assert_array_equal(moments.tt, moments.tt.T)


def in_eight_bits(weight: np.ndarray, block: int = 32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return E4M3 codes, a scale for each block, and what the two say (`out in`)."""
    grid = E4M3[:127]  # codes of 0 … 448, ascending
    sizes = [-(-length // block) for length in weight.shape]
    scale, codes = np.zeros(sizes, np.float32), np.zeros(weight.shape, np.uint8)
    for row, column in np.ndindex(*sizes):
        at = tuple(slice(block * n, block * n + block) for n in (row, column))
        scale[row, column] = np.abs(weight[at]).max() / 448 or 1.0
        near = np.searchsorted(grid, np.abs(weight[at]) / scale[row, column]).clip(max=126)
        codes[at] = near + 128 * (weight[at] < 0)
    wide = scale.repeat(block, 0).repeat(block, 1)[: weight.shape[0], : weight.shape[1]]
    return codes, scale, (E4M3[codes] * wide).astype(np.float32)


def random_states(folder: Path, side: Side) -> tuple[States, States]:
    shape = 32, 70, side.hidden
    before, after = (States(folder / f"{side.hidden}.{n}", shape) for n in range(2))
    after.create()
    before.create()
    before.write(0, np.random.default_rng(0).standard_normal(shape, np.float32))
    return before, after
