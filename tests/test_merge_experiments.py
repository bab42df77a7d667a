"""Experiments on merging: the seed's are all there, rows measure what they say, a killed run goes on."""

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

from bitsmith.errors import BitsmithError, OutputError
from bitsmith.lab.embedded import Sizes as EmbeddedSizes
from bitsmith.lab.embedded import embed_student
from bitsmith.lab.merge_cases import (
    RULE,
    Distilled,
    Merged,
    Original,
    Shares,
    Sizes,
    Source,
    Turned,
    alphas_of,
    everywhere,
    mean_alpha,
)
from bitsmith.lab.merge_catalog import EXPERIMENTS
from bitsmith.lab.merge_experiments import JOURNAL_NAME, RESULT_NAME, WORK_NAME, merge_experiments
from bitsmith.lab.merge_ranges import over_layers
from bitsmith.lab.merge_tasks import TASKS, code_of, prose_of, task_text, write_task_text
from bitsmith.lab.merge_turns import alike_when_turned
from bitsmith.passes.transform import model_of
from bitsmith.report.study_adapters import load_study
from bitsmith.run.evaluate import evaluate
from bitsmith.run.merge_plan import merge_plan
from bitsmith.run.merge_recipe import HEADS
from bitsmith.run.paired import paired
from bitsmith.store import open_checkpoint
from paired_models import DENSE, LARGE, LINES, SMALL, write_model

FIGURES = ("ppl", "ppl_over_student", "kld_to_teacher")
SIZES = Sizes(layers=2, tokens=2048, other_tokens=1024, held_tokens=512, ctx_tokens=32)
SHORT: dict[str, Any] = {"tokens": 512, "ctx_tokens": 32, "chunks": 4}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Random weights: a teacher and a student that have nothing in common."""
    folder = tmp_path_factory.mktemp("pair")
    student = write_model(folder / "student", 1, num_hidden_layers=2, **DENSE, **SMALL)
    return write_model(folder / "teacher", 2, num_hidden_layers=3, **DENSE, **LARGE), student


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two tasks' texts, and what each is measured on."""
    folder = tmp_path_factory.mktemp("texts")
    other = [f"The value of term {n} is {n * n % 977}, which is more than {n}.\n" for n in range(120)]
    parts = {"text": LINES[:150], "held": LINES[150:], "other": other[:90], "other_held": other[90:]}
    for name, lines in parts.items():
        (folder / f"{name}.txt").write_text("".join(lines))
    return {name: folder / f"{name}.txt" for name in parts}


def run(models: tuple[Path, Path], out: Path, texts: dict[str, Path], **options: Any) -> dict[str, Any]:
    return merge_experiments(*models, out, **texts, **SHORT | options).to_json()


def rows_of(record: dict[str, Any], name: str) -> dict[str, dict[str, Any]]:
    rows = next(one["rows"] for one in record["experiments"] if one["name"] == name)
    return {row["label"]: row for row in rows}


def without_times(value: Any) -> Any:
    """Return a record without what differs from run to run."""
    if isinstance(value, dict):
        varies = ("seconds", "resumed", "peak_memory_bytes")
        return {name: without_times(one) for name, one in value.items() if name not in varies}
    return [without_times(one) for one in value] if isinstance(value, list | tuple) else value


def test_a_docstring_is_prose_and_no_code() -> None:
    source = '"""Module.\n\nMore of it.\n"""\n\nclass A:\n    """Of A."""\n    x = "no docstring"\n'
    source += "    async def f(self):\n        r'''Raw \\d.'''\n        return \"\"\"text\"\"\"\n"
    source += "\ndef g(): 'one line'\n"
    code = code_of(source)
    assert "Module" not in code and "Of A" not in code and "Raw" not in code
    assert 'x = "no docstring"' in code and 'return """text"""' in code
    assert "def g(): 'one line'" in code  # on the line of its def: that would go with it
    assert prose_of(source) == "Module.\n\nMore of it.\n\nOf A.\n\nRaw \\d.\n\none line\n"
    with pytest.raises(SyntaxError):
        code_of("def f(:\n")


