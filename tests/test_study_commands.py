"""Commands that a report prints: what the command line takes, and what makes the study's bytes again."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.core import TyperGroup

from bitsmith.cli.main import app
from bitsmith.report.study_json import read_study
from bitsmith.run.actions import digest_of
from bitsmith.run.study import load_study, run_study
from bitsmith.run.study_commands import _OPTIONS, model_commands, recipe_commands, study_command
from bitsmith.run.study_file import Recipe
from bitsmith.run.study_recipe import model_path

EVERYTHING = """
version: 1
models: {tiny: model}
texts: {calib: "c -o x.txt", held: h.txt}
calibration: {text: calib, ctx: 64, chunks: 4, block: 32, saliency: false}
recipes:
  plain: {type: Q8_0, tensor-type: ["ffn_down=Q4_0", "^a b$=F16"], pure: true, no-fallback: true}
  target: {recipe: auto, target: 4.5bpw, stats: auto, tune: true, tune-steps: 3, sequential: false}
  fits: {recipe: auto, fit: 8GiB, ctx: 4096, text: calib, transforms: "gauge,permute"}
  planned.gguf: {plan: plan.yaml, stats: "~/im atrix.dat", rounder: gptq}
  codes: {type: W4A16, group: 64, ignore: [lm_head, "re:.*v_proj"]}
  factors: {type: "SVD+INT4:bpw=4.5"}
  small: {type: i4, select: layers, like-seed: true}
  half: {type: F16, output: cellm}
  spi: {recipe: spi, critical: 3.9GB, by: random, seed: 3}
  sahc: {recipe: sahc, text: held, ctx: 128, chunks: 4, ppl-limit: 50.5, stats: auto}
evaluations: [{text: held, ctx: 64, chunks: 3}]
generate: {prompts: ["it's\\n--x", "-p"], tokens: 5, temperature: 0.7, seed: 4, chat: true}
claims: {text: held, calibration: calib, only: [flat-spectra, tt-gate], seed: 2}
assay: true
"""


def parsed(command: str) -> dict[str, Any]:
    """Return what the command line makes of a command, without running it."""
    program, *words = shlex.split(command)
    assert program == "bitsmith"
    found: Any = typer.main.get_command(app)
    while isinstance(found, TyperGroup):
        context: Any = found.make_context("bitsmith", list(words))
        _, found, words = found.resolve_command(context, [*context._protected_args, *context.args])
    return dict(found.make_context("bitsmith", list(words)).params)


def test_every_command_is_one_that_the_command_line_takes(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(EVERYTHING)
    study = load_study(tmp_path / "study.yaml")
    made = {
        name: [parsed(command) for command in recipe_commands(study, "tiny", name)] for name in study.recipes
    }
    jobs = {name: next(one for one in found if "type_name" in one) for name, found in made.items()}
    assert jobs["plain"]["tensor_type"] == ["ffn_down=Q4_0", "^a b$=F16"]
    assert (jobs["plain"]["pure"], jobs["plain"]["no_fallback"]) == (True, True)
    assert (jobs["target"]["tune_steps"], jobs["target"]["sequential"]) == (3, False)
    assert jobs["target"]["stats"] == Path("tiny-statistics") == made["target"][0]["out"]
    assert made["target"][0]["text"] == tmp_path / "c -o x.txt"
    assert (made["target"][0]["block"], made["target"][0]["saliency"]) == (32, False)
    assert (jobs["fits"]["ctx"], jobs["fits"]["text"]) == (4096, tmp_path / "c -o x.txt")
    assert jobs["planned.gguf"]["plan"] == tmp_path / "plan.yaml"
    assert jobs["planned.gguf"]["stats"] == Path("~/im atrix.dat").expanduser()
    assert jobs["codes"]["ignore"] == ["lm_head", "re:.*v_proj"]
    assert set(_OPTIONS) == set(Recipe.model_fields) - {"output"}
    assert (jobs["sahc"]["chunks"], jobs["sahc"]["ctx"], jobs["sahc"]["ppl_limit"]) == (4, 128, 50.5)
    assert (jobs["spi"]["critical"], jobs["spi"]["by"], jobs["spi"]["seed"]) == ("3.9GB", "random", 3)
    outs = {name: str(one["out"]) for name, one in jobs.items()}
    assert outs["planned.gguf"] == "tiny-planned.gguf.gguf"
    assert (outs["small"], outs["half"], outs["factors"]) == (
        "tiny-small.cellm",
        "tiny-half.cellm",
        "tiny-factors",
    )
    for name, (*_, evaluated, first, second) in made.items():
        assert evaluated["candidate"] == first["model"] == jobs[name]["out"]
        assert (first["prompt"], second["prompt"]) == ("it's\n--x", "-p")
        assert (first["temperature"], first["seed"], first["gen"], first["chat"]) == (0.7, 4, 5, True)
    originals = [parsed(command) for command in model_commands(study, "tiny")]
    assert next(one["only"] for one in originals if "only" in one) == "flat-spectra,tt-gate"
    whole = parsed(study_command(Path("a b.yaml"), Path("out")))
    assert (whole["file"], whole["out"]) == (Path("a b.yaml"), Path("out"))


KINDS = """
texts: {held: held.txt}
calibration: {text: held, ctx: 32, chunks: 8}
recipes:
  mixed: {type: Q4_K_M, stats: auto}
  auto: {recipe: auto, target: 6bpw, stats: auto}
  cellm: {type: i4, stats: auto}
  codes: {type: W4A16, stats: auto}
  nf4: {type: NF4}
  factors: {type: "SVD+INT4:bpw=6", stats: auto}
  spi: {recipe: spi, critical: "3"}
  sahc: {recipe: sahc, text: held, ctx: 32, chunks: 4}
evaluations: [{text: held, ctx: 32, chunks: 2}]
generate: {prompts: [import os], tokens: 3}
limits: {retries: 0}
"""


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_printed_commands_make_every_kind_again(
    tiny_qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "held.txt").write_text("def name(self, value):\n    return self.value + value\n" * 60)
    (tmp_path / "study.yaml").write_text(f"version: 1\nmodels: {{tiny: {tiny_qwen3}}}\n{KINDS}")
    result = run_study(tmp_path / "study.yaml", tmp_path / "out", workers=2)
    shown = read_study(result.to_json())
    unmade = {task.name: task.why for task in shown.tasks if task.status != "done"}
    assert set(unmade) <= {"evaluate tiny/sahc/held", "generate tiny/sahc"}, unmade
    monkeypatch.chdir(tmp_path)
    done: set[str] = set()
    for artifact in (one for one in shown.artifacts[1:] if one.sha256):
        for command in (command for command in artifact.commands if command not in done):
            app(shlex.split(command)[1:], standalone_mode=False)
            done.add(command)
        out = tmp_path / model_path(result.study, "tiny", artifact.recipe)
        assert digest_of(out) == artifact.sha256, artifact.name
    assert len(done) >= 8
