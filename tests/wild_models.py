"""Tiny checkpoints of many families as transformers' `save_pretrained` writes them, with random weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors import safe_open

VOCAB = 128
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
HEADS = {**SIZES, "head_dim": 16}
DELTA = {
    **HEADS, "num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SEEING = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64,
    "num_position_embeddings": 16, "patch_size": 4,
}  # fmt: skip
SIGLIP = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
SHORT = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LATENT = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
    "moe_intermediate_size": 32, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 16, "first_k_dense_replace": 1,
}  # fmt: skip

SUPPORTED: dict[str, Callable[[], Any]] = {
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**HEADS)),
    "qwen3 tied": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**HEADS, tie_word_embeddings=True)),
    "qwen3 bare": lambda: hf.Qwen3Model(hf.Qwen3Config(**HEADS, tie_word_embeddings=True)),
    "qwen3_5_text": lambda: hf.Qwen3_5ForCausalLM(hf.Qwen3_5TextConfig(**DELTA)),
    "qwen3_5": lambda: hf.Qwen3_5ForConditionalGeneration(
        hf.Qwen3_5Config(text_config=DELTA, vision_config=SEEING)
    ),
    "qwen3_5 tied": lambda: hf.Qwen3_5ForConditionalGeneration(
        hf.Qwen3_5Config(
            text_config={**DELTA, "tie_word_embeddings": True}, vision_config=SEEING, tie_word_embeddings=True
        )
    ),
    "qwen3_5 bare": lambda: hf.Qwen3_5Model(
        hf.Qwen3_5Config(
            text_config={**DELTA, "tie_word_embeddings": True}, vision_config=SEEING, tie_word_embeddings=True
        )
    ),
}
"""What `compress` writes; `bare` is a model saved without its language-model head around it."""

OTHERS: dict[str, Callable[[], Any]] = {
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**SIZES)),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**HEADS, **EXPERTS)),
    "qwen3_5_moe_text": lambda: hf.Qwen3_5MoeForCausalLM(
        hf.Qwen3_5MoeTextConfig(**DELTA, **EXPERTS, shared_expert_intermediate_size=32)
    ),
    "qwen3_vl": lambda: hf.Qwen3VLForConditionalGeneration(
        hf.Qwen3VLConfig(text_config=HEADS, vision_config={**SEEING, "deepstack_visual_indexes": [0]})
    ),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)),
    "llama4_text": lambda: hf.Llama4ForCausalLM(
        hf.Llama4TextConfig(**HEADS, num_local_experts=2, intermediate_size_mlp=96)
    ),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**SIZES)),
    "mistral3": lambda: hf.Mistral3ForConditionalGeneration(
        hf.Mistral3Config(
            text_config={**HEADS, "model_type": "mistral"}, vision_config={**SIGLIP, "model_type": "pixtral"}
        )
    ),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**SIZES, num_local_experts=4)),
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**HEADS)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**HEADS)),
    "gemma3_text": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**HEADS)),
    "gemma3": lambda: hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(text_config=HEADS, vision_config=SIGLIP, mm_tokens_per_image=4)
    ),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**SIZES)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**SIZES)),
    "phimoe": lambda: hf.PhimoeForCausalLM(hf.PhimoeConfig(**SIZES, num_local_experts=4)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=64, n_layer=2, n_head=4)
    ),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SHORT, intermediate_size=96)),
    "falcon": lambda: hf.FalconForCausalLM(hf.FalconConfig(**SHORT)),
    "bloom": lambda: hf.BloomForCausalLM(
        hf.BloomConfig(vocab_size=VOCAB, hidden_size=64, n_layer=2, n_head=4)
    ),
    "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**SHORT, ffn_dim=96, word_embed_proj_dim=64)),
    "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**SIZES)),
    "cohere": lambda: hf.CohereForCausalLM(hf.CohereConfig(**SIZES)),
    "smollm3": lambda: hf.SmolLM3ForCausalLM(hf.SmolLM3Config(**SIZES)),
    "gpt_oss": lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**HEADS, num_local_experts=4)),
    "deepseek_v3": lambda: hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**SIZES, **LATENT)),
    "mamba": lambda: hf.MambaForCausalLM(
        hf.MambaConfig(vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, state_size=8)
    ),
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**SHORT, intermediate_size=96)),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=VOCAB, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4)
    ),
    "whisper": lambda: hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(
            **{f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in
               (("layers", 1), ("attention_heads", 2), ("ffn_dim", 96))},
            vocab_size=VOCAB, d_model=64, num_mel_bins=16, max_source_positions=32, max_target_positions=32,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        )
    ),
}  # fmt: skip
"""Families that are measured and refused; the key is the `model_type`."""


def save(
    model: Any, folder: Path, dtype: torch.dtype = torch.bfloat16, shard_bytes: int | None = None
) -> Path:
    """Write a model as `save_pretrained` does; `shard_bytes` splits it."""
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_bytes or "5GB")
    return folder


def built(name: str) -> Any:
    """Return a family's model with seeded weights, its norms off their starting values."""
    torch.manual_seed(0)
    model = (SUPPORTED | OTHERS)[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def shapes(folder: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of every stored tensor, by the safetensors package."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "np") as stored:
            for name in stored.keys():  # noqa: SIM118
                yield name, tuple(stored.get_slice(name).get_shape())


def model_type(folder: Path) -> str:
    """Return the config's `model_type`."""
    return str(json.loads((folder / "config.json").read_text())["model_type"])
