"""llama.cpp's stock mixes: which ggml type each GGUF tensor gets under a name like `Q4_K_M`.

The rules are llama-quantize's (llama.cpp, `src/llama-quant.cpp`), restated per tensor category for dense
models. A tensor's place is its ordinal among the tensors of its category, counted in llama-quantize's order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from bitsmith.errors import BitsmithError
from bitsmith.formats import format_named

Category = Literal["output", "embedding", "value", "ffn_down", "attn_output", "other"]
Shapes = Mapping[str, tuple[int, ...]]
"""GGUF tensor names to shapes in numpy order (`out in`)."""


@dataclass(frozen=True)
class Model:
    """What the rules ask of a model beside its tensors.

    `n_blocks` counts every block, MTP included; `gqa` is query heads per key/value head of the first block;
    `has_imatrix` tells whether an importance matrix will weigh the encoding.
    """

    n_blocks: int
    gqa: int
    has_imatrix: bool = False


@dataclass(frozen=True)
class Place:
    """A tensor's ordinal `index` in its category, of `count`, in `model`."""

    index: int
    count: int
    model: Model

    @property
    def in_first_eighth(self) -> bool:
        """Tell whether the tensor is in the first eighth of its category."""
        return self.index < self.count // 8

    @property
    def is_sensitive(self) -> bool:
        """Tell whether the tensor is in the first or last eighth, or every third in between."""
        first = self.count // 8
        return self.in_first_eighth or self.index >= 7 * self.count // 8 or (self.index - first) % 3 == 2


Rule = Callable[[Place], str | None]
"""Gives the type at a place, None for the mix's base type."""


@dataclass(frozen=True)
class Mix:
    """One stock mix: its base type, the number llama.cpp gives it in `general.file_type`, and its rules."""

    name: str
    base: str
    file_type: int
    rules: Mapping[Category, Rule] = field(default_factory=dict)

    @property
    def is_float(self) -> bool:
        """Tell whether the mix stores plain floats; every quantizable tensor then gets the base type."""
        return self.base in {"F32", "F16", "BF16"}


def _always(type_name: str) -> Rule:
    return lambda place: type_name


def _sensitive(type_name: str) -> Rule:
    return lambda place: type_name if place.is_sensitive else None


def _first(count: int, type_name: str, otherwise: str | None = None) -> Rule:
    return lambda place: type_name if place.index < count else otherwise


def _first_eighth(type_name: str) -> Rule:
    return lambda place: type_name if place.in_first_eighth else None


def _first_sixteenth(type_name: str, otherwise: str) -> Rule:
    return lambda place: type_name if place.index < place.count // 16 else otherwise


def _first_eighth_if_imatrix(present: bool, type_name: str) -> Rule:
    return lambda place: type_name if place.in_first_eighth and place.model.has_imatrix is present else None


def _grouped(type_name: str, otherwise: str | None = None) -> Rule:
    """Spend more on value tensors that four or more query heads share."""
    return lambda place: type_name if place.model.gqa >= 4 else otherwise


_IQ4_RULES: Mapping[Category, Rule] = {
    "value": _grouped("Q5_K"),
    "ffn_down": _first_eighth_if_imatrix(False, "Q5_K"),
}

MIXES: dict[str, Mix] = {
    mix.name: mix
    for mix in (
        Mix("F32", "F32", 0),
        Mix("F16", "F16", 1),
        Mix("BF16", "BF16", 32),
        Mix("Q8_0", "Q8_0", 7),
        Mix("Q6_K", "Q6_K", 18),
        Mix("Q5_K_M", "Q5_K", 17, {"value": _sensitive("Q6_K"), "ffn_down": _sensitive("Q6_K")}),
        Mix("Q5_K_S", "Q5_K", 16),
        Mix("Q5_1", "Q5_1", 9),
        Mix("Q5_0", "Q5_0", 8, {"ffn_down": _first_eighth_if_imatrix(True, "Q5_1")}),
        Mix("Q4_K_M", "Q4_K", 15, {"value": _sensitive("Q6_K"), "ffn_down": _sensitive("Q6_K")}),
        Mix("Q4_K_S", "Q4_K", 14, {"value": _first(4, "Q5_K"), "ffn_down": _first_eighth("Q5_K")}),
        Mix("Q4_1", "Q4_1", 3),
        Mix("Q4_0", "Q4_0", 2, {"ffn_down": _first_eighth_if_imatrix(True, "Q4_1")}),
        Mix("IQ4_NL", "IQ4_NL", 25, _IQ4_RULES),
        Mix("IQ4_XS", "IQ4_XS", 30, _IQ4_RULES),
        Mix(
            "Q3_K_L",
            "Q3_K",
            13,
            {"value": _always("Q5_K"), "ffn_down": _always("Q5_K"), "attn_output": _always("Q5_K")},
        ),
        Mix(
            "Q3_K_M",
            "Q3_K",
            12,
            {
                "value": _first(2, "Q5_K", "Q4_K"),
                "ffn_down": _first_sixteenth("Q5_K", "Q4_K"),
                "attn_output": _always("Q4_K"),
            },
        ),
        Mix("Q3_K_S", "Q3_K", 11),
        Mix(
            "Q2_K",
            "Q2_K",
            10,
            {"value": _grouped("Q4_K", "Q3_K"), "ffn_down": _always("Q3_K"), "attn_output": _always("Q3_K")},
        ),
        Mix("Q2_K_S", "Q2_K", 21, {"value": _grouped("Q4_K"), "ffn_down": _first_eighth("Q4_K")}),
        Mix("Q2_0", "Q2_0", 41, {"embedding": _always("Q4_K")}),
        Mix("Q1_0", "Q1_0", 40),
    )
}
"""Every stock mix by its llama.cpp name, most bits first; llama-quantize wants an imatrix for Q2_K_S.

Left out are those that a dense model has no use for: MXFP4_MOE, which is Q8_0 but for experts.
"""

