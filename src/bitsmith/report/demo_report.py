"""The demo's result as the report that every run can have."""

from __future__ import annotations

from pathlib import Path

from bitsmith.lab.demo import Demo
from bitsmith.report.adapter_records import from_record
from bitsmith.report.model_card import write_report
from bitsmith.report.study_json import read_study


def write_demo_report(demo: Demo) -> tuple[Path, Path, Path]:
    """Write page, `report.json` and model card into the demo's folder; returns their paths in that order."""
    found = from_record(demo.record.to_json(), demo.evaluation.to_json()).to_json()
    notes, samples = found["notes"], []
    if demo.sample is None:
        notes = [*notes, "generation: unmeasured (install bitsmith[llama] to run real llama.cpp)"]
    else:
        written = {"artifact": found["artifacts"][-1]["name"], "how": "by llama.cpp, greedy"}
        samples = [{"prompt": demo.prompt, "passages": [{**written, "text": demo.sample}]}]
    more = {"title": "bitsmith demo", "samples": samples, "notes": notes, "seconds": demo.seconds}
    return write_report(demo.out, read_study(found | more))
