"""Bundled tiny models, trained by `bitsmith lab train`."""

from pathlib import Path

DEMO_MODEL = Path(__file__).parent / "qwen3_5-tiny"