def test_texts_of_tasks_come_out_of_their_split_alone() -> None:
    for task in TASKS:
        seen, held = task_text(task, 4000), task_text(task, 4000, held_out=True)
        assert 2000 < len(seen.encode()) <= 4000 and 2000 < len(held.encode()) <= 4000
        assert seen[:500] not in held and held[:500] not in seen
        assert seen == task_text(task, 4000)
        assert task_text(task, 2000) == seen.encode()[:2000].decode("utf-8", "ignore")
    with pytest.raises(BitsmithError, match="unknown task 'prosa'; known: code prose"):
        task_text("prosa", 10)


def test_written_text_replaces_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "code.txt").write_text("old")
    assert write_task_text("code", tmp_path / "code.txt", 300).read_text() == task_text("code", 300)


def test_all_of_the_seeds_experiments_are_there() -> None:
    rows = {name: list(one.rows(SIZES)) for name, one in EXPERIMENTS.items()}
    baselines = rows["baselines"]
    recipes = [row.recipe for row in baselines if isinstance(row, Merged)]
    assert {recipe.map for recipe in recipes} == {"tiered", "svd"}
    assert any(not recipe.activations for recipe in recipes)
    assert any(isinstance(row, Merged) and row.shares == everywhere(0.5) for row in baselines)
    assert any(isinstance(row, Distilled) for row in baselines)
    ablated = [row for row in rows["ablations"] if isinstance(row, Merged)]
    assert {"tiered", "joint", "svd"} == {row.recipe.map for row in ablated}
    assert {True, False} == {row.recipe.activations for row in ablated}
    assert {"rule", "mean", "all"} == {row.shares.where for row in ablated}
    rivals = {row.recipe.map for row in rows["rivals"] if isinstance(row, Merged)}
    assert rivals == {"tiered", "cross", "cca", "ridge", "random-fold", "sparse-fold"}
    found = {row.source.tokens for row in rows["data-efficiency"] if isinstance(row, Merged | Distilled)}
    assert found == {1000, None}
    long = EXPERIMENTS["data-efficiency"].rows(replace(SIZES, tokens=200_000))
    found = {row.source.tokens for row in long if isinstance(row, Merged)}
    assert found == {1000, 10_000, 50_000, 140_000, None}
    moved = {(row.source.task, row.judged) for row in rows["task-transfer"] if isinstance(row, Merged)}
    assert moved == {(a, b) for a in ("text", "other") for b in ("held", "other_held")}
    blended = [row for row in rows["blend"] if isinstance(row, Merged)]
    assert {weight for row in blended for _, weight in row.blend} == {0.3, 0.5, 0.7}
    assert {row.judged for row in blended} == {"held", "other_held", "mixed"}
    alone = [row for row in rows["layer-sensitivity"] if isinstance(row, Merged)]
    places = {(row.shares.where, row.shares.layer) for row in alone}
    assert places >= {(where, n) for where in ("layer", "mixer", "ffn") for n in (0, 1)}
    swept = [row.shares for row in rows["alpha-sweep"] if isinstance(row, Merged)]
    assert {0.0, 1.0} <= {one.alpha for one in swept} and {one.layer for one in swept} == {None, 0, 1}
    assert {row.source.part for row in rows["sparse-data"] if isinstance(row, Merged)} == {0, 1, 2}
    heads = {row.recipe.heads for row in rows["gqa"] if isinstance(row, Merged)}
    assert heads == set(HEADS) > {"match", "pair", "prune", "turn", "frozen-kv"}
    assert {row.span for row in rows["gqa-rotations"] if isinstance(row, Turned)} == {
        "all heads",
        "KV group",
        "value channels",
    }


