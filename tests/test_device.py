"""What runs on a device of torch: equal to the processor's results, and nowhere left on the processor.

Every case runs with torch's processor as the device; on `cuda` too where there is one. On `meta` nothing is
computed, but an operation that mixes devices fails.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from typer.testing import CliRunner

from bitsmith.archs import TensorSpec
from bitsmith.cli.main import app
from bitsmith.errors import BitsmithError
from bitsmith.formats import format_named
from bitsmith.formats.accelerator import accelerated_by, accelerator
from bitsmith.formats.blocks import BlockFormat
from bitsmith.numerics.divergence import DivergenceAccumulator
from bitsmith.numerics.input_metric import InputMetric
from bitsmith.passes.rounding import EFFORT, round_rows
from bitsmith.run import torch_feedback, torch_fields
from bitsmith.run.calibrate import calibrate
from bitsmith.run.compress import compress
from bitsmith.run.device import current_device, device_named, on_device, using
from bitsmith.run.evaluate import evaluate, open_model
from bitsmith.run.forward import Network, quiet_transformers
from bitsmith.run.job import Job
from bitsmith.run.site_sums import SiteSums
from bitsmith.run.torch_encode import TorchEncoder
from bitsmith.run.torch_fields import KNOWN
from bitsmith.run.torch_scores import DeviceDivergence
from bitsmith.store.statistics import open_statistics

META = torch.device("meta")
Float32 = NDArray[np.float32]

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
on_both = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])


def _rows(kind: str) -> Float32:
    rng = np.random.default_rng(3)
    if kind == "ordinary":
        return (rng.standard_t(4, (6, 512)) * 0.02).astype(np.float32)
    wild = rng.standard_normal((12, 512)) * np.exp(6 * rng.standard_normal((12, 512)))
    wild[1] = 0
    wild[2] *= 1e-36
    wild[3] = np.clip(wild[3] * 1e36, -3e38, 3e38)
    wild[4, rng.random(512) < 0.95] = 0
    wild[5] = 0.3
    wild[6] = np.abs(wild[6])
    wild[7] = rng.integers(-8, 8, 512)
    return wild.astype(np.float32)


def _importance(kind: str) -> Float32 | None:
    if kind == "plain":
        return None
    found = np.exp(2 * np.random.default_rng(4).standard_normal(512)).astype(np.float32)
    found[:40] = 0
    return found


@on_both
@pytest.mark.parametrize("name", sorted(KNOWN))
def test_encoded_bytes_are_the_compiled_search_s(name: str, device: str) -> None:
    form, encoder = format_named(name), TorchEncoder(torch.device(device))
    for kind in ("ordinary", "wild"):
        for importance in (_importance("plain"), _importance("weighted")):
            rows = _rows(kind)
            expected = form.encode(rows, importance)
            with accelerated_by(encoder):
                found = form.encode(rows, importance)
            np.testing.assert_array_equal(found, expected, err_msg=f"{kind} {importance is not None}")


def test_formats_that_a_device_does_not_know_are_encoded_as_ever() -> None:
    form, rows = format_named("MXFP4"), _rows("ordinary")
    expected = form.encode(rows)
    with accelerated_by(TorchEncoder(torch.device("cpu"))):
        np.testing.assert_array_equal(form.encode(rows), expected)


def _metric(block: int | None = None) -> tuple[InputMetric, Float32]:
    rng = np.random.default_rng(5)
    mixed = rng.standard_normal((512, 512)) * np.exp(-np.arange(512) / 90)[:, None]
    inputs = (rng.standard_normal((900, 512)) @ mixed).astype(np.float32)
    moment = inputs.T @ inputs / len(inputs)
    if block is not None:
        moment = np.stack([moment[at : at + block, at : at + block] for at in range(0, 512, block)])
    return InputMetric(moment, 0.01), moment


def _cost(form: BlockFormat, rows: Float32, blocks: NDArray[np.uint8], moment: Float32) -> float:
    errors = (rows - form.decode(blocks)).astype(np.float64)
    return float(np.einsum("ij,jk,ik->", errors, moment.astype(np.float64), errors))


@on_both
@pytest.mark.parametrize(
    "name", ["Q4_K", "IQ4_XS", *(pytest.param(n, marks=pytest.mark.slow) for n in ("Q6_K", "Q4_0", "Q4_1"))]
)
def test_error_feedback_costs_what_the_compiled_rounder_s_does(name: str, device: str) -> None:
    """Bytes may differ where a sum's last bit decides; the error of the outputs is the same within 1 %."""
    form, rows = format_named(name), _rows("ordinary")
    assert isinstance(form, BlockFormat)
    metric, moment = _metric()
    expected = round_rows(form, rows, metric)
    with accelerated_by(TorchEncoder(torch.device(device))):
        found = round_rows(form, rows, metric)
    own, theirs = (_cost(form, rows, blocks, moment) for blocks in (found, expected))
    assert own == pytest.approx(theirs, rel=0.01)
    assert own < 0.7 * _cost(form, rows, form.encode(rows), moment)
    assert (found == expected).mean() > 0.7


