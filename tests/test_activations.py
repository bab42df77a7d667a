"""Spectra of activations against transformers' own whole model and its KV cache."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    DynamicCache,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from bitsmith.errors import BitsmithError
from bitsmith.formats import FORMATS
from bitsmith.run.activations import (
    Activations,
    SiteSpectrum,
    _Cached,
    _verdicts,
    _Watcher,
    activation_spectra,
)
from bitsmith.run.evaluate import open_model, text_chunks

CTX, CHUNKS = 70, 3


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(Path(json.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    return path


def _reference(folder: Path, tokens: np.ndarray) -> dict[tuple[str, int], np.ndarray]:
    """Every state entering a layer (`N hidden`), every cache entry (`N heads head_dim`), by transformers."""
    config = json.loads((folder / "config.json").read_text())
    text = config.get("text_config", config)
    dense = text["model_type"] == "qwen3"
    kinds = (Qwen3ForCausalLM, Qwen3Config) if dense else (Qwen3_5ForCausalLM, Qwen3_5TextConfig)
    model = kinds[0](kinds[1].from_dict(text)).float().eval()
    stored = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    weights = {name.replace("model.language_model.", "model."): t.float() for name, t in stored.items()}
    model.load_state_dict(weights, strict=False)
    found: dict[tuple[str, int], np.ndarray] = {}
    for n, layer in enumerate([*model.model.layers, model.model.norm]):
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, n=n: found.update(
                {("residual", n): (args[0] if args else kwargs["hidden_states"]).numpy().copy()}
            ),
            with_kwargs=True,
        )
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.from_numpy(tokens), past_key_values=cache, use_cache=True)
    for n, layer in enumerate(cache.layers):
        for site, name in (("k", "keys"), ("v", "values")):
            if isinstance(entries := getattr(layer, name, None), torch.Tensor):
                found[site, n] = entries.transpose(1, 2).numpy().reshape(-1, *entries.shape[1::2])
    return {
        key: value.reshape(-1, *value.shape[-1 - (key[0] != "residual") :]) for key, value in found.items()
    }


def _vectors(site: SiteSpectrum, reference: dict[tuple[str, int], np.ndarray]) -> np.ndarray:
    found = reference[site.site, site.layer].astype(np.float64)
    return (found if site.head is None else found[:, site.head]).reshape(len(found), -1)


@pytest.mark.parametrize("name", ["tiny_qwen3_5", "tiny_qwen3", "demo_model"])
def test_spectra_are_those_of_transformers_own_states_and_cache(
    name: str, request: pytest.FixtureRequest, text: Path
) -> None:
    folder = request.getfixturevalue(name)
    with open_model(folder) as model:
        tokens, _ = text_chunks(model, text, CTX, CHUNKS)
        result = activation_spectra(model, text, ctx_tokens=CTX, chunks=CHUNKS)
    reference = _reference(folder, tokens)
    assert {(s.site, s.layer) for s in result.sites} == reference.keys()
    assert {s.site for s in result.sites} == {"residual", "k", "v"}
    for site in result.sites:
        vectors = _vectors(site, reference)
        assert (site.tokens, site.dim) == vectors.shape
        for part, rows in ((site.plain, vectors), (site.centred, vectors - vectors.mean(axis=0))):
            sigma = np.zeros(site.dim)
            sigma[: min(rows.shape)] = np.linalg.svd(rows, compute_uv=False) / np.sqrt(len(rows))
            np.testing.assert_allclose(
                part.sigma.y, sigma[np.array(part.sigma.x) - 1], rtol=1e-4, atol=1e-6 * sigma[0]
            )
        share = (vectors.mean(axis=0) ** 2).sum() * len(vectors) / (vectors**2).sum()
        assert site.mean_share == pytest.approx(share, rel=1e-4)


def test_planted_directions_are_counted() -> None:
    """States of exactly 5 directions about a mean: rank 5 centred, one more about the origin."""
    rng = np.random.default_rng(0)
    states = (rng.normal(size=(3, 100, 5)) @ rng.normal(size=(5, 64)) + rng.normal(size=64)).astype(
        np.float32
    )
    watcher = _Watcher()
    for part in states:
        watcher.entering(0, part[None])
    (site,) = watcher.sites()
    assert dict(site.plain.rank_for_error)[0.01] == 6
    assert dict(site.centred.rank_for_error)[0.01] == 5
    assert site.tokens == 300
    assert 1 < site.centred.effective_rank < 5.5
    energy = dict(site.centred.energy_at)
    assert energy[1 / 2] == pytest.approx(1.0)
    assert energy[1 / 32] < energy[1 / 16] < 1


@pytest.mark.parametrize(("planted", "wins"), [(4, True), (64, False)])
def test_low_rank_wins_for_a_cache_only_where_it_is_planted(planted: int, wins: bool) -> None:
    rng = np.random.default_rng(1)
    basis = np.linalg.qr(rng.normal(size=(64, 64)))[0][:planted]
    entries = (rng.normal(size=(2, 2, 200, planted)) @ basis).astype(np.float32)
    cached = _Cached("k", 3, heads=2, head_dim=64)
    cached.add(entries[:1])
    cached.add(entries[1:])
    whole, *heads = cached.sites()
    assert [site.head for site in heads] == [0, 1]
    assert whole.dim == 128
    for site in (whole, *heads):
        for rival in site.rivals:
            assert rival.low_rank_wins is wins
            assert rival.rank_needed <= 2 * planted
    words = _verdicts((whole, *heads))
    assert len(words) == 2
    assert all(f"in {int(wins)} of 1 layers" in line for line in words)


def test_the_rivals_figures_follow_from_the_entries() -> None:
    rng = np.random.default_rng(2)
    scales = np.geomspace(1, 0.05, 64)
    entries = (rng.normal(size=(1, 1, 300, 64)) * scales + 0.3).astype(np.float32)
    cached = _Cached("v", 0, heads=1, head_dim=64)
    cached.add(entries)
    (site,) = cached.sites()
    rows = entries[0, 0].astype(np.float64)
    centred = np.linalg.svd(rows - rows.mean(axis=0), compute_uv=False)
    norm = np.sqrt((rows**2).sum())
    for rival in site.rivals:
        form = FORMATS[rival.format]
        wrong = rows - form.decode(form.encode(entries[0, 0]))
        assert rival.error == pytest.approx(np.linalg.norm(wrong) / norm, rel=1e-6)
        tails = [np.linalg.norm(centred[r:]) / norm for r in range(65)]
        assert tails[rival.rank_needed] <= rival.error < tails[rival.rank_needed - 1]
        assert rival.bytes_ratio == pytest.approx(16 * rival.rank_needed / (form.bpw * 64))
        assert rival.equal_bytes_error == pytest.approx(tails[rival.equal_bytes_rank], rel=1e-6)
        assert 16 * rival.equal_bytes_rank <= form.bpw * 64 < 16 * (rival.equal_bytes_rank + 1)


def test_states_of_zeros_have_no_ranks() -> None:
    watcher = _Watcher()
    watcher.entering(0, np.zeros((1, 10, 32), np.float32))
    watcher.cached(0, *(np.zeros((1, 1, 10, 32), np.float32) for _ in range(2)))
    residual, keys, _ = watcher.sites()
    for site in (residual, keys):
        assert site.mean_share is None
        assert site.plain.effective_rank is None
        assert site.rivals is None


def test_the_protocol_goes_with_the_spectra_and_json_holds_them(demo_model: Path, text: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    result = activation_spectra(
        demo_model, text, ctx_tokens=CTX, chunks=2, progress=lambda *report: seen.append(report)
    )
    assert result.protocol.text_sha256 == hashlib.sha256(text.read_bytes()).hexdigest()
    assert (result.protocol.ctx_tokens, result.protocol.chunks, result.protocol.tokens) == (CTX, 2, 2 * CTX)
    assert seen[-1] == ("activations", 4 * 2 * CTX, 4 * 2 * CTX)
    assert json.loads(json.dumps(asdict(result), allow_nan=False))["sites"]
    again: Activations = activation_spectra(demo_model, text, ctx_tokens=CTX, chunks=2)
    assert again == result


def test_a_text_shorter_than_a_chunk_is_refused(demo_model: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("three words only")
    with pytest.raises(BitsmithError, match="one chunk needs 512"):
        activation_spectra(demo_model, tmp_path / "short.txt")
