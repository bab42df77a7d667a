"""Recipe `sahc` as terminal tables: the plan beside what is stored, gates, sizes and perplexities."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Console

from bitsmith.errors import printable
from bitsmith.report.markdown import measure_text
from bitsmith.report.terminal import Rows, bytes_text, protocol_text, say, table
from bitsmith.run.gate import PPL_RATIO
from bitsmith.run.sahc_planned import PlannedMethod, SahcPlan, component_bytes
from bitsmith.run.sahc_rows import SahcRecord, SahcResult, Written

UNKNOWN = "none"
"""What stands where a gate kept a ratio from being told."""


def print_sahc(record: SahcRecord) -> None:
    """Print the components planned and actual, sizes and perplexities, gates, and where everything lies."""
    result, console = record.result, Console()
    names, rows = component_table(result)
    console.print(table(names, rows, right=names[1:6]))
    names, rows = model_table(result)
    console.print(table(names, rows, right=names[1:]))
    for line in (*gate_lines(result), *_comparison(result), *_places(record)):
        say(console, line)


def print_sahc_plan(plan: SahcPlan) -> None:
    """Print every tensor's planned method with its fallbacks and bytes, and the components' ratios."""
    console = Console()
    columns = ("tensor", "part", "shape", "planned", "bytes", "falls back to")
    rows = [
        (
            row.name,
            row.component,
            "×".join(map(str, row.shape)),
            row.chain[0].method,
            f"{row.chain[0].nbytes:,}",
            " → ".join(_step(method) for method in row.chain[1:]) + _unjudged(row.judged, len(row.chain)),
        )
        for row in plan.rows
    ]
    console.print(table(columns, rows, right=("bytes",)))
    names = ("part", "what", "share of weights", "claimed ratio", "ratio as planned here")
    parts = [
        (name, what, f"{share:.2%}", f"{claimed:g}×", f"{ratio:.2f}×")
        for name, what, share, claimed, ratio in component_bytes(plan)
    ]
    console.print(table(names, parts, right=names[2:]))
    for line in (
        f"as planned: {bytes_text(plan.planned_bytes)} of tensors, each with its first method; bytes "
        "are exact, but which method a tensor ends with is decided by its gates",
        f"row-int4 alone, which is written and measured beside it: {bytes_text(plan.int4_bytes)} of tensors, "
        f"{plan.int4_file_bytes:,} bytes of files",
        f"stored now: {bytes_text(plan.stored_bytes)}; nothing written (dry run)",
    ):
        say(console, line)


def component_table(result: SahcResult) -> Rows:
    """Return the components: claimed, planned and actual ratios to 16 bits, and the methods that are left."""
    columns = ("part", "weights", "claimed", "planned", "actual", "seed's", "tensors by method")
    rows: list[Sequence[str]] = [
        (
            f"{one.name} {one.what}",
            f"{one.share:.2%}",
            f"{one.claimed_ratio:g}×",
            UNKNOWN if one.theory_ratio is None else f"{one.theory_ratio:.2f}×",
            UNKNOWN if one.ratio is None else f"{one.ratio:.2f}×",
            one.published_ratio,
            ", ".join(f"{count} {method}" for method, count in one.methods.items()),
        )
        for one in result.components
    ]
    return columns, rows


def model_table(result: SahcResult) -> Rows:
    """Return bytes, ratio, perplexity and KLD of the original, the recipe's model and row-int4 alone."""
    models = (result.sahc, result.int4)
    size, ppl = result.original, result.int4.measures.get("ppl_ref")
    ratios = [UNKNOWN if one.ratio is None else f"{one.ratio:.3f}×" for one in models]
    rows: list[Sequence[str]] = [
        ("file bytes", *(f"{one.file_bytes:,}" for one in (size, *(one.artifact for one in models)))),
        ("bpw", *(f"{one.bpw:.4f}" for one in (size, *(one.artifact for one in models)))),
        ("ratio of bytes", "1", *ratios),
        ("perplexity", measure_text(ppl, "{:.3f}"), *_measures(models, "ppl_cand", "{:.3f}")),
        ("over the original's", "1", *_measures(models, "ppl_ratio", "{:.4f}")),
        ("mean KLD, nats", "0", *_measures(models, "mean_kld", "{:.5f}")),
    ]
    return ("", "original", "sahc", "int4 alone"), rows


def _measures(models: Sequence[Written], name: str, style: str) -> list[str]:
    return [measure_text(one.measures.get(name), style) for one in models]


def gate_lines(result: SahcResult) -> list[str]:
    """Return how many gates passed, which did not and how often, and the artifact's own."""
    failed = Counter(
        gate["name"]
        for row in result.rows
        for attempt in row.attempts
        for gate in attempt.gates
        if gate["outcome"] != "PASS"
    )
    said = ", ".join(f"{name} {count}×" for name, count in failed.most_common())
    verdicts = [f"{gate['name']} {_figure(gate['value'])} {gate['outcome']}" for gate in result.sahc.gates]
    own = [gate["evidence"] for gate in result.sahc.gates if gate["name"] == PPL_RATIO.name]
    return [
        f"gates: {result.gates_passed} passed, {result.gates_failed} failed, {result.gates_unmeasured} "
        f"unmeasured; {result.replans} replans, written {result.rounds}×",
        f"why rows were replanned: {said or 'none was'}",
        f"gates of the model as written: {', '.join(verdicts)}",
        *(f"note: {said}" for said in own if said),
    ]


def _figure(value: float | None) -> str:
    return "unmeasured" if value is None else f"{value:.4g}"


def _step(method: PlannedMethod) -> str:
    return f"{method.method} {method.nbytes:,}"


def _unjudged(judged: bool, methods: int) -> str:
    return "" if judged or methods == 1 else " (no forward reaches it: it ends as stored)"


def _comparison(result: SahcResult) -> list[str]:
    same = "the same types as int4 alone" if result.same_as_int4 else "not the same types as int4 alone"
    over = measure_text(result.ppl_over_int4, "{:.5f}")
    return [
        f"against int4 alone: {result.bytes_over_int4:.5f} of its bytes, {over} of its perplexity; {same}",
        f"protocol: {protocol_text(result.protocol)}",
        f"layers probed on {result.probe}",
    ]


def _places(record: SahcRecord) -> list[str]:
    resumed = f", {record.result.resumed} parts taken over" if record.result.resumed else ""
    return [
        f"wrote {printable(str(record.out))} ({record.result.seconds:.1f} s{resumed})",
        f"audit log {printable(str(record.audit))}; result {printable(str(record.work / 'sahc.json'))}",
    ]
