"""Claims of the seeds: the registry is whole, outcomes follow what is planted, what lacks is not tested."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bitsmith.archs.published import published_config
from bitsmith.errors import BitsmithError, OutputError
from bitsmith.formats import format_named
from bitsmith.lab.models import DEMO_MODEL
from bitsmith.lab.synth import synth_tensors
from bitsmith.report.claims_table import (
    claim_rows,
    claims_markdown,
    figure_text,
    print_claims,
    print_cost,
    write_claims_page,
)
from bitsmith.run.claim_evidence import ArtifactRow, Setting, TrainPoint
from bitsmith.run.evaluate import Measure, Protocol
from bitsmith.run.matrix_claims import _bracket
from bitsmith.run.seed_claims import (
    SEED_CLAIMS,
    ClaimsStudy,
    SeedClaim,
    above,
    chosen_claims,
    exact,
    outcome_of,
)
from bitsmith.run.study_claims import JOURNAL_NAME, RESULT_NAME, claims_cost, study_claims
from bitsmith.run.text_claims import (
    GainsAtLowBits,
    Int4Optimal,
    SbgqAddsNothing,
    TrunkShare,
    TwoTier,
    larger_gain,
)
from bitsmith.run.tiers import tier_row, tier_sizes
from bitsmith.store.safetensors_writer import TensorData, write_safetensors

Float32 = NDArray[np.float32]

WEIGHTS = (
    "flat-spectra",
    "rank-for-10-percent",
    "svd-worse-than-zeros",
    "tt-gate",
    "int4-ceiling",
    "embedding-wall",
)
FORWARD = (
    "int4-optimal",
    "spi-beats-fp16",
    "spi-13-percent",
    "sbgq-adds-nothing",
    "gains-at-2-to-3-bits",
    "int2-incoherent",
    "1-bit-incoherent",
    "two-tier-beats-svd",
    "trunk-variance",
)
TEXT = " ".join(f"def f{n}(x): return x * {n} + f{n - 1}(x - {n % 7})\n" for n in range(400))


def _low_rank(values: Float32, rank: int) -> Float32:
    left, sigma, right = np.linalg.svd(values.astype(np.float64), full_matrices=False)
    return ((left[:, :rank] * sigma[:rank]) @ right[:rank]).astype(np.float32)


def _model(out: Path, *, planted: bool, vocab: int = 256) -> Path:
    """Write a dense Qwen3 of random weights; `planted` gives every matrix a rank of a sixteenth."""
    config = published_config("qwen3-tiny", layers=1) | {"vocab_size": vocab, "intermediate_size": 768}
    data = []
    for name, ref in synth_tensors(config, 5).items():
        values = np.asarray(ref.read(), dtype=np.float32)
        if planted and values.ndim == 2:
            values = _low_rank(values, min(values.shape) // 16)
        stored = format_named("F32").encode(np.ascontiguousarray(values).reshape(1, -1))
        data.append(TensorData(name, "F32", ref.shape, iter([stored])))
    files = {name: (DEMO_MODEL / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    write_safetensors(out, data, config, files=files)
    return out


@pytest.fixture(scope="module")
def random(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _model(tmp_path_factory.mktemp("claims") / "random", planted=False)


@pytest.fixture(scope="module")
def readable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `random`, with a vocabulary for its tokenizer."""
    return _model(tmp_path_factory.mktemp("claims") / "readable", planted=False, vocab=4352)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("claims") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def study(random: Path, tmp_path_factory: pytest.TempPathFactory) -> ClaimsStudy:
    """Random weights, no text: what costs least."""
    return study_claims(random, tmp_path_factory.mktemp("claims") / "out")


def _outcomes(study: ClaimsStudy) -> dict[str, str]:
    return {one.name: one.outcome for one in study.claims}


def test_every_claim_is_registered_and_says_what_it_is() -> None:
    assert set(SEED_CLAIMS) == {*WEIGHTS, *FORWARD}
    seeds = [one.seed[:2] for one in chosen_claims(None)]
    assert seeds == sorted(seeds) and len(seeds) == len(SEED_CLAIMS)
    for one in SEED_CLAIMS.values():
        assert "“" in one.words and one.seed[:2] in {"S0", "S1", "S2", "S3", "S4"}
        assert "HELD" in one.rule and one.test and one.needs


