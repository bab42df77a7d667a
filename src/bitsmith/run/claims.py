"""The published compression plan this assay answers ("28 hours", SAHC on Qwen3.5-9B), claim by claim.

Every claim is held against the plan's own numbers: its singular values, its table, its shapes.
"""

from __future__ import annotations

from dataclasses import dataclass

from bitsmith.archs import Qwen35, TensorSpec
from bitsmith.archs.published import published_config
from bitsmith.numerics.partial_spectrum import PartialSpectrum, bounds_from_partial
from bitsmith.run.assay_result import SeedCheck

SIGMA = {1: 4.65, 2: 4.05, 3: 3.65, 4: 3.55, 512: 2.03, 1024: 1.72, 2048: 1.18, 4096: 0.95}
"""Published singular values of `layers.15.mlp.gate_proj` by index."""
SHAPE = (12288, 4096)


@dataclass(frozen=True)
class Claim:
    """What the plan says of one component: its share of the parameters, its method and ratio to 16 bits."""

    key: str
    name: str
    share: float
    method: str
    ratio: float


CLAIMS = (
    Claim("C1", "FFN", 0.542, "SVD rank 512 + int4", 25.3),
    Claim("C2", "full attention", 0.038, "low rank + head pruning + int4", 8.0),
    Claim("C3", "linear attention", 0.113, "kernel SVD + value pruning + int4", 12.6),
    Claim("C4", "embedding + head", 0.228, "Tensor-Train + SVD core + int4", 20.5),
    Claim("C5", "vision, MTP, norms, other", 0.079, "int4", 4.0),
)
_ROLES = {"ffn": "C1", "attn": "C2", "delta": "C3", "embed": "C4", "head": "C4"}
_GATELESS_ATTENTION = 2 * 4096 * 4096 + 2 * 1024 * 4096  # q, o and the four KV heads' k, v; no gate rows


def component_key(spec: TensorSpec) -> str:
    """Return the plan's component, C1 to C5, of a tensor; the vision tower and the MTP layer are C5 whole."""
    return _ROLES.get(spec.role.split(".")[0], "C5") if spec.component == "text" else "C5"


def combined_ratio(parts: list[tuple[float, float]]) -> float:
    """Return the ratio of a whole from (share, ratio) of its parts: Σ share / Σ share/ratio."""
    return sum(share for share, _ in parts) / sum(share / ratio for share, ratio in parts)


def seed_table_ratio() -> float:
    """Return what the plan's own table multiplies to."""
    return combined_ratio([(claim.share, claim.ratio) for claim in CLAIMS])


def published_shares() -> dict[str, float]:
    """Return the true share of each component in the published Qwen3.5-9B shapes."""
    sizes = _sizes_9b()
    total = sum(sizes.values())
    return {key: size / total for key, size in sizes.items()}


def seed_checks() -> tuple[SeedCheck, ...]:
    """Return each of the plan's claims held against its own numbers."""
    spectrum = bounds_from_partial(SIGMA, SHAPE)
    return (_rank_check(spectrum), *_error_checks(spectrum), _shares_check(), *_ratio_checks())


def _sizes_9b() -> dict[str, int]:
    sizes = dict.fromkeys((claim.key for claim in CLAIMS), 0)
    for spec in Qwen35(published_config("9B")).specs():
        size = 1
        for length in spec.shape:
            size *= length
        sizes[component_key(spec)] += size
    return sizes


def _rank_check(spectrum: PartialSpectrum) -> SeedCheck:
    least = float(spectrum.lowest_error[3794])
    low, high = spectrum.rank_bounds(0.10)
    return SeedCheck(
        "gate_proj reaches error 0.10 at rank 3,794 of 4,096",
        f"impossible with its σ: rank 3,794 leaves at least {least:.4f}; error 0.10 takes rank {low:,} to "
        f"{high:,}",
        least <= 0.10,
    )


def _error_checks(spectrum: PartialSpectrum) -> tuple[SeedCheck, SeedCheck]:
    least, most = float(spectrum.lowest_error[512]), float(spectrum.highest_error[512])
    found = f"its σ allow {least:.3f} to {most:.3f} at rank 512"
    return (
        SeedCheck(
            "rank 512 leaves an error of 0.834 (mean of the FFN)",
            f"possible for this layer: {found}",
            least <= 0.834 <= most,
        ),
        SeedCheck(
            "rank 512 leaves at most 0.039 (Eckart-Young-Mirsky on exponential decay)",
            f"{found}; the σ do not decay exponentially",
            least <= 0.039,
        ),
    )


def _shares_check() -> SeedCheck:
    sizes = _sizes_9b()
    real = published_shares()
    gateless = {**sizes, "C2": 8 * _GATELESS_ATTENTION, "C3": 24 * _GATELESS_ATTENTION}
    rest = sizes["C5"]
    total = sum(gateless.values())
    shown = ", ".join(f"{claim.name} {real[claim.key]:.2%}" for claim in CLAIMS)
    wrong = ", ".join(f"{gateless[claim.key] / total:.1%}" for claim in CLAIMS)
    return SeedCheck(
        "shares " + ", ".join(f"{claim.share:.1%}" for claim in CLAIMS),
        f"true shapes ({sum(sizes.values()):,} parameters) give {shown}; the published shares ({wrong}) "
        f"follow only if all 32 layers are charged {_GATELESS_ATTENTION:,} parameters of attention "
        f"without gates: {total:,} parameters, of which {rest:,} are C5",
        all(abs(real[claim.key] - claim.share) < 0.001 for claim in CLAIMS),
    )


def _ratio_checks() -> tuple[SeedCheck, SeedCheck, SeedCheck]:
    table, true = seed_table_ratio(), combined_ratio([(published_shares()[c.key], c.ratio) for c in CLAIMS])
    rows, columns = SHAPE
    low_rank = 16 * rows * columns / (4 * 512 * (rows + columns))
    shares = {claim.key: claim.share for claim in CLAIMS}
    capped = (shares["C1"] + shares["C2"] + shares["C3"]) / 3.99
    needed = [shares["C4"] / (1 / 5 - capped - shares["C5"] / ratio) for ratio in (3.99, 3.5, 3.13)]
    return (
        SeedCheck(
            "projected total 10× to 13×",
            f"its table multiplies to {table:.1f}×, with true shares to {true:.1f}×",
            10 <= table <= 13,
        ),
        SeedCheck(
            "SVD rank 512 with 4-bit factors is 25.3×",
            f"{rows:,} × {columns:,} gives {low_rank:.1f}× before scales",
            low_rank >= 25.3,
        ),
        SeedCheck(
            "5× in total needs at least 100× from embedding and head",
            "with its shares and 3.99× elsewhere: "
            + ", ".join(
                f"{r:.0f}× if C5 reaches {c}×" for r, c in zip(needed, (3.99, 3.5, 3.13), strict=True)
            ),
            min(needed) >= 100,
        ),
    )
