"""What a merge needs before anything is run or written: two models that fit, and texts that are enough."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from bitsmith import __version__
from bitsmith.errors import BitsmithError, UnsupportedError
from bitsmith.passes.axes import Layer
from bitsmith.passes.merge_inner import groups_of, most_alike
from bitsmith.passes.transform import Model, model_of
from bitsmith.run.evaluate import text_chunks
from bitsmith.run.evaluation import Protocol
from bitsmith.run.merge_evidence import text_layers
from bitsmith.run.merge_recipe import MergeRecipe
from bitsmith.run.merge_text import LEAST_HELD_CHUNKS, Texts, read_texts, refuse_shared, shared_runs
from bitsmith.run.paired_forward import WIDEST_SQUARE
from bitsmith.run.paired_inputs import Corpus, LayerMap, Sides, checked_map, open_sides, read_corpus
from bitsmith.store import CellmCheckpoint, GgufCheckpoint
from bitsmith.store.hub import local
from bitsmith.store.journal import content_key
from bitsmith.store.paired import Paired, open_paired

_WHOLE_MOMENTS = ("solve", "tie")


@dataclass(frozen=True)
class MergeAsk:
    """What is asked of a merge, besides where it goes; `samples` are tokens that stay out of the moments."""

    teacher: Path
    student: Path
    text: Path
    recipe: MergeRecipe
    held: Path | None = None
    tokens: int | None = None
    ctx_tokens: int = 512
    chunks: int | None = None
    samples: int = 2048
    layer_map: LayerMap = "cka"
    paired: Path | None = None
    blend: tuple[tuple[Path, float], ...] = ()
    sweep_budget: int | None = None
    fallback: bool = True
    seed: int = 0

    @property
    def given(self) -> list[Path]:
        """Paired activations that are there already."""
        return [*([] if self.paired is None else [self.paired]), *(one for one, _ in self.blend)]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self), default=str))
        return found


@dataclass(frozen=True)
class Held:
    """The held-out chunks: how they are measured, and which shares of their runs of tokens occur elsewhere.

    `shared` is of what also occurs in the text that is paired, `repeated` of what the odd chunks have in
    common with the even ones.
    """

    protocol: Protocol
    shared: float
    repeated: float


@dataclass(frozen=True)
class MergeInputs:
    """Both models, open, and what was found: texts, the chunks of both, the widest square that is kept.

    `corpus` is what is paired, None where paired activations are given.
    """

    ask: MergeAsk
    sides: Sides
    teacher: Model
    student: Model
    texts: Texts
    corpus: Corpus | None
    held: Held
    widest_square: int

    @property
    def sources(self) -> list[Path]:
        """Every file that is read."""
        ask = self.ask
        models = [file for _, side in self.sides.named for file in side.model.source.files]
        return [*models, ask.text, *([] if ask.held is None else [ask.held]), *ask.given]

    @property
    def key(self) -> dict[str, Any]:
        """All that the result depends on."""
        teacher, student = self.sides.teacher.model, self.sides.student.model
        contents = {
            "teacher": teacher.checkpoint.source_digest,
            "student": student.checkpoint.source_digest,
            "text": self.texts.sha256[0],
            "held": self.texts.sha256[1],
            "held-out chunks": self.held.protocol.chunks,
            "paired": [open_paired(one).digest for one in self.ask.given],
            "blend": [share for _, share in self.ask.blend],
        }
        return content_key(student.checkpoint, self.ask.to_json() | contents)

    def fits(self, paired: Paired) -> bool:
        """Tell whether paired activations are those that this merge would make."""
        found, corpus, given = paired.manifest, self.corpus, self.ask.layer_map
        mapped = found.mapped_by == (given if isinstance(given, str) else "given")
        return (
            corpus is not None
            and mapped
            and (isinstance(given, str) or list(given) == found.layer_map)
            and found.bitsmith == __version__
            and found.text_sha256 == self.texts.sha256[0]
            and found.tokenizer_sha256 == self.sides.tokenizer_sha256
            and (found.chunks, found.ctx_tokens) == corpus.tokens.shape
            and found.held_chunks == corpus.held.tolist()
            and found.teacher.sha256 == self.sides.teacher.model.checkpoint.source_digest
            and found.student.sha256 == self.sides.student.model.checkpoint.source_digest
        )


@contextmanager
def open_inputs(ask: MergeAsk) -> Iterator[MergeInputs]:
    """Open both models and the texts.

    Raises BitsmithError as `open_sides`, `checked_map`, `read_corpus`, `read_texts` and `most_alike` do, for
    one model that is given as both, heads or neurons that do not fit, a trunk that does not, fewer than four
    held-out chunks, and for paired activations of other models; UnsupportedError for a student that is no
    Hugging Face checkpoint.
    """
    ask = replace(ask, teacher=local(ask.teacher), student=local(ask.student))
    _refuse_options(ask)
    if not ask.recipe.activations:
        ask = replace(ask, layer_map="proportional")
    with open_sides(ask.teacher, ask.student) as sides:
        checked_map(ask.layer_map, sides)
        opened = sides.student.model.source
        if not opened.config or isinstance(opened, GgufCheckpoint | CellmCheckpoint):
            raise UnsupportedError(
                "is no Hugging Face checkpoint: safetensors with a config.json", path=ask.student
            )
        teacher, student = (model_of(side.model.source) for _, side in sides.named)
        _refuse_layers(ask.recipe, teacher, student)
        texts = read_texts(sides.student.model, ask.text, ask.held, ask.tokens, ask.ctx_tokens)
        with TemporaryDirectory() as folder:
            corpus, held = _chunks(ask, sides, texts, Path(folder))
        _refuse_strangers(ask, teacher, student)
        whole = ask.recipe.ffn in _WHOLE_MOMENTS
        wide = max(sides.teacher.width(n, "ffn") for n in range(sides.teacher.n_layers))
        widest = max(WIDEST_SQUARE, wide) if whole else WIDEST_SQUARE
        yield MergeInputs(ask, sides, teacher, student, texts, corpus, held, widest)


def _refuse_options(ask: MergeAsk) -> None:
    if ask.teacher.samefile(ask.student):
        raise BitsmithError("is teacher and student at once: give two models", path=ask.teacher)
    if not ask.recipe.activations and ask.layer_map not in ("cka", "proportional"):
        raise BitsmithError("without activations layers are paired proportionally: no others can be given")
    for what, value in (("tokens", ask.tokens), ("chunks", ask.chunks), ("trials", ask.sweep_budget)):
        if value is not None and value < 1:
            raise BitsmithError(f"{value} {what} are asked for, expected 1 or more")
    rest = 1 - sum(share for _, share in ask.blend)
    if any(not 0 < share < 1 for _, share in ask.blend) or rest <= 0:
        said = ", ".join(f"{share:g}" for _, share in ask.blend)
        raise BitsmithError(f"shares of blended texts are {said}: expected each above 0, below 1 together")


def _refuse_layers(recipe: MergeRecipe, teacher: Model, student: Model) -> None:
    """Refuse what no layer map makes fit: heads, groups, head sizes, neurons, the trunk."""
    width = student.arch.number("hidden_size")
    if recipe.trunk is not None and not 0 < recipe.trunk < width:
        raise BitsmithError(f"the trunk has {recipe.trunk} dimensions, expected 1 … {width - 1}")
    theirs, path = text_layers(teacher), teacher.checkpoint.path
    kinds: dict[bool, Layer] = {layer.has("attn.o"): layer for layer in reversed(theirs)}
    for ours in text_layers(student):
        other = kinds[ours.has("attn.o")]
        try:
            groups = groups_of(other, teacher.arch), groups_of(ours, student.arch)
            likeness = np.zeros((groups[0].heads, groups[1].heads))
            most_alike((other, teacher.arch), (ours, student.arch), likeness)
        except BitsmithError as error:
            raise BitsmithError(error.message, path=path) from error
        if recipe.heads == "turn" and ours.has("attn.o") and ours.specs["attn.q"].axes[0] != "head.q":
            raise UnsupportedError(
                "an output gate acts on single channels: values of gated attention cannot be turned",
                path=student.checkpoint.path,
            )
        wide, narrow = (one.specs["ffn.down"].shape[1] for one in (other, ours))
        if wide < narrow:
            raise BitsmithError(
                f"has {wide} neurons in {other.instance}, the student {narrow} in {ours.instance}: the "
                "teacher has to be the larger",
                path=path,
            )


def _chunks(ask: MergeAsk, sides: Sides, texts: Texts, folder: Path) -> tuple[Corpus | None, Held]:
    """Return what is paired and what is held out."""
    fit, held = texts.placed(folder)
    named = {fit: ask.text, held: ask.held or ask.text}
    corpus = None
    try:
        if ask.paired is None:
            sparse = not ask.recipe.activations
            corpus = read_corpus(sides, fit, ask.tokens, ask.ctx_tokens, ask.samples, sparse=sparse)
        tokens, protocol = text_chunks(sides.student.model, held, ask.ctx_tokens, ask.chunks, ask.seed)
    except BitsmithError as error:
        if error.path not in named:
            raise
        raise type(error)(error.message, path=named[error.path]) from error
    if len(tokens) < LEAST_HELD_CHUNKS:
        raise BitsmithError(
            f"gives {len(tokens)} chunks of {ask.ctx_tokens} tokens to judge on, {LEAST_HELD_CHUNKS} are the "
            "least: two to choose on, two to judge on; give a longer text or a smaller context",
            path=named[held],
        )
    seen = [] if corpus is None else [corpus.tokens]
    seen += [open_paired(one).tokens()[0] for one in ask.given]
    shared = max((shared_runs(one, tokens) for one in seen), key=lambda shares: float(shares.mean()))
    if ask.held is not None or ask.given:
        refuse_shared(shared, named[held])
    repeated = shared_runs(tokens[::2], tokens[1::2])
    return corpus, Held(protocol, float(shared.mean()), float(repeated.mean()))


def _refuse_strangers(ask: MergeAsk, teacher: Model, student: Model) -> None:
    """Refuse paired activations of other models, before anything is run."""
    for path in ask.given:
        found = open_paired(path)
        for model, said in ((teacher, found.manifest.teacher), (student, found.manifest.student)):
            if model.checkpoint.source_digest != said.sha256:
                raise BitsmithError(
                    f"was made of {said.path}, which is not {model.checkpoint.path} as it is now", path=path
                )