def test_two_claims_of_one_name_are_refused() -> None:
    with pytest.raises(TypeError, match="flat-spectra"):
        type("Again", (SeedClaim,), {"name": "flat-spectra"})


def test_random_weights_are_flat_and_without_a_text_the_rest_is_not_tested(study: ClaimsStudy) -> None:
    found = _outcomes(study)
    assert found["flat-spectra"] == found["rank-for-10-percent"] == "HELD"
    assert found["int4-ceiling"] == "HELD" and found["svd-worse-than-zeros"] == "NOT HELD"
    assert {found[name] for name in FORWARD} == {"NOT TESTED"}
    for one in study.claims:
        assert one.found and (one.name not in FORWARD or "no text" in one.found or "neither" in one.found)
    flat = next(one for one in study.claims if one.name == "flat-spectra").measure
    assert flat is not None and flat.low is not None and flat.high is not None
    assert flat.low < flat.value < flat.high < 0.5
    assert study.count("NOT TESTED") >= len(FORWARD) and study.resumed == 0


def test_planted_low_rank_overturns_the_claims(tmp_path: Path) -> None:
    model = _model(tmp_path / "planted", planted=True)
    only = ["flat-spectra", "rank-for-10-percent", "int4-ceiling"]
    study = study_claims(model, tmp_path / "out", only=only)
    assert _outcomes(study) == dict.fromkeys(only, "NOT HELD")
    share = study.claims[0].measure
    assert share is not None and share.value == pytest.approx(1, abs=1e-6)


def test_a_killed_study_goes_on(random: Path, study: ClaimsStudy, tmp_path: Path) -> None:
    def kill(stage: str, done: int, total: int) -> None:
        if stage == "claims" and done == 3:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        study_claims(random, out, progress=kill)
    assert (out / JOURNAL_NAME).exists() and not (out / RESULT_NAME).exists()

    def seen(stage: str, done: int, total: int) -> None:
        assert stage != "assay"  # it is in the journal

    again = study_claims(random, out, progress=seen)
    assert again.resumed == 1 and not (out / JOURNAL_NAME).exists()
    facts = [[replace(one, seconds=0.0) for one in each.claims] for each in (study, again)]
    assert facts[0] == facts[1]
    with pytest.raises(OutputError, match="overwrite"):
        study_claims(random, out)


def test_states_are_split_and_judged_in_one_forward(readable: Path, text: Path, tmp_path: Path) -> None:
    only = ["two-tier-beats-svd", "trunk-variance"]
    study = study_claims(readable, tmp_path / "out", text=text, only=only, ctx_tokens=64, chunks=4)
    two, trunk = study.claims
    assert two.outcome == "NOT HELD" and two.measure is not None and abs(two.measure.value) < 1e-6
    assert trunk.measure is not None and 0 < trunk.measure.value < 1
    assert "every other chunk" in trunk.protocol
    assert json.loads((tmp_path / "out" / RESULT_NAME).read_text())["claims"][0]["outcome"] == "NOT HELD"
    one = study_claims(readable, tmp_path / "one", text=text, only=only[:1], ctx_tokens=64, chunks=1)
    assert one.claims[0].outcome == "NOT TESTED" and "one chunk" in one.claims[0].found


def test_bad_requests_are_refused(random: Path, tmp_path: Path) -> None:
    with pytest.raises(BitsmithError, match="unknown claim 'flat'; known: flat-spectra"):
        study_claims(random, tmp_path / "out", only=["flat"])
    with pytest.raises(BitsmithError, match="0 chunks"):
        study_claims(random, tmp_path / "out", chunks=0)
    with pytest.raises(BitsmithError, match="cannot be read"):
        study_claims(random, tmp_path / "out", text=tmp_path / "none.txt")
    assert not (tmp_path / "out" / RESULT_NAME).exists()


