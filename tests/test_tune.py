"""Tuning: the start is the file, gradients are right, the result is never worse, a killed run goes on."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bitsmith.errors import BitsmithError, OutputError
from bitsmith.formats import format_named
from bitsmith.formats.blocks import BlockFormat
from bitsmith.run.allocate import held_out_kld
from bitsmith.run.descent import batches
from bitsmith.run.evaluate import open_model
from bitsmith.run.execute import compress
from bitsmith.run.forward import compare, final_hidden_states
from bitsmith.run.free_model import FreeModel, original_weights
from bitsmith.run.free_weights import latent_places
from bitsmith.run.student import Student, divergence
from bitsmith.run.tune import TuneOptions, tune
from bitsmith.store import open_gguf
from bitsmith.store.journal import Journal

TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")


def random_tokens(vocab: int, chunks: int, ctx: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, (chunks, ctx))


@pytest.fixture(scope="module")
def coded(tiny_qwen3_5: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GGUF that has rows permuted, norms shifted, MTP tensors and all of the K and IQ4 formats.

    One tensor's scales are no float16: it stays as it is.
    """
    out = tmp_path_factory.mktemp("coded") / "mixed.gguf"
    rules = [(f"blk.{n}.", TYPES[n % len(TYPES)]) for n in range(5)]
    compress(
        tiny_qwen3_5, out, "Q2_K", tensor_types=[("token_embd", "Q8_0"), ("blk.2.ffn_up", "MXFP4"), *rules]
    )
    return out


@pytest.mark.parametrize("codes", [False, True])
def test_the_start_is_the_file_bit_for_bit(tiny_qwen3_5: Path, coded: Path, codes: bool) -> None:
    with open_model(tiny_qwen3_5) as original, open_model(coded) as candidate:
        free = FreeModel(candidate.source, candidate.checkpoint, original, codes=codes)
        packed, weights = free.packed(), free.weights()
        assert {name for name in candidate.source if not name.startswith("blk.4.")} >= packed.keys()
        for name, blocks in packed.items():
            assert np.array_equal(blocks, candidate.source[name].raw()), name
        prefix = candidate.arch.text_prefix
        for name, value in weights.items():
            stored = candidate.checkpoint[name if name == "lm_head.weight" else prefix + name].read()
            np.testing.assert_allclose(value.detach().numpy(), stored, rtol=3e-7, atol=1e-9, err_msg=name)


def test_packed_bytes_decode_to_the_value_after_a_step(tiny_qwen3_5: Path, coded: Path) -> None:
    with open_model(tiny_qwen3_5) as original, open_model(coded) as candidate:
        free = FreeModel(candidate.source, candidate.checkpoint, original, codes=True)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for leaf in free.parameters.values():
            leaf.add_(0.2 * torch.randn(leaf.shape, generator=random))
    moved, decoded = free.weights(), free.decoded()
    for name, value in moved.items():
        np.testing.assert_allclose(
            value.detach().numpy(), decoded[name].numpy(), rtol=2e-6, atol=2e-7, err_msg=name
        )


@pytest.mark.parametrize(
    "name", ["Q1_0", "Q2_0", "Q2_K", "Q3_K", "Q4_0", "Q4_1", "Q5_1", "Q8_0", "IQ4_NL", "IQ4_XS", "Q6_K"]
)
def test_a_latent_code_starts_in_its_cell_beside_the_original(name: str) -> None:
    form = format_named(name)
    assert isinstance(form, BlockFormat)
    rows = np.random.default_rng(1).standard_normal((3, 512)).astype(np.float32)
    rows[1, :256] = 0
    fields, codes = form.unpack(form.encode(rows))
    places = latent_places(form, fields, codes, rows).reshape(codes.shape)
    nearest = np.abs(places[..., None] - form.levels).argmin(-1)
    assert np.array_equal(form.levels[nearest], form.levels[codes])
    step = np.repeat(fields.steps(), form.sub_size, axis=1)
    offset = np.repeat(fields.offsets(), form.sub_size, axis=1)
    at = form.levels[codes]
    true = rows.reshape(codes.shape)
    moved = np.sign((true - (step * at - offset)) * np.sign(step))
    assert (np.sign(places - at) * moved >= 0)[np.abs(places - at) > 1e-3].mean() > 0.999


