"""Targets: what is understood, what a limit holds, and what llama.cpp takes besides the weights."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path

import pytest

from bitsmith.archs import Qwen35
from bitsmith.archs.published import published_config
from bitsmith.errors import BitsmithError
from bitsmith.run.budget import limit_of, parse_fit, parse_target, runtime_memory
from bitsmith.run.execute import compress
from bitsmith.run.plan import Source, open_source, plan_source
from bitsmith.store import Typed, open_checkpoint

MIB = 1 << 20


@pytest.fixture(scope="module")
def demo_source(demo_model: Path) -> Source:
    return open_source(open_checkpoint(demo_model))


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [
        ("4.66bpw", "bpw", Fraction(466, 100)),
        (" 3 BPW ", "bpw", Fraction(3)),
        ("4.86GiB", "file", Fraction(int(Fraction("4.86") * (1 << 30)))),
        ("5.2GB", "file", Fraction(5_200_000_000)),
        ("300MiB", "file", Fraction(300 * MIB)),
        ("300mib", "file", Fraction(300 * MIB)),
        ("1.5 kB", "file", Fraction(1500)),
        ("4183264", "file", Fraction(4183264)),
        ("4183264B", "file", Fraction(4183264)),
    ],
)
def test_targets_are_exact(text: str, kind: str, amount: Fraction) -> None:
    target = parse_target(text)
    assert (target.kind, target.amount) == (kind, amount)


@pytest.mark.parametrize(
    "text", ["", "small", "4.66bpp", "-3GiB", "1e9", "4,5GiB", "5 G", "0", "0bpw", "33bpw", "nanbpw",
             "9999999PB", "9" * 40, "9" * 400, "4.66 bpw please", "٤GiB"]
)  # fmt: skip
def test_anything_else_is_one_error_that_quotes_it(text: str) -> None:
    with pytest.raises(BitsmithError) as refused:
        parse_target(text)
    assert "\n" not in str(refused.value)
    assert "target" in str(refused.value)


@pytest.mark.parametrize(("text", "ctx"), [("4bpw", 8192), ("8GiB", 0), ("8GiB", 1 << 30), ("", 8192)])
def test_memory_is_a_size_and_a_context_a_length(text: str, ctx: int) -> None:
    with pytest.raises(BitsmithError):
        parse_fit(text, ctx)


def test_bpw_is_of_all_weights_written(demo_source: Source) -> None:
    plan = plan_source(demo_source, "Q4_K_M")
    limit = limit_of(demo_source, parse_target(f"{plan.bpw:.12f}bpw"))
    assert limit.of == "tensors"
    assert abs(limit.limit_bytes - plan.tensor_bytes) <= 1
    assert limit.holds(limit.limit_bytes, 1 << 60)
    assert not limit.holds(limit.limit_bytes + 1, 0)


def test_a_size_is_of_the_file(demo_source: Source, demo_model: Path, tmp_path: Path) -> None:
    record = compress(demo_model, tmp_path / "a.gguf", "Q4_K_M")
    limit = limit_of(demo_source, parse_target(str(record.file_bytes)))
    assert limit.of == "file"
    assert limit.holds(1 << 60, (tmp_path / "a.gguf").stat().st_size)
    assert not limit.holds(0, (tmp_path / "a.gguf").stat().st_size + 1)


def test_memory_of_the_demo_model_is_what_llama_cpp_prints(demo_source: Source) -> None:
    """`KV buffer size`, `RS buffer size` (R and S) and `compute buffer size` of its log, November 2026."""
    for ctx, kv_mib, compute_mib in ((512, 0.25, 9.52), (4096, 2.0, 11.55), (65536, 32.0, 71.55)):
        memory = runtime_memory(demo_source.metadata, 4096, ctx)
        assert memory.kv_bytes == kv_mib * MIB
        assert memory.state_bytes == 0.375 * MIB  # 3 layers of 64 × 512, float32
        assert memory.conv_bytes == 3 * 4 * 3 * (512 + 2 * 4 * 64)
        assert compute_mib * MIB <= memory.compute_bytes <= 1.6 * compute_mib * MIB
    assert runtime_memory(demo_source.metadata, 4096, 1000).ctx_tokens == 1024


def test_memory_at_the_shapes_of_0_8b_is_what_llama_cpp_prints() -> None:
    """Four layers of Qwen3.5-0.8B's shapes; from the log as above."""
    arch = Qwen35(published_config("0.8B", layers=4))
    metadata = arch.gguf_metadata() | {"general.architecture": "qwen35"}
    for ctx, kv_mib, compute_mib in ((512, 1.0, 491.52), (8192, 16.0, 499.02), (65536, 128.0, 491.0)):
        memory = runtime_memory(metadata, 248320, ctx)
        assert memory.kv_bytes == kv_mib * MIB
        assert (memory.state_bytes + memory.conv_bytes) / MIB == pytest.approx(3.21, abs=0.005)
        assert compute_mib * MIB <= memory.compute_bytes <= 1.2 * compute_mib * MIB


def test_mtp_layers_have_neither_cache_nor_state(tiny_qwen3_5: Path) -> None:
    with open_checkpoint(tiny_qwen3_5) as checkpoint:
        source = open_source(checkpoint)
        metadata = dict(source.metadata)
    assert metadata["qwen35.nextn_predict_layers"] == 1
    with_mtp = runtime_memory(metadata, 1000, 1024)
    del metadata["qwen35.nextn_predict_layers"]
    metadata["qwen35.block_count"] -= 1
    assert runtime_memory(metadata, 1000, 1024) == with_mtp


def test_a_dense_model_has_a_cache_in_every_layer_and_no_state(tiny_qwen3: Path) -> None:
    with open_checkpoint(tiny_qwen3) as checkpoint:
        source = open_source(checkpoint)
    found = runtime_memory(source.metadata, 1000, 256)
    keys = {name.removeprefix("qwen3."): value for name, value in source.metadata.items()}
    width = keys["attention.key_length"] + keys["attention.value_length"]
    heads = keys["attention.head_count_kv"]
    assert found.kv_bytes == 2 * 256 * width * heads * keys["block_count"]
    assert (found.state_bytes, found.conv_bytes) == (0, 0)


def test_typed_metadata_of_a_gguf_counts_alike(demo_source: Source, demo_model: Path, tmp_path: Path) -> None:
    compress(demo_model, tmp_path / "a.gguf", "BF16")
    with open_checkpoint(tmp_path / "a.gguf") as checkpoint:
        source = open_source(checkpoint)
        assert any(isinstance(value, Typed) for value in source.metadata.values())
        expected = runtime_memory(demo_source.metadata, 4096, 8192)
        assert runtime_memory(source.metadata, 4096, 8192) == expected


def test_fit_leaves_the_file_what_remains(demo_source: Source) -> None:
    limit = limit_of(demo_source, parse_fit("64MiB", 8192))
    assert limit.memory is not None
    assert limit.of == "file"
    assert limit.limit_bytes + limit.memory.total_bytes == 64 * MIB
    assert limit.memory.to_json()["total_bytes"] == limit.memory.total_bytes


def test_fit_refuses_memory_that_the_cache_fills(demo_source: Source) -> None:
    with pytest.raises(BitsmithError, match=re.escape("leaves nothing for the weights")):
        limit_of(demo_source, parse_fit("10MiB", 1 << 20))
