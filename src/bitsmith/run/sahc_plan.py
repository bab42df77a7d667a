"""The seed's plan: five components, what was promised of each, and the chain of fallbacks of every row."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitsmith.archs import TensorSpec
from bitsmith.passes.factorize import head_energies
from bitsmith.run.guide import Guide
from bitsmith.run.sahc_methods import SEED_SIDE, LowRank, Method, Rows, Stored, Train
from bitsmith.store.checkpoint import Checkpoint, TensorRef
from bitsmith.store.factored import Blocks
from bitsmith.store.statistics import dense_moment

STORED = Stored()
INT4, INT8 = Rows(4), Rows(8)
SAFE: tuple[Method, ...] = (INT4, INT8, STORED)
"""Where every chain ends."""
PRUNED_SHARE = 0.25
"""Of heads; how many the seed dropped is not published."""


@dataclass(frozen=True)
class ComponentPlan:
    """A component's promise: `claimed_ratio` to 16 bits, `published_ratio` what the seed ended with."""

    name: str
    what: str
    claimed_ratio: float
    published_ratio: str
    chain: tuple[Method, ...]


COMPONENTS = (
    ComponentPlan("C1", "FFN", 25.3, "3.99", (LowRank(512), *SAFE)),
    ComponentPlan("C2", "full attention", 8.0, "3.99", (LowRank(1024, pruning="head"), LowRank(None), *SAFE)),
    ComponentPlan("C3", "DeltaNet", 12.6, "3.99", (LowRank(768, pruning="value"), LowRank(None), *SAFE)),
    ComponentPlan(
        "C4", "embedding and head", 20.5, "3.92", (Train(32, core=1024), Train(256), Train(4096), *SAFE)
    ),
    ComponentPlan("C5", "vision, MTP, norms", 4.0, "3.13 to 3.89", SAFE),
)


def promised_ratio(row: PlanRow, method: Method) -> float | None:
    """Return the ratio to 16 bits that a method of a row's chain stands for; None for what is kept.

    The first is the component's claim, the others the seed's own figures for them.
    """
    if method is STORED:
        return None
    if method is row.chain[0]:
        return component(row.component).claimed_ratio
    if isinstance(method, Rows):
        return 16 / method.bits
    if isinstance(method, Train):
        return 3.92 if method.rank == SEED_SIDE else 4.85
    return 4.0


_PREFIXES = {"ffn": "C1", "attn": "C2", "delta": "C3", "embed": "C4", "head": "C4"}


@dataclass(frozen=True)
class PlanRow:
    """One tensor of the plan: its component, its chain, and where a forward can judge it.

    `layer` is the text layer it belongs to; `place` is `layer`, `embed`, `head`, or None where no forward of
    ours passes through it (vision, MTP); `source_bytes` are those that the source stores.
    """

    name: str
    component: str
    role: str
    shape: tuple[int, ...]
    layer: int | None
    place: str | None
    chain: tuple[Method, ...]
    source_bytes: int


def plan_rows(claimed: Sequence[tuple[TensorSpec, TensorRef]]) -> tuple[PlanRow, ...]:
    """Return a row per tensor; what is no matrix (norms, convolutions) keeps what is stored."""
    return tuple(_row(spec, ref) for spec, ref in claimed)


def int4_types(rows: Sequence[PlanRow]) -> list[tuple[str, str]]:
    """Return `tensor_types` of row-int4 alone: for every row that has it and that a forward can judge."""
    return [only(row.name, "INT4") for row in rows if row.place and INT4 in row.chain]


def only(name: str, scheme: str) -> tuple[str, str]:
    """Return the rule that gives one tensor a scheme."""
    return f"^{re.escape(name)}$", scheme


def component(name: str) -> ComponentPlan:
    """Return a component by name."""
    return next(one for one in COMPONENTS if one.name == name)


def _row(spec: TensorSpec, ref: TensorRef) -> PlanRow:
    text = spec.component == "text"
    found = _PREFIXES.get(spec.role.split(".")[0], "C5") if text else "C5"
    chain = component(found).chain if len(ref.shape) == 2 and min(ref.shape) > 0 else (STORED,)
    place = None
    if text and spec.layer is not None:
        place = "layer"
    elif text and spec.role in ("embed", "head"):
        place = spec.role
    return PlanRow(
        spec.name, found, spec.role, ref.shape, spec.layer if text else None, place, chain, ref.nbytes
    )


def prunings(
    checkpoint: Checkpoint,
    rows: Sequence[PlanRow],
    config: Mapping[str, Any],
    guide: Guide | None = None,
) -> dict[str, tuple[Blocks, int]]:
    """Return the blocks that pruning keeps, and of which axis, by tensor of one layer.

    The heads that add least to the output (`head_energies`, with a `guide` of what they really put out) go:
    of attention query heads, in q_proj (with their gates) and o_proj, for k and v serve several; of DeltaNet
    value heads, in in_proj_qkv, in_proj_z and out_proj.
    """
    named = {row.role: row for row in rows}
    for role, width in (("attn.o", "head_dim"), ("delta.out", "linear_value_head_dim")):
        if role in named and width in config:
            break
    else:
        return {}
    out, size = named[role], int(config[width])
    heads = out.shape[1] // size
    inputs = None if guide is None else guide.inputs(out.name)
    moment = None if inputs is None or inputs.moment is None else dense_moment(inputs.moment)
    values = np.asarray(checkpoint[out.name].read(), np.float32)
    dropped = _least(head_energies(values, heads, moment))
    kept = tuple(head for head in range(heads) if head not in dropped)
    found = {out.name: (Blocks(size, kept), 1)}
    for reader in ("attn.q", "delta.in_z"):
        if reader in named:
            found[named[reader].name] = Blocks(named[reader].shape[0] // heads, kept), 0
    if "delta.in_qkv" in named:
        first = named["delta.in_qkv"].shape[0] // size - heads
        blocks = (*range(first), *(first + head for head in kept))
        found[named["delta.in_qkv"].name] = Blocks(size, blocks), 0
    return found


def _least(energies: NDArray[np.float64]) -> set[int]:
    count = int(PRUNED_SHARE * energies.size)
    return {int(entry) for entry in np.argsort(energies, kind="stable")[:count]}
