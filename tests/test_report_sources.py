"""What a report is made of: JSON files and folders of any run, peers, the card, and what is refused."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from bitsmith.errors import BitsmithError
from bitsmith.report.adapter_records import tensor_layer, tensor_role
from bitsmith.report.card_snippets import modelfile
from bitsmith.report.model_card import model_card, write_report
from bitsmith.report.study_adapters import from_audit, from_formats, from_record, from_spi, load_study
from bitsmith.report.study_figures import plot_data
from bitsmith.report.study_json import Study, read_study
from bitsmith.report.study_tables import artifact_table, error_of
from bitsmith.run import seed_claims
from bitsmith.run.audit import AuditLog
from bitsmith.run.evaluate import Artifact, Measure, Protocol, evaluate
from bitsmith.run.execute import compress
from bitsmith.run.format_rows import ORIGINAL, ClaimCheck, FormatRow, FormatsStudy
from bitsmith.run.gate import FORWARD_COSINE, TOTAL_ERROR
from bitsmith.run.sahc_rows import Attempt, ComponentRow, SahcResult, SahcRow, Written
from bitsmith.run.spi_rows import LinearRow, SpiRow, SpiStudy, SpiTable
from study_everything import everything, figure

PROTOCOL = Protocol("chunks", "held.txt", "a" * 64, 1000, 64, 4, 15, 124, 200, 0)


@pytest.fixture(scope="module")
def study() -> Study:
    return read_study(everything())


def test_a_report_is_three_files_and_reads_back(study: Study, tmp_path: Path) -> None:
    paths = write_report(tmp_path / "out" / "deep", study)
    assert [path.name for path in paths] == ["report.html", "report.json", "README.md"]
    assert load_study([paths[1]]) == study
    assert len(paths[0].read_bytes()) < 6_000_000
    with pytest.raises(BitsmithError, match="cannot be made"):
        write_report(paths[1], study)


def test_the_card_holds_the_table_and_snippets_and_no_markup(study: Study) -> None:
    card = model_card(study)
    assert "| artifact | group | bytes |" in card
    assert "0.02000 (0.01800 … 0.02200)" in card
    assert "FROM ./" in card
    assert "    bitsmith study x.yaml" in card
    assert "forward cosine" in card
    outside = [line for line in card.split("\n") if not line.startswith("    ")]
    assert not any(re.search(r"(?<!\\)<", line) for line in outside)
    assert not set("\x1b\u202e") & set(card)
    assert modelfile("tiny.gguf", 512) == "FROM ./tiny.gguf\nPARAMETER num_ctx 512\n"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"artefacts": []}, "artefacts: Extra inputs"),
        ({"gates": [{"when": "", "who": "", "what": "", "outcome": "MAYBE"}]}, r"gates\.0\.outcome"),
        (
            {"artifacts": [{"name": "a", "group": "b", "measures": {"x": figure(float("inf"))}}]},
            "Infinity is no number",
        ),
        ({"title": None}, "title"),
    ],
)
def test_what_is_no_study_is_refused_by_field(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"kind": "study", "bitsmith": "0", "title": "t"} | change))
    with pytest.raises(BitsmithError, match=said) as raised:
        load_study([path])
    assert str(path) in str(raised.value)


def test_files_that_are_no_results_are_refused(tmp_path: Path) -> None:
    for name, text in {"a.json": "{", "b.json": "[]", "c.json": '{"kind": "calibration"}'}.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(BitsmithError, match=name):
            load_study([tmp_path / name])
    with pytest.raises(BitsmithError, match="cannot be read"):
        load_study([tmp_path / "none.json"])


def measures(kld: float) -> dict[str, Measure]:
    return {
        name: Measure(value, unit, value, value, "95 %")
        for name, value, unit in (
            ("ppl_ref", 20.0, "perplexity"), ("ppl_cand", 20 + kld, "perplexity"), ("mean_kld", kld, "nats"),
        )
    }  # fmt: skip


def formats_study() -> FormatsStudy:
    rows = (
        FormatRow(ORIGINAL, "original", "as stored", file_bytes=200, weights=100, measures=measures(0.0)),
        FormatRow("NF4", "today", "four bits", file_bytes=60, weights=100, measures=measures(0.1)),
        FormatRow("Q2_K", "today", "two", unmeasured="no statistics"),
    )
    found = FormatsStudy("models/tiny", rows, PROTOCOL, (), 32, 64, None, 0, 1.5)
    return replace(
        found, claims=(ClaimCheck("c", "ours", "HELD", "yes", Measure(1.0, "ratio", None, None, None)),)
    )


def test_a_formats_study_is_reported() -> None:
    study = from_formats(json.loads(json.dumps(formats_study().to_json())))
    assert [row.name for row in study.artifacts] == ["original", "NF4", "Q2_K"]
    assert study.artifacts[1].bpw == 4.8
    assert study.artifacts[2].unmeasured == "no statistics"
    assert study.commands == (
        "bitsmith study formats models/tiny --text held.txt --ctx 64 --chunks 4 --formats NF4,Q2_K",
    )
    assert study.claims[0].outcome == "HELD"
    assert artifact_table(study).rows[1][4].text == "3.33"
    assert "unmeasured" in [cell.text for cell in artifact_table(study).rows[2]]


def test_an_spi_study_is_reported() -> None:
    linear = LinearRow("model.layers.0.mlp.up_proj.weight", "ffn.up", 0, (8, 4), 64, 2.0, 3.0, 0.75, 0.01)
    row = SpiRow("NF4", (), 0, 50, 4.0, measures(0.1), (0.1,))
    original = Artifact("models/tiny", 200, 100, 16.0)
    tables = (SpiTable("count", "1 linears", (row,)), SpiTable("bytes", "64 bytes", (row,)))
    found = SpiStudy("models/tiny", original, PROTOCOL, None, (linear,), tables, (), (), 0, 1.0)
    study = from_spi(json.loads(json.dumps(found.to_json())))
    assert [row.name for row in study.artifacts] == ["original", "NF4, equal count", "NF4, equal bytes"]
    assert study.artifacts[1].layers[0].figure.value == 0.01
    assert (study.spectra[0].alpha, study.spectra[0].r90) == (2.0, 3)
    assert study.commands[0].endswith("--chunks 4 --critical 1 --random 0")


def test_a_run_of_compress_and_evaluate_is_reported(demo_model: Path, tmp_path: Path) -> None:
    record = compress(demo_model, tmp_path / "q.gguf", "Q4_0").to_json()
    text = tmp_path / "text.txt"
    text.write_text(Path(json.__file__).read_text(encoding="utf-8")[:3000], encoding="utf-8")
    evaluation = evaluate(demo_model, tmp_path / "q.gguf", text, ctx_tokens=64, chunks=2).to_json()
    study = from_record(json.loads(json.dumps(record)), json.loads(json.dumps(evaluation)))
    row = study.artifacts[1]
    assert study.artifacts[0].is_original
    assert row.file_bytes == (tmp_path / "q.gguf").stat().st_size
    assert row.measures["mean_kld"].value == evaluation["measures"]["mean_kld"]["value"]
    assert len(row.tensors) == len(record["tensors"])
    assert {one.role for one in row.tensors} >= {
        "embed",
        "head",
        "delta.in_qkv",
        "attn.q",
        "ffn.down",
        "norm",
    }
    cells = plot_data(study)["artifacts"][1]["cells"]
    assert cells["layers"][:2] == ["outside", "layer 0"]
    assert 4.5 in cells["bpw"][1]
    assert row.commands[0] == f"bitsmith compress {demo_model} -o {tmp_path / 'q.gguf'} --type Q4_0"
    alone = from_record(record)
    assert alone.artifacts[0].unmeasured == "divergence: no evaluation was given"
    (tmp_path / "e.json").write_text(json.dumps(evaluation))
    (tmp_path / "r.json").write_text(json.dumps(record))
    assert load_study([tmp_path / "e.json", tmp_path / "r.json"]) == study
    other = evaluation | {"protocol": evaluation["protocol"] | {"seed": 1}}
    (tmp_path / "o.json").write_text(json.dumps(other))
    with pytest.raises(BitsmithError, match="share their protocol"):
        load_study([tmp_path / "e.json", tmp_path / "o.json"])


def test_an_audit_log_becomes_the_gate_log(tmp_path: Path) -> None:
    with AuditLog(tmp_path / "audit.jsonl") as log:
        log.judged("sahc", "tiny/sahc", TOTAL_ERROR.judge(1.2, low=1.1, high=1.3), "next: int4")
        log.judged("sahc", "layer 3", FORWARD_COSINE.judge(None), "refused")
        log.add("sahc", "plan", decision="begin")
    (tmp_path / "r.json").write_text(json.dumps({"kind": "study", "bitsmith": "0", "title": "t"}))
    gates = load_study([tmp_path / "r.json"], audit=tmp_path / "audit.jsonl").gates
    assert [line.outcome for line in gates] == ["FAIL", "UNMEASURED", ""]
    assert (gates[0].value, gates[0].limit, gates[0].high, gates[0].unit) == (1.2, 1.0, 1.3, "relative error")
    assert len(from_audit(tmp_path / "audit.jsonl")) == 3


def test_roles_and_layers_come_from_names() -> None:
    assert tensor_role("model.layers.0.linear_attn.in_proj_qkv.weight", 2) == "delta.in_qkv"
    assert tensor_role("mtp.layers.0.mlp.up_proj.weight", 2) == "mtp.ffn.up"
    assert tensor_layer("model.layers.31.mlp.up_proj.weight") == 31
    assert tensor_layer("mtp.layers.0.mlp.up_proj.weight") is None


def test_pooled_errors_weigh_by_weights_and_need_every_matrix() -> None:
    found = read_study(everything()).artifacts[1].tensors
    assert error_of(found, held=False) == pytest.approx(0.05)
    small = found[0].model_copy(update={"shape": (64, 192), "squared_error": 0.01})
    assert error_of([found[1], small], held=False) == pytest.approx(((0.0025 + 3 * 0.01) / 4) ** 0.5)
    unknown = found[0].model_copy(update={"squared_error": None})
    assert error_of([found[1], unknown], held=False) is None
    assert error_of(found, held=True) is None


def sahc_result() -> SahcResult:
    """A recipe on one tensor: low rank failed, int4 passed."""
    failed = TOTAL_ERROR.judge(1.2).to_json()
    passed = [gate.judge(value).to_json() for gate, value in ((TOTAL_ERROR, 0.1), (FORWARD_COSINE, 0.99))]
    attempts = (
        Attempt("SVD", "SVD", 10, (failed,), "replan: row-int4"),
        Attempt("row-int4", "INT4", 32, tuple(passed), "kept"),
    )
    name = "model.layers.0.mlp.up_proj.weight"
    row = SahcRow(name, "C1", "ffn.up", 0, (8, 8), "row-int4", "INT4", 32, 4.0, 0.1, attempts)
    component = ComponentRow("C1", "FFN", 64, 1.0, 25.3, 12.0, 32, 4.0, "3.99", {"row-int4": 1})
    made = Written(Artifact("model", 40, 64, 5.0), 3.2, measures(0.1), (), tuple(passed[:1]), "c" * 64)
    int4 = replace(made, artifact=Artifact("int4", 40, 64, 5.0))
    one = Measure(1.0, "ratio", 0.9, 1.1, "95 %")
    original = Artifact("models/tiny", 128, 64, 16.0)
    return SahcResult(
        "models/tiny", original, PROTOCOL, "4 chunks", (row,), (component,), 1, made, int4, one, 1.0, {},
        3, 1, 0, 1, True,
    )  # fmt: skip


def test_a_model_of_sahc_is_reported_from_its_folder_or_the_one_beside(tmp_path: Path) -> None:
    work = tmp_path / "tiny.sahc"
    work.mkdir()
    (tmp_path / "tiny").mkdir()
    (work / "sahc.json").write_text(json.dumps(sahc_result().to_json()))
    study = load_study([tmp_path / "tiny"])
    assert study == load_study([work]) == load_study([work / "sahc.json"])
    assert [row.name for row in study.artifacts] == ["original", "sahc", "int4"]
    assert study.artifacts[1].path == str(tmp_path / "tiny")
    assert study.artifacts[1].tensors[0].squared_error == pytest.approx(0.01)
    assert study.artifacts[1].layers[0].figure.value == 0.99
    assert [line.outcome for line in study.gates] == ["FAIL", "PASS", "PASS", "PASS", "PASS"]
    assert study.gates[0].tensor == "model.layers.0.mlp.up_proj.weight"
    with AuditLog(work / "audit.jsonl") as log:
        log.judged("sahc gate", f"{study.gates[0].tensor}: SVD", TOTAL_ERROR.judge(1.2), "replan: row-int4")
    lines = load_study([work]).gates
    assert [(line.artifact, line.tensor) for line in lines] == [("sahc", study.gates[0].tensor)]
    assert (lines[0].gate, lines[0].direction, lines[0].limit) == ("total error", "below", 1.0)
    card = model_card(study)
    assert "| total error | 1 | 0 | 4 |" in card
    assert "C1 \\(FFN\\): ratio claimed 25.3" in card or "C1 (FFN): ratio claimed 25.3" in card


def claims_study() -> seed_claims.ClaimsStudy:
    claim = seed_claims.TestedClaim(
        "flat-spectra", "S0, x", "“flat”", "test", "rule", "HELD", "found", None, "36 matrices", "0.4", 1.0
    )
    return seed_claims.ClaimsStudy(
        "models/tiny", "h.txt", "d" * 64, None, None, 64, 4, 0, (), (claim,), 0, 2.0
    )


def test_several_sources_make_one_study_by_one_protocol(tmp_path: Path) -> None:
    (tmp_path / "sahc.json").write_text(json.dumps(sahc_result().to_json()))
    claims = tmp_path / "claims"
    claims.mkdir()
    (claims / "claims.json").write_text(json.dumps(claims_study().to_json()))
    study = load_study([tmp_path / "sahc.json", claims])
    assert study.title == "SAHC on tiny"
    assert [one.outcome for one in study.claims] == ["HELD"]
    assert study.commands[1] == (
        "bitsmith study claims models/tiny --text h.txt --ctx 64 --chunks 4 --only flat-spectra"
    )
    assert len(study.artifacts) == 3
    other = replace(sahc_result(), protocol=replace(PROTOCOL, chunks=3))
    (tmp_path / "other.json").write_text(json.dumps(other.to_json()))
    with pytest.raises(BitsmithError, match="different protocols"):
        load_study([tmp_path / "sahc.json", tmp_path / "other.json"])
    twice = load_study([tmp_path / "sahc.json", tmp_path / "sahc.json"])
    assert [row.name for row in twice.artifacts] == ["original", "sahc", "int4", "sahc (2)", "int4 (2)"]


def test_what_claims_rest_on_gives_rows_and_no_claims_of_its_own(tmp_path: Path) -> None:
    evidence = tmp_path / "evidence" / "formats"
    evidence.mkdir(parents=True)
    (tmp_path / "claims.json").write_text(json.dumps(claims_study().to_json()))
    (evidence / "formats.json").write_text(json.dumps(formats_study().to_json()))
    study = load_study([tmp_path])
    assert [row.name for row in study.artifacts] == ["original", "NF4", "Q2_K"]
    assert [one.source for one in study.claims] == ["S0, x"]
    assert [one.source for one in load_study([evidence]).claims] == ["ours"]


def test_an_assay_is_reported_alone_and_gives_spectra_to_others(tmp_path: Path) -> None:
    matrix = {
        "name": "w", "role": "ffn.up", "layer": 0, "shape": [8, 8], "power_law": None,
        "spectrum": {"sigma": {"x": list(range(1, 201)), "y": [200.0 - n for n in range(200)]},
                     "effective_rank": 3.0, "stable_rank": 2.0, "r90": 5},
    }  # fmt: skip
    assay = {
        "path": "models/tiny", "protocol": {"version": "0", "match": None}, "verdict": {"text": "int4 wins"},
        "matrices": [matrix, matrix | {"name": "v", "spectrum": None}], "notes": [], "seconds": 1.0,
    }  # fmt: skip
    (tmp_path / "assay.json").write_text(json.dumps(assay))
    (tmp_path / "sahc.json").write_text(json.dumps(sahc_result().to_json()))
    alone = load_study([tmp_path / "assay.json"])
    assert alone.summary == ("int4 wins",)
    assert (len(alone.spectra[0].index), alone.spectra[0].index[-1], alone.spectra[0].sigma[0]) == (
        60,
        200,
        200,
    )
    assert load_study([tmp_path]).spectra == alone.spectra
    assert load_study([tmp_path]).title == "SAHC on tiny"


def test_folders_and_files_that_hold_no_result_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BitsmithError, match="holds nothing to report"):
        load_study([tmp_path])
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(BitsmithError, match="not come to its end"):
        load_study([tmp_path])
    damaged = sahc_result().to_json()
    del damaged["rows"]
    for name, value in {"a": damaged, "b": {"kind": "formats study"}, "c": {"tensors": 3}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
        with pytest.raises(BitsmithError, match=f"{name}.json: is not what bitsmith writes"):
            load_study([tmp_path / f"{name}.json"])
    with pytest.raises(BitsmithError, match="nothing to report"):
        load_study([])


def test_peers_are_read_and_refused_by_field(tmp_path: Path) -> None:
    (tmp_path / "sahc.json").write_text(json.dumps(sahc_result().to_json()))
    peers = tmp_path / "peers.json"
    peers.write_text(json.dumps([{"name": "a", "source": "b", "same_protocol": True, "file_bytes": 3}]))
    assert load_study([tmp_path / "sahc.json"], peers=peers).peers[0].file_bytes == 3
    peers.write_text(json.dumps([{"name": "a", "source": "b"}]))
    with pytest.raises(BitsmithError, match=r"peers\.json.*same_protocol"):
        load_study([tmp_path / "sahc.json"], peers=peers)


def front(card: str) -> Any:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_card_says_what_loads_each_kind(tmp_path: Path) -> None:
    modules = {f"model.layers.{n}.mlp.up_proj": {"form": "factored", "rank": n} for n in range(40)}
    configs = {
        "mine": {"quant_method": "bitsmith", "modules": modules},
        "w4": {"quant_method": "compressed-tensors"},
    }
    rows = []
    for name, config in configs.items():
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "config.json").write_text(json.dumps({"quantization_config": config}))
        rows.append({"name": name, "group": name, "path": str(tmp_path / "out" / name)})
    model = "/hub/models--Qwen--Qwen3.5-0.8B/snapshots/abc"
    rows += [
        {
            "name": f"t/{kind}",
            "group": kind,
            "path": str(tmp_path / "out" / "made" / f"model.{kind}"),
            "model": model,
        }
        for kind in ("gguf", "cellm")
    ]
    (tmp_path / "out" / "made").mkdir()
    (tmp_path / "out" / "made" / "model.gguf").touch()
    card = model_card(read_study({"bitsmith": "0", "title": "t", "artifacts": rows}), tmp_path / "out")
    assert front(card) == {
        "base_model": ["Qwen/Qwen3.5-0.8B"], "base_model_relation": "quantized",
        "library_name": "transformers", "tags": ["bitsmith", "quantized", "compressed-tensors", "gguf"],
    }  # fmt: skip
    assert "mine: only bitsmith loads it" in card
    assert '"rank": 2' in card
    assert '"rank": 3' not in card
    assert "37 more" in card
    assert "vllm serve w4" in card
    assert "FROM ./made/model.gguf" in card
    assert "ollama create t-gguf -f Modelfile" in card
    assert "bitsmith generate model.cellm" in card
    assert modelfile("/abs/x.gguf") == "FROM /abs/x.gguf\n"


def test_commands_with_line_breaks_stay_exact(tmp_path: Path) -> None:
    command = "bitsmith generate m --prompt 'import os\n'"
    study = read_study({"bitsmith": "0", "title": "t", "commands": [command]})
    assert f"    {command.replace(chr(10), chr(10) + '    ')}" in model_card(study)
    page = write_report(tmp_path, study)[0].read_text(encoding="utf-8")
    assert "<pre>bitsmith generate m --prompt &#39;import os\n&#39;</pre>" in page


def test_the_parts_of_the_page_are_package_data() -> None:
    root = Path(__file__).parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"] == {"packages": ["src/bitsmith"]}
    ignored = (root / ".gitignore").read_text(encoding="utf-8").split()
    for name in ("study.css", "study.js", "study.html.jinja"):
        path = root / "src" / "bitsmith" / "report" / name
        assert path.is_file()
        assert not any(path.match(pattern) for pattern in ignored), "what git ignores is in no wheel"
