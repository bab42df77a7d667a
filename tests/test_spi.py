"""The SPI recipe: planted critical linears are found, sizes hold, controls are controls, claims follow."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from math import prod
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bitsmith.archs.published import published_config
from bitsmith.errors import BitsmithError, OutputError
from bitsmith.formats import format_named
from bitsmith.lab.models import DEMO_MODEL
from bitsmith.lab.synth import synth_tensors
from bitsmith.report.spi_table import print_spi_study, write_spi_page
from bitsmith.run.assay import assay
from bitsmith.run.critical import (
    BY,
    Amount,
    Linear,
    choose,
    critical_linears,
    default_amount,
    inverse,
    linears_of,
    parse_critical,
    spectral_scores,
)
from bitsmith.run.evaluation import Artifact, Measure, Protocol
from bitsmith.run.spi import plan_spi, write_spi
from bitsmith.run.spi_claims import seed_linears, seed_sizes, with_claims
from bitsmith.run.spi_figures import RANDOM_LEVEL, comparisons, correlations
from bitsmith.run.spi_rows import LinearRow, SpiRow, SpiStudy, SpiTable
from bitsmith.run.study_spi import JOURNAL_NAME, RESULT_NAME, study_spi
from bitsmith.store import open_checkpoint
from bitsmith.store.checkpoint import ComputedTensor, TensorRef
from bitsmith.store.safetensors_writer import TensorData, write_safetensors

Float32 = NDArray[np.float32]

STEEP = ("model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.v_proj.weight")
FLAT = ("model.layers.1.mlp.down_proj.weight", "model.layers.1.self_attn.o_proj.weight")
FRAGILE = "model.layers.1.mlp.gate_proj.weight"
BEFORE_FRAGILE = "model.layers.1.post_attention_layernorm.weight"
TEXT = " ".join(f"def f{n}(x): return x * {n} + f{n - 1}(x - {n % 7})\n" for n in range(400))


def _planted(name: str, shape: tuple[int, ...], sigma: Float32) -> Float32:
    rng = np.random.default_rng(prod(map(ord, name)) % 2**32)
    left, right = (np.linalg.qr(rng.standard_normal((length, len(sigma))))[0] for length in shape)
    return ((left * sigma) @ right.T).astype(np.float32)


def _values(ref: TensorRef) -> TensorRef:
    """Plant a steep spectrum, a flat one, or what NF4 cannot hold: a huge weight in 64 that reads zeros."""
    steps = np.arange(1, min(ref.shape) + 1)
    if ref.name in STEEP:
        values = _planted(ref.name, ref.shape, 4 * steps**-1.5)
    elif ref.name in FLAT:
        values = _planted(ref.name, ref.shape, 1 + 1e-5 * steps[::-1])
    elif ref.name in (FRAGILE, BEFORE_FRAGILE):
        values = np.array(ref.read())
        values[..., ::64] *= 200 if ref.name == FRAGILE else 0
    else:
        return ref
    return ComputedTensor(ref.name, ref.shape, ref.dtype, lambda start, stop: values[start:stop])


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense Qwen3 with a few planted linears."""
    config = published_config("qwen3-tiny", layers=2)
    tensors = {name: _values(ref) for name, ref in synth_tensors(config, 5).items()}
    data = [
        TensorData(
            name, ref.dtype, ref.shape, iter([format_named(ref.dtype).encode(ref.read().reshape(1, -1))])
        )
        for name, ref in tensors.items()
    ]
    files = {name: (DEMO_MODEL / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    out = tmp_path_factory.mktemp("spi") / "planted"
    write_safetensors(out, data, config, files=files)
    return out


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("spi") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        ("alpha-high", STEEP),
        ("alpha-low", FLAT),
        ("tail-low", STEEP),
        ("tail-high", FLAT),
        ("r90-low", STEEP),
    ],
)
def test_planted_spectra_are_picked_at_both_ends(planted: Path, by: str, expected: tuple[str, ...]) -> None:
    found = critical_linears(planted, by=by, amount=Amount(count=2))
    assert set(found.names) == set(expected)
    kept = [linear for linear in found.linears if linear.name in expected]
    assert found.kept_bytes == sum(2 * prod(linear.shape) for linear in kept)
    assert len(found.linears) == 14 and by in BY


def test_a_threshold_keeps_what_lies_beyond_it(planted: Path) -> None:
    assert critical_linears(planted, amount=parse_critical("alpha>1.3")).names == STEEP
    low = critical_linears(planted, amount=parse_critical("alpha<0.05"))
    assert low.by == "alpha-low" and set(low.names) == set(FLAT)
    with pytest.raises(BitsmithError, match="keeps nothing"):
        critical_linears(planted, amount=parse_critical("alpha>9"))


