"""`study formats` on the bundled model: rows, what is unmeasured, kill and resume, claims, escaped texts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bitsmith.errors import BitsmithError, OutputError, UnsupportedError
from bitsmith.lab.corpus import held_out_text
from bitsmith.report.formats_table import formats_markdown, print_formats, write_formats_markdown
from bitsmith.run.cellm import write_cellm
from bitsmith.run.coherence import Coherence, Passage, Writing
from bitsmith.run.evaluate import evaluate
from bitsmith.run.evaluation import Measure, Protocol
from bitsmith.run.execute import compress
from bitsmith.run.format_claims import with_claims
from bitsmith.run.format_rows import FormatRow, FormatsStudy
from bitsmith.run.studied_formats import STUDIED
from bitsmith.run.study_formats import RESULT_NAME, study_formats

FORMATS = ("f16", "int2", "int2-feedback", "f16")
OPTIONS: Mapping[str, Any] = {
    "formats": FORMATS,
    "prompts": ["def __init__(self", "import"],
    "written_tokens": 5,
    "ctx_tokens": 32,
    "chunks": 3,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "held_out.txt"
    path.write_text(held_out_text(2_000), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study") / "whole"


@pytest.fixture(scope="module")
def study(demo_model: Path, text: Path, folder: Path) -> FormatsStudy:
    return study_formats(demo_model, text, folder, **OPTIONS)


def test_rows_are_what_evaluate_measures_on_the_same_file(
    study: FormatsStudy, demo_model: Path, text: Path, tmp_path: Path
) -> None:
    assert [row.name for row in study.rows] == ["original", "f16", "int2", "int2-feedback"]
    path = write_cellm(demo_model, tmp_path / "x.cellm", "i2", like_seed=True).out
    expected = evaluate(demo_model, path, text, 32, 3)
    row, original, half = study.row("int2"), study.row("original"), study.row("f16")
    assert row is not None and original is not None and half is not None
    assert row.measures == expected.measures
    assert study.protocol == expected.protocol
    assert row.file_bytes == path.stat().st_size
    assert row.weights == original.weights
    assert row.bpw == pytest.approx(8 * path.stat().st_size / (row.weights or 0))
    assert study.ratio(row, "original") == pytest.approx((original.file_bytes or 0) / path.stat().st_size)
    assert study.ratio(row, "f16") == pytest.approx((half.file_bytes or 0) / path.stat().st_size)
    assert sum(row.chunk_kld_nats) / 3 == pytest.approx(row.measures["mean_kld"].value)
    assert row.float_bytes == {"embedding and head": 2 * 2 * 4096 * 256}
    assert original.measures["max_kld"].value == 0
    assert row.coherence is not None and len(row.coherence.sampled.passages) == 2
    assert row.coherence.sampled.nll_over is not None


def test_rows_without_statistics_say_so(study: FormatsStudy) -> None:
    row = study.row("int2-feedback")
    assert row is not None
    assert (row.file_bytes, row.bpw, row.coherence) == (None, None, None)
    assert row.unmeasured == "no statistics of activations were given"
    claim = next(one for one in study.claims if one.claim.startswith("int2: error feedback"))
    assert (claim.outcome, claim.found) == ("NOT TESTED", row.unmeasured)


def test_only_the_result_stays(study: FormatsStudy, folder: Path, text: Path, demo_model: Path) -> None:
    assert [path.name for path in folder.iterdir()] == [RESULT_NAME]
    record = json.loads((folder / RESULT_NAME).read_text())
    assert record == json.loads(json.dumps(study.to_json(), allow_nan=False))
    assert record["rows"][2]["ratio_to_f16"] == study.ratio(study.rows[2], "f16")
    assert write_formats_markdown(study, folder).read_text() == formats_markdown(study)
    with pytest.raises(OutputError, match="exists"):
        study_formats(demo_model, text, folder, **OPTIONS)


@pytest.mark.slow  # test_study_claims and test_spi kill theirs by default
def test_a_killed_study_goes_on(study: FormatsStudy, demo_model: Path, text: Path, tmp_path: Path) -> None:
    seen: list[str] = []

    def kill(stage: str, done: int, total: int) -> None:
        if stage == "candidate" and done == total:
            seen.append(stage)
            if len(seen) == 3:  # the third row's forward
                raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        study_formats(demo_model, text, out, **OPTIONS, keep=True, progress=kill)
    assert (out / "f16.cellm").exists() and not (out / RESULT_NAME).exists()
    found = study_formats(demo_model, text, out, **OPTIONS, keep=True)
    assert found.resumed == 2
    assert [replace(row, seconds=0) for row in found.rows] == [replace(row, seconds=0) for row in study.rows]
    made = {f"{name}.cellm{suffix}" for name in ("f16", "int2") for suffix in ("", ".sha256", ".record.json")}
    assert {path.name for path in out.iterdir() if path.is_file()} == {RESULT_NAME, *made}


@pytest.mark.slow
def test_rows_of_another_protocol_are_not_taken(demo_model: Path, text: Path, tmp_path: Path) -> None:
    def kill(stage: str, done: int, total: int) -> None:
        if stage == "compress":
            raise KeyboardInterrupt

    options = {**OPTIONS, "formats": ["Q4_K_M"]}
    with pytest.raises(KeyboardInterrupt):
        study_formats(demo_model, text, tmp_path, **options, progress=kill)
    found = study_formats(demo_model, text, tmp_path, **options | {"seed": 1})
    row = found.row("Q4_K_M")
    assert found.resumed == 0 and row is not None
    assert (row.rounding, row.unmeasured, row.float_bytes) == ("33 nearest", None, {})
    assert 4 < (row.bpw or 0) < 6 and [path.name for path in tmp_path.iterdir()] == [RESULT_NAME]


def test_what_cannot_be_studied_is_refused(demo_model: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(BitsmithError, match=r"unknown format 'int3'; known: f16 int8"):
        study_formats(demo_model, text, tmp_path, formats=["int3"])
    gguf = compress(demo_model, tmp_path / "x.gguf", "Q8_0").out
    with pytest.raises(UnsupportedError, match="GGUF"):
        study_formats(gguf, text, tmp_path, **OPTIONS)
    packed = write_cellm(demo_model, tmp_path / "x.cellm", "i4").out
    (tmp_path / "tokenizer.json").write_bytes((demo_model / "tokenizer.json").read_bytes())
    with pytest.raises(UnsupportedError, match="expected the original"):
        study_formats(packed, text, tmp_path, **OPTIONS)
    for prompts in ([], [""]):
        with pytest.raises(BitsmithError, match="no tokens"):
            study_formats(demo_model, text, tmp_path, **{**OPTIONS, "prompts": prompts})
    with pytest.raises(BitsmithError, match="0 tokens"):
        study_formats(demo_model, text, tmp_path, **{**OPTIONS, "written_tokens": 0})
    assert not (tmp_path / RESULT_NAME).exists()


def test_every_published_row_has_ours_beside_it() -> None:
    for name in ("int4-row", "int4-g32", "int4-g128", "int4-mixed", "int2", "1-bit"):
        assert STUDIED[name].family == "seed" and not STUDIED[name].guided
        assert STUDIED[f"{name}-feedback"].guided


def _row(name: str, verdict: str, over: float, klds: tuple[float, ...] = (), **facts: Any) -> FormatRow:
    measure = Measure(over, "nats/token", over - 0.1, over + 0.1, "by hand")
    passage = Passage("a|b\n\x1b[31m<b>", "length", (1,), 0, 0, 1.0)
    writing = Writing((passage,), None, measure, None, measure)
    coherence = Coherence(writing, writing, verdict)  # type: ignore[arg-type]
    return FormatRow(name, "seed", "x", coherence=coherence, chunk_kld_nats=klds, **facts)


def _study(*rows: FormatRow) -> FormatsStudy:
    protocol = Protocol("p", "t", "0" * 64, 9, 8, 2, 2, 6, 200, 0)
    return with_claims(FormatsStudy("m", rows, protocol, ("a\nb",), 3, 4, None, 0, 1.0))


def test_claims_by_hand() -> None:
    found = _study(
        _row("int4-row", "coherent", 0.1, file_bytes=100, weights=10, float_bytes={"linear_attn": 40}),
        _row("int2", "incoherent", 2.0, (1.0, 3.0), file_bytes=150, float_bytes={"embedding and head": 80}),
        _row("int2-scales", "undecided", 0.9, (0.9, 3.3), file_bytes=150),
        _row("int2-feedback", "coherent", 0.2, (0.4, 1.4), file_bytes=150),
        _row("1-bit", "undecided", 1.0, (2.0, 5.0), file_bytes=9),
        _row("1-bit-scales", "undecided", 1.0, (2.0, 5.0), file_bytes=9),
    )
    outcomes = {one.claim: one.outcome for one in found.claims}
    assert outcomes == {
        "int4 quantized everything": "NOT HELD",
        "int4 writes coherently": "HELD",
        "int2 is garbage": "HELD",
        "1 bit is garbage": "NOT TESTED",
        "int2's file is larger than int4's, as int2 keeps embedding and head in float16": "HELD",
        "under 4 bits nothing but training makes text coherent": "NOT HELD",
        "int2: scales of least error leaves less than the mean KLD": "NOT TESTED",
        "int2: error feedback leaves at most 0.5 of the mean KLD": "HELD",
        "1-bit: scales of least error leaves less than the mean KLD": "NOT HELD",  # the same is not less
        "1-bit: error feedback leaves less than the mean KLD": "NOT TESTED",
        "int4-row: scales of least error leaves less than the mean KLD": "NOT TESTED",
        "int4-row: error feedback leaves less than the mean KLD": "NOT TESTED",
        "int4-g32: error feedback leaves less than the mean KLD": "NOT TESTED",
        "int4-g128: error feedback leaves less than the mean KLD": "NOT TESTED",
        "int4-mixed: error feedback leaves less than the mean KLD": "NOT TESTED",
    }
    ratio = found.claims[7].measure
    assert ratio is not None and ratio.value == pytest.approx(1.8 / 4)
    assert "40 of 100 bytes (40.0%)" in found.claims[0].found
    bare = {one.outcome for one in _study().claims}
    assert bare == {"NOT TESTED"}
    both = _study(_row("int2", "coherent", 0, file_bytes=9), _row("int4-row", "coherent", 0, file_bytes=9))
    assert [one.outcome for one in both.claims[:5]] == ["HELD", "HELD", "NOT HELD", "NOT TESTED", "NOT HELD"]


def test_texts_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    found = _study(
        _row("original", "original", 0.0), replace(_row("int2", "coherent", 0), unmeasured="a|<b>\x1b")
    )
    shown = formats_markdown(found)
    assert "\x1b" not in shown
    assert "    a|b\\n\\x1b[31m<b>\n" in shown  # an indented block, on one line
    assert "a\\|\\<b\\>\\\\x1b" in shown
    print_formats(found)
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "a|b\\n\\x1b[31m<b>" in printed


@pytest.mark.slow
def test_statistics_are_collected_from_a_text(demo_model: Path, text: Path, tmp_path: Path) -> None:
    calibration = tmp_path / "calibration.txt"
    calibration.write_text(held_out_text(40_000)[20_000:], encoding="utf-8")
    names = ["int2", "int2-scales", "int2-feedback", "NF4", "NF4-feedback", "W4A16", "SPI", "Q1_0", "Q2_0"]
    options = {**OPTIONS, "formats": names, "calibration": calibration}
    out = tmp_path / "out"
    found = study_formats(demo_model, text, out, **options)
    assert [row.name for row in found.rows] == ["original", *names]
    assert [row.unmeasured for row in found.rows] == [None] * 10
    seed, scales, feedback = (row.measures["mean_kld"].value for row in found.rows[1:4])
    assert seed > 2 * max(scales, feedback)
    assert found.rows[1].file_bytes == found.rows[2].file_bytes == found.rows[3].file_bytes
    assert found.rows[4].file_bytes == found.rows[5].file_bytes
    assert "gptq" in found.rows[3].rounding and found.rows[4].rounding.endswith(" nearest")
    assert [path.name for path in out.iterdir()] == [RESULT_NAME]
