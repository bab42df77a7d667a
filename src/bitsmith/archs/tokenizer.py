"""A tokenizer between Hugging Face's files and GGUF metadata: byte-level BPE, recognised by its regex.

GGUF keys and their values follow llama.cpp's converter (gguf-py/gguf/vocab.py, conversion/base.py).
Chat templates are carried as text and never run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from bitsmith.archs.arch import Architecture
from bitsmith.errors import BitsmithError, DamagedFileError, UnsupportedError, printable
from bitsmith.store.checkpoint import Checkpoint
from bitsmith.store.safetensors import side_file

_TAIL = r"+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?"
PRE_TOKENIZER_REGEXES = {
    "qwen35": _CONTRACTIONS + r"[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]" + _TAIL,
    "qwen2": _CONTRACTIONS + r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]" + _TAIL,
}
"""`tokenizer.ggml.pre` and the regex it stands for, as Qwen's tokenizer.json files write it."""

TOKENIZER_NAME = "tokenizer.json"
TOKENIZER_SUFFIX = ".tokenizer"
"""Of the folder beside a weight file that has no place for them, with the `TOKENIZER_FILES`."""

TOKENIZER_FILES = (
    TOKENIZER_NAME, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json",
    "generation_config.json",
)  # fmt: skip
"""What a Hugging Face folder tells of text: tokens, chat template, settings for generating."""
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # tokenizer.ggml.token_type
_SPECIAL_KEYS = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unknown",
    "sep": "seperator",  # llama.cpp spells it so
    "pad": "padding",
    "cls": "cls",
    "mask": "mask",
}
_NORMALIZER_KEY = "bitsmith.tokenizer.normalizer"
_Item = TypeVar("_Item", str, int)
_SPACE_IN_MERGE = chr(ord(" ") + 256)


def tokenizer_metadata(checkpoint: Checkpoint, arch: Architecture) -> tuple[dict[str, Any], list[str]]:
    """Return the GGUF key/values of a Hugging Face folder's tokenizer, and warnings worth printing.

    A folder without tokenizer.json gives `no_vocab`, which llama.cpp runs on token ids alone.

    Raises UnsupportedError for a tokenizer that llama.cpp would read differently (another model than
    byte-level BPE, an unknown pre-tokenizer regex, stripping tokens), DamagedFileError for a broken file.
    """
    folder = tokenizer_folder(checkpoint)
    file = folder / TOKENIZER_NAME
    vocab_size = arch.number("vocab_size")
    if not file.is_file():
        keys: dict[str, Any] = {
            f"{arch.gguf_arch}.vocab_size": vocab_size,
            "tokenizer.ggml.model": "no_vocab",
        }
        return keys, [f"{folder}: no tokenizer.json; the GGUF has no tokenizer and takes token ids only"]
    tokenizer = json.loads(_load_file(file).to_str())  # in the package's own, checked form
    settings = read_json(folder / "tokenizer_config.json")
    _refuse_other_models(tokenizer, file)
    tokens, types = _token_table(tokenizer, vocab_size, file)
    keys = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _pre_tokenizer_name(tokenizer, file),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [_merge_line(merge) for merge in tokenizer["model"]["merges"]],
    }
    if tokenizer.get("normalizer") is None:
        keys[_NORMALIZER_KEY] = "none"
    configs = [checkpoint.config, arch.text_config, read_json(folder / "generation_config.json")]
    keys |= _special_ids(tokenizer, settings, configs, vocab_size)
    keys |= _added_ends(tokenizer, settings)
    keys |= _chat_templates(folder, settings)
    return keys, []


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """Return the tokenizer of a Hugging Face folder or a GGUF file; both give the same ids for one model.

    Raises BitsmithError if there is none, UnsupportedError or DamagedFileError if it cannot be used.
    """
    if "tokenizer.ggml.model" in checkpoint.metadata:
        return tokenizer_from_gguf(checkpoint.metadata, checkpoint.path)
    file = tokenizer_folder(checkpoint) / TOKENIZER_NAME
    if not file.is_file():
        raise BitsmithError(f"{TOKENIZER_NAME} is missing", path=file.parent)
    return _load_file(file)


