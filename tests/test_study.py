"""Studies: what the YAML may say, the tasks it makes, whole runs, and runs that were killed."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bitsmith.cli.main import app
from bitsmith.errors import BitsmithError, OutputError
from bitsmith.report.study_json import read_study
from bitsmith.run.study import AUDIT, graph_of, load_study, run_study, study_status
from bitsmith.run.study_commands import compress_command
from bitsmith.run.task import in_order

STUDY = """
version: 1
models: {tiny: model}
texts: {calib: c.txt, held: h.txt}
calibration: {text: calib, ctx: 64, chunks: 4}
recipes:
  plain: {type: Q8_0, tensor-type: ["ffn_down=Q4_0"]}
  one: {type: Q4_K_M, stats: auto}
  two: {recipe: auto, target: 4.5bpw, stats: auto}
  kept: {type: i4}
evaluations:
  - {text: held, ctx: 64}
  - {text: held, ctx: 32, chunks: 2}
generate: {prompts: [import os]}
limits: {memory: 1GiB, retries: 2}
limits-of: {evaluate: {seconds: 9}}
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "study.yaml"
    path.write_text(text)
    return path


def test_tasks_need_what_their_parameters_name_and_statistics_are_collected_once(tmp_path: Path) -> None:
    tasks = {task.name: task for task in graph_of(load_study(written(tmp_path, STUDY)))}
    assert [name for name in tasks if name.startswith("calibrate")] == ["calibrate tiny"]
    assert tasks["compress tiny/one"].needs == tasks["compress tiny/two"].needs == ("calibrate tiny",)
    assert tasks["compress tiny/plain"].needs == ()
    assert tasks["compress tiny/plain"].params["tensor_types"] == [["ffn_down", "Q4_0"]]
    measured = tasks["evaluate tiny/one/held@32x2"]
    assert set(measured.needs) == {"compress tiny/one", "reference tiny/held@32x2"}
    assert measured.sources == ("model", "text")
    assert measured.limits == (9, None, None)
    assert (tasks["calibrate tiny"].limits.memory_bytes, tasks["calibrate tiny"].retries) == (1 << 30, 2)
    assert tasks["generate tiny/kept"].params["tokenizer"] == str(tmp_path / "model")
    assert len(in_order(tasks.values())) == len(tasks) == 1 + 1 + 2 + 1 + 4 * (1 + 2 + 1)


