"""A GGUF's text model as free weights: what a gradient can move, and what stays as it is stored."""

from __future__ import annotations

import numpy as np
import torch

from bitsmith.archs.export import ImportedView
from bitsmith.errors import BitsmithError
from bitsmith.formats import format_named
from bitsmith.formats.blocks import BlockFormat
from bitsmith.run.forward import TextModel
from bitsmith.run.free_weights import FreeBlocks, FreeFloats, FreeWeight
from bitsmith.store.checkpoint import Bytes, Checkpoint, TensorRef

HEAD = "lm_head.weight"
EMBEDDING = "embed_tokens.weight"


class FreeModel:
    """The text tensors of the GGUF `stored`, seen through `view`, by Hugging Face name without prefix.

    F32 tensors and block formats are free, other types fixed. With `codes`, `original` tells where in its
    cell each weight lies. MTP tensors take no part in the forward and stay as they are. `only` restricts it
    all to names that begin so.

    Raises BitsmithError if `original` lacks a tensor or has it in another shape.
    """

    def __init__(
        self, stored: Checkpoint, view: ImportedView, original: TextModel, *, codes: bool, only: str = ""
    ) -> None:
        self._tied = view.arch.tied
        self._free: dict[str, FreeWeight] = {}
        self._fixed: dict[str, torch.Tensor] = {}
        for name, spec in view.specs.items():
            if spec.component != "text" or spec.gguf_name is None:
                continue
            local = name.removeprefix(view.arch.text_prefix)
            if not local.startswith(only):
                continue
            source = original_tensor(original, local, view[name].shape)
            ref = stored[spec.gguf_name]
            form = None if ref.dtype in ("F32", "F16", "BF16", "F64") else format_named(ref.dtype)
            if isinstance(form, BlockFormat) and not len(form.scale_values):  # its `d` is a parameter
                rows = np.asarray(spec.to_gguf(source).read(), np.float32) if codes else None
                self._free[local] = FreeBlocks(spec, ref, form, rows)
            elif ref.dtype == "F32":
                self._free[local] = FreeFloats(spec, ref)
            else:
                self._fixed[local] = plain(view[name])

    def weights(self) -> dict[str, torch.Tensor]:
        """Return every tensor in Hugging Face layout, differentiable in the parameters."""
        return self._with_head(self._fixed | {name: weight.value() for name, weight in self._free.items()})

    def decoded(self) -> dict[str, torch.Tensor]:
        """Return every tensor as a reader of the packed bytes will see it."""
        values = {name: weight.decoded() for name, weight in self._free.items()}
        return self._with_head(self._fixed | values)

    @property
    def parameters(self) -> dict[str, torch.Tensor]:
        """The leaves by `NAME:KIND`; the kinds are `scale`, `min`, `value` and `code`."""
        return {
            f"{name}:{kind}": leaf
            for name, weight in self._free.items()
            for kind, leaf in weight.parameters.items()
        }

    def packed(self) -> dict[str, Bytes]:
        """Return the stored bytes of every free tensor by GGUF name."""
        return {str(weight.spec.gguf_name): weight.packed() for weight in self._free.values()}

    def coarseness(self) -> float:
        """Return the relative spacing of the codes: root mean square step over weight, of all blocks."""
        found = [weight.spacing() for weight in self._free.values() if isinstance(weight, FreeBlocks)]
        energy = sum(weights for _, weights in found)
        return (sum(steps for steps, _ in found) / energy) ** 0.5 if energy else 0.0

    def _with_head(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return weights | {HEAD: weights[EMBEDDING]} if self._tied and EMBEDDING in weights else weights


def original_weights(model: TextModel) -> dict[str, torch.Tensor]:
    """Return the text tensors of `model` in float32, by Hugging Face name without prefix, with the head."""
    prefix = model.arch.text_prefix
    weights = {
        name.removeprefix(prefix): plain(ref)
        for name, ref in model.checkpoint.items()
        if name.startswith(prefix) or name == HEAD
    }
    return weights | {HEAD: plain(model.head)}


def original_tensor(model: TextModel, local: str, shape: tuple[int, ...]) -> TensorRef:
    """Return a tensor of `model` by its name without prefix; BitsmithError unless it has this shape."""
    name = local if local == HEAD else model.arch.text_prefix + local
    if name not in model.checkpoint:
        raise BitsmithError("missing", path=model.checkpoint.path, tensor=name)
    ref = model.checkpoint[name]
    if ref.shape != shape:
        raise BitsmithError(
            f"shape is {ref.shape}, the candidate's is {shape}", path=model.checkpoint.path, tensor=name
        )
    return ref


def plain(ref: TensorRef) -> torch.Tensor:
    """Return a whole tensor in float32."""
    return torch.from_numpy(np.require(ref.read(), dtype=np.float32, requirements=["C", "W"]))