def test_gradient_of_the_block_scales_is_the_slope(
    tiny_qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitsmith.run.free_weights._half", lambda values: values)  # its steps hide the slope
    coded = tmp_path / "q.gguf"
    compress(tiny_qwen3, coded, "Q4_K", pure=True)
    with open_model(tiny_qwen3) as original, open_model(coded) as candidate:
        free = FreeModel(candidate.source, candidate.checkpoint, original, codes=False)
        student, teacher = Student(candidate.arch), original_weights(original)
    tokens = torch.from_numpy(random_tokens(200, 2, 24, seed=0))
    wanted = student.states(teacher, tokens).flatten(0, 1)

    def loss() -> torch.Tensor:
        weights = free.weights()
        states = student.states(weights, tokens).flatten(0, 1)
        return divergence(states, weights["lm_head.weight"], wanted, teacher["lm_head.weight"]).sum()

    leaf = free.parameters["layers.0.mlp.down_proj.weight:scale"]
    loss().backward()
    slope = float(leaf.grad.sum())
    moved = []
    for change in (0.002, -0.002):
        with torch.no_grad():
            leaf += change
            moved.append(float(loss()))
            leaf -= change
    assert slope == pytest.approx((moved[0] - moved[1]) / 0.004, rel=0.02)


def test_the_student_is_the_reference_forward(tiny_qwen3_5: Path) -> None:
    tokens = random_tokens(200, 2, 70, seed=1)
    with open_model(tiny_qwen3_5) as model:
        expected = final_hidden_states(model, tokens, 0)
        states = Student(model.arch).states(original_weights(model), torch.from_numpy(tokens))
    np.testing.assert_allclose(states[:, :-1].detach().numpy(), expected, rtol=2e-4, atol=2e-4)


def test_divergence_in_slices_is_the_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(0)
    states, wanted, head, other = (
        torch.randn(shape, generator=random) for shape in ((9, 8), (9, 8), (50, 8), (50, 8))
    )
    states.requires_grad_()
    whole = divergence(states, head, wanted, other)
    whole.sum().backward()
    gradient = states.grad.clone()
    states.grad = None
    monkeypatch.setattr("bitsmith.run.student._LOGITS", 100)
    sliced = divergence(states, head, wanted, other)
    sliced.sum().backward()
    p = torch.softmax(wanted @ other.T, -1)
    naive = (p * (torch.log_softmax(wanted @ other.T, -1) - torch.log_softmax(states @ head.T, -1))).sum(-1)
    torch.testing.assert_close(sliced, naive, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whole, naive, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(states.grad, gradient)


def test_batches_pass_over_all_windows_before_any_comes_again() -> None:
    drawn = np.concatenate([batches(7, 3, step, seed=5) for step in range(7)])
    for turn in range(3):
        assert sorted(drawn[7 * turn : 7 * turn + 7]) == list(range(7))
    assert not np.array_equal(drawn[:7], drawn[7:14])


def short(**changes: object) -> TuneOptions:
    return TuneOptions(**{"steps": 20, "window_tokens": 32, "batch_tokens": 64, **changes})


@pytest.mark.parametrize("codes", [pytest.param(False, marks=pytest.mark.slow), True])
def test_tuning_lowers_the_measured_divergence_in_the_same_bytes(
    tiny_qwen3: Path, tmp_path: Path, codes: bool
) -> None:
    coded, out = tmp_path / "q.gguf", tmp_path / "tuned.gguf"
    compress(tiny_qwen3, coded, "Q2_K", pure=True)
    fit, held = random_tokens(200, 16, 64, seed=0), random_tokens(200, 4, 64, seed=1)
    costs: list[float] = []
    record = tune(tiny_qwen3, coded, out, fit, held, short(codes=codes), say_cost=costs.append)
    assert record.kept
    assert costs == [record.estimated_seconds]
    assert record.held_kld_after_nats < (0.97 if codes else 0.999) * record.held_kld_before_nats
    assert out.stat().st_size == coded.stat().st_size
    with open_gguf(coded) as before, open_gguf(out) as after:
        assert after.typed_metadata() == before.typed_metadata()
        assert [(n, r.dtype, r.shape) for n, r in after.items()] == [
            (n, r.dtype, r.shape) for n, r in before.items()
        ]
    with open_model(tiny_qwen3) as original, open_model(out) as candidate:
        states = [final_hidden_states(m, held, 32).reshape(-1, 256) for m in (original, candidate)]
        scores = compare(original, candidate, (states[0], states[1]), held[:, 33:].reshape(-1))
    assert scores.kld.mean() == pytest.approx(record.held_kld_after_nats, rel=1e-3)
    assert not list(tmp_path.glob(".*"))


def test_what_only_gets_worse_returns_the_candidate(tiny_qwen3: Path, tmp_path: Path) -> None:
    coded, out = tmp_path / "q.gguf", tmp_path / "tuned.gguf"
    compress(tiny_qwen3, coded, "Q6_K", pure=True)
    fit, held = random_tokens(200, 4, 64, seed=0), random_tokens(200, 2, 64, seed=1)
    record = tune(tiny_qwen3, coded, out, fit, held, short(steps=6, learning_rate=30.0))
    assert not record.kept
    assert record.best_step == 0
    assert record.held_kld_after_nats == record.held_kld_before_nats
    assert record.learning_rate < 30.0
    assert out.read_bytes() == coded.read_bytes()


_KILLED = """
import sys, numpy as np, torch
from pathlib import Path
import bitsmith.run.descent as descent
from bitsmith.run.tune import TuneOptions, tune
torch.set_num_threads(1)
descent._SAVED_EVERY_SECONDS = 0.0
model, coded, out = map(Path, sys.argv[1:4])
random = np.random.default_rng(0)
fit, held = random.integers(0, 200, (8, 64)), random.integers(0, 200, (2, 64))
options = TuneOptions(steps=8, window_tokens=32, batch_tokens=64, codes=True)
def report(stage, done, total):
    if stage == "tune":
        print(done, flush=True)
        if done == int(sys.argv[4]):
            sys.stdin.read()
print(tune(model, coded, out, fit, held, options, progress=report).held_kld_after_nats)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(tiny_qwen3: Path, tmp_path: Path) -> None:
    coded = tmp_path / "q.gguf"
    compress(tiny_qwen3, coded, "Q2_K", pure=True)

    def start(out: Path, stop_at: int) -> subprocess.Popen[str]:
        arguments = [sys.executable, "-c", _KILLED, tiny_qwen3, coded, out, str(stop_at)]
        return subprocess.Popen(
            list(map(str, arguments)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    whole = start(tmp_path / "whole.gguf", -1)
    assert whole.communicate("")[0].splitlines()[0] == "1"
    killed = start(tmp_path / "killed.gguf", 5)
    assert killed.stdout is not None
    assert "5" in iter(lambda: killed.stdout.readline().strip() or None, None)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "killed.gguf").exists()
    again = start(tmp_path / "killed.gguf", -1)
    assert again.communicate("")[0].splitlines()[0] == "6"
    assert (tmp_path / "killed.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert (tmp_path / "whole.gguf").read_bytes() != coded.read_bytes()


@pytest.mark.slow
def test_layer_by_layer_lowers_the_divergence_where_memory_is_short(
    tiny_qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coded = tmp_path / "q.gguf"
    compress(tiny_qwen3, coded, "Q2_K", pure=True)
    fit, held = random_tokens(200, 8, 64, seed=0), random_tokens(200, 3, 64, seed=1)
    monkeypatch.setattr("bitsmith.run.tune.memory_bytes", lambda: 1 << 20)
    out, broken = tmp_path / "whole.gguf", tmp_path / "broken.gguf"
    record = tune(tiny_qwen3, coded, out, fit, held, short(steps=20))
    assert record.options.layerwise
    assert [layer["layer"] for layer in record.layers] == [0, 1, 2]
    assert all(layer["error_after"] < layer["error_before"] for layer in record.layers)
    assert record.kept
    assert record.held_kld_after_nats < 0.995 * record.held_kld_before_nats
    assert held_out_kld(tiny_qwen3, out, held)["mean_kld"].value == pytest.approx(
        record.held_kld_after_nats, rel=1e-6
    )
    with open_gguf(coded) as before, open_gguf(out) as after:
        assert [(n, r.dtype, r.shape) for n, r in after.items()] == [
            (n, r.dtype, r.shape) for n, r in before.items()
        ]
        changed = {n for n in before if not np.array_equal(before[n].raw(), after[n].raw())}
    assert {name.split(".")[1] for name in changed} == {"0", "1", "2"}
    assert {"blk.0.attn_q.weight", "blk.1.ffn_norm.weight", "blk.2.ffn_down.weight"} <= changed

    done: list[int] = []

    def stop(stage: str, at: int, total: int) -> None:
        if stage == "tune":
            assert total == 60
            done.append(at)
            if len(done) == 23:
                raise BitsmithError("the disk is gone")

    with pytest.raises(BitsmithError, match="disk"):
        tune(tiny_qwen3, coded, broken, fit, held, short(steps=20), progress=stop)
    assert not broken.exists()
    tune(tiny_qwen3, coded, broken, fit, held, short(steps=20), progress=stop)
    assert done[:23] == list(range(1, 24))
    assert done[23] == 21
    assert broken.read_bytes() == out.read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_two_runs_do_not_share_a_state(tiny_qwen3: Path, tmp_path: Path) -> None:
    coded, out = tmp_path / "q.gguf", tmp_path / "out.gguf"
    compress(tiny_qwen3, coded, "Q4_K", pure=True)
    tokens = random_tokens(200, 2, 64, seed=0)
    with (
        Journal(tmp_path / ".out.gguf.tuning.lock", {"source": "other"}),
        pytest.raises(OutputError, match="another run"),
    ):
        tune(tiny_qwen3, coded, out, tokens, tokens, short())
    assert not out.exists()


def test_inputs_that_do_not_go_together_are_refused(
    tiny_qwen3: Path, tiny_qwen3_5: Path, coded: Path, tmp_path: Path
) -> None:
    tokens = random_tokens(200, 2, 64, seed=0)
    out = tmp_path / "out.gguf"
    with pytest.raises(BitsmithError):
        tune(tiny_qwen3, coded, out, tokens, tokens, short())
    with pytest.raises(BitsmithError, match="no GGUF"):
        tune(tiny_qwen3_5, tiny_qwen3_5, out, tokens, tokens, short())
    with pytest.raises(BitsmithError, match="window"):
        tune(tiny_qwen3_5, coded, out, tokens[:, :16], tokens, short())
    with pytest.raises(BitsmithError, match="held-out"):
        tune(tiny_qwen3_5, coded, out, tokens, tokens[:0], short())
    shutil.copy(coded, out)
    with pytest.raises(OutputError, match="exists"):
        tune(tiny_qwen3_5, coded, out, tokens, tokens, short())
    with pytest.raises(OutputError, match="input"):
        tune(tiny_qwen3_5, out, out, tokens, tokens, short(), overwrite=True)
    with pytest.raises(OutputError, match="folder"):
        tune(tiny_qwen3_5, coded, tmp_path / "absent" / "out.gguf", tokens, tokens, short())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf"]
