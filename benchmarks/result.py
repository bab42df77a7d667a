"""The one form of what benchmarks find: a row for each measured quantity, limits and machine beside them."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rates import Limit
from turns import OURS, Spread, Turns

SCHEMA = 1
PACKAGES = (
    "bitsmith",
    "numpy",
    "numba",
    "scipy",
    "torch",
    "transformers",
    "safetensors",
    "gguf",
    "xllamacpp",
)
ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"

Json = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One measured quantity: each side's, and how many times better ours is than each peer's.

    `limit_fraction` is the share of a limit's highest rate that ours reaches (1: as fast as the machine can).
    """

    case: str
    unit: str
    better: str
    sides: Mapping[str, Spread]
    ratios: Mapping[str, Spread] = field(default_factory=dict)
    limit: str | None = None
    limit_fraction: float | None = None
    facts: Json = field(default_factory=dict)

    def to_json(self) -> Json:
        """Return its fields."""
        return asdict(self)


def seconds_row(
    case: str,
    turns: Turns,
    *,
    ours: str = OURS,
    limit: Limit | None = None,
    limit_amount: float | None = None,
    **facts: Any,
) -> Row:
    """Return a row of seconds; `limit_amount` bytes or operations take `limit` so long at least."""
    return Row(
        case, "s", "lower", dict(turns), _ratios(turns, ours),
        *_limited(limit, limit_amount, turns[ours].median), facts,
    )  # fmt: skip


def rate_row(
    case: str,
    turns: Turns,
    amount: float,
    unit: str,
    *,
    ours: str = OURS,
    limit: Limit | None = None,
    limit_amount: float | None = None,
    **facts: Any,
) -> Row:
    """Return a row of `amount` over seconds, in `unit` (such as weights/s or tokens/s)."""
    sides = {name: Spread.of(amount / one for one in seconds) for name, seconds in turns.rounds.items()}
    return Row(
        case, unit, "higher", sides, _ratios(turns, ours),
        *_limited(limit, limit_amount, turns[ours].median), facts,
    )  # fmt: skip


def value_row(
    case: str,
    unit: str,
    sides: Mapping[str, float | Spread],
    *,
    better: str = "lower",
    ours: str = OURS,
    limit: Limit | None = None,
    limit_amount: float | None = None,
    **facts: Any,
) -> Row:
    """Return a row of values that are no times taken in turns: bytes, errors, one long run's seconds."""
    spreads = {name: one if isinstance(one, Spread) else Spread.of([one]) for name, one in sides.items()}
    ratios = {}
    if ours in spreads and spreads[ours].median:
        for name, one in spreads.items():
            over = one.median / spreads[ours].median
            if name != ours and one.median:
                ratios[name] = Spread.of([over if better == "lower" else 1 / over])
    seconds = spreads[ours].median if ours in spreads else None
    return Row(case, unit, better, spreads, ratios, *_limited(limit, limit_amount, seconds), facts)


def _ratios(turns: Turns, ours: str) -> dict[str, Spread]:
    return {name: turns.times_faster(name, ours) for name in turns if name != ours and ours in turns}


def _limited(
    limit: Limit | None, amount: float | None, seconds: float | None
) -> tuple[str | None, float | None]:
    if limit is None or amount is None or not seconds:
        return None, None
    return limit.name, amount / (limit.rate.high or limit.rate.median) / seconds


