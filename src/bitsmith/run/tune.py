"""Tune what costs no bytes in a GGUF by KL to the original: block scales and mins, F32 tensors, codes."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bitsmith import __version__
from bitsmith.archs.export import ImportedView
from bitsmith.errors import BitsmithError, OutputError, UnsupportedError
from bitsmith.passes.transform import Applied
from bitsmith.progress import Progress, silent
from bitsmith.run.descent import Descent, Facts, Schedule
from bitsmith.run.distill import Distillation, Lesson, noisy
from bitsmith.run.evaluate import MIN_CTX_TOKENS, open_model
from bitsmith.run.forward import TextModel, check_heads, quiet_transformers
from bitsmith.run.free_model import FreeModel, plain
from bitsmith.run.layerwise import LayerFacts, LayerOptions, Layerwise, streamed_kld
from bitsmith.run.student import Student
from bitsmith.store import GgufCheckpoint, TensorInfo, write_gguf
from bitsmith.store.checkpoint import Bytes
from bitsmith.store.journal import Journal, Key, content_key

Tokens = NDArray[np.int64]

_SELECTION_TOKENS = 8192
_RATE = 4e-3  # of block scales whose codes lie one root mean square weight apart, as in Q2_K
_RATE_POWER = 1.6  # a tenth of that at 4 bits
_CODE_RATE = 7e-3  # gaps between levels; three times as much diverges at first in Q2_K
_CODE_RATE_POWER = 0.6
_WEIGHT_BYTES = {False: 24, True: 36}  # both models, gradients and moments of a weight, by `codes`
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class TuneOptions:
    """How long and how boldly `tune` walks.

    `batch_tokens` are scored in a step, in windows of `window_tokens`; `learning_rate` is the relative change
    of block scales per Adam step at the peak of a cosine, None: chosen from the measured error of the codes.
    F32 values move at half of it, codes at `code_rate` gaps between levels (None: likewise chosen). With
    `noise`, every window comes a second time with that share of its tokens replaced at random: the original
    labels any text.

    `layerwise` fits one layer at a time to the original's output of that layer, each for `steps`: the memory
    is one layer's. Gradients through the whole model find more. None: only where those do not fit.
    """

    codes: bool = True
    steps: int = 160
    batch_tokens: int = 2048
    window_tokens: int = 256
    learning_rate: float | None = None
    code_rate: float | None = None
    noise: float = 0.0
    seed: int = 0
    layerwise: bool | None = None


@dataclass(frozen=True)
class TuneRecord:
    """What one tuning did; KLD is KL(original‖file) in nats per token over `held_tokens` held-out tokens.

    They are also what the best step was chosen on. `kept` is whether the tuned file was better there;
    otherwise `out` holds the candidate's bytes. `log` has a row per look at a part of the held-out tokens.
    Layer by layer, `steps` and `best_step` are sums over layers, `learning_rate` is the mean, and rows of
    `log` and `layers` hold relative squared errors of layers' outputs on all of the held-out tokens.
    """

    out: Path
    kept: bool
    steps: int
    best_step: int
    held_kld_before_nats: float
    held_kld_after_nats: float
    held_tokens: int
    fit_tokens: int
    learning_rate: float
    free_parameters: int
    estimated_seconds: float
    seconds: float
    options: TuneOptions
    log: tuple[dict[str, Any], ...]
    layers: tuple[dict[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain values."""
        return {"kind": "tune", "bitsmith": __version__, **asdict(self), "out": str(self.out)}


def tune(
    model: Path,
    candidate: Path,
    out: Path,
    fit: Tokens,
    held: Tokens,
    options: TuneOptions = TuneOptions(),
    *,
    applied: Sequence[Applied] = (),
    overwrite: bool = False,
    progress: Progress = silent,
    say_cost: Callable[[float], None] = lambda _: None,
) -> TuneRecord:
    """Write `candidate` (a GGUF of `model`) to `out` with the same types and bytes and a lower divergence.

    Minimises KL(model‖candidate), mean over the positions of `fit` (`chunks ctx`), by Adam with gradients
    through the whole model in float32; stops at the state that is best on `held` (`chunks ctx`). Holds both
    models, gradients and moments in memory: about 24 bytes per weight, 36 with codes; a model for which the
    machine is too small is tuned layer by layer (`options.layerwise`). The result is a function of the
    inputs, the options and the number of threads. `applied` are the transforms that made `candidate`. A state
    file `.OUT.tuning` (layer by layer the folder `.OUT.layers`) lets a killed run go on; a lock beside it
    keeps a second run out. `say_cost` is told after two steps how many seconds all of them will take.

    Raises BitsmithError where the two are not the same model, OutputError as `write_gguf` does.
    """
    started = time.monotonic()
    _check_output(out, candidate, overwrite)
    with open_model(model, applied) as teacher, open_model(candidate) as student:
        whole = _fits(student, options)
        options = replace(options, layerwise=not whole)
        _check_inputs(teacher, student, fit, held, options)
        key = _key(teacher, student, fit, held, options)
        lock = out.with_name(f".{out.name}.tuning.lock")
        with Journal(lock, key, overwrite=overwrite) as journal:
            task = _Task(
                teacher, student, fit, held, options, out, overwrite, key, journal, progress, say_cost
            )
            try:
                with quiet_transformers():
                    record = _whole(task) if whole else _by_layer(task)
            except BitsmithError:
                if not journal.entries:
                    shutil.rmtree(_layers(out), ignore_errors=True)
                    journal.remove()
                raise
            journal.remove()
    return replace(record, seconds=time.monotonic() - started)


