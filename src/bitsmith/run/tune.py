"""Tune what costs no bytes in a GGUF by KL to the original: block scales and mins, F32 tensors, codes."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bitsmith import __version__
from bitsmith.archs.export import ImportedView
from bitsmith.errors import BitsmithError, OutputError, UnsupportedError
from bitsmith.progress import Progress, silent
from bitsmith.run.descent import Descent, Facts, Schedule
from bitsmith.run.distill import Distillation, Lesson, noisy
from bitsmith.run.evaluate import MIN_CTX_TOKENS, open_model
from bitsmith.run.forward import TextModel, _quiet_transformers, check_heads
from bitsmith.run.free_model import FreeModel, plain
from bitsmith.run.student import Student
from bitsmith.store import GgufCheckpoint, TensorInfo, write_gguf

Tokens = NDArray[np.int64]

_SELECTION_TOKENS = 8192
_RATE = 4e-3  # of block scales whose codes lie one root mean square weight apart, as in Q2_K
_RATE_POWER = 1.6  # a tenth of that at 4 bits
_CODE_RATE = 7e-3  # gaps between levels; three times as much diverges at first in Q2_K
_CODE_RATE_POWER = 0.6


@dataclass(frozen=True)
class TuneOptions:
    """How long and how boldly `tune` walks.

    `batch_tokens` are scored in a step, in windows of `window_tokens`; `learning_rate` is the relative change
    of block scales per Adam step at the peak of a cosine, None: chosen from the measured error of the codes.
    F32 values move at half of it, codes at `code_rate` gaps between levels (None: likewise chosen). With
    `noise`, every window comes a second time with that share of its tokens replaced at random: the original
    labels any text.
    """

    codes: bool = True
    steps: int = 160
    batch_tokens: int = 2048
    window_tokens: int = 256
    learning_rate: float | None = None
    code_rate: float | None = None
    noise: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class TuneRecord:
    """What one tuning did; KLD is KL(original‖file) in nats per token over `held_tokens` held-out tokens.

    They are also what the best step was chosen on. `kept` is whether the tuned file was better there;
    otherwise `out` holds the candidate's bytes. `log` has a row per look at a part of the held-out tokens.
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
    overwrite: bool = False,
    progress: Progress = silent,
    say_cost: Callable[[float], None] = lambda _: None,
) -> TuneRecord:
    """Write `candidate` (a GGUF of `model`) to `out` with the same types and bytes and a lower divergence.

    Minimises KL(model‖candidate), mean over the positions of `fit` (`chunks ctx`), by Adam with gradients
    through the whole model in float32; stops at the state that is best on `held` (`chunks ctx`). Holds both
    models, gradients and moments in memory: about 24 bytes per weight, 36 with codes. The result is a
    function of the inputs, the options and the number of threads. A state file `.OUT.tuning` lets a killed
    run go on. `say_cost` is told after two steps how many seconds all of them will take.

    Raises BitsmithError where the two are not the same model, OutputError as `write_gguf` does.
    """
    started = time.monotonic()
    _check_output(out, candidate, overwrite)
    with open_model(model) as teacher, open_model(candidate) as student:
        run = _Run(teacher, student, fit, held, options, progress)
        state = out.with_name(f".{out.name}.tuning")
        with _quiet_transformers():
            run.descend(state, progress, say_cost)
        packed = run.packed()
        stored = run.stored
        write_gguf(
            out,
            stored.typed_metadata(),
            [TensorInfo(name, ref.shape, ref.dtype) for name, ref in stored.items()],
            lambda info: [packed[info.name] if info.name in packed else stored[info.name].raw()],
            overwrite=overwrite,
            sources=[candidate, *teacher.source.files],
        )
        state.unlink(missing_ok=True)
        return run.record(out, time.monotonic() - started)


