"""Merging end to end: what is written, what is kept where it does not help, killed runs, refusals."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from bitsmith.cli.main import app
from bitsmith.errors import BitsmithError, DamagedFileError, OutputError, UnsupportedError
from bitsmith.lab.embedded import Sizes, embed_student, spread_layers
from bitsmith.passes.merge_fold import LayerAlpha
from bitsmith.run.evaluate import evaluate, open_model, text_chunks
from bitsmith.run.forward import final_hidden_states
from bitsmith.run.merge import RESULT_NAME, MergeResult, merge
from bitsmith.run.merge_recipe import Alphas, MergeRecipe
from bitsmith.run.merge_sweep import LEAST_SHARE, coordinates, sweep
from bitsmith.run.merge_text import read_texts, shared_runs
from bitsmith.run.merge_weights import stretched_end
from bitsmith.run.verify import verify
from bitsmith.store import open_checkpoint
from bitsmith.store.paired import open_paired
from paired_models import DELTA, DENSE, FULL, HYBRID, LARGE, LINES, SMALL, in_eight_bits, write_model

CTX = 32
OPTIONS: dict[str, Any] = {"ctx_tokens": CTX, "samples": 96}
HALF, WHOLE = MergeRecipe(alpha=0.5), MergeRecipe(alpha=1.0)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(LINES[:120]))
    return path


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    folder = tmp_path_factory.mktemp("student")
    model = write_model(folder / "random", 2, **DENSE, **SMALL, num_hidden_layers=2)
    return fitted(model, text, folder / "small")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "large"
    return write_model(folder, 1, **DENSE, **LARGE, num_hidden_layers=3)


@pytest.fixture(scope="module")
def written(
    teacher: Path, student: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> MergeResult:
    """A merge that is written whatever held-out text says."""
    out = tmp_path_factory.mktemp("written") / "out"
    return merge(teacher, student, text, out, recipe=HALF, fallback=False, **OPTIONS)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def fitted(model: Path, text: Path, out: Path) -> Path:
    """Write a model whose head predicts the next token of a text by ridge regression on its states."""
    with open_model(model) as opened:
        tokens, _ = text_chunks(opened, text, CTX, None)
        states = final_hidden_states(opened, tokens, 0).reshape(-1, 32).astype(np.float64)
    tensors = load_file(model / "model.safetensors")
    aim = np.zeros((len(states), len(tensors["lm_head.weight"])))
    aim[np.arange(len(states)), tokens[:, 1:].reshape(-1)] = 8.0
    head = np.linalg.solve(states.T @ states + np.eye(32), states.T @ aim).T
    shutil.copytree(model, out)
    save_file(tensors | {"lm_head.weight": head.astype(np.float32)}, out / "model.safetensors")
    return out


def test_what_is_written_is_a_student_that_measures_as_it_says(
    written: MergeResult, student: Path, teacher: Path
) -> None:
    out, folder, record = written.out, written.folder, written.record
    held = folder / "held.txt"
    assert {path.name for path in folder.iterdir()} == {RESULT_NAME, "paired", "text.txt", "held.txt"}
    assert json.loads((folder / RESULT_NAME).read_text()) == record
    checked = verify(out)
    assert checked.passed and any(one.relative_error for one in checked.tensors)
    found = evaluate(student, out, held, CTX)
    for name, measure in (("ppl_student", found.ppl_ref), ("ppl_merged", found.ppl_cand)):
        assert record["measures"][name]["value"] == pytest.approx(measure.value, rel=1e-6)
    ratio = record["measures"]["ppl_merged_over_student"]
    low_high = found.ppl_ratio.low, found.ppl_ratio.high
    assert (ratio["low"], ratio["high"]) == pytest.approx(low_high, rel=1e-6)
    kld = evaluate(teacher, out, held, CTX).mean_kld
    assert record["measures"]["kld_merged"]["value"] == pytest.approx(kld.value, rel=1e-5)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with open_model(out) as opened:
        tokens, _ = text_chunks(opened, held, CTX, 2)
        ours = final_hidden_states(opened, tokens, 0)
        with torch.inference_mode():
            theirs = model.model(input_ids=torch.from_numpy(tokens)).last_hidden_state[:, :-1]
    np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-4)
    assert json.loads((out / "config.json").read_text()) == json.loads((student / "config.json").read_text())
    judged = record["decision"]["trials"][-1]
    assert judged["half"] == "judge" and record["decision"]["adopted"]
    if judged["worst_end"] > 1:
        assert "written all the same" in record["decision"]["reason"]


def test_a_teacher_that_does_not_help_leaves_the_students_own_bytes(
    written: MergeResult, teacher: Path, student: Path, text: Path, tmp_path: Path
) -> None:
    kept = merge(
        teacher, student, text, tmp_path / "out", recipe=WHOLE, paired=written.folder / "paired", **OPTIONS
    )
    decision, measures = kept.record["decision"], kept.record["measures"]
    assert not decision["adopted"] and decision["factor"] == 0
    assert files(kept.out) == files(student)
    assert measures["ppl_merged"] == measures["ppl_student"]
    assert measures["ppl_merged_over_student"]["high"] == 1
    assert kept.record["alphas"]["embedding"] == 0


@pytest.mark.slow
def test_a_teacher_that_knows_better_is_taken_and_helps_on_text_nobody_saw(
    student: Path, tmp_path: Path
) -> None:
    """The student is a model with noise on its head; the teacher holds that model, wider and deeper."""
    text, held, other = (tmp_path / name for name in ("text.txt", "held.txt", "other.txt"))
    for path, part in ((text, LINES[:90]), (held, LINES[90:150]), (other, LINES[150:])):
        path.write_text("".join(part))
    teacher = tmp_path / "teacher"
    embed_student(student, teacher, Sizes(48, spread_layers(2, 3), ffn=56, heads=4, kv_heads=2))
    tensors = load_file(student / "model.safetensors")
    noise = np.random.default_rng(0).standard_normal(tensors["lm_head.weight"].shape).astype(np.float32)
    shutil.copytree(student, tmp_path / "noisy")
    save_file(
        tensors | {"lm_head.weight": tensors["lm_head.weight"] + 0.2 * noise},
        tmp_path / "noisy/model.safetensors",
    )
    found = merge(teacher, tmp_path / "noisy", text, tmp_path / "out", held=held, **OPTIONS)
    decision = found.record["decision"]
    assert decision["adopted"], decision["reason"]
    judge = [one for one in decision["trials"] if one["half"] == "judge"]
    assert len(judge) == 1 and judge[0]["worst_end"] <= 1
    assert found.record["alphas"]["head"] > 0.2
    again = evaluate(tmp_path / "noisy", found.out, other, CTX).ppl_ratio
    assert again.high is not None and again.high < 1
    assert open_checkpoint(found.out)["lm_head.weight"].dtype == "F32"


@pytest.mark.slow
def test_an_interrupted_run_goes_on_and_writes_the_same(
    written: MergeResult, teacher: Path, student: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def run(stop: tuple[str, int] | None) -> MergeResult:
        def progress(stage: str, done: int, total: int) -> None:
            if stop is not None and stage == stop[0] and done >= stop[1]:
                raise KeyboardInterrupt

        return merge(teacher, student, text, out, recipe=HALF, fallback=False, progress=progress, **OPTIONS)

    for stop in (("paired", 10 * CTX), ("fold", 4)):
        with pytest.raises(KeyboardInterrupt):
            run(stop)
        assert {path.name for path in tmp_path.iterdir()} == {"out.merge"}
        assert not (tmp_path / "out.merge" / RESULT_NAME).exists()
    trials = json.loads((written.folder / RESULT_NAME).read_text())["decision"]["trials"]
    found = run(None)
    assert found.resumed > len(trials) and found.record["written"]["resumed"] >= 3
    assert files(out) == files(written.out)
    assert {path.name for path in found.folder.iterdir()} == {
        RESULT_NAME, "paired", "text.txt", "held.txt",
    }  # fmt: skip


@pytest.mark.slow
def test_shares_of_zero_keep_their_tensors_bit_for_bit(
    written: MergeResult, teacher: Path, student: Path, text: Path, tmp_path: Path
) -> None:
    recipe = MergeRecipe(alpha=0.25, ends=False)
    paired = written.folder / "paired"
    found = merge(
        teacher, student, text, tmp_path / "out", recipe=recipe, paired=paired, fallback=False, **OPTIONS
    )
    own, made = (load_file(path / "model.safetensors") for path in (student, found.out))
    kept = {name for name in own if own[name].tobytes() == made[name].tobytes()}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= kept
    assert found.record["written"]["tensors_kept"] == 3
    assert list(own) == list(made)


@pytest.mark.parametrize(
    ("change", "message", "kind"),
    [
        ({"teacher": "student"}, "teacher and student at once", BitsmithError),
        ({"teacher": "nowhere"}, "nowhere: does not exist", BitsmithError),
        ({"teacher": "shallow"}, "the teacher has to be the larger", BitsmithError),
        ({"teacher": "hybrid"}, "expected one family", UnsupportedError),
        ({"teacher": "other words"}, "merging takes one vocabulary", BitsmithError),
        (
            {"teacher": "few heads"},
            "the teacher's 1 groups of 2 heads do not hold the student's 2",
            BitsmithError,
        ),
        ({"teacher": "few neurons"}, "has 24 neurons in layers.0, the student 40", BitsmithError),
        ({"text": "short.txt"}, "too few to hold out 4 chunks of 32", BitsmithError),
        ({"text": "latin.txt"}, "is not UTF-8: byte 0xe9", BitsmithError),
        ({"text": "empty.txt"}, "empty.txt: is empty", BitsmithError),
        ({"text": "none.txt"}, "cannot be read: No such file", BitsmithError),
        ({"held": "text.txt"}, "chunks are in the text that the merge is made of", BitsmithError),
        ({"held": "few.txt"}, "few.txt: has .* tokens, one chunk needs 32", BitsmithError),
        ({"tokens": 32}, "32 tokens are too few", BitsmithError),
        ({"tokens": 100_000}, "besides the 100000 that are asked for", BitsmithError),
        ({"layer_map": (1, 0)}, "has to increase", BitsmithError),
        ({"blend": ((Path("x"), 1.5),)}, "expected each above 0, below 1 together", BitsmithError),
        ({"paired": Path("nowhere")}, "holds no paired.json", BitsmithError),
        ({"out": "student"}, "is the input", OutputError),
        ({"out": "gone/out"}, "is not in a folder that exists", OutputError),
        ({"recipe": MergeRecipe(trunk=32)}, "the trunk has 32 dimensions, expected 1 … 31", BitsmithError),
    ],
)
def test_what_cannot_be_merged_is_refused_and_leaves_nothing(
    change: dict[str, Any],
    message: str,
    kind: type[Exception],
    teacher: Path,
    student: Path,
    text: Path,
    tmp_path: Path,
) -> None:
    name = str(change.get("teacher", ""))
    made = {
        "shallow": lambda path: write_model(path, **DENSE, **LARGE, num_hidden_layers=1),
        "hybrid": lambda path: write_model(
            path, **HYBRID, **LARGE, linear_num_value_heads=4, layer_types=[DELTA, FULL]
        ),
        "other words": lambda path: other_words(teacher, path),
        "few heads": lambda path: write_model(
            path, **DENSE | LARGE | {"num_attention_heads": 2, "num_key_value_heads": 1}, num_hidden_layers=3
        ),
        "few neurons": lambda path: write_model(
            path, **DENSE, **LARGE | {"intermediate_size": 24}, num_hidden_layers=3
        ),
    }
    if name in made:
        made[name](tmp_path / name)
    shutil.copyfile(text, tmp_path / "text.txt")
    shutil.copytree(student, tmp_path / "student")
    (tmp_path / "short.txt").write_text("".join(LINES[:2]))
    (tmp_path / "few.txt").write_text("a few words")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n" * 9)
    (tmp_path / "empty.txt").write_text(" \n")
    places = {
        "teacher": teacher, "student": tmp_path / "student", "text": tmp_path / "text.txt",
        "out": tmp_path / "out",
    } | {
        key: tmp_path / value for key, value in change.items() if isinstance(value, str)
    }  # fmt: skip
    others = {key: value for key, value in change.items() if not isinstance(value, str)}
    ours = [places.pop(key) for key in ("teacher", "student", "text", "out")]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(kind, match=message) as raised:
        merge(*ours, **OPTIONS | places | others)
    assert "\n" not in str(raised.value)
    assert sorted(tmp_path.rglob("*")) == before


def other_words(model: Path, out: Path) -> Path:
    """Copy a model with two tokens of its vocabulary exchanged."""
    shutil.copytree(model, out)
    tokenizer = json.loads((out / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (out / "tokenizer.json").write_text(json.dumps(tokenizer))
    return out


@pytest.mark.slow
def test_an_output_is_replaced_only_when_asked(
    written: MergeResult, teacher: Path, student: Path, text: Path
) -> None:
    run = {"recipe": HALF, "fallback": False, **OPTIONS}
    with pytest.raises(OutputError, match="out: exists; pass --overwrite"):
        merge(teacher, student, text, written.out, **run)
    before = files(written.out)
    paired = open_paired(written.folder / "paired").digest
    found = merge(teacher, student, text, written.out, overwrite=True, **run)
    assert files(found.out) == before
    assert open_paired(found.folder / "paired").digest == paired


def test_a_damaged_teacher_leaves_nothing(teacher: Path, student: Path, text: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(teacher, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(BitsmithError, match=r"up_proj.weight': is nan at \[3, 5\]"):
        merge(broken, student, text, tmp_path / "out", **OPTIONS)
    raw = (teacher / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(DamagedFileError, match="broken"):
        merge(broken, student, text, tmp_path / "out", **OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


@pytest.mark.slow
def test_a_packed_student_is_written_in_16_bits(
    teacher: Path, student: Path, text: Path, tmp_path: Path
) -> None:
    tensors = load_file(student / "model.safetensors")
    for name in [name for name in tensors if "proj" in name]:
        codes, scales, _ = in_eight_bits(tensors.pop(name))
        tensors |= {name: codes, f"{name}_scale_inv": scales}
    packed = tmp_path / "packed"
    shutil.copytree(student, packed)
    as_torch = {name: torch.from_numpy(array) for name, array in tensors.items()}
    as_torch |= {name: t.view(torch.float8_e4m3fn) for name, t in as_torch.items() if t.dtype == torch.uint8}
    from safetensors.torch import save_file as save_torch

    save_torch(as_torch, packed / "model.safetensors")
    config = json.loads((packed / "config.json").read_text())
    settings = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    recipe = MergeRecipe(alpha=0.3)
    found = merge(teacher, packed, text, tmp_path / "out", recipe=recipe, fallback=False, **OPTIONS)
    with open_checkpoint(found.out) as made:
        assert {made[name].dtype for name in made if "proj" in name} == {"BF16"}
        assert "quantization_config" not in made.config
        assert not any(name.endswith("_inv") for name in made)
    ratio = evaluate(packed, found.out, found.folder / "held.txt", CTX).ppl_ratio
    assert found.record["measures"]["ppl_merged_over_student"]["value"] == pytest.approx(
        ratio.value, rel=1e-6
    )
    assert any("packed tensors" in note for note in found.record["written"]["notes"])
    kept = merge(
        teacher, packed, text, tmp_path / "kept", recipe=WHOLE, paired=found.folder / "paired", **OPTIONS
    )
    assert not kept.record["decision"]["adopted"] and files(kept.out) == files(packed)


def given(teacher: Path, student: Path, text: Path, out: Path) -> list[str]:
    """Return the command line of a merge."""
    options = ["--text", text, "-o", out, "--ctx", CTX, "--samples", 96]
    return [str(one) for one in ("merge", teacher, student, *options)]


def test_a_dry_run_tells_the_cost_and_writes_nothing(
    teacher: Path, student: Path, text: Path, tmp_path: Path
) -> None:
    command = given(teacher, student, text, tmp_path / "out")
    dry = CliRunner().invoke(app, [*command, "--dry-run", "--json", str(tmp_path / "cost.json")])
    assert dry.exit_code == 0, dry.output
    assert "multiply-adds" in dry.output and "nothing written" in dry.output
    assert [path.name for path in tmp_path.iterdir()] == ["cost.json"]
    cost = json.loads((tmp_path / "cost.json").read_text())
    assert cost["paired"]["teacher_multiply_adds"] > 0 and cost["trials"] == 11
    for bad in (["--alpha", "much"], ["--layers", "x"], ["--blend", "x"], ["--budget", "3"]):
        refused = CliRunner().invoke(app, [*command, *bad])
        assert isinstance(refused.exception, BitsmithError) and bad[0] in str(refused.exception)


@pytest.mark.slow
def test_the_command_tells_what_was_tried_and_what_came_of_it(
    written: MergeResult, teacher: Path, student: Path, text: Path, tmp_path: Path
) -> None:
    command = given(teacher, student, text, tmp_path / "out")
    paired = str(written.folder / "paired")
    run = CliRunner().invoke(app, [*command, "--paired", paired, "--alpha", "1"])
    assert run.exit_code == 0, run.output
    assert "not adopted" in run.output and "95 % interval" in run.output and "protocol:" in run.output


@dataclass(frozen=True)
class Point:
    alphas: Alphas
    nll: float


def test_a_sweep_finds_the_shares_that_are_best_alone() -> None:
    aim = {"mixer": [[0.5, 0.0], [0.25, 1.0]], "ffn": [0.0, 0.5], "ends": 0.125}

    def loss(alphas: Alphas) -> float:
        far = [(a - b) ** 2 for layer, row in zip(alphas.layers, aim["mixer"], strict=True)
               for a, b in zip(layer.mixer, row, strict=True)]  # fmt: skip
        far += [(layer.ffn - b) ** 2 for layer, b in zip(alphas.layers, aim["ffn"], strict=True)]
        far += [(alphas.embedding - aim["ends"]) ** 2, (alphas.head - aim["ends"]) ** 2]
        return float(sum(far))

    spent: list[str] = []

    def try_out(label: str, alphas: Alphas) -> Point:
        spent.append(label)
        return Point(alphas, loss(alphas))

    start = Alphas(tuple(LayerAlpha((0.25, 0.25), 0.25) for _ in range(2)), 0.25, 0.25)
    found = sweep(Point(start, loss(start)), try_out, 500, ends=True)
    assert found.nll < 1e-12 and len(spent) < 200
    spent.clear()
    few = sweep(Point(start, loss(start)), try_out, 7, ends=False)
    assert len(spent) == 7 and few.nll < loss(start) and few.alphas.head == 0.25
    labels = [one.label for one in coordinates(start, ends=False)]
    assert labels[:2] == ["all mixers", "all FFNs"] and "layer 1 group 1" in labels and "ends" not in labels
    up = coordinates(start.scaled(0), ends=False)[0].moved(start.scaled(0), up=True)
    assert up.layers[0].mixer == (LEAST_SHARE, LEAST_SHARE) and up.layers[0].ffn == 0


def test_stretches_are_wider_than_chunks_where_neighbours_are_alike() -> None:
    random = np.random.default_rng(0)
    apart = random.normal(-0.01, 0.02, 100)
    alike = np.repeat(random.normal(-0.01, 0.02, 5), 20)
    ends = [stretched_end(one) for one in (apart, alike)]
    chunkwise = [np.exp(one.mean() + 1.96 * one.std() / 10) for one in (apart, alike)]
    assert ends[0] == pytest.approx(chunkwise[0], abs=2e-3)
    assert ends[1] - 1 > chunkwise[1] - 1 + 0.005
    assert stretched_end(np.array([-1.0])) is None
    assert stretched_end(np.array([-0.1, -0.1])) == pytest.approx(np.exp(-0.1))


def test_a_text_is_cut_at_a_line_and_texts_are_told_apart(student: Path, text: Path, tmp_path: Path) -> None:
    raw = text.read_bytes()
    with open_model(student) as opened:
        cut = read_texts(opened, text, None, None, CTX)
        assert cut.fit + cut.held == raw and cut.held.startswith((b"def ", b"    return"))
        tokens, protocol = text_chunks(opened, text, CTX, None)
        assert len(cut.held) >= 4 * CTX and len(cut.held) < len(raw) / 3
        less = read_texts(opened, text, None, protocol.text_tokens - 5 * CTX, CTX)
        assert len(less.held) < len(cut.held)
    assert (shared_runs(tokens, tokens) == 1).all()
    assert shared_runs(tokens[::2], tokens[1::2]).max() < 0.1
    half = np.concatenate([tokens[:2], tokens[:, ::-1][2:4]])
    np.testing.assert_array_equal(shared_runs(tokens[:2], half), [1, 1, 0, 0])


@pytest.mark.slow
def test_a_text_that_repeats_itself_judges_nothing(
    written: MergeResult, teacher: Path, student: Path, text: Path, tmp_path: Path
) -> None:
    held = tmp_path / "held.txt"
    held.write_text("All work and no play makes Jack a dull boy.\n" * 90)
    found = merge(
        teacher, student, text, tmp_path / "out", recipe=HALF, held=held,
        paired=written.folder / "paired", **OPTIONS,
    )  # fmt: skip
    assert "repeats itself" in found.record["decision"]["reason"]
    assert files(found.out) == files(student)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_runs_leave_no_model_and_go_on(
    number: signal.Signals, written: MergeResult, teacher: Path, student: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "bitsmith.cli.main", *given(teacher, student, text, out)]
    command += ["--alpha", "0.5", "--no-fallback"]
    journal, kills = tmp_path / "out.merge/journal", 0
    for least in (50, 300, 1200, 3000):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (journal.exists() and journal.stat().st_size > least):
            time.sleep(0.01)
        process.send_signal(number)
        process.wait()
        if out.exists():
            break
        kills += 1
        assert not (tmp_path / "out.merge" / RESULT_NAME).exists()
    assert kills >= 2
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "exists; pass" not in done.stderr:  # else the last one was killed when all was done
        assert done.returncode == 0, done.stderr
        assert files(out) == files(written.out)


@pytest.mark.slow
def test_merge_then_compress_in_one(
    written: MergeResult, teacher: Path, student: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "merged.gguf"
    run: dict[str, Any] = {"recipe": HALF, "fallback": False, "type_name": "Q8_0", **OPTIONS}
    with pytest.raises(BitsmithError, match="Q9_9"):
        merge(teacher, student, text, out, **run | {"type_name": "Q9_9"})
    assert not list(tmp_path.iterdir())
    found = merge(teacher, student, text, out, paired=written.folder / "paired", **run)
    assert files(found.folder / "model") == files(written.out)
    ratio = evaluate(found.folder / "model", out, written.folder / "held.txt", CTX).ppl_ratio
    assert ratio.value == pytest.approx(1, abs=0.02)
    with pytest.raises(OutputError, match="exists; pass --overwrite"):
        merge(teacher, student, text, out, **run)
