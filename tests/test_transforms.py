"""Transforms as plan rows: asked for, seen, edited, recorded, and undone where a file meets its source."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from bitsmith.cli.main import main
from bitsmith.errors import BitsmithError, DamagedFileError, UnsupportedError
from bitsmith.passes.transform import TRANSFORMS, parse_transforms, transform_of
from bitsmith.run.calibrate import calibrate
from bitsmith.run.execute import compress, plan_for
from bitsmith.run.job import Job, Made, run, run_dry
from bitsmith.run.plan import open_source
from bitsmith.run.plan_file import read_plan, read_transforms, write_plan
from bitsmith.run.transforms import compare_weights, read_sidecar, sidecar_of
from bitsmith.store import open_checkpoint, open_gguf

ALL = (
    "drop-mtp,untie,scale-norm,fold,scale-ffn,scale-vo,scale-conv,scale-delta,scale-qk,permute-residual,"
    "permute-ffn,permute-v,permute-delta,rotate:seed=5"
)


def cli(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str | Path
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["bitsmith", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr()
    return int(stop.value.code or 0), said.out, said.err


@pytest.fixture(scope="module")
def rewritten(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rewritten") / "all.gguf"
    compress(demo_model, out, "F32", transforms=parse_transforms(ALL))
    return out


def test_undone_a_file_of_floats_is_its_source(demo_model: Path, rewritten: Path) -> None:
    errors = compare_weights(demo_model, rewritten)
    assert len(errors) == 56 and max(error.relative_error for error in errors) < 1e-12
    stored = open_gguf(rewritten)
    source = {t.gguf_name: t.ref for t in open_source(open_checkpoint(demo_model)).tensors}
    changed = [n for n in source if not np.allclose(stored[n].read(), source[n].read(), rtol=1e-4, atol=1e-6)]
    assert {"token_embd.weight", "output.weight", "blk.0.ssm_norm.weight", "blk.3.attn_q.weight"} <= set(
        changed
    )
    assert [str(transform) for transform, _ in read_sidecar(stored)] == ALL.split(",")


def test_a_sidecar_is_needed_and_must_be_the_files_own(
    demo_model: Path, rewritten: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(rewritten.read_bytes())
    with pytest.raises(BitsmithError, match=r"copy\.gguf\.transforms: is missing"):
        compare_weights(demo_model, copy)
    other = tmp_path / "other.gguf"
    compress(demo_model, other, "F32", transforms=parse_transforms("rotate:seed=6"))
    sidecar_of(copy).write_bytes(sidecar_of(other).read_bytes())
    with pytest.raises(DamagedFileError, match="does not belong"):
        compare_weights(demo_model, copy)


def test_what_an_overwritten_file_had_beside_it_goes(demo_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    compress(demo_model, out, "Q8_0", transforms=parse_transforms("fold"))
    assert sidecar_of(out).exists()
    compress(demo_model, out, "Q8_0", overwrite=True)
    assert not sidecar_of(out).exists() and compare_weights(demo_model, out)


def test_the_same_bytes_come_out_again(demo_model: Path, tmp_path: Path) -> None:
    asked = parse_transforms("scale-ffn,permute,fold,rotate:seed=9")
    one, two = (tmp_path / name for name in ("one.gguf", "two.gguf"))
    first, second = (compress(demo_model, out, "IQ4_XS", transforms=asked) for out in (one, two))
    assert first.sha256 == second.sha256
    assert sidecar_of(one).read_bytes() == sidecar_of(two).read_bytes()


def test_errors_are_in_the_sources_coordinates(demo_model: Path, tmp_path: Path) -> None:
    plain, scaled = tmp_path / "plain.gguf", tmp_path / "rotated.gguf"
    compress(demo_model, plain, "Q4_K_M", pure=True)
    compress(demo_model, scaled, "Q4_K_M", pure=True, transforms=parse_transforms("rotate"))
    errors = [
        {e.gguf_name: e.relative_error for e in compare_weights(demo_model, p)} for p in (plain, scaled)
    ]
    for name in ("blk.0.ffn_down.weight", "blk.1.attn_qkv.weight", "output.weight"):
        assert 0.3 < errors[1][name] / errors[0][name] < 3


def test_a_dry_run_shows_them_and_a_plan_can_be_edited(
    demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, record = tmp_path / "plan.yaml", tmp_path / "record.json"
    options = ("--transforms", "permute-ffn:by=scale,rotate:seed=3", "--plan-out", plan, "--dry-run")
    code, out, _ = cli(capsys, monkeypatch, "compress", demo_model, *options)
    assert code == 0 and "rotate:seed=3" in out and "permute-ffn" in out and "nothing written" in out
    document = yaml.safe_load(plan.read_text())
    names = ["permute-ffn:by=scale", "untie", "drop-mtp", "fold", "rotate:seed=3"]
    assert sorted(document["transforms"]) == sorted(names)
    plan.write_text(plan.read_text().replace(', "rotate:seed=3"', ""))
    made = tmp_path / "made.gguf"
    code, _, err = cli(
        capsys, monkeypatch, "compress", demo_model, "-o", made, "--plan", plan, "--json", record
    )
    assert code == 0, err
    said = json.loads(record.read_text())
    assert "rotate:seed=3" not in [one["transform"] for one in said["transforms"]]
    assert {one["transform"]: one["instances"] for one in said["transforms"]}["permute-ffn:by=scale"] == 4
    with pytest.raises(BitsmithError, match="a plan names its transforms"):
        run(Job(model=demo_model, out=tmp_path / "x.gguf", plan_file=plan, transforms="fold"))


def test_a_plan_without_untie_asks_for_no_head(tiny_qwen3_5_tied: Path, tmp_path: Path) -> None:
    with open_checkpoint(tiny_qwen3_5_tied) as checkpoint:
        path, asked = tmp_path / "plan.yaml", parse_transforms("untie")
        source = open_source(checkpoint, asked)
        write_plan(plan_for(tiny_qwen3_5_tied, "Q4_K_M", transforms=asked), path, source)
        assert read_plan(path, source).transforms == ("untie",)
        path.write_text(path.read_text().replace('transforms: ["untie"]\n', ""))
        assert read_transforms(path) == ()
        with pytest.raises(BitsmithError, match=r"output\.weight.*not in the model"):
            read_plan(path, open_source(checkpoint))


def test_untying_and_dropping_mtp_change_plan_and_file(tiny_qwen3_5_tied: Path, tmp_path: Path) -> None:
    plain = plan_for(tiny_qwen3_5_tied, "Q8_0")
    asked = parse_transforms("rotate")
    planned = plan_for(tiny_qwen3_5_tied, "Q8_0", transforms=asked)
    names = [{row.gguf_name for row in one.rows} for one in (plain, planned)]
    assert names[1] - names[0] == {"output.weight"}
    assert names[0] - names[1] and all(name.startswith("blk.4.") for name in names[0] - names[1])
    assert any("1,114,112 parameters" in note for note in planned.notes)
    assert any("MTP" in note for note in planned.notes)
    record = compress(tiny_qwen3_5_tied, tmp_path / "rotated.gguf", "Q8_0", transforms=asked)
    assert record.file_bytes == planned.file_bytes == (tmp_path / "rotated.gguf").stat().st_size
    metadata = open_gguf(tmp_path / "rotated.gguf").metadata
    assert metadata["qwen35.block_count"] == 4 and "qwen35.nextn_predict_layers" not in metadata


def test_a_float_gguf_can_be_transformed_too(tiny_qwen3_5_tied: Path, tmp_path: Path) -> None:
    floats, direct, by_way = (tmp_path / name for name in ("f32.gguf", "direct.gguf", "by-way.gguf"))
    compress(tiny_qwen3_5_tied, floats, "F32")
    asked = parse_transforms("rotate:seed=2")
    compress(tiny_qwen3_5_tied, direct, "F32", transforms=asked)
    compress(floats, by_way, "F32", transforms=asked)
    one, two = open_gguf(direct), open_gguf(by_way)
    assert set(one) == set(two) and one.metadata["qwen35.block_count"] == two.metadata["qwen35.block_count"]
    assert "qwen35.nextn_predict_layers" not in two.metadata
    for name in one:
        np.testing.assert_allclose(one[name].read(), two[name].read(), rtol=1e-4, atol=1e-6)
    assert max(error.relative_error for error in compare_weights(floats, by_way)) < 1e-12


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("spin", "unknown transform 'spin'; known: auto, none, gauge, permute"),
        ("rotate:angle=3", "no option 'angle'; known: seed"),
        ("rotate:seed=often", "seed is 'often', expected int"),
        ("permute-ffn:by=colour", "colour"),
        ("rotate:seed", "not of the form KEY=VALUE"),
        ("fold,fold", "named twice"),
        ("rotate,fold", "fold must come before rotate"),
        ("", "unknown transform ''"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_in_a_line(
    demo_model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    message: str,
) -> None:
    code, _, err = cli(capsys, monkeypatch, "compress", demo_model, "--transforms", text, "--dry-run")
    assert code == 1 and message in err and err.count("\n") == 1


def test_what_would_not_be_exact_is_refused_before_anything_is_written(
    tiny_qwen3_5: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    only = [transform_of("rotate")]
    with pytest.raises(UnsupportedError, match="rotate: "):
        compress(tiny_qwen3_5, out, "Q8_0", transforms=only)
    with pytest.raises(UnsupportedError, match="rotate: "):
        plan_for(tiny_qwen3_5, "Q8_0", transforms=only)
    assert not list(tmp_path.iterdir())


def test_what_a_transform_needs_is_put_where_it_belongs() -> None:
    assert list(map(str, parse_transforms("rotate"))) == ["untie", "drop-mtp", "fold", "rotate"]
    named = "permute-ffn,fold,scale-ffn,rotate:seed=1"
    expected = ["permute-ffn", "untie", "drop-mtp", "fold", "scale-ffn", "rotate:seed=1"]
    assert list(map(str, parse_transforms(named))) == expected


def test_every_transform_says_what_it_does() -> None:
    assert len(TRANSFORMS) == 14
    for name, kind in TRANSFORMS.items():
        assert kind.name == name and kind.axis and kind.summary
        assert str(transform_of(str(kind()))) == name


def test_the_sbgq_recipe_is_its_four_stages(demo_model: Path, tmp_path: Path) -> None:
    job = Job(model=demo_model, out=tmp_path / "sbgq.gguf", recipe="sbgq-iq4xs")
    record = run(job)
    types = {row.gguf_name: row.type for row in record.plan.rows}
    assert [types[f"{name}.weight"] for name in ("token_embd", "output")] == ["Q8_0", "Q8_0"]
    assert (types["blk.0.ssm_out.weight"], types["blk.0.ssm_beta.weight"]) == ("Q6_K", "Q5_K")
    assert types["blk.3.attn_v.weight"] == types["blk.3.attn_output.weight"] == "Q5_K"
    assert {types[f"blk.{n}.ffn_{part}.weight"] for n in range(4) for part in ("gate", "up", "down")} == {
        "IQ4_XS"
    }
    assert [str(one.transform) for one in record.applied] == [
        "drop-mtp", "untie", "fold", "rotate", "scale-ffn", "scale-vo", "scale-delta",
    ]  # fmt: skip
    assert run_dry(job).file_bytes == record.file_bytes
    assert Job(model=demo_model, recipe="sbgq-iq4xs").resolved().destination.name.endswith("sbgq-iq4xs.gguf")


def test_the_sbgq_recipe_serves_a_dense_model(tiny_qwen3: Path) -> None:
    planned = run_dry(Job(model=tiny_qwen3, recipe="sbgq-iq4xs"))
    assert {row.type for row in planned.rows} == {"F32", "IQ4_XS", "Q5_K", "Q8_0"}


def test_auto_keeps_what_helps_and_records_what_did_not(tiny_qwen3: Path, tmp_path: Path) -> None:
    text, stats, out = (tmp_path / name for name in ("text.txt", "stats", "auto.gguf"))
    text.write_text("".join(f"def f{n}(x):\n    return {n} * x + {n * n % 977}\n\n" for n in range(300)))
    calibrate(tiny_qwen3, text, stats, ctx_tokens=64, chunks=24, saliency=False)
    job = Job(
        tiny_qwen3, out, "Q2_K", transforms="auto", statistics=stats, rounder="weighted", sequential=False
    )
    made = run(job)
    assert isinstance(made, Made) and made.search is not None
    said = made.to_json()["transform_search"]
    assert said["applied"] == [str(one.transform) for one in made.applied] == list(made.plan.transforms)
    tried = {one["transform"]: one for one in said["tried"]}
    assert {name.split(":")[0] for name in tried if " + " not in name} >= {"rotate", "scale-ffn", "permute-v"}
    assert len({name for name in tried if " + " in name}) == 2
    kept = [one for one in made.search.tried if one.kept]
    assert all(one.change is not None and one.change.value < 0 for one in kept)
    assert all(one.reason for one in made.search.tried) and "held-out" in said["protocol"]
    assert [str(transform) for transform, _ in read_sidecar(open_gguf(out))] == said["applied"]
    assert len(compare_weights(tiny_qwen3, out)) == len(made.tensors)


@pytest.mark.slow
def test_a_rotated_file_can_be_tuned(tiny_qwen3: Path, tmp_path: Path) -> None:
    text, stats, out = (tmp_path / name for name in ("text.txt", "stats", "tuned.gguf"))
    text.write_text("".join(f"def f{n}(x):\n    return {n} * x + {n * n % 977}\n\n" for n in range(300)))
    calibrate(tiny_qwen3, text, stats, ctx_tokens=64, chunks=24, saliency=False)
    asked = {"transforms": "rotate:seed=4", "statistics": stats, "sequential": False, "tune": True}
    made = run(Job(tiny_qwen3, out, "Q2_K", tune_steps=12, **asked))
    assert isinstance(made, Made) and made.tuning is not None and made.tuning.kept
    assert made.tuning.held_kld_after_nats < made.tuning.held_kld_before_nats
    errors = {one.gguf_name: one.relative_error for one in compare_weights(tiny_qwen3, out)}
    assert errors["blk.0.ffn_down.weight"] < 0.3


@pytest.mark.parametrize("more", [{"type_name": "Q4_K_M"}, {"target": "4bpw"}, {"pure": True}])
def test_the_sbgq_recipe_names_its_own_types(demo_model: Path, more: dict[str, object]) -> None:
    with pytest.raises(BitsmithError, match="sbgq-iq4xs names every type"):
        run(Job(model=demo_model, recipe="sbgq-iq4xs", **more))
