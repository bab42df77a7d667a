"""Text and tokenizer made from the Python standard library's own sources, read at run time."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from bitsmith.run.corpus import documents
from bitsmith.run.record import seal
from bitsmith.store.atomic import Content, atomic_file

QWEN35_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def held_out_text(limit_bytes: int = 200_000) -> str:
    """Return the held-out split joined by newlines and cut at `limit_bytes` bytes of UTF-8."""
    parts: list[bytes] = []
    size = 0
    for text in documents(held_out=True):
        parts.append(text.encode() + b"\n")
        size += len(parts[-1])
        if size >= limit_bytes:
            break
    return b"".join(parts)[:limit_bytes].decode("utf-8", "ignore")


def write_held_out_text(out: Path, limit_bytes: int = 200_000, *, overwrite: bool = False) -> Path:
    """Write `held_out_text(limit_bytes)` to `out`. Raises OutputError if it exists without `overwrite`."""

    def finish(content: Content) -> None:
        seal(out, "lab text", content, limit_bytes=limit_bytes)

    with atomic_file(out, overwrite=overwrite, finish=finish) as stream:
        stream.write(held_out_text(limit_bytes).encode())
    return out


def train_tokenizer(vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE with Qwen3.5's pre-tokenizer regex on the training split.

    The vocabulary has `vocab_size` entries with the special tokens last, as in Qwen's own files.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN35_REGEX), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents(held_out=False), trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def save_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` with the lab's chat template."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "add_bos_token": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
