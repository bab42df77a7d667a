"""A teacher that computes exactly what a student does, in a wider, deeper and relabelled model.

Residual states are `x_t = s x_s Qᵀ` with Q (`D_t D_s`) of orthonormal columns. The default, `s = √(D_t/D_s)`,
keeps the mean square and so RMSNorm's epsilon; with another s the copy is exact up to the epsilon. Further
layers write nothing; further heads and neurons compute, but nothing reads them. Heads, KV groups and neurons
lie in random order. A merge that finds all of it gives the student back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitsmith.archs import ARCHITECTURES, TensorSpec
from bitsmith.archs.tokenizer import TOKENIZER_FILES
from bitsmith.errors import BitsmithError
from bitsmith.numerics.threads import one_blas_thread
from bitsmith.passes.axes import Layer, layers_of
from bitsmith.passes.merge_axes import by_channel
from bitsmith.passes.merge_inner import groups_of
from bitsmith.passes.transform import Model, model_of
from bitsmith.run.record import seal, source_facts
from bitsmith.store import open_checkpoint
from bitsmith.store.atomic import Content
from bitsmith.store.hub import local
from bitsmith.store.safetensors import side_files
from bitsmith.store.safetensors_writer import TensorData, write_safetensors

Float64 = NDArray[np.float64]
Index = NDArray[np.intp]

_GAINS = 0.2  # standard deviation of the logarithm of the teacher's norm weights
_SMALL = 0.3


@dataclass(frozen=True)
class Sizes:
    """A teacher's sizes; None keeps the student's.

    `layers` lists each one's student layer, None for an idle one, or is how many there are; `scale` is s.
    """

    hidden: int
    layers: Sequence[int | None] | int | None = None
    ffn: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    k_heads: int | None = None
    v_heads: int | None = None
    scale: float | None = None


@dataclass(frozen=True)
class Embedding:
    """What a teacher was made with: `x_t = scale · x_s frameᵀ`, and by student layer where its parts lie.

    `places` holds by student layer the teacher's index of each of its channels, by axis: `ffn`, `heads`,
    `groups` (KV or K heads).
    """

    path: Path
    frame: Float64
    scale: float
    layers: tuple[int, ...]
    places: tuple[Mapping[str, Index], ...]


def spread_layers(student: int, teacher: int) -> list[int | None]:
    """Return a list of `teacher` layers that holds the student's in order, idle ones in front and between.

    Raises BitsmithError for a teacher with fewer layers.
    """
    if teacher < student:
        raise BitsmithError(f"a teacher of {teacher} layers cannot hold the student's {student}")
    found: list[int | None] = [None] * teacher
    for n in range(student):
        found[(n + 1) * teacher // student - 1] = n
    return found


@one_blas_thread()
def embed_student(
    student: Path,
    out: Path,
    sizes: Sizes,
    *,
    seed: int = 0,
    turn_values: bool = False,
    overwrite: bool = False,
) -> Embedding:
    """Write a teacher in F32 whose logits are the student's text model's, and return how it was made.

    The head is a tensor of its own; MTP and vision are left out. `turn_values` turns each KV group's value
    channels (attention without gates alone). Raises BitsmithError for sizes that do not hold the student,
    OutputError if `out` exists.
    """
    student = local(student)
    with open_checkpoint(student) as checkpoint:
        model = model_of(checkpoint)
        build = _Build(model, sizes, np.random.default_rng(seed), turn_values)
        data = [TensorData(s.name, "F32", s.shape, [build.tensor(s)]) for s in build.specs]
        folder = student if student.is_dir() else student.parent
        files = side_files(folder, TOKENIZER_FILES)
        made_of = {"student": source_facts(checkpoint, out)}

        def finish(content: Content) -> None:
            seal(out, "lab embed", content, made_of, **asdict(sizes), seed=seed, turn_values=turn_values)

        write_safetensors(
            out,
            data,
            build.config,
            files=files,
            overwrite=overwrite,
            sources=checkpoint.files,
            finish=finish,
        )
    return Embedding(out, build.frame, build.scale, build.taken, tuple(build.places))


class _Build:
    """The teacher's tensors, one after the other."""

    def __init__(self, model: Model, sizes: Sizes, random: np.random.Generator, turn_values: bool) -> None:
        self._model, self._random = model, random
        self._own = _text_layers(model)
        layers = len(self._own) if sizes.layers is None else sizes.layers
        self._order = spread_layers(len(self._own), layers) if isinstance(layers, int) else list(layers)
        if [n for n in self._order if n is not None] != list(range(len(self._own))):
            raise BitsmithError(f"layers {self._order} do not hold the student's {len(self._own)} in order")
        self.config = _config(model, sizes, self._order)
        self._arch = ARCHITECTURES[self.config["model_type"]](self.config)
        self.specs = self._arch.specs()
        narrow, wide = model.arch.number("hidden_size"), self._arch.number("hidden_size")
        if wide < narrow:
            raise BitsmithError(f"hidden size {wide} is smaller than the student's {narrow}")
        self.frame: Float64 = np.linalg.qr(random.standard_normal((wide, narrow)))[0]
        self.scale = float(np.sqrt(wide / narrow)) if sizes.scale is None else sizes.scale
        self.taken = tuple(t for t, n in enumerate(self._order) if n is not None)
        self._gains = {s.name: random.lognormal(0, _GAINS, s.shape) for s in self.specs if _is_outer(s)}
        self._layers = [
            Layer(f"layers.{t}", {spec.role: spec for spec in self.specs if spec.layer == t})
            for t in range(len(self._order))
        ]
        self.places = [self._placed(n) for n in range(len(self._own))]
        self._turns = [self._drawn_turns(layer) if turn_values else None for layer in self._own]

    def tensor(self, spec: TensorSpec) -> NDArray[np.float32]:
        """Return a tensor of the teacher."""
        if spec.name in self._gains:
            return _float32(self._gains[spec.name] - (spec.norm == "1+w"))
        made = self._end(spec) if spec.layer is None else self._of_layer(spec)
        return _float32(made.reshape(spec.shape))

    def _end(self, spec: TensorSpec) -> Float64:
        table = self._model.having("embed")[0]
        if spec.role == "embed":
            return self._read(table) @ (self.scale * self.frame.T)
        head = (self._model.having("head") or [table])[0]
        final = next(s for s in self.specs if s.role == "norm.final")
        return self._reading(self._read(head), self._model.having("norm.final")[0], final)

    def _of_layer(self, spec: TensorSpec) -> Float64:
        number = int(spec.layer or 0)
        own = self._order[number]
        writes = spec.axes[0] == "residual"
        if own is None:
            return self._idle(spec, writes)
        layer, mine = self._own[own], self._own[own].specs[spec.role]
        weights = self._read(mine)
        if writes:
            columns = np.zeros((weights.shape[0], spec.shape[1]))
            columns[:, self._channels(own, spec.role)] = self._turned(own, spec.role, weights.T).T
            return self.scale * self.frame @ columns
        if spec.axes[-1] == "residual":
            norm = "norm.ffn" if spec.role.startswith("ffn.") else "norm.mixer"
            rows = self._random.standard_normal((spec.shape[0], weights.shape[1])) / np.sqrt(weights.shape[1])
            gained = weights * self._gain(layer.specs[norm])
            rows[self._channels(own, spec.role)] = self._turned(own, spec.role, gained)
            return self._reading(rows, None, self._layers[number].specs[norm])
        if spec.norm is not None:
            return weights
        rows = _SMALL * self._random.standard_normal((spec.shape[0], weights.shape[1]))
        rows[self._channels(own, spec.role)] = weights
        return rows

    def _idle(self, spec: TensorSpec, writes: bool) -> Float64:
        """Return a tensor of a layer that adds nothing to the stream."""
        if writes:
            return np.zeros(spec.shape)
        if spec.norm is not None:
            return np.full(spec.shape, float(spec.norm == "w"))
        deviation = 1 / float(np.sqrt(max(1, int(np.prod(spec.shape[1:])))))
        return self._random.normal(0, deviation, spec.shape)

    def _reading(self, rows: Float64, own_norm: TensorSpec | None, norm: TensorSpec) -> Float64:
        """Return what reads the teacher's normed state as `rows` (`out D_s`) read the student's."""
        if own_norm is not None:
            rows = rows * self._gain(own_norm)
        widened = float(np.sqrt(len(self.frame) / self.frame.shape[1]))  # what RMSNorm makes of n_s Qᵀ
        return rows @ self.frame.T / (widened * self._gains[norm.name])

    def _read(self, spec: TensorSpec) -> Float64:
        rows: Float64 = self._model.ref(spec.name).read().astype(np.float64)
        return rows.reshape(len(rows), -1)

    def _gain(self, norm: TensorSpec) -> Float64:
        return self._read(norm)[:, 0] + float(norm.norm == "1+w")

    def _placed(self, own: int) -> dict[str, Index]:
        """Return where the teacher's layer has the student's neurons, heads and groups."""
        theirs, ours = self._layers[self.taken[own]], self._own[own]
        wide, narrow = (layer.specs["ffn.down"].shape[1] for layer in (theirs, ours))
        teacher, student = groups_of(theirs, self._arch), groups_of(ours, self._model.arch)
        if wide < narrow or teacher.groups < student.groups or teacher.each < student.each:
            raise BitsmithError(f"layer {own}: the teacher's neurons or heads do not hold the student's")
        groups = self._random.permutation(teacher.groups)[: student.groups].astype(np.intp)
        heads = [g * teacher.each + self._random.permutation(teacher.each)[: student.each] for g in groups]
        ffn = self._random.permutation(wide)[:narrow].astype(np.intp)
        return {"ffn": ffn, "groups": groups, "heads": np.concatenate(heads).astype(np.intp)}

    def _channels(self, own: int, role: str) -> Index:
        """Return the teacher's rows (of a writer, columns) that hold the student's of a role."""
        places, specs = self.places[own], self._own[own].specs
        if role.startswith("ffn."):
            return places["ffn"]
        if role in ("delta.in_qkv", "delta.conv"):
            teacher = groups_of(self._layers[self.taken[own]], self._arch).groups
            value_dim = specs["norm.delta"].shape[0]
            student = groups_of(self._own[own], self._model.arch)
            dim = (specs["delta.in_qkv"].shape[0] - student.heads * value_dim) // (2 * student.groups)
            keys = by_channel(places["groups"], dim)
            values = by_channel(places["heads"], value_dim)
            return np.concatenate([keys, teacher * dim + keys, 2 * teacher * dim + values])
        axis = "groups" if role in ("attn.k", "attn.v") else "heads"
        size = specs[role].shape[role in ("attn.o", "delta.out")] // len(places[axis])
        found: Index = by_channel(places[axis], size)
        return found

    def _drawn_turns(self, layer: Layer) -> Float64 | None:
        if not layer.has("attn.v"):
            return None
        if layer.specs["attn.q"].axes[0] != "head.q":
            raise BitsmithError("values of gated attention cannot be turned")
        dim, count = layer.specs["norm.q"].shape[0], layer.specs["attn.v"].shape[0]
        return np.linalg.qr(self._random.standard_normal((count // dim, dim, dim)))[0]

    def _turned(self, own: int, role: str, rows: Float64) -> Float64:
        """Return rows with a KV group's value channels turned, `R x`, where the role carries them."""
        turns = self._turns[own]
        if turns is None or role not in ("attn.v", "attn.o"):
            return rows
        groups, dim, _ = turns.shape
        by_head = rows.reshape(groups, -1, dim, rows.shape[1])
        turned: Float64 = np.einsum("gij,ghjc->ghic", turns, by_head)
        return turned.reshape(rows.shape)


def _config(model: Model, sizes: Sizes, order: Sequence[int | None]) -> dict[str, Any]:
    """Return the teacher's config: the student's text model with other sizes, untied."""
    text, arch = model.arch.text_config, model.arch
    config = {key: value for key, value in text.items() if not key.startswith("mtp_")}
    dense = "linear_num_key_heads" not in text
    wanted = {
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.ffn,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "linear_num_key_heads": sizes.k_heads,
        "linear_num_value_heads": sizes.v_heads,
    }
    kinds = _kinds(model)
    return config | {
        "architectures": ["Qwen3ForCausalLM" if dense else "Qwen3_5ForCausalLM"],
        "model_type": "qwen3" if dense else "qwen3_5_text",
        "tie_word_embeddings": False,
        "dtype": "float32",
        "head_dim": arch.head_dim,
        "num_hidden_layers": len(order),
        "layer_types": [kinds[n] for n in _nearest(order)],
        **{key: value for key, value in wanted.items() if value is not None},
    }


def _kinds(model: Model) -> list[str]:
    return ["full_attention" if one.has("attn.o") else "linear_attention" for one in _text_layers(model)]


def _text_layers(model: Model) -> list[Layer]:
    return [layer for layer in layers_of(model) if layer.instance.startswith("layers.")]


def _nearest(order: Sequence[int | None]) -> list[int]:
    """Return for each layer the student's layer that it is, or for an idle one comes before."""
    found, following = [], max(n for n in order if n is not None)
    for n in reversed(order):
        following = following if n is None else n
        found.append(following)
    return found[::-1]


def _is_outer(spec: TensorSpec) -> bool:
    return spec.norm is not None and spec.axes == ("residual",)


def _float32(values: Float64) -> NDArray[np.float32]:
    return np.ascontiguousarray(values, np.float32)
