"""Statistics on the disk: looked up by tensor in GGUF columns, refused where damaged or foreign."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from bitsmith.archs import ARCHITECTURES, TensorSpec
from bitsmith.archs.published import published_config
from bitsmith.archs.steps import PermuteColumns
from bitsmith.errors import BitsmithError, DamagedFileError
from bitsmith.run.assay import assay
from bitsmith.run.moments import stored_moments
from bitsmith.store import open_checkpoint
from bitsmith.store.statistics import (
    SiteStatistics,
    dense_moment,
    open_statistics,
    site_widths,
    write_sites,
    write_tokens,
)
from bitsmith.store.statistics_manifest import MANIFEST_NAME, TOKENS_NAME, Manifest, write_manifest

RNG = np.random.default_rng(0)
OUT_PROJ = "layers.1.linear_attn.out_proj.weight"


def specs_of(size: str = "tiny", **options: bool) -> list[TensorSpec]:
    config = published_config(size, vision=False, **options)
    return ARCHITECTURES[config["model_type"]](config).specs()


def site(name: str, columns: int, block: int | None = None) -> SiteStatistics:
    x, held = (RNG.standard_normal((rows, columns)).astype(np.float32) for rows in (600, 5))
    moment = x.T @ x / len(x)
    if block is not None:
        moment = np.stack([moment[i : i + block, i : i + block] for i in range(0, columns, block)])
    return SiteStatistics(name, 600, (x**2).mean(0), x.mean(0), moment, held, 5, (held**2).mean(0))


def write(folder: Path, specs: list[TensorSpec], block: int | None = None) -> Path:
    folder.mkdir()
    tied = not any(spec.name == "lm_head.weight" for spec in specs)
    entries = {}
    for name, columns in site_widths(specs).items():
        entries |= write_sites(folder / f"{name}.safetensors", [site(name, columns, block)])
    tokens = write_tokens(folder / TOKENS_NAME, np.arange(48).reshape(3, 16), np.arange(16).reshape(1, 16))
    manifest = Manifest("1", "m", "a", "t.txt", "b", 16, 4, 1, 48, 0, tied, False, tokens, entries)
    write_manifest(folder / MANIFEST_NAME, manifest)
    return folder


@pytest.fixture(scope="module")
def specs() -> list[TensorSpec]:
    return specs_of()


@pytest.fixture(scope="module")
def folder(specs: list[TensorSpec], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("statistics") / "stats", specs)


def named(specs: list[TensorSpec], name: str) -> TensorSpec:
    [spec] = [spec for spec in specs if spec.name.endswith(name)]
    return spec


def test_columns_are_those_of_the_gguf(folder: Path, specs: list[TensorSpec]) -> None:
    statistics, spec = open_statistics(folder, specs), named(specs, OUT_PROJ)
    [step] = spec.column_steps
    order = step.column_order
    assert not np.array_equal(order, np.arange(512)) and sorted(order) == list(range(512))
    here, there = statistics.hugging_face(spec), statistics.of(spec)
    weights = RNG.standard_normal((3, 512)).astype(np.float32)
    moved = weights[:, order]
    np.testing.assert_allclose(
        np.einsum("oi,ij,oj->o", moved, there.moment, moved),
        np.einsum("oi,ij,oj->o", weights, here.moment, weights),
        rtol=1e-3,
    )
    np.testing.assert_allclose(there.held @ moved.T, here.held @ weights.T, atol=1e-4)
    np.testing.assert_array_equal(there.diagonal, spec.importance_to_gguf(here.diagonal))
    np.testing.assert_array_equal(there.mean, here.mean[order])
    np.testing.assert_array_equal(there.held_diagonal, here.held_diagonal[order])


def test_blocks_stay_blocks_where_the_order_keeps_them(folder: Path) -> None:
    del folder
    found = site("s", 512, block=128)
    inside = np.concatenate([RNG.permutation(128) + 128 * n for n in (2, 0, 3, 1)])
    across = RNG.permutation(512)
    kept, torn = (found.moved([PermuteColumns(order)]).moment for order in (inside, across))
    assert kept.shape == (4, 128, 128) and torn.shape == (512, 512)
    whole = dense_moment(found.moment)
    np.testing.assert_array_equal(dense_moment(kept), whole[np.ix_(inside, inside)])
    np.testing.assert_array_equal(torn, whole[np.ix_(across, across)])
    assert found.moved([]) is found


def test_tensors_of_a_site_share_it_and_others_have_none(folder: Path, specs: list[TensorSpec]) -> None:
    statistics = open_statistics(folder, specs)
    k, v = (statistics.of(named(specs, f"3.self_attn.{x}_proj.weight")) for x in "kv")
    assert k is v and k.site == "layers.3.mixer.in" and k.tokens == 600
    assert statistics.of(named(specs, "embed_tokens.weight")) is None
    assert statistics.of(named(specs, "lm_head.weight")).site == "head.in"
    assert statistics.of(named(specs, "3.input_layernorm.weight")) is None
    assert statistics.of(named(specs, "mtp.fc.weight")).diagonal.shape == (512,)


def test_a_tied_embedding_reads_what_the_head_reads(tmp_path: Path) -> None:
    specs = specs_of(tied=True)
    path = write(tmp_path / "stats", specs)
    embed = named(specs, "embed_tokens.weight")
    for partial in (False, True):
        found = open_statistics(path, [embed] if partial else specs, partial=partial).of(embed)
        assert found.site == "head.in" and found.diagonal.shape == (256,)


def test_the_protocol_and_the_tokens_come_back(folder: Path, specs: list[TensorSpec]) -> None:
    statistics = open_statistics(folder, specs)
    protocol = (statistics.text, statistics.ctx_tokens, statistics.chunks, statistics.held_chunks)
    assert protocol == ("t.txt", 16, 4, 1) and len(statistics.digest) == 64
    fit, held = statistics.tokens()
    np.testing.assert_array_equal(fit, np.arange(48).reshape(3, 16))
    np.testing.assert_array_equal(held, np.arange(16).reshape(1, 16))


def test_mean_squares_over_both_splits() -> None:
    both, tokens = site("s", 8).all_tokens()
    again = SiteStatistics(
        "s", 3, np.array([1, 4], np.float32), held_tokens=1, held_diagonal=np.array([5, 0])
    )
    assert tokens == 605 and both.dtype == np.float32
    np.testing.assert_allclose(again.all_tokens()[0], [2, 3])


def test_another_models_statistics_are_refused(folder: Path, specs: list[TensorSpec]) -> None:
    with pytest.raises(BitsmithError, match=r"columns, this model's has"):
        open_statistics(folder, specs_of("0.8B"))
    without_mtp = [spec for spec in specs if spec.component != "mtp"]
    with pytest.raises(BitsmithError, match=r"'mtp\.\S+': is no site of this model"):
        open_statistics(folder, without_mtp)
    assert open_statistics(folder, without_mtp, partial=True).of(named(specs, "lm_head.weight"))


@pytest.mark.parametrize("what", ["flipped", "truncated", "absent", "swapped", "tokens"])
def test_damage_is_refused_and_named(
    folder: Path, specs: list[TensorSpec], tmp_path: Path, what: str
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    name = TOKENS_NAME if what == "tokens" else "layers.1.ffn.mid.safetensors"
    file = copy / name
    content = bytearray(file.read_bytes())
    if what in ("flipped", "tokens"):
        content[-3] ^= 0x40
        file.write_bytes(content)
    elif what == "truncated":
        file.write_bytes(content[:-4])
    elif what == "absent":
        file.unlink()
    else:  # a file of the same shapes, from another layer
        shutil.copyfile(copy / "layers.2.ffn.mid.safetensors", file)
    with pytest.raises(BitsmithError) as caught:
        statistics = open_statistics(copy, specs)
        statistics.tokens()
        statistics.of(named(specs, "layers.1.mlp.down_proj.weight"))
    said = str(caught.value)
    assert str(copy) in said and "\n" not in said
    assert name in said and (what in ("truncated", "absent") or "tensor" in said)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 9}, "schema 9, expected 1"),
        ({"kind": "assay"}, "no manifest of statistics"),
        ({"chunks": "many"}, "chunks: "),
        ({"chunks": 9}, "is not there as"),
        ({"sites": {}}, "no statistics of this model"),
        (
            {
                "sites": {
                    "head.in": {"file": "../x", "columns": 256, "tokens": 1, "held_tokens": 0, "tensors": {}}
                }
            },
            "x",
        ),
        (
            {
                "sites": {
                    "head.in": {
                        "file": TOKENS_NAME,
                        "columns": 256,
                        "tokens": 1,
                        "held_tokens": 0,
                        "tensors": {},
                    }
                }
            },
            "unsound manifest entry",
        ),
    ],
)
def test_a_broken_manifest_is_refused(
    folder: Path, specs: list[TensorSpec], tmp_path: Path, change: dict, message: str
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    manifest = json.loads((copy / MANIFEST_NAME).read_text())
    (copy / MANIFEST_NAME).write_text(json.dumps(manifest | change))
    with pytest.raises(BitsmithError, match=message):
        open_statistics(copy, specs)


def test_an_unfinished_calibration_is_refused(folder: Path, specs: list[TensorSpec], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / MANIFEST_NAME).write_text("{")
    with pytest.raises(DamagedFileError, match="is not JSON"):
        open_statistics(copy, specs)
    (copy / MANIFEST_NAME).unlink()
    with pytest.raises(BitsmithError, match="no finished calibration"):
        open_statistics(copy, specs)
    with pytest.raises(BitsmithError, match="does not exist"):
        open_statistics(tmp_path / "nowhere", specs)


def test_moments_by_name_are_read_one_at_a_time(folder: Path, specs: list[TensorSpec]) -> None:
    wanted = [named(specs, name) for name in (OUT_PROJ, "1.mlp.up_proj.weight", "1.input_layernorm.weight")]
    moments = stored_moments(folder, wanted)
    assert list(moments) == [wanted[0].name, wanted[1].name] and wanted[2].name not in moments
    expected = open_statistics(folder, specs).hugging_face(wanted[0]).moment
    np.testing.assert_array_equal(moments[wanted[0].name], expected.astype(np.float64))


def test_the_assay_takes_a_folder(demo_model: Path, tmp_path: Path) -> None:
    with open_checkpoint(demo_model) as checkpoint:
        specs = ARCHITECTURES["qwen3_5_text"](checkpoint.config, checkpoint).specs()
    path = write(tmp_path / "stats", specs)
    [found] = assay(demo_model, match=r"3\.self_attn\.k_proj", statistics=path, resamples=0).matrices
    moment = open_statistics(path, specs).hugging_face(named(specs, "3.self_attn.k_proj.weight")).moment
    with open_checkpoint(demo_model) as checkpoint:
        weights = checkpoint[found.name].read().astype(np.float64)
    energy = np.einsum("oi,ij,oj->", weights, moment.astype(np.float64), weights)
    assert found.whitened.spectrum.frobenius == pytest.approx(np.sqrt(energy), rel=1e-4)
