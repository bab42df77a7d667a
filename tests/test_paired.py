"""Paired activations against transformers' whole models, their layer maps, cost, resuming and refusals."""

import gc
import json
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file

from bitsmith.errors import BitsmithError, DamagedFileError, OutputError, UnsupportedError
from bitsmith.run.paired import SampledLayers, paired
from bitsmith.run.paired_cost import PairedCost, paired_cost
from bitsmith.run.paired_forward import Step, pair_shapes, run_pair
from bitsmith.run.paired_inputs import held_chunks, open_sides
from bitsmith.run.paired_sums import PlaceShape, PlaceSums
from bitsmith.store.paired import MANIFEST_NAME, Paired, open_paired
from paired_models import (
    DELTA,
    DENSE,
    FULL,
    HYBRID,
    LARGE,
    LINES,
    SMALL,
    Rows,
    assert_moments,
    hooked,
    in_eight_bits,
    random_states,
    write_model,
)

CTX, TOKENS = 70, 9 * 70 + 5  # longer than DeltaNet's chunk of 64 and no multiple of it; the rest is cut off


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("models")
    small, large = {**HYBRID, "linear_num_value_heads": 2}, {**HYBRID, "linear_num_value_heads": 4}
    large_types, small_types = [DELTA, DELTA, FULL, DELTA, FULL], [DELTA, FULL, FULL]
    return {
        "qwen3": (
            write_model(folder / "large3", 1, **DENSE, **LARGE, num_hidden_layers=4),
            write_model(folder / "small3", 2, **DENSE, **SMALL, num_hidden_layers=2),
        ),
        "qwen3_5": (
            write_model(folder / "large35", 3, **large, **LARGE, layer_types=large_types),
            write_model(folder / "small35", 4, **small, **SMALL, layer_types=small_types),
        ),
    }


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(LINES))
    return path


@pytest.fixture(scope="module")
def found(
    models: dict[str, tuple[Path, Path]], text: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Paired]:
    folder = tmp_path_factory.mktemp("paired")
    return {
        name: paired(*pair, text, folder / name, tokens=TOKENS, ctx_tokens=CTX)
        for name, pair in models.items()
    }


@pytest.fixture(scope="module")
def whole(
    found: dict[str, Paired], models: dict[str, tuple[Path, Path]]
) -> dict[str, list[tuple[Rows, Rows]]]:
    """What the whole transformers models, teacher and student, see: of fit and of held-out tokens."""
    kept = {}
    for name, one in found.items():
        fit, held = one.tokens()
        assert fit.shape == (8, CTX) and held.shape == (1, CTX)
        both = [hooked(folder, np.concatenate([fit, held])) for folder in models[name]]
        splits = [slice(0, fit.size), slice(fit.size, None)]
        kept[name] = [
            tuple({place: [x[at] for x in layers] for place, layers in seen.items()} for seen in both)
            for at in splits
        ]
    return kept


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5"])
def test_every_moment_equals_the_whole_models(
    found: dict[str, Paired], whole: dict[str, list[tuple[Rows, Rows]]], family: str
) -> None:
    one = found[family]
    (big, small), held = whole[family]
    assert one.manifest.held_chunks == [4] and one.manifest.fit_tokens == len(big["states"][0])
    assert_moments(one.embedded(), big["states"][0], small["states"][0])
    assert_moments(one.final(), big["states"][-1], small["states"][-1])
    for pair, layer in enumerate(one.layer_map):
        for place in ("states", "updates", "mixer", "ffn"):
            assert_moments(getattr(one, place)(pair), big[place][layer], small[place][pair])
    for side, seen in zip(("teacher", "student"), held, strict=True):
        for layer, states in enumerate(seen["states"]):
            sample = one.samples(side, layer)
            assert sample.shape == (1, CTX, states.shape[1])
            np.testing.assert_allclose(sample[0], states, atol=2e-6 * np.abs(states).max())
        for layer, states in enumerate(seen["between"]):
            sample = one.samples_between(side, layer)
            assert sample.shape == (1, CTX, states.shape[1])
            np.testing.assert_allclose(sample[0], states, atol=2e-6 * np.abs(states).max())


