"""Calibration against transformers' whole model, its splits, and what a killed run leaves behind."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from bitsmith.errors import BitsmithError, OutputError, UnsupportedError
from bitsmith.run import gather as module
from bitsmith.run.calibrate import calibrate
from bitsmith.run.evaluate import open_model
from bitsmith.run.execute import compress
from bitsmith.run.gather import block_columns, held_out
from bitsmith.run.moments import export_imatrix, model_specs
from bitsmith.run.verify import verify
from bitsmith.store import open_checkpoint
from bitsmith.store.imatrix import read_imatrix
from bitsmith.store.statistics import Statistics, open_statistics

CTX, CHUNKS = 70, 9  # longer than DeltaNet's chunk of 64 and no multiple of it; one of the nine is held out
LINES = [f"def f{n}(x):\n    return {n} * x + {n * n % 977}\n\n" for n in range(400)]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(LINES))
    return path


@pytest.fixture(scope="module")
def calibrated(tiny_qwen3_5: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("calibrated") / "stats"
    calibrate(tiny_qwen3_5, text, out, ctx_tokens=CTX, saliency=False, chunks=CHUNKS)
    return out


def opened(stats: Path, model: Path) -> Statistics:
    with open_checkpoint(model) as checkpoint:
        return open_statistics(stats, model_specs(checkpoint))


def hooked(folder: Path, tokens: np.ndarray) -> tuple[dict[str, np.ndarray], Qwen3_5ForCausalLM]:
    """Return what enters every Linear of the whole transformers model (`tokens in`), by module name."""
    config = json.loads((folder / "config.json").read_text())
    model = Qwen3_5ForCausalLM(Qwen3_5TextConfig.from_dict(config.get("text_config", config)))
    stored = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    weights = {name.replace("model.language_model.", "model."): t.float() for name, t in stored.items()}
    model.float().eval().load_state_dict(weights, strict=False)
    seen: dict[str, np.ndarray] = {}
    for name, linear in model.named_modules():
        if isinstance(linear, torch.nn.Linear):
            linear.register_forward_pre_hook(
                lambda _, inputs, name=name: seen.__setitem__(name, inputs[0].double().flatten(0, -2).numpy())
            )
    with torch.no_grad():
        model(torch.from_numpy(tokens))
    return seen, model


def test_every_site_equals_the_whole_models_inputs(calibrated: Path, tiny_qwen3_5: Path) -> None:
    statistics = opened(calibrated, tiny_qwen3_5)
    fit, held = statistics.tokens()
    assert fit.shape == (CHUNKS - 1, CTX) and held.shape == (1, CTX)
    (seen, _), (unseen, _) = hooked(tiny_qwen3_5, fit), hooked(tiny_qwen3_5, held)
    checked = set()
    with open_checkpoint(tiny_qwen3_5) as checkpoint:
        specs = [spec for spec in model_specs(checkpoint) if spec.site and spec.component == "text"]
    for spec in specs:
        name = spec.name.removesuffix(".weight").replace("model.language_model.", "model.")
        x, found = seen[name], statistics.hugging_face(spec)
        assert found.tokens == len(x) == fit.size
        scale = np.sqrt(np.outer((x**2).mean(0), (x**2).mean(0)))
        assert np.abs(found.moment - x.T @ x / len(x)).max() < 1e-4 * scale.max()
        np.testing.assert_array_equal(found.moment, found.moment.T)
        np.testing.assert_allclose(found.diagonal, (x**2).mean(0), rtol=1e-4)
        np.testing.assert_allclose(found.mean, x.mean(0), atol=1e-4 * np.abs(x).max())
        np.testing.assert_allclose(found.held_diagonal, (unseen[name] ** 2).mean(0), rtol=1e-4)
        np.testing.assert_allclose(found.held, unseen[name], atol=1e-4 * np.abs(x).max())
        checked.add(spec.site)
    assert len(checked) == 4 * 4 + 1


def test_the_mtp_layer_reads_the_next_embedding_and_the_normed_final_state(
    calibrated: Path, tiny_qwen3_5: Path
) -> None:
    statistics = opened(calibrated, tiny_qwen3_5)
    fit, _ = statistics.tokens()
    _, model = hooked(tiny_qwen3_5, fit)
    with open_checkpoint(tiny_qwen3_5) as checkpoint:
        specs = {spec.name: spec for spec in model_specs(checkpoint)}
        w = {name: checkpoint[name].read().astype(np.float64) for name in specs if name.startswith("mtp.")}
    with torch.no_grad():
        final = model.model(torch.from_numpy(fit)).last_hidden_state.double().numpy()
        embedded = model.model.embed_tokens(torch.from_numpy(fit)).double().numpy()

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * (1 + w[name])

    pair = [
        norm(embedded[:, 1:], "mtp.pre_fc_norm_embedding.weight"),
        norm(final[:, :-1], "mtp.pre_fc_norm_hidden.weight"),
    ]
    joined = np.concatenate(pair, axis=-1).reshape(-1, 512)
    first = norm(joined @ w["mtp.fc.weight"].T, "mtp.layers.0.input_layernorm.weight")
    for name, x in (("mtp.fc.weight", joined), ("mtp.layers.0.self_attn.k_proj.weight", first)):
        found = statistics.of(specs[name])
        assert found.tokens == (CHUNKS - 1) * (CTX - 1)
        np.testing.assert_allclose(found.moment, x.T @ x / len(x), atol=1e-4 * found.diagonal.max())
    down = statistics.of(specs["mtp.layers.0.mlp.down_proj.weight"])
    assert down.diagonal.min() > 0 and down.held.shape == (CTX - 1, 512)


def test_bytes_do_not_depend_on_threads(
    calibrated: Path, tiny_qwen3_5: Path, text: Path, tmp_path: Path
) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(5 - min(threads, 4))
        calibrate(tiny_qwen3_5, text, tmp_path / "stats", ctx_tokens=CTX, saliency=False, chunks=CHUNKS)
    finally:
        torch.set_num_threads(threads)
    assert contents(tmp_path / "stats") == contents(calibrated)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


KILLED = """
import os, signal, sys
from pathlib import Path
from bitsmith.run.calibrate import calibrate

