"""A merge on the terminal: what it takes, what was tried, and what came of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from bitsmith.errors import printable
from bitsmith.report.markdown import UNMEASURED
from bitsmith.report.terminal import bytes_text, say, table
from bitsmith.run.merge import RESULT_NAME, MergeCost, MergeResult

Json = Mapping[str, Any]

_MEASURES = {
    "ppl_student": "perplexity of the student",
    "ppl_teacher": "perplexity of the teacher",
    "ppl_merged": "perplexity of what is written",
    "ppl_merged_over_student": "perplexity, written / student",
    "kld_student": "KLD(teacher, student), nats",
    "kld_merged": "KLD(teacher, written), nats",
}


def cost_lines(cost: MergeCost) -> Iterator[str]:
    """Yield what a merge takes, in words."""
    pairing = cost.paired
    if pairing is None:
        yield "pairing: done before"
    else:
        adds = pairing.teacher_multiply_adds + pairing.student_multiply_adds
        yield (
            f"pairing: {pairing.tokens:,} tokens, {pairing.held_tokens:,} of them to compare by; "
            f"{adds:.3g} multiply-adds in the models, {pairing.moment_multiply_adds:.3g} in moments"
        )
        yield (
            f"pairing takes about {_seconds(pairing.seconds)}, {bytes_text(pairing.memory_bytes)} of memory, "
            f"{bytes_text(pairing.disk_bytes)} of disk, {bytes_text(pairing.kept_bytes)} of which stay"
        )
    yield (
        f"judging: {cost.held_tokens:,} held-out tokens, the teacher once, the student once, at most "
        f"{cost.trials} merges on half of them each; {cost.trial_multiply_adds:.3g} multiply-adds"
    )
    yield (
        f"maps: {cost.plan_multiply_adds:.3g} multiply-adds; folding: {cost.fold_multiply_adds:.3g} for each "
        "merge that is tried, and again to write"
    )
    yield f"writing: about {bytes_text(cost.written_bytes)}"


def print_merge(result: MergeResult, page: Path) -> None:
    """Print what was tried, the measures with intervals, the decision, and where everything lies."""
    record, console = result.record, Console()
    decision = record["decision"]
    rows = [_trial(one) for one in decision["trials"]]
    if rows:
        columns = ("tried", "chunks that", "perplexity / student's", "95 % interval", "at worst")
        console.print(table(columns, rows, right=columns[2:]))
    measures = [(said, *_figure(record["measures"][name])) for name, said in _MEASURES.items()]
    console.print(table(("all held-out chunks", "value", "95 % interval"), measures, right=("value",)))
    for line in (*_lines(result), f"the page: {page}"):
        say(console, line)


def _lines(result: MergeResult) -> Iterator[str]:
    record = result.record
    decision, protocol, written = record["decision"], record["protocol"], record["written"]
    yield f"{'adopted' if decision['adopted'] else 'not adopted'}: {decision['reason']}"
    yield (
        f"protocol: {protocol['name']}; {protocol['chunks']} chunks of {protocol['ctx_tokens']} tokens of "
        f"{printable(protocol['text'])}, even ones choose, odd ones judge; intervals: paired bootstrap over "
        "chunks; at worst: the larger of its upper end and that of Student's t over ten stretches of the text"
    )
    yield (
        f"{written['tensors_changed']} tensors changed, {written['tensors_kept']} have the student's bytes"
        + (f"; {result.resumed} steps were there from an earlier run" if result.resumed else "")
    )
    yield from (f"note: {note}" for note in written["notes"])
    yield f"wrote {result.out}; how it was made: {result.folder / RESULT_NAME}"
    if result.packed is not None:
        yield f"the merge itself: {result.folder / 'model'}"


def _trial(one: Json) -> tuple[str, ...]:
    value, interval = _figure(one.get("ppl_over_student"))
    end = one.get("worst_end")
    shown = one["label"] if "refused" not in one else f"{one['label']}: {printable(one['refused'])}"
    return shown, one["half"], value, interval, "" if end is None else f"{end:.5f}"


def _figure(found: Json | None) -> tuple[str, str]:
    if found is None:
        return UNMEASURED, UNMEASURED
    low, high = found["low"], found["high"]
    interval = UNMEASURED if low is None or high is None else f"{low:.5f} … {high:.5f}"
    return f"{found['value']:.5f}", interval


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "unmeasured time"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