def test_layers_stand_beside_layers_of_their_kind(found: dict[str, Paired]) -> None:
    assert found["qwen3_5"].layer_map in {(0, 2, 4), (1, 2, 4)}
    assert found["qwen3_5"].manifest.mapped_by == "cka"
    assert found["qwen3"].manifest.family == "qwen3"


def test_wide_places_keep_blocks_of_heads_and_the_diagonal_of_neurons(
    models: dict[str, tuple[Path, Path]],
    whole: dict[str, list[tuple[Rows, Rows]]],
    text: Path,
    tmp_path: Path,
) -> None:
    pair, layers = models["qwen3_5"], (0, 2, 4)
    one = paired(
        *pair, text, tmp_path / "out", tokens=TOKENS, ctx_tokens=CTX, layer_map=layers, widest_square=33
    )
    big, small = whole["qwen3_5"][0]
    assert one.layer_map == layers and one.manifest.mapped_by == "given"
    for pair, layer in enumerate(layers):
        assert_moments(one.mixer(pair), big["mixer"][layer], small["mixer"][pair])
        assert_moments(one.ffn(pair), big["ffn"][layer], small["ffn"][pair])
        assert one.ffn(pair).tt.shape == (72,) and one.ffn(pair).ss.shape == (40,)
    # two V heads of 16 to each of two K heads; two Q heads of 32 to each of two KV heads
    assert one.mixer(0).tt.shape == (2, 32, 32) and one.mixer(0).ss.shape == (32, 32)
    assert one.mixer(1).tt.shape == (2, 64, 64) and one.mixer(1).ss.shape == (2, 32, 32)


def test_identity_layers_are_passed_over(text: Path, tmp_path: Path) -> None:
    """A teacher that is the student with layers between that write nothing."""
    student = write_model(tmp_path / "student", 5, **DENSE, **SMALL, num_hidden_layers=3)
    stored, places = load_file(student / "model.safetensors"), (1, 2, 5)
    tensors = {name: array for name, array in stored.items() if ".layers." not in name}
    for layer in range(6):
        source = places.index(layer) if layer in places else 0
        mine = {n: a for n, a in stored.items() if n.startswith(f"model.layers.{source}.")}
        for name, array in mine.items():
            writes = name.endswith(("o_proj.weight", "down_proj.weight")) and layer not in places
            tensors[name.replace(f"layers.{source}.", f"layers.{layer}.")] = 0 * array if writes else array
    teacher = write_model(tmp_path / "teacher", 6, tensors, **DENSE, **SMALL, num_hidden_layers=6)
    one = paired(teacher, student, text, tmp_path / "out", tokens=TOKENS, ctx_tokens=CTX)
    assert one.layer_map == places
    for pair in range(3):
        np.testing.assert_array_equal(one.states(pair).tt, one.states(pair).ss)
        for samples in (one.samples, one.samples_between):
            np.testing.assert_array_equal(samples("teacher", places[pair]), samples("student", pair))


def test_compared_layers_are_what_enters_and_what_is_added(found: dict[str, Paired]) -> None:
    one = found["qwen3"]
    states, updates = (SampledLayers(one.path, "teacher", 4, updates=which) for which in (False, True))
    assert len(states) == len(updates) == 4
    assert len(list(states)) == 4
    for layer, (entering, added) in enumerate(zip(states, updates, strict=True)):
        np.testing.assert_array_equal(entering, one.samples("teacher", layer)[0])
        np.testing.assert_array_equal(added, one.samples("teacher", layer + 1)[0] - entering)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_bytes_do_not_depend_on_threads(
    found: dict[str, Paired], models: dict[str, tuple[Path, Path]], text: Path, tmp_path: Path
) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(5 - min(threads, 4))
        paired(*models["qwen3_5"], text, tmp_path / "out", tokens=TOKENS, ctx_tokens=CTX)
    finally:
        torch.set_num_threads(threads)
    assert contents(tmp_path / "out") == contents(found["qwen3_5"].path)


