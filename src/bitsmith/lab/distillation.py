"""Distil a student from a teacher by back-propagation: what a merge without gradients is held against."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from bitsmith import __version__
from bitsmith.archs.tokenizer import tokenizer_folder
from bitsmith.errors import BitsmithError, OutputError, UnsupportedError
from bitsmith.progress import Progress, silent
from bitsmith.run.descent import Descent, Facts, Schedule, batches
from bitsmith.run.distill import Lesson, Tokens
from bitsmith.run.execute import peak_memory_bytes
from bitsmith.run.folder import SIDE_FILES
from bitsmith.run.forward import TextModel, quiet_transformers
from bitsmith.run.free_model import EMBEDDING, HEAD, original_weights, plain
from bitsmith.run.merge_written import PACKED_AS, WrittenTensor
from bitsmith.run.paired_inputs import Corpus, Sides, open_sides, read_corpus
from bitsmith.run.student import Student
from bitsmith.store.atomic import refuse_taken
from bitsmith.store.checkpoint import ComputedTensor, TensorRef
from bitsmith.store.journal import Journal, Key, content_key
from bitsmith.store.packed import PackedTensor
from bitsmith.store.safetensors import ITEM_BYTES, side_files
from bitsmith.store.safetensors_writer import TensorData, write_safetensors
from bitsmith.store.stored import FLOATS

_LOOKS = 16
_PACKED_KEY = "quantization_config"


@dataclass(frozen=True)
class DistillOptions:
    """How long and how boldly `distilled` walks.

    `steps` of Adam on `batch_chunks` chunks each, its rate a cosine from `learning_rate`; the loss of a token
    is `kl_share` KL(teacher‖student) + (1 - `kl_share`) cross-entropy.
    """

    steps: int = 200
    batch_chunks: int = 4
    learning_rate: float = 1e-3
    kl_share: float = 0.5
    seed: int = 0


@dataclass(frozen=True)
class Distilled:
    """What one distillation did; losses are means over the held-out chunks, in nats per token.

    They are also what the best step was chosen on; a `best_step` of 0 leaves the student as it was.
    `trained_tokens` counts a token once for each time it was learnt from.
    """

    out: Path
    teacher: str
    student: str
    text_sha256: str
    ctx_tokens: int
    fit_tokens: int
    held_tokens: int
    best_step: int
    held_loss_before_nats: float
    held_loss_after_nats: float
    trained_tokens: int
    parameters: int
    seconds: float
    peak_memory_bytes: int | None
    options: DistillOptions
    log: tuple[dict[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain values."""
        return {"kind": "distillation", "bitsmith": __version__, **asdict(self), "out": str(self.out)}