def test_commands_are_those_of_the_command_line(tmp_path: Path) -> None:
    study = load_study(written(tmp_path, STUDY))
    command = compress_command(study, "tiny", "plain", Path("o.gguf"))
    assert command == f"bitsmith compress {tmp_path}/model --type Q8_0 --tensor-type ffn_down=Q4_0 -o o.gguf"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("version: 1", "version: 2"), "line 2: version: input should be 1, found 2"),
        (("type: Q8_0", "tpye: Q8_0"), "line 7: recipes.plain.tpye: unknown key"),
        (("{tiny: model}", "{a/b: model}"), "line 3: models.a/b: a name is made of letters"),
        (
            ("- {text: held, ctx: 64}", "- {text: hold}"),
            "line 12: evaluations.0.text: there is no text 'hold'",
        ),
        (("ctx: 32", "ctx: 1"), "line 13: evaluations.1.ctx: input should be greater than or equal to 8"),
        (("calibration:", "texts:"), "'texts' is there twice, line 5"),
        (("1GiB", "4.5bpw"), "line 15: limits.memory: memory '4.5bpw' must be a size"),
        (("evaluate: {", "evaulate: {"), "line 16: limits-of.evaulate: no action"),
        (("{seconds: 9}", "{seconds: .nan}"), "line 16: limits-of.evaluate.seconds: input should be"),
        (("ffn_down=Q4_0", "ffn_down"), "line 7: recipes.plain.tensor-type: expected REGEX=TYPE"),
        (("limits:", "gates: {ppl: {below: 3}}\nlimits:"), "line 15: gates.ppl: no measure"),
        (
            ("limits:", "gates: {ppl_cand: {below: 3, at-most: 2}}\nlimits:"),
            "line 15: gates.ppl_cand: expected one of",
        ),
        (
            ("calibration: {text: calib, ctx: 64, chunks: 4}\n", ""),
            "recipes.one.stats: auto needs the study's",
        ),
        (("prompts: [import os]", "prompts: ["), "is not YAML at line"),
        (("{recipe: auto, target: 4.5bpw, stats: auto}", "*a"), "aliases are not allowed, line 9"),
        ((STUDY, "- 1"), "is not a study: expected names and values"),
        ((STUDY, ""), "is not a study: expected names and values"),
    ],
)
def test_a_bad_file_gets_one_line_with_the_place(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    assert change[0] in STUDY
    path = written(tmp_path, STUDY.replace(*change, 1))
    with pytest.raises(BitsmithError) as refused:
        load_study(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert "\n" not in str(refused.value)
    assert said in str(refused.value)


def test_a_missing_source_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(BitsmithError, match=r"line 3: models\.tiny: .*/model does not exist"):
        run_study(written(tmp_path, STUDY), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def tiny_study(folder: Path, model: Path, more: str = "") -> Path:
    (folder / "held.txt").write_text("def name(self, value):\n    return self.value + value\n" * 40)
    return written(
        folder,
        f"version: 1\ninspect: false\nmodels: {{tiny: {model}}}\n"
        f"recipes: {{q8: {{type: Q8_0}}, f16: {{type: F16}}}}\n{more}",
    )


MEASURED = """texts: {held: held.txt}
evaluations: [{text: held, ctx: 32, chunks: 2}]
generate: {prompts: [import os], tokens: 3}
gates: {mean_kld: {at-most: 1.0e-9}, top1_agreement: {at-least: 0}}
"""


def test_a_study_runs_once_and_says_what_it_did(
    tiny_qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = tiny_study(tmp_path, tiny_qwen3), tmp_path / "out"
    result = run_study(path, out, workers=2)
    assert (result.is_whole, result.counts()) == (True, {"done": 2, "failed": 0, "blocked": 0})
    shown = read_study(json.loads((out / "report.json").read_text()))
    assert [artifact.name for artifact in shown.artifacts] == ["tiny", "tiny/q8", "tiny/f16"]
    assert Path(shown.artifacts[1].path).stat().st_size == shown.artifacts[1].file_bytes
    assert shown.artifacts[1].tensors
    with pytest.raises(OutputError, match="--resume"):
        run_study(path, out)
    again = run_study(path, out, resume=True)
    assert [outcome.attempts for outcome in again.outcomes.values()] == [0, 0]
    status = study_status(out)
    assert (status.counts, status.reasons(), status.is_running) == ({"completed": 2}, [], False)
    monkeypatch.chdir(tmp_path)
    for artifact in shown.artifacts[1:]:
        for command in artifact.commands:
            app(shlex.split(command)[1:], standalone_mode=False)
        made = tmp_path / f"tiny-{artifact.recipe}.gguf"
        assert hashlib.sha256(made.read_bytes()).hexdigest() == artifact.sha256
    weights = hashlib.sha256((tiny_qwen3 / "model.safetensors").read_bytes()).hexdigest()
    assert {one.what: one.sha256 for one in shown.digests}["model tiny: model.safetensors"] == weights


@pytest.mark.slow
def test_a_whole_study_measures_samples_and_judges(tiny_qwen3: Path, tmp_path: Path) -> None:
    result = run_study(tiny_study(tmp_path, tiny_qwen3, MEASURED), tmp_path / "out", workers=2)
    assert result.counts()["done"] == len(result.tasks) == 8
    shown = read_study(result.to_json())
    q8 = shown.artifacts[1]
    assert (q8.verdict, shown.artifacts[0].is_original) == ("FAIL", True)
    assert q8.measures["mean_kld"].value > 0
    assert shown.artifacts[0].measures["ppl_cand"] == q8.measures["ppl_ref"]
    assert [passage.artifact for passage in shown.samples[0].passages] == ["tiny", "tiny/q8", "tiny/f16"]
    assert not result.is_whole
    assert "tiny/q8: mean_kld FAIL" in shown.summary


MORE = "texts: {held: held.txt}\ngenerate: {prompts: [import os], tokens: 3}\n"


def killed_after(path: Path, out: Path, seconds: float) -> None:
    code = (
        "import sys; from pathlib import Path; from bitsmith.run.study import run_study; "
        "run_study(Path(sys.argv[1]), Path(sys.argv[2]), workers=2, resume=True)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", code, path, out], env=environment)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_study_goes_on_and_computes_nothing_twice(tiny_qwen3: Path, tmp_path: Path) -> None:
    for name in ("calm", "killed"):
        (tmp_path / name).mkdir()
    calm = run_study(tiny_study(tmp_path / "calm", tiny_qwen3, MORE), tmp_path / "calm" / "out", workers=2)
    path, out = tiny_study(tmp_path / "killed", tiny_qwen3, MORE), tmp_path / "killed" / "out"
    for seconds in (1.0, 4.0, 7.0, 10.0):
        killed_after(path, out, seconds)
        time.sleep(0.2)
    resumed = run_study(path, out, workers=2, resume=True)
    assert {name: one.key for name, one in resumed.outcomes.items()} == {
        name: one.key for name, one in calm.outcomes.items()
    }
    for outcome in calm.outcomes.values():
        folder = resumed.outcomes[outcome.name].path
        assert outcome.path is not None
        assert folder is not None
        files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        for file in files:
            assert (folder / file).read_bytes() == (outcome.path / file).read_bytes(), file
    lines = [json.loads(line) for line in (out / AUDIT).read_text().splitlines()]
    for name in resumed.outcomes:
        of_task = [line for line in lines if line["what"] == f"task {name}"]
        done = next(n for n, line in enumerate(of_task) if line["decision"].endswith("completed"))
        starts_after = [line for line in of_task[done:] if line["decision"].endswith("in_progress")]
        assert not starts_after, f"{name} was computed again after it had finished"