def test_the_cost_is_what_is_read(random: Path, text: Path) -> None:
    weights = claims_cost(random)
    assert [one.piece for one in weights] == ["assay", "trains"]
    some = claims_cost(random, only=["sbgq-adds-nothing"], text=text, chunks=2)
    assert [one.piece for one in some] == ["SBGQ 4", "plain 4", "original"]
    more = claims_cost(random, only=["sbgq-adds-nothing"], text=text, chunks=4)
    assert more[0].multiply_adds == 2 * some[0].multiply_adds > 0
    everything = claims_cost(random, text=text)
    assert {name for one in everything for name in one.claims} == set(SEED_CLAIMS)


def test_tiers_by_hand() -> None:
    rng = np.random.default_rng(0)
    scales = np.linspace(3, 0.1, 20)
    fit, held = ((rng.standard_normal((3, 50, 20)) * scales).astype(np.float32) for _ in range(2))
    row = tier_row(0, fit, held)
    assert (row.trunk, row.slots) == tier_sizes(20) == (4, 4)
    assert row.kept_two_tier == pytest.approx(row.kept_svd, abs=1e-9)
    assert all(a < b for a, b in zip(row.kept_folded, row.kept_svd, strict=True))
    assert all(a < b for a, b in zip(row.kept_trunk, row.kept_folded, strict=True))
    energy = np.square(held.astype(np.float64)).sum(axis=(1, 2))
    assert all(0 < share < 1 for share in row.kept_svd) and len(row.kept_svd) == len(energy)
    few = tier_row(0, fit[:1, :6], held)  # fewer tokens than the width: only directions that were seen
    assert few.kept_two_tier == pytest.approx(few.kept_svd, abs=1e-9)
    with pytest.raises(BitsmithError, match="no residual"):
        tier_row(0, fit[..., :3], held[..., :3])


def test_a_fold_that_keeps_more_would_hold() -> None:
    rng = np.random.default_rng(1)
    fit, held = (rng.standard_normal((4, 40, 20)).astype(np.float32) for _ in range(2))
    row = tier_row(0, fit, held)
    better = replace(row, kept_folded=tuple(share + 0.1 for share in row.kept_svd))
    same = replace(row, kept_folded=row.kept_two_tier)
    assert TwoTier().judge(_Given(tiers=(better,))).outcome == "HELD"
    assert TwoTier().judge(_Given(tiers=(same,))).outcome == "NOT HELD"
    inside = replace(row, kept_trunk=(0.86, 0.87, 0.88, 0.87))
    assert TrunkShare().judge(_Given(tiers=(inside,))).outcome == "HELD"
    assert TrunkShare().judge(_Given(tiers=(row,))).outcome == "NOT HELD"


class _Given:
    """Evidence that a test writes down: rows by name, the rest as given."""

    has_statistics = True
    protocol = Protocol("by hand", "text", "0" * 64, 99, 8, 4, 9, 12, 500, 0)
    setting = Setting(Path("m"), Path("t"), None, None, 8, 4, 0)

    def __init__(self, **facts: Any) -> None:
        self.__dict__.update(facts)

    def row_int4(self) -> ArtifactRow:
        return self.rows["int4"]

    def below_int4(self, name: str) -> ArtifactRow:
        return self.rows[name]

    def sbgq(self, bits: int, *, transforms: bool) -> ArtifactRow:
        return self.rows[(bits, transforms)]


def _row(klds: tuple[float, ...], bpw: float = 4.0) -> ArtifactRow:
    measure = Measure(sum(klds) / len(klds), "nats", None, None, None)
    return ArtifactRow("row", 1, bpw, {"mean_kld": measure, "ppl_ratio": measure}, klds, klds)


BASE = (0.10, 0.12, 0.08, 0.11)


def _times(factor: float, spread: float = 0.01) -> tuple[float, ...]:
    return tuple(kld * (factor + spread * (-1) ** n) for n, kld in enumerate(BASE))


def _int4(q3: float, q2: float, **facts: Any) -> str:
    rows = {"int4": _row(BASE), "Q3_K": _row(_times(q3), 3.4), "Q2_K": _row(_times(q2), 2.6)}
    return Int4Optimal().judge(_Given(rows=rows, **facts)).outcome


