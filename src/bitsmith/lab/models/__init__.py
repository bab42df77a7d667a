"""Bundled tiny models, trained by `bitsmith lab train` and, teacher and student, by `bitsmith lab pair`."""

from pathlib import Path

_FOLDER = Path(__file__).parent

DEMO_MODEL = _FOLDER / "qwen3_5-tiny"
TEACHER_MODEL = _FOLDER / "qwen3-teacher"
STUDENT_MODEL = _FOLDER / "qwen3-student"
