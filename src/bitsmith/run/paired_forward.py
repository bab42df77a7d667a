"""Two models in lockstep: a layer of each on the same tokens, and the moments of what passes both."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from bitsmith.archs import Architecture
from bitsmith.errors import BitsmithError
from bitsmith.run.forward import TextModel, quiet_transformers
from bitsmith.run.paired_sums import PARTS, Part, PlaceShape, PlaceSums
from bitsmith.run.sites import SiteForward, States, aligned, site_workers
from bitsmith.run.turns import Turns
from bitsmith.store.paired import STATE_PLACES

Float32 = NDArray[np.float32]
Rows = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""By place, what passes it in teacher and student (`N D_t`, `N D_s`)."""

TASK_TOKENS = 512
WIDEST_SQUARE = 4096
"""Columns up to which the second moment of heads or neurons is kept whole."""

_SITES = {"mixer": "mixer.mid", "ffn": "ffn.mid"}
_BETWEEN = "between"


class Side:
    """One of the two models: its layers, and how wide what enters their writers is."""

    def __init__(self, model: TextModel) -> None:
        self.model = model
        self.forward = SiteForward(model, [])
        self.n_layers, self.hidden = self.forward.n_layers, self.forward.hidden_size
        specs = [spec for spec in model.arch.specs() if spec.component == "text" and spec.site]
        self._sites = {spec.site: spec for spec in specs}
        self.kinds = [str(kind) for kind in self.forward.network.config.layer_types]
        self._ffn_norms = {
            spec.layer: spec.name
            for spec in model.arch.specs()
            if spec.component == "text" and spec.role == "norm.ffn"
        }
        self.matrix_weights = [
            sum(spec.shape[0] * spec.shape[1] for spec in specs if spec.layer == n)
            for n in range(self.n_layers)
        ]

    def width(self, layer: int, place: str) -> int:
        """Return the columns of `mixer` (o_proj's or out_proj's input) or `ffn` (down_proj's)."""
        return int(self._sites[f"layers.{layer}.{_SITES[place]}"].shape[1])

    def block(self, layer: int, place: str, widest: int) -> int:
        """Return the size of the blocks that a second moment is kept in: all, a KV group's heads, or 1."""
        width = self.width(layer, place)
        if width <= widest:
            return width
        return group_columns(self.model.arch, self.kinds[layer]) if place == "mixer" else 1

    def loaded(self, layer: int) -> Loaded:
        """Read one layer's weights."""
        prefix = f"{self.model.arch.text_prefix}layers.{layer}."
        paths = {
            place: self._sites[f"layers.{layer}.{site}"].name.removeprefix(prefix).removesuffix(".weight")
            for place, site in _SITES.items()
        } | {_BETWEEN: self._ffn_norms[layer].removeprefix(prefix).removesuffix(".weight")}
        with quiet_transformers():
            return Loaded(self, layer, aligned(self.forward.network.layer(layer)), paths)


class Loaded:
    """A layer in memory that shows what enters its writers and its FFN's norm; threads may share it."""

    def __init__(self, side: Side, number: int, module: torch.nn.Module, paths: Mapping[str, str]) -> None:
        self.side, self._number, self.module = side, number, module
        # The hooks do not know this object: in a cycle the weights would stay until garbage is collected.
        self._here = here = threading.local()
        for place, path in paths.items():
            module.get_submodule(path).register_forward_pre_hook(
                lambda _, inputs, place=place: here.seen.__setitem__(place, inputs[0])
            )

    def run(self, states: Float32) -> dict[str, torch.Tensor]:
        """Replace `states` (`B T D`) by the layer's output; return what passed each place (`N D`).

        Besides the four places of moments `between`: the states that enter the FFN's norm.

        Raises BitsmithError for states that are not finite.
        """
        self._here.seen = {}
        before = torch.from_numpy(states).double().flatten(0, 1)
        if not self.side.forward.network.run(self.module, states, None):
            raise BitsmithError(
                f"layer {self._number} makes NaN or infinite hidden states",
                path=self.side.model.checkpoint.path,
            )
        seen: dict[str, torch.Tensor] = self._here.seen
        sites = {place: rows.flatten(0, 1).contiguous() for place, rows in seen.items()}
        update = torch.from_numpy(states).double().flatten(0, 1) - before
        return {"states": before, "updates": update, **sites}


@dataclass(frozen=True)
class Step:
    """States of the same tokens before and after a layer of each model."""

    teacher: tuple[States, States]
    student: tuple[States, States]


def pair_shapes(teacher: Side, student: Side, layers: tuple[int, int], widest: int) -> dict[str, PlaceShape]:
    """Return the widths of each place of a pair of layers (teacher's, student's) and how they are kept."""
    hidden = teacher.hidden, student.hidden
    shapes: dict[str, PlaceShape] = {place: PlaceShape(*hidden, *hidden) for place in STATE_PLACES}
    for place in _SITES:
        sides = list(zip((teacher, student), layers, strict=True))
        widths = [side.width(layer, place) for side, layer in sides]
        blocks = [side.block(layer, place, widest) for side, layer in sides]
        shapes[place] = PlaceShape(*widths, *blocks)
    return shapes


