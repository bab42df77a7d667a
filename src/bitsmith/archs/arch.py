"""What bitsmith knows about an architecture: each tensor's role, axes, activation site, norm and export."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from bitsmith.errors import BitsmithError, UnsupportedError, printable
from bitsmith.store.checkpoint import Checkpoint, TensorRef
from bitsmith.store.stored import INTEGERS

Component = Literal["text", "mtp", "vision"]

ARCHITECTURES: dict[str, type[Architecture]] = {}
"""Every architecture by its Hugging Face `model_type`, filled by subclassing `Architecture`."""

_MISSING = object()
_LISTED_NAMES = 40


class Step(ABC):
    """One exact, invertible change of a tensor, lazy and row-sliced: of its values or of its layout.

    Where the columns of a weight matrix change, `W -> W A`, what it reads changes with them, `x -> x A^-T`:
    where it is so simple, `column_order` has that as `x'_j = x_order[j]`, `column_factors` as
    `x'_j = x_j factors[j]`.
    """

    changes_columns: ClassVar[bool] = False
    column_order: NDArray[np.intp] | None = None
    column_factors: NDArray[np.float64] | None = None

    @abstractmethod
    def apply(self, ref: TensorRef) -> TensorRef:
        """Return the changed tensor, computed on read."""

    @abstractmethod
    def unapply(self, ref: TensorRef) -> TensorRef:
        """Return the original tensor from the changed one, computed on read."""

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape after the step; most steps keep it."""
        return shape

    def inputs(self, x: NDArray[Any]) -> NDArray[Any]:
        """Return activations (`... in`) as the changed columns read them; most steps leave them alone."""
        return x

    def importance(self, vector: NDArray[np.float32]) -> NDArray[np.float32]:
        """Move an importance vector over the input columns the same way; most steps leave it alone."""
        return vector

    def importance_back(self, vector: NDArray[np.float32]) -> NDArray[np.float32]:
        """Undo `importance`."""
        return vector


@dataclass(frozen=True)
class TensorSpec:
    """One tensor's place in an architecture.

    `axes` are labels, one per dimension (`residual`, `ffn`, `head.q`, `head.k`, `delta.v`, `vocab`, ...);
    `site` names the activation it reads, shared by q, k and v; `norm` is how a norm weight acts.
    `layer` is the GGUF block number (MTP layers count on after the text layers). `gguf_name` is None for a
    tensor that has no place in a text GGUF. `float_only` tensors stay F32 in every GGUF. `transforms` are
    exact changes of the model in Hugging Face layout (see `passes.transform`), `steps` those of the export.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    axes: tuple[str, ...]
    gguf_name: str | None
    component: Component = "text"
    site: str | None = None
    norm: Literal["w", "1+w"] | None = None
    steps: tuple[Step, ...] = field(default=())
    layer: int | None = None
    float_only: bool = False
    transforms: tuple[Step, ...] = field(default=())

    @property
    def all_steps(self) -> tuple[Step, ...]:
        """Everything between the stored tensor and the GGUF: transforms, then the export."""
        return (*self.transforms, *self.steps)

    @property
    def gguf_shape(self) -> tuple[int, ...]:
        """Shape in GGUF layout, still `out in`."""
        shape = self.shape
        for step in self.steps:
            shape = step.shape(shape)
        return shape

    def transform(self, ref: TensorRef) -> TensorRef:
        """Return the transformed model's tensor from the stored one, in Hugging Face layout."""
        for step in self.transforms:
            ref = step.apply(ref)
        return ref

    def to_gguf(self, ref: TensorRef) -> TensorRef:
        """Return `ref` transformed and in GGUF layout, computed on read."""
        for step in self.all_steps:
            ref = step.apply(ref)
        return ref

    def from_gguf(self, ref: TensorRef) -> TensorRef:
        """Return `ref`, a tensor in GGUF layout, as it was stored: the inverse of `to_gguf`."""
        for step in reversed(self.all_steps):
            ref = step.unapply(ref)
        return ref

    @property
    def column_steps(self) -> tuple[Step, ...]:
        """The steps that change the columns, and so what the tensor reads."""
        return tuple(step for step in self.all_steps if step.changes_columns)

    def importance_to_gguf(self, vector: NDArray[np.float32]) -> NDArray[np.float32]:
        """Move importance over the stored columns (`in`) to the GGUF columns."""
        for step in self.all_steps:
            vector = step.importance(vector)
        return vector

    def importance_from_gguf(self, vector: NDArray[np.float32]) -> NDArray[np.float32]:
        """Move importance over the columns that an export without transforms has to Hugging Face's (`in`)."""
        for step in reversed(self.steps):
            vector = step.importance_back(vector)
        return vector


