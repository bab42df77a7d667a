"""A tiny dense Qwen3 teacher and a student distilled from it, in the proportions of Qwen3-32B and 4B."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

from bitsmith.errors import OutputError
from bitsmith.lab.train import TrainSpec, train
from bitsmith.progress import Progress, silent

TEACHER = TrainSpec(
    arch="qwen3",
    hidden_size=256,
    num_hidden_layers=6,
    intermediate_size=640,
    vocab_size=2048,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    minutes=28.0,
    batch_size=2,
    context_tokens=512,
)
STUDENT = replace(
    TEACHER,
    hidden_size=128,
    num_hidden_layers=3,
    intermediate_size=256,
    tie_word_embeddings=True,
    num_attention_heads=4,
    minutes=6.0,
    learning_rate=3e-3,
    seed=1,
)
"""Of half the teacher's width, depth and query heads per KV head, and tied; nothing of it starts as the
teacher's. Stopped early: after 18 minutes it was better than its teacher, which then has nothing to give."""


def train_pair(
    out: Path,
    *,
    teacher_minutes: float = TEACHER.minutes,
    student_minutes: float = STUDENT.minutes,
    teacher: TrainSpec = TEACHER,
    student: TrainSpec = STUDENT,
    progress: Progress = silent,
) -> Path:
    """Train a teacher, distil a student from it, and return the folder `out` with `teacher` and `student`.

    Both see the training split of the Python standard library's sources, with one tokenizer; each folder's
    `training_log.jsonl` tells the losses. Where minutes end a training its weights depend on the machine;
    `steps` of the specs end it everywhere alike. A killed run goes on at the last state saved, or at the
    student where the teacher is there.

    Raises OutputError if `out` holds a student or a teacher of other options, or cannot be made.
    """
    specs = {
        "teacher": replace(teacher, minutes=teacher_minutes),
        "student": replace(student, minutes=student_minutes),
    }
    if (out / "student").exists():
        raise OutputError("holds a pair; choose another folder", path=out)
    try:
        out.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot be made: {error.strerror}", path=out) from error
    first = out / "teacher"
    if not first.exists():
        train(first, specs["teacher"], _named(progress, "teacher"))
    elif _spec_of(first) != asdict(specs["teacher"]):
        raise OutputError("is a teacher with other options; choose another folder", path=first)
    train(out / "student", specs["student"], _named(progress, "student"), teacher=first)
    return out


def _named(progress: Progress, name: str) -> Progress:
    return lambda _, done, total: progress(name, done, total)


def _spec_of(folder: Path) -> object:
    """Return the spec in a folder's log, None where there is none."""
    try:
        return json.loads((folder / "training_log.jsonl").read_text("utf-8").splitlines()[0])["spec"]
    except (OSError, ValueError, IndexError, KeyError, TypeError):
        return None
