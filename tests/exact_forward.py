"""Whole models in float64 through transformers' own classes, and tiny random checkpoints to run them on.

transformers casts to float32 inside its norms, rotary embedding, softmax and gated delta rule; these casts
are lifted while a float64 forward runs, so that an exact change of the weights shows as one.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from transformers import Qwen3_5Config, Qwen3_5TextConfig, Qwen3Config
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.qwen3_5 import modeling_qwen3_5

from bitsmith.archs import ARCHITECTURES, TensorSpec
from bitsmith.passes.permute import Permute
from bitsmith.passes.rescale import Gauge
from bitsmith.passes.transform import Context, Model, Transform, Vectors
from bitsmith.store.safetensors_writer import TensorData, write_safetensors

Tensors = Mapping[str, np.ndarray]
IMAGE_TOKEN, VOCAB = 3, 72
_GRID = (1, 4, 4)  # patches of the one image: time, height, width; 2 x 2 patches merge into a token
_TORCH = {"float64": torch.float64, "float32": torch.float32}


class _Lifted(TorchFunctionMode):
    """Turns every request for float32 into one for float64, and lets no other float32 through."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {key: torch.float64 if arg is torch.float32 else arg for key, arg in (kwargs or {}).items()}
        result = func(*args, **kwargs)
        assert not (isinstance(result, torch.Tensor) and result.dtype is torch.float32), func
        return result


@dataclass(frozen=True)
class Outputs:
    """Logits `B T vocab` in float64: of text alone, of text around an image, of the MTP layer."""

    text: np.ndarray
    image: np.ndarray | None = None
    mtp: np.ndarray | None = None

    def error(self, reference: Outputs) -> float:
        """Return the largest deviation from `reference` over its largest logit, of the outputs both have."""
        pairs = [(self.text, reference.text), (self.image, reference.image), (self.mtp, reference.mtp)]
        errors = [
            float(np.abs(ours - theirs).max() / np.abs(theirs).max())
            for ours, theirs in pairs
            if ours is not None and theirs is not None
        ]
        return float(np.max(errors))  # NaN where one is


