"""Tensors that get one type together, and the types that each such group can take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bitsmith.archs import TensorSpec
from bitsmith.formats import format_named
from bitsmith.run.mixes import is_quantizable
from bitsmith.run.plan import Source, SourceTensor

FORMATS = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "BF16", "F16")
"""Formats offered by default."""
SMALL_BLOCKS = ("Q4_0", "IQ4_NL", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16")
"""Formats offered where rows are not whole blocks of 256."""
PROTECTED = ("Q8_0", "F16", "F32")
"""Formats offered for `ssm_alpha` and `ssm_beta`, which set how fast the state forgets.

Not BF16: llama.cpp rounds the inputs of a BF16 matrix to BF16 too, which a float32 forward does not see.
"""

_KINDS = {
    "attn.q": "attn.q+k",
    "attn.k": "attn.q+k",
    "ffn.gate": "ffn.gate+up",
    "ffn.up": "ffn.gate+up",
    "delta.in_a": "delta.in_a+b",
    "delta.in_b": "delta.in_a+b",
}
_ANCHORS = {3: ("Q2_K", "Q4_K", "Q6_K"), 2: ("Q3_K", "Q5_K"), 1: ("Q4_K",)}
_SMALL_ANCHORS = {3: ("Q4_0", "Q5_0", "Q8_0"), 2: ("Q4_0", "Q5_1"), 1: ("Q4_0",)}

EMBEDDING = -1
"""Stands for the layer that the embedding changes first."""


@dataclass(frozen=True)
class Group:
    """Tensors that get one format; `layer` is the text layer they change first.

    -1 stands for the embedding, the number of layers for the head, None for MTP tensors, which change nothing
    that is measured.
    """

    name: str
    kind: str
    layer: int | None
    tensors: tuple[SourceTensor, ...]
    formats: tuple[str, ...]

    def anchors(self, count: int) -> tuple[str, ...]:
        """Return the formats to measure, fewest bits first: well-spread ones, else what is offered."""
        if self.formats == PROTECTED:
            return ("Q8_0",)
        for table in (_ANCHORS, _SMALL_ANCHORS):
            if set(table[count]) <= set(self.formats):
                return table[count]
        coarse = [name for name in self.formats if format_named(name).bpw < 16] or list(self.formats)
        coarse.sort(key=lambda name: format_named(name).bpw)
        places = {round(k * (len(coarse) - 1) / max(1, count - 1)) for k in range(count)}
        return tuple(coarse[place] for place in sorted(places))


def groups_of(source: Source, formats: Sequence[str] = FORMATS) -> tuple[Group, ...]:
    """Return the groups of tensors that share a type, with the formats each can take.

    Per layer: q and k, v, o; in_qkv, in_z, out, in_a and in_b; gate and up, down; the embedding (which is the
    head too where they are tied: one tensor in a GGUF); the head; MTP tensors likewise. Tensors that
    llama.cpp keeps in F32 are in none.
    """
    found: dict[str, list[SourceTensor]] = {}
    for tensor in source.tensors:
        if is_quantizable(tensor.gguf_name, tensor.ref.shape):
            found.setdefault(_group_name(tensor.spec), []).append(tensor)
    layers = 1 + max(t.spec.layer or 0 for t in source.tensors if t.spec.component == "text")
    return tuple(
        Group(
            name,
            _kind(tensors[0].spec),
            _layer(tensors[0].spec, layers),
            tuple(tensors),
            _offer(tensors, formats),
        )
        for name, tensors in found.items()
    )


def _group_name(spec: TensorSpec) -> str:
    return _kind(spec) if spec.layer is None else f"blk.{spec.layer} {_kind(spec)}"


def _kind(spec: TensorSpec) -> str:
    return _KINDS.get(spec.role, spec.role)


def _layer(spec: TensorSpec, layers: int) -> int | None:
    if spec.component != "text":
        return None
    if spec.layer is not None:
        return spec.layer
    return EMBEDDING if spec.role == "embed" else layers


def _offer(tensors: Sequence[SourceTensor], formats: Sequence[str]) -> tuple[str, ...]:
    """Return the formats that fit every row, those with small blocks where one with large blocks does not."""
    if tensors[0].spec.role in ("delta.in_a", "delta.in_b"):
        offered: Sequence[str] = PROTECTED
    else:
        offered = [format_named(name).name for name in formats]
    widths = {tensor.ref.shape[-1] for tensor in tensors}

    def fit(names: Iterable[str]) -> tuple[str, ...]:
        return tuple(name for name in names if all(format_named(name).fits(width) for width in widths))

    fitting = fit(offered)
    if len(fitting) == len(offered):
        return fitting
    return fit(dict.fromkeys((*SMALL_BLOCKS, *fitting))) or ("F16",)
