"""BF16 products where the processor has them, a refusal where it has not, and the record that says which."""

from pathlib import Path

import pytest

from bitsmith.errors import BitsmithError
from bitsmith.run.evaluate import evaluate
from bitsmith.run.products import bfloat16_products, current_products, matrix_products

_FLAGS = Path("/proc/cpuinfo")


def test_the_processors_flags_decide() -> None:
    if not _FLAGS.exists():
        pytest.skip("no /proc/cpuinfo")
    flags = set(_FLAGS.read_text().split())
    assert bfloat16_products() == bool(flags & {"avx512_bf16", "amx_tile"})


def test_other_names_are_refused() -> None:
    with pytest.raises(BitsmithError, match="unknown products 'float16'"), matrix_products("float16"):
        pass


@pytest.mark.skipif(bfloat16_products(), reason="this processor has BF16 products")
def test_a_processor_without_them_refuses(demo_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a text of a few words\n" * 40)
    with pytest.raises(BitsmithError, match="needs a CPU with AVX-512 BF16 or AMX"):
        evaluate(demo_model, demo_model, text, 16, 1, products="bfloat16")
    assert current_products() == "float32"
    assert evaluate(demo_model, demo_model, text, 16, 1).protocol.products == "float32"


@pytest.mark.skipif(not bfloat16_products(), reason="this processor only emulates BF16 products")
def test_bfloat16_products_are_near_and_recorded(demo_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 80)
    exact = evaluate(demo_model, demo_model, text, 64, 2)
    found = evaluate(demo_model, demo_model, text, 64, 2, products="bfloat16")
    assert found.protocol.products == "bfloat16"
    assert current_products() == "float32"
    assert found.ppl_ref.value == pytest.approx(exact.ppl_ref.value, rel=0.05)
