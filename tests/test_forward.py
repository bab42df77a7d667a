"""The streamed forward against transformers' own whole models, and its promises about what is read."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.special import log_softmax
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig, Qwen3Config, Qwen3ForCausalLM

from bitsmith.errors import BitsmithError
from bitsmith.run import forward
from bitsmith.run.evaluate import open_model
from bitsmith.run.forward import TextModel, compare, final_hidden_states
from bitsmith.store.checkpoint import ComputedTensor, View

CTX, FIRST = 70, 35  # longer than DeltaNet's chunk of 64 and no multiple of it


def _tokens(chunks: int = 2, vocab: int = 4096) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab, (chunks, CTX))


def _whole_model_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    config = json.loads((folder / "config.json").read_text())
    text = config.get("text_config", config)
    if text["model_type"].startswith("qwen3_5"):
        model = Qwen3_5ForCausalLM(Qwen3_5TextConfig.from_dict(text))
    else:
        model = Qwen3ForCausalLM(Qwen3Config.from_dict(text))
    stored = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    weights = {name.replace("model.language_model.", "model."): t.float() for name, t in stored.items()}
    absent, _ = model.float().eval().load_state_dict(weights, strict=False)
    if absent:
        assert absent == ["lm_head.weight"]
        model.lm_head.weight = model.model.embed_tokens.weight
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits[:, FIRST:-1].numpy()


@pytest.mark.parametrize("name", ["tiny_qwen3_5", "tiny_qwen3_5_tied", "tiny_qwen3", "demo_model"])
def test_logits_equal_those_of_the_whole_transformers_model(
    name: str, request: pytest.FixtureRequest
) -> None:
    folder, tokens = request.getfixturevalue(name), _tokens()
    with open_model(folder) as model:
        states = final_hidden_states(model, tokens, FIRST)
        logits = states @ model.head.read().T
    expected = _whole_model_logits(folder, tokens)
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_scores_are_those_of_the_whole_logits(tiny_qwen3_5: Path, tiny_qwen3_5_tied: Path) -> None:
    """The head replayed in slices, one model untied and the other tied."""
    tokens = _tokens()
    targets = tokens[:, FIRST + 1 :].reshape(-1)
    with open_model(tiny_qwen3_5) as ref, open_model(tiny_qwen3_5_tied) as cand:
        ref_states, cand_states = (
            final_hidden_states(m, tokens, FIRST).reshape(-1, m.head.shape[1]) for m in (ref, cand)
        )
        scores = compare(ref, cand, (ref_states, cand_states), targets)
        wide = [s.astype(np.float64) @ m.head.read().T for s, m in ((ref_states, ref), (cand_states, cand))]
    log_ref, log_cand = (log_softmax(logits, axis=1) for logits in wide)
    kld = (np.exp(log_ref) * (log_ref - log_cand)).sum(axis=1)
    np.testing.assert_allclose(scores.kld, kld, rtol=1e-4, atol=1e-6)
    rows = np.arange(len(targets))
    np.testing.assert_allclose(scores.nll_cand, -log_cand[rows, targets], rtol=1e-5)


class _Watched:
    """A model whose every read is noted as (tensor, first row, last row)."""

    def __init__(self, model: TextModel) -> None:
        self.reads: list[tuple[str, int, int]] = []
        tensors = {
            name: ComputedTensor(name, ref.shape, ref.dtype, self._noting(name, ref.read))
            for name, ref in model.checkpoint.items()
        }
        view = View(model.checkpoint, tensors)
        self.model = TextModel(view, model.arch, model.source)

    def _noting(self, name: str, read):
        def noted(start: int, stop: int):
            self.reads.append((name, start, stop))
            return read(start, stop)

        return noted


def test_layers_are_read_once_in_order_and_only_the_rows_that_occur(tiny_qwen3_5: Path) -> None:
    tokens = _tokens(chunks=3)
    tokens[...] = np.where(tokens % 2, 7, 3000)
    with open_model(tiny_qwen3_5) as model:
        watched = _Watched(model)
        final_hidden_states(watched.model, tokens, FIRST)
    embedded = [read for read in watched.reads if "embed_tokens" in read[0]]
    assert [read[1:] for read in embedded] == [(7, 8), (3000, 3001)]
    found = [re.search(r"language_model\.layers\.(\d+)\.", name) for name, _, _ in watched.reads]
    layers = [int(match[1]) for match in found if match]
    assert layers == sorted(layers)
    names = [name for name, _, _ in watched.reads if "embed_tokens" not in name]
    assert len(names) == len(set(names))
    assert not any("mtp" in name or "visual" in name or "lm_head" in name for name in names)


def test_the_head_is_read_once_in_slices(tiny_qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = _tokens(chunks=3)
    targets = tokens[:, FIRST + 1 :].reshape(-1)
    with open_model(tiny_qwen3) as model:
        states = final_hidden_states(model, tokens, FIRST).reshape(len(targets), -1)
        whole = compare(model, model, (states, states[::-1].copy()), targets)
        monkeypatch.setattr(forward, "_HEAD_SLICE_BYTES", 1000 * 4 * 256)
        monkeypatch.setattr(forward, "_LOGIT_BLOCK", 64 * 1000)
        watched = _Watched(model)
        sliced = compare(watched.model, watched.model, (states, states[::-1].copy()), targets)
    expected = [(f, min(f + 1000, 4352)) for f in range(0, 4352, 1000) for _ in range(2)]
    assert [read[1:] for read in watched.reads] == expected
    np.testing.assert_allclose(sliced.kld, whole.kld, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(sliced.nll_ref, whole.nll_ref, rtol=1e-6)


def test_threads_and_spilling_do_not_change_the_states(
    tiny_qwen3_5: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, threads = _tokens(chunks=9), torch.get_num_threads()
    with open_model(tiny_qwen3_5) as model:
        states = final_hidden_states(model, tokens, FIRST)
        monkeypatch.setattr(forward, "SPILL_BYTES", 0)
        try:
            torch.set_num_threads(1)
            alone = final_hidden_states(model, tokens, FIRST)
        finally:
            torch.set_num_threads(threads)
    assert isinstance(alone, np.memmap)
    assert (alone == states).all()
    assert torch.get_num_threads() == threads


def test_chunks_do_not_see_each_other(tiny_qwen3_5: Path) -> None:
    tokens = _tokens(chunks=3)
    other = tokens.copy()
    other[1] = 5
    with open_model(tiny_qwen3_5) as model:
        states, changed = (final_hidden_states(model, t, FIRST) for t in (tokens, other))
    np.testing.assert_allclose(changed[[0, 2]], states[[0, 2]], rtol=0, atol=1e-5)
    assert np.abs(changed[1] - states[1]).max() > 1e-2


def test_progress_counts_tokens_times_layers(tiny_qwen3: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    with open_model(tiny_qwen3) as model:
        final_hidden_states(model, _tokens(), FIRST, lambda *report: seen.append(report), "reference")
    total = 2 * CTX * 3
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[-1] == ("reference", total, total)
    assert {(stage, whole) for stage, _, whole in seen} == {("reference", total)}


def _changed(folder: Path, out: Path, change) -> TextModel:
    shutil.copytree(folder, out)
    weights = load_file(out / "model.safetensors")
    change(weights)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return open_model(out)


def test_an_overflow_is_traced_to_its_layer(demo_model: Path, tmp_path: Path) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        for name in ("up", "down"):
            weights[f"model.layers.2.mlp.{name}_proj.weight"] *= 1e30

    with (
        _changed(demo_model, tmp_path / "m", spoil) as model,
        pytest.raises(BitsmithError, match="layer 2 makes NaN"),
    ):
        final_hidden_states(model, _tokens(), FIRST)


def test_missing_and_extra_layer_tensors_are_refused(demo_model: Path) -> None:
    with open_model(demo_model) as model:
        tensors = dict(model.checkpoint)
        norm = tensors.pop("model.layers.1.input_layernorm.weight")
        short = TextModel(View(model.checkpoint, tensors), model.arch, model.source)
        with pytest.raises(BitsmithError, match=r"missing: model\.layers\.1\.input_layernorm\.weight"):
            final_hidden_states(short, _tokens(), FIRST)
        tensors |= {"model.layers.1.input_layernorm.weight": norm, "model.layers.1.extra": norm}
        long = TextModel(View(model.checkpoint, tensors), model.arch, model.source)
        with pytest.raises(BitsmithError, match=r"not of this model: model\.layers\.1\.extra"):
            final_hidden_states(long, _tokens(), FIRST)


def test_a_token_without_an_embedding_row_is_refused(demo_model: Path) -> None:
    with (
        open_model(demo_model) as model,
        pytest.raises(BitsmithError, match="token 4096 has no row among 4096"),
    ):
        final_hidden_states(model, np.full((1, CTX), 4096), FIRST)