@pytest.mark.slow
@on_both
def test_error_feedback_takes_moments_in_blocks(device: str) -> None:
    form, rows = format_named("Q4_K"), _rows("ordinary")
    metric, _ = _metric(256)
    expected = round_rows(form, rows, metric)
    with accelerated_by(TorchEncoder(torch.device(device))):
        assert (round_rows(form, rows, metric) == expected).mean() > 0.7


@on_both
def test_scores_are_the_accumulator_s(device: str) -> None:
    rng = np.random.default_rng(6)
    ref = (4 * rng.standard_normal((60, 500))).astype(np.float32)
    cand = ref + (0.1 * rng.standard_normal((60, 500))).astype(np.float32)
    cand[7, 3] = np.inf
    targets = rng.integers(0, 500, 60)
    ours, theirs = DivergenceAccumulator(targets), DeviceDivergence(targets, torch.device(device))
    for first in range(0, 500, 170):
        for rows in (slice(0, 33), slice(33, 60)):
            cut = slice(first, first + 170)
            ours.update(rows, first, ref[rows, cut], cand[rows, cut])
            parts = (torch.from_numpy(part[rows, cut]).to(device) for part in (ref, cand))
            theirs.update(rows, first, *parts)
    expected, found = ours.scores(), theirs.scores()
    for name in ("nll_ref", "nll_cand", "kld"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(found.same_top[:7], expected.same_top[:7])


@pytest.mark.slow
def test_nothing_of_a_search_stays_on_the_processor() -> None:
    for name in KNOWN:
        form = format_named(name)
        assert isinstance(form, BlockFormat)
        for weights in (None, torch.empty(512, device=META)):
            rows = torch.empty((4, 512), device=META)
            fields = torch_fields.fit(form, rows, weights)
            assert torch_fields.nearest_codes(form, rows, fields).device == META


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Q4_K", "IQ4_XS", "Q4_1"])
def test_nothing_of_error_feedback_stays_on_the_processor(name: str) -> None:
    form = format_named(name)
    assert isinstance(form, BlockFormat)
    [group] = InputMetric(np.eye(512, dtype=np.float32)).groups(form.block_size)
    keeper, rows = torch_feedback.Feedback(META), torch.empty((512, 4), device=META)
    worked = torch_feedback._Rows(keeper, form, rows, group, replace(EFFORT, sweeps=0))
    assert all(part.device == META for part in worked.rounded()[0])
    assert worked._sweep(0).device == META


def test_nothing_of_scores_and_sums_stays_on_the_processor() -> None:
    scores = DeviceDivergence(np.zeros(6, np.int64), META)
    scores.update(slice(0, 5), 0, *torch.empty((2, 5, 9), device=META))
    sums = SiteSums(32, 16, META)
    sums.fit(torch.empty((700, 32), device=META))
    assert sums._moments[0]._near[0].device == META


def test_nothing_of_a_layer_stays_on_the_processor(tiny_qwen3_5: Path) -> None:
    with open_model(tiny_qwen3_5) as model, quiet_transformers(), torch.inference_mode():
        network = Network(model, META)
        states = torch.zeros((2, 16, network.hidden_size))
        kinds = network.config.layer_types
        for index in (kinds.index("linear_attention"), kinds.index("full_attention")):
            layer = network.layer(index)
            made = layer(
                states.to(META), attention_mask=None, past_key_values=None, **network.positions(states)
            )
            assert made.device == META


def test_a_device_that_is_not_there_is_refused_before_anything_is_written(
    tiny_qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = tmp_path / "text.txt"
    text.write_text("some words and more words, again and again " * 40)
    for command in (
        ["compress", tiny_qwen3, "-o", tmp_path / "out.gguf"],
        ["calibrate", tiny_qwen3, "--text", text, "-o", tmp_path / "stats"],
        ["evaluate", tiny_qwen3, tiny_qwen3, "--text", text],
    ):
        found = CliRunner().invoke(app, [*map(str, command), "--device", "cuda"])
        assert isinstance(found.exception, BitsmithError)
        assert "cuda" in str(found.exception)
        assert "torch" in str(found.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
    assert device_named("auto").type == "cpu"
    with pytest.raises(BitsmithError, match=r"known: cpu, cuda, auto"):
        device_named("tpu")


def test_a_device_is_current_within_its_context_alone() -> None:
    with using(META):
        assert current_device() == META
        assert accelerator() is not None
        with on_device("cpu"):
            assert current_device().type == "cpu"
            assert accelerator() is None
        assert current_device() == META
    assert current_device().type == "cpu"


@pytest.mark.slow
@on_both
@pytest.mark.parametrize("type_name", ["Q4_K_M", "IQ4_XS"])
def test_a_compressed_file_is_the_same(demo_model: Path, tmp_path: Path, device: str, type_name: str) -> None:
    paths = [tmp_path / folder / "m.gguf" for folder in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
    compress(Job(demo_model, paths[0], type_name))
    with accelerated_by(TorchEncoder(torch.device(device))):
        record = compress(Job(demo_model, paths[1], type_name))
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert record.to_json()["device"].startswith(device)


@needs_gpu
def test_a_gpu_measures_what_the_processor_does(demo_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and then again from the start. " * 200)
    candidate = tmp_path / "m.gguf"
    compress(Job(demo_model, candidate, "Q4_K_M"))
    ours, theirs = (
        evaluate(demo_model, candidate, text, ctx_tokens=64, chunks=6, device=device)
        for device in ("cpu", "cuda")
    )
    assert theirs.protocol.device.startswith("cuda")
    assert theirs.ppl_ref.value == pytest.approx(ours.ppl_ref.value, rel=1e-4)
    assert theirs.mean_kld.value == pytest.approx(ours.mean_kld.value, rel=1e-2)


@needs_gpu
def test_a_gpu_calibrates_as_the_processor_does(demo_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and then again from the start. " * 200)
    for device in ("cpu", "cuda"):
        calibrate(demo_model, text, tmp_path / device, ctx_tokens=64, chunks=8, device=device)
    with open_model(demo_model) as model:
        specs: list[TensorSpec] = [spec for spec in model.arch.specs() if spec.site is not None]
    ours, theirs = (open_statistics(tmp_path / device, specs) for device in ("cpu", "cuda"))
    for spec in specs:
        expected, found = ours.hugging_face(spec), theirs.hugging_face(spec)
        assert expected is not None
        assert found is not None
        scale = float(np.abs(expected.diagonal).max())
        np.testing.assert_allclose(found.diagonal, expected.diagonal, rtol=1e-3, atol=1e-4 * scale)
