"""Token weights against autograd through transformers' whole model, and what they do to statistics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file as load_tensors
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig, Qwen3Config, Qwen3ForCausalLM

from bitsmith.archs import TensorSpec
from bitsmith.errors import BitsmithError
from bitsmith.run import saliency as module
from bitsmith.run.calibrate import calibrate, calibrate_tokens
from bitsmith.run.evaluate import open_model
from bitsmith.run.evaluation import Protocol
from bitsmith.run.forward import TextModel
from bitsmith.run.moments import export_imatrix, model_specs
from bitsmith.run.saliency import Saliency
from bitsmith.store import open_checkpoint
from bitsmith.store.imatrix import read_imatrix
from bitsmith.store.statistics import Statistics, open_statistics, site_widths

CHUNKS, CTX = 3, 70  # longer than DeltaNet's chunk of 64
CLASSES: dict[str, Any] = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen3_5": (Qwen3_5TextConfig, Qwen3_5ForCausalLM),
}


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 4352, (CHUNKS, CTX))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"def f{n}(x):\n    return {n} * x + {n * n % 977}\n\n" for n in range(200)))
    return path


def weights_of(folder: Path, tokens: np.ndarray, out: Path, seed: int = 0) -> Saliency:
    """Return the weights that a calibration of at most seven chunks finds: it holds out the last of them."""
    protocol = Protocol("", "text", "", tokens.size, tokens.shape[1], len(tokens), len(tokens), 0, 0, seed)
    with open_model(folder) as model:
        calibrate_tokens(model, tokens, protocol, out, seed=seed, overwrite=True)
        sites = site_widths(model.arch.specs())
    kept = opened(out, folder)
    return {site: weights for site in sites if (weights := kept.saliency(site)) is not None}


def drawn_from(logits: np.ndarray, seed: tuple[int, int]) -> np.ndarray:
    """Draw a token of each row (`T vocab`): its block of 1024 by Gumbel noise, in it by cumulated masses."""
    rng, tokens = np.random.default_rng(seed), np.arange(len(logits))
    best, drawn = np.full(len(logits), -np.inf), np.zeros(len(logits), np.int64)
    for first in range(0, logits.shape[1], 1024):
        masses = np.exp(logits[:, first : first + 1024].astype(np.float64)).cumsum(1)
        key = np.log(masses[:, -1]) + rng.gumbel(size=len(logits))
        within = (masses <= (rng.random(len(logits)) * masses[:, -1])[:, None]).sum(1)
        drawn = np.where(key > best, first + within, drawn)
        best = np.maximum(best, key)
    return drawn[tokens]


def whole_model(folder: Path) -> torch.nn.Module:
    config = json.loads((folder / "config.json").read_text())
    kind = "qwen3" if config["model_type"] == "qwen3" else "qwen3_5"
    config_class, model_class = CLASSES[kind]
    model: torch.nn.Module = model_class(config_class.from_dict(config.get("text_config", config)))
    stored = {name: t for file in folder.glob("*.safetensors") for name, t in load_tensors(file).items()}
    weights = {name.replace("model.language_model.", "model."): t.float() for name, t in stored.items()}
    model.float().eval().load_state_dict(weights, strict=False)
    return model.requires_grad_(False)


def reference(folder: Path, tokens: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Return `Σ |∂ log p(y) / ∂(W x)|²` by site (`chunks T`) of one backward through all layers."""
    model = whole_model(folder)
    with open_checkpoint(folder) as checkpoint:
        specs = [s for s in model_specs(checkpoint) if s.site and s.component == "text"]
    outputs: dict[str, torch.Tensor] = {}
    for spec in specs:
        name = spec.name.removesuffix(".weight").replace("model.language_model.", "model.")
        model.get_submodule(name).register_forward_hook(
            lambda _m, _i, output, name=spec.name: outputs.__setitem__(name, output)
        )
    embedded = model.get_submodule("model.embed_tokens")(torch.from_numpy(tokens)).requires_grad_()
    logits = model(inputs_embeds=embedded).logits
    chunks = enumerate(logits.detach().numpy())
    drawn = torch.from_numpy(np.stack([drawn_from(rows, (seed, chunk)) for chunk, rows in chunks]))
    picked = logits.log_softmax(-1).gather(-1, drawn[..., None]).sum()
    gradients = torch.autograd.grad(picked, [outputs[spec.name] for spec in specs])
    found: dict[str, np.ndarray] = {}
    for spec, gradient in zip(specs, gradients, strict=True):
        squares = gradient.double().square().sum(-1).reshape(tokens.shape).numpy()
        found[spec.site] = found.get(spec.site, 0) + squares
    return found


