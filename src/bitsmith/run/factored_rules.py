"""Schemes of factors for a model's matrices, by measurement: `tensor_types` of `run.folder.write_folder`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bitsmith.archs import TensorSpec, architecture_of, claim
from bitsmith.errors import BitsmithError
from bitsmith.passes.factorize import head_energies
from bitsmith.passes.factors import Factors, Metric
from bitsmith.store import Checkpoint, TensorRef, open_checkpoint
from bitsmith.store.statistics import SiteStatistics, Statistics, dense_moment, open_statistics

Rules = list[tuple[str, str]]

_NO_LINEARS = ("delta.in_a", "delta.in_b", "delta.conv")
_HEADS = {"attn.o": "attn.q", "delta.out": "delta.in_z"}
"""Output projections, and whose rows are the same heads."""


def rank_rules(
    model: Path, error: float, *, code: str = "int8", statistics: Path | None = None, match: str = ""
) -> Rules:
    """Return `SVD:r=R:code` for every linear of the text layers whose name `match` is found in.

    R is the smallest rank whose truncation leaves `|(W - W') H^½| / |W H^½|` of at most `error` (Eckart,
    Young, Mirsky), H the second moment of the inputs, 1 without statistics; what rounding adds is not in it.
    Raises BitsmithError for an error that is not between 0 and 1 and a `match` that no name has.
    """
    if not 0 < error < 1:
        raise BitsmithError(f"error is {error}, expected one between 0 and 1")
    rules = []
    with open_checkpoint(model) as checkpoint:
        found = _Sources(checkpoint, statistics)
        for spec, ref in found.linears(match):
            inputs = found.inputs(spec)
            moment = None if inputs is None or inputs.moment is None else dense_moment(inputs.moment)
            factors = Factors(
                ref, Metric(None if moment is None else moment.astype(np.float64), ref.shape[1])
            )
            energy = np.square(factors.sigma)
            tails = np.append(np.cumsum(energy[::-1])[::-1], 0.0)
            rank = max(1, int(np.argmax(tails <= error**2 * tails[0])))
            rules.append((_exactly(spec.name), f"SVD:r={rank}:{code}"))
    if not rules:
        raise BitsmithError(f"no linear of the layers has a name that matches {match!r}", path=model)
    return rules


def pruning_rules(
    model: Path,
    keep: float,
    *,
    kernel_rank: int | None = None,
    code: str = "int4",
    statistics: Path | None = None,
) -> Rules:
    """Return schemes that drop the attention heads and DeltaNet value heads of least output norm.

    A share `keep` of each layer's heads stays, at least one: columns of the output projection, rows of q_proj
    (gates included), of in_proj_z and of the values in in_proj_qkv. Heads are ranked by `tr(O_h H_hh O_hᵀ)`
    (`head_energies`), with `statistics` over what they really put out. With a `kernel_rank` DeltaNet's q and
    k rows become a product of that rank. k_proj and v_proj, which heads share, have no rule.
    Raises BitsmithError for a share that is not between 0 and 1.
    """
    if not 0 < keep <= 1:
        raise BitsmithError(f"keep is {keep}, expected a share between 0 and 1")
    rules: Rules = []
    with open_checkpoint(model) as checkpoint:
        found = _Sources(checkpoint, statistics)
        for spec, ref in found.linears(""):
            if spec.role in _HEADS:
                kept = found.kept_heads(spec, ref, keep)
                rules += found.layer_rules(spec, kept, kernel_rank, code)
    return rules


class _Sources:
    """A checkpoint's linears, statistics of their inputs, and its numbers of heads."""

    def __init__(self, checkpoint: Checkpoint, statistics: Path | None) -> None:
        claimed = list(claim(checkpoint))
        self._specs = [(spec, ref) for spec, ref in claimed if spec.component == "text"]
        self._arch = architecture_of(checkpoint)
        self._statistics: Statistics | None = None
        if statistics is not None:
            self._statistics = open_statistics(statistics, [spec for spec, _ in claimed])

    def linears(self, match: str) -> list[tuple[TensorSpec, TensorRef]]:
        """Return the linears of the text layers."""
        return [
            (spec, ref)
            for spec, ref in self._specs
            if spec.layer is not None
            and len(spec.shape) == 2
            and spec.role not in _NO_LINEARS
            and re.search(match, spec.name)
        ]

    def inputs(self, spec: TensorSpec) -> SiteStatistics | None:
        return None if self._statistics is None else self._statistics.hugging_face(spec)

    def heads(self, spec: TensorSpec) -> int:
        """Return the number of heads that an output projection reads."""
        if spec.role == "attn.o":
            return self._arch.number("num_attention_heads")
        return self._arch.number("linear_num_value_heads", 32)

    def kept_heads(self, spec: TensorSpec, ref: TensorRef, keep: float) -> list[int]:
        """Return the heads that stay, ascending."""
        inputs, heads = self.inputs(spec), self.heads(spec)
        moment = None if inputs is None or inputs.moment is None else dense_moment(inputs.moment)
        energies = head_energies(np.asarray(ref.read(), np.float32), heads, moment)
        count = max(1, math.floor(keep * heads + 1e-9))
        return sorted(np.argsort(-energies, kind="stable")[:count].tolist())

    def layer_rules(self, output: TensorSpec, kept: list[int], kernel_rank: int | None, code: str) -> Rules:
        """Return the rules of one layer's matrices that hold heads."""
        heads = self.heads(output)
        layer = {spec.role: spec for spec, _ in self._specs if spec.layer == output.layer}
        plain = code.upper()
        rules = [
            (_exactly(output.name), f"{plain}:cols={_blocks(output.shape[1] // heads, kept)}"),
            *_row_rules(layer, _HEADS[output.role], heads, kept, plain),
        ]
        if (mixed := layer.get("delta.in_qkv")) is not None and output.role == "delta.out":
            values = output.shape[1]
            width, kernel = values // heads, mixed.shape[0] - values
            if kernel % width:
                return rules
            rows = [*range(kernel // width), *(kernel // width + head for head in kept)]
            form = plain if kernel_rank is None else f"SVD+{plain}:r={kernel_rank}:{code}:kernel={kernel}"
            rules.append((_exactly(mixed.name), f"{form}:rows={_blocks(width, rows)}"))
        return rules


def _row_rules(layer: Mapping[str, TensorSpec], role: str, heads: int, kept: list[int], plain: str) -> Rules:
    spec = layer[role]
    return [(_exactly(spec.name), f"{plain}:rows={_blocks(spec.shape[0] // heads, kept)}")]


def _blocks(size: int, kept: list[int]) -> str:
    return f"{size}x{'.'.join(map(str, kept))}"


def _exactly(name: str) -> str:
    return f"^{re.escape(name)}$"
