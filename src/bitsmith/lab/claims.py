"""`study claims` on texts of the lab where none are given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitsmith.lab.corpus import write_held_out_text
from bitsmith.lab.formats import TEXT_BYTES, TEXT_NAME
from bitsmith.run.corpus import write_default_text
from bitsmith.run.seed_claims import ClaimsStudy, chosen_claims
from bitsmith.run.study_claims import RESULT_NAME, study_claims
from bitsmith.store.journal import result_folder

CALIBRATION_NAME = "calibration.txt"


def claims_study_of(
    model: Path,
    out: Path,
    *,
    text: Path | None = None,
    statistics: Path | None = None,
    calibration: Path | None = None,
    **options: Any,
) -> ClaimsStudy:
    """Do as `study_claims`; what is not given are the demo's held-out text and its training text.

    Both are written into `out`; `calibration` only where there are no `statistics` either.
    """
    chosen_claims(options.get("only"))
    result_folder(out, RESULT_NAME, bool(options.get("overwrite")))
    if text is None:
        text = write_held_out_text(out / TEXT_NAME, TEXT_BYTES, overwrite=True)
    if calibration is None and statistics is None:
        calibration = write_default_text(out / CALIBRATION_NAME)
    return study_claims(model, out, text=text, statistics=statistics, calibration=calibration, **options)