def arrays(checkpoint: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return every tensor of a checkpoint or view, read whole."""
    return {name: ref.read() for name, ref in checkpoint.items()}


def forward(config: Mapping[str, Any], tensors: Tensors, dtype: str = "float64", seed: int = 0) -> Outputs:
    """Run the model that `config` describes on random tokens, the same for every model of a vocabulary.

    `tensors` must be what the config calls for, no more and no less, apart from the tied head.
    """
    kind, before = _TORCH[dtype], torch.get_default_dtype()
    torch.set_default_dtype(kind)
    try:
        with _Lifted() if dtype == "float64" else nullcontext(), torch.inference_mode():
            return _run(config, {name: weight_of(array, kind) for name, array in tensors.items()}, seed)
    finally:
        torch.set_default_dtype(before)


def weight_of(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(np.array(array)).to(dtype)


def _run(config: Mapping[str, Any], tensors: dict[str, torch.Tensor], seed: int) -> Outputs:
    model = _model(json.dumps(config, sort_keys=True), torch.get_default_dtype())
    mtp = {name: tensor for name, tensor in tensors.items() if name.startswith("mtp.")}
    _load(model, {name: tensor for name, tensor in tensors.items() if name not in mtp})
    random = np.random.default_rng(seed)
    tokens = torch.from_numpy(random.integers(IMAGE_TOKEN + 1, _text(config)["vocab_size"], (2, 12)))
    text_model = model.model.language_model if "text_config" in config else model.model
    normed = text_model(input_ids=tokens, use_cache=False).last_hidden_state
    return Outputs(
        _numpy(model.lm_head(normed)),
        _numpy(_with_image(model, tokens, random)) if "vision_config" in config else None,
        _numpy(_mtp_logits(model, text_model, mtp, tokens, normed)) if mtp else None,
    )


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text: Mapping[str, Any] = config.get("text_config", config)
    return text


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


@lru_cache(maxsize=64)
def _model(config_json: str, dtype: torch.dtype) -> Any:
    """Return the model with weights of no meaning; building one takes longer than running it."""
    del dtype  # the default one, in which everything is made
    kinds: dict[str, tuple[Any, Any]] = {
        "qwen3": (Qwen3Config, modeling_qwen3.Qwen3ForCausalLM),
        "qwen3_5_text": (Qwen3_5TextConfig, modeling_qwen3_5.Qwen3_5ForCausalLM),
        "qwen3_5": (Qwen3_5Config, modeling_qwen3_5.Qwen3_5ForConditionalGeneration),
    }
    config = json.loads(config_json)
    config_class, model_class = kinds[config["model_type"]]
    settings = config_class.from_dict(config)
    settings._attn_implementation = "eager"
    with torch.inference_mode(False):  # it is kept, and filled outside of that mode too
        return model_class(settings).eval()


def _load(model: Any, tensors: dict[str, torch.Tensor]) -> None:
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert tied != ("lm_head.weight" in tensors), "config and tensors disagree about the head"
    absent, unknown = model.load_state_dict(tensors, strict=False)
    assert not unknown, unknown
    assert absent == (["lm_head.weight"] if tied else []), absent


def _with_image(model: Any, tokens: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
    """Return the logits of a prompt of one image between text tokens."""
    vision = model.config.vision_config
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.from_numpy(random.standard_normal((int(np.prod(_GRID)), patch)))
    count = int(np.prod(_GRID)) // vision.spatial_merge_size**2
    prompt = torch.cat([tokens[:1, :3], torch.full((1, count), IMAGE_TOKEN), tokens[:1, 3:]], dim=1)
    outputs = model(
        input_ids=prompt,
        pixel_values=pixels,
        image_grid_thw=torch.tensor([_GRID]),
        mm_token_type_ids=(prompt == IMAGE_TOKEN).int(),
        use_cache=False,
    )
    logits: torch.Tensor = outputs.logits
    return logits


def _mtp_logits(
    model: Any, text_model: Any, tensors: dict[str, torch.Tensor], tokens: torch.Tensor, normed: torch.Tensor
) -> torch.Tensor:
    """Return what the MTP layer predicts from the normed state of t and the embedding of t + 1."""
    module = _mtp_module(text_model.config)
    module.load_state_dict({name.removeprefix("mtp."): tensor for name, tensor in tensors.items()})
    embedded = module.pre_fc_norm_embedding(text_model.embed_tokens(tokens[:, 1:]))
    states = module.fc(torch.cat([embedded, module.pre_fc_norm_hidden(normed[:, :-1])], dim=-1))
    size = states.shape[1]
    positions = torch.arange(size).expand(3, len(tokens), size)
    mask = torch.full((1, 1, size, size), float("-inf"), dtype=states.dtype).triu(1)
    states = module.layers[0](
        states, position_embeddings=text_model.rotary_emb(states, positions), attention_mask=mask
    )
    logits: torch.Tensor = model.lm_head(module.norm(states))
    return logits


def _mtp_module(config: Any) -> Any:
    config = copy.deepcopy(config)
    config.layer_types, hidden = ["full_attention"], config.hidden_size
    names = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
    norms = {name: modeling_qwen3_5.Qwen3_5RMSNorm(hidden, config.rms_norm_eps) for name in names}
    layer = modeling_qwen3_5.Qwen3_5DecoderLayer(config, 0)
    fc = torch.nn.Linear(2 * hidden, hidden, bias=False)
    return torch.nn.ModuleDict({"layers": torch.nn.ModuleList([layer]), "fc": fc, **norms}).eval()


@dataclass(frozen=True)
class Tiny:
    """Sizes of a tiny random model: a Qwen3.5 of DeltaNet, attention, DeltaNet, or, `k_heads` 0, a Qwen3."""

    hidden: int = 64
    ffn: int = 96
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    k_heads: int = 2
    v_heads: int = 4
    k_dim: int = 8
    v_dim: int = 12
    tied: bool = False
    mtp: bool = False
    vision: bool = False

    @property
    def config(self) -> dict[str, Any]:
        """The config.json, in the published layout."""
        text = {
            "attention_bias": False,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "max_position_embeddings": 512,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": self.tied,
            "vocab_size": VOCAB,
        }
        if not self.k_heads:
            rope = {"rope_theta": 1e4, "rope_type": "default"}
            return {"model_type": "qwen3", "num_hidden_layers": 2, "rope_parameters": rope, **text}
        text = {"model_type": "qwen3_5_text", **text, **self._delta}
        if not self.vision:
            return text
        return {
            "model_type": "qwen3_5",
            "image_token_id": IMAGE_TOKEN,
            "video_token_id": IMAGE_TOKEN - 1,
            "text_config": text,
            "tie_word_embeddings": self.tied,
            "vision_config": _vision_config(self.hidden),
        }

    @property
    def _delta(self) -> dict[str, Any]:
        pairs = self.head_dim // 8
        return {
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": self.k_dim,
            "linear_num_key_heads": self.k_heads,
            "linear_num_value_heads": self.v_heads,
            "linear_value_head_dim": self.v_dim,
            "num_hidden_layers": 3,
            "rope_parameters": {
                "mrope_interleaved": True,
                "mrope_section": [pairs // 3 + (pairs % 3 > n) for n in range(3)],
                "partial_rotary_factor": 0.25,
                "rope_theta": 1e4,
                "rope_type": "default",
            },
            **({"mtp_num_hidden_layers": 1} if self.mtp else {}),
        }

    def specs(self) -> list[TensorSpec]:
        """Return every tensor of the model, vision included."""
        config = self.config
        return ARCHITECTURES[config["model_type"]](config).specs()

    def arrays(self, seed: int = 0) -> dict[str, np.ndarray]:
        """Return random weights in float64: matrices of variance `1 / in`, norms that are far from even."""
        random = np.random.default_rng(seed)
        return {spec.name: _values(spec, random) for spec in self.specs()}

    def write(self, folder: Path, dtype: str = "F64", seed: int = 0) -> Path:
        """Write the checkpoint with tensors of safetensors type `dtype` and return its folder."""
        data = [
            TensorData(name, dtype, array.shape, [_stored(array, dtype)])
            for name, array in self.arrays(seed).items()
        ]
        write_safetensors(folder, data, self.config)
        return folder


DENSE = Tiny(k_heads=0)
HYBRID = Tiny()
TINY = {
    "qwen3": DENSE,
    "qwen3-tied": replace(DENSE, tied=True),
    "qwen3.5": HYBRID,
    "qwen3.5-tied": replace(HYBRID, tied=True),
    "qwen3.5-mtp": replace(HYBRID, mtp=True),
    "qwen3.5-tied-mtp": replace(HYBRID, tied=True, mtp=True),
    "qwen3.5-vision": replace(HYBRID, vision=True),
    "qwen3.5-vision-tied-mtp": replace(HYBRID, tied=True, mtp=True, vision=True),
}
"""One model of every kind that the transforms must tell apart."""


def _vision_config(out_hidden: int) -> dict[str, Any]:
    return {
        "deepstack_visual_indexes": [],
        "depth": 1,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 32,
        "in_channels": 3,
        "intermediate_size": 48,
        "model_type": "qwen3_5_vision",
        "num_heads": 4,
        "num_position_embeddings": 16,
        "out_hidden_size": out_hidden,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }


def _values(spec: TensorSpec, random: np.random.Generator) -> np.ndarray:
    if spec.norm is not None or (
        spec.component == "vision" and "norm" in spec.name and "bias" not in spec.name
    ):
        return random.lognormal(0, 0.4, spec.shape) - (spec.norm == "1+w")
    by_role = {"delta.decay": 0.7, "delta.dt": 0.7, "delta.conv": 0.5, "embed": 1.0}
    if spec.role in by_role:
        return random.normal(0, by_role[spec.role], spec.shape)
    return random.normal(0, 1 / np.sqrt(max(1, np.prod(spec.shape[1:]))), spec.shape)


def _stored(array: np.ndarray, dtype: str) -> np.ndarray:
    return array.astype({"F64": np.float64, "F32": np.float32}[dtype])


def random_vectors(transform: Transform, model: Model, seed: int = 7) -> Vectors:
    """Return lognormal scales of both signs, and random orders; solved vectors where there is no choice."""
    random = np.random.default_rng(seed)
    if isinstance(transform, Gauge):
        scales = {}
        for instance, sides in transform.sides(model).items():
            count = int(sides[0].channels.max()) + 1
            drawn = random.lognormal(0, 1, count) * random.choice([-1.0, 1.0], count)
            partners = transform.partners(model, instance)
            scales[instance] = drawn if partners is None else drawn[np.minimum(partners, np.arange(count))]
        return scales
    if isinstance(transform, Permute):
        return {
            instance: np.concatenate([size * n + random.permutation(size) for n in range(groups)])
            for instance, (groups, size) in transform.sizes(model).items()
        }
    return transform.vectors(model, Context())
