"""Sequential mode: what the encoder is told of a site is what the compressed layers before it produce."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bitsmith.archs import TensorSpec
from bitsmith.errors import BitsmithError
from bitsmith.formats import format_named
from bitsmith.passes.correction import Correction, paired_error
from bitsmith.passes.transform import parse_transforms
from bitsmith.run.calibrate import calibrate
from bitsmith.run.execute import statistics_of
from bitsmith.run.job import Job, run
from bitsmith.run.moments import export_imatrix, model_specs
from bitsmith.run.plan import open_source, plan_source
from bitsmith.run.sequential import sequential
from bitsmith.run.transforms import solved
from bitsmith.store import open_checkpoint
from bitsmith.store.checkpoint import ComputedTensor, TensorRef
from bitsmith.store.statistics import open_statistics

RNG = np.random.default_rng(0)
CTX, CHUNKS = 70, 9


@pytest.fixture(scope="module")
def stats(tiny_qwen3_5: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("".join(f"def f{n}(x):\n    return {n} * x + {n * n % 977}\n\n" for n in range(400)))
    out = tmp_path_factory.mktemp("stats") / "stats"
    calibrate(tiny_qwen3_5, text, out, ctx_tokens=CTX, chunks=CHUNKS)
    return out


@pytest.fixture(scope="module")
def specs(tiny_qwen3_5: Path) -> list[TensorSpec]:
    with open_checkpoint(tiny_qwen3_5) as checkpoint:
        return list(model_specs(checkpoint))


def nearly_equal(found: np.ndarray, expected: np.ndarray) -> None:
    """Calibrate weighs tokens in multiples of their mean, which is known at the end: sums round otherwise."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def coded(spec: TensorSpec, ref: TensorRef) -> TensorRef:
    """`ref` in GGUF layout as Q2_K holds it."""
    form, laid = format_named("Q2_K"), spec.to_gguf(ref)
    rows = form.decode(form.encode(np.ascontiguousarray(laid.read(), np.float32)))
    return ComputedTensor(spec.name, laid.shape, "F32", lambda start, stop: rows[start:stop])


def test_nothing_encoded_gives_the_calibrations_own_statistics(
    tiny_qwen3_5: Path, stats: Path, specs: list[TensorSpec], tmp_path: Path
) -> None:
    base, checked = open_statistics(stats, specs), 0
    with sequential(tiny_qwen3_5, open_statistics(stats, specs), specs, tmp_path / "work") as found:
        for spec in sorted((spec for spec in specs if base.knows(spec)), key=found.place):
            here, there = found.of(spec), base.of(spec)
            assert here.tokens == there.tokens and here.held_tokens == there.held_tokens
            nearly_equal(here.moment, there.moment)
            nearly_equal(here.held, there.held)
            np.testing.assert_array_equal(here.held, here.held_original)
            nearly_equal(here.cross, there.moment)
            checked += 1
    assert checked > 20 and not (tmp_path / "work").exists()


def test_inputs_are_those_behind_what_is_encoded(
    tiny_qwen3_5: Path, stats: Path, specs: list[TensorSpec], tmp_path: Path
) -> None:
    base = open_statistics(stats, specs)
    named = {spec.name.split("layers.")[-1]: spec for spec in specs if spec.component == "text"}
    gate, down = named["0.mlp.gate_proj.weight"], named["0.mlp.down_proj.weight"]
    with (
        open_checkpoint(tiny_qwen3_5) as checkpoint,
        sequential(tiny_qwen3_5, open_statistics(stats, specs), specs, tmp_path / "work") as found,
    ):
        nearly_equal(found.of(gate).moment, base.of(gate).moment)
        found.encoded(gate, coded(gate, checkpoint[gate.name]))
        before, after = base.of(down), found.of(down)
        assert np.abs(after.moment - before.moment).max() > 1e-3 * np.abs(before.moment).max()
        nearly_equal(after.held_original, before.held)
        assert np.abs(after.held - before.held).max() > 1e-3 * np.abs(before.held).max()
        np.testing.assert_array_equal(found.saliency(str(down.site)), base.saliency(str(down.site)))
        with pytest.raises(BitsmithError, match="was asked for behind layer 1"):
            found.of(named["1.mlp.down_proj.weight"])
            found.of(down), found.of(gate)


