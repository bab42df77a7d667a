"""Mean KL divergence of weights kept as factors over that of integer codes of the same size.

    python benchmarks/factored.py MODEL --text FILE [--stats DIR] [--ctx 256] [--chunks 8] [--match REGEX]
        [--linears 'SVD:bpw={} SVD+INT4:bpw={}'] [--tables 'TT:bpw={} TT+SVD:core=128:bpw={}'] [--out FILE]

The rivals are INT4 with groups of 32 and of 128 columns (4.5 and 4.125 bits per weight); a scheme's rank is
the largest that stays within the rival's bits. `--linears` replace the linears of the text layers whose names
`--match` is found in, `--tables` the token embedding; all else is as in MODEL. With `--stats` each is made
again by statistics, Tensor-Trains with scales. Reported: mean KLD from MODEL in nats over the second half of
every window with its 95 % interval (paired bootstrap over chunks), bits per weight and relative squared error
of what was replaced, seconds of packing, and `ratio`: the KLD over the rival's with the same statistics, with
its paired interval. A scheme that the bits do not suffice for is reported with the reason.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from measuring import OURS, Row, Spread, arguments, report

from bitsmith.errors import BitsmithError
from bitsmith.numerics.resampling import ratio_of_sums
from bitsmith.run.evaluate import Reference
from bitsmith.run.folder import KEPT, write_folder

BUDGETS = {32: "4.5", 128: "4.125"}
LINEARS = "SVD:bpw={} SVD:int8:bpw={} SVD+INT4:bpw={}"
TABLES = "TT:bpw={} TT+SVD:core=128:bpw={}"
EMBEDDING = r"embed_tokens\.weight$"
LAYERS = r"layers\.\d+\.(mlp|self_attn\.[qkvo]_|linear_attn\.(in_proj_(qkv|z)|out_))"


class Case(NamedTuple):
    """Which tensors become what; `group` columns share a scale."""

    pattern: str
    scheme: str
    group: int
    rival: int
    statistics: Path | None


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Yield each rival, then what is to be compared with it."""
    for pattern, schemes in ((options.match, options.linears), (EMBEDDING, options.tables)):
        for statistics in (None, options.stats) if options.stats else (None,):
            for group, bits in BUDGETS.items():
                if schemes:
                    yield Case(pattern, "INT4", group, group, statistics)
                for scheme in schemes.split():
                    scales = ":scales" if statistics and scheme.upper().startswith("TT:") else ""
                    yield Case(pattern, scheme.format(bits) + scales, 128, group, statistics)


def measured(case: Case, options: argparse.Namespace, reference: Reference, out: Path) -> dict[str, Any]:
    """Return a case's figures, and under `sums` the KLD of each chunk."""
    named = {
        "tensors": case.pattern,
        "scheme": case.scheme,
        "group": case.group,
        "statistics": case.statistics is not None,
    }
    started = time.monotonic(), time.process_time()
    try:
        record = write_folder(
            options.model, out, KEPT, group=case.group, tensor_types=[(case.pattern, case.scheme)],
            statistics=case.statistics, overwrite=True,
        )  # fmt: skip
    except BitsmithError as error:
        return {**named, "refused": str(error)}
    seconds = time.monotonic() - started[0], time.process_time() - started[1]
    rows = [row for row in record.tensors if row.scheme != KEPT]
    weights = sum(prod(row.shape) for row in rows)
    evaluation, scores = reference.measure(out)
    return named | {
        "matrices": len(rows),
        "bpw": 8 * sum(row.nbytes for row in rows) / weights,
        "relative_error": sum(row.relative_error * prod(row.shape) for row in rows) / weights,
        "mean_kld": asdict(evaluation.mean_kld),
        "seconds": {"wall": round(seconds[0], 1), "cpu": round(seconds[1], 1)},
        "sums": scores.kld.sum(axis=1).tolist(),
    }


def row_of(found: dict[str, Any]) -> Row:
    """Return one case's row: its mean KLD with the interval, and the rival's over it."""
    kind = "tables" if found["tensors"] == EMBEDDING else "linears"
    words = f"{kind} by {found['scheme']}, group {found['group']}" + ", statistics" * found["statistics"]
    kld, ratio = found["mean_kld"], found.get("ratio")
    sides = {OURS: Spread(kld["value"], kld["low"], kld["high"], 1)}
    if ratio is None:
        return Row(words, "nats", "lower", sides, facts=found)
    rival = found["rival"]
    sides[rival] = Spread.of([kld["value"] / ratio["value"]])
    ends = (1 / ratio["high"], 1 / ratio["low"]) if ratio["high"] else (None, None)
    return Row(words, "nats", "lower", sides, {rival: Spread(1 / ratio["value"], *ends, 1)}, facts=found)


def main() -> None:
    """Measure every case and print or write the JSON."""
    parser = arguments(__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--stats", type=Path)
    parser.add_argument("--ctx", type=int, default=256)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--match", default=LAYERS)
    parser.add_argument("--linears", default=LINEARS)
    parser.add_argument("--tables", default=TABLES)
    options = parser.parse_args()
    results, rivals = [], {}
    with (
        tempfile.TemporaryDirectory() as folder,
        Reference(options.model, options.text, options.ctx, options.chunks) as reference,
    ):
        for case in cases(options):
            found = measured(case, options, reference, Path(folder) / "out")
            sums, key = found.pop("sums", None), (case.pattern, case.rival, case.statistics)
            if case.scheme == "INT4":
                rivals[key] = sums
            elif sums is not None:
                found["rival"] = f"INT4 in groups of {case.rival}"
                found["ratio"] = asdict(ratio_of_sums(sums, rivals[key]))
            sys.stderr.write(json.dumps(found) + "\n")
            results.append(found)
        protocol = asdict(reference.protocol)
    protocol["statement"] = (
        "Mean KL divergence from the model in nats per token, intervals are 95 % paired bootstraps over "
        "chunks; integer codes of the same bits are the rival."
    )
    protocol["refused"] = [found for found in results if "refused" in found]
    rows = [row_of(found) for found in results if "refused" not in found]
    report("factored", protocol, rows, out=options.out)


if __name__ == "__main__":
    main()