class Architecture(ABC):
    """One model family, built from a Hugging Face config; a subclass with `model_types` registers itself.

    `names` are the stored tensor names, which settle the optional parts (name prefix, MTP, a stored head);
    without them the config alone decides. `transformers_module` and the class names say where the reference
    forward lives; it is loaded by `bitsmith.run.forward`, never here.
    """

    model_types: ClassVar[tuple[str, ...]]
    gguf_arch: ClassVar[str]
    transformers_module: ClassVar[str]
    config_class: ClassVar[str]
    layer_class: ClassVar[str]
    norm_class: ClassVar[str]
    rotary_class: ClassVar[str]
    default_head_dim: ClassVar[int]

    def __init_subclass__(cls) -> None:
        """Register the architecture under its model types."""
        for model_type in cls.__dict__.get("model_types", ()):
            ARCHITECTURES[model_type] = cls

    def __init__(self, config: Mapping[str, Any], names: Collection[str] | None = None) -> None:
        self.config = dict(config)
        self.names = None if names is None else frozenset(names)

    @property
    def text_config(self) -> dict[str, Any]:
        """The text model's config: `text_config` of a vision-language checkpoint, else the config itself."""
        nested = self.config.get("text_config")
        return dict(nested) if isinstance(nested, Mapping) else self.config

    @property
    def tied(self) -> bool:
        """Whether the output head is the token embedding; a stored `lm_head.weight` counts as untied.

        transformers and llama.cpp both use a stored head, whatever the config says.
        """
        text = self.text_config
        says_tied = bool(self.config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))
        return says_tied and "lm_head.weight" not in (self.names or ())

    @property
    def head_dim(self) -> int:
        """Size of one attention head; transformers' default where the config has none."""
        return self.number("head_dim", self.default_head_dim)

    @property
    def rotary_dim(self) -> int:
        """Leading channels of a head that RoPE turns, channel `c` with `c + rotary_dim / 2`."""
        return self.head_dim

    def number(self, key: str, default: object = _MISSING) -> int:
        """Return a positive integer of the text config.

        Raises BitsmithError if it is absent without a default, or no positive 31-bit integer.
        """
        value = self.text_config.get(key)
        if value is None and default is not _MISSING:
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 31:
            raise BitsmithError(
                f"config.json: {key} is {printable(repr(value))}, expected a positive integer"
            )
        return value

    def set_aside(self, name: str) -> Component | None:
        """Return the component of a stored tensor that is claimed by its name alone and not exported."""
        del name
        return None

    def axes_aside(self, name: str, shape: tuple[int, ...]) -> tuple[str, ...]:
        """Return the axis labels of a tensor that is set aside; empty where none is shared with the text."""
        del name
        return ("",) * len(shape)

    @property
    @abstractmethod
    def text_prefix(self) -> str:
        """Prefix of the text model's tensor names, `model.` or `model.language_model.`."""

    @abstractmethod
    def specs(self) -> list[TensorSpec]:
        """Return every tensor the config calls for, in block order; all of them are required."""

    @abstractmethod
    def gguf_metadata(self) -> dict[str, Any]:
        """Return the architecture's GGUF key/values (without `general.*` and the tokenizer's).

        Raises UnsupportedError where the config asks for something llama.cpp cannot run.
        """

    @classmethod
    @abstractmethod
    def config_from_gguf(
        cls, metadata: Mapping[str, Any], tensors: Mapping[str, TensorRef]
    ) -> dict[str, Any]:
        """Return the Hugging Face config that exports to `metadata`; the inverse of `gguf_metadata`.

        Raises BitsmithError for a key that is absent or out of range.
        """


def architecture_of(checkpoint: Checkpoint) -> Architecture:
    """Return the architecture of a checkpoint, from `model_type` of its config or `general.architecture`.

    Raises UnsupportedError that names the model type and the known ones, BitsmithError if neither is there.
    """
    gguf_arch = checkpoint.metadata.get("general.architecture")
    if not checkpoint.config and isinstance(gguf_arch, str):
        by_gguf_name = {cls.gguf_arch: cls for cls in ARCHITECTURES.values()}
        cls = _known(by_gguf_name, gguf_arch, "architecture", checkpoint)
        with naming(checkpoint):
            return cls(cls.config_from_gguf(checkpoint.metadata, checkpoint))
    if not checkpoint.config:
        raise BitsmithError("config.json is missing; it names the architecture", path=checkpoint.path)
    model_type = checkpoint.config.get("model_type")
    if not isinstance(model_type, str):
        raise BitsmithError("config.json has no model_type; it names the architecture", path=checkpoint.path)
    cls = _known(ARCHITECTURES, model_type, "model_type", checkpoint)
    with naming(checkpoint):
        return cls(checkpoint.config, checkpoint)


