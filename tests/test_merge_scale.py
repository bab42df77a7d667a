"""What keeps a merge's memory at one layer of each model: pieces in order, pooled moments, maps in a file."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numba
import numpy as np
import pytest
from scipy import sparse

from bitsmith.errors import BitsmithError
from bitsmith.numerics.threads import in_order
from bitsmith.passes.merge_axes import Mixing, mixed_columns
from bitsmith.passes.merge_kept import MapFile
from bitsmith.passes.merge_maps import PairMoments, ResidualMap, pooled, transition_cost, variance_kept
from bitsmith.passes.merge_rows import folded
from bitsmith.store.checkpoint import ComputedTensor
from paired_models import LINES, write_model

RANDOM = np.random.default_rng(0)
WEIGHTS = RANDOM.standard_normal((3000, 2000)).astype(np.float32)  # two slices
ROWS = {
    "all": None,
    "picked": RANDOM.permutation(3000)[:700],
    "a map": RANDOM.standard_normal((3000, 130)),
    "few": sparse.random_array((3000, 650), density=0.01, rng=RANDOM, format="csr"),
}
COLUMNS = {
    "all": None,
    "picked": RANDOM.permutation(2000)[:600],
    "a map": RANDOM.standard_normal((2000, 120)),
    "few": sparse.random_array((2000, 650), density=0.01, rng=RANDOM, format="csr"),
}


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("rows", ROWS)
def test_folding_in_pieces_is_the_product_whatever_the_threads(rows: str, columns: str) -> None:
    ref = ComputedTensor("w", WEIGHTS.shape, "BF16", lambda start, stop: WEIGHTS[start:stop])
    assert len(list(ref.slices())) > 1
    chosen: tuple[Mixing, Mixing] = ROWS[rows], COLUMNS[columns]
    before, found = numba.get_num_threads(), []
    try:
        for count in (1, numba.config.NUMBA_NUM_THREADS):
            numba.set_num_threads(count)
            found.append(folded(ref, *chosen))
    finally:
        numba.set_num_threads(before)
    wide = mixed_columns(WEIGHTS.astype(np.float64), chosen[1])
    expected = mixed_columns(wide.T, chosen[0]).T
    assert found[0].dtype == np.float64
    np.testing.assert_allclose(found[0], expected, atol=1e-11 * max(1.0, np.abs(expected).max()))
    np.testing.assert_array_equal(*found)


def test_pieces_come_in_order_and_a_failure_comes_through() -> None:
    assert list(in_order(lambda n: n * n, range(20))) == [n * n for n in range(20)]
    with pytest.raises(ZeroDivisionError):
        list(in_order(lambda n: 1 // n, [2, 1, 0, 1]))


def test_moments_are_pooled_one_at_a_time() -> None:
    rows = [(RANDOM.standard_normal((40, 6)) * n, RANDOM.standard_normal((40, 4)) * n) for n in (1, 5, 30)]
    alive: list[int] = []

    def one_by_one() -> Iterator[PairMoments]:
        for n, (x, y) in enumerate(rows):
            alive.append(n)
            yield PairMoments.of(x, y)

    found = pooled(one_by_one())
    each = [PairMoments.of(x, y) for x, y in rows]
    for part in ("tt", "ss", "ts"):
        expected = np.mean([getattr(one, part) / np.trace(one.ss) for one in each], axis=0)
        np.testing.assert_allclose(getattr(found, part), expected, rtol=1e-12, atol=1e-15)
    assert alive == [0, 1, 2]
    with pytest.raises(BitsmithError, match="no moments to pool"):
        pooled(iter(()))


def test_maps_in_a_file_are_the_same_maps() -> None:
    maps = [ResidualMap(*RANDOM.standard_normal((2, 9, 5)), method=f"map {n}") for n in range(3)]
    file = MapFile()
    kept = [file.put(one) for one in maps]
    for one, other in zip(maps, kept, strict=True):
        np.testing.assert_array_equal(one.forward, other.forward)
        np.testing.assert_array_equal(one.backward, other.backward)
        assert (one.shape, one.method) == (other.shape, other.method) == ((9, 5), one.method)
    assert transition_cost(kept[0], kept[2]) == transition_cost(maps[0], maps[2])


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_variance_kept_of_maps_with_and_without_orthonormal_columns(scale: float) -> None:
    x = RANDOM.standard_normal((300, 8)) * np.arange(1, 9)
    moment = x.T @ x / len(x)
    basis = np.linalg.qr(RANDOM.standard_normal((8, 3)))[0]
    expected = np.trace(basis.T @ moment @ basis) / np.trace(moment)
    skewed = basis @ (RANDOM.standard_normal((3, 3)) + 3 * np.eye(3))  # the same span
    lacking = np.column_stack([basis, basis[:, 0]])  # the same span again
    for forward in (scale * basis, skewed, lacking):
        assert variance_kept(ResidualMap(forward, forward, "drawn"), moment) == pytest.approx(expected)


MERGED = """
import resource, sys
from pathlib import Path
from bitsmith.run.merge import merge
from bitsmith.run.merge_recipe import MergeRecipe

teacher, student, text, out = map(Path, sys.argv[1:5])
merge(teacher, student, text, out, recipe=MergeRecipe(alpha=0.5, basis=sys.argv[5]), fallback=False,
      ctx_tokens=128, samples=128, chunks=4, layer_map="proportional")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("basis", ["global", "layer"])
def test_memory_does_not_grow_with_the_layers(basis: str, tmp_path: Path) -> None:
    """Six more layers of the teacher are 160 MB, of moments 240, of maps 100: what stayed would show."""
    sizes = {"head_dim": 64, "num_key_value_heads": 2}
    large = {"hidden_size": 1024, "intermediate_size": 1536, "num_attention_heads": 8}
    small = {"hidden_size": 512, "intermediate_size": 768, "num_attention_heads": 4}
    text = tmp_path / "text.txt"
    text.write_text("".join(LINES))
    peaks = []
    for layers in (2, 8):
        teacher = write_model(tmp_path / f"t{layers}", 1, **sizes, **large, num_hidden_layers=layers)
        student = write_model(tmp_path / f"s{layers}", 2, **sizes, **small, num_hidden_layers=layers)
        paths = [teacher, student, text, tmp_path / f"out{layers}"]
        run = subprocess.run(
            [sys.executable, "-c", MERGED, *map(str, paths), basis],
            capture_output=True,
            text=True,
            check=False,
            timeout=1500,
        )
        assert run.returncode == 0, run.stderr
        peaks.append(int(run.stdout.split()[-1]) * (1 if sys.platform == "darwin" else 1024))
    assert peaks[1] - peaks[0] < 128 << 20
