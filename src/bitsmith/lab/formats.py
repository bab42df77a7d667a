"""`study formats` on the lab's held-out text, which no model of the lab has seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitsmith.lab.corpus import write_held_out_text
from bitsmith.progress import silent
from bitsmith.run.format_rows import FormatsStudy
from bitsmith.run.studied_formats import studied
from bitsmith.run.study_formats import RESULT_NAME, study_formats
from bitsmith.store.hub import local
from bitsmith.store.journal import result_folder

TEXT_NAME = "held_out.txt"
TEXT_BYTES = 60_000


def formats_study_of(model: Path, text: Path | None, out: Path, **options: Any) -> FormatsStudy:
    """Do as `study_formats`; without a `text`, on the demo's held-out text, written into `out`."""
    model = local(model, options.get("progress", silent))
    if text is None:
        studied(options.get("formats"))
        result_folder(out, RESULT_NAME, bool(options.get("overwrite")), [model])
        text = write_held_out_text(out / TEXT_NAME, TEXT_BYTES, overwrite=True)
    return study_formats(model, text, out, **options)
