"""Generating with our own forward: transformers' tokens, whole characters, clear refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from bitsmith.cli.main import app
from bitsmith.errors import BitsmithError, UnsupportedError
from bitsmith.run import decode
from bitsmith.run.cellm import write_cellm
from bitsmith.run.continuation import Chat, continue_prompt
from bitsmith.run.decode import Decoder, positions
from bitsmith.run.evaluate import open_model
from bitsmith.run.execute import compress
from bitsmith.run.forward import final_hidden_states
from bitsmith.run.generate import continue_with_llama
from bitsmith.run.sampling import GREEDY, Sampling
from bitsmith.run.template import render
from bitsmith.run.vocabulary import Pieces, Vocabulary, chat_prompt

PROMPT = "def __init__(self, name, value):\n"


@pytest.fixture(scope="module")
def ggufs(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gguf")
    return {name: compress(demo_model, folder / f"{name}.gguf", name).out for name in ("BF16", "F32")}


@pytest.fixture(scope="module")
def tokenizer(demo_model: Path) -> Tokenizer:
    return Tokenizer.from_file(str(demo_model / "tokenizer.json"))


def _of_transformers(folder: Path, tokens: list[int], n_tokens: int) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        ids = torch.tensor([tokens])
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_tokens, do_sample=False, pad_token_id=0
        )
    return found[0, len(tokens) :].tolist()


@pytest.fixture(scope="module")
def expected(demo_model: Path, tokenizer: Tokenizer) -> list[int]:
    """128 greedy tokens of transformers on the original, in float32."""
    found = _of_transformers(demo_model, tokenizer.encode(PROMPT).ids, 128)
    assert len(found) == 128
    return found


@pytest.mark.parametrize("kind", ["folder", pytest.param("BF16", marks=pytest.mark.slow), "F32"])
def test_greedy_tokens_are_transformers_of_the_original(
    kind: str, demo_model: Path, ggufs: dict[str, Path], expected: list[int], tokenizer: Tokenizer
) -> None:
    found = continue_prompt(demo_model if kind == "folder" else ggufs[kind], PROMPT, 128)
    assert list(found.tokens) == expected
    assert (found.text, found.stopped) == (tokenizer.decode(expected), "length")


@pytest.mark.parametrize("name", ["tiny_qwen3_5_tied", "tiny_qwen3"])
@pytest.mark.parametrize("prompt", [[7], [3, 1, 4, 1, 5, 9, 2, 6]])
def test_greedy_tokens_of_other_models_are_transformers(
    name: str, prompt: list[int], request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(name)
    found, following = [], prompt
    with open_model(folder) as model:
        decoder = Decoder(model, 64)
        while len(found) < 24:
            following = [int(decoder.feed(following).argmax())]
            found += following
    assert found == _of_transformers(folder, prompt, 24)


@pytest.mark.parametrize("name", ["tiny_qwen3_5", "tiny_qwen3_5_tied", "tiny_qwen3", "demo_model"])
def test_steps_and_blocks_give_the_logits_of_the_whole(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = np.random.default_rng(0).integers(0, 500, 40)
    with open_model(request.getfixturevalue(name)) as model:
        states = final_hidden_states(model, np.append(tokens, 0)[None], 0)[0]
        expected = states @ model.head.read().T
        decoder = Decoder(model, 40)
        monkeypatch.setattr(decode, "_BLOCK_TOKENS", 7)  # 19 tokens in blocks of 7, 7 and 5
        found = [decoder.feed(tokens[:19].tolist()), *(decoder.feed([int(one)]) for one in tokens[19:30])]
        found.append(decoder.feed(tokens[30:].tolist()))
    wanted = expected[[*range(18, 30), 39]]
    assert np.abs(np.array(found) - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_nothing_is_computed_twice(demo_model: Path) -> None:
    widths: list[int] = []
    with open_model(demo_model) as model:
        decoder = Decoder(model, 16)
        for layer in decoder._layers:
            layer.register_forward_pre_hook(lambda _, given: widths.append(given[0].shape[1]))
        for tokens in ([1, 2, 3, 4, 5], [6], [7]):
            decoder.feed(tokens)
    assert widths == [5] * 4 + [1] * 8


def test_memory_is_counted_and_its_lack_refused(demo_model: Path) -> None:
    with open_model(demo_model) as model:
        decoder = Decoder(model, 100)
        held = {id(t): t.nbytes for layer in decoder._layers for t in layer.parameters()}
        held |= {id(t): t.nbytes for t in (*decoder._norm.parameters(), decoder._head)}
        assert decoder.weight_bytes == sum(held.values())
        decoder.feed([1] * 100)
        states = [
            state
            for layer in decoder._cache.layers
            for state in (
                *getattr(layer, "conv_states", {}).values(),
                *getattr(layer, "recurrent_states", {}).values(),
                getattr(layer, "keys", None),
                getattr(layer, "values", None),
            )
            if isinstance(state, torch.Tensor)
        ]
        assert decoder.cache_bytes == sum(state.nbytes for state in states)
        needed = decoder.weight_bytes + decoder.cache_bytes
        Decoder(model, 100, memory_bytes=needed)
        with pytest.raises(
            BitsmithError, match=rf"{decoder.weight_bytes} bytes .* {needed - 1} are available"
        ):
            Decoder(model, 100, memory_bytes=needed - 1)


def test_what_does_not_fit_in_the_context_is_refused(demo_model: Path, ggufs: dict[str, Path]) -> None:
    for path in (demo_model, ggufs["BF16"]):
        with pytest.raises(BitsmithError, match=r"the prompt has 10 tokens, the context holds 9"):
            continue_prompt(path, PROMPT, 4, ctx_tokens=9)
        with pytest.raises(BitsmithError, match=r"the prompt has 4\d\d\d tokens, the context holds 4096"):
            continue_prompt(path, "1" * 4100, 4)
        with pytest.raises(BitsmithError, match=r"context of 4097 tokens .* positions for 4096"):
            continue_prompt(path, PROMPT, 4, ctx_tokens=4097)
        with pytest.raises(BitsmithError, match="no tokens"):
            continue_prompt(path, "", 4)
    with pytest.raises(BitsmithError, match=r"the prompt has 10 tokens, the context holds 9"):
        continue_with_llama(ggufs["BF16"], PROMPT, 4, ctx_tokens=9)


def test_the_end_of_the_context_ends_the_text(demo_model: Path) -> None:
    found = continue_prompt(demo_model, PROMPT, 64, ctx_tokens=14)
    assert (found.n_tokens, found.stopped) == (5, "end of the context")  # the last needs no room
    assert found.tokens == continue_prompt(demo_model, PROMPT, 5).tokens


def test_tokens_without_an_embedding_are_refused(demo_model: Path) -> None:
    with open_model(demo_model) as model, pytest.raises(BitsmithError, match=r"embed_tokens.*4096"):
        Decoder(model, 8).feed([1, 4096])


def test_weights_that_overflow_are_refused(demo_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(demo_model, tmp_path / "model"))
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"][3] = 3e38
    state["lm_head.weight"][7, 3] = 3e38
    save_file(state, folder / "model.safetensors")
    with pytest.raises(BitsmithError, match="logits after 10 tokens are NaN or infinite"):
        continue_prompt(folder, PROMPT, 4)


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_stop_tokens_end_the_text(file: str, demo_model: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    plain = continue_prompt(demo_model, PROMPT, 8)
    folder = Path(shutil.copytree(demo_model, tmp_path / "model"))
    config = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
    (folder / file).write_text(json.dumps(config | {"eos_token_id": [4093, plain.tokens[3]]}))
    cut = plain.tokens.index(plain.tokens[3])
    found = continue_prompt(folder, PROMPT, 8)
    assert found.tokens == plain.tokens[:cut]
    assert found.stopped == f"stop token {tokenizer.id_to_token(plain.tokens[3])}"


def test_stop_tokens_are_the_same_of_folder_and_gguf(demo_model: Path, ggufs: dict[str, Path]) -> None:
    for path in (demo_model, ggufs["BF16"]):
        with open_model(path) as model:
            assert Vocabulary(model).stops == {4093, 4095}


def test_pieces_join_to_the_text_and_never_split_a_character(tokenizer: Tokenizer) -> None:
    text = "naïve café: 日本語, 😀 and\r\n\ttabs"
    pieces = Pieces(tokenizer)
    found = [pieces.push(token) for token in tokenizer.encode(text).ids]
    assert any(piece == "" for piece in found)  # some token ends inside a character
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in found)
    assert "".join(found) + pieces.rest() == text


@pytest.mark.parametrize("seed", range(20))
def test_pieces_of_any_tokens_join_to_what_the_tokenizer_decodes(seed: int, tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(seed)
    tokens = np.where(rng.random(200) < 0.5, rng.integers(0, 256, 200), rng.integers(0, 4096, 200)).tolist()
    pieces = Pieces(tokenizer)
    assert "".join([*map(pieces.push, tokens), pieces.rest()]) == tokenizer.decode(tokens)


def test_the_chat_template_is_transformers(demo_model: Path, ggufs: dict[str, Path]) -> None:
    user = "What is 2 + 2? <b>\n"
    theirs = PreTrainedTokenizerFast.from_pretrained(demo_model)
    expected = theirs.apply_chat_template(
        [{"role": "user", "content": user}], tokenize=False, add_generation_prompt=True
    )
    assert expected.startswith("<|im_start|>user\n")
    for path in (demo_model, ggufs["BF16"]):
        assert chat_prompt(path, user) == expected
    found = continue_prompt(ggufs["F32"], user, 12, chat=True)
    assert found.tokens == continue_prompt(demo_model, expected, 12).tokens
    with open_model(demo_model) as model:
        assert Vocabulary(model).encode(expected) == theirs(expected)["input_ids"]


def test_a_model_without_a_chat_template_says_so(demo_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(demo_model, tmp_path / "model"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(BitsmithError, match="has no chat template"):
        continue_prompt(folder, "hi", 4, chat=True)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes over 1 s"),
        ("{{ 'a' * 10 ** 11 }}", "fails|stopped"),
        ("{% for m in range(20) %}{{ 'a' * 1000000 }}{% endfor %}", "it makes 20000000 characters"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ raise_exception('only\nsystem') }}", r"only\\nsystem"),
        ("{% for %}", "fails"),
    ],
)
def test_hostile_and_broken_templates_are_refused(template: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=expected):
        render(template, {}, tmp_path, seconds=1 if expected.startswith("takes") else 60)


def test_templates_have_what_transformers_offers(tmp_path: Path) -> None:
    template = (
        "{%- for m in messages %}\n{%- if loop.first %}{% continue %}{% endif %}\n"
        "    {%- if m.x is defined %}{{ m | tojson }}{% break %}{% endif %}\n{%- endfor %}"
        "{{ strftime_now('%%') }}"
    )
    found = render(template, {"messages": [{}, {"x": "<é>"}, {"x": 2}]}, tmp_path)
    assert found == '{"x": "<é>"}%'


def test_a_conversation_goes_on_from_what_is_in_memory(demo_model: Path) -> None:
    with open_model(demo_model) as model:
        talk = Chat(model, GREEDY, ctx_tokens=512)
        first, second = talk.say("import os", 12), talk.say("class A:", 12)
        vocabulary = Vocabulary(model)
        messages = [("user", "import os"), ("assistant", first.text), ("user", "class A:")]
        whole = vocabulary.chat_text([{"role": role, "content": text} for role, text in messages])
    afresh = continue_prompt(demo_model, whole, 12)
    assert second.tokens == afresh.tokens
    assert second.prompt_tokens == afresh.prompt_tokens - first.prompt_tokens - 11  # the last was never fed


def test_a_turn_that_does_not_fit_leaves_the_conversation_as_it_was(demo_model: Path) -> None:
    with open_model(demo_model) as model:
        talk, undisturbed = Chat(model, GREEDY, ctx_tokens=64), Chat(model, GREEDY, ctx_tokens=64)
        for one in (talk, undisturbed):
            one.say("import os", 4)
        with pytest.raises(BitsmithError, match="context holds 64"):
            talk.say("word " * 99, 4)
        after, expected = talk.say("def", 4), undisturbed.say("def", 4)
    assert (after.tokens, after.prompt_tokens) == (expected.tokens, expected.prompt_tokens)


def test_llama_cpp_writes_the_same_text_and_streams_it(ggufs: dict[str, Path]) -> None:
    pieces: list[str] = []
    real = continue_with_llama(ggufs["F32"], PROMPT, 24, emit=pieces.append)
    ours = continue_prompt(ggufs["F32"], PROMPT, 24)
    assert real.text == ours.text == "".join(pieces)
    assert len(pieces) > 12
    assert (real.n_tokens, real.prompt_tokens, real.stopped) == (24, 10, "length")
    seeded = [
        continue_with_llama(ggufs["F32"], PROMPT, 12, Sampling(temperature=2.0, seed=seed)).text
        for seed in (1, 1, 2)
    ]
    assert seeded[0] == seeded[1] != seeded[2]


def test_a_cellm_file_takes_its_tokenizer_from_elsewhere(demo_model: Path, tmp_path: Path) -> None:
    file = write_cellm(demo_model, tmp_path / "m.cellm", "f16").out
    shutil.rmtree(tmp_path / "m.cellm.tokenizer")
    with pytest.raises(BitsmithError, match=r"m\.cellm: has no tokenizer: put its tokenizer.json beside it"):
        continue_prompt(file, PROMPT, 4)
    expected = continue_prompt(demo_model, PROMPT, 8, chat=True).tokens
    for tokenizer in (demo_model, demo_model / "tokenizer.json"):
        assert continue_prompt(file, PROMPT, 8, chat=True, tokenizer=tokenizer).tokens == expected
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model / name, tmp_path)
    assert continue_prompt(tmp_path, PROMPT, 8, chat=True).tokens == expected


def test_the_seed_decides_the_text(demo_model: Path) -> None:
    texts = [
        continue_prompt(demo_model, PROMPT, 12, Sampling(temperature=1.5, seed=seed)).text
        for seed in (3, 3, 4)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_the_command_writes_the_text_and_the_speed(demo_model: Path) -> None:
    options = ["-p", PROMPT, "--gen", "6", "--temperature", "0"]
    done = CliRunner().invoke(app, ["generate", str(demo_model), *options])
    assert (done.exit_code, done.stdout) == (0, continue_prompt(demo_model, PROMPT, 6).text + "\n")
    assert len(done.stderr.splitlines()) == 1
    for part in (
        "prompt 10 tokens, ",
        "new 6 tokens, ",
        " tokens/s; ended by length; weights 21,080,512 bytes",
    ):
        assert part in done.stderr


def test_the_chat_command_answers_line_by_line(demo_model: Path) -> None:
    options = [str(demo_model), "-n", "4", "--temperature", "0"]
    done = CliRunner().invoke(app, ["chat", *options], input="import os\n\nclass A:\n")
    assert done.exit_code == 0, done.output
    assert done.stderr.count("new 4 tokens") == 2
    first = continue_prompt(demo_model, "import os", 4, chat=True).text
    assert done.stdout.startswith(first + "\n")
    done = CliRunner().invoke(app, ["chat", *options, "--ctx", "9"], input="import os, sys\n")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "the context holds 9" in done.stderr


def test_positions_are_the_models_unless_fewer_are_asked_for(demo_model: Path) -> None:
    with open_model(demo_model) as model:
        assert (positions(model), positions(model, 8)) == (4096, 8)
