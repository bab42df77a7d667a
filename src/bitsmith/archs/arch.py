"""What bitsmith knows about an architecture: each tensor's role, axes, activation site, norm and export."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from bitsmith.errors import UnsupportedError
from bitsmith.store.checkpoint import Checkpoint, ComputedTensor, Rows, TensorRef, View

Component = Literal["text", "mtp", "vision"]
Permutation = NDArray[np.intp]


class Step(ABC):
    """One exact, invertible change of a tensor on its way to GGUF, lazy and row-sliced."""

    @abstractmethod
    def apply(self, ref: TensorRef) -> TensorRef:
        """Return the changed tensor, computed on read."""

    @abstractmethod
    def unapply(self, ref: TensorRef) -> TensorRef:
        """Return the original tensor from the changed one, computed on read."""

    def importance(self, vector: NDArray[np.float32]) -> NDArray[np.float32]:
        """Move an importance vector over the input columns the same way; most steps leave it alone."""
        return vector


@dataclass(frozen=True)
class TensorSpec:
    """One tensor's place in an architecture.

    `axes` are labels, one per dimension (`residual`, `ffn`, `head.q`, `head.kv`, `delta.v`, `vocab`, ...);
    `site` names the activation it reads, shared by q, k and v; `norm` is how a norm weight acts.
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


class Architecture(ABC):
    """One model family, built from a Hugging Face config; registered by defining a subclass with `model_types`.

    `transformers_module` and the class names say where the reference forward lives; it is loaded by
    `bitsmith.run.forward`, never here.
    """

    model_types: ClassVar[tuple[str, ...]]
    gguf_arch: ClassVar[str]
    transformers_module: ClassVar[str]
    config_class: ClassVar[str]
    layer_class: ClassVar[str]
    norm_class: ClassVar[str]
    rotary_class: ClassVar[str]

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = dict(config)

    @property
    def text_config(self) -> dict[str, Any]:
        """The text model's config: `text_config` of a vision-language checkpoint, else the config itself."""
        nested = self.config.get("text_config")
        return dict(nested) if isinstance(nested, Mapping) else self.config

    @property
    @abstractmethod
    def text_prefix(self) -> str:
        """Prefix of the text model's tensor names, `model.` or `model.language_model.`."""

    @abstractmethod
    def specs(self, names: Sequence[str] | None = None) -> list[TensorSpec]:
        """Return every tensor this config calls for; `names` tells which optional parts a checkpoint has."""

    @abstractmethod
    def gguf_metadata(self) -> dict[str, Any]:
        """Return the architecture's GGUF key/values (without the tokenizer's)."""

    @classmethod
    @abstractmethod
    def config_from_gguf(cls, metadata: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """Return the Hugging Face config that exports to `metadata`; the inverse of `gguf_metadata`."""