def tokenizer_from_gguf(metadata: Mapping[str, Any], path: Path) -> Tokenizer:
    """Return the tokenizer that the keys `tokenizer.ggml.*` describe; the inverse of `tokenizer_metadata`.

    Raises UnsupportedError for another model than byte-level BPE or an unknown pre-tokenizer,
    DamagedFileError for lists that do not fit together.
    """
    model, pre = metadata.get("tokenizer.ggml.model"), str(metadata.get("tokenizer.ggml.pre"))
    if model != "gpt2" or pre not in PRE_TOKENIZER_REGEXES:
        raise UnsupportedError(
            f"tokenizer {printable(str(model))!r} with pre-tokenizer {printable(pre)!r} is unsupported; "
            f"known: 'gpt2' with {', '.join(map(repr, PRE_TOKENIZER_REGEXES))}",
            path=path,
        )
    tokens, types = _list_of(str, metadata, "tokens", path), _list_of(int, metadata, "token_type", path)
    if len(tokens) != len(types):
        raise DamagedFileError(f"has {len(tokens)} tokenizer.ggml.tokens and {len(types)} types", path=path)
    vocab = {
        token: number
        for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind != UNUSED
    }
    merges = [_split_merge(line) for line in _list_of(str, metadata, "merges", path)]
    try:
        tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges))
    except Exception as error:  # the tokenizers package raises plain Exception
        raise DamagedFileError(f"its tokenizer does not fit: {printable(str(error))}", path=path) from error
    if metadata.get(_NORMALIZER_KEY) != "none":
        tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRE_TOKENIZER_REGEXES[pre]), behavior="isolated", invert=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = [
        AddedToken(token, special=kind == CONTROL, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (CONTROL, USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    return tokenizer


def _list_of(kind: type[_Item], metadata: Mapping[str, Any], key: str, path: Path) -> list[_Item]:
    value = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(value, list) or not all(type(item) is kind for item in value):
        raise DamagedFileError(f"tokenizer.ggml.{key} is not a list of {kind.__name__}", path=path)
    return value


def _load_file(file: Path) -> Tokenizer:
    text = _utf8(side_file(file.parent, file.name) or b"", file)
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the tokenizers package raises plain Exception
        raise DamagedFileError(f"is not a tokenizer: {printable(str(error))}", path=file) from error


def tokenizer_folder(checkpoint: Checkpoint) -> Path:
    """Return where the tokenizer is: the folder itself; for a file `FILE.tokenizer`, or else its folder."""
    path = checkpoint.path
    if path.is_dir():
        return path
    own = path.with_name(path.name + TOKENIZER_SUFFIX)
    return own if own.is_dir() else path.parent


def read_json(file: Path) -> dict[str, Any]:
    """Return a JSON object of a model's folder, an empty one where the file is absent.

    Raises DamagedFileError for anything else, and as `side_file` does.
    """
    data = side_file(file.parent, file.name)
    if data is None:
        return {}
    text = _utf8(data, file)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"is not JSON: {printable(str(error))}", path=file) from error
    if not isinstance(content, dict):
        raise DamagedFileError("is not a JSON object", path=file)
    return content


def _utf8(data: bytes, file: Path) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DamagedFileError(f"is not UTF-8 at byte {error.start}", path=file) from error


def _refuse_other_models(tokenizer: dict[str, Any], file: Path) -> None:
    model = tokenizer["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise UnsupportedError(f"model {model['type']!r} is not supported; known: byte-level BPE", path=file)
    normalizer = tokenizer.get("normalizer")
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise UnsupportedError(
            f"normalizer {printable(str(normalizer.get('type')))!r} is not supported; known: NFC or none",
            path=file,
        )


def _pre_tokenizer_name(tokenizer: dict[str, Any], file: Path) -> str:
    """Return `tokenizer.ggml.pre` for the regex that the pre-tokenizer splits by."""
    whole = tokenizer.get("pre_tokenizer") or {}
    parts = whole.get("pretokenizers", [whole])
    regexes = [
        pattern["Regex"] if "Regex" in pattern else str(pattern)
        for part in parts
        if part.get("type") == "Split" and isinstance(pattern := part.get("pattern"), dict)
    ]
    for name, regex in PRE_TOKENIZER_REGEXES.items():
        if regexes == [regex] and [part.get("type") for part in parts] == ["Split", "ByteLevel"]:
            return name
    found = ", ".join(regexes) or str(whole.get("type"))
    raise UnsupportedError(
        f"pre-tokenizer {printable(found)!r} is none of those known by llama.cpp's names "
        f"{', '.join(PRE_TOKENIZER_REGEXES)}",
        path=file,
    )


def _token_table(tokenizer: dict[str, Any], vocab_size: int, file: Path) -> tuple[list[str], list[int]]:
    """Return every id's token and type, padded to `vocab_size` with unused `[PAD{id}]`."""
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for token, number, kind in _entries(tokenizer, file):
        if not 0 <= number < vocab_size:
            raise BitsmithError(
                f"token {printable(token)!r} has id {number}, the model's vocab_size is {vocab_size}",
                path=file,
            )
        tokens[number], types[number] = token, kind
    return tokens, types


def _entries(tokenizer: dict[str, Any], file: Path) -> Iterator[tuple[str, int, int]]:
    yield from ((token, number, NORMAL) for token, number in tokenizer["model"]["vocab"].items())
    for added in tokenizer.get("added_tokens", []):
        token = added["content"]
        if added.get("lstrip") or added.get("rstrip") or added.get("single_word"):
            raise UnsupportedError(
                f"added token {printable(token)!r} matches beyond its own text, which GGUF cannot say",
                path=file,
            )
        looks_special = token.startswith("<|") and token.endswith("|>")
        yield token, added["id"], CONTROL if added.get("special") or looks_special else USER_DEFINED


def _merge_line(merge: str | list[str]) -> str:
    if isinstance(merge, str):
        return merge
    return " ".join(part.replace(" ", _SPACE_IN_MERGE) for part in merge)


def _split_merge(line: str) -> tuple[str, str]:
    first, _, second = line[1:].partition(" ")  # a merge may start with the space itself
    return line[:1] + first, second


def _special_ids(
    tokenizer: dict[str, Any], settings: dict[str, Any], configs: list[dict[str, Any]], vocab_size: int
) -> dict[str, Any]:
    """Return the special tokens' ids: tokenizer_config names them first, then the configs give ids."""
    by_content = {added["content"]: added["id"] for added in tokenizer.get("added_tokens", [])}
    found: dict[str, Any] = {}
    for kind, key in _SPECIAL_KEYS.items():
        content = _content(settings.get(f"{kind}_token"))
        given = [config.get(f"{kind}_token_id") for config in configs]
        firsts = [ids[0] if isinstance(ids, list) and ids else ids for ids in given]
        candidates = [by_content.get(str(content)), *firsts]
        usable = [n for n in candidates if type(n) is int and 0 <= n < vocab_size]
        if usable:
            found[f"tokenizer.ggml.{key}_token_id"] = usable[0]
    return found


def _content(entry: Any) -> Any:
    return entry.get("content") if isinstance(entry, dict) else entry


def _added_ends(tokenizer: dict[str, Any], settings: dict[str, Any]) -> dict[str, bool]:
    """Return whether bos and eos are added: not by a ByteLevel post-processor, else the settings say.

    Where the settings are silent, as transformers 5 writes them, a template that starts or ends with the
    token does.
    """
    processor = tokenizer.get("post_processor") or {}
    parts = processor.get("processors", [processor])
    kinds = [part.get("type") for part in parts]
    template = next((p.get("single") or [] for p in parts if p.get("type") == "TemplateProcessing"), [])
    ends: dict[str, bool] = {}
    for kind, place in (("bos", 0), ("eos", -1), ("sep", None)):
        asked = settings.get(f"add_{kind}_token")
        if asked is None and place is not None and len(template) > 1 and "SpecialToken" in template[place]:
            asked = template[place]["SpecialToken"]["id"] == _content(settings.get(f"{kind}_token"))
        if "ByteLevel" in kinds and kind != "sep":
            ends[f"tokenizer.ggml.add_{kind}_token"] = False
        elif isinstance(asked, bool):
            ends[f"tokenizer.ggml.add_{kind}_token"] = asked
    return ends


def _chat_templates(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the chat templates as text: of tokenizer_config.json, else of chat_template.jinja or .json."""
    template = settings.get("chat_template")
    if template is None and (jinja := side_file(folder, "chat_template.jinja")) is not None:
        template = _utf8(jinja, folder / "chat_template.jinja")
    if template is None:
        template = read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, str):
        return {"tokenizer.chat_template": template}
    keys: dict[str, Any] = {}
    names = []
    for choice in template if isinstance(template, list) else []:
        if not isinstance(choice, dict) or not all(
            isinstance(choice.get(k), str) for k in ("name", "template")
        ):
            raise DamagedFileError("chat_template is neither text nor a list of named texts", path=folder)
        name = "".join(c if c.isascii() and c.isalnum() else "_" for c in choice["name"])
        if name == "default":
            keys["tokenizer.chat_template"] = choice["template"]
        else:
            names.append(name)
            keys[f"tokenizer.chat_template.{name}"] = choice["template"]
    return keys | ({"tokenizer.chat_templates": sorted(names)} if names else {})
