"""Transforms: changes of a model's tensors that leave its function alone, computed on read.

A transform acts on an axis label (`residual`, `ffn`, `head.v`, ...). Resolved for a model it is a few vectors
(signs, scales, orders) and from those one `Step` for each tensor that carries the axis; steps go in front of
a tensor's export steps, so that a GGUF's tensors lead back through both to what was stored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from numpy.typing import NDArray

from bitsmith.archs import Architecture, Step, TensorSpec, architecture_of, claim
from bitsmith.archs.export import ImportedView, import_view, renamed
from bitsmith.errors import BitsmithError, UnsupportedError, printable
from bitsmith.formats import Format
from bitsmith.store.checkpoint import Checkpoint, TensorRef, View
from bitsmith.store.statistics import Statistics

Vector = NDArray[Any]
Vectors = Mapping[str, Vector]
Claimed = tuple[TensorSpec, TensorRef]

TRANSFORMS: dict[str, type[Transform]] = {}
"""Every transform by its name, filled by subclassing `Transform`."""


@dataclass(frozen=True)
class Context:
    """What solving may use: the formats tensors will be stored in (by Hugging Face name), and statistics.

    A tensor without a format stays as floats. `statistics.of(spec)` follows the spec's transforms.
    """

    formats: Mapping[str, Format] = field(default_factory=dict)
    statistics: Statistics | None = None


@dataclass(frozen=True)
class Applied:
    """A transform as it was carried out: its name, options, vectors by instance, and what there is to say."""

    transform: Transform
    vectors: Vectors
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Model:
    """A checkpoint's tensors with the transforms so far: spec and stored tensor by Hugging Face name.

    `tensors` holds what is stored (`ref` as in the source); the specs' `transforms` say what becomes of it.
    """

    checkpoint: Checkpoint
    arch: Architecture
    tensors: Mapping[str, Claimed]
    applied: tuple[Applied, ...] = ()

    def spec(self, name: str) -> TensorSpec:
        """Return the spec of a tensor, with its transforms."""
        return self.tensors[name][0]

    def ref(self, name: str) -> TensorRef:
        """Return the transformed tensor in Hugging Face layout, computed on read."""
        spec, ref = self.tensors[name]
        return spec.transform(ref)

    def having(self, role: str) -> list[TensorSpec]:
        """Return the specs of a role, in block order."""
        return [spec for spec, _ in self.tensors.values() if spec.role == role]

    def readers(self, site: str) -> list[TensorSpec]:
        """Return the specs of the matrices that read an activation site."""
        return [spec for spec, _ in self.tensors.values() if spec.site == site]

    def with_steps(self, steps: Mapping[str, Step]) -> Model:
        """Return the model with a further step for each tensor that `steps` names."""
        changed = dict(self.tensors)
        for name, step in steps.items():
            spec, ref = changed[name]
            changed[name] = replace(spec, transforms=(*spec.transforms, step)), ref
        return replace(self, tensors=changed)

    def with_tensors(self, tensors: Mapping[str, Claimed]) -> Model:
        """Return the model with other tensors and the architecture that they make."""
        config = dict(self.checkpoint.config) or dict(self.arch.config)
        return replace(self, tensors=dict(tensors), arch=type(self.arch)(config, tensors.keys()))

    def has(self, component: str) -> bool:
        """Tell whether there are tensors of a component: `text`, `mtp` or `vision`."""
        return any(spec.component == component for spec, _ in self.tensors.values())

    def check(self, transform: Transform) -> None:
        """Raise UnsupportedError that names the transform and says why it would not be exact, if so."""
        if reason := transform.refusal(self):
            raise UnsupportedError(f"{transform.name}: {reason}", path=self.checkpoint.path)

    def applying(self, transform: Transform, vectors: Vectors) -> Model:
        """Return the model changed by a transform whose vectors are known.

        Raises as `check` does.
        """
        self.check(transform)
        notes = transform.notes(self)
        changed = transform.restructured(self)
        changed = changed.with_steps(transform.steps(changed, vectors))
        return replace(changed, applied=(*self.applied, Applied(transform, vectors, notes)))

    def view(self) -> View:
        """Return the transformed checkpoint under Hugging Face names, computed on read."""
        tensors = {name: renamed(self.ref(name), name) for name in self.tensors}
        view = View(self.checkpoint, tensors)
        view.config = _config_of(self.arch)
        return view


class Transform(ABC):
    """One exact change of a model, with its options; a subclass with a `name` registers itself.

    `needs` names the transforms that must come before it; `defaults` are the options and their values.
    Raises BitsmithError for an option that it does not have, or of another type.
    """

    name: ClassVar[str]
    axis: ClassVar[str]
    summary: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    keeps_values: ClassVar[bool] = False  # only their order changes
    defaults: ClassVar[Mapping[str, Any]] = {}

    def __init_subclass__(cls) -> None:
        """Register the transform under its name."""
        if "name" in cls.__dict__:
            TRANSFORMS[cls.name] = cls

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        given = dict(options or {})
        for key, value in given.items():
            if key not in self.defaults:
                known = ", ".join(self.defaults) or "none"
                raise BitsmithError(f"transform {self.name} has no option {printable(key)!r}; known: {known}")
            if type(value) is not type(self.defaults[key]):
                kind = type(self.defaults[key]).__name__
                found = printable(repr(value))
                raise BitsmithError(f"transform {self.name}: {key} is {found}, expected {kind}")
        self.options: dict[str, Any] = {**self.defaults, **given}

    def __str__(self) -> str:
        changed = {key: value for key, value in self.options.items() if value != self.defaults[key]}
        return ":".join([self.name, *(f"{key}={value}" for key, value in changed.items())])

    @property
    def searches(self) -> bool:
        """Whether solving reads the model's matrices, which takes time."""
        return self.name.startswith(("scale-", "permute-"))

    def refusal(self, model: Model) -> str | None:
        """Return why the transform would not be exact on `model`, None where it is."""
        del model
        return None

    def restructured(self, model: Model) -> Model:
        """Return the model with tensors added or removed; most transforms keep them all."""
        return model

    def notes(self, model: Model) -> tuple[str, ...]:
        """Return what a user should know, said of the model before the change."""
        del model
        return ()

    @abstractmethod
    def vectors(self, model: Model, context: Context) -> dict[str, Vector]:
        """Return the vectors by instance (`layers.3`, `residual`, ...); what is left out stays as it is."""

    @abstractmethod
    def steps(self, model: Model, vectors: Vectors) -> dict[str, Step]:
        """Return the step of each tensor (by Hugging Face name) that the instances in `vectors` change."""