def test_labels_name_one_row_each_and_keys_one_measurement() -> None:
    for name, one in EXPERIMENTS.items():
        rows = one.rows(SIZES)
        assert len({row.label for row in rows}) == len(rows), name
        assert all(row.label and "α ," not in row.label for row in rows)
    first = Merged("one", shares=everywhere(0.5))
    assert first.key == replace(first, label="other", series="x").key
    others = (
        replace(first, shares=RULE),
        replace(first, source=Source("other")),
        replace(first, judged="mixed"),
        replace(first, recipe=replace(first.recipe, map="svd")),
        Original("one"),
    )
    assert len({one.key for one in (first, *others)}) == 6


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_rows_are_what_a_merge_measured_by_hand_is(
    models: tuple[Path, Path], texts: dict[str, Path], tmp_path: Path
) -> None:
    record = run(models, tmp_path / "out", texts, only=["baselines", "alpha-sweep"])
    rows = rows_of(record, "alpha-sweep")
    alone = rows_of(record, "baselines")["student"]
    assert rows["everywhere, α 0"]["ppl"] == alone["ppl"]
    assert rows["everywhere, α 0"]["ppl_over_student"]["value"] == 1
    teacher = rows_of(record, "baselines")["teacher"]
    by_hand = evaluate(models[0], models[1], texts["held"], SHORT["ctx_tokens"], SHORT["chunks"])
    assert alone["ppl"]["value"] == pytest.approx(by_hand.ppl_cand.value, rel=1e-6)
    assert teacher["ppl"]["value"] == pytest.approx(by_hand.ppl_ref.value, rel=1e-6)
    assert alone["kld_to_teacher"]["value"] == pytest.approx(by_hand.mean_kld.value, rel=1e-4)
    assert teacher["kld_to_teacher"]["value"] == 0
    assert rows["everywhere, α 0.5"]["ppl"] != rows["everywhere, α 1"]["ppl"]
    assert rows["layer 0, α 1"]["ppl"] != rows["layer 1, α 1"]["ppl"]
    for row in rows.values():
        assert row["unmeasured"] == "" and row["tokens"] == 512 and row["judged_on"] == "held.txt"
        for name in FIGURES:
            assert row[name]["low"] <= row[name]["value"] <= row[name]["high"]
            assert row[name]["interval"] == "95 % paired bootstrap over chunks"
    distilled = [row for row in rows_of(record, "baselines").values() if row["kind"] == "distilled"]
    assert len(distilled) == 1 and distilled[0]["distillation"]["fit_tokens"] < 512
    assert distilled[0]["ppl_over_student"]["value"] <= 1.01


@pytest.mark.slow
def test_a_run_on_an_embedded_student_gives_the_student_back(
    models: tuple[Path, Path], texts: dict[str, Path], tmp_path: Path
) -> None:
    teacher = embed_student(
        models[1], tmp_path / "teacher", EmbeddedSizes(hidden=48, layers=[None, 0, 1], ffn=56)
    ).path
    record = run((teacher, models[1]), tmp_path / "out", texts, only=["alpha-sweep", "gqa-rotations"])
    for row in rows_of(record, "alpha-sweep").values():
        assert row["ppl_over_student"]["value"] == pytest.approx(1, abs=2e-3)
        assert row["cosine"] == pytest.approx(1, abs=1e-3)
    for row in rows_of(record, "gqa-rotations").values():
        assert row["ppl"] is None and row["unmeasured"] == ""
        assert row["unturned"] == pytest.approx(1, abs=1e-3)
    values = [r for n, r in rows_of(record, "gqa-rotations").items() if "value channels" in n]
    assert all(0.5 < row["explained"]["value"] <= 1 + 1e-9 for row in values)


