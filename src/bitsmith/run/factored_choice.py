"""What schemes of factors leave to measurement: ranks by error, heads by what they put out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bitsmith.archs import TensorSpec, architecture_of, claim
from bitsmith.errors import BitsmithError, printable
from bitsmith.numerics.threads import one_blas_thread
from bitsmith.passes.factorize import ErrorMetric, head_energies
from bitsmith.passes.factors import Factors, Metric
from bitsmith.run.factored_scheme import Scheme, is_factored, parse_scheme
from bitsmith.run.guide import VOCABULARY, FiniteRows, finite_rows
from bitsmith.store import Checkpoint, TensorRef
from bitsmith.store.statistics import Statistics, dense_moment, open_statistics

_OUTPUT = {
    "attn.o": "attn.o", "attn.q": "attn.o", "attn.k": "attn.o", "attn.v": "attn.o",
    "delta.out": "delta.out", "delta.in_z": "delta.out", "delta.in_qkv": "delta.out",
}  # fmt: skip
"""Matrices that hold heads, and whose columns those are."""


@one_blas_thread()
def decided(checkpoint: Checkpoint, asked: Mapping[str, str], statistics: Path | None) -> dict[str, str]:
    """Return the schemes `asked` for by tensor with what they leave to measurement put in.

    - `error=` becomes `r=`, the smallest rank whose truncation leaves `|(W - W') H^½| / |W H^½|` of at most
      that (Eckart, Young, Mirsky), H the damped second moment of the inputs, 1 without statistics; what
      rounding adds is not in it;
    - `heads=` becomes `rows=` or `cols=` where a matrix holds heads: of each layer stays a share, at least
      one head, those of most `tr(O_h H_hh O_hᵀ)` (`head_energies`), and of k_proj and v_proj what they need;
    - `kernel=qk` becomes the number of rows that make DeltaNet's queries and keys.

    Raises BitsmithError for scales of a matrix that statistics know nothing of, and for `kernel=qk` of
    another matrix than DeltaNet's in_proj_qkv; DamagedFileError for a weight that is not finite.
    """
    schemes = {name: parse_scheme(text) for name, text in asked.items() if is_factored(text)}
    waiting = {name: scheme for name, scheme in schemes.items() if scheme.is_open}
    if not waiting:
        return dict(asked)
    source = _Source(checkpoint, statistics)
    return {**asked, **{name: source.decided(name, scheme) for name, scheme in waiting.items()}}


class _Source:
    """A checkpoint's matrices, statistics of their inputs, and the heads that stay."""

    def __init__(self, checkpoint: Checkpoint, statistics: Path | None) -> None:
        self._path, claimed = checkpoint.path, list(claim(checkpoint))
        self._found = {spec.name: (spec, ref) for spec, ref in claimed}
        self._arch = architecture_of(checkpoint)
        self._statistics: Statistics | None = None
        if statistics is not None:
            self._statistics = open_statistics(statistics, [spec for spec, _ in claimed])
        self._kept: dict[tuple[str, float], list[int]] = {}

    def decided(self, name: str, scheme: Scheme) -> str:
        """Return a tensor's scheme with nothing left open."""
        spec, ref = self._found[name]
        if scheme.scales:
            self._check_scales(spec, scheme)
        if scheme.error is not None:
            scheme = scheme.with_options(f"r={self._rank(spec, ref, scheme.error)}", without="ERROR=")
        if scheme.kernel == "qk":
            if spec.role != "delta.in_qkv":
                raise BitsmithError(f"{printable(scheme.text)}: only DeltaNet's in_proj_qkv has q and k rows")
            scheme = scheme.with_options(f"kernel={spec.shape[0] - self._output(spec).shape[1]}", without="K")
        if scheme.heads is not None:
            scheme = scheme.with_options(self._blocks(spec, scheme.heads), without="HEADS=")
        return scheme.text

    def _check_scales(self, spec: TensorSpec, scheme: Scheme) -> None:
        known = self._statistics
        counted = known is not None and spec.role in VOCABULARY and known.tokens() is not None
        if known is None or not (counted or known.hugging_face(spec) is not None):
            said = "needs statistics" if known is None else "its statistics know neither tokens nor inputs"
            raise BitsmithError(f"{printable(scheme.text)}: {said} of {spec.name} for its scales")

    def _moment(self, spec: TensorSpec) -> NDArray[np.float64] | None:
        """Return the second moment of a matrix's inputs, or its diagonal alone, as far as it is known."""
        inputs = None if self._statistics is None else self._statistics.hugging_face(spec)
        if inputs is None:
            return None
        found = np.diag(inputs.importance) if inputs.moment is None else dense_moment(inputs.moment)
        return found.astype(np.float64)

    def _rank(self, spec: TensorSpec, ref: TensorRef, error: float) -> int:
        metric = ErrorMetric(self._moment(spec))
        factors = Factors(FiniteRows(ref, self._path), Metric(metric.matrix, ref.shape[1]))
        energy = np.square(factors.sigma)
        tails = np.append(np.cumsum(energy[::-1])[::-1], 0.0)
        return max(1, int(np.argmax(tails <= error**2 * tails[0])))

    def _output(self, spec: TensorSpec) -> TensorSpec:
        """Return the output projection that reads the heads of a matrix."""
        role = _OUTPUT[spec.role]
        layer = (other for other, _ in self._found.values() if other.layer == spec.layer)
        return next(other for other in layer if other.role == role and other.component == spec.component)

    def _heads(self, output: TensorSpec) -> int:
        if output.role == "attn.o":
            return self._arch.number("num_attention_heads")
        return self._arch.number("linear_num_value_heads", 32)

    def _kept_heads(self, output: TensorSpec, share: float) -> list[int]:
        """Return the heads that stay, ascending."""
        if (output.name, share) not in self._kept:
            heads, ref = self._heads(output), self._found[output.name][1]
            weights = finite_rows(ref, 0, ref.shape[0], self._path)
            energies = head_energies(weights, heads, self._moment(output))
            count = max(1, math.floor(share * heads + 1e-9))
            kept = sorted(np.argsort(-energies, kind="stable")[:count].tolist())
            self._kept[output.name, share] = kept
        return self._kept[output.name, share]

    def _blocks(self, spec: TensorSpec, share: float) -> str | None:
        """Return the option that keeps a matrix's part of a layer's heads; None: it keeps everything."""
        if spec.role not in _OUTPUT:
            return None
        output = self._output(spec)
        heads, kept, first, rows = self._heads(output), self._kept_heads(output, share), 0, spec.shape[0]
        if spec.role == output.role:
            return _option("cols", spec.shape[1], heads, kept)
        if spec.role in ("attn.k", "attn.v"):
            shared = self._arch.number("num_key_value_heads")
            kept, heads = sorted({head * shared // heads for head in kept}), shared
        if spec.role == "delta.in_qkv":
            rows, first = output.shape[1], spec.shape[0] - output.shape[1]
        return _option("rows", rows, heads, kept, first)


def _option(key: str, length: int, heads: int, kept: list[int], first: int = 0) -> str | None:
    """Return the blocks of `heads` on an axis of `length` behind `first` rows that all stay."""
    if len(kept) == heads:
        return None
    width = length // heads
    size = math.gcd(width, first) if first else width
    blocks = [*range(first // size)]
    for head in kept:
        begin = (first + head * width) // size
        blocks += range(begin, begin + width // size)
    return f"{key}={size}x{'.'.join(map(str, blocks))}"
