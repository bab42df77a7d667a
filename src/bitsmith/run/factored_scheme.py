"""What matrices become under schemes of factors: low rank, remainders, pruned blocks, Tensor-Trains.

A scheme is a kind and options, parted by colons; upper and lower case are alike:

- `SVD` (a product A B), `SVD+INT4` and `SVD+INT8` (a product and the remainder in codes), `INT4` and `INT8`
  (codes alone), `TT` (a Tensor-Train of three cores, also of an embedding), `TT+SVD` (a product of two);
- `r=64` is the rank (of trains: both inner ranks), `bpw=4.5` the largest whose parts take at most so many
  bits per weight of the whole matrix, `error=0.1` (SVD) the smallest that leaves at most so much of the
  matrix, in the metric of its inputs where there are statistics; `core=1024` is the rank of TT+SVD's product;
- `int4`, `int8`, `f16` or `f32` is how factors and cores are stored (default int8; int4 for SVD);
- `scales` (TT) stores a factor per row and per column beside the cores, by statistics: rows by how often
  their token occurs, columns by E[x²]. A TT without it ignores statistics, all other kinds use them;
- `heads=0.75` keeps that share of a layer's heads, those that put out most: rows and columns of the others
  are not stored, in matrices that hold heads. `rows=64x0.2.3` keeps the blocks 0, 2 and 3 of 64 rows, the
  others are zero; `cols=` keeps columns;
- `kernel=512` (with SVD+INT4 or SVD+INT8): the first 512 of the kept rows are the product, the others codes;
  `kernel=qk`: those that make DeltaNet's queries and keys.

`SVD:bpw=4`, `SVD:error=0.1:int8`, `SVD+INT4:r=32`, `INT4:heads=0.5`, `TT:r=64:scales`.
What `error`, `heads`, `scales` and `kernel=qk` come to is in `run.factored_choice`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn

from bitsmith.errors import BitsmithError, printable
from bitsmith.numerics.modes import balanced_modes
from bitsmith.numerics.tensor_train import possible_ranks
from bitsmith.store.factored import (
    FLOAT_CODES,
    Blocks,
    FactoredForm,
    Form,
    TrainForm,
    TrainsForm,
    form_bytes,
)

GROUPS = (0, 32, 64, 128)
"""Columns that may share a scale; 0 is a whole row."""

_RESTS = {"SVD": None, "SVD+INT4": "int4", "SVD+INT8": "int8", "INT4": "int4", "INT8": "int8"}
KINDS = (*_RESTS, "TT", "TT+SVD")
"""What a scheme may begin with."""

_PLAIN = ("INT4", "INT8")
_STORED = ("int4", "int8", *FLOAT_CODES)


@dataclass(frozen=True)
class Scheme:
    """A scheme string, taken apart: one of `rank`, `bpw` and `error` is set wherever there are factors."""

    text: str
    kind: str
    rank: int | None = None
    bpw: float | None = None
    error: float | None = None
    core: int | None = None
    code: str = "int8"
    scales: bool = False
    kernel: int | Literal["qk"] | None = None
    heads: float | None = None
    rows: Blocks | None = None
    columns: Blocks | None = None

    @property
    def is_open(self) -> bool:
        """Whether something is left to `run.factored_choice`."""
        return self.error is not None or self.heads is not None or self.kernel == "qk" or self.scales

    def with_options(self, *options: str | None, without: str) -> Scheme:
        """Return the scheme with more options, without those of the key `without`."""
        kept = [part for part in self.text.split(":") if not part.upper().startswith(without)]
        return parse_scheme(":".join([*kept, *filter(None, options)]))


def is_factored(scheme: str) -> bool:
    """Tell whether a scheme string begins with one of `KINDS`."""
    return scheme.upper().split(":")[0] in KINDS


def parse_scheme(text: str) -> Scheme:
    """Return a scheme string taken apart.

    Raises BitsmithError for an unknown kind or option, a value that is none, and options that do not go
    together.
    """
    kind, *options = text.upper().split(":")
    if kind not in KINDS:
        _refuse(text, f"unknown kind {printable(kind)!r}; known: {', '.join(KINDS)}")
    scheme, given = Scheme(text, kind, code="int4" if kind == "SVD" else "int8"), set[str]()
    for option in options:
        found = _option(text, option)
        if again := given & found.keys():
            _refuse(text, f"says twice what {again.pop()} is")
        given |= found.keys()
        scheme = replace(scheme, **found)
    if (wrong := _mixed(scheme, given)) is not None:
        _refuse(text, wrong)
    return scheme


def _mixed(scheme: Scheme, given: set[str]) -> str | None:
    """Return which options do not go together, None where all do."""
    kind, factors, train = scheme.kind, scheme.kind not in _PLAIN, scheme.kind.startswith("TT")
    prunes = {"rows", "columns", "heads"} & given
    wrong = [
        (factors and len(given & {"rank", "bpw", "error"}) != 1, "needs one of r=, bpw= and error="),
        (not factors and given - prunes, "has no factors, so it takes rows=, cols= and heads= alone"),
        (train and prunes, "a Tensor-Train keeps all rows and columns"),
        ("heads" in given and len(prunes) > 1, "heads= says which rows and columns are kept"),
        ("scales" in given and kind != "TT", "scales are for TT"),
        (("core" in given) != (kind == "TT+SVD"), "core= is for TT+SVD, which needs it"),
        ("kernel" in given and not kind.startswith("SVD+"), "kernel= needs codes: SVD+INT4 or SVD+INT8"),
        ("error" in given and (kind != "SVD" or prunes), "error= is for SVD of whole matrices"),
        (kind.startswith("SVD+") and scheme.code == "f16", "beside codes factors are int4, int8 or f32"),
    ]
    return next((said for found, said in wrong if found), None)


def form_of(scheme: Scheme, shape: tuple[int, ...], group: int) -> Form:
    """Return what a matrix of `shape` (`out in`) becomes; ranks are clipped to what it can have.

    Raises BitsmithError for blocks and kernels that the matrix does not have, for a `bpw` that does not
    suffice for rank 1, and for what `run.factored_choice` was to decide.
    """
    out, columns = shape
    if scheme.kernel == "qk" or scheme.heads is not None or scheme.error is not None:
        _refuse(scheme.text, "leaves to measurement what is stored")
    if scheme.kind.startswith("TT"):
        most = max(balanced_modes(out, columns).sizes) * min(shape)
        made = _train if scheme.core is None else _trains
        return _ranked(
            scheme, min(most, out * columns), lambda rank: made(scheme, (out, columns), group, rank)
        )
    rest = _RESTS[scheme.kind]
    form = FactoredForm(
        (out, columns),
        rest=None if rest is None else _code(rest, group),
        kernel=scheme.kernel,
        rows=scheme.rows,
        columns=scheme.columns,
    )
    if scheme.kind not in _PLAIN:
        form = replace(form, rank=1, factors=_code(scheme.code, group))
    if (wrong := form.wrong()) is not None:
        _refuse(scheme.text, wrong)
    if form.factors is None:
        return form
    return _ranked(scheme, min(form.product_rows, form.kept[1]), lambda rank: replace(form, rank=rank))


def _train(scheme: Scheme, shape: tuple[int, int], group: int, rank: int) -> TrainForm:
    modes = balanced_modes(*shape)
    ranks = possible_ranks(modes.sizes, (1, rank, rank, 1))
    return TrainForm(shape, (modes.rows, modes.columns), ranks, _code(scheme.code, group), scheme.scales)


def _trains(scheme: Scheme, shape: tuple[int, int], group: int, rank: int) -> TrainsForm:
    core = min(scheme.core or 1, *shape)
    left, right = (_train(scheme, side, group, rank) for side in ((shape[0], core), (core, shape[1])))
    return TrainsForm(left, right)


def _code(name: str, group: int) -> str:
    return f"{name}_g{group}" if group and name not in FLOAT_CODES else name


def _ranked(scheme: Scheme, most: int, formed: Callable[[int], Form]) -> Form:
    """Return the form of the rank that is asked for, or of the largest that the bytes allow."""
    if scheme.rank is not None:
        return formed(min(scheme.rank, most))
    out, columns = formed(1).shape
    budget = math.floor((scheme.bpw or 0.0) * out * columns / 8)
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if form_bytes(formed(middle)) <= budget else (low, middle - 1)
    if low == 0:
        least = 8 * form_bytes(formed(1)) / (out * columns)
        _refuse(scheme.text, f"rank 1 of a {out}x{columns} matrix takes {least:.2f} bpw already")
    return formed(low)


def _option(text: str, option: str) -> dict[str, Any]:
    """Return an option as a field of `Scheme`."""
    key, equals, value = option.partition("=")
    if not equals and key.lower() in _STORED:
        return {"code": key.lower()}
    if option == "SCALES":
        return {"scales": True}
    if key not in _READERS or not equals:
        known = ", ".join([*(f"{name.lower()}=" for name in _READERS), "scales", *_STORED])
        _refuse(text, f"unknown option {printable(option)!r}; known: {known}")
    field, reader = _READERS[key]
    try:
        return {field: reader(value)}
    except ValueError:
        _refuse(text, f"{printable(option)!r} has no value that {key.lower()}= could have")


def _rank(value: str) -> int:
    if (found := int(value)) < 1:
        raise ValueError(value)
    return found


def _bpw(value: str) -> float:
    if not 0 < (found := float(value)) < math.inf:
        raise ValueError(value)
    return found


def _share(value: str) -> float:
    if not 0 < (found := float(value)) <= 1:
        raise ValueError(value)
    return found


def _error(value: str) -> float:
    if not 0 < (found := float(value)) < 1:
        raise ValueError(value)
    return found


def _kernel(value: str) -> int | str:
    return "qk" if value == "QK" else _rank(value)


def _blocks(value: str) -> Blocks:
    size, _, kept = value.partition("X")
    return Blocks(_rank(size), tuple(int(block) for block in kept.split(".")))


_READERS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "R": ("rank", _rank),
    "BPW": ("bpw", _bpw),
    "ERROR": ("error", _error),
    "CORE": ("core", _rank),
    "KERNEL": ("kernel", _kernel),
    "HEADS": ("heads", _share),
    "ROWS": ("rows", _blocks),
    "COLS": ("columns", _blocks),
}


def _refuse(text: str, said: str) -> NoReturn:
    raise BitsmithError(f"{printable(text, 60)}: {said}")
