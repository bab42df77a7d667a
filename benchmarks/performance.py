"""Render docs/performance.md from benchmarks/results/*.json; nothing in it is written by hand.

    python benchmarks/performance.py [--check]

With `--check` nothing is written, and the exit status is 1 where the page is not what the results give.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from measuring import OURS, RESULTS, ROOT, problems

PAGE = ROOT / "docs" / "performance.md"
ORDER = (
    "limits", "full_size", "compress", "encode", "encode_error", "pack", "feedback", "assay", "forward",
    "evaluate", "generate", "device", "forecast", "study", "quality", "allocation", "transforms", "factored",
    "sbgq", "merge",
)  # fmt: skip
INTRO = """\
# Performance

Rendered by `make performance` from `benchmarks/results/*.json`, which `make bench` writes; not edited by
hand. Each benchmark runs bitsmith and the peer on the same input in the same run, in turns where runs are
short enough to repeat. A cell is the median (lowest … highest) of the runs; a single run has no range.
*Times better* is the peer's figure over ours (ours over the peer's where more is better), turn by turn:
above 1 we are ahead. *Of the limit* is how near ours comes to what this machine can do at most, by the
highest rate measured in the same run: bytes over the disk's or the memory's rate, operations over that of
float32 matrix products. *Others* is the share of all processor time that other programs took: a loaded
machine shows there.
"""
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
WORDED = ("statement",)
MANY = 80

Json = dict[str, Any]


def number(value: float) -> str:
    """Return three significant digits, and all of those before the point."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    if size < 1:
        return f"{value:.3g}"
    return f"{value:.{2 if size < 10 else 1}f}"


def scaled(unit: str, reference: float) -> tuple[float, str]:
    """Return the factor and name of the unit in which `reference` is shown."""
    if not (unit.startswith("bytes") or unit.endswith("/s")):
        return 1.0, unit
    for factor, prefix in PREFIXES:
        if abs(reference) >= factor:
            short = unit.replace("bytes", "B", 1)
            spaced = "" if short.startswith("B") else " "
            return factor, f"{prefix}{spaced}{short}"
    return 1.0, unit


