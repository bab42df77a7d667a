"""Merges in studies: what the YAML may say, the tasks it makes, and one whole run."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from bitsmith.cli import merge as merge_command_line
from bitsmith.cli.main import app
from bitsmith.errors import BitsmithError
from bitsmith.progress import silent
from bitsmith.report.model_card import model_card
from bitsmith.report.study_adapters import load_study as load_report
from bitsmith.report.study_json import read_study
from bitsmith.run.actions import ACTIONS, digest_of
from bitsmith.run.merge_inputs import MergeAsk
from bitsmith.run.merge_recipe import MergeRecipe
from bitsmith.run.study import graph_of, load_study, run_study
from bitsmith.run.study_commands import _MERGE_OPTIONS, merge_command, recipe_commands
from bitsmith.run.study_file import Merging
from bitsmith.run.study_merge import SWEEP_TRIALS, merge_options
from bitsmith.run.study_sources import check_study
from bitsmith.run.task import in_order
from paired_models import DENSE, LARGE, LINES, SMALL, write_model
from test_study_commands import parsed

STUDY = """
version: 1
models: {small: small}
texts: {calib: c.txt, held: h.txt}
calibration: {text: calib, ctx: 32, chunks: 4}
merges:
  both: {teacher: big, student: small, text: calib, held: held, ctx: 32, alpha: sweep, no-ends: true}
  flat: {teacher: ../other, student: small, text: calib, alpha: 0.25, layers: [0, 2], tokens: 64}
recipes:
  q8: {type: Q8_0}
  tuned: {type: Q4_K_M, stats: auto}
  cells: {type: i4}
evaluations:
  - {text: held, ctx: 32}
generate: {prompts: [import os]}
"""
OPTIONS = """
  both: {teacher: big, student: small, text: c, held: h, tokens: 640, ctx: 64, chunks: 8, samples: 99,
         layers: [0, 2], map: cca, basis: layer, trunk: 7, heads: pair, ffn: tie, alpha: 0.5, alpha-max: 0.75,
         no-ends: true, no-activations: true, no-fallback: true, seed: 3}
  swept: {teacher: big, student: small, text: c, alpha: sweep, budget: 5, layers: proportional}
