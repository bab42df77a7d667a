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
from bitsmith.errors import BitsmithError, DamagedFileError, OutputError
from bitsmith.report.study_json import read_study
from bitsmith.run.graph import LOCK
from bitsmith.run.study import AUDIT, graph_of, load_study, run_study, study_status
from bitsmith.run.study_commands import compress_command
from bitsmith.run.study_recipe import model_name
from bitsmith.run.study_sources import check_study
from bitsmith.run.task import in_order
from bitsmith.run.task_state import StateFile, Status, TaskState
from bitsmith.store.artifacts import locked_folder

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


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a: &a [x]\nb: [*a, *a]\nmodels: {a: b}\n", "aliases are not allowed, line 2"),
        (b"version: 1\nmodels: {a: \xff}\n", "is not UTF-8 at offset 23"),
        (b'version: 1\nmodels: {a: "x\\0y"}\n', "a value holds what no text does, line 2"),
        (b'version: 1\nmodels: {a: "\\ud800"}\n', "a value holds what no text does, line 2"),
        (b"version: 1\nmodels: {a: \x00}\n", "unacceptable character"),
        (b"version: 1\nmodels: {a: b}\nlimits: {memory: " + b"9" * 5000 + b"}\n", "Exceeds the limit"),
        (b"version: 1\nmodels: {a: b}\nlimits: {memory: true}\n", "line 3: limits.memory: expected a size"),
        (b"version: 1\nmodels: " + b"{a: " * 3000 + b"}" * 3000, "maximum recursion depth exceeded"),
        (b"version: 1\nmodels: !!python/object/apply:os.system [ls]\n", "is not YAML at line 2"),
        (b" " * (1 << 20) + b"#", "is larger than 1048576 bytes"),
    ],
)
def test_an_attack_gets_one_line(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_bytes(content)
    with pytest.raises(BitsmithError) as refused:
        load_study(path)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(BitsmithError, match="is a folder or a device"):
            load_study(path)
    with pytest.raises(BitsmithError, match="No such file"):
        load_study(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("recipes: {q: {type: Q9_Z}}", "recipes.q: unknown type 'Q9_Z'"),
        ("recipes: {q: {type: 'SVD+INT4:bpw=x'}}", "recipes.q: SVD+INT4"),
        ("recipes: {q: {type: Q4_0, like-seed: true}}", "recipes.q: a GGUF is not made with --like-seed"),
        ("recipes: {q: {type: i4, pure: true}}", "recipes.q: a .cellm file is not made with --pure"),
        ("recipes: {q: {type: W4A16, output: gguf}}", "recipes.q: model.gguf: W4A16 makes a folder"),
        (
            "recipes: {q: {recipe: sahc, text: t, type: Q4_0}}",
            "recipes.q: recipe sahc is not made with --type",
        ),
        ("recipes: {q: {recipe: spi, critical: many}}", "recipes.q: critical 'many' is not understood"),
        ("recipes: {q: {recipe: auto, target: lots}}", "recipes.q: target 'lots' is not understood"),
        ("recipes: {q: {type: Q4_0, rounder: gptq}}", "recipes.q: rounder gptq needs statistics"),
        (
            "recipes: {q: {type: Q4_0, tensor-type: [zzz=Q8_0]}}",
            "recipes.q: tensor type zzz=Q8_0 changes nothing",
        ),
        ("recipes: {q: {plan: p.yaml}}", "recipes.q.plan: "),
        ("recipes: {q: {type: Q4_0, stats: nix}}", "recipes.q.stats: "),
        ("recipes: {q: {recipe: foo}}", "recipes.q.recipe: input should be 'auto'"),
        ("peers: t.txt", "is not JSON"),
        ("peers: nix.json", "peers: "),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(
    demo_model: Path, tmp_path: Path, lines: str, said: str
) -> None:
    (tmp_path / "t.txt").write_text("text")
    path = written(tmp_path, f"version: 1\nmodels: {{tiny: {demo_model}}}\ntexts: {{t: t.txt}}\n{lines}\n")
    with pytest.raises(BitsmithError) as refused:
        run_study(path, tmp_path / "out")
    assert said in str(refused.value)
    assert "line 4" in str(refused.value) or "t.txt" in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_one_model_cannot_take_is_a_matter_of_its_task(
    demo_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    recipes = "recipes: {q: {type: Q4_0}}"
    path = written(tmp_path, f"version: 1\nmodels: {{tiny: {demo_model}, none: empty}}\n{recipes}\n")
    assert check_study(load_study(path)) == []


def test_a_missing_source_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(BitsmithError, match=r"line 3: models\.tiny: .*/model does not exist"):
        run_study(written(tmp_path, STUDY), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_status_of_what_is_no_study_is_one_line(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(BitsmithError, match="holds no study that was begun"):
            study_status(folder)
    entry = '{"key": "", "action": "a", "needs": [], "reason": 5, "status": "failed"}'
    for text in ("{", "[" * 100_000, "[]", f'{{"tasks": {{"a": {entry}}}, "decision_log": []}}'):
        (tmp_path / "state.json").write_text(text)
        with pytest.raises(DamagedFileError, match="is no state of a study"):
            study_status(tmp_path)


def test_a_status_tells_whether_the_study_runs(tmp_path: Path) -> None:
    state = TaskState("key", "inspect", [], Status.IN_PROGRESS, reason="attempt 1")
    StateFile(tmp_path, {"inspect tiny": state}, []).write()
    with locked_folder(tmp_path, LOCK):
        found = study_status(tmp_path)
        assert (found.is_running, found.reasons()) == (True, [("inspect tiny", "in_progress", "attempt 1")])
    found = study_status(tmp_path)
    assert not found.is_running
    assert "has ended; go on with --resume" in found.reasons()[0][2]


def tiny_study(folder: Path, model: Path, more: str = "") -> Path:
    (folder / "held.txt").write_text("def name(self, value):\n    return self.value + value\n" * 40)
    return written(
        folder,
        f"version: 1\ninspect: false\nmodels: {{tiny: {model}}}\n"
        f"recipes: {{q8: {{type: Q8_0}}, f16: {{type: F16}}}}\n{more}",
    )


MEASURED = """texts: {held: held.txt}
assay: true
peers: peers.json
claims: {text: held, calibration: held, only: [flat-spectra], ctx: 32, chunks: 2}
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
@pytest.mark.timeout(1800)
def test_a_whole_study_measures_samples_and_judges(tiny_qwen3: Path, tmp_path: Path) -> None:
    peer = {"name": "other", "source": "card", "same_protocol": False, "bpw": 4.5}
    (tmp_path / "peers.json").write_text(json.dumps([peer]))
    result = run_study(tiny_study(tmp_path, tiny_qwen3, MEASURED), tmp_path / "out", workers=2)
    assert result.counts()["done"] == len(result.tasks) == 10
    shown = read_study(result.to_json())
    q8 = shown.artifacts[1]
    assert (q8.verdict, shown.artifacts[0].is_original) == ("FAIL", True)
    assert q8.measures["mean_kld"].value > 0
    assert shown.artifacts[0].measures["ppl_cand"] == q8.measures["ppl_ref"]
    assert [passage.artifact for passage in shown.samples[0].passages] == ["tiny", "tiny/q8", "tiny/f16"]
    assert not result.is_whole
    again = read_study(run_study(tmp_path / "study.yaml", tmp_path / "out", resume=True).to_json())
    judged = [[line.what for line in one.gates if line.who == "study"] for one in (shown, again)]
    assert (
        judged[0]
        == judged[1]
        == [f"tiny/{row}: {gate}" for row in ("q8", "f16") for gate in result.study.gates]
    )
    assert (shown.peers[0].name, shown.peers[0].bpw) == ("other", 4.5)
    assert [claim.claim.split(":")[0] for claim in shown.claims] == ["flat-spectra"]
    assert {one.layer for one in shown.spectra} >= {0, 1}
    assert all(one.sigma for one in shown.spectra)
    assert {one.what for one in shown.digests} >= {"model tiny", "text held", "tiny/q8", "tiny/f16"}
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


EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny.yaml"


def example(folder: Path) -> Path:
    """Return the example's file with its text beside it, as its first lines say to make them."""
    lines = EXAMPLE.read_text().splitlines()
    commands = [line.removeprefix("#").strip() for line in lines if line.startswith("#   bitsmith ")]
    words = shlex.split(commands[0])
    assert words[:3] == ["bitsmith", "lab", "text"]
    assert commands[1].startswith(f"bitsmith study {EXAMPLE.name} -o ")
    place = folder / "examples"
    place.mkdir()
    (folder / "src").symlink_to(EXAMPLE.parents[1] / "src")
    (place / EXAMPLE.name).write_text(EXAMPLE.read_text())
    app([*words[1:3], str(place / words[3]), *words[4:]], standalone_mode=False)
    return place / EXAMPLE.name


def test_the_example_loads_and_plans(tmp_path: Path) -> None:
    study = load_study(example(tmp_path))
    check_study(study)
    names = [task.name for task in graph_of(study)]
    assert len(in_order(graph_of(study))) == len(names)
    assert {name.split()[0] for name in names} >= {"assay", "claims", "compress", "evaluate", "generate"}
    outputs = {model_name(recipe) for recipe in study.recipes.values()}
    assert outputs == {"model.gguf", "model.cellm", "model"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_example_runs_as_it_says(tmp_path: Path) -> None:
    result = run_study(example(tmp_path), tmp_path / "out", workers=2)
    shown = read_study(result.to_json())
    assert result.is_whole, shown.summary
    assert all(artifact.measures["mean_kld"].value > 0 for artifact in shown.artifacts[1:])
    sahc = shown.artifacts[-1]
    assert sahc.recipe == "sahc"
    assert {one.layer for one in sahc.layers if not one.role} == {0, 1, 2, 3}
    assert {line.outcome for line in shown.gates if line.artifact == "tiny/sahc"} >= {"PASS", "FAIL"}
    assert len(shown.samples) == 2
    assert all(len(sample.passages) == 1 + len(result.study.recipes) for sample in shown.samples)
