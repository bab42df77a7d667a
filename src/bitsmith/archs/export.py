"""Export to GGUF layout and import from it: the one place where the two layouts meet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bitsmith.archs.arch import Architecture, TensorSpec, architecture_of, claim, match, naming
from bitsmith.store.checkpoint import Checkpoint, ComputedTensor, TensorRef, View


@dataclass(frozen=True)
class ExportTensor:
    """A tensor in GGUF layout: `ref` is computed on read and carries the GGUF name."""

    spec: TensorSpec
    gguf_name: str
    ref: TensorRef

    @property
    def dtype(self) -> str:
        """The type of llama.cpp's BF16 file: F32 for 1-D tensors, norms and the convolution, else BF16."""
        return "F32" if self.spec.float_only else "BF16"


@dataclass(frozen=True)
class Export:
    """A checkpoint in GGUF layout: tensors in block order, architecture key/values, what is left out.

    `metadata` lacks the tokenizer's keys and `general.*` other than the architecture.
    """

    arch: Architecture
    tensors: list[ExportTensor]
    metadata: dict[str, Any]
    set_aside: list[TensorSpec]

    def __getitem__(self, gguf_name: str) -> ExportTensor:
        for tensor in self.tensors:
            if tensor.gguf_name == gguf_name:
                return tensor
        raise KeyError(gguf_name)


class ImportedView(View):
    """A GGUF file seen as the Hugging Face checkpoint it came from, with `specs` by Hugging Face name."""

    def __init__(
        self, base: Checkpoint, tensors: Mapping[str, TensorRef], arch: Architecture, specs: list[TensorSpec]
    ) -> None:
        super().__init__(base, tensors)
        self.config = arch.config
        self.metadata = {}
        self.arch = arch
        self.specs = {spec.name: spec for spec in specs}


def export_view(checkpoint: Checkpoint) -> Export:
    """Return a Hugging Face checkpoint in GGUF layout, nothing read yet.

    Raises as `claim` does, and UnsupportedError where the config asks for what llama.cpp cannot run.
    """
    return export_of(architecture_of(checkpoint), claim(checkpoint))


def export_of(arch: Architecture, pairs: Iterable[tuple[TensorSpec, TensorRef]]) -> Export:
    """Return claimed tensors in GGUF layout, nothing read yet; `pairs` hold what is stored.

    Raises UnsupportedError where the config asks for what llama.cpp cannot run.
    """
    pairs = list(pairs)
    tensors = [
        ExportTensor(spec, spec.gguf_name, renamed(spec.to_gguf(ref), spec.gguf_name))
        for spec, ref in pairs
        if spec.gguf_name is not None
    ]
    metadata = {"general.architecture": arch.gguf_arch, **arch.gguf_metadata()}
    return Export(arch, tensors, metadata, [spec for spec, _ in pairs if spec.gguf_name is None])


def import_view(checkpoint: Checkpoint) -> ImportedView:
    """Return a GGUF checkpoint under Hugging Face names and config (the text-only layout), computed on read.

    Quantized tensors decode to their values. The inverse of `export_view` for every tensor that it exports.

    Raises UnsupportedError or BitsmithError as `claim` does, in GGUF names.
    """
    arch = architecture_of(checkpoint)
    with naming(checkpoint):
        specs = [spec for spec in arch.specs() if spec.gguf_name is not None]
    wanted = {str(spec.gguf_name): (spec, spec.gguf_shape) for spec in specs}
    pairs = match(checkpoint, wanted, arch)
    tensors = {spec.name: renamed(spec.from_gguf(ref), spec.name) for spec, ref in pairs}
    return ImportedView(checkpoint, tensors, arch, specs)


def renamed(ref: TensorRef, name: str) -> TensorRef:
    """Return `ref` under another name."""
    return ComputedTensor(name, ref.shape, ref.dtype, ref.read)
