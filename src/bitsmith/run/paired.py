"""Pair two models' activations: both run over the same tokens, layer beside layer, resumably."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from bitsmith import __version__
from bitsmith.log import event
from bitsmith.passes.merge_layers import cka_matrix, layer_similarity, monotone_layers, proportional_layers
from bitsmith.progress import Progress, silent
from bitsmith.run.paired_cost import CKA_TOKENS, PairedCost, cost_of
from bitsmith.run.paired_forward import (
    WIDEST_SQUARE,
    Side,
    Step,
    add_states,
    pair_shapes,
    run_pair,
    run_sampled,
)
from bitsmith.run.paired_inputs import Corpus, LayerMap, Sides, Tokens, checked_map, open_sides, read_corpus
from bitsmith.run.paired_sums import PlaceShape, PlaceSums
from bitsmith.run.sites import States
from bitsmith.store.atomic import atomic_folder, link_file, remove, sync_path
from bitsmith.store.journal import Journal, content_key, remove_work
from bitsmith.store.paired import (
    EMBED_NAME,
    FINAL_NAME,
    MANIFEST_NAME,
    TOKENS_NAME,
    WIDE_PLACES,
    Paired,
    PairedManifest,
    PairedModel,
    SideName,
    is_paired_file,
    open_paired,
    pair_name,
    sample_name,
    write_arrays,
    write_paired_manifest,
)
from bitsmith.store.safetensors import open_safetensors

Float32 = NDArray[np.float32]
Files = dict[str, dict[str, str]]


def paired(
    teacher: Path,
    student: Path,
    text: Path,
    out: Path,
    *,
    tokens: int | None = None,
    ctx_tokens: int = 512,
    layer_map: LayerMap = "cka",
    samples: int = 2048,
    widest_square: int = WIDEST_SQUARE,
    sparse: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
    say_cost: Callable[[PairedCost], None] | None = None,
) -> Paired:
    """Run a UTF-8 text through both models; keep what maps between them are found from in the folder `out`.

    The text is cut into chunks of `ctx_tokens` as `evaluate` does, `tokens` of it (None: all). Some chunks,
    evenly spread, one in eight at most, hold `samples` tokens out: of those the states entering every layer
    and its FFN are kept, and by `layer_map` they choose the teacher's layer beside each of the student's:
    `cka`, the increasing map of layers most alike in their states and in what they add to them;
    `proportional`; or the layers themselves. Over all other chunks each pair of layers gets E[t tᵀ], E[s sᵀ],
    E[t sᵀ] and means of four places: the states that enter, the updates (output minus input), the heads'
    outputs (input of o_proj or out_proj) and the neurons' (input of down_proj). Of more than `widest_square`
    columns the squares are kept in diagonal blocks, of a KV group's heads, or as the diagonal (neurons).

    One layer of each model and a pair's moments are in memory; states lie in `.NAME.paired` beside `out`, so
    that a killed run goes on at its layer, with the same bytes. Products of states are taken in float64,
    sums in float64 in the order of the text, whatever the number of threads. `say_cost` is told the cost
    before the first forward; it has one layer of each kind measured for it.

    Raises BitsmithError as `open_sides`, `checked_map` and `read_corpus` do and for states that are not
    finite; OutputError if `out` exists (unless `overwrite`), is an input, is being written by another run, or
    does not fit on the disk.
    """
    with open_sides(teacher, student) as sides:
        checked_map(layer_map, sides)
        corpus = read_corpus(sides, text, tokens, ctx_tokens, samples, sparse=sparse)
        run = _Run(sides, corpus, layer_map, widest_square)
        cost = run.cost(measure=False)
        sources = [*(file for _, side in sides.named for file in side.model.source.files), text]
        with atomic_folder(
            out,
            last=MANIFEST_NAME,
            stale=is_paired_file,
            overwrite=overwrite,
            expect_bytes=cost.disk_bytes,
            sources=sources,
        ) as part:
            if say_cost is not None:
                say_cost(run.cost(measure=True))
            with _Work(run, out, progress, overwrite=overwrite) as work:
                files = work.run()
                for name in files:
                    link_file(work.folder / name, part / name)
            write_paired_manifest(part / MANIFEST_NAME, run.manifest(files, work.layer_map))
        remove_work(work.folder)
    found = open_paired(out)
    found.resumed_steps = work.resumed
    return found


@dataclass(frozen=True)
class _Run:
    """What is run, and what a resumed run must agree on."""

    sides: Sides
    corpus: Corpus
    layer_map: LayerMap
    widest_square: int

    @property
    def key(self) -> dict[str, Any]:
        """All that the results depend on."""
        teacher, student = self.sides.teacher.model, self.sides.student.model
        return content_key(
            student.checkpoint,
            {
                "torch version": torch.__version__,
                "teacher": teacher.checkpoint.source_digest,
                "tokenizer": self.sides.tokenizer_sha256,
                "text": self.corpus.protocol.text_sha256,
                "tokens": hashlib.sha256(self.corpus.tokens.tobytes()).hexdigest(),
                "chunks": self.corpus.tokens.shape,
                "held-out chunks": self.corpus.held.tolist(),
                "layer map": [self.mapped_by, *self.given],
                "widest square": self.widest_square,
            },
        )

    @property
    def mapped_by(self) -> str:
        """How layers are paired."""
        return self.layer_map if isinstance(self.layer_map, str) else "given"

    @property
    def given(self) -> list[int]:
        """The layers that were given, if they were."""
        return [] if isinstance(self.layer_map, str) else [int(layer) for layer in self.layer_map]

    def cost(self, *, measure: bool) -> PairedCost:
        """Return the run's cost."""
        chunks, ctx = self.corpus.tokens.shape
        return cost_of(
            self.sides,
            chunks * ctx,
            ctx_tokens=ctx,
            samples=len(self.corpus.held) * ctx,
            widest_square=self.widest_square,
            measure=measure,
        )

    def manifest(self, files: Files, layer_map: Sequence[int]) -> PairedManifest:
        """Return the manifest."""
        chunks, ctx = self.corpus.tokens.shape
        held = self.corpus.held.tolist()
        return PairedManifest(
            bitsmith=__version__,
            family=self.sides.student.model.arch.gguf_arch,
            teacher=_described(self.sides.teacher),
            student=_described(self.sides.student),
            text=self.corpus.protocol.text,
            text_sha256=self.corpus.protocol.text_sha256,
            tokenizer_sha256=self.sides.tokenizer_sha256,
            ctx_tokens=ctx,
            chunks=chunks,
            held_chunks=held,
            fit_tokens=(chunks - len(held)) * ctx,
            layer_map=list(layer_map),
            mapped_by=self.mapped_by,
            files=files,
        )


