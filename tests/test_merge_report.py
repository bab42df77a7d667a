"""Reports of merges and of experiments on them: from what a merge wrote, as a card and in real Chromium."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bitsmith.errors import BitsmithError
from bitsmith.report.experiment_parts import experiment_parts, experiment_table
from bitsmith.report.merge_parts import diagnostics_table, merge_parts, tally_table
from bitsmith.report.model_card import model_card, write_report
from bitsmith.report.study_adapters import from_merge_experiments, load_study
from bitsmith.report.study_json import Study, read_study
from bitsmith.report.study_page import write_study_page
from bitsmith.run.merge import merge
from bitsmith.run.merge_recipe import MergeRecipe
from chromium_tab import Browser, Tab
from paired_models import DENSE, LARGE, LINES, SMALL, write_model
from study_everything import HOSTILE, everything, figure

CHARTS = "Object.keys(data.charts)"
UNDRAWN = f"{CHARTS}.filter(id => !one(id).querySelector('.trace, .hm'))"


@dataclass(frozen=True)
class Made:
    """A merge on disk: its folder, its record, the report of it."""

    out: Path
    record: dict[str, Any]
    study: Study


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    home = tmp_path_factory.mktemp("merge")
    teacher = write_model(home / "big", 1, num_hidden_layers=3, **LARGE, **DENSE)
    student = write_model(home / "small", 2, num_hidden_layers=2, **SMALL, **DENSE)
    (home / "text.txt").write_text("".join(LINES))
    out = home / "both"
    recipe = MergeRecipe(alpha=0.3)
    command = "bitsmith merge big small --text text.txt -o both"
    result = merge(
        teacher, student, home / "text.txt", out,
        recipe=recipe, ctx_tokens=32, samples=128, fallback=False, command=command,
    )  # fmt: skip
    return Made(out, result.record, load_study([out]))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study_page(tmp_path_factory.mktemp("page") / "merge.html", read_study(everything()))


@pytest.fixture(scope="module")
def tab(page: Path) -> Iterator[Tab]:
    with Browser() as browser:
        yield browser.open(page)


def test_a_merge_is_reported_with_its_models_and_what_was_decided(made: Made) -> None:
    original, teacher, merged = made.study.artifacts
    measures = made.record["measures"]
    assert original.is_original
    assert original.measures["ppl_cand"].value == measures["ppl_student"]["value"]
    assert teacher.measures["ppl_cand"].value == measures["ppl_teacher"]["value"]
    assert dict(merged.measures["ppl_ratio"]) == measures["ppl_merged_over_student"]
    assert (merged.name, merged.path, merged.verdict) == ("both", str(made.out), "adopted")
    found = made.study.merges[0]
    assert (found.teacher, found.student, found.is_adopted) == ("big", "small", True)
    assert [one.layer for one in found.places] == [0, 1, None]
    assert [one.teacher_layer for one in found.places[:2]] == made.record["layer_map"]
    assert found.places[0].taken_mixer == (0.3, 0.3)
    assert made.study.commands == (made.record["command"],)
    assert load_study([made.out.with_name("both.merge") / "merge.json"]) == made.study


def test_every_diagnostic_stands_beside_its_target(made: Made) -> None:
    merge = made.study.merges[0]
    table = diagnostics_table(merge)
    seen = made.record["diagnostics"]["layers"]
    cosine = next(at for at, name in enumerate(table.columns) if name.startswith("cosine"))
    assert table.columns[cosine].endswith("[≥ 0.8]")
    for row, layer in zip(table.rows, seen, strict=False):
        said = "met" if layer["met"]["cosine"] else "not met"
        assert row[cosine].value == layer["cosine"]["value"]
        assert row[cosine].text.endswith(f": {said}")
        assert "…" in row[cosine].text
        assert row[cosine].mark == said.replace(" ", "-")
    for target, row in zip(merge.targets, tally_table(merge).rows, strict=True):
        told = [one.met[target.figure] for one in merge.places if target.figure in one.met]
        assert [cell.value for cell in row[2:5]] == [told.count(one) for one in (True, False, None)]


def test_charts_and_tables_hold_the_same_figures(made: Made) -> None:
    blocks = [block for part in merge_parts(made.study) for block in part.blocks]
    charts = {chart.id: chart for block in blocks for chart in block.charts}
    layers = made.record["diagnostics"]["layers"]
    for name in ("cosine", "variance_kept", "transition_cost", "kurtosis_gap"):
        own = charts[f"merge-0-{name.replace('_', '-')}"].curves[0]
        assert list(own.y) == [one[name]["value"] for one in layers]
        assert list(own.low) == [one[name]["low"] for one in layers]
    profile = charts["merge-0-profile-map"]
    assert [list(row.y) for row in profile.curves] == [[0.3, 0.3, 0.3]] * 2
    kl = charts["merge-0-attention-teacher"]
    assert [list(row.y) for row in kl.curves] == [[g["value"] for g in one["attention_kl"]] for one in layers]
    assert all(block.table is not None for block in blocks)


def test_the_card_says_what_it_was_merged_of_and_the_outcome(made: Made, tmp_path: Path) -> None:
    card = write_report(tmp_path, made.study)[2].read_text(encoding="utf-8")
    assert "- merge\n" in card.split("---")[1]
    assert "quantized" not in card.split("---")[1]
    assert "both: big merged into small: adopted" in card
    assert "| teacher | big |" in card
    assert f"    {made.record['command']}" in card
    kept = {**made.record, "decision": {**made.record["decision"], "adopted": False, "reason": "no help"}}
    folder = tmp_path / "kept.merge"
    folder.mkdir()
    (folder / "merge.json").write_text(json.dumps(kept))
    said = model_card(load_study([folder]))
    assert (
        "kept: big merged into small: not adopted: the student's own tensors, bit for bit (no help)" in said
    )


def test_records_that_are_no_merges_are_refused(made: Made, tmp_path: Path) -> None:
    path = tmp_path / "merge.json"
    for broken in (
        {"kind": "merge"},
        made.record | {"decision": {}},
        made.record | {"alphas": {"layers": []}},
    ):
        path.write_text(json.dumps(broken))
        with pytest.raises(BitsmithError, match="is not what bitsmith writes") as refused:
            load_study([path])
        assert str(path) in str(refused.value)


def test_experiments_become_tables_and_lines() -> None:
    rows = [
        {"label": f"{n:,} tokens, {way}", "ppl": figure(20, "perplexity"), "kld_to_teacher": None,
         "ppl_over_student": figure(1 + 10 / n, "ratio"), "tokens": n, "judged_on": "code", "unmeasured": "",
         "recipe": {"map": "tiered"}}
        for n in (1000, 10_000, 50_000) for way in ("α by rule", "α 0.5")
    ]  # fmt: skip
    record = {
        "kind": "merge-experiments", "bitsmith": "0", "teacher": "a/big", "student": "b/small",
        "texts": {"text": {"name": "code", "path": "c.txt", "sha256": "d" * 64}},
        "protocol": {"ctx_tokens": 256}, "seconds": 2.0,
        "experiments": [{"name": "data-efficiency", "words": "How much?", "rows": rows}],
    }  # fmt: skip
    study = from_merge_experiments(record)
    table = experiment_table(study.experiments[0])
    assert table.columns == ("row", "perplexity", "perplexity / student's", "tokens")
    assert [row[3].value for row in table.rows] == [1000, 1000, 10_000, 10_000, 50_000, 50_000]
    block = experiment_parts(study)[0].blocks[0]
    assert "judged on: code" in block.note
    lines = {line.name: line for line in block.charts[0].curves}
    assert set(lines) == {"α by rule", "α 0.5"}
    assert list(lines["α by rule"].x) == [1000, 10_000, 50_000]
    assert lines["α 0.5"].low[0] == pytest.approx(1.01 * 0.9)


def test_the_page_draws_every_chart_with_targets_and_intervals(tab: Tab) -> None:
    assert tab.do(UNDRAWN) == []
    assert tab.do(f"{CHARTS}.every(id => one(id + '-says').textContent.length > 9)") is True
    assert tab.do("one('merge-0-cosine').layout.shapes.map(s => s.y0)") == [0.8]
    assert tab.do("one('merge-0-transition-cost').layout.shapes.map(s => s.y0)") == [0.1, 0.4]
    lines = "one('experiment-1-plot').data.filter(t => t.error_y).map(t => [t.x, t.error_y.array.length])"
    assert tab.do(lines) == [[[1000, 10_000, 140_000], 3]] * 2
    assert tab.do("one('experiment-1-plot').layout.xaxis.type") == "log"
    assert tab.do("one('experiment-0-plot').data[0].error_x.array.length") == 2
    assert tab.do("one('merge-0-attention-teacher').data[0].z") == [[0.5, None], [0.5, None]]
    assert tab.do("one('merge-0-taken-map').data[0].z[0]") == [0.05, 0.2, 0.15]
    assert "least 0.5 (layer 2)" in tab.do("one('merge-0-cosine-says').textContent")
    assert "target: ≥ 0.8" in tab.do("one('merge-0-cosine-says').textContent")
    assert tab.console == []
    assert tab.requests == []


def test_what_is_met_shows_in_words_and_colour(tab: Tab) -> None:
    cells = "all('#merge-0-layers td').filter(c => /met$/.test(c.textContent))"
    assert tab.do(f"{cells}.map(c => c.textContent.split(': ')[1])") == ["met", "not met", "not met", "met"]
    colours = tab.do(f"{cells}.map(c => getComputedStyle(c).color)")
    assert colours[0] == colours[3] != colours[1]
    tab.do("all('#merge-0-layers th button').find(b => b.textContent.startsWith('cosine')).click()")
    assert tab.do(f"{cells}.map(c => c.className)") == [
        *["number not-met"] * 2, "number met", "number met",
    ]  # fmt: skip


def test_parts_are_linked_and_hostile_names_stay_text(tab: Tab, page: Path) -> None:
    links = tab.do("all('nav a').map(a => a.getAttribute('href'))")
    assert links.index("#artifacts-h") < links.index("#merge-0") < links.index("#experiments")
    for part in ("merge-0-facts", "merge-0-trials", "merge-0-attention", "experiment-0", "experiment-2"):
        assert "</script><img" in tab.do(f"one('{part}').textContent"), part
    assert tab.do("document.querySelectorAll('body img, body b').length") == 0
    assert not set("\x1b\u202e") & set(page.read_text(encoding="utf-8"))
    card = model_card(read_study(everything()))
    outside = [line for line in card.split("\n") if not line.startswith("    ")]
    assert not any(re.search(r"(?<!\\)<", line) for line in outside)
    assert HOSTILE not in card
