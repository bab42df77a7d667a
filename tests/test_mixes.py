"""The stock mixes against tables taken from real llama-quantize, and what must hold for any model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitsmith.errors import BitsmithError
from bitsmith.formats import format_named
from bitsmith.run.mixes import MIXES, Model, assign, fitting_type, is_quantizable, mix_named

GOLDEN = json.loads((Path(__file__).parent / "data" / "llama_quantize_types.json").read_text())


def layout(
    arch: str, layers: int, tied: bool, mtp: int, hidden: int, ffn: int, gqa: int = 4
) -> dict[str, tuple[int, ...]]:
    """GGUF names and shapes of a small model; the golden tables were taken on these."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (512, hidden), "output_norm.weight": (hidden,)}
    if not tied:
        shapes["output.weight"] = (512, hidden)
    for layer in range(layers + mtp):
        full = arch == "qwen3" or (layer + 1) % 4 == 0 or layer >= layers
        block = dict(FULL_ATTENTION if full else LINEAR_ATTENTION)
        block |= {
            "ffn_gate.weight": ("ffn", "h"),
            "ffn_up.weight": ("ffn", "h"),
            "ffn_down.weight": ("h", "ffn"),
        }
        block |= {"attn_norm.weight": ("h",), "post_attention_norm.weight": ("h",)}
        if layer >= layers:
            block |= {"nextn.eh_proj.weight": ("h", "2h"), "nextn.enorm.weight": ("h",)}
        lengths = {"h": hidden, "2h": 2 * hidden, "ffn": ffn}
        for name, shape in block.items():
            shapes[f"blk.{layer}.{name}"] = tuple(lengths.get(n, n) for n in shape)  # type: ignore[misc, call-overload]
    return shapes


FULL_ATTENTION: dict[str, tuple[int | str, ...]] = {
    "attn_q.weight": (512, "h"),
    "attn_k.weight": (64, "h"),
    "attn_v.weight": (64, "h"),
    "attn_output.weight": ("h", 256),
    "attn_q_norm.weight": (64,),
    "attn_k_norm.weight": (64,),
}
LINEAR_ATTENTION: dict[str, tuple[int | str, ...]] = {
    "attn_qkv.weight": (768, "h"),
    "attn_gate.weight": (256, "h"),
    "ssm_beta.weight": (4, "h"),
    "ssm_alpha.weight": (4, "h"),
    "ssm_conv1d.weight": (768, 4),
    "ssm_a": (4,),
    "ssm_dt.bias": (4,),
    "ssm_norm.weight": (64,),
    "ssm_out.weight": ("h", 256),
}


def expected_types(case: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, str]:
    """Unroll a golden case to a type per tensor."""
    found = dict.fromkeys(shapes, "F32")
    for suffix, runs in case["types"].items():
        types = [t for run in runs.split() for t in [run.split("*")[1]] * int(run.split("*")[0])]
        names = [name for name in shapes if re.fullmatch(rf"(blk\.\d+\.)?{re.escape(suffix)}", name)]
        found.update(zip(names, types, strict=True))
    return found


@pytest.mark.parametrize("mix", MIXES)
def test_types_equal_llama_quantize_row_for_row(mix: str) -> None:
    cases = [case for case in GOLDEN["cases"] if case["mix"] == mix]
    assert {case["layout"] for case in cases} >= set(range(3 if mix == "Q1_0" else len(GOLDEN["layouts"])))
    for case in cases:
        spec = GOLDEN["layouts"][case["layout"]]
        shapes = layout(**spec)
        model = Model(spec["layers"] + spec["mtp"], spec["gqa"], has_imatrix=case["how"] == "imatrix")
        wanted = assign(shapes, MIXES[mix], model, pure=case["how"] == "pure")
        found = {name: fitting_type(t, shapes[name][-1]) for name, t in wanted.items()}
        assert found == expected_types(case, shapes), (spec, case["how"])


@pytest.mark.parametrize("mix", ["Q4_0", "Q5_0", "IQ4_XS", "IQ4_NL"])
def test_imatrix_moves_the_first_ffn_down_tensors(mix: str) -> None:
    shapes = layout("qwen35", 16, True, 0, 256, 768)
    plain, weighed = (assign(shapes, MIXES[mix], Model(16, 4, has)) for has in (False, True))
    changed = {name for name in shapes if plain[name] != weighed[name]}
    assert changed == {"blk.0.ffn_down.weight", "blk.1.ffn_down.weight"}


def test_order_of_the_tensors_does_not_matter() -> None:
    shapes = layout("qwen35", 12, True, 1, 256, 768)
    model = Model(13, 4)
    backwards = dict(reversed(shapes.items()))
    for mix in MIXES.values():
        assert assign(shapes, mix, model) == assign(backwards, mix, model)


def test_names_are_taken_in_any_case_and_by_alias() -> None:
    assert mix_named("q4_k") is MIXES["Q4_K_M"]
    assert mix_named("iq4_xs").file_type == 30
    with pytest.raises(BitsmithError, match="unknown type 'Q4_X'; known: F32 F16"):
        mix_named("Q4_X")


def test_a_one_row_matrix_counts_as_a_vector() -> None:
    assert not is_quantizable("blk.0.ssm_beta.weight", (1, 256))
    assert is_quantizable("blk.0.ssm_beta.weight", (2, 256))


@given(
    mix=st.sampled_from(sorted(MIXES)),
    layers=st.integers(1, 40),
    gqa=st.integers(1, 16),
    tied=st.booleans(),
    imatrix=st.booleans(),
    row=st.integers(1, 40).map(lambda n: 16 * n),
)
def test_every_type_fits_its_rows(
    mix: str, layers: int, gqa: int, tied: bool, imatrix: bool, row: int
) -> None:
    shapes = layout("qwen35", layers, tied, 1, row, row)
    types = assign(shapes, MIXES[mix], Model(layers + 1, gqa, imatrix))
    assert types.keys() == shapes.keys()
    for name, wanted in types.items():
        stored = fitting_type(wanted, shapes[name][-1])
        assert format_named(stored).fits(shapes[name][-1])
        assert (stored == wanted) == format_named(wanted).fits(shapes[name][-1])
        assert is_quantizable(name, shapes[name]) or stored == "F32"
