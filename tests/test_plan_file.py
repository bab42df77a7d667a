"""Plans as YAML: written, read back, edited by a person, and refused where they do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from bitsmith.errors import BitsmithError, OutputError
from bitsmith.run.plan import Plan, Source, open_source, plan_of_types, plan_source
from bitsmith.run.plan_file import plan_text, read_plan, write_plan
from bitsmith.store import open_checkpoint


@pytest.fixture(scope="module")
def source(demo_model: Path) -> Source:
    return open_source(open_checkpoint(demo_model))


@pytest.fixture(scope="module")
def plan(source: Source) -> Plan:
    stock = plan_source(source, "Q4_K_M")
    reasons = {stock.rows[1].gguf_name: 'measured: "q" and #k\n0.1'}
    return plan_of_types(source, types_of(stock), mix="Q4_K_M", reasons=reasons)


def types_of(plan: Plan) -> dict[str, str]:
    return {row.gguf_name: row.type for row in plan.rows}


def test_a_plan_comes_back_as_it_was(tmp_path: Path, source: Source, plan: Plan) -> None:
    write_plan(plan, tmp_path / "plan.yaml", source, {plan.rows[0].gguf_name: 1.25e-4}, {"target": "4bpw"})
    assert read_plan(tmp_path / "plan.yaml", source) == plan


def test_it_is_plain_yaml_with_a_line_per_tensor(source: Source, plan: Plan) -> None:
    text = plan_text(plan, source, {row.gguf_name: 0.5 for row in plan.rows}, {"note": "a: b # c"})
    document = yaml.safe_load(text)
    lines = text.splitlines()
    for row in plan.rows:
        entry = document["tensors"][row.gguf_name]
        assert (entry["type"], entry["bytes"], entry["reason"]) == (row.type, row.nbytes, row.reason)
        assert (entry["bpw"], float(entry["kld_nats"])) == (pytest.approx(row.bpw, rel=1e-3), 0.5)
        assert sum(line.startswith(f"  {row.gguf_name}:") for line in lines) == 1
    assert document["about"] == {"note": "a: b # c"}


def test_an_edited_type_is_taken_and_sizes_are_worked_out_anew(
    tmp_path: Path, source: Source, plan: Plan
) -> None:
    path = tmp_path / "plan.yaml"
    write_plan(plan, path, source)
    name = "blk.0.ffn_gate.weight"
    text = path.read_text()
    assert f"  {name}: {{type: Q4_K" in text
    path.write_text(text.replace(f"  {name}: {{type: Q4_K", f"  {name}: {{type: q6_k"))
    edited = read_plan(path, source)
    expected = plan_of_types(source, types_of(plan) | {name: "Q6_K"}, mix="Q4_K_M")
    assert types_of(edited) == types_of(expected)
    assert edited.file_bytes == expected.file_bytes > plan.file_bytes


def test_a_line_may_be_the_type_alone(tmp_path: Path, source: Source, plan: Plan) -> None:
    path = tmp_path / "plan.yaml"
    document = yaml.safe_load(plan_text(plan, source))
    document["tensors"] = types_of(plan)
    path.write_text(yaml.safe_dump(document))
    assert types_of(read_plan(path, source)) == types_of(plan)


def edited(text: str, old: str, new: str) -> str:
    assert old in text
    return text.replace(old, new, 1)


LINE = "  blk.0.ffn_gate.weight: {type: Q4_K, "


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (LINE, "  blk.0.ffn_gate.weight: {type: Q7_K, ", "blk.0.ffn_gate.weight.*unknown type 'Q7_K'"),
        (LINE, "  blk.0.ffn_gate.weight: {kind: Q4_K, ", "blk.0.ffn_gate.weight.*has no type"),
        (LINE, "  blk.0.ffn_gate.weight: {type: 4, ", "blk.0.ffn_gate.weight.*has no type"),
        (LINE, LINE + "colour: red, ", "blk.0.ffn_gate.weight.*unknown key 'colour'"),
        (LINE, "  blk.0.ffn_gaze.weight: {type: Q4_K, ", "blk.0.ffn_gaze.weight.*not in the model"),
        (
            "  blk.0.ffn_up.weight: ",
            "  blk.0.ffn_gate.weight: ",
            "'blk.0.ffn_gate.weight' is there twice, line",
        ),
        ("  output_norm.weight: {type: F32", "  output_norm.weight: {type: Q8_0", "output_norm.weight.*F32"),
        ("version: 1", "version: 2", "version is 2, expected 1"),
        ("version: 1", "vision: 1", "unknown key 'vision'"),
        ("layout_sha256: ", "layout_sha256: 0", "model of other tensors"),
        ("mix: Q4_K_M", "mix: Q4_K_X", "unknown type 'Q4_K_X'"),
        ("mix: Q4_K_M", "mix: [1]", "'mix' is missing"),
        ("tensors:\n", "tensors:\n  - {", "not YAML at line"),
        ("tensors:\n", "about: &a [1]\nabout2: *a\ntensors:\n", "aliases are not allowed, line"),
        ("version: 1", "version: !!python/object/apply:os.system [ls]", "not YAML at line"),
        ("version: 1", "? [a, b]\n: 1\nversion: 1", "a key is no name, line"),
    ],
)
def test_an_unsound_plan_is_one_error(
    tmp_path: Path, source: Source, plan: Plan, old: str, new: str, message: str
) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(edited(plan_text(plan, source), old, new))
    with pytest.raises(BitsmithError, match=message) as refused:
        read_plan(path, source)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_missing_tensor_is_named(tmp_path: Path, source: Source, plan: Plan) -> None:
    path = tmp_path / "plan.yaml"
    kept = [line for line in plan_text(plan, source).splitlines() if not line.startswith(LINE)]
    path.write_text("\n".join(kept))
    with pytest.raises(BitsmithError, match=r"blk.0.ffn_gate.weight.*no type"):
        read_plan(path, source)


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe", b"[1]", b"words", b"{" * 3000, b"a: \x00", b"- " * 3000, b"x" * (17 << 20)],
)
def test_any_other_file_is_one_error(tmp_path: Path, source: Source, content: bytes) -> None:
    path = tmp_path / "plan.yaml"
    path.write_bytes(content)
    with pytest.raises(BitsmithError, match=r"plan\.yaml") as refused:
        read_plan(path, source)
    assert "\n" not in str(refused.value)


def test_a_plan_of_another_model_is_refused(
    tmp_path: Path, source: Source, plan: Plan, tiny_qwen3: Path
) -> None:
    write_plan(plan, tmp_path / "plan.yaml", source)
    with open_checkpoint(tiny_qwen3) as other, pytest.raises(BitsmithError, match="other tensors"):
        read_plan(tmp_path / "plan.yaml", open_source(other))


def test_an_existing_file_is_kept(tmp_path: Path, source: Source, plan: Plan) -> None:
    write_plan(plan, tmp_path / "plan.yaml", source)
    with pytest.raises(OutputError, match="exists"):
        write_plan(plan, tmp_path / "plan.yaml", source)
    write_plan(plan, tmp_path / "plan.yaml", source, overwrite=True)


def test_no_file_is_one_error(tmp_path: Path, source: Source) -> None:
    with pytest.raises(BitsmithError, match="cannot be read"):
        read_plan(tmp_path / "absent.yaml", source)