ALIASES = {"Q5_K": "Q5_K_M", "Q4_K": "Q4_K_M", "Q3_K": "Q3_K_M"}
"""Short names that llama-quantize takes for a mix."""

# What llama.cpp stores instead when a row is not a whole number of large blocks.
_SMALLER_BLOCKS = {
    "Q2_0": "Q4_0",
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "IQ4_XS": "IQ4_NL",
}

_UNTOUCHED = ("_norm.weight", "ssm_conv1d", "ffn_gate_inp.weight")


def mix_named(name: str) -> Mix:
    """Return the mix called `name`, any case, aliases included.

    Raises BitsmithError that lists the known names.
    """
    upper = name.upper()
    found = MIXES.get(ALIASES.get(upper, upper))
    if found is None:
        raise BitsmithError(f"unknown type {name!r}; known: {' '.join(MIXES)}")
    return found


def is_quantizable(name: str, shape: tuple[int, ...]) -> bool:
    """Tell whether llama.cpp quantizes the tensor: a matrix `*weight` that is no norm, convolution or router.

    A matrix of one row counts as a vector, as in ggml.
    """
    is_matrix = len(shape) >= 2 and any(length > 1 for length in shape[:-1])
    return is_matrix and name.endswith("weight") and not any(part in name for part in _UNTOUCHED)


def category_of(name: str) -> Category:
    """Return the category whose rule chooses the type of the GGUF tensor `name`."""
    if name == "output.weight":
        return "output"
    if name == "token_embd.weight":
        return "embedding"
    if "attn_v.weight" in name or "attn_qkv.weight" in name:
        return "value"
    if "attn_output.weight" in name:
        return "attn_output"
    return "ffn_down" if "ffn_down" in name else "other"


def assign(shapes: Shapes, mix: Mix, model: Model, *, pure: bool = False) -> dict[str, str]:
    """Return the type that `mix` wants for each tensor, before any fallback of rows that do not fit.

    Tensors that llama.cpp never quantizes are F32. With `pure` every other tensor gets the base type, output
    and token embedding included. Without an `output.weight` the token embedding acts as the output.
    """
    places = _places(shapes, model)
    tied = "output.weight" not in shapes
    chosen: dict[str, str] = {}
    for name, shape in shapes.items():
        if not is_quantizable(name, shape):
            chosen[name] = "F32"
        elif pure or mix.is_float:
            chosen[name] = mix.base
        elif name == "output.weight" or (tied and name == "token_embd.weight"):
            chosen[name] = "Q8_0" if mix.base == "Q8_0" else "Q6_K"
        else:
            rule = mix.rules.get(category_of(name))
            chosen[name] = (rule(places[name]) if rule else None) or mix.base
    return chosen


def fitting_type(type_name: str, row_weights: int) -> str:
    """Return `type_name` if rows of `row_weights` are whole blocks of it, else what llama.cpp stores.

    A large block gives way to its 32-weight stand-in (`Q4_K` to `Q5_0`), and where that does not fit either,
    or there is none (`Q1_0`), to F16.
    """
    if format_named(type_name).fits(row_weights):
        return type_name
    smaller = _SMALLER_BLOCKS.get(type_name, type_name)
    return smaller if format_named(smaller).fits(row_weights) else "F16"


def _places(shapes: Shapes, model: Model) -> dict[str, Place]:
    """Return each quantizable tensor's place; `ffn_down` is counted out of the model's blocks."""
    ordered = sorted((name for name in shapes if is_quantizable(name, shapes[name])), key=_llama_order)
    places: dict[str, Place] = {}
    for category, names in _by_category(ordered).items():
        count = model.n_blocks if category == "ffn_down" else len(names)
        places.update({name: Place(index, count, model) for index, name in enumerate(names)})
    return places


def _by_category(names: Iterable[str]) -> dict[Category, list[str]]:
    groups: dict[Category, list[str]] = {}
    for name in names:
        groups.setdefault(category_of(name), []).append(name)
    return groups


def _llama_order(name: str) -> tuple[int, str]:
    block = re.match(r"blk\.(\d+)\.", name)
    return (int(block[1]) if block else -1, name)
