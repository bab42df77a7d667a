"""`study claims` on texts of the lab where none are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bitsmith.errors import BitsmithError
from bitsmith.lab.corpus import write_held_out_text
from bitsmith.lab.formats import TEXT_BYTES, TEXT_NAME
from bitsmith.progress import silent
from bitsmith.run.corpus import write_default_text
from bitsmith.run.seed_claims import ClaimsStudy, Cost
from bitsmith.run.study_claims import CHUNKS, RESULT_NAME, claims_cost, study_claims
from bitsmith.store.hub import local
from bitsmith.store.journal import result_folder

CALIBRATION_NAME = "calibration.txt"


def claims_study_of(
    model: Path,
    out: Path,
    say_cost: Callable[[Sequence[Cost]], None],
    *,
    text: Path | None = None,
    statistics: Path | None = None,
    calibration: Path | None = None,
    only: Sequence[str] | None = None,
    ctx_tokens: int = 512,
    chunks: int = CHUNKS,
    **options: Any,
) -> ClaimsStudy:
    """Do as `study_claims`; what is not given are the demo's held-out text and its training text.

    Both are written into `out`; `calibration` only where there are no `statistics` either. What it takes is
    told to `say_cost` before it starts.
    """
    for path in (text, statistics, calibration):
        if path is not None and not path.exists():
            raise BitsmithError("does not exist", path=path)
    model = local(model, options.get("progress", silent))
    lacks = calibration is None and statistics is None
    asked: dict[str, Any] = {"only": only, "ctx_tokens": ctx_tokens, "chunks": chunks}
    asked |= {
        "text": text or out / TEXT_NAME,
        "calibration": out / CALIBRATION_NAME if lacks else calibration,
    }
    say_cost(claims_cost(model, **asked | ({} if statistics is None else {"calibration": None})))
    result_folder(out, RESULT_NAME, bool(options.get("overwrite")), [model])
    if text is None:
        write_held_out_text(out / TEXT_NAME, TEXT_BYTES, overwrite=True)
    if lacks:
        write_default_text(out / CALIBRATION_NAME)
    return study_claims(model, out, statistics=statistics, **asked, **options)