def _described(side: Side) -> PairedModel:
    layers = range(side.n_layers)
    return PairedModel(
        path=str(side.model.source.path),
        sha256=side.model.checkpoint.source_digest,
        hidden=side.hidden,
        layers=side.n_layers,
        mixer=[side.width(layer, "mixer") for layer in layers],
        ffn=[side.width(layer, "ffn") for layer in layers],
    )


def work_of(out: Path) -> Path:
    """Return the folder beside `out` that a run of `paired` works in."""
    return out.absolute().with_name(f".{out.name}.paired")


class _Work:
    """The folder of a run under way: a journal, both models' states between two layers, and finished files.

    A journal entry names the files a step made (with the SHA-256 of their tensors) and the states that the
    next step goes on from; everything else in the folder is left over and goes.
    """

    def __init__(self, run: _Run, out: Path, progress: Progress, *, overwrite: bool) -> None:
        self._run, self._progress, self._overwrite = run, progress, overwrite
        self._fit, self._held = run.corpus.split
        self._done = 0
        self.folder = work_of(out)
        self.layer_map: tuple[int, ...] = ()
        self.resumed = 0

    def __enter__(self) -> Self:
        self.folder.mkdir(exist_ok=True)
        self._journal = Journal(self.folder / "journal", self._run.key, overwrite=self._overwrite)
        self.resumed = len(self._journal.entries)
        self._tidy()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._journal.__exit__(kind, error, trace)

    def run(self) -> Files:
        """Do all steps that are not in the journal; return the SHA-256 of each tensor by file."""
        teacher, student = self._run.sides.teacher, self._run.sides.student
        for name, side in self._run.sides.named:
            for layer in range(side.n_layers + 1):
                tokens = self._held.size if layer < side.n_layers else 0
                self._step(f"{name}.sample.{layer}", tokens, partial(self._sample, name, side, layer))
        self._step("map", 0, self._choose_layers)
        self._step("tokens", 0, self._write_tokens)
        self._step("embed", 0, self._embed)
        self.layer_map = tuple(self._journal.entries["map"]["layers"])
        paired_with = {layer: pair for pair, layer in enumerate(self.layer_map)}
        pair = 0
        for layer in range(teacher.n_layers):
            if layer in paired_with:
                self._step(f"pair.{pair}", 2 * self._fit.size, partial(self._pair, pair, layer))
                pair += 1
            else:
                self._step(f"teacher.{layer}", self._fit.size, partial(self._skip, pair, layer))
        self._step("final", 0, partial(self._final, teacher.n_layers, student.n_layers))
        entries = self._journal.entries.values()
        return {name: tensors for entry in entries for name, tensors in entry["files"].items()}

    def _step(self, name: str, tokens: int, work: Callable[[], dict[str, Any]]) -> None:
        """Do one step unless it is done, put its files and states on the disk, then note it.

        `tokens` is what it advances by, in tokens times layers.
        """
        after = self._done + tokens
        if name not in self._journal.entries:
            event("pair", step=name)
            entry = {"files": {}, "states": [], **work()}
            for kept in (*entry["files"], *entry["states"]):
                sync_path(self.folder / kept)
            sync_path(self.folder)
            self._journal.add(name, entry)
            self._tidy()
        self._done = after

    def _tidy(self) -> None:
        """Remove what no entry made and the next step does not need."""
        entries = list(self._journal.entries.values())
        kept = {name for entry in entries for name in entry["files"]} | {self._journal.path.name}
        kept |= set(entries[-1]["states"]) if entries else set()
        for path in self.folder.iterdir():
            if path.name not in kept:
                remove(path)

    def _report(self, tokens: int) -> None:
        self._done += tokens
        per_layer = self._fit.size + self._held.size
        total = per_layer * sum(side.n_layers for _, side in self._run.sides.named)
        self._progress("paired", self._done, total)

    def _states(self, name: str, side: Side, tokens: Tokens) -> States:
        return States(self.folder / name, (*tokens.shape, side.hidden))

    def _fit_states(self, name: SideName, layer: int) -> States:
        sides = self._run.sides
        side = sides.teacher if name == "teacher" else sides.student
        return self._states(f"{name}.{layer}", side, self._fit)

    def _sample(self, name: SideName, side: Side, layer: int) -> dict[str, Any]:
        """Keep the held-out states that enter `layer` and its FFN."""
        source = self._states(f"sample.{name}.{layer}", side, self._held)
        if layer == 0:
            source.create()
            side.forward.embed(self._held, source)
        arrays, streams = {"states": ("F32", source.mapped())}, []
        if layer < side.n_layers:
            target, between = (
                self._states(f"{kind}.{name}.{number}", side, self._held)
                for kind, number in (("sample", layer + 1), ("between", layer))
            )
            target.create()
            between.create()
            for chunks in run_sampled(side.loaded(layer), source, target, between):
                self._report(chunks * self._held.shape[1])
            arrays["between"] = "F32", between.mapped()
            streams = [target.path.name]
        file = sample_name(name, layer)
        return {"files": {file: write_arrays(self.folder / file, arrays)}, "states": streams}

    def _choose_layers(self) -> dict[str, Any]:
        """Find the teacher's layer for each of the student's."""
        teacher, student = self._run.sides.teacher, self._run.sides.student
        if self._run.mapped_by == "given":
            return {"layers": self._run.given}
        if self._run.mapped_by == "proportional":
            return {"layers": list(proportional_layers(teacher.kinds, student.kinds))}
        states, updates = (
            cka_matrix(
                SampledLayers(self.folder, "teacher", teacher.n_layers, updates=which),
                SampledLayers(self.folder, "student", student.n_layers, updates=which),
            )
            for which in (False, True)
        )
        similarity = layer_similarity(states, updates)
        return {"layers": list(monotone_layers(similarity, teacher.kinds, student.kinds))}

    def _write_tokens(self) -> dict[str, Any]:
        splits = {"fit": ("I64", self._fit), "held": ("I64", self._held)}
        return {"files": {TOKENS_NAME: write_arrays(self.folder / TOKENS_NAME, splits)}}

    def _embed(self) -> dict[str, Any]:
        """Begin both streams."""
        streams = []
        for name, side in self._run.sides.named:
            streams.append(self._fit_states(name, 0))
            streams[-1].create()
            side.forward.embed(self._fit, streams[-1])
        return self._entry(EMBED_NAME, self._summed(*streams), streams)

    def _skip(self, pair: int, layer: int) -> dict[str, Any]:
        """Run a layer of the teacher that stands beside none; the student waits before its layer `pair`."""
        before, after = (self._fit_states("teacher", n) for n in (layer, layer + 1))
        after.create()
        for chunks in self._run.sides.teacher.forward.layer(layer, before, after, _nothing):
            self._report(chunks * self._fit.shape[1])
        return {"states": [after.path.name, self._fit_states("student", pair).path.name]}

    def _pair(self, pair: int, layer: int) -> dict[str, Any]:
        """Run a pair of layers and keep its moments."""
        ours = self._fit_states("teacher", layer), self._fit_states("teacher", layer + 1)
        theirs = self._fit_states("student", pair), self._fit_states("student", pair + 1)
        for _, after in (ours, theirs):
            after.create()
        sides = self._run.sides
        shapes = pair_shapes(sides.teacher, sides.student, (layer, pair), self._run.widest_square)
        sums = {place: PlaceSums(shape) for place, shape in shapes.items()}
        layers = sides.teacher.loaded(layer), sides.student.loaded(pair)
        for chunks in run_pair(*layers, Step(ours, theirs), sums):
            self._report(2 * chunks * self._fit.shape[1])
        del layers  # their memory goes to the moments
        return self._entry(pair_name(pair), sums, [ours[1], theirs[1]])

    def _final(self, teacher_layers: int, student_layers: int) -> dict[str, Any]:
        """Keep the moments of the states before the final norms, and behind them."""
        ends = self._fit_states("teacher", teacher_layers), self._fit_states("student", student_layers)
        eps = [
            float(side.model.arch.text_config.get("rms_norm_eps", 1e-6)) for _, side in self._run.sides.named
        ]
        return self._entry(FINAL_NAME, self._summed(*ends, eps=eps), [])

    def _summed(self, teacher: States, student: States, *, eps: Sequence[float] = ()) -> dict[str, PlaceSums]:
        widths = teacher.shape[2], student.shape[2]
        places = ("states", "normed") if eps else ("states",)
        sums = {place: PlaceSums(PlaceShape(*widths, *widths)) for place in places}
        add_states(teacher, student, sums, eps)
        return sums

    def _entry(self, file: str, sums: dict[str, PlaceSums], states: Sequence[States]) -> dict[str, Any]:
        """Write moments; return the journal's entry."""
        arrays = {
            f"{place}.{part}": ("F64" if place in WIDE_PLACES else "F32", array)
            for place, found in sums.items()
            for part, array in found.result(f"{file.removesuffix('.safetensors')}, {place},").items()
        }
        found = write_arrays(self.folder / file, arrays)
        return {"files": {file: found}, "states": [one.path.name for one in states]}


class SampledLayers(Sequence[Float32]):
    """What enters each layer of one model, or what it adds (`N D`), of the samples in a folder's files."""

    def __init__(self, folder: Path, side: SideName, layers: int, *, updates: bool) -> None:
        self._folder, self._side, self._layers, self._updates = folder, side, layers, updates

    def __len__(self) -> int:
        return self._layers

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._layers:
            raise IndexError(index)
        entering = self._read(index)
        return self._read(index + 1) - entering if self._updates else entering

    def _read(self, layer: int) -> Float32:
        """Return the states, of so many tokens at most that comparing layers stays small."""
        with open_safetensors(self._folder / sample_name(self._side, layer)) as file:
            states = file["states"].read()
        rows: Float32 = states.reshape(-1, states.shape[-1])
        count = min(len(rows), CKA_TOKENS)
        chosen: Float32 = rows[np.linspace(0, len(rows) - 1, count).round().astype(int)]
        return chosen


def _nothing(*_: object) -> None:
    """Take no site's inputs."""
