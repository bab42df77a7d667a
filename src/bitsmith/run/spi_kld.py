"""What NF4 costs each linear: the mean KLD of the model with that matrix alone in NF4."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bitsmith.archs import TensorSpec, claim
from bitsmith.errors import printable
from bitsmith.formats.nf4 import NF4, nest
from bitsmith.progress import Progress, silent
from bitsmith.run.critical import Linear
from bitsmith.run.evaluate import open_model, text_chunks
from bitsmith.run.forward import TextModel, Tokens
from bitsmith.run.groups import Group
from bitsmith.run.plan import SourceTensor
from bitsmith.run.sensitivity import Change, Prober
from bitsmith.store.checkpoint import ComputedTensor, TensorRef
from bitsmith.store.journal import Journal

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Alone:
    """Mean KLD in nats of each linear alone in NF4, and what it was measured on."""

    nats: Mapping[str, float]
    protocol: str


class NearestNF4:
    """NF4 as the recipe stores it: blocks of 64, the nearest level, scales quantized again."""

    def stored(self, tensor: SourceTensor, name: str) -> TensorRef:
        """Return the tensor (`out in`, GGUF layout) decoded from NF4; blocks run along the source's rows."""
        del name  # there is one

        @cache
        def decoded() -> Float32:
            weights = np.ascontiguousarray(tensor.origin.read(), dtype=np.float32).reshape(-1)
            scales = NF4.absmax(weights)
            codes = NF4.nearest(weights, scales)
            return NF4.dequantize(codes, nest(scales).scales()).reshape(tensor.origin.shape)

        source = tensor.origin
        return tensor.spec.to_gguf(
            ComputedTensor(source.name, source.shape, "F32", lambda start, stop: decoded()[start:stop])
        )


def alone_in_nf4(
    model: Path,
    linears: Sequence[Linear],
    text: Path,
    ctx_tokens: int,
    chunks: int,
    progress: Progress = silent,
    journal: Journal | None = None,
) -> Alone:
    """Measure every linear alone in NF4 on `chunks` chunks of a text, positions ctx/2…ctx-2 of each.

    A layer's linears share the forward of the layers before and are carried through those after it together:
    a linear of layer `i` of `L` costs `(L - i) / L` of a forward. Layers found in `journal` are not measured
    again, and finished ones are kept there.
    """
    nats: dict[str, float] = {} if journal is None else dict(_kept(journal))
    with open_model(model) as opened:
        tokens, protocol = text_chunks(opened, text, ctx_tokens, chunks)
        left = [linear for linear in linears if linear.name not in nats]
        if left:
            for layer, found in _layers(opened, tokens, left, progress):
                nats |= found
                if journal is not None:
                    journal.add(f"kld {layer}", found)
    said = (
        f"text {printable(str(text))} (SHA-256 {protocol.text_sha256[:12]}…), context {ctx_tokens} tokens, "
        f"{protocol.chunks} chunks, {protocol.scored_tokens:,} scored tokens"
    )
    return Alone({linear.name: nats[linear.name] for linear in linears}, said)


def _kept(journal: Journal) -> Mapping[str, float]:
    found = [value for name, value in journal.entries.items() if name.startswith("kld ")]
    return {linear: nats for part in found for linear, nats in part.items()}


def _layers(
    model: TextModel, tokens: Tokens, linears: Sequence[Linear], progress: Progress
) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield each layer with its linears' mean KLD."""
    pairs = {spec.name: (spec, ref) for spec, ref in claim(model.checkpoint)}
    done = 0

    def report(stage: str, part: int, total: int) -> None:
        if stage == "sensitivity":  # of one layer's changes
            part, total = done + part, len(linears)
        progress(stage, part, total)

    prober = Prober(model, tokens, NearestNF4(), report)
    for layer in sorted({linear.layer for linear in linears}):
        here = [linear for linear in linears if linear.layer == layer]
        found = prober.measure([_change(*pairs[linear.name]) for linear in here])
        yield layer, {linear.name: nats for linear, nats in zip(here, found, strict=True)}
        done += len(here)


def _change(spec: TensorSpec, ref: TensorRef) -> Change:
    tensor = SourceTensor(spec, spec.gguf_name or spec.name, spec.to_gguf(ref), ref)
    return Change(((Group(spec.name, spec.role, spec.layer, (tensor,), (NF4.name,)), NF4.name),))