def test_an_assay_spares_the_spectra(planted: Path, tmp_path: Path) -> None:
    assay(planted, tmp_path / "assay", match=r"layers\.0\.self_attn\.[kv]", resamples=0)
    with open_checkpoint(planted) as checkpoint:
        names = [f"model.layers.0.self_attn.{name}_proj.weight" for name in "kv"]
        linears = [Linear(name, "attn", 0, checkpoint[name].shape, 0) for name in names]
        path = tmp_path / "assay" / "assay.json"
        read, computed = spectral_scores(checkpoint, linears, path), spectral_scores(checkpoint, linears)
        for name in names:
            assert read[name] == pytest.approx(computed[name], rel=1e-9)
        with pytest.raises(BitsmithError, match="up_proj"):
            spectral_scores(
                checkpoint, [Linear("model.layers.1.mlp.up_proj.weight", "ffn", 1, (1, 1), 2)], path
            )
        with pytest.raises(BitsmithError, match="assayed as"):
            spectral_scores(checkpoint, [replace(linears[0], shape=(3, 256))], path)
        path.write_text('{"matrices": 3}')
        with pytest.raises(BitsmithError, match="no assay"):
            spectral_scores(checkpoint, linears, path)


def _linears(sizes: list[int]) -> list[Linear]:
    return [Linear(f"l{n}", "ffn.up", n, (size, 1), size) for n, size in enumerate(sizes)]


@settings(max_examples=60)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40), st.integers(1, 20000), st.integers(0, 99))
def test_a_budget_is_never_exceeded_and_nothing_that_fits_is_left(
    sizes: list[int], budget: int, seed: int
) -> None:
    linears = _linears(sizes)
    if budget < min(sizes):
        with pytest.raises(BitsmithError, match="keeps nothing"):
            choose(linears, None, by="random", amount=Amount(budget_bytes=budget), seed=seed)
        return
    found = choose(linears, None, by="random", amount=Amount(budget_bytes=budget), seed=seed)
    assert found.kept_bytes <= budget
    left = [linear.nbytes for linear in linears if linear.name not in found.names]
    assert all(size > budget - found.kept_bytes for size in left)


def test_a_measured_budget_buys_kld_per_byte() -> None:
    linears = _linears([100, 10, 10, 10])
    nats = {"l0": 0.4, "l1": 0.1, "l2": 0.2, "l3": None}
    assert choose(linears, nats, by="kld", amount=Amount(count=1)).names == ("l0",)
    assert choose(linears, nats, by="kld", amount=Amount(budget_bytes=100)).names == ("l1", "l2", "l3")
    assert choose(linears, nats, by="kld-low", amount=Amount(count=2)).names == ("l1", "l2")


def test_random_is_seeded_and_the_other_end_is_disjoint() -> None:
    linears = _linears([7] * 40)
    scores = {linear.name: float(n * 17 % 40) for n, linear in enumerate(linears)}
    picks = [choose(linears, None, by="random", amount=Amount(count=20), seed=s).names for s in range(5)]
    assert len(set(picks)) == 5
    assert picks[3] == choose(linears, None, by="random", amount=Amount(count=20), seed=3).names
    one = choose(linears, scores, by="alpha-high", amount=Amount(count=20)).names
    other = choose(linears, scores, by=inverse("alpha-high"), amount=Amount(count=20)).names
    assert not set(one) & set(other) and set(one) | set(other) == {linear.name for linear in linears}
    assert min(scores[name] for name in one) > max(scores[name] for name in other)
    with pytest.raises(BitsmithError, match="no other end"):
        inverse("random")


def test_the_published_count_on_the_published_shapes() -> None:
    config = published_config("4B")
    pairs = [(spec, ref) for spec, ref in _specs(config)]
    linears = linears_of(pairs)
    ours = seed_linears()
    assert [(one.name, one.shape, one.layer) for one in ours] == [
        (one.name, one.shape, one.layer) for one in linears
    ]
    assert len(ours) == 248 and default_amount(ours) == Amount(count=129)
    assert sum(one.nbytes for one in ours) == 7_138_181_120
    sizes = seed_sizes()
    assert sizes.parameters == 4_659_865_088 and sizes.original == 9_319_730_176
    ascending = sorted(one.nbytes for one in ours)
    assert (sizes.least_kept, sizes.most_kept) == (sum(ascending[:129]), sum(ascending[-129:]))
    scores = {one.name: float(one.layer) for one in ours}
    last = choose(ours, scores, by="alpha-high")
    assert len(last.names) == 129 and all(int(name.split(".")[3]) >= 15 for name in last.names)
    assert sizes.least_kept < last.kept_bytes < sizes.most_kept
    budget = choose(ours, scores, amount=parse_critical("3.9GB"))
    assert 3.9e9 - 2 * 9216 * 2560 < budget.kept_bytes <= 3.9e9
    assert sizes.nf4_bpw == pytest.approx(4 + 8 / 64 + 32 / 64 / 256, abs=1e-3)  # maps and JSON are the rest