KILLED = """
import os, signal, sys
from pathlib import Path
from bitsmith.run.paired import paired

calls = 0
def progress(stage, done, total):
    global calls
    calls += 1
    if calls == int(sys.argv[5]):
        os.kill(os.getpid(), signal.SIGKILL)

paired(*map(Path, sys.argv[1:5]), tokens=635, ctx_tokens=70, progress=progress)
"""


def at_the_end(_: str, done: int, total: int) -> None:
    assert done <= total
    if done == total:
        raise KeyboardInterrupt


@pytest.mark.slow
def test_a_killed_run_goes_on_at_its_layer_with_the_same_bytes(
    found: dict[str, Paired], models: dict[str, tuple[Path, Path]], text: Path, tmp_path: Path
) -> None:
    out, pair = tmp_path / "out", models["qwen3"]
    # six calls for the samples, two for each layer of the teacher: in the second layer, before it is kept
    arguments = [sys.executable, "-c", KILLED, *pair, text, out, "10"]
    died = subprocess.run(arguments, capture_output=True, check=False, timeout=200)
    assert died.returncode == -signal.SIGKILL, died.stderr
    with pytest.raises(KeyboardInterrupt):  # in the last layer
        paired(*pair, text, out, tokens=TOKENS, ctx_tokens=CTX, progress=at_the_end)
    assert not out.exists() and (tmp_path / ".out.paired").is_dir()
    one = paired(*pair, text, out, tokens=TOKENS, ctx_tokens=CTX)
    assert one.resumed_steps == 8 + 3 + 3  # samples of each layer, then map, tokens, embeddings, three layers
    assert contents(out) == contents(found["qwen3"].path)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_another_run_left_behind_is_refused_or_dropped(
    found: dict[str, Paired], models: dict[str, tuple[Path, Path]], text: Path, tmp_path: Path
) -> None:
    options = {"tokens": TOKENS, "ctx_tokens": CTX}
    with pytest.raises(KeyboardInterrupt):
        paired(*models["qwen3"], text, tmp_path / "out", **options, layer_map=[0, 1], progress=at_the_end)
    with pytest.raises(OutputError, match="finished pieces of a run with other layer map"):
        paired(*models["qwen3"], text, tmp_path / "out", **options)
    one = paired(*models["qwen3"], text, tmp_path / "out", **options, overwrite=True)
    assert one.resumed_steps == 0 and contents(tmp_path / "out") == contents(found["qwen3"].path)


def test_the_cost_is_said_before_and_holds(
    models: dict[str, tuple[Path, Path]], text: Path, tmp_path: Path
) -> None:
    said: list[PairedCost] = []

    def say(cost: PairedCost) -> None:
        assert not (tmp_path / ".out.paired").exists()
        said.append(cost)

    one = paired(
        *models["qwen3"],
        text,
        tmp_path / "out",
        tokens=TOKENS,
        ctx_tokens=CTX,
        say_cost=say,
        layer_map="proportional",
    )
    [cost] = said
    # a layer of the teacher: q and o of 64, k and v of 32 rows by 48, three matrices of 72 by 48
    assert cost.teacher_multiply_adds == 630 * 4 * (2 * 64 * 48 + 2 * 32 * 48 + 3 * 72 * 48)
    assert cost.moment_multiply_adds > 560 * (4 * 2) * (48 * 32)
    assert cost.tokens == 630 and cost.held_tokens == 70 and cost.seconds > 0
    headers = 200 * sum(len(tensors) for tensors in one.manifest.files.values()) + 20_000
    assert 0 <= one.size_bytes - cost.kept_bytes < headers
    assert cost.disk_bytes == cost.kept_bytes + 2 * 4 * 560 * (48 + 32)
    assert cost.memory_bytes > 4 * (2 * 64 * 48 + 3 * 72 * 48)
    assert json.loads(json.dumps(cost.to_json()))["kind"] == "paired_cost"