def commit() -> str:
    """Return the repository's commit, with `+` where src or benchmarks differ from it."""
    git = shutil.which("git")
    if git is None:
        return "unknown"
    said = [
        subprocess.run([git, "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
        for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", "src", "benchmarks/*.py"])
    ]
    if said[0].returncode:
        return "unknown"
    return said[0].stdout.strip()[:12] + ("+" if said[1].stdout.strip() else "")


def now() -> str:
    """Return date and time in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def machine() -> Json:
    """Return what figures depend on: processor, cores, memory, versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "usable_cores": usable,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions,
    }


class OthersShare:
    """How much of the machine's processors others have taken since it was made."""

    def __init__(self) -> None:
        self.began, self.busy = time.monotonic(), self._busy()

    @staticmethod
    def _busy() -> float | None:
        stat = Path("/proc/stat")
        if not stat.exists():
            return None
        user, nice, system, _, _, irq, soft, steal = map(int, stat.read_text().split()[1:9])
        all_ = (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")
        used = os.times()
        return all_ - (used.user + used.system + used.children_user + used.children_system)

    def share(self) -> float | None:
        """Return the share of all processors' time, 0 to 1."""
        now = self._busy()
        if now is None or self.busy is None:
            return None
        return round(max(0.0, now - self.busy) / (time.monotonic() - self.began) / (os.cpu_count() or 1), 3)


_OTHERS = OthersShare()
TOP = {
    "schema": int, "name": str, "about": str, "command": str, "commit": str, "finished": str,
    "seconds": float, "machine": dict, "others_cpu_share": (float, type(None)), "protocol": dict,
    "limits": dict, "rows": list,
}  # fmt: skip
ROW = {
    "case": str, "unit": str, "better": str, "sides": dict, "ratios": dict,
    "limit": (str, type(None)), "limit_fraction": (float, type(None)), "facts": dict,
}  # fmt: skip
SPREAD = {"median": (int, float), "low": (int, float, type(None)), "high": (int, float, type(None)), "n": int}


def report(
    name: str,
    protocol: Mapping[str, Any],
    rows: Iterable[Row],
    limits: Mapping[str, Limit] | None = None,
    *,
    out: Path | None = None,
) -> Json:
    """Return a run's result in the one form of all benchmarks, written to `out`, else printed.

    `protocol` needs a `statement`: a sentence or two of what was run on what, in words. Raises `ValueError`
    on what the form does not allow.
    """
    about = (sys.modules["__main__"].__doc__ or name).strip().split("\n\n", 1)[0]
    result = {
        "schema": SCHEMA,
        "name": name,
        "about": " ".join(about.split()),
        "command": " ".join(["python", f"benchmarks/{name}.py", *_arguments()]),
        "commit": commit(),
        "finished": now(),
        "seconds": round(time.monotonic() - _OTHERS.began, 1),
        "machine": machine(),
        "others_cpu_share": _OTHERS.share(),
        "protocol": dict(protocol),
        "limits": {key: limit.to_json() for key, limit in (limits or {}).items()},
        "rows": [row.to_json() for row in rows],
    }
    result = json.loads(json.dumps(_rounded(result), default=str))
    wrong = problems(result)
    if wrong:
        raise ValueError("\n".join(wrong))
    text = _text(result)
    if out is None:
        sys.stdout.write(text)
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    return result


def _text(result: Mapping[str, Any]) -> str:
    """Return JSON with a line for each field, each limit and each row, so that two runs can be compared."""
    lines = []
    for key, value in result.items():
        if key == "rows":
            inner = ",\n".join(f"  {json.dumps(row, ensure_ascii=False)}" for row in value)
            lines.append(f' "rows": [\n{inner}\n ]')
        elif key == "limits" and value:
            inner = ",\n".join(
                f"  {json.dumps(name)}: {json.dumps(one, ensure_ascii=False)}" for name, one in value.items()
            )
            lines.append(f' "limits": {{\n{inner}\n }}')
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _arguments() -> list[str]:
    """Return the command line's arguments: of paths only the last part, and not where the result goes."""
    kept, skip = [], False
    for one in sys.argv[1:]:
        if skip or one == "--out" or one.startswith("--out="):
            skip = one == "--out"
        else:
            kept.append(Path(one).name if "/" in one else one)
    return kept


def _rounded(value: Any) -> Any:
    """Return JSON with numbers of six digits: no measured figure has more."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, (list, tuple)) else value


def problems(result: Mapping[str, Any]) -> list[str]:
    """Return what keeps a result from having the form of all benchmarks, a line each."""
    found = _fields(result, TOP, "result")
    if found:
        return found
    if result["schema"] != SCHEMA:
        found.append(f"schema is {result['schema']}, expected {SCHEMA}")
    if not isinstance(result["protocol"].get("statement"), str):
        found.append("protocol has no statement")
    if not result["rows"]:
        found.append("no rows")
    for name, limit in result["limits"].items():
        fields = {"rate": dict, "unit": str, "how": str}
        found += _fields(limit, fields, f"limit {name}") or _fields(limit["rate"], SPREAD, f"limit {name}")
    for row in result["rows"]:
        found += _fields(row, ROW, f"row {row.get('case')}") or _row_problems(row, result["limits"])
    return found


def _row_problems(row: Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
    name = f"row {row['case']}"
    found = []
    if row["better"] not in ("lower", "higher", "equal"):
        found.append(f"{name}: better is {row['better']!r}, expected lower, higher or equal")
    if not row["sides"] or set(row["ratios"]) - set(row["sides"]):
        found.append(f"{name}: sides {list(row['sides'])}, ratios to {list(row['ratios'])}")
    if row["limit"] is not None and row["limit"] not in known:
        found.append(f"{name}: limit {row['limit']} was not measured")
    for kind in ("sides", "ratios"):
        for side, one in row[kind].items():
            found += _fields(one, SPREAD, f"{name}, {side}")
    return found


def _fields(value: Mapping[str, Any], wanted: Mapping[str, Any], name: str) -> list[str]:
    found = [f"{name}: {key} is missing" for key in wanted if key not in value]
    found += [f"{name}: {key} is unknown" for key in value if key not in wanted]
    for key in set(wanted) & set(value):
        kinds = wanted[key] if isinstance(wanted[key], tuple) else (wanted[key],)
        if float in kinds:
            kinds = (*kinds, int)
        if not isinstance(value[key], kinds) or (isinstance(value[key], bool) and bool not in kinds):
            found.append(f"{name}: {key} is {value[key]!r}")
    return found


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with what all scripts take: `--out FILE` (default: standard output)."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON; default: standard output")
    return parser