class _Run:
    """One tuning: the candidate made free, the lessons, and what came of it."""

    def __init__(
        self,
        teacher: TextModel,
        student: TextModel,
        fit: Tokens,
        held: Tokens,
        options: TuneOptions,
        progress: Progress,
    ) -> None:
        if not isinstance(student.source, GgufCheckpoint) or not isinstance(student.checkpoint, ImportedView):
            raise UnsupportedError("is no GGUF; tuning changes one in place", path=student.checkpoint.path)
        check_heads(teacher, student)
        _check_tokens(fit, held, options.window_tokens, teacher.head.n_rows)
        self.stored, self.options = student.source, options
        self.free = FreeModel(student.source, student.checkpoint, teacher, codes=options.codes)
        windows = fit[:, : fit.shape[1] // options.window_tokens * options.window_tokens]
        windows = windows.reshape(-1, options.window_tokens)
        if options.noise:
            windows = np.concatenate([windows, noisy(windows, options.noise, options.seed)])
        self.fit_tokens = windows.size
        lessons = (Lesson(teacher, windows, 0, progress), Lesson(teacher, held, held.shape[1] // 2, progress))
        chosen = max(1, _SELECTION_TOKENS // held.shape[1])
        self.task = Distillation(
            Student(student.arch),
            plain(teacher.head),
            self.free.weights,
            lessons,
            max(1, options.batch_tokens // options.window_tokens),
            np.arange(len(held))[:: max(1, -(-len(held) // chosen))],
            options.seed,
        )
        coarseness = self.free.coarseness()
        self.rate = options.learning_rate or _RATE * coarseness**_RATE_POWER
        self.code_rate = options.code_rate or _CODE_RATE * coarseness**_CODE_RATE_POWER
        self._key = _key(teacher, student, fit, held, options)
        self.before = float(self.task.held_klds(self.free.decoded()).mean())
        self.after, self.kept = self.before, False
        self.facts = Facts()

    def descend(self, state: Path, progress: Progress, say_cost: Callable[[float], None]) -> None:
        """Walk, then measure what the packed blocks decode to on all held-out text."""
        rates = {
            "scale": self.rate,
            "min": self.rate,
            "value": self.rate / 2,
            "code": self.code_rate,
        }
        schedule = Schedule(self.options.steps, rates)
        descent = Descent(self.task, self.free.parameters, schedule, state, self._key)
        self.facts = descent.run(progress, say_cost)
        self.after = float(self.task.held_klds(self.free.decoded()).mean())
        self.kept = self.facts.best_step > 0 and self.after < self.before

    def packed(self) -> dict[str, Any]:
        """Return the changed tensors' bytes; none where the candidate was better."""
        return self.free.packed() if self.kept else {}

    def record(self, out: Path, seconds: float) -> TuneRecord:
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
            learning_rate=self.rate * facts.damping,
            free_parameters=sum(leaf.numel() for leaf in self.free.parameters.values()),
            estimated_seconds=facts.estimated_seconds,
            seconds=seconds,
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


def _check_tokens(fit: Tokens, held: Tokens, window_tokens: int, vocab: int) -> None:
    if fit.ndim != 2 or len(fit) == 0 or fit.shape[1] < window_tokens:
        raise BitsmithError(f"fit tokens are {fit.shape}, less than a window of {window_tokens}")
    if held.ndim != 2 or len(held) == 0 or held.shape[1] < MIN_CTX_TOKENS:
        raise BitsmithError(f"held-out tokens are {held.shape}: no chunk to choose the best step on")
    if max(fit.max(), held.max()) >= vocab or min(fit.min(), held.min()) < 0:
        raise BitsmithError(f"a token is outside the vocabulary of {vocab}")


def _key(teacher: TextModel, student: TextModel, fit: Tokens, held: Tokens, options: TuneOptions) -> str:
    """Return a digest of all that the result depends on."""
    facts = [
        __version__,
        torch.__version__,
        torch.get_num_threads(),
        teacher.source.source_digest,
        student.source.source_digest,
        *(hashlib.sha256(np.ascontiguousarray(part).tobytes()).hexdigest() for part in (fit, held)),
        [fit.shape, held.shape],
        asdict(options),
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
