"""How well allocation predicts: the KLD of random plans as predicted and as measured.

    python benchmarks/allocation.py [--model FOLDER] [--text FILE] [--ctx 512] [--chunks 16] [--plans 20]
        [--out FILE]

Sensitivities are measured on every second chunk, plans on the others, all by mean KLD over positions ctx/2 to
ctx-2. Weights are stored by the formats' own search on plain squared error, no calibration. `--plans` random
plans draw a format per group; `same size` ones are then moved group by group, at random, until they are as
large as `--target` allows and no larger. Reported: Spearman's rank correlation of predicted and measured KLD
for plans of one size and of any size, each with a 95 % bootstrap interval over plans; and the KLD of the
allocator's plan over that of the best random plan of no more bytes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measuring import OURS, Row, Spread, arguments, report, value_row
from scipy.stats import spearmanr

from bitsmith.lab.corpus import held_out_text
from bitsmith.lab.models import DEMO_MODEL
from bitsmith.run.allocate import Costs, plans_within
from bitsmith.run.budget import limit_of, parse_target
from bitsmith.run.evaluate import open_model, text_chunks
from bitsmith.run.groups import Group, groups_of
from bitsmith.run.plan import open_source
from bitsmith.run.sensitivity import Budget, Change, Noise, Prober, measure_sensitivities

RESAMPLES = 2000


class RandomPlans:
    """Draws formats per group."""

    def __init__(self, groups: Sequence[Group], costs: Costs, seed: int) -> None:
        self.groups, self.costs = groups, costs
        self.rng = np.random.default_rng(seed)
        self.ladders = [np.argsort(sizes, kind="stable") for sizes in costs.by_group]

    def any_size(self) -> dict[str, str]:
        """Return a format per group, each as likely as any other."""
        return self._named([int(self.rng.integers(len(ladder))) for ladder in self.ladders])

    def same_size(self) -> dict[str, str]:
        """Return formats that take all that the target allows, as nearly as one group more would not fit."""
        ranks = [int(self.rng.integers(len(ladder))) for ladder in self.ladders]
        while self._bytes(ranks) > self.costs.left:
            group = int(self.rng.integers(len(ranks)))
            ranks[group] = max(0, ranks[group] - 1)
        for group in self.rng.permutation(len(ranks)):
            while ranks[group] + 1 < len(self.ladders[group]):
                ranks[group] += 1
                if self._bytes(ranks) > self.costs.left:
                    ranks[group] -= 1
                    break
        return self._named(ranks)

    def _bytes(self, ranks: Sequence[int]) -> int:
        return sum(
            int(sizes[ladder[rank]])
            for sizes, ladder, rank in zip(self.costs.by_group, self.ladders, ranks, strict=True)
        )

    def _named(self, ranks: Sequence[int]) -> dict[str, str]:
        picks = (ladder[rank] for ladder, rank in zip(self.ladders, ranks, strict=True))
        return {group.name: group.formats[pick] for group, pick in zip(self.groups, picks, strict=True)}


def correlation(predicted: Sequence[float], found: Sequence[float]) -> dict[str, float]:
    x, y = np.array(predicted), np.array(found)
    rng = np.random.default_rng(0)
    draws = [rng.integers(len(x), size=len(x)) for _ in range(RESAMPLES)]
    resampled = [spearmanr(x[draw], y[draw]).statistic for draw in draws if len(set(draw)) > 2]
    low, high = np.nanquantile(resampled, (0.025, 0.975))
    ratio = np.exp(np.abs(np.log(y / x)))
    return {
        "spearman": float(spearmanr(x, y).statistic),
        "spearman_low": float(low),
        "spearman_high": float(high),
        "median_factor_off": float(np.median(ratio)),
        "largest_factor_off": float(ratio.max()),
    }


def measured(prober: Prober, groups: Sequence[Group], plans: Sequence[Mapping[str, str]]) -> list[float]:
    changed = [group for group in groups if group.layer is not None]
    return prober.measure([Change(tuple((g, plan[g.name]) for g in changed)) for plan in plans])


def run(options: argparse.Namespace, text: Path) -> dict[str, Any]:
    with open_model(options.model) as model:
        source = open_source(model.source)
        tokens, protocol = text_chunks(model, text, options.ctx, options.chunks)
        groups = groups_of(source)
        limit = limit_of(source, parse_target(options.target))
        started = time.monotonic(), time.process_time()
        table = measure_sensitivities(
            model, groups, tokens[::2], budget=Budget(tokens.size, options.forwards)
        )
        seconds = time.monotonic() - started[0], time.process_time() - started[1]
        allocation = plans_within(source, groups, table, limit, 3)
        drawn = RandomPlans(groups, Costs(source, groups, limit), options.seed)
        same = [drawn.same_size() for _ in range(options.plans)]
        anyhow = [drawn.any_size() for _ in range(options.plans)]
        prober = Prober(model, tokens[1::2], Noise(None))
        ours = []
        for candidate in allocation.candidates:
            types = {row.gguf_name: row.type for row in candidate.plan.rows}
            ours.append({group.name: types[group.tensors[0].gguf_name] for group in groups})
        found = {name: measured(prober, groups, plans) for name, plans in
                 (("same", same), ("any", anyhow), ("ours", ours))}  # fmt: skip
    best = min(range(len(ours)), key=lambda n: found["ours"][n])
    predicted = {
        name: [table.predicted(plan) for plan in plans] for name, plans in (("same", same), ("any", anyhow))
    }
    return {
        "model": options.model.name,
        "target": str(limit),
        "ctx_tokens": options.ctx,
        "sensitivity_tokens": table.scored_tokens,
        "plan_tokens": prober.scored_tokens,
        "text_sha256": protocol.text_sha256,
        "plans": options.plans,
        "same_size": correlation(predicted["same"], found["same"]),
        "any_size": correlation(predicted["any"], found["any"]),
        "uniform_plans_summed_and_measured_nats": table.uniform,
        "scale": table.scale,
        "exponent": table.exponent,
        "allocated": [
            {
                "name": c.name,
                "predicted_nats": c.predicted_nats,
                "gap_nats": c.gap_nats,
                "measured_nats": nats,
            }
            for c, nats in zip(allocation.candidates, found["ours"], strict=True)
        ],
        "optimum_over_best_random": found["ours"][0] / min(found["same"]),
        "best_candidate_over_best_random": found["ours"][best] / min(found["same"]),
        "optimum_over_median_random": found["ours"][0] / float(np.median(found["same"])),
        "sensitivity_forwards": table.forwards,
        "sensitivity_wall_seconds": round(seconds[0], 1),
        "sensitivity_cpu_seconds": round(seconds[1], 1),
    }


def rows_of(found: dict[str, Any]) -> Iterator[Row]:
    """Yield what was found, row by row."""
    for kind in ("same_size", "any_size"):
        one = found[kind]
        spread = Spread(one["spearman"], one["spearman_low"], one["spearman_high"], found["plans"])
        words = f"rank correlation of predicted and measured KLD, {kind.replace('_', ' ')}"
        yield value_row(words, "Spearman's rho", {OURS: spread}, better="higher", **one)
    for against in ("best", "median"):
        value = found[f"optimum_over_{against}_random"]
        yield Row(f"measured KLD of the optimum over the {against} random plan's", "ratio", "lower",
                  {OURS: Spread.of([value])})  # fmt: skip
    seconds = found["sensitivity_wall_seconds"]
    yield value_row("sensitivities, wall time", "s", {OURS: seconds}, forwards=found["sensitivity_forwards"])


def main() -> None:
    options = arguments(__doc__)
    options.add_argument("--model", type=Path, default=DEMO_MODEL)
    options.add_argument("--text", type=Path, help="default: the lab's held-out text")
    options.add_argument("--ctx", type=int, default=512)
    options.add_argument("--chunks", type=int, default=16)
    options.add_argument("--plans", type=int, default=20)
    options.add_argument("--target", default="4.5bpw")
    options.add_argument("--forwards", type=float, default=64)
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "held_out.txt"
        text.write_text(held_out_text(16 * chosen.ctx * chosen.chunks), encoding="utf-8")
        found = run(chosen, chosen.text or text)
    protocol = {
        "statement": "Random plans, a format per group, measured on chunks other than the sensitivities'; "
        "intervals are 95 % bootstraps over plans."
    }
    report("allocation", protocol | found, list(rows_of(found)), out=chosen.out)


if __name__ == "__main__":
    main()
