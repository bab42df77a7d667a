"""Makes the files beside it with the original tool chain: `python make.py LLAMA_CPP_CHECKOUT`.

Made with llama.cpp as vendored in llama-cpp-python 0.3.34 (tools built by CMake in LLAMA_CPP_CHECKOUT/build),
transformers 5.23 and torch 2.13. The converter knows tokenizers by hash: the tiny one's name is put in its
place. Weights are random; MTP tensors, which transformers does not write, are added as published files have
them.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3_5Config, Qwen3_5ForConditionalGeneration

from bitsmith.archs.tokenizer import PRE_TOKENIZER_REGEXES

HERE = Path(__file__).parent
CHECKOUT = Path(sys.argv[1]).resolve()
TOOLS = CHECKOUT / "build" / "bin"
VOCAB = 320
SMALL = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "linear_num_value_heads": 4}
WIDE = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "linear_num_value_heads": 16}
TYPES = {
    "token_embd": "Q6_K", "output.weight": "Q5_K",  # and every attn_output.weight
    "blk.0.attn_qkv": "IQ2_XXS", "blk.0.attn_gate": "IQ2_XS", "blk.0.ssm_out": "IQ2_S",
    "blk.0.ffn_gate": "IQ1_S", "blk.0.ffn_up": "IQ1_M", "blk.0.ffn_down": "IQ3_XXS",
    "blk.0.ssm_alpha": "TQ1_0", "blk.0.ssm_beta": "TQ2_0",
    "blk.1.attn_q": "IQ3_S", "blk.1.attn_k": "IQ4_NL", "blk.1.attn_v": "IQ4_XS",
    "blk.1.ffn_gate": "Q2_K", "blk.1.ffn_up": "Q3_K", "blk.1.ffn_down": "Q4_K",
    "blk.2.attn_q": "Q4_1", "blk.2.attn_k": "Q5_0", "blk.2.attn_v": "Q5_1",
    "blk.2.ffn_gate": "Q1_0", "blk.2.ffn_up": "Q2_0", "blk.2.ffn_down": "Q8_0", "nextn.eh_proj": "F16",
}  # fmt: skip


def source(out: Path, sizes: dict[str, int]) -> Path:
    """Write a vision-language Qwen3.5 with MTP and a tokenizer by `save_pretrained`."""
    torch.manual_seed(9)
    text = {
        **sizes, "vocab_size": VOCAB, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1,
        "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16, "max_position_embeddings": 512,
        "mtp_num_hidden_layers": 1, "bos_token_id": None, "eos_token_id": 257, "pad_token_id": 256,
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
        "out_hidden_size": sizes["hidden_size"], "num_position_embeddings": 16, "patch_size": 4,
    }  # fmt: skip
    config = Qwen3_5Config(text_config=text, vision_config=vision)
    Qwen3_5ForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(out)
    weights = out / "model.safetensors"
    stored = load_file(weights)
    layer, head, hidden = "model.language_model.layers.1.", "mtp.layers.0.", sizes["hidden_size"]
    mtp = {head + name.removeprefix(layer): w.clone() for name, w in stored.items() if name.startswith(layer)}
    mtp["mtp.fc.weight"] = torch.randn(hidden, 2 * hidden).mul(hidden**-0.5).to(torch.bfloat16)
    for norm in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        mtp[f"mtp.{norm}.weight"] = torch.randn(hidden).mul(0.1).to(torch.bfloat16)
    save_file(stored | mtp, weights, metadata={"format": "pt"})
    tokenizer().save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    config["text_config"]["full_attention_interval"] = 2  # what the converter goes by
    (out / "config.json").write_text(json.dumps(config, indent=1))
    return out


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of a few merges, split by Qwen3.5's regex."""
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRE_TOKENIZER_REGEXES["qwen35"]), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=312, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator([Path(__file__).read_text()], trainer)
    core.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=core, **ends)
    wrapped.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    return wrapped


def convert(folder: Path, *options: str) -> None:
    """Run the converter, told the name of the tokenizer's regex."""
    code = (
        "import runpy, sys; root = sys.argv.pop(1); sys.path[:0] = [root, root + '/gguf-py']\n"
        "from conversion import base\n"
        "base.TextModel.get_vocab_base_pre = lambda self, tokenizer: 'qwen35'\n"
        "runpy.run_path(root + '/convert_hf_to_gguf.py', run_name='__main__')"
    )
    run([sys.executable, "-c", code, str(CHECKOUT), str(folder), *options])


def run(command: list[str]) -> None:
    """Run a tool, shown only where it fails."""
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)


def main() -> None:
    """Write everything."""
    shutil.rmtree(HERE / "source", ignore_errors=True)
    small = source(HERE / "source", SMALL)
    convert(small, "--outfile", str(HERE / "converted.gguf"), "--outtype", "bf16")
    convert(small, "--outfile", str(HERE / "split.gguf"), "--outtype", "bf16", "--split-max-tensors", "16")
    with tempfile.TemporaryDirectory() as scratch:
        wide, text = Path(scratch, "wide.gguf"), Path(scratch, "text.txt")
        convert(source(Path(scratch, "wide"), WIDE), "--outfile", str(wide), "--outtype", "bf16")
        text.write_text(Path(__file__).read_text())
        imatrix = [str(TOOLS / "llama-imatrix"), "-m", str(wide), "-f", str(text), "-c", "128", "-t", "1"]
        run([*imatrix, "--no-repack", "-o", str(HERE / "imatrix.gguf")])
        run([*imatrix, "--no-repack", "--output-format", "dat", "-o", str(HERE / "imatrix.dat")])
        types = [part for name, kind in TYPES.items() for part in ("--tensor-type", f"{name}={kind.lower()}")]
        quantize = [str(TOOLS / "llama-quantize"), "--imatrix", str(HERE / "imatrix.gguf")]
        run([*quantize, *types, str(wide), str(HERE / "all-types.gguf"), "Q8_0", "1"])


if __name__ == "__main__":
    main()