def test_transformed_tensors_take_their_originals_place(
    tiny_qwen3_5: Path, stats: Path, tmp_path: Path
) -> None:
    asked = parse_transforms("fold,permute-delta:by=scale,permute-ffn:by=moment,rotate:seed=1")
    with open_checkpoint(tiny_qwen3_5) as checkpoint:
        source = open_source(checkpoint, asked)
        base = statistics_of(source, stats)
        source, applied = solved(source, plan_source(source, "Q4_K_M"), base)
        assert len(applied) == 6 and all(one.vectors for one in applied[2:])
        tensors = {tensor.hf_name.split("layers.")[-1]: tensor for tensor in source.tensors}
        later = tensors["1.linear_attn.in_proj_z.weight"].spec
        with sequential(tiny_qwen3_5, base, [t.spec for t in source.tensors], tmp_path / "work") as found:
            for tensor in source.tensors:
                if tensor.spec.layer in (None, 0):
                    found.encoded(tensor.spec, tensor.ref)
            exact, there = found.of(later), base.of(later)
            for name in ("moment", "held", "mean"):
                scale = np.abs(getattr(there, name)).max()
                np.testing.assert_allclose(getattr(exact, name), getattr(there, name), atol=1e-4 * scale)


@pytest.mark.slow
def test_the_file_is_the_same_for_a_second_run(tiny_qwen3_5: Path, stats: Path, tmp_path: Path) -> None:
    job = Job(tiny_qwen3_5, tmp_path / "a.gguf", "Q2_K", statistics=stats, sequential=True, pure=True)
    first = run(job)
    second = run(replace(job, out=tmp_path / "b.gguf"))
    plain = run(replace(job, out=tmp_path / "c.gguf", sequential=False))
    assert first.sha256 == second.sha256 != plain.sha256
    assert any(written.rounding.correction > 0 for written in first.tensors)
    assert not any(written.rounding.correction > 0 for written in plain.tensors)


def test_an_imatrix_has_no_tokens_to_run(tiny_qwen3_5: Path, stats: Path, tmp_path: Path) -> None:
    imatrix = tmp_path / "imatrix.gguf"
    export_imatrix(tiny_qwen3_5, stats, imatrix)
    job = Job(tiny_qwen3_5, tmp_path / "a.gguf", "Q2_K", statistics=imatrix, sequential=True)
    with pytest.raises(BitsmithError, match="tokens"):
        run(job)
    assert not (tmp_path / "a.gguf").exists()


@pytest.mark.parametrize("block", [32, 64])
def test_correction_brings_outputs_back(block: int) -> None:
    x = RNG.standard_normal((4000, 64)).astype(np.float32)
    changed = (x + 0.3 * RNG.standard_normal(x.shape) + 0.2 * x[:, ::-1]).astype(np.float32)
    rows = RNG.standard_normal((16, 64)).astype(np.float32)
    parts = range(0, 64, block)
    cross, moment = (
        np.stack([a[:3000, at : at + block].T @ changed[:3000, at : at + block] / 3000 for at in parts])
        for a in (x, changed)
    )
    correction, held = Correction(cross, moment), (changed[3000:], x[3000:])
    before = paired_error(rows, rows, held[1], held[0])
    after = paired_error(rows, correction.target(rows, 1.0), held[1], held[0])
    assert after < (0.8 if block == 64 else 1.0) * before
    assert correction.best(rows, *held) == 1.0
    assert correction.best(rows, *(part[:0] for part in held)) == 0.0
    np.testing.assert_array_equal(correction.target(rows, 0.0), rows)
    np.testing.assert_array_equal(Correction(moment, moment).target(rows, 1.0), rows)