@contextmanager
def naming(checkpoint: Checkpoint) -> Iterator[None]:
    """Name the checkpoint in errors about its config or metadata, which do not know where it lies."""
    try:
        yield
    except BitsmithError as error:
        if error.path is not None:
            raise
        raise type(error)(error.message, path=checkpoint.path, tensor=error.tensor) from error


def _known(
    table: Mapping[str, type[Architecture]], name: str, what: str, checkpoint: Checkpoint
) -> type[Architecture]:
    found = table.get(name)
    if found is None:
        raise UnsupportedError(
            f"{what} {printable(name)!r} is not supported; known: {', '.join(sorted(table))}",
            path=checkpoint.path,
        )
    return found


def claim(checkpoint: Checkpoint) -> list[tuple[TensorSpec, TensorRef]]:
    """Match every stored tensor of a Hugging Face checkpoint with its spec, exactly once, in block order.

    Tensors set aside for another file (vision) come last, with their stored shapes and no GGUF name.

    Raises UnsupportedError for a quantized checkpoint or for tensors no spec claims, naming them;
    BitsmithError for missing tensors, all listed, and for a shape other than the config's.
    """
    refuse_quantized(checkpoint)
    with naming(checkpoint):
        return _claimed(checkpoint, architecture_of(checkpoint))


def _claimed(checkpoint: Checkpoint, arch: Architecture) -> list[tuple[TensorSpec, TensorRef]]:
    if (layers := arch.number("num_hidden_layers")) > len(checkpoint):
        raise BitsmithError(
            f"config.json: num_hidden_layers is {layers}, but only {len(checkpoint)} tensors are stored",
            path=checkpoint.path,
        )
    wanted = {spec.name: (spec, spec.shape) for spec in arch.specs() if spec.component != "vision"}
    pairs = match(checkpoint, wanted, arch)
    claimed = {spec.name for spec, _ in pairs}
    for name, ref in checkpoint.items():
        component = arch.set_aside(name)
        if component is not None and name not in claimed:
            axes = arch.axes_aside(name, ref.shape)
            pairs.append((TensorSpec(name, ref.shape, component, axes, None, component=component), ref))
    return pairs


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raise UnsupportedError for a checkpoint whose config says that its weights are already quantized."""
    quantization = checkpoint.config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise UnsupportedError(
            f"weights are already quantized ({printable(str(method))}); use the original BF16 checkpoint",
            path=checkpoint.path,
        )


def match(
    checkpoint: Checkpoint, wanted: Mapping[str, tuple[TensorSpec, tuple[int, ...]]], arch: Architecture
) -> list[tuple[TensorSpec, TensorRef]]:
    """Return (spec, stored tensor) for each name of `wanted`, refusing orphans, gaps and wrong shapes.

    `wanted` gives the shape that each name is stored with. Raises as `claim` does.
    """
    orphans = [name for name in checkpoint if name not in wanted and arch.set_aside(name) is None]
    if orphans:
        raise UnsupportedError(f"unknown to {arch.gguf_arch}: {_listed(orphans)}", path=checkpoint.path)
    missing = [name for name in wanted if name not in checkpoint]
    if missing == ["lm_head.weight"]:
        raise UnsupportedError(
            "missing: tensor lm_head.weight, and the config does not tie it: a model without its output head",
            path=checkpoint.path,
        )
    if missing:
        raise BitsmithError(f"missing: {_listed(missing)}", path=checkpoint.path)
    for name, (_, expected) in wanted.items():
        if (dtype := checkpoint[name].dtype) in INTEGERS:
            raise UnsupportedError(
                f"is stored as {dtype}: integers are codes of a packing that the config does not name",
                path=checkpoint.path,
                tensor=name,
            )
        if (found := checkpoint[name].shape) != expected:
            raise BitsmithError(
                f"shape is {_times(found)}, the config calls for {_times(expected)}",
                path=checkpoint.path,
                tensor=name,
            )
    return [(spec, checkpoint[name]) for name, (spec, _) in wanted.items()]


def _listed(names: list[str]) -> str:
    shown = ", ".join(printable(name) for name in names[:_LISTED_NAMES])
    more = f" and {len(names) - _LISTED_NAMES} more" if len(names) > _LISTED_NAMES else ""
    return f"{len(names)} tensors: {shown}{more}" if len(names) > 1 else f"tensor {shown}"


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "scalar"