calls = 0
def progress(stage, done, total):
    global calls
    calls += 1
    if calls == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)

calibrate(*map(Path, sys.argv[1:4]), ctx_tokens=70, saliency=False, chunks=9, progress=progress)
"""


def test_a_killed_run_goes_on_at_its_layer_with_the_same_bytes(
    calibrated: Path, tiny_qwen3_5: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "stats"
    # every step has two tasks: this dies behind the second layer's, before the layer is kept
    arguments = [sys.executable, "-c", KILLED, tiny_qwen3_5, text, out, "4"]
    died = subprocess.run(arguments, capture_output=True, check=False, timeout=200)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert not out.exists()
    with pytest.raises(KeyboardInterrupt):  # in the last step
        calibrate(
            tiny_qwen3_5,
            text,
            out,
            ctx_tokens=CTX,
            saliency=False,
            chunks=CHUNKS,
            progress=interrupt_at_the_end,
        )
    assert not out.exists()
    result = calibrate(tiny_qwen3_5, text, out, ctx_tokens=CTX, saliency=False, chunks=CHUNKS)
    assert result.resumed_layers == 4
    assert contents(out) == contents(calibrated)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"stats", "stats.record.json", "stats.sha256"} and verify(out).passed


def interrupt_at_the_end(_: str, done: int, total: int) -> None:
    if done == total:
        raise KeyboardInterrupt


def test_what_another_run_left_behind_is_refused_or_dropped(
    calibrated: Path, tiny_qwen3_5: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "stats"
    with pytest.raises(KeyboardInterrupt):
        calibrate(
            tiny_qwen3_5,
            text,
            out,
            ctx_tokens=CTX,
            saliency=False,
            chunks=CHUNKS - 1,
            progress=interrupt_at_the_end,
        )
    assert (tmp_path / ".stats.calibration").is_dir()
    options = {"ctx_tokens": CTX, "saliency": False, "chunks": CHUNKS}
    with pytest.raises(OutputError, match=r"finished pieces of a run with other chunks .*, tokens; run that"):
        calibrate(tiny_qwen3_5, text, out, **options)
    result = calibrate(tiny_qwen3_5, text, out, **options, overwrite=True)
    assert result.resumed_layers == 0 and contents(out) == contents(calibrated)


def test_an_output_is_not_overwritten_unasked(
    calibrated: Path, tiny_qwen3_5: Path, text: Path, tmp_path: Path
) -> None:
    before = contents(calibrated)
    with pytest.raises(OutputError, match="--overwrite"):
        calibrate(tiny_qwen3_5, text, calibrated, ctx_tokens=CTX, saliency=False, chunks=1)
    imatrix = tmp_path / "i.gguf"
    imatrix.write_bytes(b"mine")
    with pytest.raises(OutputError, match="--overwrite"):
        calibrate(tiny_qwen3_5, text, imatrix, ctx_tokens=CTX, saliency=False, chunks=1)
    with pytest.raises(OutputError, match="is the input"):
        calibrate(tiny_qwen3_5, text, tiny_qwen3_5, ctx_tokens=CTX, saliency=False, chunks=1, overwrite=True)
    assert imatrix.read_bytes() == b"mine" and contents(calibrated) == before
    for name in ("stats", "i.dat"):
        with pytest.raises(OutputError, match="not in a folder that exists"):
            calibrate(
                tiny_qwen3_5, text, tmp_path / "nowhere" / name, ctx_tokens=CTX, saliency=False, chunks=1
            )
    out = tmp_path / "stats"
    for chunks in (2, 1):
        calibrate(tiny_qwen3_5, text, out, ctx_tokens=CTX, saliency=False, chunks=chunks, overwrite=True)
        fit, held = opened(out, tiny_qwen3_5).tokens()
        assert (len(fit), len(held)) == (1, chunks - 1)


def test_the_imatrix_counts_all_chunks_however_it_is_made(
    calibrated: Path, tiny_qwen3_5: Path, text: Path, tmp_path: Path
) -> None:
    direct, converted = tmp_path / "direct.gguf", tmp_path / "converted.dat"
    calibrate(tiny_qwen3_5, text, direct, ctx_tokens=CTX, saliency=False, chunks=CHUNKS)
    exported = export_imatrix(tiny_qwen3_5, calibrated, converted)
    assert exported.entries == len(read_imatrix(direct).entries)
    one, other = opened(direct, tiny_qwen3_5), opened(converted, tiny_qwen3_5)
    stats = opened(calibrated, tiny_qwen3_5)
    assert read_imatrix(direct).entries["blk.0.ssm_out.weight"][1] == CHUNKS * CTX
    with open_checkpoint(tiny_qwen3_5) as checkpoint:
        for spec in model_specs(checkpoint):
            if (found := one.of(spec)) is None:
                assert stats.of(spec) is None and other.of(spec) is None
                continue
            assert found.moment is None and found.held is None
            expected, _ = stats.of(spec).all_tokens()
            np.testing.assert_allclose(found.diagonal, expected, rtol=1e-6)
            np.testing.assert_allclose(other.of(spec).diagonal, expected, rtol=1e-6)
    whole = [direct, converted]
    names = {f"{path.name}{end}" for path in whole for end in ("", ".record.json", ".sha256")}
    assert {path.name for path in tmp_path.iterdir()} == names and all(verify(one).passed for one in whole)
    with pytest.raises(BitsmithError, match=r"expected \.gguf or \.dat"):
        export_imatrix(tiny_qwen3_5, calibrated, tmp_path / "imatrix")


def test_a_gguf_gives_the_statistics_of_the_folder_it_came_from(
    tiny_qwen3_5_tied: Path, text: Path, tmp_path: Path
) -> None:
    compress(tiny_qwen3_5_tied, tmp_path / "m.gguf", "F32")
    for name, model in (("hf", tiny_qwen3_5_tied), ("gguf", tmp_path / "m.gguf")):
        calibrate(model, text, tmp_path / name, ctx_tokens=CTX, saliency=False, chunks=2)
    folder, gguf = (opened(tmp_path / name, tiny_qwen3_5_tied) for name in ("hf", "gguf"))
    with open_model(tiny_qwen3_5_tied) as model:
        specs = {spec.name: spec for spec in model.arch.specs()}
    for name in ("model.layers.1.linear_attn.out_proj", "model.embed_tokens", "mtp.fc"):
        one, other = (stats.of(specs[f"{name}.weight"]) for stats in (folder, gguf))
        np.testing.assert_allclose(one.moment, other.moment, atol=1e-4 * one.diagonal.max())


def test_blocks_are_those_of_the_whole_moment(
    calibrated: Path, tiny_qwen3_5: Path, text: Path, tmp_path: Path
) -> None:
    calibrate(
        tiny_qwen3_5, text, tmp_path / "stats", ctx_tokens=CTX, saliency=False, chunks=CHUNKS, block=128
    )
    whole, blocks = opened(calibrated, tiny_qwen3_5), opened(tmp_path / "stats", tiny_qwen3_5)
    with open_checkpoint(tiny_qwen3_5) as checkpoint:
        [spec] = [s for s in model_specs(checkpoint) if s.name.endswith("layers.1.mlp.down_proj.weight")]
    parts, full = blocks.of(spec).moment, whole.of(spec).moment
    assert parts.shape == (4, 128, 128)
    for n, part in enumerate(parts):
        at = slice(128 * n, 128 * (n + 1))
        np.testing.assert_allclose(part, full[at, at], atol=1e-6 * np.abs(full).max())
    with pytest.raises(BitsmithError, match="blocks of 200 do not divide 256"):
        calibrate(tiny_qwen3_5, text, tmp_path / "other", ctx_tokens=CTX, saliency=False, block=200)


def test_default_blocks_of_published_widths() -> None:
    widths = {256: 256, 4096: 4096, 5120: 2560, 6144: 3072, 9216: 3072, 12288: 4096, 17408: 1024, 4304: 2152}
    assert {columns: block_columns(columns, None) for columns in widths} == widths


def test_an_eighth_of_the_chunks_is_held_out() -> None:
    assert [held_out(n) for n in (1, 2, 7, 8, 17)] == [[], [1], [6], [7], [7, 15]]


def test_the_held_out_sample_is_bounded(
    tiny_qwen3: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_checkpoint(tiny_qwen3) as checkpoint:
        [spec] = [spec for spec in model_specs(checkpoint) if spec.name == "lm_head.weight"]
    held = {}
    for rows in (2048, 50):
        monkeypatch.setattr(module, "HELD_ROWS", rows)
        calibrate(tiny_qwen3, text, tmp_path / f"{rows}", ctx_tokens=CTX, saliency=False, chunks=16)
        found = opened(tmp_path / f"{rows}", tiny_qwen3).of(spec)
        assert found.held_tokens == 2 * CTX
        held[rows] = {row.tobytes() for row in found.held}
    assert len(held[2048]) == 2 * CTX and len(held[50]) == 50
    assert held[50] < held[2048]


def test_a_single_short_chunk_will_do(tiny_qwen3_5: Path, text: Path, tmp_path: Path) -> None:
    calibrate(tiny_qwen3_5, text, tmp_path / "stats", ctx_tokens=4, saliency=False, chunks=1)
    statistics = opened(tmp_path / "stats", tiny_qwen3_5)
    with open_checkpoint(tiny_qwen3_5) as checkpoint:
        found = [statistics.of(spec) for spec in model_specs(checkpoint) if spec.site]
    assert {site.tokens for site in found} == {4, 3}  # an MTP layer has a token less
    for site in found:
        assert site.held is None and site.held_diagonal is None
        assert np.isfinite(site.moment).all() and np.isfinite(site.mean).all()


def test_states_that_are_not_finite_are_refused(tiny_qwen3: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in tiny_qwen3.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(tiny_qwen3 / "model.safetensors")
    for name in ("up", "down"):  # each finite, their product is not
        weights[f"model.layers.1.mlp.{name}_proj.weight"] *= 1e30
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(BitsmithError, match="layer 1 makes NaN"):
        calibrate(folder, text, tmp_path / "stats", ctx_tokens=CTX, saliency=False, chunks=2)
    assert not (tmp_path / "stats").exists()


def test_squares_beyond_float32_are_refused(tiny_qwen3: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in tiny_qwen3.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(tiny_qwen3 / "model.safetensors")
    weights["model.layers.0.input_layernorm.weight"][:] = 1e25
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(BitsmithError, match=r"layers\.0\.mixer\.in is not finite|NaN"):
        calibrate(folder, text, tmp_path / "stats", ctx_tokens=CTX, saliency=False, chunks=2)


def test_more_mtp_layers_than_one_are_refused(tiny_qwen3_5: Path, text: Path, tmp_path: Path) -> None:
    from bitsmith.archs import ARCHITECTURES
    from bitsmith.run.sites import SiteForward

    with open_model(tiny_qwen3_5) as model:
        text_config = {**model.arch.text_config, "mtp_num_hidden_layers": 2}
        config = {**model.arch.config, "text_config": text_config}
        specs = ARCHITECTURES["qwen3_5"](config).specs()
        with pytest.raises(UnsupportedError, match="2 MTP layers"):
            SiteForward(model, specs)
