"""Claims of the seeds: the registry is whole, outcomes follow what is planted, what lacks is not tested."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import TypeAdapter

from bitsmith.archs.published import published_config
from bitsmith.errors import BitsmithError, OutputError
from bitsmith.formats import format_named
from bitsmith.lab.models import DEMO_MODEL
from bitsmith.lab.synth import synth_tensors
from bitsmith.numerics.tensor_train import ArrayRows
from bitsmith.report.claims_table import (
    claim_rows,
    claims_markdown,
    figure_text,
    print_claims,
    print_cost,
    write_claims_page,
)
from bitsmith.run.assay_result import Assay
from bitsmith.run.claim_evidence import ArtifactRow, Setting
from bitsmith.run.evaluate import Measure, Protocol
from bitsmith.run.format_claims import with_claims
from bitsmith.run.format_rows import ClaimCheck, FormatsStudy, Outcome
from bitsmith.run.matrix_claims import EmbeddingWall, TrainGate, WorseThanZeros, bracket
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
    Int2Incoherent,
    Int4Ceiling,
    OneBitIncoherent,
    SbgqAddsNothing,
    SpiBeatsOriginal,
    SpiGain,
    TrunkShare,
    TwoTier,
    larger_gain,
    lowest_of,
)
from bitsmith.run.tiers import tier_row, tier_sizes
from bitsmith.run.train_search import TrainPoint, search_trains
from bitsmith.run.whole_factors import WholeFactors, whole_factors
from bitsmith.store.safetensors_writer import TensorData, write_safetensors

Float32 = NDArray[np.float32]

WEIGHTS = (
    "flat-spectra",
    "rank-for-10-percent",
    "svd-worse-than-zeros",
    "tt-gate",
    "low-rank-cannot-beat-int4",
    "embedding-wall",
)
FORWARD = (
    "int4-ceiling",
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
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `study` goes."""
    return tmp_path_factory.mktemp("claims") / "out"


@pytest.fixture(scope="module")
def study(random: Path, folder: Path) -> ClaimsStudy:
    """Random weights, no text: what costs least."""
    return study_claims(random, folder)


@pytest.fixture(scope="module")
def found_assay(study: ClaimsStudy, folder: Path) -> Assay:
    found: Assay = TypeAdapter(Assay).validate_json(
        (folder / "evidence" / "assay" / "assay.json").read_text()
    )
    return found


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
    assert found["low-rank-cannot-beat-int4"] == "HELD" and found["svd-worse-than-zeros"] == "NOT HELD"
    assert {found[name] for name in FORWARD} == {"NOT TESTED"}
    for one in study.claims:
        assert one.found and (one.name not in FORWARD or "no text" in one.found or "neither" in one.found)
    flat = next(one for one in study.claims if one.name == "flat-spectra").measure
    assert flat is not None and flat.low is not None and flat.high is not None
    assert flat.low < flat.value < flat.high < 0.5
    assert study.count("NOT TESTED") >= len(FORWARD) and study.resumed == 0


def test_planted_low_rank_overturns_the_claims(tmp_path: Path) -> None:
    model = _model(tmp_path / "planted", planted=True)
    only = ["flat-spectra", "rank-for-10-percent", "low-rank-cannot-beat-int4"]
    study = study_claims(model, tmp_path / "out", only=only)
    assert _outcomes(study) == dict.fromkeys(only, "NOT HELD")
    share = study.claims[0].measure
    assert share is not None and share.value == pytest.approx(1, abs=1e-6)


_KILLED = """
import os, signal, sys
from pathlib import Path
from bitsmith.run.study_claims import study_claims

def kill(stage, done, total):
    if stage == sys.argv[3]:
        os.kill(os.getpid(), signal.SIGKILL)

study_claims(Path(sys.argv[1]), Path(sys.argv[2]), progress=kill)
"""


def _unknown(out: Path) -> Path:
    """Write three random matrices of a model that nobody knows."""
    rng = np.random.default_rng(2)
    names = ("mlp.gate_proj", "mlp.up_proj", "self_attn.q_proj")
    data = []
    for name in names:
        row = rng.standard_normal((1, 96 * 64), np.float32)
        stored = iter([format_named("F32").encode(row)])
        data.append(TensorData(f"decoder.layers.0.{name}.weight", "F32", (96, 64), stored))
    write_safetensors(out, data, {"model_type": "nobody-knows"}, files={})
    return out


def test_a_killed_study_goes_on(tmp_path: Path) -> None:
    model, out = _unknown(tmp_path / "model"), tmp_path / "out"
    command = [sys.executable, "-c", _KILLED, str(model), str(out), "factors"]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert (out / JOURNAL_NAME).exists() and not (out / RESULT_NAME).exists()

    def seen(stage: str, done: int, total: int) -> None:
        assert stage != "assay"  # it is in the journal

    again = study_claims(model, out, progress=seen)
    assert again.resumed == 1 and not (out / JOURNAL_NAME).exists()
    whole = study_claims(model, tmp_path / "whole")
    assert whole.claims[0].measure is not None
    facts = [[replace(one, seconds=0.0) for one in each.claims] for each in (whole, again)]
    assert facts[0] == facts[1]
    with pytest.raises(OutputError, match="overwrite"):
        study_claims(model, out)


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
    assert not (tmp_path / "out").exists()


