"""Between text and tokens for generating: prompts, chat templates, stop tokens, and text as it grows."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders

from bitsmith.archs import load_tokenizer
from bitsmith.archs.tokenizer import TOKENIZER_NAME, read_json, tokenizer_folder
from bitsmith.errors import BitsmithError, UnsupportedError
from bitsmith.run.evaluate import bos_token, open_model, tokenizer_keys
from bitsmith.run.forward import TextModel
from bitsmith.run.template import render
from bitsmith.store import Checkpoint
from bitsmith.store.hub import local

ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")
"""Control tokens that end a turn by their name; llama.cpp stops at them too (src/llama-vocab.cpp)."""

_END_KEYS = ("eos", "eot", "eom")
Message = Mapping[str, str]  # role and content


class Vocabulary:
    """The tokenizer of a model, its stop tokens and its chat template.

    `stops` are the ids that config, generation_config and tokenizer name as the end, and those of `ENDS`.

    Raises BitsmithError for a model without a tokenizer, UnsupportedError for one that is not byte-level.
    """

    def __init__(self, model: TextModel) -> None:
        self._path = model.checkpoint.path
        self._keys = tokenizer_keys(model)
        self._bos = bos_token(model)
        self.tokenizer = load_tokenizer(model.source)
        if not isinstance(self.tokenizer.decoder, decoders.ByteLevel):
            raise UnsupportedError("its tokenizer is not byte-level", path=self._path)
        self.stops = frozenset(self._stops(model))

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a prompt; text that spells a control token becomes that token."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        missing = self._bos is not None and ids[:1] != [self._bos]
        return [self._bos, *ids] if missing and self._bos is not None else ids

    def chat_text(self, messages: Sequence[Message]) -> str:
        """Return `messages` in the model's chat template, with the start of the answer.

        Raises BitsmithError for a model without a template, UnsupportedError as `render` does.
        """
        template = self._keys.get("tokenizer.chat_template")
        if not isinstance(template, str):
            raise BitsmithError("has no chat template", path=self._path)
        variables: dict[str, Any] = {
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": True,
            "tools": None,
            "documents": None,
        }
        names = {f"{kind}_token": self._special(kind) for kind in ("bos", "eos")}
        return render(template, variables | {k: v for k, v in names.items() if v is not None}, self._path)

    def pieces(self) -> Pieces:
        """Return a decoder for the tokens that follow one another."""
        return Pieces(self.tokenizer)

    def _special(self, kind: str) -> str | None:
        number = self._keys.get(f"tokenizer.ggml.{kind}_token_id")
        return self.tokenizer.id_to_token(number) if type(number) is int else None

    def _stops(self, model: TextModel) -> set[int]:
        configs: list[Mapping[str, Any]] = [model.source.config, model.arch.text_config]
        if model.source.config:
            configs.append(read_json(tokenizer_folder(model.source) / "generation_config.json"))
        given = [config.get("eos_token_id") for config in configs]
        given += [self._keys.get(f"tokenizer.ggml.{kind}_token_id") for kind in _END_KEYS]
        listed = [number for one in given for number in (one if isinstance(one, list) else [one])]
        added = self.tokenizer.get_added_tokens_decoder()
        named = [number for number, token in added.items() if token.content in ENDS]
        return {number for number in [*listed, *named] if type(number) is int}


def open_teller(model: TextModel, tokenizer: Path | None) -> TextModel:
    """Return what tells tokens, chat template and stop tokens of `model`: itself, or what `tokenizer` names.

    That is a tokenizer.json, whose folder's other JSON files count too, a folder with one, a hub's name of
    one, or a GGUF.

    Raises BitsmithError where there is no tokenizer.
    """
    if tokenizer is None:
        return model
    tokenizer = local(tokenizer, weights=False)
    is_file = tokenizer.name == TOKENIZER_NAME
    if not (tokenizer if is_file else tokenizer / TOKENIZER_NAME).is_file():
        return open_model(tokenizer)
    alone = Checkpoint(tokenizer.parent if is_file else tokenizer, {})
    alone.config = read_json(alone.path / "config.json") or model.source.config
    return TextModel(alone, model.arch, alone)


def chat_prompt(path: Path, text: str, tokenizer: Path | None = None) -> str:
    """Return `text` as the user's message in the chat template of the model at `path`, or of `tokenizer`."""
    with open_model(path) as model, open_teller(model, tokenizer) as teller:
        return Vocabulary(teller).chat_text([{"role": "user", "content": text}])


class Pieces:
    """Text of a growing sequence of tokens, never with half a character; special tokens have none.

    What follows one another joins to what `Tokenizer.decode` makes of all tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = {n for n, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Return the characters that `token` completes."""
        return self._utf8.decode(b"" if token in self._special else self._bytes(token))

    def rest(self) -> str:
        """Return what the end leaves of an unfinished character: U+FFFD, or nothing."""
        return self._utf8.decode(b"", final=True)

    def _bytes(self, token: int) -> bytes:
        text = self._tokenizer.id_to_token(token) or ""
        try:
            return bytes(_BYTES[character] for character in text)
        except KeyError:  # an added token is spelled as it is
            return text.encode()


def _byte_characters() -> dict[str, int]:
    """Return the byte that each character stands for in a byte-level vocabulary (GPT-2, encoder.py)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


_BYTES = _byte_characters()