@dataclass(frozen=True)
class _Task:
    """What one tuning is given."""

    teacher: TextModel
    student: TextModel
    fit: Tokens
    held: Tokens
    options: TuneOptions
    out: Path
    overwrite: bool
    key: Key
    journal: Journal
    progress: Progress
    say_cost: Callable[[float], None]

    @property
    def windows(self) -> Tokens:
        """The fit tokens as windows, the noisy ones behind the others."""
        size, noise = self.options.window_tokens, self.options.noise
        windows = self.fit[:, : self.fit.shape[1] // size * size].reshape(-1, size)
        return np.concatenate([windows, noisy(windows, noise, self.options.seed)]) if noise else windows

    @property
    def batch_windows(self) -> int:
        """Windows of a step."""
        return max(1, self.options.batch_tokens // self.options.window_tokens)

    def write(self, target: Path, packed: Mapping[str, Bytes], *, overwrite: bool) -> None:
        """Write the candidate with the tensors `packed` (by GGUF name) in place of its own."""
        stored, _ = _gguf(self.student)
        write_gguf(
            target,
            stored.typed_metadata(),
            [TensorInfo(name, ref.shape, ref.dtype) for name, ref in stored.items()],
            lambda info: [packed[info.name] if info.name in packed else stored[info.name].raw()],
            overwrite=overwrite,
            sources=[*stored.files, *self.teacher.source.files],
        )


def _whole(task: _Task) -> TuneRecord:
    """Tune by gradients through the whole model."""
    run = _Run(task)
    state = task.out.with_name(f".{task.out.name}.tuning")
    run.descend(state, task.key, task.progress, task.say_cost)
    task.write(task.out, run.packed(), overwrite=task.overwrite)
    state.unlink(missing_ok=True)
    return run.record(task.out)


def _by_layer(task: _Task) -> TuneRecord:
    """Tune layer by layer, measure the file that makes, and keep it if it is better."""
    folder = _layers(task.out)
    folder.mkdir(exist_ok=True)
    walk = Layerwise(
        (task.teacher, task.student),
        _gguf(task.student),
        (task.windows, task.held),
        LayerOptions(
            task.options.codes,
            task.options.seed,
            task.batch_windows,
            lambda free: Schedule(task.options.steps, _rates(free, task.options)),
        ),
        folder,
        (task.journal, task.key),
    )
    found = walk.run(task.progress, task.say_cost)
    tuned = folder / "tuned.gguf"
    task.write(tuned, walk.packed(), overwrite=True)
    with open_model(tuned) as changed:
        before, after = streamed_kld(task.teacher, [task.student, changed], task.held)
    if after < before:
        _check_output(task.out, task.student.source.path, task.overwrite)
        tuned.replace(task.out)
    else:
        task.write(task.out, {}, overwrite=task.overwrite)
    shutil.rmtree(folder, ignore_errors=True)
    return _layer_record(task, found, walk.estimated_seconds, before, after)


def _layers(out: Path) -> Path:
    return out.with_name(f".{out.name}.layers")


def _layer_record(
    task: _Task, found: list[LayerFacts], estimated_seconds: float, before: float, after: float
) -> TuneRecord:
    kept = after < before
    return TuneRecord(
        out=task.out,
        kept=kept,
        steps=task.options.steps * len(found),
        best_step=sum(one.best_step for one in found) if kept else 0,
        held_kld_before_nats=before,
        held_kld_after_nats=min(before, after),
        held_tokens=task.held[:, task.held.shape[1] // 2 + 1 :].size,
        fit_tokens=task.windows.size,
        learning_rate=float(np.mean([one.learning_rate for one in found])),
        free_parameters=sum(one.free_parameters for one in found),
        estimated_seconds=estimated_seconds,
        seconds=0.0,
        options=task.options,
        log=tuple(row for one in found for row in one.log),
        layers=tuple({name: value for name, value in vars(one).items() if name != "log"} for one in found),
    )


def _fits(student: TextModel, options: TuneOptions) -> bool:
    """Tell whether to tune the whole model at once: as asked for, else if it fits in the machine's memory."""
    if options.layerwise is not None:
        return not options.layerwise
    weights = sum(ref.size for ref in student.checkpoint.values())
    return weights * _WEIGHT_BYTES[options.codes] <= memory_bytes()


def memory_bytes() -> int:
    """Return the memory of this machine, or the control group's limit where that is lower.

    Not what is free at the moment: the result of a tuning must not depend on that.
    """
    found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):
        found = min(found, int(_CGROUP_LIMIT.read_text("utf-8")))
    return found


def _gguf(model: TextModel) -> tuple[GgufCheckpoint, ImportedView]:
    if not isinstance(model.source, GgufCheckpoint) or not isinstance(model.checkpoint, ImportedView):
        raise UnsupportedError("is no GGUF; tuning changes one in place", path=model.checkpoint.path)
    return model.source, model.checkpoint


def _rates(free: FreeModel, options: TuneOptions) -> dict[str, float]:
    """Return the peak step of each kind of parameter, from the options or the measured error of the codes."""
    coarseness = free.coarseness()
    rate = options.learning_rate or _RATE * coarseness**_RATE_POWER
    code_rate = options.code_rate or _CODE_RATE * coarseness**_CODE_RATE_POWER
    return {"scale": rate, "min": rate, "value": rate / 2, "code": code_rate}


class _Run:
    """One tuning: the candidate made free, the lessons, and what came of it."""

    def __init__(self, task: _Task) -> None:
        teacher, student, held, options = task.teacher, task.student, task.held, task.options
        self.options = options
        self.free = FreeModel(*_gguf(student), teacher, codes=options.codes)
        windows = task.windows
        self.fit_tokens = windows.size
        lessons = (
            Lesson(teacher, windows, 0, task.progress),
            Lesson(teacher, held, held.shape[1] // 2, task.progress),
        )
        chosen = max(1, _SELECTION_TOKENS // held.shape[1])
        self.task = Distillation(
            Student(student.arch),
            plain(teacher.head),
            self.free.weights,
            lessons,
            task.batch_windows,
            np.arange(len(held))[:: max(1, -(-len(held) // chosen))],
            options.seed,
        )
        self.rates = _rates(self.free, options)
        self.before = float(self.task.held_klds(self.free.decoded()).mean())
        self.after, self.kept = self.before, False
        self.facts = Facts()

    def descend(self, state: Path, key: Key, progress: Progress, say_cost: Callable[[float], None]) -> None:
        """Walk, then measure what the packed blocks decode to on all held-out text."""
        schedule = Schedule(self.options.steps, self.rates)
        self.facts = Descent(self.task, self.free.parameters, schedule, state, key).run(progress, say_cost)
        self.after = float(self.task.held_klds(self.free.decoded()).mean())
        self.kept = self.facts.best_step > 0 and self.after < self.before

    def packed(self) -> dict[str, Any]:
        """Return the changed tensors' bytes; none where the candidate was better."""
        return self.free.packed() if self.kept else {}

    def record(self, out: Path) -> TuneRecord:
        """Return what happened."""
        facts = self.facts
        return TuneRecord(
            out=out,
            kept=self.kept,
            steps=facts.step,
            best_step=facts.best_step if self.kept else 0,
            held_kld_before_nats=self.before,
            held_kld_after_nats=self.after if self.kept else self.before,
            held_tokens=self.task.held_tokens,
            fit_tokens=self.fit_tokens,
            learning_rate=self.rates["scale"] * facts.damping,
            free_parameters=sum(leaf.numel() for leaf in self.free.parameters.values()),
            estimated_seconds=facts.estimated_seconds,
            seconds=0.0,
            options=self.options,
            log=tuple(facts.log),
        )


def _check_output(out: Path, candidate: Path, overwrite: bool) -> None:
    """Refuse before the minutes are spent what `write_gguf` would refuse after them."""
    if not out.parent.is_dir():
        raise OutputError("is not in a folder that exists", path=out)
    if out.exists() and candidate.exists() and out.samefile(candidate):
        raise OutputError("is the input; choose another output", path=out)
    if out.exists() and not overwrite:
        raise OutputError("exists; pass --overwrite", path=out)


def _check_inputs(
    teacher: TextModel, student: TextModel, fit: Tokens, held: Tokens, options: TuneOptions
) -> None:
    _gguf(student)
    check_heads(teacher, student)
    _check_tokens(fit, held, options.window_tokens, teacher.head.n_rows)


def _check_tokens(fit: Tokens, held: Tokens, window_tokens: int, vocab: int) -> None:
    if fit.ndim != 2 or len(fit) == 0 or fit.shape[1] < window_tokens:
        raise BitsmithError(f"fit tokens are {fit.shape}, less than a window of {window_tokens}")
    if held.ndim != 2 or len(held) == 0 or held.shape[1] < MIN_CTX_TOKENS:
        raise BitsmithError(f"held-out tokens are {held.shape}: no chunk to choose the best step on")
    if max(fit.max(), held.max()) >= vocab or min(fit.min(), held.min()) < 0:
        raise BitsmithError(f"a token is outside the vocabulary of {vocab}")


def _key(teacher: TextModel, student: TextModel, fit: Tokens, held: Tokens, options: TuneOptions) -> Key:
    """Return all that the result depends on."""
    tokens = [hashlib.sha256(np.ascontiguousarray(part).tobytes()).hexdigest() for part in (fit, held)]
    return content_key(
        teacher.source,
        {
            "torch version": torch.__version__,
            "threads": torch.get_num_threads(),
            "candidate": student.source.source_digest,
            "tokens": [*tokens, fit.shape, held.shape],
            **asdict(options),
        },
    )
