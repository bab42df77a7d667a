"""Plans: types, bytes and totals of every row, overrides, fallbacks and refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import pytest

from bitsmith.archs import export_view
from bitsmith.archs.published import published_config
from bitsmith.errors import BitsmithError, UnsupportedError
from bitsmith.formats import format_named
from bitsmith.lab.synth import synth_tensors
from bitsmith.run.execute import compress
from bitsmith.run.mixes import MIXES
from bitsmith.run.plan import Plan, PlanRow, open_source, plan, plan_source
from bitsmith.store import TensorData, open_checkpoint, write_safetensors


def planned(model: Path, type_name: str, **options: Any) -> Plan:
    with open_checkpoint(model) as checkpoint:
        return plan(checkpoint, type_name, **options)


def by_name(found: Plan) -> dict[str, PlanRow]:
    return {row.gguf_name: row for row in found.rows}


def reference_bytes(row: PlanRow) -> int:
    """Bytes of a row by the gguf package's own table, which is older than Q2_0."""
    sizes = {kind.name: size for kind, size in gguf.GGML_QUANT_SIZES.items()}
    weights, nbytes = ({"Q2_0": (64, 18)} | sizes)[row.type]
    size = 1
    for length in row.shape:
        size *= length
    return size // weights * nbytes


@pytest.fixture(scope="module")
def odd_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense Qwen3 whose FFN rows are divisible by 32 and not by 256, and hidden rows by neither."""
    config = published_config("qwen3-tiny") | {"hidden_size": 272, "intermediate_size": 320}
    data = []
    for name, ref in synth_tensors(config).items():
        encoded = format_named(ref.dtype).encode(ref.read().reshape(1, -1))
        data.append(TensorData(name, ref.dtype, ref.shape, [encoded]))
    folder = tmp_path_factory.mktemp("odd") / "model"
    write_safetensors(folder, data, config)
    return folder


@pytest.mark.parametrize("type_name", MIXES)
def test_every_exported_tensor_has_one_row_with_exact_bytes(tiny_qwen3_5: Path, type_name: str) -> None:
    with open_checkpoint(tiny_qwen3_5) as checkpoint:
        found = plan(checkpoint, type_name)
        exported = {tensor.gguf_name: tensor.ref.shape for tensor in export_view(checkpoint).tensors}
    assert {row.gguf_name: row.shape for row in found.rows} == exported
    assert len(found.rows) == len(exported)
    for row in found.rows:
        assert row.nbytes == reference_bytes(row)
    assert found.tensor_bytes == sum(map(reference_bytes, found.rows))
    assert found.bpw == pytest.approx(8 * found.tensor_bytes / found.parameters, rel=1e-15)
    assert found.file_bytes > found.tensor_bytes


def test_vision_is_set_aside_and_mtp_kept_and_both_are_said(tiny_qwen3_5: Path) -> None:
    found = planned(tiny_qwen3_5, "Q4_K_M")
    assert found.set_aside
    assert all(name.startswith("model.visual.") for name in found.set_aside)
    assert any(re.match(rf"{len(found.set_aside)} vision tensors are set aside", n) for n in found.notes)
    assert any("MTP tensors are kept" in note for note in found.notes)
    assert "blk.4.nextn.eh_proj.weight" in by_name(found)


def test_a_tied_model_stores_its_embedding_once_in_the_output_type(
    tiny_qwen3_5_tied: Path, tiny_qwen3_5: Path
) -> None:
    tied, untied = by_name(planned(tiny_qwen3_5_tied, "Q4_K_M")), by_name(planned(tiny_qwen3_5, "Q4_K_M"))
    assert "output.weight" not in tied
    assert tied["token_embd.weight"].type == "Q6_K"
    assert (untied["token_embd.weight"].type, untied["output.weight"].type) == ("Q4_K", "Q6_K")


def test_overrides_match_either_name_in_any_case_and_leave_the_rest_alone(tiny_qwen3_5: Path) -> None:
    overrides = [("FFN_down", "q6_k"), ("embed_tokens", "Q8_0"), (r"blk\.0\.ffn", "F16")]
    plain = by_name(planned(tiny_qwen3_5, "Q4_K_M"))
    changed = by_name(planned(tiny_qwen3_5, "Q4_K_M", tensor_types=overrides))
    for name, row in changed.items():
        if "ffn_down" in name:
            assert (row.type, row.reason) == ("Q6_K", "override FFN_down")
        elif name == "token_embd.weight":
            assert (row.type, row.note) == ("Q8_0", "override embed_tokens")
        elif name.startswith("blk.0.ffn"):
            assert row.type == "F16"
        else:
            assert row == plain[name]


def test_an_override_never_quantizes_norms_that_it_also_matches(tiny_qwen3: Path) -> None:
    rows = by_name(planned(tiny_qwen3, "Q4_K_M", tensor_types=[("attn_q", "Q8_0")]))
    assert rows["blk.0.attn_q.weight"].type == "Q8_0"
    assert (rows["blk.0.attn_q_norm.weight"].type, rows["blk.0.attn_q_norm.weight"].note) == (
        "F32",
        "never quantized",
    )


def test_overrides_also_apply_under_float_types(tiny_qwen3: Path) -> None:
    rows = by_name(planned(tiny_qwen3, "BF16", tensor_types=[("ffn_up", "Q8_0")]))
    assert {row.type for name, row in rows.items() if "ffn_up" in name} == {"Q8_0"}
    assert {row.type for name, row in rows.items() if "ffn_gate" in name} == {"BF16"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([("no_such", "Q4_K")], r"no_such=Q4_K changes nothing: no tensor has a name that matches"),
        (
            [("layernorm", "Q4_K")],
            r"layernorm=Q4_K changes nothing: llama\.cpp never quantizes model\.layers",
        ),
        ([("ffn", "Q4_K"), ("ffn_up", "Q8_0")], r"ffn_up=Q8_0 changes nothing: ffn comes before it"),
        ([("ffn_(up", "Q4_K")], r"'ffn_\(up': bad regular expression"),
        ([("ffn_up", "Q4_K_M")], r"unknown type 'Q4_K_M'; known: .*Q4_K "),
    ],
)
def test_overrides_that_cannot_be_meant_are_refused(
    tiny_qwen3: Path, overrides: list[tuple[str, str]], message: str
) -> None:
    with pytest.raises(BitsmithError, match=message):
        planned(tiny_qwen3, "Q4_K_M", tensor_types=overrides)


def test_fallbacks_are_recorded_and_can_be_refused(odd_rows: Path) -> None:
    found = planned(odd_rows, "Q4_K_M")
    rows = by_name(found)
    down, up = rows["blk.1.ffn_down.weight"], rows["blk.1.ffn_up.weight"]
    assert (down.type, down.fallback_from) == ("Q5_0", "Q4_K")
    assert (up.type, up.fallback_from) == ("F16", "Q4_K")
    assert down.note == "fallback from Q4_K: rows of 320 are not divisible by 256"
    assert {row.gguf_name for row in found.fallbacks} == {
        row.gguf_name for row in found.rows if row.type != "F32" and row.shape[-1] % 256
    }
    with pytest.raises(BitsmithError) as refusal:
        planned(odd_rows, "Q4_K_M", no_fallback=True)
    assert len(str(refusal.value).splitlines()) == 1
    for row in found.fallbacks:
        assert f"{row.hf_name} (rows of {row.shape[-1]}: " in str(refusal.value)


def test_no_fallback_accepts_a_model_whose_rows_fit(tiny_qwen3: Path) -> None:
    assert planned(tiny_qwen3, "Q4_K_M", no_fallback=True) == planned(tiny_qwen3, "Q4_K_M")


def test_a_plan_is_json_with_a_digest_of_what_it_decides(tiny_qwen3: Path) -> None:
    first = planned(tiny_qwen3, "Q4_K_M")
    text = json.loads(json.dumps(first.to_json(), allow_nan=False))
    assert text["digest"] == planned(tiny_qwen3, "q4_k_m").digest
    assert text["file_bytes"] == first.file_bytes
    assert [row["gguf_name"] for row in text["rows"]] == [row.gguf_name for row in first.rows]
    others = [
        planned(tiny_qwen3, "Q4_K_S"),
        planned(tiny_qwen3, "Q4_K_M", pure=True),
        planned(tiny_qwen3, "Q4_K_M", tensor_types=[("ffn_up", "Q8_0")]),
    ]
    assert len({first.digest, *(other.digest for other in others)}) == 4


def test_one_source_serves_many_plans(tiny_qwen3: Path) -> None:
    with open_checkpoint(tiny_qwen3) as checkpoint:
        source = open_source(checkpoint)
        for name in ("F16", "IQ4_XS"):
            assert plan_source(source, name) == plan(checkpoint, name)


def test_a_float_gguf_plans_as_the_folder_it_came_from(tiny_qwen3_5: Path, tmp_path: Path) -> None:
    floats = tmp_path / "bf16.gguf"
    compress(tiny_qwen3_5, floats, "BF16")
    direct, again = planned(tiny_qwen3_5, "IQ4_XS"), planned(floats, "IQ4_XS")
    assert {n: (r.type, r.nbytes) for n, r in by_name(direct).items()} == {
        n: (r.type, r.nbytes) for n, r in by_name(again).items()
    }
    assert direct.file_bytes == again.file_bytes


def test_weights_that_are_already_quantized_are_refused(tiny_qwen3: Path, tmp_path: Path) -> None:
    quantized = tmp_path / "q8.gguf"
    compress(tiny_qwen3, quantized, "Q8_0")
    with pytest.raises(UnsupportedError, match=r"q8\.gguf: tensor 'token_embd\.weight': is stored as Q8_0"):
        planned(quantized, "Q4_K_M")
