"""The study page in real Chromium: quiet, filtering, keyboard-usable, hostile names as text; and its card."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitsmith.errors import BitsmithError
from bitsmith.report.adapter_records import tensor_layer, tensor_role
from bitsmith.report.model_card import model_card, modelfile, write_report
from bitsmith.report.study_adapters import from_audit, from_formats, from_record, from_spi, load_study
from bitsmith.report.study_figures import plot_data
from bitsmith.report.study_json import Study, read_study
from bitsmith.report.study_page import write_study_page
from bitsmith.report.study_tables import artifact_table, error_of
from bitsmith.run.audit import AuditLog
from bitsmith.run.evaluate import Artifact, Measure, Protocol, evaluate
from bitsmith.run.execute import compress
from bitsmith.run.format_rows import ORIGINAL, ClaimCheck, FormatRow, FormatsStudy
from bitsmith.run.gate import FORWARD_COSINE, TOTAL_ERROR
from bitsmith.run.spi_rows import LinearRow, SpiRow, SpiStudy, SpiTable
from chromium import Visit, visit

HOSTILE = '</script><img src=x onerror=console.error("ran")>"><b>bold</b>%{x}$y$\x1b[31m\u202e{{7*7}}'
SHOWN = "&lt;/script&gt;&lt;img src=x onerror=console.error"
PLOTS = {"pareto-0", "pareto-1", "layers", "components", "allocation", "spectra"}
PROTOCOL = Protocol("chunks", "held.txt", "a" * 64, 1000, 64, 4, 15, 124, 200, 0)
ACT = """{
const say = (what, value) => console.log(`${what}=${JSON.stringify(value)};`);
const drawn = id => document.getElementById(id).data.filter(t => t.type !== "scatter" || t.ids || t.x.length)
  .flatMap(t => t.ids ?? []).length;
const rows = id => [...document.getElementById(id).tBodies[0].rows].filter(r => !r.hidden).length;
const bars = () => document.getElementById("components").data.length;
const legend = [...document.querySelectorAll(".group")];
const count = selector => document.querySelectorAll(selector).length;
const see = what => say(what, [drawn("pareto-0"), drawn("pareto-1"), bars(), rows("component-table"),
  rows("gates"), count("tr.out"), count(".sample:not([hidden]) article:not([hidden])"),
  document.getElementById("status").textContent]);
see("start");
legend[1].click();
see("legend");
say("pressed", legend.map(b => b.getAttribute("aria-pressed")));
legend[1].click();
see("again");
document.querySelector("tr[data-row='2']").click();
see("row");
say("map", [document.getElementById("map-artifact").selectedOptions[0].textContent,
  document.getElementById("map").tBodies[0].rows.length]);
document.getElementById("everything").click();
see("all");
const search = document.querySelector("input[data-filters=gates]");
search.value = "COSINE"; search.dispatchEvent(new Event("input"));
say("search", [rows("gates"), document.getElementById("gates-count").textContent]);
search.value = ""; search.dispatchEvent(new Event("input"));
const outcome = document.querySelector("select[data-filters=gates]");
outcome.value = "FAIL"; outcome.dispatchEvent(new Event("input"));
say("fails", rows("gates"));
const sort = [...document.querySelectorAll("#artifacts th button")].find(b => b.textContent === "bytes");
const order = () => [...document.getElementById("artifacts").tBodies[0].rows].map(r => r.dataset.row);
sort.click(); say("up", order()); sort.click(); say("down", order());
say("sorted", sort.parentElement.getAttribute("aria-sort"));
document.getElementById("pareto-x").value = "bpw";
document.getElementById("pareto-x").dispatchEvent(new Event("change"));
say("axis", document.getElementById("pareto-0").layout.xaxis.title.text);
document.getElementById("spectrum-what").value = "α of the tail of σ²";
document.getElementById("spectrum-what").dispatchEvent(new Event("change"));
say("alpha", document.getElementById("spectra").data.flatMap(t => t.y));
say("unreachable", [...document.querySelectorAll(
  ".group, .pick, #everything, select, input, th button, pre, .wide")].filter(e => e.tabIndex < 0)
  .map(e => e.outerHTML.slice(0, 80)));
say("unnamed", [...document.querySelectorAll("select, input, .figure, .wide")]
  .filter(e => !e.labels?.length && !e.getAttribute("aria-label")).length);
say("tables", [...document.querySelectorAll("table")].every(
  t => t.caption && t.querySelector("th[scope=col]")));
}"""


def figure(value: float, unit: str = "nats", width: float = 0.1) -> dict[str, Any]:
    return {
        "value": value,
        "unit": unit,
        "low": value * (1 - width),
        "high": value * (1 + width),
        "interval": "95 %",
    }


def tensors(nbytes: int, error: float) -> list[dict[str, Any]]:
    roles = {"ffn.up": "mlp.up_proj", HOSTILE: HOSTILE, "attn.q": "self_attn.q_proj"}
    return [
        {
            "name": f"model.layers.{layer}.{name}.weight", "role": role, "layer": layer, "shape": [64, 64],
            "type": "Q4_K", "nbytes": nbytes, "squared_error": error**2,
        }
        for layer in range(3)
        for role, name in roles.items()
    ]  # fmt: skip


def everything() -> dict[str, Any]:
    """Every part of a report, hostile text in each."""
    made = [
        {
            "name": name, "group": group, "what": HOSTILE, "file_bytes": nbytes, "weights": 100_000,
            "bpw": 8 * nbytes / 100_000, "protocol": "p", "path": f"/x/{name}.gguf",
            "tensors": tensors(nbytes // 40, error),
            "measures": {
                "mean_kld": figure(kld), "ppl_cand": figure(20 + kld, "perplexity"), "mine": figure(kld),
            },
            "commands": [f"bitsmith compress tiny -o {name}"], "verdict": "PASS",
        }
        for name, group, nbytes, error, kld in (
            (HOSTILE, HOSTILE, 60_000, 0.05, 0.01),
            ("four", "int4", 50_000, 0.1, 0.02),
            ("svd", "low rank", 24_000, 0.98, 4.0),
        )
    ]  # fmt: skip
    original = {
        "name": "original", "group": "original", "is_original": True, "file_bytes": 200_000,
        "measures": {"ppl_cand": figure(20, "perplexity"), "mean_kld": {"value": 0, "unit": "nats"}},
    }  # fmt: skip
    line = {
        "when": "2026-01-01T00:00:00Z",
        "who": "gate",
        "artifact": "svd",
        "limit": 1.0,
        "decision": HOSTILE,
    }
    return {
        "bitsmith": "0", "title": f"Study {HOSTILE}", "artifacts": [original, *made],
        "peers": [{"name": HOSTILE, "source": "a card", "same_protocol": False, "file_bytes": 55_000,
                   "measures": {"mean_kld": figure(0.03)}}],
        "protocols": [{"name": "p", "settings": {"text": HOSTILE, "ctx_tokens": 512}}],
        "gates": [
            line | {"what": "total error", "outcome": "FAIL", "value": 1.2, "tensor": HOSTILE},
            line | {"what": "forward cosine", "outcome": "PASS", "value": 0.97, "artifact": "four"},
            line | {"what": "forward cosine", "outcome": "UNMEASURED", "evidence": {"why": [HOSTILE]}},
            line | {"what": "replanned", "artifact": "", "value": "inf"},
        ],
        "tasks": [{"name": "compress", "action": "compress", "status": "failed", "why": HOSTILE}],
        "claims": [{"claim": HOSTILE, "source": "published", "outcome": "NOT HELD", "found": "no better"}],
        "spectra": [
            {"name": HOSTILE, "role": HOSTILE, "layer": 0, "shape": [64, 64], "index": [1, 2, 64],
             "sigma": [4.0, 2.0, 0.5], "alpha": 3.5},
            {"name": "zero", "role": "ffn.up", "layer": 1, "shape": [64, 64], "index": [1], "sigma": [0.0]},
        ],
        "samples": [{"prompt": HOSTILE, "passages": [
            {"artifact": name, "how": "greedy", "text": HOSTILE}
            for name in ("original", "four", "svd", "gone")]}],
        "environment": {"python": HOSTILE}, "digests": [{"what": HOSTILE, "sha256": "b" * 64}],
        "commands": ["bitsmith study x.yaml", HOSTILE], "notes": [HOSTILE], "summary": [HOSTILE],
        "seconds": 3.0,
    }  # fmt: skip


@pytest.fixture(scope="module")
def study() -> Study:
    return read_study(everything())


@pytest.fixture(scope="module")
def acted(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Visit:
    """The page with a script behind it that clicks, in light colours."""
    folder = tmp_path_factory.mktemp("page")
    page = write_study_page(folder / "study.html", study)
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace("</body>", f"<script>{ACT}</script></body>"), encoding="utf-8")
    return visit(page, folder, size=(1280, 5200))


def said(seen: Visit) -> dict[str, Any]:
    lines = [re.search(r'"(\w+)=(.*);", source', line) for line in seen.console]
    assert all(lines), seen.console
    return {found[1]: json.loads(found[2]) for found in lines}


def test_a_click_filters_plots_tables_and_samples(acted: Visit) -> None:
    found = said(acted)
    assert found["start"] == [3, 4, 3, 9, 4, 0, 4, "4 of 4 artifacts shown"]
    assert found["legend"] == [1, 1, 1, 3, 1, 3, 1, "1 of 4 artifacts shown"]
    assert found["pressed"] == ["false", "true", "false", "false"]
    assert found["again"] == found["start"] == found["all"]
    assert found["row"] == [1, 1, 1, 3, 2, 3, 2, "1 of 4 artifacts shown"]
    assert found["map"] == ["four", 3]


def test_tables_are_searched_sorted_and_plots_follow_their_lists(acted: Visit) -> None:
    found = said(acted)
    assert found["search"] == [2, "2 of 4 lines"]
    assert found["fails"] == 1
    assert found["up"] == ["3", "2", "1", "0"]
    assert found["down"] == ["0", "1", "2", "3"]
    assert found["sorted"] == "descending"
    assert found["axis"] == "bits per weight"
    assert found["alpha"] == [3.5]


def test_everything_is_reached_by_the_keyboard_and_has_a_name(acted: Visit) -> None:
    found = said(acted)
    assert found["unreachable"] == []
    assert found["unnamed"] == 0
    assert found["tables"] is True
    assert 'lang="en"' in acted.dom
    for plot in PLOTS:
        assert re.search(
            rf'<div class="figure[^"]*" id="{plot}" role="group" aria-label="Plot: ', acted.dom
        ), plot


def test_hostile_text_stays_text(study: Study, acted: Visit, tmp_path: Path) -> None:
    text = write_study_page(tmp_path / "study.html", study).read_text(encoding="utf-8")
    assert not set("\x1b\u202e") & set(text)
    assert "49" not in text[text.rindex("<h1>") : text.index("</h1>", text.rindex("<h1>"))]
    assert acted.requests == []
    body = acted.dom[acted.dom.rindex("<h1>") :]
    assert "<img" not in body
    assert "<b>" not in body.partition("<script")[0]
    assert body.count(SHOWN) > 30
    for part in ("artifacts", "gates", "tasks", "claims", "spectrum-table", "component-table", "peers"):
        table = body[body.index(f'<table id="{part}"') :]
        assert SHOWN in table[: table.index("</table>")], part


@pytest.mark.parametrize("dark", [False, True])
def test_the_page_draws_quietly_in_light_and_dark(
    study: Study, acted: Visit, tmp_path: Path, dark: bool
) -> None:
    seen = acted
    if dark:
        page = write_study_page(tmp_path / "study.html", study)
        seen = visit(page, tmp_path, dark=True, size=(1280, 4200))
        assert seen.console == []
    assert seen.requests == []
    for plot in PLOTS:
        assert re.search(rf'<div class="figure js-plotly-plot" id="{plot}"', seen.dom), plot
    assert seen.dom.count('class="trace scatter') >= 9
    assert seen.dom.count('class="trace bars"') == 3
    assert seen.dom.count('class="hm"') == 1
    assert seen.dom.count('class="errorbar"') >= 6
    background = seen.pixels[2, 2].astype(int)
    assert background.sum() < 100 if dark else background.sum() > 700
    bands = [np.abs(band.astype(int) - background).max() for band in np.array_split(seen.pixels[:3500], 16)]
    assert min(bands) > 60, "a stretch of the page is empty"


def test_a_report_is_three_files_and_reads_back(study: Study, tmp_path: Path) -> None:
    paths = write_report(tmp_path / "out" / "deep", study)
    assert [path.name for path in paths] == ["report.html", "report.json", "README.md"]
    assert load_study([paths[1]]) == study
    assert len(paths[0].read_bytes()) < 6_000_000
    with pytest.raises(BitsmithError, match="cannot be made"):
        write_report(paths[1], study)


def test_an_empty_study_makes_a_page_too(tmp_path: Path) -> None:
    seen = visit(
        write_study_page(tmp_path / "e.html", Study(bitsmith="0", title="empty")), tmp_path, size=(600, 400)
    )
    assert seen.console == []
    assert "How to repeat it" in seen.dom


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


def test_a_formats_study_is_reported() -> None:
    rows = (
        FormatRow(ORIGINAL, "original", "as stored", file_bytes=200, weights=100, measures=measures(0.0)),
        FormatRow("NF4", "today", "four bits", file_bytes=60, weights=100, measures=measures(0.1)),
        FormatRow("Q2_K", "today", "two", unmeasured="no statistics"),
    )
    found = FormatsStudy("models/tiny", rows, PROTOCOL, (), 32, 64, None, 0, 1.5)
    claimed = replace(
        found, claims=(ClaimCheck("c", "ours", "HELD", "yes", Measure(1.0, "ratio", None, None, None)),)
    )
    study = from_formats(json.loads(json.dumps(claimed.to_json())))
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