def _specs(config: dict[str, object]) -> Iterator[tuple[object, TensorRef]]:
    from bitsmith.archs import Qwen35

    tensors = synth_tensors(config)
    return ((spec, tensors[spec.name]) for spec in Qwen35(config).specs())


@pytest.mark.parametrize(
    "asked", ["", "x>1", "129bpw", "alpha>", "-3", "alpha>nan.1", "random>1", "3.9 parsecs"]
)
def test_what_is_not_understood_is_refused(asked: str) -> None:
    with pytest.raises(BitsmithError, match=r"critical .* is not understood"):
        parse_critical(asked)


def test_what_critical_understands() -> None:
    assert parse_critical(" 129 ") == Amount(count=129)
    assert parse_critical("3.9GB") == Amount(budget_bytes=3_900_000_000)
    assert parse_critical("1KiB") == Amount(budget_bytes=1024)
    assert parse_critical("alpha>0.8") == Amount(threshold=0.8, by="alpha-high")
    assert parse_critical("kld < 1e-4") == Amount(threshold=1e-4, by="kld-low")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"by": "beta-high"}, "not known"),
        ({"by": "kld"}, "calibration text"),
        ({"by": "alpha-low", "amount": Amount(threshold=1.0, by="alpha-high")}, "leave one"),
        ({"by": "random", "amount": Amount(threshold=1.0, by="random")}, "no threshold"),
        ({"amount": Amount(count=15)}, "cannot be kept of 14"),
        ({"amount": Amount(count=0)}, "cannot be kept"),
        ({"amount": Amount(budget_bytes=100)}, "keeps nothing"),
    ],
)
def test_contradictions_are_refused(planted: Path, options: dict[str, object], said: str) -> None:
    with pytest.raises(BitsmithError, match=said):
        critical_linears(planted, **options)  # type: ignore[arg-type]


def test_measured_kld_finds_the_fragile_linear(planted: Path, text: Path) -> None:
    found = critical_linears(planted, by="kld", amount=Amount(count=1), text=text, ctx_tokens=64, chunks=1)
    assert found.names == (FRAGILE,)
    assert found.scores is not None and all(nats is not None and nats >= 0 for nats in found.scores.values())
    assert found.protocol is not None and "1 chunks, 31 scored tokens" in found.protocol


def test_the_folder_keeps_what_is_critical_and_packs_the_rest(planted: Path, tmp_path: Path) -> None:
    plan = plan_spi(planted, critical="alpha>1.3")
    record = write_spi(planted, tmp_path / "out", critical="alpha>1.3")
    assert record.selection.names == STEEP == plan.selection.names
    assert plan.folder.file_bytes == record.folder.file_bytes
    assert [row.nbytes for row in plan.folder.rows] == [row.nbytes for row in record.folder.tensors]
    schemes = {row.name: row.scheme for row in record.folder.tensors}
    linears = {linear.name for linear in record.selection.linears}
    assert {name for name, scheme in schemes.items() if scheme == "NF4"} == linears - set(STEEP)
    with open_checkpoint(tmp_path / "out") as written, open_checkpoint(planted) as source:
        for name in (*STEEP, "model.embed_tokens.weight", "lm_head.weight"):
            assert np.array_equal(written[name].raw(), source[name].raw())
        error = written[FRAGILE].read() - source[FRAGILE].read()
        assert np.sqrt(np.mean(np.square(error[:, 1:64]))) / np.std(source[FRAGILE].read()[:, 1:64]) > 0.1
    skipped = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert {name.removesuffix(".weight") for name in STEEP} <= set(skipped["llm_int8_skip_modules"])


def test_delta_projections_are_quantized_as_the_recipe_counts_them(
    tiny_qwen3_5: Path,
) -> None:
    plan = plan_spi(tiny_qwen3_5, critical="1")
    schemes = {row.name: row.scheme for row in plan.folder.rows}
    text = [linear.name for linear in plan.selection.linears]
    assert any("in_proj_a" in name for name in text)
    assert [name for name in text if schemes[name] != "NF4"] == list(plan.selection.names)
    assert all(schemes[name] != "NF4" for name in schemes if "visual" in name or "mtp" in name)