@pytest.mark.parametrize("name", ["tiny_qwen3_5", "tiny_qwen3"])
def test_weights_are_those_of_a_backward_through_the_whole_model(
    name: str, tokens: np.ndarray, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(name)
    found = weights_of(folder, tokens, tmp_path / "work", seed=7)
    expected = reference(folder, tokens, seed=7)
    assert found.keys() == expected.keys()
    for site, squares in expected.items():
        np.testing.assert_allclose(found[site], squares / squares.mean(), rtol=1e-3, err_msg=site)
        assert found[site].shape == tokens.shape and found[site].dtype == np.float32
        assert found[site].mean(dtype=np.float64) == pytest.approx(1.0, abs=1e-5)
        assert found[site].std() > 0
    assert not (tmp_path / ".work.calibration").exists()


def test_another_seed_draws_other_tokens(tiny_qwen3: Path, tokens: np.ndarray, tmp_path: Path) -> None:
    one, same, other = (weights_of(tiny_qwen3, tokens[:1], tmp_path / "work", seed) for seed in (1, 1, 2))
    assert all(np.array_equal(one[site], same[site]) for site in one)
    assert not np.array_equal(one["head.in"], other["head.in"])


def test_a_tied_head_is_read_from_the_embedding(
    tiny_qwen3_5_tied: Path, tokens: np.ndarray, tmp_path: Path
) -> None:
    found = weights_of(tiny_qwen3_5_tied, tokens[:1], tmp_path / "work")
    assert found["head.in"].std() > 0
    assert not any(site.startswith("mtp") for site in found)


def predicted(model: TextModel, normed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    prediction = module._Prediction(normed, (0, 0))
    for weight in module._Head(model).slices():
        prediction.add(weight)
    return prediction.gradient()


def test_slices_of_the_vocabulary_draw_from_the_same_distribution(
    tiny_qwen3: Path, tokens: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients by the head's input over any slices are those of log p of a token drawn from all."""
    monkeypatch.setattr(module, "_HEAD_BLOCK", 1000)
    normed = torch.randn(5, 256, generator=torch.Generator().manual_seed(3))
    with open_model(tiny_qwen3) as model:
        gradient, squares = predicted(model, normed)
        weight = torch.from_numpy(model.head.read().astype(np.float32))
    p = (normed @ weight.T).double().softmax(-1)
    # with y one of the tokens, the gradient is W_y - Σ p W: find y by what is left
    left = gradient.double() + p @ weight.double()
    distance = torch.cdist(left, weight.double())
    drawn = distance.argmin(-1)
    assert distance.min(-1).values.max() < 1e-4
    assert len(set(drawn.tolist())) > 1
    expected = (torch.nn.functional.one_hot(drawn, len(weight)) - p).square().sum(-1)
    np.testing.assert_allclose(squares, expected, rtol=1e-4)


def test_tokens_are_drawn_as_often_as_the_model_says(
    tiny_qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_HEAD_BLOCK", 2000)
    with open_model(tiny_qwen3) as model:
        weight = torch.from_numpy(model.head.read().astype(np.float32))
        direction = weight[4000] - weight[:100].mean(0)
        normed = (direction * (7.5 / (direction @ weight[4000]))).repeat(500, 1)
        p = float((normed[0] @ weight.T).double().softmax(-1)[4000])
        gradient, _ = predicted(model, normed)
    mean = (normed[0] @ weight.T).double().softmax(-1) @ weight.double()
    hits = int(((gradient.double() + mean - weight[4000].double()).norm(dim=-1) < 1e-3).sum())
    assert 0.05 < p < 0.95
    assert hits == pytest.approx(500 * p, abs=5 * np.sqrt(500 * p * (1 - p)))


def test_weights_do_not_depend_on_threads(tiny_qwen3_5: Path, tokens: np.ndarray, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(weights_of(tiny_qwen3_5, tokens, tmp_path / "work"))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    for site, weights in found[0].items():
        np.testing.assert_array_equal(weights, found[1][site], err_msg=site)


def edited(source: Path, folder: Path, **changes: float) -> Path:
    """A copy of `source` with whole tensors set to a value, by the end of their names."""
    folder.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    weights = load_tensors(source / "model.safetensors")
    for ending, value in changes.items():
        names = [name for name in weights if name.endswith(f"{ending}.weight")]
        assert names
        for name in names:
            weights[name] = torch.full_like(weights[name], value)
    from safetensors.torch import save_file as save_tensors

    save_tensors(weights, folder / "model.safetensors")
    return folder


def test_where_nothing_matters_every_token_weighs_the_same(
    tiny_qwen3: Path, tokens: np.ndarray, tmp_path: Path
) -> None:
    flat = weights_of(edited(tiny_qwen3, tmp_path / "flat", lm_head=0.0), tokens, tmp_path / "work")
    for site, weights in flat.items():  # all logits equal: no gradient gets through the head
        np.testing.assert_allclose(weights, 1.0, rtol=1e-5, err_msg=site)
    for spec in model_specs_of(tmp_path / "flat"):  # nor are the moments zero, as sums weighed by nothing are
        kept = opened(tmp_path / "work", tmp_path / "flat").hugging_face(spec)
        np.testing.assert_allclose(np.diagonal(kept.moment), kept.diagonal, rtol=1e-4, err_msg=spec.site)
    cut = weights_of(
        edited(tiny_qwen3, tmp_path / "cut", down_proj=0.0, o_proj=0.0), tokens, tmp_path / "work"
    )
    for site, weights in cut.items():
        assert np.isfinite(weights).all() and weights.mean() == pytest.approx(1.0, abs=1e-5)
        # what a zero matrix reads still matters by its output; what is before it does not
        if site.endswith((".mixer.in", ".ffn.in")):
            np.testing.assert_array_equal(weights, 1.0, err_msg=site)
        else:
            assert weights.std() > 0, site


def test_gradients_that_are_not_finite_are_refused(
    tiny_qwen3: Path, tokens: np.ndarray, tmp_path: Path
) -> None:
    model = edited(tiny_qwen3, tmp_path / "model", lm_head=3e38)
    with pytest.raises(BitsmithError, match=r"layer \d makes NaN or infinite gradients"):
        weights_of(model, tokens[:1], tmp_path / "work")
    assert not (tmp_path / "work").exists()


def model_specs_of(folder: Path) -> list[TensorSpec]:
    with open_checkpoint(folder) as checkpoint:
        return [spec for spec in model_specs(checkpoint) if spec.site]


def opened(stats: Path, model: Path) -> Statistics:
    with open_checkpoint(model) as checkpoint:
        return open_statistics(stats, model_specs(checkpoint))


@pytest.fixture(scope="module")
def calibrated(tiny_qwen3_5: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    folder = tmp_path_factory.mktemp("calibrated")
    for saliency in (True, False):
        calibrate(
            tiny_qwen3_5, text, folder / f"{saliency}", ctx_tokens=CTX, chunks=CHUNKS, saliency=saliency
        )
    return {saliency: folder / f"{saliency}" for saliency in (True, False)}


def test_moments_and_held_out_inputs_are_weighted_and_the_rest_is_not(
    calibrated: dict[bool, Path], tiny_qwen3_5: Path, tmp_path: Path
) -> None:
    weighted, plain = (opened(calibrated[saliency], tiny_qwen3_5) for saliency in (True, False))
    fit, held = weighted.tokens()
    assert (len(fit), len(held)) == (CHUNKS - 1, 1)
    tokens = np.concatenate([fit, held])  # of two to seven chunks the last is held out
    weights = weights_of(tiny_qwen3_5, tokens, tmp_path / "work")
    model, inputs = whole_model(tiny_qwen3_5), dict[str, np.ndarray]()
    with open_checkpoint(tiny_qwen3_5) as checkpoint:
        specs = [s for s in model_specs(checkpoint) if s.site and s.component == "text"]
    for spec in specs:
        name = spec.name.removesuffix(".weight").replace("model.language_model.", "model.")
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, site=spec.site: inputs.__setitem__(site, args[0].double().numpy())
        )
    with torch.no_grad():
        model(torch.from_numpy(tokens))
    for spec in specs:
        x, s = inputs[spec.site], weights[spec.site].astype(np.float64)
        one, other = weighted.hugging_face(spec), plain.hugging_face(spec)
        expected = np.einsum("ct,cti,ctj->ij", s[:-1], x[:-1], x[:-1]) / s[:-1].sum()
        scale = np.abs(expected).max()
        np.testing.assert_allclose(one.moment, expected, atol=1e-4 * scale, err_msg=spec.site)
        np.testing.assert_array_equal(one.importance, np.diagonal(one.moment))
        np.testing.assert_allclose(
            one.held, np.sqrt(s[-1])[:, None] * x[-1], atol=1e-3 * np.abs(one.held).max(), err_msg=spec.site
        )
        for part in ("diagonal", "mean", "held_diagonal", "tokens", "held_tokens"):
            ours, theirs = getattr(one, part), getattr(other, part)
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())
        assert not np.array_equal(one.moment, other.moment)


def test_the_multi_token_layer_is_not_weighted(calibrated: dict[bool, Path], tiny_qwen3_5: Path) -> None:
    weighted, plain = (opened(calibrated[saliency], tiny_qwen3_5) for saliency in (True, False))
    with open_checkpoint(tiny_qwen3_5) as checkpoint:
        mtp = [spec for spec in model_specs(checkpoint) if spec.site and spec.site.startswith("mtp.")]
    assert mtp
    for spec in mtp:
        one, other = weighted.hugging_face(spec), plain.hugging_face(spec)
        np.testing.assert_array_equal(one.moment, other.moment)
        np.testing.assert_array_equal(one.held, other.held)


def test_the_exported_imatrix_is_not_weighted(
    calibrated: dict[bool, Path], tiny_qwen3_5: Path, text: Path, tmp_path: Path
) -> None:
    found = []
    for saliency, stats in calibrated.items():
        export_imatrix(tiny_qwen3_5, stats, tmp_path / f"{saliency}.gguf")
        found.append(read_imatrix(tmp_path / f"{saliency}.gguf").entries)
    calibrate(tiny_qwen3_5, text, tmp_path / "direct.gguf", ctx_tokens=CTX, chunks=CHUNKS)
    found.append(read_imatrix(tmp_path / "direct.gguf").entries)
    for name, (sums, count) in found[0].items():
        for other in found[1:]:
            assert other[name][1] == count == CHUNKS * (CTX - 1 if "blk.4." in name else CTX)
            np.testing.assert_allclose(other[name][0], sums, rtol=1e-5)


@pytest.mark.parametrize("saliency", [True, False])
def test_a_killed_calibration_goes_on_behind_its_last_step(
    calibrated: dict[bool, Path], tiny_qwen3_5: Path, text: Path, tmp_path: Path, saliency: bool
) -> None:
    seen: list[int] = []

    def stop(_: str, done: int, total: int) -> None:
        seen.append(done)
        if done > 0.6 * total:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"ctx_tokens": CTX, "chunks": CHUNKS, "saliency": saliency}
    with pytest.raises(KeyboardInterrupt):
        calibrate(tiny_qwen3_5, text, tmp_path / "stats", progress=stop, **options)
    again: list[int] = []
    result = calibrate(
        tiny_qwen3_5, text, tmp_path / "stats", progress=lambda _, done, __: again.append(done), **options
    )
    assert again[0] <= seen[-1] < again[-1] and again[0] > seen[len(seen) // 2]
    assert result.resumed_layers > 0
    for path in calibrated[saliency].iterdir():
        assert (tmp_path / "stats" / path.name).read_bytes() == path.read_bytes(), path.name
