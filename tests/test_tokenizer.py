"""The tokenizer between Hugging Face's files, GGUF metadata and real llama.cpp: the same ids everywhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from bitsmith.archs import architecture_of, export_view, load_tokenizer, tokenizer_metadata
from bitsmith.archs.tokenizer import PRE_TOKENIZER_REGEXES, tokenizer_from_gguf
from bitsmith.errors import BitsmithError, DamagedFileError, UnsupportedError
from bitsmith.formats import format_named
from bitsmith.lab.corpus import QWEN35_REGEX, held_out_text
from bitsmith.lab.models import DEMO_MODEL
from bitsmith.store import Checkpoint, TensorInfo, open_checkpoint, write_gguf

VOCAB_SIZE = 4352
TRICKY = [
    "",
    " ",
    "\n\n \n\t\t  x",
    "  leading and trailing  ",
    "I'm sure they'LL say we'Ve 'RE it's 'D",
    "3 33 333 3333 3.14e-10 ½ ² ٣ 四",
    "def f(x):\n    return {'a': [1, 2], \"b\": x**2}  # ok\r\n\r\n",
    "héllo wörld ﬁne ÀÉÎ ñandú Straße",
    "हिन्दी में लिखा है, ಕನ್ನಡ, ไทย, བོད་ཡིག",
    "我想在apple工作1314151天～ 日本語のテキスト 한국어",
    "🚀 (normal) 😶‍🌫️ 👩‍👩‍👧 ✅ 🦙🦙 🇫🇷",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start <|im_end|><|endoftext|> <|endoftext|>x |>",
    "\u00a0nbsp\u2003em\u3000ideographic\u200bzero\ufeffbom\u0085nel",
    "a\u0000b\u0007\u001b[31mred\u007f",
    "'''```\"\"\"......!!!!!!??????   ------======= &&||^^",
    "العربية עברית نص مختلط text",
    "word" * 200 + "_" * 50 + " " * 70 + "end",
]


@pytest.fixture(scope="module")
def original() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))


@pytest.fixture(scope="module")
def imported() -> Tokenizer:
    return tokenizer_from_gguf(keys_of(DEMO_MODEL), DEMO_MODEL)


def checkpoint_at(folder: Path, **config: object) -> Checkpoint:
    checkpoint = Checkpoint(folder, {})
    checkpoint.config = {"model_type": "qwen3", "vocab_size": VOCAB_SIZE, **config}
    return checkpoint


def keys_of(folder: Path, **config: object) -> dict:
    checkpoint = checkpoint_at(folder, **config)
    keys, warnings = tokenizer_metadata(checkpoint, architecture_of(checkpoint))
    assert warnings == []
    return keys


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, tmp_path / name)
    return tmp_path


def change(file: Path, **entries: object) -> None:
    content = json.loads(file.read_text()) | entries
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.mark.parametrize("text", TRICKY)
def test_gguf_metadata_gives_the_same_ids_and_text(text, original, imported):
    ids = original.encode(text).ids
    assert imported.encode(text).ids == ids
    assert imported.decode(ids, skip_special_tokens=False) == original.decode(ids, skip_special_tokens=False)
    assert imported.decode(ids) == original.decode(ids)


@settings(max_examples=200)
@given(st.text(max_size=60))
def test_any_text_gives_the_same_ids(original, imported, text):
    assert imported.encode(text).ids == original.encode(text).ids


def test_vocabularies_are_equal(original, imported):
    assert imported.get_vocab() == original.get_vocab()


def test_real_llama_cpp_gives_the_same_ids(tiny_qwen3, original, tmp_path):
    pytest.importorskip("xllamacpp")
    from llama_oracle import Llama

    out = write_bf16_gguf(tiny_qwen3, tmp_path / "model.gguf")
    with Llama(out) as llama:
        assert llama.vocab_size == VOCAB_SIZE
        for text in [*TRICKY, held_out_text(50_000)]:
            assert llama.tokenize(text) == original.encode(text).ids, text[:80]
    with open_checkpoint(out) as checkpoint:
        back = load_tokenizer(checkpoint)
    assert [back.encode(text).ids for text in TRICKY] == [original.encode(text).ids for text in TRICKY]


def test_real_llama_cpp_runs_a_model_without_a_tokenizer(tiny_qwen3, tmp_path):
    pytest.importorskip("xllamacpp")
    from llama_oracle import Llama

    bare = tmp_path / "bare"
    shutil.copytree(tiny_qwen3, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    keys, warnings = tokenizer_metadata(open_checkpoint(bare), architecture_of(open_checkpoint(bare)))
    assert keys["tokenizer.ggml.model"] == "no_vocab"
    assert len(warnings) == 1
    assert "no tokenizer.json" in warnings[0]
    with Llama(write_bf16_gguf(bare, tmp_path / "bare.gguf")) as llama:
        assert llama.vocab_size == VOCAB_SIZE
        assert llama.last_logits([1, 2, 3]).shape == (VOCAB_SIZE,)
    with pytest.raises(BitsmithError, match=r"tokenizer\.json is missing"):
        load_tokenizer(open_checkpoint(bare))
    with pytest.raises(UnsupportedError, match="no_vocab"):
        load_tokenizer(open_checkpoint(tmp_path / "bare.gguf"))


def write_bf16_gguf(folder: Path, out: Path) -> Path:
    checkpoint = open_checkpoint(folder)
    export = export_view(checkpoint)
    keys, _ = tokenizer_metadata(checkpoint, export.arch)
    refs = {tensor.gguf_name: tensor.ref for tensor in export.tensors}
    infos = [TensorInfo(t.gguf_name, t.ref.shape, t.dtype) for t in export.tensors]
    write_gguf(
        out,
        export.metadata | keys,
        infos,
        lambda info: [format_named(info.type).encode(refs[info.name].read().reshape(1, -1))],
    )
    return out


def test_tokens_are_typed_and_padded(original):
    keys = keys_of(DEMO_MODEL)
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == VOCAB_SIZE
    used = original.get_vocab_size()
    assert tokens[used:] == [f"[PAD{n}]" for n in range(used, VOCAB_SIZE)]
    assert set(types[used:]) == {5}
    specials = {token for token, kind in zip(tokens, types, strict=True) if kind == 3}
    assert specials == {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}
    assert keys["tokenizer.ggml.eos_token_id"] == original.token_to_id("<|endoftext|>")
    assert keys["tokenizer.ggml.padding_token_id"] == original.token_to_id("<|endoftext|>")
    assert keys["tokenizer.ggml.add_bos_token"] is False
    assert "im_start" in keys["tokenizer.chat_template"]


def test_added_tokens_that_are_not_special_are_user_defined(folder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["<tool_call>", "<|fim_prefix|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    keys = keys_of(folder)
    kinds = dict(zip(keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"], strict=True))
    assert kinds["<tool_call>"] == 4
    assert kinds["<|fim_prefix|>"] == 3
    text = "x <tool_call>{}</tool_call> <|fim_prefix|>"
    assert tokenizer_from_gguf(keys, folder).encode(text).ids == tokenizer.encode(text).ids


def test_merges_written_as_lines_are_the_same(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    pairs = content["model"]["merges"]
    assert isinstance(pairs[0], list)
    content["model"]["merges"] = [" ".join(pair) for pair in pairs]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert keys_of(folder)["tokenizer.ggml.merges"] == keys_of(DEMO_MODEL)["tokenizer.ggml.merges"]


def test_qwen2_and_qwen35_regexes_are_told_apart(folder):
    assert PRE_TOKENIZER_REGEXES["qwen35"] == QWEN35_REGEX
    assert keys_of(folder)["tokenizer.ggml.pre"] == "qwen35"
    set_regex(folder, PRE_TOKENIZER_REGEXES["qwen2"])
    keys = keys_of(folder)
    assert keys["tokenizer.ggml.pre"] == "qwen2"
    qwen2, qwen35 = tokenizer_from_gguf(keys, folder), tokenizer_from_gguf(keys_of(DEMO_MODEL), DEMO_MODEL)
    file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "हिन्दी में"  # vowel signs are marks: words to qwen35, breaks to qwen2
    pieces = qwen2.pre_tokenizer.pre_tokenize_str(text)
    assert pieces == file.pre_tokenizer.pre_tokenize_str(text)
    assert len(pieces) > len(qwen35.pre_tokenizer.pre_tokenize_str(text)) == 2


def set_regex(folder: Path, regex: str) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = regex
    (folder / "tokenizer.json").write_text(json.dumps(content))


def test_a_tokenizer_without_normalizer_stays_so(folder):
    change(folder / "tokenizer.json", normalizer=None)
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("cafe\u0301").ids
    assert tokenizer_from_gguf(keys_of(folder), folder).encode("cafe\u0301").ids == ids
    assert keys_of(DEMO_MODEL).keys() != keys_of(folder).keys()


def test_eos_comes_from_the_first_file_that_names_it(folder, original):
    eos = "tokenizer.ggml.eos_token_id"
    change(folder / "tokenizer_config.json", eos_token={"content": "<|im_end|>"})
    assert keys_of(folder, eos_token_id=7)[eos] == original.token_to_id("<|im_end|>")
    change(folder / "tokenizer_config.json", eos_token=None)
    (folder / "generation_config.json").write_text('{"eos_token_id": [9, 8]}')
    assert keys_of(folder, eos_token_id=7)[eos] == 7
    assert keys_of(folder)[eos] == 9
    assert (
        eos not in keys_of(folder, eos_token_id=VOCAB_SIZE)
        or keys_of(folder, eos_token_id=VOCAB_SIZE)[eos] == 9
    )


def test_chat_templates_are_found_wherever_they_are_kept(folder):
    change(folder / "tokenizer_config.json", chat_template=None)
    assert "tokenizer.chat_template" not in keys_of(folder)
    (folder / "chat_template.json").write_text('{"chat_template": "from json"}')
    assert keys_of(folder)["tokenizer.chat_template"] == "from json"
    (folder / "chat_template.jinja").write_text("from {{ jinja }}")
    assert keys_of(folder)["tokenizer.chat_template"] == "from {{ jinja }}"
    named = [{"name": "default", "template": "d"}, {"name": "tool use", "template": "t"}]
    change(folder / "tokenizer_config.json", chat_template=named)
    keys = keys_of(folder)
    assert keys["tokenizer.chat_template"] == "d"
    assert keys["tokenizer.chat_template.tool_use"] == "t"
    assert keys["tokenizer.chat_templates"] == ["tool_use"]


def test_tokenizers_that_llama_cpp_would_read_differently_are_refused(folder):
    set_regex(folder, r"\p{N}{1,3}")
    with pytest.raises(UnsupportedError, match=r"N\}\{1,3\}"):
        keys_of(folder)
    shutil.copy(DEMO_MODEL / "tokenizer.json", folder / "tokenizer.json")
    change(folder / "tokenizer.json", normalizer={"type": "Lowercase"})
    with pytest.raises(UnsupportedError, match="Lowercase"):
        keys_of(folder)
    shutil.copy(DEMO_MODEL / "tokenizer.json", folder / "tokenizer.json")
    change(folder / "tokenizer.json", model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"})
    with pytest.raises(UnsupportedError, match="WordLevel"):
        keys_of(folder)
    shutil.copy(DEMO_MODEL / "tokenizer.json", folder / "tokenizer.json")
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    change(folder / "tokenizer.json", added_tokens=[added[0] | {"lstrip": True}, *added[1:]])
    with pytest.raises(UnsupportedError, match="endoftext"):
        keys_of(folder)


def test_damaged_tokenizers_are_refused(folder):
    with pytest.raises(BitsmithError, match="vocab_size is 4000"):
        keys_of(folder, vocab_size=4000)
    (folder / "tokenizer_config.json").write_text("[1, 2]")
    with pytest.raises(DamagedFileError, match="not a JSON object"):
        keys_of(folder)
    (folder / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(DamagedFileError, match="not a tokenizer"):
        keys_of(folder)
    (folder / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(DamagedFileError, match="not UTF-8 at byte 0"):
        load_tokenizer(checkpoint_at(folder))


def test_gguf_tokenizers_that_do_not_fit_are_refused():
    keys = keys_of(DEMO_MODEL)
    for changed, message in (
        ({"tokenizer.ggml.pre": "llama-bpe"}, "llama-bpe"),
        ({"tokenizer.ggml.model": "llama"}, "'llama'"),
        ({"tokenizer.ggml.token_type": [1]}, "and 1 types"),
        ({"tokenizer.ggml.tokens": None}, "list of str"),
        ({"tokenizer.ggml.merges": ["never seen"]}, "does not fit"),
    ):
        with pytest.raises(BitsmithError, match=message):
            tokenizer_from_gguf(keys | changed, Path("model.gguf"))