def test_a_smaller_type_that_is_closer_breaks_the_ceiling() -> None:
    assert _int4(0.8, 3.0) == "NOT HELD"
    assert _int4(1.5, 3.0) == "HELD"
    assert _int4(1.0, 3.0) == "NOT TESTED"
    assert _int4(1.5, 3.0, has_statistics=False) == "NOT TESTED"
    assert _int4(0.8, 3.0, has_statistics=False) == "NOT HELD"


def _sbgq(four: float, three: float, two: float) -> tuple[str, str]:
    rows = {(bits, False): _row(BASE) for bits in (4, 3, 2)}
    rows |= {(bits, True): _row(_times(f)) for bits, f in ((4, four), (3, three), (2, two))}
    given = _Given(rows=rows)
    return SbgqAddsNothing().judge(given).outcome, GainsAtLowBits().judge(given).outcome


def test_gains_of_transforms_by_hand() -> None:
    assert _sbgq(1.0, 1.0, 0.8) == ("HELD", "HELD")
    assert _sbgq(0.8, 1.1, 1.1) == ("NOT HELD", "NOT HELD")
    assert _sbgq(0.8, 0.9, 0.9) == ("NOT HELD", "NOT HELD")
    assert _sbgq(1.1, 1.0, 1.0) == ("HELD", "NOT TESTED")  # whether 1.0 is a gain is open


def test_intervals_decide() -> None:
    wide = Measure(0.5, "", 0.2, 0.8, "95 %")
    assert (above(wide, 0.1), above(wide, 0.9), above(wide, 0.5)) == (True, False, None)
    assert above(Measure(0.5, "", None, None, None), 0.1) is None
    assert [outcome_of(one) for one in (True, False, None)] == ["HELD", "NOT HELD", "NOT TESTED"]
    assert larger_gain(exact(0.9, ""), exact(-0.1, "")) is True
    assert larger_gain(exact(0.9, ""), exact(0.1, "")) is False
    assert larger_gain(wide, Measure(0.0, "", -0.1, 0.1, "95 %")) is None


def test_the_gate_is_bracketed() -> None:
    points = [
        TrainPoint("e", 9, (1, r, r, 1), ratio, cosine)
        for r, ratio, cosine in ((1, 9.0, 0.3), (4, 1.5, 0.93), (6, 0.9, 0.96), (8, 0.5, 1.0))
    ]
    found = _bracket(points)
    assert (found.value, found.low, found.high) == (0.9, 0.9, 1.5)
    assert _bracket(points[:2]).value == 0


def test_table_and_page_show_every_claim(
    study: ClaimsStudy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = replace(study.claims[0], found="<script>alert(1)</script>[bold]|x")
    shown = replace(study, claims=(hostile, *study.claims[1:]))
    print_claims(shown)
    print_cost(shown.cost)
    out = capsys.readouterr().out
    assert "9 NOT TESTED" in out and "in all" in out
    page = write_claims_page(shown, tmp_path).read_text()
    assert "<script>" not in page and all(f"## {one}" in page.replace("\\", "") for one in SEED_CLAIMS)
    assert claims_markdown(shown) == page
    assert len(claim_rows(shown)[1]) == len(SEED_CLAIMS)
    assert figure_text(None) == "unmeasured" and "(exact)" in figure_text(exact(1.0, "x"))
    assert figure_text(Measure(1.0, "x", None, None, None)) == "1 (interval unmeasured) x"


@pytest.mark.slow
def test_everything_on_a_small_model(readable: Path, text: Path, tmp_path: Path) -> None:
    study = study_claims(
        readable, tmp_path / "out", text=text, calibration=text, ctx_tokens=64, chunks=4, only=FORWARD
    )
    found = {one.name: one for one in study.claims}
    assert found["spi-13-percent"].outcome == "NOT HELD"
    for name in ("int4-optimal", "spi-beats-fp16", "two-tier-beats-svd", "trunk-variance"):
        assert found[name].measure is not None, found[name].found