def test_the_cost_needs_no_forward(models: dict[str, tuple[Path, Path]]) -> None:
    one, ten = (
        paired_cost(*models["qwen3_5"], tokens, ctx_tokens=100, samples=100, measure=False)
        for tokens in (10_000, 100_000)
    )
    assert one.seconds is None and one.memory_bytes == ten.memory_bytes
    assert ten.teacher_multiply_adds == 10 * one.teacher_multiply_adds
    assert one.kept_bytes < ten.kept_bytes < one.kept_bytes + 8 * 90_000 + 1
    narrow = paired_cost(
        *models["qwen3_5"], 10_000, ctx_tokens=100, samples=100, widest_square=33, measure=False
    )
    assert narrow.kept_bytes < one.kept_bytes and narrow.memory_bytes < one.memory_bytes
    assert paired_cost(*models["qwen3_5"], 1000, ctx_tokens=100, samples=100).seconds > 0


def test_an_fp8_teacher_is_read_by_its_scales(
    models: dict[str, tuple[Path, Path]], text: Path, tmp_path: Path
) -> None:
    big, small = models["qwen3"]
    weights = {name: torch.from_numpy(array) for name, array in load_file(big / "model.safetensors").items()}
    plain, packed = dict(weights), dict(weights)
    for name in [name for name in weights if "_proj" in name]:
        codes, scale, value = map(torch.from_numpy, in_eight_bits(weights[name].numpy()))
        plain[name], packed[name] = value, codes.view(torch.float8_e4m3fn)
        packed[f"{name}_scale_inv"] = scale
    settings = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 32]}}
    found = []
    for name, tensors, said in (("plain", plain, {}), ("fp8", packed, settings)):
        shutil.copytree(big, folder := tmp_path / name)
        save_file(tensors, folder / "model.safetensors")
        config = json.loads((big / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | said))
        found.append(paired(folder, small, text, tmp_path / f"{name}-out", tokens=280, ctx_tokens=CTX))
    one, other = (each.manifest for each in found)
    assert one.teacher.sha256 != other.teacher.sha256
    assert one.files == other.files and one.layer_map == other.layer_map


