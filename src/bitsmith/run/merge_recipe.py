"""What a merge is asked to do: the map, how heads and neurons come together, the teacher's share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from bitsmith.errors import BitsmithError, printable
from bitsmith.passes.merge_fold import LayerAlpha

MapName = Literal["tiered", "joint", "svd", "cross", "cca", "ridge", "random-fold", "sparse-fold"]
Basis = Literal["global", "layer"]
Heads = Literal["match", "pair", "prune", "turn", "frozen-kv", "regress"]
Head = Literal["auto", "map", "solve"]
Ffn = Literal["match", "strongest", "solve", "tie", "regress"]

MAPS: tuple[MapName, ...] = get_args(MapName)
HEADS: tuple[Heads, ...] = get_args(Heads)
FFNS: tuple[Ffn, ...] = get_args(Ffn)
RULE: Literal["rule"] = "rule"
ALPHA_MAX = 0.5


@dataclass(frozen=True)
class MergeRecipe:
    """How a teacher is merged into a student.

    `map` makes the student's residual stream of the teacher's; `tiered` is trunk and residual aligned apart
    (`trunk` dimensions, None: half the student's width), `joint` one Procrustes of both, `svd` no alignment,
    `cross` of all subspaces the one that meets the student best, `cca` and `ridge` rivals that are not
    orthogonal, `random-fold` and `sparse-fold` tiered with a residual that superposes. One map for all layers
    (`global`), or one a `layer`. `heads` and `ffn` say what becomes of the inner axes (`mixer_map` and
    `ffn_map` of `passes.merge_inner`; `regress` keeps the student's heads or neurons and changes only what
    they write). `gains` makes up for what RMSNorm loses by the width. `alpha` is the teacher's share: a
    number for all, or `rule`, at most `alpha_max`. Without `activations` nothing of the text is used: the map
    is found from the embeddings' shared vocabulary, heads and neurons from weights alone, layers
    proportionally. `ends` takes embedding and head in; a head is mapped (`map`) or solved for by least
    squares so that it gives the teacher's logits (`solve`, which unties a tied student; `auto`: where the
    student has a head of its own). `seed` is of `random-fold`. Raises BitsmithError for what is none of
    these.
    """

    map: MapName = "tiered"
    basis: Basis = "global"
    trunk: int | None = None
    heads: Heads = "match"
    ffn: Ffn = "match"
    alpha: float | Literal["rule"] = RULE
    alpha_max: float = ALPHA_MAX
    ends: bool = True
    head: Head = "auto"
    gains: bool = True
    activations: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        """Check names and shares."""
        for name, known in (
            ("map", MAPS),
            ("basis", get_args(Basis)),
            ("heads", HEADS),
            ("ffn", FFNS),
            ("head", get_args(Head)),
        ):
            value = getattr(self, name)
            if value not in known:
                raise BitsmithError(
                    f"{name} is {printable(str(value))!r}, expected one of {', '.join(known)}"
                )
        if self.head == "solve" and not (self.ends and self.activations):
            raise BitsmithError("a head is solved for from activations, with the ends: do not leave them out")
        shares = {"alpha_max": self.alpha_max} | ({} if self.alpha == RULE else {"alpha": self.alpha})
        for name, share in shares.items():
            if isinstance(share, str) or not 0 <= share <= 1:
                raise BitsmithError(f"{name} is {printable(str(share))!r}, expected 0 … 1")

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Alphas:
    """The teacher's share in each part of the student: by layer (mixer by KV group or K head), of ends."""

    layers: tuple[LayerAlpha, ...]
    embedding: float = 0.0
    head: float = 0.0

    def scaled(self, factor: float) -> Alphas:
        """Return every share times `factor` (0 … 1)."""
        layers = tuple(
            LayerAlpha([factor * share for share in listed(one.mixer)], factor * one.ffn)
            for one in self.layers
        )
        return Alphas(layers, factor * self.embedding, factor * self.head)

    @property
    def head_alone(self) -> Alphas:
        """The head's share, and none of anything else."""
        return replace(self.scaled(0.0), head=self.head)

    def with_layer(self, number: int, alpha: LayerAlpha) -> Alphas:
        """Return these with another share of one layer."""
        layers = list(self.layers)
        layers[number] = alpha
        return replace(self, layers=tuple(layers))

    @property
    def is_zero(self) -> bool:
        """Whether nothing of the teacher is taken."""
        shares = [share for one in self.layers for share in (*listed(one.mixer), one.ffn)]
        return not any((*shares, self.embedding, self.head))

    def to_json(self) -> dict[str, Any]:
        """Return the shares as plain values."""
        layers = [{"mixer": listed(one.mixer), "ffn": one.ffn} for one in self.layers]
        return {"layers": layers, "embedding": self.embedding, "head": self.head}


def listed(mixer: float | Sequence[float]) -> list[float]:
    """Return a mixer's shares as a list, a single one as a list of one."""
    return [float(mixer)] if isinstance(mixer, int | float) else [float(share) for share in mixer]