def test_texts_that_cannot_be_cut_are_refused_first(readable: Path, text: Path, tmp_path: Path) -> None:
    short, bad = tmp_path / "short.txt", tmp_path / "bad.txt"
    short.write_text("def f(x):")
    bad.write_bytes(b"\xff\xfe")
    for options in ({"text": short}, {"text": text, "calibration": short}):
        with pytest.raises(BitsmithError, match=r"short\.txt: has .* tokens, one chunk needs 512"):
            study_claims(readable, tmp_path / "out", **options)
    with pytest.raises(BitsmithError, match="not UTF-8"):
        study_claims(readable, tmp_path / "out", text=bad)
    assert not (tmp_path / "out").exists()


def test_an_unknown_model_has_its_matrices_tested(text: Path, tmp_path: Path) -> None:
    only = ["flat-spectra", "svd-worse-than-zeros", "tt-gate", "sbgq-adds-nothing", "trunk-variance"]
    study = study_claims(_unknown(tmp_path / "model"), tmp_path / "out", text=text, only=only)
    found = {one.name: one for one in study.claims}
    assert found["flat-spectra"].outcome == "HELD" and found["svd-worse-than-zeros"].outcome == "NOT HELD"
    assert "no embedding or head" in found["tt-gate"].found
    for name in only[2:]:
        assert found[name].outcome == "NOT TESTED"
    assert "nobody-knows" in found["trunk-variance"].found


def test_the_cost_is_what_is_read(random: Path, text: Path) -> None:
    weights = claims_cost(random)
    assert [one.piece for one in weights] == ["assay", "factors", "trains"]
    some = claims_cost(random, only=["sbgq-adds-nothing"], text=text, chunks=2)
    assert [one.piece for one in some] == ["SBGQ 4", "plain 4", "original"]
    learned = claims_cost(random, only=["sbgq-adds-nothing"], text=text, calibration=text, chunks=2)
    assert [one.piece for one in learned] == ["statistics", "SBGQ 4", "plain 4", "original"]
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


def _row(klds: tuple[float, ...], bpw: float = 4.0, nll: tuple[float, ...] | None = None) -> ArtifactRow:
    measure = Measure(sum(klds) / len(klds), "nats", None, None, None)
    return ArtifactRow("row", 1, bpw, {"mean_kld": measure, "ppl_ratio": measure}, klds, nll or klds)


BASE = (0.10, 0.12, 0.08, 0.11)


def _times(factor: float, spread: float = 0.01) -> tuple[float, ...]:
    return tuple(kld * (factor + spread * (-1) ** n) for n, kld in enumerate(BASE))


def _int4(q3: float, q2: float, **facts: Any) -> str:
    rows = {"int4": _row(BASE), "Q3_K": _row(_times(q3), 3.4), "Q2_K": _row(_times(q2), 2.6)}
    return Int4Ceiling().judge(_Given(rows=rows, **facts)).outcome


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
    rows = {(4, True): _row(_times(0.8), nll=(4.0,) * 4), (4, False): _row(BASE, nll=(3.0,) * 4)}
    contrary = SbgqAddsNothing().judge(_Given(rows=rows))
    assert contrary.outcome == "NOT TESTED" and "contrary" in contrary.found


def test_intervals_decide() -> None:
    wide = Measure(0.5, "", 0.2, 0.8, "95 %")
    assert (above(wide, 0.1), above(wide, 0.9), above(wide, 0.5)) == (True, False, None)
    assert above(Measure(0.5, "", None, None, None), 0.1) is None
    assert [outcome_of(one) for one in (True, False, None)] == ["HELD", "NOT HELD", "NOT TESTED"]
    assert larger_gain(exact(0.9, ""), exact(-0.1, "")) is True
    assert larger_gain(exact(0.9, ""), exact(0.1, "")) is False
    assert larger_gain(wide, Measure(0.0, "", -0.1, 0.1, "95 %")) is None


def _with_outlier(rng: np.random.Generator) -> Float32:
    values = rng.standard_normal((384, 128), np.float32)
    values[0, 0] = 50.0
    return values


def test_one_outlier_makes_factors_worse_than_zeros(found_assay: Assay) -> None:
    rng = np.random.default_rng(0)
    plain = whole_factors("m", ArrayRows(rng.standard_normal((384, 128), np.float32)))
    outlier = whole_factors("m", ArrayRows(_with_outlier(rng)))
    assert plain is not None and outlier is not None and plain.rank == outlier.rank == 16
    assert plain.error < 1 < outlier.error
    assert whole_factors("m", ArrayRows(np.zeros((8, 8), np.float32))) is None

    def judged(one: WholeFactors) -> str:
        return WorseThanZeros().judge(_Given(assay=found_assay, whole_factors=(one,))).outcome

    assert (judged(plain), judged(outlier)) == ("NOT HELD", "HELD")