def test_a_layers_weights_go_with_it(models: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """Without a collection of garbage: two layers of a big model may not fit."""
    with open_sides(*models["qwen3"]) as sides:
        step = Step(*(random_states(tmp_path, side) for _, side in sides.named))
        layers = sides.teacher.loaded(1), sides.student.loaded(1)
        sums = {
            place: PlaceSums(shape)
            for place, shape in pair_shapes(sides.teacher, sides.student, (1, 1), 4096).items()
        }
        gc.disable()
        try:
            list(run_pair(*layers, step, sums))
            weights = [weakref.ref(next(one.module.parameters())) for one in layers]
            del layers
            assert [weight() for weight in weights] == [None, None]
        finally:
            gc.enable()


def test_samples_are_spread_and_one_chunk_in_eight_at_most() -> None:
    assert held_chunks(2, 512, 2048).tolist() == [1]
    assert held_chunks(9, 70, 2048).tolist() == [4]
    assert held_chunks(80, 512, 2048).tolist() == [10, 30, 50, 70]
    assert held_chunks(80, 512, 100_000).tolist() == list(range(4, 80, 8))


def test_pairs_that_do_not_fit_are_refused(
    models: dict[str, tuple[Path, Path]], text: Path, tmp_path: Path
) -> None:
    big, small = models["qwen3"]
    out = tmp_path / "out"
    shallow = write_model(tmp_path / "shallow", 7, **DENSE, **LARGE, num_hidden_layers=1)
    few = write_model(
        tmp_path / "few", 8, **HYBRID, **LARGE, linear_num_value_heads=4, layer_types=[DELTA, DELTA, FULL]
    )
    cases = [
        (small, big, r"small3: is 32 values wide, the student 48"),
        (shallow, small, r"shallow: is 1 layers deep, the student 2"),
        (few, models["qwen3_5"][1], r"few: the teacher's 3 layers hold no increasing choice"),
    ]
    for teacher, student, match in cases:
        with pytest.raises(BitsmithError, match=match):
            paired(teacher, student, text, out, ctx_tokens=CTX)
    with pytest.raises(UnsupportedError, match="is a qwen3, the student a qwen35"):
        paired(big, models["qwen3_5"][1], text, out, ctx_tokens=CTX)
    for layer_map, match in (
        ([0], "names 1 layers, the student has 2"),
        ([1, 1], "has to increase"),
        ([1, 4], "at most 3"),
        ("best", "'best' is unknown; known: cka, proportional"),
    ):
        with pytest.raises(BitsmithError, match=match):
            paired(big, small, text, out, ctx_tokens=CTX, layer_map=layer_map)
    with pytest.raises(BitsmithError, match=r"layer 1 \(linear_attention\) beside the student's 1 \(full"):
        paired(*models["qwen3_5"], text, out, ctx_tokens=CTX, layer_map=[0, 1, 2])
    assert not any(path.name.startswith((".", "out")) for path in tmp_path.iterdir())


def test_other_tokenizers_are_refused(
    models: dict[str, tuple[Path, Path]], text: Path, tmp_path: Path
) -> None:
    big, small = models["qwen3"]
    other = tmp_path / "other"
    shutil.copytree(small, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    first, second = sorted(vocab, key=vocab.get)[300:302]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(BitsmithError, match=r"token 300 is .* merging takes one vocabulary"):
        paired(big, other, text, tmp_path / "out", ctx_tokens=CTX)
    vocab[first], vocab[second] = vocab[second], vocab[first]
    tokenizer["normalizer"] = {"type": "NFC"} if tokenizer.get("normalizer") is None else None
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(BitsmithError, match="is not the student's: normalizer differ"):
        paired(big, other, text, tmp_path / "out", ctx_tokens=CTX)


def test_too_few_tokens_are_refused(models: dict[str, tuple[Path, Path]], text: Path, tmp_path: Path) -> None:
    pair, out, short = models["qwen3"], tmp_path / "out", tmp_path / "short.txt"
    with pytest.raises(BitsmithError, match=r"text\.txt: has \d+ tokens, 1000000 are asked for"):
        paired(*pair, text, out, tokens=1_000_000, ctx_tokens=CTX)
    with pytest.raises(BitsmithError, match="139 tokens are too few: two chunks of 70"):
        paired(*pair, text, out, tokens=139, ctx_tokens=CTX)
    short.write_text("".join(LINES)[:200])
    with pytest.raises(BitsmithError, match=r"short\.txt: has \d+ tokens, two chunks of 70"):
        paired(*pair, short, out, ctx_tokens=CTX)
    with pytest.raises(BitsmithError, match="leaves 16 tokens for the moments of states 32 wide"):
        paired(*pair, text, out, tokens=32, ctx_tokens=16)
    one = paired(*pair, text, out, tokens=32, ctx_tokens=16, sparse=True)
    assert one.manifest.fit_tokens == 16


def test_an_output_is_not_overwritten_unasked(
    models: dict[str, tuple[Path, Path]], text: Path, tmp_path: Path
) -> None:
    pair, out, options = models["qwen3"], tmp_path / "out", {"ctx_tokens": 16, "sparse": True}
    first = paired(*pair, text, out, tokens=48, **options)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="--overwrite"):
        paired(*pair, text, out, tokens=48, **options)
    with pytest.raises(OutputError, match="is the input"):
        paired(*pair, text, pair[0], tokens=48, overwrite=True, **options)
    second = paired(*pair, text, out, tokens=64, overwrite=True, **options)
    assert second.digest != first.digest and (out / "notes.txt").read_text() == "mine"


def test_states_that_are_not_finite_are_refused(
    models: dict[str, tuple[Path, Path]], text: Path, tmp_path: Path
) -> None:
    big, small = models["qwen3"]
    shutil.copytree(small, tmp_path / "broken")
    weights = {name: torch.from_numpy(w) for name, w in load_file(small / "model.safetensors").items()}
    for name in ("up", "down"):  # each finite, their product is not
        weights[f"model.layers.1.mlp.{name}_proj.weight"] *= 1e30
    save_file(weights, tmp_path / "broken" / "model.safetensors")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with pytest.raises(BitsmithError, match="broken: layer 1 makes NaN"):
            paired(big, tmp_path / "broken", text, tmp_path / "out", tokens=TOKENS, ctx_tokens=CTX)
    finally:
        torch.set_num_threads(threads)
    assert not (tmp_path / "out").exists()
    # a layer that fails on one thread leaves none waiting for its turn
    with open_sides(big, tmp_path / "broken") as sides:
        step = Step(*(random_states(tmp_path, side) for _, side in sides.named))
        layers = sides.teacher.loaded(1), sides.student.loaded(1)
        sums = {"states": PlaceSums(PlaceShape(48, 32, 48, 32))}
        try:
            torch.set_num_threads(3)
            with pytest.raises(BitsmithError, match="broken: layer 1 makes NaN"):
                list(run_pair(*layers, step, sums))
        finally:
            torch.set_num_threads(threads)


@pytest.mark.slow
def test_memory_stays_within_what_is_said() -> None:
    """A layer of each of two published sizes, run in a process of its own."""
    script = Path(__file__).parents[1] / "benchmarks" / "paired.py"
    options = ["--teacher", "qwen3-1.7B", "--student", "qwen3-0.6B", "--tokens", "20480"]
    done = subprocess.run([sys.executable, script, *options], capture_output=True, check=True, timeout=290)
    said = json.loads(done.stdout)["rows"][0]["facts"]
    assert 0.7 * said["memory_bytes"] < said["peak_memory_bytes"] < said["memory_bytes"]


def test_damage_is_found(found: dict[str, Paired], tmp_path: Path) -> None:
    with pytest.raises(BitsmithError, match=f"holds no {MANIFEST_NAME}"):
        open_paired(tmp_path)
    source, folder = found["qwen3"].path, tmp_path / "copy"
    shutil.copytree(source, folder)
    raw = bytearray((folder / "pair.000.safetensors").read_bytes())
    raw[-3] ^= 1
    (folder / "pair.000.safetensors").write_bytes(raw)
    opened = open_paired(folder)
    opened.states(1)
    with pytest.raises(DamagedFileError, match=r"pair\.000\.safetensors: tensor .* SHA-256"):
        for place in ("states", "updates", "mixer", "ffn"):
            getattr(opened, place)(0)
    (folder / "pair.001.safetensors").unlink()
    with pytest.raises(DamagedFileError, match=r"lacks its file pair\.001"):
        open_paired(folder)
    manifest = json.loads((source / MANIFEST_NAME).read_text())
    for change, match in (
        ({"layer_map": [0]}, "layer_map does not fit"),
        ({"layer_map": [0, 9]}, "layer_map does not fit"),
        ({"kind": "statistics"}, "is no manifest of paired"),
        ({"ctx_tokens": 71}, "does not fit paired.json"),
        ({"files": {}}, "is missing"),
        ({"chunks": "many"}, "chunks: "),
    ):
        shutil.copytree(source, folder, dirs_exist_ok=True)
        (folder / MANIFEST_NAME).write_text(json.dumps(manifest | change))
        with pytest.raises(DamagedFileError, match=match):
            open_paired(folder)
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest | {"schema": 2}))
    with pytest.raises(UnsupportedError, match="schema 2"):
        open_paired(folder)
