"""Attention and DeltaNet compressed as the seed meant to, measured in weight space (signatures; bodies follow)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Weights = NDArray[np.floating]


@dataclass(frozen=True)
class HeadEnergies:
    """Shares of energy by head (each list sums to 1) and what dropping a query head costs of the output."""

    q: tuple[float, ...]
    k: tuple[float, ...]
    v: tuple[float, ...]
    o: tuple[float, ...]
    output: tuple[float, ...]  # |o_h v_g(h)|² as a share, by query head
    threshold: float
    prunable: tuple[int, ...]  # query heads whose share of the output energy is below the threshold


@dataclass(frozen=True)
class SetCoding:
    """One set of projections stored another way: bytes against 16 bits, errors measured on the weights."""

    method: str
    rank: int
    dropped: int  # heads (attention) or value channels (DeltaNet)
    factor_bits: int
    stored_bytes: int
    ratio_to_16_bit: float
    weights_error: float | None  # relative error of all the weights together
    output_error: float | None  # relative error of the composed maps, see `inputs`
    claimed_ratio: float
    inputs: str  # what the output error assumes of the inputs


def head_energies(
    q: Weights, k: Weights, v: Weights, o: Weights, heads: int, kv_heads: int, threshold: float = 0.01
) -> HeadEnergies:
    """Return energies by head of q (`heads*d in`), k, v (`kv_heads*d in`), o (`out heads*d`)."""
    raise NotImplementedError


def low_rank_heads(
    q: Weights, k: Weights, v: Weights, o: Weights, heads: int, kv_heads: int,
    rank: int | None = None, dropped: int | None = None, factor_bits: int = 4,
) -> SetCoding:
    """EYM low rank per head plus head pruning (seed's C2: 8.0×)."""
    raise NotImplementedError


def kernel_and_values(
    q: Weights, k: Weights, v: Weights, out: Weights, k_heads: int, v_heads: int,
    rank: int | None = None, dropped: int | None = None, factor_bits: int = 4,
) -> SetCoding:
    """Kernel SVD per K head plus value pruning (seed's C3: 12.6×); q, k (`k_heads*d in`), v (`v_heads*d in`), out (`hidden v_heads*d`)."""
    raise NotImplementedError