def cell(spread: Mapping[str, Any], unit: str = "") -> str:
    """Return median, range and unit."""
    if spread["median"] is None:
        return "unmeasured"
    factor, name = scaled(unit, spread["median"])
    text = number(spread["median"] / factor)
    if spread["low"] is not None and spread["high"] is not None:
        text += f" ({number(spread['low'] / factor)} … {number(spread['high'] / factor)})"
    return f"{text} {name}".strip() if name != "ratio" else text


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a Markdown table, without columns that are empty throughout."""
    all_ = [list(row) for row in rows]
    kept = [i for i in range(len(head)) if any(row[i] for row in all_)]
    yield "| " + " | ".join(head[i] for i in kept) + " |"
    yield "|" + "---|" * len(kept)
    for row in all_:
        yield "| " + " | ".join(row[i].replace("|", "\\|") for i in kept) + " |"


def ratios(row: Json) -> str:
    """Return how many times better ours is than each peer."""
    several = len(row["ratios"]) > 1
    texts = [f"{cell(one)}× {name}'s" if several else f"{cell(one)}×" for name, one in row["ratios"].items()]
    return "; ".join(texts)


def limited(row: Json) -> str:
    """Return the share of the limit that ours reaches."""
    if row["limit"] is None or row["limit_fraction"] is None:
        return ""
    return f"{number(row['limit_fraction'])} of {row['limit']}"


def flat(rows: Sequence[Json]) -> Iterator[str]:
    """Yield a table with a line for each row and a column for each side."""
    sides = list(dict.fromkeys(side for row in rows for side in row["sides"]))
    sides.sort(key=lambda side: side != OURS)
    head = ["", *sides, "times better", "of the limit", "beside"]
    lines = [
        [
            row["case"],
            *(cell(row["sides"][side], row["unit"]) if side in row["sides"] else "" for side in sides),
            ratios(row),
            limited(row),
            str(row["facts"].get("beside", "")),
        ]
        for row in rows
    ]
    yield from table(head, lines)


def pivoted(rows: Sequence[Json]) -> Iterator[str]:
    """Yield a table for each size: a line for each step and side, a column for each measure."""
    measures = list(dict.fromkeys(row["facts"]["measure"] for row in rows))
    for size in dict.fromkeys(row["facts"]["size"] for row in rows):
        yield ""
        yield f"### {size}"
        yield ""
        chosen = [row for row in rows if row["facts"]["size"] == size]
        lines = []
        for step in dict.fromkeys(row["facts"]["step"] for row in chosen):
            found = {row["facts"]["measure"]: row for row in chosen if row["facts"]["step"] == step}
            sides = list(dict.fromkeys(side for row in found.values() for side in row["sides"]))
            for side in sides:
                cells = [
                    cell(found[m]["sides"][side], found[m]["unit"])
                    if m in found and side in found[m]["sides"]
                    else ""
                    for m in measures
                ]
                first = next(iter(found.values()))
                told = [ratios(first), limited(first)] if side == OURS else ["", ""]
                lines.append([step, side, *cells, *told])
        head = ["step", "by", *measures, f"times better in {measures[0]}", "of the limit"]
        yield from table(head, lines)


def about(result: Json) -> Iterator[str]:
    """Yield what was run, when, where and how."""
    machine, protocol = result["machine"], result["protocol"]
    memory = machine["memory_bytes"] / 2**30
    others = "unmeasured" if result["others_cpu_share"] is None else f"{result['others_cpu_share']:.0%}"
    yield f"`{result['command']}`, commit {result['commit']}, {result['finished'][:10]}, {machine['cpu']},"
    yield f"{machine['usable_cores']} cores, {memory:.0f} GiB; others {others}."
    yield ""
    yield protocol["statement"]
    told = {key: value for key, value in protocol.items() if key not in WORDED and _short(value)}
    if told:
        yield "; ".join(f"{key.replace('_', ' ')}: {_text(value)}" for key, value in told.items()) + "."
    if result["limits"]:
        said = (f"{name} {cell(one['rate'], one['unit'])}" for name, one in result["limits"].items())
        yield ""
        yield f"Limits in this run: {'; '.join(said)}."


def _short(value: Any) -> bool:
    return not isinstance(value, dict) and len(str(value)) <= 120


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def section(result: Json) -> Iterator[str]:
    """Yield one benchmark's part of the page."""
    yield f"## {result['name']}"
    yield ""
    yield result["about"]
    yield ""
    yield from about(result)
    yield ""
    rows = result["rows"]
    steps = [row for row in rows if {"size", "step", "measure"} <= row["facts"].keys()]
    other = [row for row in rows if row not in steps]
    if steps:
        yield from pivoted(steps)
        yield ""
    if len(other) > MANY:
        yield from (
            f"<details><summary>all {len(other)} rows</summary>",
            "",
            *flat(other),
            "",
            "</details>",
            "",
        )
    elif other:
        yield from (*flat(other), "")


def overview(results: Sequence[Json]) -> Iterator[str]:
    """Yield a line for each benchmark and peer: the lowest, the median and the highest ratio."""
    lines = []
    for result in results:
        for peer, unit in dict.fromkeys(
            (peer, _kind(row)) for row in result["rows"] for peer in row["ratios"]
        ):
            chosen = [row for row in result["rows"] if peer in row["ratios"] and _kind(row) == unit]
            found = sorted((row["ratios"][peer]["median"], row["case"]) for row in chosen)
            ends = [f"{number(ratio)}× ({case})" for ratio, case in (found[0], found[-1])]
            if len(found) == 1:
                ends = [ends[0], ""]
            middle = f"{number(median(ratio for ratio, _ in found))}×"
            link = f"[{result['name']}](#{result['name']})"
            lines.append([link, peer, unit, str(len(found)), ends[0], middle, ends[1]])
    if lines:
        yield from table(["benchmark", "peer", "figure", "rows", "lowest", "median", "highest"], lines)


def _kind(row: Json) -> str:
    return str(row["facts"].get("measure", row["unit"]))


def page(results: Sequence[Json]) -> str:
    """Return the whole page."""
    lines = [INTRO, *overview(results), ""]
    for result in results:
        lines += section(result)
    return "\n".join(lines).rstrip() + "\n"


def load(folder: Path = RESULTS) -> list[Json]:
    """Return all results in the page's order; exits on one that has not the form."""
    results = []
    for file in sorted(folder.glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        wrong = problems(result)
        if wrong:
            raise SystemExit("\n".join(f"{file.name}: {line}" for line in wrong))
        results.append(result)
    known = {name: place for place, name in enumerate(ORDER)}
    return sorted(results, key=lambda one: (known.get(one["name"], len(known)), one["name"]))


def main() -> None:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the page differs")
    chosen = parser.parse_args()
    text = page(load())
    if not chosen.check:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        sys.exit(f"{PAGE.relative_to(ROOT)} is not what benchmarks/results gives: make performance")


if __name__ == "__main__":
    main()