"""


def written(folder: Path, text: str = STUDY) -> Path:
    path = folder / "study.yaml"
    path.write_text(text)
    return path


def models(folder: Path) -> None:
    """A teacher of three layers and a student of two, and texts for both."""
    write_model(folder / "big", 1, num_hidden_layers=3, **LARGE, **DENSE)
    write_model(folder / "small", 2, num_hidden_layers=2, **SMALL, **DENSE)
    (folder / "c.txt").write_text("".join(LINES[:150]))
    (folder / "h.txt").write_text("".join(LINES[150:]).replace("return", "yield"))


def test_a_merge_is_made_once_and_is_then_a_model_measured_against_its_student(tmp_path: Path) -> None:
    study = load_study(written(tmp_path))
    tasks = {task.name: task for task in graph_of(study)}
    made = tasks["merge both"]
    assert set(made.sources) == {"teacher", "student", "text", "held"}
    assert made.needs == ()
    assert made.params["teacher"] == str(tmp_path / "big")
    assert tasks["merge flat"].params["teacher"] == str(tmp_path.parent / "other")
    options = merge_options(made.params)
    assert MergeAsk(**options).recipe == MergeRecipe(ends=False)
    assert (options["sweep_budget"], options["held"]) == (SWEEP_TRIALS, tmp_path / "h.txt")
    flat = merge_options(tasks["merge flat"].params)
    assert (flat["layer_map"], flat["tokens"], flat["recipe"].alpha) == ([0, 2], 64, 0.25)
    alone = tasks["evaluate both/held"]
    assert set(alone.needs) == {"merge both", "reference small/held"}
    assert (alone.params["model"], alone.params["candidate"]) == (str(tmp_path / "small"), "merge both")
    assert tasks["compress both/q8"].needs == ("merge both",)
    assert set(tasks["compress both/tuned"].needs) == {"merge both", "calibrate both"}
    packed = tasks["evaluate both/q8/held"]
    assert set(packed.needs) == {"compress both/q8", "reference small/held"}
    assert packed.params["model"] == str(tmp_path / "small")
    assert tasks["generate both/cells"].params["tokenizer"] == str(tmp_path / "small")
    assert not any(name.startswith("reference both") for name in tasks)
    assert len(in_order(tasks.values())) == len(tasks)
    assert study.rows[:3] == [("both", ""), ("flat", ""), ("small", "q8")]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("student: small, text: calib, held", "student: tall, text: calib, held"),
         "line 7: merges.both.student: there is no model 'tall'; models: small"),
        (("teacher: big, student", "teacher: small, student"), "line 7: merges.both.teacher: is the student"),
        (("held: held,", "held: calib,"), "line 7: merges.both.held: is the text that the merge is made of"),
        (("held: held,", "held: hold,"), "line 7: merges.both.held: there is no text 'hold'"),
        (("no-ends: true", "no_ends: 1, ends: 2"), "merges.both"),
        (("alpha: 0.25", "alpha: 1.25"), "line 8: merges.flat.alpha"),
        (("alpha: 0.25", "alpha: 0.25, budget: 3"), "line 8: merges.flat.budget: is for alpha: sweep"),
        (("alpha: 0.25", "map: rotate"), "line 8: merges.flat.map"),
        (("layers: [0, 2]", "layers: [0, -2]"), "line 8: merges.flat.layers"),
        (("  flat:", "  small:"), "line 8: merges.small.student: small is a model already"),
        (("  flat:", "  a/b:"), "line 8: merges.a/b: a name is made of letters"),
    ],
)  # fmt: skip
def test_a_merge_that_cannot_be_gets_one_line_with_the_place(
    tmp_path: Path, change: tuple[str, str], said: str
) -> None:
    assert change[0] in STUDY
    with pytest.raises(BitsmithError) as refused:
        load_study(written(tmp_path, STUDY.replace(*change, 1)))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_models_that_do_not_merge_are_refused_before_anything_runs(tmp_path: Path) -> None:
    models(tmp_path)
    text = STUDY[: STUDY.index("recipes:")]
    only = "\n".join(line for line in text.split("\n") if "flat" not in line)
    check_study(load_study(written(tmp_path, only)))
    for change, said in (
        (("teacher: big", "teacher: none"), "line 7: merges.both.teacher: "),
        (("small: small", "small: big"), "line 7: merges.both"),
        (("{small: small}", "{small: big, less: small}"), "line 7: merges.both"),
        (("no-ends: true", "trunk: 900"), "line 7: merges.both: "),
        (("ctx: 32, alpha", "ctx: 2048, alpha"), "line 7: merges.both: "),
    ):
        assert change[0] in only
        with pytest.raises(BitsmithError) as refused:
            check_study(load_study(written(tmp_path, only.replace(*change, 1))))
        assert said in str(refused.value)
        assert "\n" not in str(refused.value)


def test_a_merge_prints_the_command_that_makes_it(tmp_path: Path) -> None:
    texts = "texts: {c: 'a c.txt', h: h.txt}\nmerges:"
    study = load_study(written(tmp_path, f"version: 1\nmodels: {{small: small}}\n{texts}{OPTIONS}"))
    given = parsed(merge_command(study, "both"))
    expected: dict[str, Any] = {
        "teacher": tmp_path / "big", "student": tmp_path / "small", "text": tmp_path / "a c.txt",
        "held": tmp_path / "h.txt", "tokens": 640, "ctx": 64, "chunks": 8, "samples": 99, "layers": "0,2",
        "map_name": "cca", "basis": "layer", "trunk": 7, "heads": "pair", "ffn": "tie", "alpha": "0.5",
        "alpha_max": 0.75, "ends": False, "activations": False, "fallback": False, "seed": 3,
        "out": Path("both"),
    }  # fmt: skip
    assert {name: given[name] for name in expected} == expected
    swept = parsed(merge_command(study, "swept"))
    assert (swept["alpha"], swept["budget"], swept["layers"]) == ("sweep", 5, "proportional")
    assert set(_MERGE_OPTIONS) == set(Merging.model_fields) - {"teacher", "student", "text", "held"}
    assert merge_command_line._TRIALS == SWEEP_TRIALS
    packed = load_study(written(tmp_path))
    *_, compressed, measured, _ = recipe_commands(packed, "both", "q8")
    assert parsed(compressed)["model"] == Path("both")
    assert parsed(measured)["candidate"] == Path("both-q8.gguf")


RUN = """
version: 1
models: {small: small}
texts: {calib: c.txt, held: h.txt}
merges:
  both: {teacher: big, student: small, text: calib, ctx: 32, samples: 128, alpha: 0.3, no-fallback: true}
recipes:
  q8: {type: Q8_0}
evaluations:
  - {text: held, ctx: 32, chunks: 6}
gates: {mean_kld: {below: 1000}}
inspect: false
"""


@pytest.mark.slow
def test_a_merge_is_the_same_artifact_wherever_it_is_made(tmp_path: Path) -> None:
    made = []
    for place in ("one", "other/deep"):
        home = tmp_path / place
        home.mkdir(parents=True)
        models(home)
        task = next(one for one in graph_of(load_study(written(home, RUN))) if one.name == "merge both")
        (home / "artifact").mkdir()
        facts = ACTIONS["merge"](task.params, {}, home / "artifact", silent)
        assert str(tmp_path) not in json.dumps(facts)
        made.append((facts, digest_of(home / "artifact")))
    assert made[0] == made[1]
    assert not list(tmp_path.rglob("paired"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_merge_then_compress_in_one_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models(tmp_path)
    result = run_study(written(tmp_path, RUN), tmp_path / "out")
    assert result.is_whole, result.to_json()["tasks"]
    shown = read_study(result.to_json())
    assert [row.name for row in shown.artifacts] == ["small", "both", "small/q8", "both/q8"]
    _, merged, _, packed = shown.artifacts
    assert (merged.group, merged.what, merged.verdict) == ("merged", "big merged into small", "PASS")
    assert merged.file_bytes == shown.artifacts[0].file_bytes
    assert merged.measures["ppl_ratio"].value != 1
    assert packed.measures["ppl_ratio"].value == pytest.approx(merged.measures["ppl_ratio"].value, rel=0.05)
    assert [one.name for one in shown.merges] == ["both"]
    assert shown.merges[0].places[0].taken_ffn == 0.3
    assert "## Merge: both" in model_card(load_report([tmp_path / "out"]))
    monkeypatch.chdir(tmp_path)
    for command in (*merged.commands[:1], *packed.commands[:1]):
        app(shlex.split(command)[1:], standalone_mode=False)
    assert digest_of(Path("both")) == merged.sha256
    assert digest_of(Path("both-q8.gguf")) == packed.sha256