@pytest.mark.slow
def test_a_row_that_cannot_be_had_says_why_and_the_others_stay(
    models: tuple[Path, Path], texts: dict[str, Path], tmp_path: Path
) -> None:
    record = run(models, tmp_path / "out", texts, only=["gqa-rotations", "alpha-sweep"], chunks=1)
    row = rows_of(record, "alpha-sweep")["everywhere, α 0.5"]
    assert row["ppl"]["low"] is None and row["ppl"]["interval"] == "unmeasured"
    for row in rows_of(record, "gqa-rotations").values():
        assert row["ppl"] is None and "two chunks of 32 are the least" in row["unmeasured"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"only": ["alpha"]}, "unknown experiment 'alpha'; known: baselines"),
        ({"chunks": 0}, "0 chunks leave nothing to measure"),
        ({"tokens": 63}, "63 tokens are too few: two chunks of 32 are the least"),
        ({"text": None}, "give both --text and --held"),
        ({"other_held": None}, "give both --other and --other-held"),
        ({"held": Path("nowhere.txt")}, "nowhere.txt: does not exist"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_made(
    models: tuple[Path, Path], texts: dict[str, Path], tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(BitsmithError, match=said):
        run(
            models, tmp_path / "out", texts | {n: options.pop(n) for n in [*options] if n in texts}, **options
        )
    assert not (tmp_path / "out").exists()


def test_models_and_texts_that_do_not_fit_are_refused(
    models: tuple[Path, Path], texts: dict[str, Path], tmp_path: Path
) -> None:
    teacher, student = models
    with pytest.raises(BitsmithError, match="the teacher has to be the larger"):
        run((student, teacher), tmp_path / "out", texts)
    with pytest.raises(BitsmithError, match="both a teacher and a student"):
        merge_experiments(teacher, None, tmp_path / "out")
    with pytest.raises(BitsmithError, match="does not exist"):
        run((tmp_path / "nowhere", student), tmp_path / "out", texts)
    with pytest.raises(BitsmithError, match="is the same text as"):
        run(models, tmp_path / "out", texts | {"held": texts["text"]})
    short = tmp_path / "short.txt"
    short.write_text("def f(x): return x * 7 + 3 * (x - 1) + 12345\n" * 2)
    with pytest.raises(BitsmithError, match="2 chunks of 32 are the least"):
        run(models, tmp_path / "out", texts | {"other": short})
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe" * 400)
    with pytest.raises(BitsmithError, match="is not UTF-8"):
        run(models, tmp_path / "out", texts | {"held": tmp_path / "bytes.txt"})
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        run(models, tmp_path / "file", texts)
    assert (tmp_path / "file").read_text() == ""


def test_a_result_is_kept_and_its_cost_is_said_first(
    models: tuple[Path, Path], texts: dict[str, Path], tmp_path: Path
) -> None:
    out, said = tmp_path / "out", list[Any]()
    record = run(models, out, texts, only=["gqa-rotations"], say_cost=said.extend)
    assert [one.piece for one in said] == ["paired activations"]
    assert all(one.claims == ("gqa-rotations",) and one.multiply_adds > 0 for one in said)
    assert json.loads((out / RESULT_NAME).read_text()) == json.loads(json.dumps(record))
    assert not (out / WORK_NAME).exists() and not (out / JOURNAL_NAME).exists()
    with pytest.raises(OutputError, match="pass --overwrite"):
        run(models, out, texts, only=["gqa-rotations"])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_blend_lies_between_two_tasks(
    models: tuple[Path, Path], texts: dict[str, Path], tmp_path: Path
) -> None:
    said = list[Any]()
    record = run(models, tmp_path / "out", texts, only=["blend"], say_cost=said.extend)
    assert {one.piece for one in said} == {"paired activations", "both models", "merges"}
    rows = rows_of(record, "blend")
    half = rows["0.5 of the task's map, 0.5 of the other's, judged on both by turns, α 0.5"]
    assert half["blend"] == [["other.txt", 0.5]]
    assert half["judged_on"] == "held.txt and other_held.txt by turns"
    ends = [rows[f"{n} of the task's map, {1 - n} of the other's, judged on the task, α 0.5"] for n in (0, 1)]
    assert len({row["ppl"]["value"] for row in (*ends, half)}) == 3


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_report_shows_every_row(
    models: tuple[Path, Path], texts: dict[str, Path], tmp_path: Path
) -> None:
    record = run(models, tmp_path / "out", texts, only=["gqa", "data-efficiency"])
    study = load_study([tmp_path / "out" / RESULT_NAME])
    shown = {one.name: one.rows for one in study.experiments}
    for one in record["experiments"]:
        assert [row.label for row in shown[one["name"]]] == [row["label"] for row in one["rows"]]
    row = rows_of(record, "gqa")["a rotation in each KV group, α 0.5"]
    assert row["attention_kl_unturned"]["interval"] == "range over layers and KV groups"
    assert row["attention_kl"]["low"] <= row["attention_kl"]["value"] <= row["attention_kl"]["high"]


def test_figures_over_layers_leave_out_what_is_none() -> None:
    one = {"value": 1.0, "unit": "nats", "low": None, "high": None, "interval": "unmeasured"}
    layers = [
        {"kl": [one, one | {"value": 3.0}], "cosine": one, "layer": 0, "met": {"cosine": True}},
        {"kl": [], "cosine": one | {"value": 2.0}, "layer": 1, "met": {"cosine": False}},
    ]
    found = over_layers({"layers": layers, "final": {"met": {"cosine": None}}})
    assert found["kl"] == {
        **one,
        "value": 2.0,
        "low": 1.0,
        "high": 3.0,
        "interval": "range over layers and KV groups",
    }
    assert found["cosine"]["value"] == 1.5 and found["cosine_met"] == "1 of 2" and "layer" not in found


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_killed_run_goes_on_and_gives_the_same(
    models: tuple[Path, Path], texts: dict[str, Path], tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    said = {name: str(path) for name, path in texts.items()}
    program = f"""
import sys
from pathlib import Path
from bitsmith.lab.merge_experiments import merge_experiments
texts = {{name: Path(path) for name, path in {said!r}.items()}}
merge_experiments(Path({str(models[0])!r}), Path({str(models[1])!r}), Path(sys.argv[1]),
    tokens=512, ctx_tokens=32, chunks=4, only=["gqa", "baselines"],
    progress=lambda stage, done, total: print(stage, done, flush=True), **texts)
"""
    for stop in (3, 9):
        command = [sys.executable, "-c", program, str(killed)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            for line in child.stdout:
                if line == f"rows {stop}\n":
                    child.send_signal(signal.SIGKILL)
        assert child.returncode == -signal.SIGKILL
    subprocess.run([sys.executable, "-c", program, str(killed)], check=True, stdout=subprocess.DEVNULL)
    run(models, whole, texts, only=["gqa", "baselines"])
    ours, theirs = (json.loads((folder / RESULT_NAME).read_text()) for folder in (killed, whole))
    assert ours["resumed"] > 0 and theirs["resumed"] == 0
    assert without_times(ours) == without_times(theirs)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_experiments_run_end_to_end(
    models: tuple[Path, Path], texts: dict[str, Path], tmp_path: Path
) -> None:
    record = run(models, tmp_path / "out", texts, tokens=2048)
    assert [one["name"] for one in record["experiments"]] == list(EXPERIMENTS)
    for one in record["experiments"]:
        for row in one["rows"]:
            assert row["unmeasured"] == "", (one["name"], row["label"], row["unmeasured"])


def test_shares_reach_the_places_they_name(
    models: tuple[Path, Path], texts: dict[str, Path], tmp_path: Path
) -> None:
    teacher, student = (model_of(open_checkpoint(path)) for path in models)
    found = paired(*models, texts["text"], tmp_path / "paired", tokens=512, ctx_tokens=32)
    plan = merge_plan(found, teacher, student)
    one = alphas_of(plan, Shares("ffn", 0.5, 1)).to_json()
    assert one == {
        "layers": [{"mixer": [0.0], "ffn": 0.0}, {"mixer": [0.0], "ffn": 0.5}],
        "embedding": 0.0,
        "head": 0.0,
    }
    assert alphas_of(plan, Shares("ends", 0.5)).to_json()["head"] == 0.5
    assert mean_alpha(alphas_of(plan, everywhere(0.25))) == 0.25
    assert alphas_of(plan, RULE) is plan.alphas
    mean = alphas_of(plan, Shares("mean"))
    assert mean_alpha(mean) == pytest.approx(mean_alpha(plan.alphas))
    whole = alike_when_turned(plan, [found], found, "all heads")
    blocks = alike_when_turned(plan, [found], found, "KV group")
    assert whole["explained"]["value"] >= blocks["explained"]["value"] >= whole["unturned"]
    assert whole["explained"]["interval"] == "unmeasured" and np.isfinite(whole["turn"]["value"])