def model_of(checkpoint: Checkpoint) -> Model:
    """Return a checkpoint, Hugging Face or GGUF, as a model without transforms.

    Raises as `claim` and `import_view` do.
    """
    if checkpoint.config:
        pairs = claim(checkpoint)
        return Model(checkpoint, architecture_of(checkpoint), {spec.name: (spec, ref) for spec, ref in pairs})
    view: ImportedView = import_view(checkpoint)
    return Model(view, view.arch, {spec.name: (spec, view[spec.name]) for spec in view.specs.values()})


def transformed(model: Model, transforms: Sequence[Transform], context: Context) -> Model:
    """Return `model` with `transforms` solved and applied one after the other.

    Raises as `Model.applying` does.
    """
    for transform in transforms:
        model.check(transform)
        model = model.applying(transform, transform.vectors(model, context))
    return model


def transform_of(text: str) -> Transform:
    """Return the transform that `rotate:seed=3` names, as `str` writes it.

    Raises BitsmithError for an unknown name or option.
    """
    name, *options = text.strip().split(":")
    return transform_named(name, dict(map(_option, options)))


def parse_transforms(text: str) -> list[Transform]:
    """Return the transforms that `fold,rotate:seed=3` names, those they need put before them.

    `gauge` stands for all scales, `permute` for all permutations. Raises BitsmithError for an unknown name or
    option, and for a transform named twice.
    """
    named: list[Transform] = []
    for part in text.split(","):
        prefix = _GROUPS.get(part.strip())
        group = [name for name in TRANSFORMS if prefix is not None and name.startswith(prefix)]
        named += [transform_of(one) for one in group or [part]]
    return with_needs(named)


_GROUPS = {"gauge": "scale-", "permute": "permute-"}


def transform_named(name: str, options: Mapping[str, Any] | None = None) -> Transform:
    """Return a transform by its name. Raises BitsmithError for an unknown one, or its options."""
    if name not in TRANSFORMS:
        known = ", ".join(["auto", "none", *_GROUPS, *TRANSFORMS])
        raise BitsmithError(f"unknown transform {printable(name)!r}; known: {known}")
    return TRANSFORMS[name](options)


def with_needs(transforms: Sequence[Transform]) -> list[Transform]:
    """Return `transforms` with what each needs put before it, in their order otherwise.

    Raises BitsmithError for a transform named twice.
    """
    ordered: list[Transform] = []
    names = [transform.name for transform in transforms]
    for name in names:
        if names.count(name) > 1:
            raise BitsmithError(f"transform {name} is named twice")
    for transform in transforms:
        if late := [need for need in transform.needs if need in names[names.index(transform.name) :]]:
            raise BitsmithError(f"transform {late[0]} must come before {transform.name}")
        _put_before(ordered, transform.needs)
        ordered.append(transform)
    return ordered


def _put_before(ordered: list[Transform], needs: Sequence[str]) -> None:
    """Add the needed transforms that are missing, each before those that the needs name after it."""
    for at, need in enumerate(needs):
        placed = [one.name for one in ordered]
        if need not in placed:
            later = [placed.index(name) for name in needs[at + 1 :] if name in placed]
            ordered.insert(min(later, default=len(ordered)), transform_named(need))


def _option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise BitsmithError(f"transform option {printable(text)!r} is not of the form KEY=VALUE")
    try:
        return key, int(value)
    except ValueError:
        return key, value


def _config_of(arch: Architecture) -> dict[str, Any]:
    """Return the config of the tensors that are there: tied or not, with or without MTP layers."""
    config, says = dict(arch.config), {"tie_word_embeddings": arch.tied}
    has_mtp = any(name.startswith("mtp.") for name in arch.names or ())
    text = dict(arch.text_config)
    if text.get("mtp_num_hidden_layers") and not has_mtp:
        text["mtp_num_hidden_layers"] = 0
    if not isinstance(config.get("text_config"), Mapping):
        return text | says
    return config | says | {"text_config": text | says}