def _trains(rng: np.random.Generator, *, planted: bool) -> Float32:
    """Return random values (512, 64), or those of a train of small rank in the modes that are used."""
    if not planted:
        return rng.standard_normal((512, 64), np.float32)
    parts = [rng.standard_normal((8, 4)) for _ in range(3)]
    return np.kron(np.kron(parts[0], parts[1]), parts[2]).astype(np.float32)


def test_a_matrix_that_is_a_train_passes_the_gate(found_assay: Assay) -> None:
    rng, row = np.random.default_rng(0), next(one for one in found_assay.matrices if one.tensor_train)
    outcomes = []
    for planted in (False, True):
        trains = search_trains(row.name, ArrayRows(_trains(rng, planted=planted)), 3.9)
        judged = TrainGate().judge(_Given(assay=found_assay, trains=trains))
        outcomes.append((judged.outcome, judged.measure.value > 2 if judged.measure else None))
    assert outcomes == [("HELD", False), ("NOT HELD", True)]


def test_the_wall_stands_where_shares_and_codings_put_it(found_assay: Assay) -> None:
    def judged(share: float) -> str:
        rows = [replace(row, share=share if row.key == "C4" else 0.0) for row in found_assay.components]
        assay = replace(found_assay, components=tuple(rows))
        return EmbeddingWall().judge(_Given(assay=assay, trains=())).outcome

    # 79× is needed; 5.1× is, which Q2_K reaches; nothing helps
    assert [judged(share) for share in (0.21, 0.9, 0.1)] == ["HELD", "NOT HELD", "NOT HELD"]


class _Claims:
    """A study that only says how its claims came out."""

    tables = ()

    def __init__(self, *claims: ClaimCheck) -> None:
        self.claims = claims


def test_outcomes_of_other_studies_are_taken_over() -> None:
    def spi(low: float, high: float, outcome: Outcome) -> list[str]:
        measure = Measure((low + high) / 2, "ratio", low, high, "95 %")
        names = ("a hybrid has a lower perplexity than …", "SPI's hybrid beats …")
        given = _Given(spi=_Claims(*(ClaimCheck(name, "published", outcome, "", measure) for name in names)))
        return [claim.judge(given).outcome for claim in (SpiBeatsOriginal(), SpiGain())]

    assert spi(0.80, 0.85, "HELD") == ["HELD", "HELD"]
    assert spi(0.80, 0.95, "HELD") == ["HELD", "NOT TESTED"]
    assert spi(0.90, 1.10, "NOT TESTED") == ["NOT TESTED", "NOT HELD"]
    assert spi(1.01, 1.10, "NOT HELD") == ["NOT HELD", "NOT HELD"]
    eight = lowest_of(8, Measure(0.9979, "ratio", 0.9959, 0.9997, "95 %"))
    assert eight.low == pytest.approx(0.99512, abs=1e-4) and eight.high == pytest.approx(1.00041, abs=1e-4)
    assert lowest_of(1, eight) is eight
    nothing = with_claims(_no_formats())
    for claim in (Int2Incoherent(), OneBitIncoherent()):
        assert claim.judge(_Given(formats=nothing)).outcome == "NOT TESTED"
        for outcome in ("HELD", "NOT HELD"):
            turned = replace(nothing, claims=tuple(replace(one, outcome=outcome) for one in nothing.claims))
            assert claim.judge(_Given(formats=turned)).outcome == outcome


def _no_formats() -> FormatsStudy:
    return FormatsStudy(
        model="m",
        rows=(),
        protocol=_Given.protocol,
        prompts=(),
        prompt_tokens=0,
        written_tokens=0,
        statistics=None,
        resumed=0,
        seconds=0.0,
    )


def test_a_shift_between_texts_can_make_two_tiers_better() -> None:
    rng = np.random.default_rng(0)
    scales = np.array([3.0] * 4 + [1.0] * 4 + [0.1] * 12)
    fit = (rng.standard_normal((4, 50, 20)) * scales).astype(np.float32)
    held = (rng.standard_normal((4, 50, 20)) * np.array([0.1] * 8 + [1.0] * 12)).astype(np.float32)
    assert TwoTier().judge(_Given(tiers=(tier_row(0, fit, held),))).outcome == "HELD"
    assert TwoTier().judge(_Given(tiers=(tier_row(0, fit, fit),))).outcome == "NOT HELD"


def test_the_gate_is_bracketed() -> None:
    points = [
        TrainPoint("e", 9, (1, r, r, 1), ratio, cosine)
        for r, ratio, cosine in ((1, 9.0, 0.3), (4, 1.5, 0.93), (6, 0.9, 0.96), (8, 0.5, 1.0))
    ]
    found = bracket(points)
    assert (found.value, found.low, found.high) == (0.9, 0.9, 1.5)
    assert bracket(points, 0.5).value == 1.8 and bracket(points[:2]).value == 0


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
    for name in ("int4-ceiling", "spi-beats-fp16", "two-tier-beats-svd", "trunk-variance"):
        assert found[name].measure is not None, found[name].found