def distilled(
    teacher: Path,
    student: Path,
    text: Path,
    out: Path,
    *,
    tokens: int | None = None,
    ctx_tokens: int = 512,
    samples: int = 2048,
    steps: int = DistillOptions.steps,
    batch_chunks: int = DistillOptions.batch_chunks,
    learning_rate: float = DistillOptions.learning_rate,
    kl_share: float = DistillOptions.kl_share,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Distilled:
    """Train all weights of `student` towards `teacher` on a UTF-8 text; write it to the folder `out`.

    Takes the chunks that `paired` takes for the same `tokens`, `ctx_tokens` and `samples`: gradients come
    from those in its moments, and the step is kept that is best on those it holds out, the start included.
    Adam through the whole model in float32; both models, gradients and moments are in memory. Weights keep
    their types, packed ones become BF16; vision and MTP stay as they are. A state file `.OUT.distilling` lets
    a killed run go on. The result is a function of the inputs, the options and the number of threads.

    Raises BitsmithError as `open_sides` and `read_corpus` do and for options that leave nothing to do,
    UnsupportedError for a student that is no Hugging Face checkpoint, OutputError as `write_safetensors`
    does.
    """
    started = time.monotonic()
    options = DistillOptions(steps, batch_chunks, learning_rate, kl_share, seed)
    _check_options(options)
    if not out.absolute().parent.is_dir():
        raise OutputError("is not in a folder that exists", path=out)
    with open_sides(teacher, student) as sides:
        model = sides.student.model
        if model.source is not model.checkpoint:
            raise UnsupportedError("is no Hugging Face checkpoint; one is distilled", path=student)
        corpus = read_corpus(sides, text, tokens, ctx_tokens, samples, sparse=True)
        sources = [*(file for _, side in sides.named for file in side.model.source.files), text]
        refuse_taken(out, overwrite, sources, folder=True)
        key = _key(sides, corpus, options)
        state = out.with_name(f".{out.name}.distilling")
        with Journal(out.with_name(f".{out.name}.distilling.lock"), key, overwrite=overwrite) as journal:
            task = _Task(sides, corpus, options, progress)
            with quiet_transformers():
                facts = Descent(task, task.leaves, task.schedule, state, key).run(progress, lambda _: None)
            _write(model, task.weights, out, overwrite, sources)
            state.unlink(missing_ok=True)
            journal.remove()
        return _record(task, facts, out, time.monotonic() - started)


class _Task:
    """The loss on a batch, and on what is held out, of the student's weights made free."""

    def __init__(self, sides: Sides, corpus: Corpus, options: DistillOptions, progress: Progress) -> None:
        teacher, model = sides.teacher.model, sides.student.model
        self.sides, self.corpus, self.options = sides, corpus, options
        self._student = Student(model.arch)
        self._head = plain(teacher.head)
        self._tied = model.arch.tied
        self._own = original_weights(model)
        if self._tied:
            del self._own[HEAD]
        for leaf in self._own.values():
            leaf.requires_grad_()
        self._fit, self._held = (Lesson(teacher, part, 0, progress) for part in corpus.split)

    @property
    def leaves(self) -> dict[str, torch.Tensor]:
        """What a gradient moves."""
        return {f"{name}:value": leaf for name, leaf in self._own.items()}

    @property
    def schedule(self) -> Schedule:
        """The steps and their rate."""
        steps = self.options.steps
        return Schedule(steps, {"value": self.options.learning_rate}, every=max(1, steps // _LOOKS))

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The student's tensors by name without prefix, with the head."""
        return self._own | ({HEAD: self._own[EMBEDDING]} if self._tied else {})

    def loss_nats(self, step: int) -> torch.Tensor:
        """Return the loss on one batch."""
        size = min(self.options.batch_chunks, len(self._fit.tokens))
        return self._loss(self._fit, batches(len(self._fit.tokens), size, step, self.options.seed))

    @torch.no_grad()
    def held_nats(self) -> float:
        """Return the loss on all that is held out."""
        each = [self._loss(self._held, np.array([at])).item() for at in range(len(self._held.tokens))]
        return float(np.mean(each))

    def _loss(self, lesson: Lesson, which: Tokens) -> torch.Tensor:
        """Return the mean loss over the positions 0…T-2 of some chunks."""
        weights, tokens = self.weights, torch.from_numpy(lesson.tokens[which])
        states = self._student.states(weights, tokens)[:, :-1].flatten(0, 1)
        found = log_softmax(states @ weights[HEAD].T, dim=-1)
        with torch.no_grad():
            wanted = log_softmax(torch.from_numpy(lesson.states[which]).flatten(0, 1) @ self._head.T, dim=-1)
        kl = kl_div(found, wanted, reduction="batchmean", log_target=True)
        share = self.options.kl_share
        return share * kl + (1 - share) * cross_entropy(found, tokens[:, 1:].flatten())


def _check_options(options: DistillOptions) -> None:
    if options.steps < 1 or options.batch_chunks < 1:
        raise BitsmithError(f"{options.steps} steps of {options.batch_chunks} chunks leave nothing to learn")
    if not 0 < options.learning_rate < float("inf"):
        raise BitsmithError(f"learning rate is {options.learning_rate}, expected a positive number")
    if not 0 <= options.kl_share <= 1:
        raise BitsmithError(f"share of the divergence is {options.kl_share}, expected 0 … 1")


def _key(sides: Sides, corpus: Corpus, options: DistillOptions) -> Key:
    """Return all that the result depends on."""
    tokens = hashlib.sha256(corpus.tokens.tobytes()).hexdigest()
    return content_key(
        sides.student.model.checkpoint,
        {
            "torch version": torch.__version__,
            "threads": torch.get_num_threads(),
            "teacher": sides.teacher.model.checkpoint.source_digest,
            "tokens": [tokens, corpus.tokens.shape, corpus.held.tolist()],
            **asdict(options),
        },
    )


def _write(
    model: TextModel, weights: dict[str, torch.Tensor], out: Path, overwrite: bool, sources: list[Path]
) -> None:
    stored = model.checkpoint
    write_safetensors(
        out,
        _tensors(model, weights),
        {key: value for key, value in stored.config.items() if key != _PACKED_KEY},
        files=side_files(tokenizer_folder(stored), SIDE_FILES),
        overwrite=overwrite,
        sources=sources,
    )


def _tensors(model: TextModel, weights: dict[str, torch.Tensor]) -> Iterator[TensorData]:
    prefix = model.arch.text_prefix
    for name, ref in model.checkpoint.items():
        value = weights.get(name) if name == HEAD else None
        if name.startswith(prefix):
            value = weights.get(name.removeprefix(prefix))
        yield _data(_written(ref) if value is None else _trained(ref, value))


def _data(ref: TensorRef) -> TensorData:
    return TensorData(ref.name, ref.dtype, ref.shape, (ref.raw(*part) for part in ref.slices()))


def _written(ref: TensorRef) -> TensorRef:
    packed = isinstance(ref, PackedTensor) or ref.dtype not in ITEM_BYTES
    return WrittenTensor(ref, PACKED_AS) if packed else ref


def _trained(ref: TensorRef, value: torch.Tensor) -> WrittenTensor:
    rows = value.detach().numpy()
    computed = ComputedTensor(ref.name, ref.shape, "F32", lambda start, stop: rows[start:stop])
    return WrittenTensor(computed, ref.dtype if ref.dtype in FLOATS else PACKED_AS)


def _record(task: _Task, facts: Facts, out: Path, seconds: float) -> Distilled:
    corpus, options = task.corpus, task.options
    fit, held = corpus.split
    return Distilled(
        out=out,
        teacher=str(task.sides.teacher.model.source.path),
        student=str(task.sides.student.model.source.path),
        text_sha256=corpus.protocol.text_sha256,
        ctx_tokens=fit.shape[1],
        fit_tokens=fit.size,
        held_tokens=held.size,
        best_step=facts.best_step,
        held_loss_before_nats=facts.first_nats,
        held_loss_after_nats=facts.best_nats,
        trained_tokens=options.steps * min(options.batch_chunks, len(fit)) * fit.shape[1],
        parameters=sum(leaf.numel() for leaf in task.leaves.values()),
        seconds=seconds,
        peak_memory_bytes=peak_memory_bytes(),
        options=options,
        log=tuple(
            {"step": row["step"], "held_loss_nats": row["held_kld_nats"], "seconds": row["seconds"]}
            for row in facts.log
        ),
    )