class _KilledError(Exception):
    """What a test stops a run with."""


OPTIONS = {"critical": "2", "random_seeds": (0, 1), "ctx_tokens": 32, "chunks": 2, "calibration_chunks": 1}


def test_a_killed_study_goes_on_where_it_was(planted: Path, text: Path, tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if stage == "rows" and done == 4:
            raise _KilledError

    out = tmp_path / "killed"
    with pytest.raises(_KilledError):
        study_spi(planted, text, out, calibration=text, progress=stop, **OPTIONS)  # type: ignore[arg-type]
    assert not (out / RESULT_NAME).exists()
    kept = [json.loads(line) for line in (out / JOURNAL_NAME).read_text().splitlines()[1:]]
    stages: list[str] = []
    resumed = study_spi(
        planted,
        text,
        out,
        calibration=text,
        progress=lambda stage, *_: stages.append(stage),
        **OPTIONS,  # type: ignore[arg-type]
    )
    assert resumed.resumed == len(kept) == 14 + 2 + 3  # spectra, layers, rows: two of four are one choice
    assert "sensitivity" not in stages
    rows = {row.names: row for row in resumed.table("count").rows}
    for value in (entry["value"] for entry in kept if entry["name"].startswith("row ")):
        assert tuple(value["chunk_kld_nats"]) == rows[tuple(value["names"])].chunk_kld_nats
    assert sorted(path.name for path in out.iterdir()) == [RESULT_NAME]
    with pytest.raises(OutputError, match="overwrite"):
        study_spi(planted, text, out)
    _check_study(resumed, out)


@pytest.mark.slow
def test_a_resumed_study_ends_as_one_that_was_never_killed(planted: Path, text: Path, tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if stage == "rows" and done == 6:
            raise _KilledError

    first, second = tmp_path / "first", tmp_path / "second"
    with pytest.raises(_KilledError):
        study_spi(planted, text, first, calibration=text, progress=stop, **OPTIONS)  # type: ignore[arg-type]
    resumed = study_spi(planted, text, first, calibration=text, **OPTIONS)  # type: ignore[arg-type]
    whole = study_spi(planted, text, second, calibration=text, **OPTIONS)  # type: ignore[arg-type]
    assert resumed.resumed > whole.resumed == 0
    assert replace(resumed, resumed=0, seconds=0.0) == replace(whole, seconds=0.0)


def _check_study(study: SpiStudy, out: Path) -> None:
    count, equal = study.table("count"), study.table("bytes")
    expected = [
        "NF4",
        "alpha-high",
        "alpha-low",
        "tail-high",
        "tail-low",
        "kld-high",
        "kld-low",
        "random 0",
        "random 1",
    ]
    for table in (count, equal):
        assert [row.name for row in table.rows] == expected
    assert all(len(row.names) == 2 for row in count.rows[1:])
    limit = count.rows[1].kept_bytes
    assert all(row.kept_bytes <= limit for row in equal.rows) and equal.rows[1] == count.rows[1]
    kld = {row.name: row.measures["mean_kld"].value for row in count.rows}
    assert FRAGILE in count.rows[5].names and kld["kld-high"] < 0.5 * kld["kld-low"]
    fewer = [row.file_bytes for row in sorted(count.rows, key=lambda row: row.kept_bytes)]
    assert all(a <= b for a, b in pairwise(fewer)) and fewer[-1] < study.original.file_bytes
    page = write_spi_page(study, out).read_text()
    assert all(f"| {row.name} |" in page for row in count.rows)
    assert all(claim.claim in page and claim.outcome in page for claim in study.claims)
    print_spi_study(study)
    assert json.loads((out / RESULT_NAME).read_text())["kind"] == "spi study"


def test_thresholds_and_repeated_seeds_make_no_study(planted: Path, text: Path, tmp_path: Path) -> None:
    for options, said in (
        ({"critical": "alpha>1"}, "from rule to rule"),
        ({"random_seeds": (1, 1)}, "twice"),
    ):
        with pytest.raises(BitsmithError, match=said):
            study_spi(planted, text, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def _row(
    name: str, kld: float, ratio: tuple[float, float, float] = (1.0, 0.99, 1.01), wave: float = 0.0
) -> SpiRow:
    chunks = tuple(kld * (1 + 0.1 * (n % 3 - 1)) + wave * (n % 2) for n in range(12))
    measures = {
        "ppl_ref": Measure(10.0, "perplexity", 9.0, 11.0, "i"),
        "ppl_cand": Measure(10.0 * ratio[0], "perplexity", None, None, None),
        "ppl_ratio": Measure(ratio[0], "ratio", ratio[1], ratio[2], "i"),
        "mean_kld": Measure(kld, "nats", kld * 0.9, kld * 1.1, "i"),
    }
    return SpiRow(name, (), 1, 2, 4.0, measures, chunks)


def _study(*rows: SpiRow) -> SpiStudy:
    tables = (SpiTable("count", "2 linears", rows), SpiTable("bytes", "9 bytes", rows))
    linears = tuple(
        LinearRow(
            f"l{n}", "r", n, (4 + n, 4), 1, alpha=float(n), tail=1.0, r90=None, kld_nats=0.01 * n + 0.001
        )
        for n in range(12)
    )
    protocol = Protocol("p", "t", "0" * 64, 1, 512, 12, 12, 1, 2000, 0)
    figures = comparisons(tables), correlations(linears)
    original = Artifact("m", 9, 4, 16.0)
    return with_claims(SpiStudy("m", original, protocol, None, linears, tables, *figures, 0, 1.0))


def _outcome(study: SpiStudy, words: str) -> str:
    return next(claim.outcome for claim in study.claims if words in claim.claim)


RANDOM = [_row(f"random {seed}", 0.10 + 0.01 * seed) for seed in range(5)]
LUCKY = _row("random 5", 0.2, (0.98, 0.97, 0.99))


def test_claims_hold_where_the_rows_bear_them_out() -> None:
    study = _study(
        _row("NF4", 0.3, (1.04, 1.03, 1.05)),
        _row("alpha-high", 0.01, (0.86, 0.85, 0.87)),
        _row("alpha-low", 0.2),
        _row("kld-high", 0.01),
        *RANDOM,
    )
    for words in (
        "lower perplexity",
        "by 13.4%",
        "4.4% worse",
        "than random",
        "critical end",
        "measured KLD",
        "suffer",
    ):
        assert _outcome(study, words) == "HELD", words


def test_claims_fail_where_the_rows_say_otherwise() -> None:
    study = _study(
        _row("NF4", 0.3, (1.2, 1.15, 1.25)),
        _row("alpha-high", 0.2, (1.04, 1.02, 1.06)),
        _row("alpha-low", 0.12, (1.03, 1.01, 1.05)),
        _row("kld-high", 0.01),
        *RANDOM,
    )
    for words in (
        "lower perplexity",
        "by 13.4%",
        "4.4% worse",
        "than random",
        "critical end",
        "measured KLD",
    ):
        assert _outcome(study, words) == "NOT HELD", words
    found = {(one.rule, one.against): one for one in study.comparisons if one.equal == "bytes"}
    assert found["alpha-low", "random"].rank == 3 and found["alpha-low", "random"].of == 6
    assert found["alpha-high", "inverse"].better is False and ("alpha-low", "inverse") not in found


def test_claims_stay_open_where_nothing_was_measured_or_the_interval_is_wide() -> None:
    bare = _study(_row("NF4", 0.3), _row("alpha-high", 0.2), _row("alpha-low", 0.2, wave=0.0))
    assert _outcome(bare, "lower perplexity") == "NOT TESTED"  # the interval is on both sides of 1
    for words in ("than random", "critical end", "measured KLD", "tokens/s", "7.79"):
        assert _outcome(bare, words) == "NOT TESTED", words
    lucky = _study(_row("NF4", 0.3), _row("alpha-high", 0.2), *RANDOM, LUCKY)
    assert "of 12 random choices 2 are lower too, 2 with the whole" in lucky.claims[0].found
    first = _study(_row("NF4", 0.3), _row("alpha-high", 0.099), *RANDOM)
    assert _outcome(first, "than random") == "NOT TESTED"  # the best of six, yet within what chance gives
    assert {_outcome(bare, words) for words in ("90%", "16.00 GB")} == {"NOT HELD"}
    assert {_outcome(bare, words) for words in ("129 layers", "6.40 GB", "calibration")} == {"HELD"}


def test_random_choices_seldom_beat_their_own_interval() -> None:
    rng, found = np.random.default_rng(0), []
    for _ in range(400):
        draws = np.exp(rng.normal(0, 0.3, 6)) * 0.1
        rows = [
            _row("alpha-high", float(draws[0])),
            *(_row(f"random {n}", float(k)) for n, k in enumerate(draws[1:])),
        ]
        one = next(c for c in comparisons([SpiTable("count", "", tuple(rows))]) if c.against == "random")
        found.append(one.better is not None)
    assert np.mean(found) == pytest.approx(1 - RANDOM_LEVEL, abs=0.012)
