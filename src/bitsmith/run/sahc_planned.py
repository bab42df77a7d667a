"""What recipe `sahc` would try on a model: every tensor's methods with their bytes; nothing is computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from bitsmith.archs import architecture_of, claim
from bitsmith.run.folder import KEPT, plan_folder
from bitsmith.run.guide import Guide
from bitsmith.run.sahc_methods import ROUNDER, ROW_GROUP, Method, Weights
from bitsmith.run.sahc_plan import STORED, PlanRow, component, int4_types, plan_rows, promised_ratio, prunings
from bitsmith.store import Checkpoint, open_checkpoint
from bitsmith.store.factored import Blocks


@dataclass(frozen=True)
class PlannedMethod:
    """One method of a row's chain: exact bytes of its parts, and the ratio that the plan claims for it.

    `claimed_ratio` is to 16 bits, None where nothing is claimed.
    """

    method: str
    scheme: str
    nbytes: int
    claimed_ratio: float | None


@dataclass(frozen=True)
class PlannedRow:
    """One tensor: what is tried on it, in order. `judged` says whether a forward can judge it."""

    name: str
    component: str
    shape: tuple[int, ...]
    judged: bool
    chain: tuple[PlannedMethod, ...]


@dataclass(frozen=True)
class SahcPlan:
    """The plan of a model. Which method a row ends with is decided by its gates.

    `planned_bytes` are those of all tensors if every row kept its first method, `int4_bytes` those of
    row-int4 alone, which is written and measured beside it; `int4_file_bytes` are its shards', with headers.
    """

    model: str
    rows: tuple[PlannedRow, ...]
    parameters: int
    stored_bytes: int
    planned_bytes: int
    int4_bytes: int
    int4_file_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain values."""
        return {"kind": "sahc plan", **asdict(self)}


def plan_sahc(model: Path, *, statistics: Path | None = None) -> SahcPlan:
    """Return what `run.sahc.sahc` would try on `model`.

    Raises as it does for a model that it cannot take; weights are not judged.
    """
    plan_folder(model, KEPT, statistics=statistics)
    with open_checkpoint(model) as checkpoint:
        claimed = claim(checkpoint)
        guide = None if statistics is None else Guide(checkpoint, statistics, ROUNDER)
        plans = plan_rows(claimed)
        rows = tuple(_rows(checkpoint, plans, guide))
        stored = sum(ref.nbytes for ref in checkpoint.values())
        parameters = sum(ref.size for ref in checkpoint.values())
    alone = plan_folder(model, KEPT, group=ROW_GROUP, tensor_types=int4_types(plans))
    return SahcPlan(
        model=str(model),
        rows=rows,
        parameters=parameters,
        stored_bytes=stored,
        planned_bytes=sum(row.chain[0].nbytes for row in rows),
        int4_bytes=sum(row.nbytes for row in alone.rows),
        int4_file_bytes=alone.file_bytes,
    )


def _rows(checkpoint: Checkpoint, plans: Sequence[PlanRow], guide: Guide | None) -> Iterator[PlannedRow]:
    config, blocks = architecture_of(checkpoint).text_config, dict[str, tuple[Blocks, int]]()
    for place, layer in groupby(plans, key=lambda plan: (plan.place, plan.layer)):
        if place[0] == "layer":
            blocks |= prunings(checkpoint, list(layer), config, guide)
    for plan in plans:
        kept, axis = blocks.get(plan.name, (None, 0))
        chain = tuple(_method(plan, method, kept, axis) for method in plan.chain)
        yield PlannedRow(plan.name, plan.component, plan.shape, plan.place is not None, chain)


def _method(plan: PlanRow, method: Method, kept: Blocks | None, axis: int) -> PlannedMethod:
    if method is STORED:
        return PlannedMethod(method.name, KEPT, plan.source_bytes, None)
    shape = Weights(np.broadcast_to(np.float32(0), plan.shape), kept, axis)
    return PlannedMethod(
        method.name, method.scheme(shape), method.nbytes(shape), promised_ratio(plan, method)
    )


def component_bytes(plan: SahcPlan) -> list[tuple[str, str, float, float, float]]:
    """Return name, content, share of the weights, claimed ratio and that of the first methods here."""
    found = []
    for name in sorted({row.component for row in plan.rows}):
        own = [row for row in plan.rows if row.component == name]
        size, first = sum(prod(row.shape) for row in own), sum(row.chain[0].nbytes for row in own)
        what = component(name)
        found.append(
            (name, what.what, size / max(1, plan.parameters), what.claimed_ratio, 2 * size / max(1, first))
        )
    return found
