"""What an evaluation is: artifacts, protocol and measures with intervals, without what measures them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from bitsmith import __version__

INTERVAL = "95 % paired bootstrap over chunks"
RESAMPLES = 2000


@dataclass(frozen=True)
class Measure:
    """A value with its unit and interval; `low`, `high` and `interval` are None where that is unmeasured."""

    value: float
    unit: str
    low: float | None
    high: float | None
    interval: str | None


@dataclass(frozen=True)
class Artifact:
    """What was measured: bytes of its weight files, and `bpw` = 8 × stored tensor bytes / `weights`."""

    path: str
    file_bytes: int
    weights: int
    bpw: float


@dataclass(frozen=True)
class Protocol:
    """How it was measured; `chunks` is what was scored, `chunks_available` what the text has.

    `device` is where the forwards ran, in float32, `products` the precision of their matrix products.
    """

    name: str
    text: str
    text_sha256: str
    text_tokens: int
    ctx_tokens: int
    chunks: int
    chunks_available: int
    scored_tokens: int
    resamples: int
    seed: int
    device: str = "cpu"
    products: str = "float32"


@dataclass(frozen=True)
class Evaluation:
    """A candidate measured against a reference.

    KLD is KL(reference‖candidate) per scored token in nats; `top1_agreement` is the share of scored tokens
    where both rank the same token first; `ppl_ratio` and `ppl_difference` are candidate against reference.
    """

    reference: Artifact
    candidate: Artifact
    protocol: Protocol
    ppl_ref: Measure
    ppl_cand: Measure
    ppl_ratio: Measure
    ppl_difference: Measure
    mean_kld: Measure
    median_kld: Measure
    kld_99: Measure
    kld_99_9: Measure
    max_kld: Measure
    top1_agreement: Measure
    warnings: tuple[str, ...] = ()

    @property
    def measures(self) -> dict[str, Measure]:
        """Every measure by name, in the order of the table."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Measure)}

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready record; an unmeasured interval is null."""
        return {
            "kind": "evaluation",
            "bitsmith": __version__,
            "reference": asdict(self.reference),
            "candidate": asdict(self.candidate),
            "protocol": asdict(self.protocol),
            "measures": {name: asdict(measure) for name, measure in self.measures.items()},
            "warnings": list(self.warnings),
        }

    def rows(self) -> list[tuple[str, str, str]]:
        """Return the measures as (label, value, interval) for a table; a missing interval is `unmeasured`."""
        return [(label, *_shown(self.measures[name], style)) for name, (label, style) in _LABELS.items()]


_LABELS = {
    "ppl_ref": ("perplexity of the reference", "{:.4f}"),
    "ppl_cand": ("perplexity of the candidate", "{:.4f}"),
    "ppl_ratio": ("perplexity, candidate / reference", "{:.5f}"),
    "ppl_difference": ("perplexity, candidate - reference", "{:+.4f}"),
    "mean_kld": ("mean KLD", "{:.6f} nats"),
    "median_kld": ("median KLD", "{:.6f} nats"),
    "kld_99": ("99 % KLD", "{:.6f} nats"),
    "kld_99_9": ("99.9 % KLD", "{:.6f} nats"),
    "max_kld": ("largest KLD", "{:.6f} nats"),
    "top1_agreement": ("top-1 agreement", "{:.2%}"),
}


def _shown(measure: Measure, style: str) -> tuple[str, str]:
    if measure.low is None or measure.high is None:
        return style.format(measure.value), "unmeasured"
    bare = style.removesuffix(" nats")
    return style.format(measure.value), f"{bare.format(measure.low)} … {bare.format(measure.high)}"