def group_columns(arch: Architecture, kind: str) -> int:
    """Return how many columns of the mixer's output the heads of one KV head (DeltaNet: K head) make up."""
    if kind == "linear_attention":
        heads, groups = arch.number("linear_num_value_heads", 32), arch.number("linear_num_key_heads", 16)
        return heads // groups * arch.number("linear_value_head_dim", 128)
    return arch.number("num_attention_heads") // arch.number("num_key_value_heads") * arch.head_dim


def run_pair(teacher: Loaded, student: Loaded, step: Step, sums: Mapping[str, PlaceSums]) -> Iterator[int]:
    """Run both layers task by task and add what passes both; yield the chunks of each task.

    Sums are taken in the order of the tasks, so that they do not depend on how many threads there are.
    """
    (t_before, t_after), (s_before, s_after) = step.teacher, step.student
    chunks, tokens = t_before.shape[:2]
    batch, turns = max(1, TASK_TOKENS // tokens), Turns()

    def side(layer: Loaded, before: States, after: States, start: int) -> dict[str, torch.Tensor]:
        part = before.read(start, min(start + batch, chunks))
        seen = layer.run(part)
        after.write(start, part)
        return seen

    @torch.inference_mode()
    def task(number: int) -> int:
        start = number * batch
        with turns.task(number):
            ours, theirs = side(teacher, t_before, t_after, start), side(student, s_before, s_after, start)
            _add(turns, sums, {place: (ours[place], theirs[place]) for place in sums})
        return min(batch, chunks - start)

    yield from _tasks(task, -(-chunks // batch), pair_bytes(teacher.side, student.side, tokens))


def run_sampled(layer: Loaded, before: States, after: States, between: States) -> Iterator[int]:
    """Run one layer, keep its output and what enters its FFN's norm; yield the chunks of each task."""
    chunks, tokens = before.shape[:2]
    batch = max(1, TASK_TOKENS // tokens)

    @torch.inference_mode()
    def task(number: int) -> int:
        start = number * batch
        part = before.read(start, min(start + batch, chunks))
        middle = layer.run(part)[_BETWEEN]
        after.write(start, part)
        between.write(start, middle.numpy().reshape(part.shape))
        return len(part)

    yield from _tasks(task, -(-chunks // batch), side_bytes(layer.side, tokens))


def pair_bytes(teacher: Side, student: Side, ctx_tokens: int) -> int:
    """Return what the activations of one task take: both layers', and their states in float64."""
    return sum(side_bytes(side, ctx_tokens) for side in (teacher, student))


def side_bytes(side: Side, ctx_tokens: int) -> int:
    """Return what the activations of one task take in one of the models."""
    token_bytes = side.forward.network.bytes_per_token + 40 * side.hidden
    return token_bytes * ctx_tokens * max(1, TASK_TOKENS // ctx_tokens)


def add_states(
    teacher: States, student: States, sums: Mapping[str, PlaceSums], eps: Sequence[float] = ()
) -> None:
    """Add the states of all tokens, and to `normed` what norms with `eps` make of them, `x / rms(x)`."""
    chunks, tokens = teacher.shape[:2]
    batch, turns = max(1, TASK_TOKENS // tokens), Turns()

    def task(number: int) -> int:
        stop = min((number + 1) * batch, chunks)
        with turns.task(number):
            parts = (torch.from_numpy(side.read(number * batch, stop)) for side in (teacher, student))
            ours, theirs = (part.double().flatten(0, 1) for part in parts)
            rows: Rows = {"states": (ours, theirs)}
            if "normed" in sums:
                rows["normed"] = _normed(ours, eps[0]), _normed(theirs, eps[1])
            _add(turns, sums, rows)
        return stop - number * batch

    task_bytes = 24 * len(sums) * batch * tokens * (teacher.shape[2] + student.shape[2])
    for _ in _tasks(task, -(-chunks // batch), task_bytes):
        pass


def _normed(rows: torch.Tensor, eps: float) -> torch.Tensor:
    return rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps)


def _add(turns: Turns, sums: Mapping[str, PlaceSums], rows: Rows) -> None:
    parts: list[tuple[str, Part]] = [(place, part) for place in sums for part in PARTS]
    for place, part in parts:
        with turns.turn(f"{place}.{part}"):
            sums[place].add(part, *rows[place])


def _tasks(task: Callable[[int], int], count: int, task_bytes: int) -> Iterator[int]:
    with quiet_transformers(), site_workers(task_bytes) as pool:
        yield from pool.map(task, range(count))
