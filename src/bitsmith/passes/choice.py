"""Choose a tensor's rounder and damping by held-out output error: the guard against overfitting."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from bitsmith.formats.blocks import BlockFormat
from bitsmith.formats.format import Float32, Format
from bitsmith.numerics.input_metric import DAMPING, InputMetric
from bitsmith.passes.rounding import output_error, round_rows

DAMPINGS = (0.003, 0.03, 0.3)
"""Tried by `choose`, in units of the mean variance."""

NOISE_GROWTH = 5.0
"""How much noise a matrix's inputs carry, in units of the relative error its own outputs get (`shrink`)."""

SAMPLE_ROWS = 256
"""Rows of a tensor that a trial looks at."""

CHOICE_ROWS = 128
"""Rows of a tensor that a rounder is chosen by."""

CHOICE_COLUMNS = 2048
"""Columns of a tensor that a rounder is chosen by, at most: factors cost their cube."""


class SiteInputs(Protocol):
    """What is known of a matrix's inputs, columns in GGUF order; see `store.statistics.SiteStatistics`."""

    @property
    def importance(self) -> Float32:
        """What rounding a column costs: the moment's diagonal, or E[x²] (`in`)."""

    @property
    def moment(self) -> Float32 | None:
        """E[x xᵀ] (`in in`), or block-diagonal (`n b b`)."""

    @property
    def held(self) -> Float32 | None:
        """Held-out inputs (`rows in`)."""


@dataclass(frozen=True)
class Choice:
    """The rounder of one tensor: `gptq` with a damping and a shrinkage, `weighted` or `nearest`, and why.

    `held_errors` are the relative held-out output errors `sum |E x|² / sum |W x|²` of what was tried, by
    `weighted`, `nearest` or `gptq <damping>`; empty where nothing was held out.
    """

    rounder: str
    damping: float | None = None
    held_errors: Mapping[str, float] = field(default_factory=dict)
    shrink: float = 0.0


def choose(
    form: Format,
    rows: Float32,
    inputs: SiteInputs | None,
    rounder: str = "auto",
    *,
    metric_for: Callable[[float, float], InputMetric] | None = None,
    dampings: Sequence[float] = DAMPINGS,
) -> Choice:
    """Choose the rounder for a tensor by a sample of its `rows` (`out in`, GGUF layout).

    `rounder` is `nearest`, `weighted`, `gptq` or `auto`. Error feedback needs second moments and a format
    of blocks; without them `weighted` is left, and without any statistics `nearest`. Under `gptq` and `auto`
    the damping is the one of least held-out output error, and the feedback is kept only where that falls
    below the weighted search's; `auto` also weighs `nearest`. Without held-out inputs `gptq` takes the
    default damping and `auto` takes `weighted`. `metric_for(damping, shrink)` shares metrics between the
    tensors of a site.

    The moments come from the original model; in the compressed one a matrix's inputs carry the errors of the
    layers before it, about as large, relative to the inputs, as the errors this matrix adds to its outputs,
    and summed up over layers. The metric is shrunk towards its diagonal by that much (see `noise_share`).
    """
    if not isinstance(form, BlockFormat):
        return Choice("nearest")
    return choose_by(
        lambda importance: form.decode(form.encode(rows, importance)),
        lambda metric: form.decode(round_rows(form, rows, metric)),
        rows,
        inputs,
        rounder,
        metric_for=metric_for,
        dampings=dampings,
    )


@dataclass(frozen=True)
class _Known:
    """Inputs of some columns (`SiteInputs`)."""

    importance: Float32
    moment: Float32 | None
    held: Float32 | None


def narrowed(inputs: SiteInputs, columns: int = CHOICE_COLUMNS) -> SiteInputs:
    """Return what is known of the first `columns` alone; of a moment in blocks, of whole ones.

    Of a block larger than that its first `columns` stay. All do where they would not be whole blocks of 256.
    """
    moment = inputs.moment
    if moment is None or len(inputs.importance) <= columns:
        return inputs
    size = moment.shape[-1]
    if moment.ndim == 3 and size <= columns:
        moment, columns = moment[: columns // size], columns // size * size
    else:
        moment = (moment if moment.ndim == 2 else moment[0])[:columns, :columns]
    if columns % 256:
        return inputs
    held = None if inputs.held is None else np.ascontiguousarray(inputs.held[:, :columns])
    return _Known(inputs.importance[:columns], moment, held)


def choose_by(
    searched: Callable[[Float32 | None], Float32],
    fed_back: Callable[[InputMetric], Float32] | None,
    rows: Float32,
    inputs: SiteInputs | None,
    rounder: str = "auto",
    *,
    metric_for: Callable[[float, float], InputMetric] | None = None,
    dampings: Sequence[float] = DAMPINGS,
) -> Choice:
    """Choose as `choose` does, for anything that can be coded.

    `searched(importance)` and `fed_back(metric)` return what `rows` decode to, coded by the weighted search
    (None: `nearest`) and by error feedback (None: it takes none).
    """
    if rounder == "nearest" or inputs is None:
        return Choice("nearest")
    moment, held = inputs.moment, inputs.held
    if rounder == "weighted" or moment is None or fed_back is None:
        return Choice("weighted")
    if held is None or not len(held):
        return Choice("gptq", DAMPING) if rounder == "gptq" else Choice("weighted")
    whole = output_error(rows, held)

    def error(decoded: Float32) -> float:
        left = output_error(rows - decoded, held)
        return left / whole if whole > 0 else left

    build = metric_for or (lambda damping, shrink: InputMetric(moment, damping, shrink=shrink))
    errors = {"weighted": error(searched(inputs.importance))}
    if rounder == "auto":
        errors["nearest"] = error(searched(None))
    shrink = noise_share(errors["weighted"])
    tried = {f"gptq {damping:g}": damping for damping in dampings}
    for name, damping in tried.items():
        errors[name] = error(fed_back(build(damping, shrink)))
    best = min(errors, key=lambda name: (errors[name], name != "weighted"))
    return Choice(best.split()[0], tried.get(best), errors, shrink if best in tried else 0.0)


def noise_share(relative_error: float) -> float:
    """Return the shrinkage for a relative output error: `NOISE_GROWTH` times it, in powers of two.

    The powers let tensors of one site share a metric. At most 1; below 1/1024 it is 0.
    """
    share = NOISE_GROWTH * relative_error
    if not share >= 2.0**-10:
        return 0.0
    return float(min(1.0, 2.0 ** np.rint(np.log2(share))))
