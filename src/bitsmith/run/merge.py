"""Merge a big teacher into a small student without gradients; judged on held-out text before it is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bitsmith import __version__
from bitsmith.errors import BitsmithError, OutputError
from bitsmith.numerics.threads import one_blas_thread
from bitsmith.passes.merge_fold import MergedView
from bitsmith.passes.transform import Model
from bitsmith.progress import Progress, silent
from bitsmith.run.compress import Written, compress, output_of
from bitsmith.run.compress import plan as plan_packed
from bitsmith.run.execute import peak_memory_bytes
from bitsmith.run.job import Job
from bitsmith.run.merge_diagnostics import merge_diagnostics
from bitsmith.run.merge_inputs import MergeAsk, MergeInputs, open_inputs
from bitsmith.run.merge_output import copy_student, recorder, write_merged
from bitsmith.run.merge_plan import MergePlan, merge_plan
from bitsmith.run.merge_recipe import MergeRecipe
from bitsmith.run.merge_trial import HeldOut, TrialMeasure, figure, held_out
from bitsmith.run.merge_weights import FACTORS, Bench, Decision, decide
from bitsmith.run.merge_written import PACKED_AS
from bitsmith.run.paired import paired as pair
from bitsmith.run.paired import work_of
from bitsmith.run.paired_cost import PairedCost, cost_of
from bitsmith.run.paired_inputs import LayerMap, Sides
from bitsmith.run.record import source_facts
from bitsmith.run.workplace import Workplace, beside, digest, refuse_output
from bitsmith.store.atomic import refuse_taken
from bitsmith.store.hub import local
from bitsmith.store.journal import remove_work, write_result
from bitsmith.store.paired import Paired, open_paired
from bitsmith.store.safetensors_writer import SHARD_BYTES
from bitsmith.store.stored import FLOATS

RESULT_NAME = "merge.json"
PAIRED_NAME = "paired"
MODEL_NAME = "model"
WORK_SUFFIX = ".merge"

_MADE = "merged"
_BEGUN, _DIAGNOSED, _WRITTEN, _PACKING = "begun", "diagnosed", "written", "packing"


@dataclass(frozen=True)
class MergeCost:
    """What a merge takes: pairing (None where that is done), and measuring on `held_tokens` held-out tokens.

    The teacher runs over all of them once, the student once, and merges of the student `trials` times at most
    over half of them. `plan_multiply_adds` are those of finding the maps, `fold_multiply_adds` of folding
    every layer and the vocabulary's tables, which each merge tried and the one that is written take.
    `written_bytes` are those of the student's weights.
    """

    paired: PairedCost | None
    held_tokens: int
    trials: int
    trial_multiply_adds: int
    plan_multiply_adds: int
    fold_multiply_adds: int
    written_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return the cost as plain values."""
        found = None if self.paired is None else self.paired.to_json()
        return {"kind": "merge_cost", "bitsmith": __version__, **asdict(self), "paired": found}


@dataclass(frozen=True)
class MergeResult:
    """A merge as it was done: where it lies, and the content of `merge.json`.

    `packed` is what was made of it where a type was asked for; `resumed` steps were a killed run's.
    """

    out: Path
    folder: Path
    record: dict[str, Any]
    packed: Written | None = None
    resumed: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the record."""
        return self.record


@one_blas_thread()
def merge(
    teacher: Path,
    student: Path,
    text: Path,
    out: Path,
    *,
    recipe: MergeRecipe | None = None,
    held: Path | None = None,
    tokens: int | None = None,
    ctx_tokens: int = 512,
    chunks: int | None = None,
    samples: int = 2048,
    layer_map: LayerMap = "cka",
    paired: Path | None = None,
    blend: Sequence[tuple[Path, float]] = (),
    sweep_budget: int | None = None,
    fallback: bool = True,
    seed: int = 0,
    type_name: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    command: str = "",
    overwrite: bool = False,
    progress: Progress = silent,
    say_cost: Callable[[MergeCost], None] | None = None,
) -> MergeResult:
    """Merge `teacher` into `student` by `recipe` and write the student's checkpoint to the folder `out`.

    Both run over `tokens` tokens of the UTF-8 `text` (None: all) in chunks of `ctx_tokens`, `samples` of
    which stay out of the moments (`paired.paired`); `paired` activations that are there are taken instead,
    those in `blend` with them, each by its share. The shares of the teacher are the recipe's, moved by
    `sweep_budget` trials if any, and judged on `held`, a text of the same task (None: the last part of
    `text`), `chunks` of it at most. With `fallback` the merge is kept only where it is not worse than the
    student there (`merge_weights`), else the student is written as it is, byte for byte.

    `OUT.merge` beside it gets `merge.json`, the paired activations, and the parts of the text that were cut.
    A killed run goes on from there. MTP layers are left out of a merge, as nothing of the teacher's fits
    them; packed weights of the student become BF16. With `type_name` the merge lies in `OUT.merge/model`, and
    `out` is what `compress` makes of it. `say_cost` is told the cost before the first forward.

    Raises BitsmithError as `open_inputs`, `merge_plan` and `compress` do; OutputError if `out` exists (unless
    `overwrite`), is an input, or is being written by another run.
    """
    ask = MergeAsk(
        teacher=local(teacher, progress),
        student=local(student, progress),
        text=text,
        recipe=recipe or MergeRecipe(),
        held=held,
        tokens=tokens,
        ctx_tokens=ctx_tokens,
        chunks=chunks,
        samples=samples,
        layer_map=layer_map,
        paired=paired,
        blend=tuple(blend),
        sweep_budget=sweep_budget,
        fallback=fallback,
        seed=seed,
    )
    place = _Place(out, type_name, shard_bytes, overwrite, command)
    with open_inputs(ask) as inputs:
        return _Merge(inputs, place, progress, say_cost).run()


def merge_cost(ask: MergeAsk) -> MergeCost:
    """Return what a merge takes, from one layer of each kind that is run; raises as `merge` does."""
    with open_inputs(ask) as inputs:
        return _cost(inputs, measure=True)


@dataclass(frozen=True)
class _Place:
    """Where a merge goes, and as what."""

    out: Path
    type_name: str | None
    shard_bytes: int
    overwrite: bool
    command: str

    @property
    def work(self) -> Path:
        """The folder beside the output."""
        return beside(self.out, WORK_SUFFIX)

    @property
    def model(self) -> Path:
        """Where the checkpoint goes."""
        return self.out if self.type_name is None else self.work / MODEL_NAME

    @property
    def job(self) -> Job:
        """What becomes of the checkpoint."""
        return Job(model=self.model, out=self.out, type_name=self.type_name, overwrite=self.overwrite)


class _Merge:
    """One run; what is finished is in the journal of its folder."""

    def __init__(
        self,
        inputs: MergeInputs,
        place: _Place,
        progress: Progress,
        say_cost: Callable[[MergeCost], None] | None,
    ) -> None:
        self._inputs, self._ask, self._at = inputs, inputs.ask, place
        self._progress, self._say_cost = progress, say_cost
        self._began = time.monotonic()

    def run(self) -> MergeResult:
        """Do what is not done yet."""
        at, sources = self._at, self._inputs.sources
        if at.type_name is not None:
            self._refuse_packed()
        own = [file for file in sources if file not in self._ask.given and file != self._ask.held]
        if at.work.exists() and any(file.parent.samefile(at.work) for file in own):
            raise OutputError("holds an input, and the run works there: choose another output", path=at.work)
        refuse_output(at.out, at.model, at.work / RESULT_NAME, at.overwrite, sources, (_MADE, PAIRED_NAME))
        key = {**self._inputs.key, "type": at.type_name, "bytes of a shard": at.shard_bytes}
        with Workplace(
            at.model, at.work, key, at.overwrite, sources, result=RESULT_NAME, made=_MADE
        ) as place:
            resumed = len(place.journal.entries)
            written = place.journal.entries.get(_WRITTEN)
            if written is None or not place.has(_MADE, written["sha256"]):
                written = self._written(place)
            place.result.unlink(missing_ok=True)  # an earlier run's tells of another model
            place.place(written["sha256"])
            write_result(place.result, record := written["record"])
            packed = None if at.type_name is None else self._packed(place)
            place.journal.remove()
        return MergeResult(at.out, at.work, record, packed, resumed)

    def _written(self, place: Workplace) -> dict[str, Any]:
        """Make the checkpoint; return its record and digest."""
        inputs, ask = self._inputs, self._ask
        texts = inputs.texts.placed(place.folder)
        if _BEGUN not in place.journal.entries:
            place.journal.add(_BEGUN, None)
        found = self._paired(place, texts[0])
        others = [(open_paired(path), share) for path, share in ask.blend]
        plan = merge_plan(found, inputs.teacher, inputs.student, ask.recipe, others)
        trial = held_out(
            inputs.sides.student.model,
            inputs.sides.teacher.model,
            texts[1],
            ctx_tokens=ask.ctx_tokens,
            chunks=ask.chunks,
            seed=ask.seed,
            progress=self._progress,
            kept=place.journal,
        )
        decision = self._decided(trial, plan, place)
        measures = _measures(trial, decision)
        diagnostics = place.journal.entries.get(_DIAGNOSED)
        if diagnostics is None:
            diagnostics = merge_diagnostics(plan, progress=self._progress).to_json()
            place.journal.add(_DIAGNOSED, diagnostics)
        written = self._write(plan, decision, place)
        record = self._record(plan, decision, texts) | {
            "measures": measures,
            "diagnostics": diagnostics,
            "written": written,
        }
        record |= {"seconds": time.monotonic() - self._began, "peak_memory_bytes": peak_memory_bytes()}
        entry = {"record": record, "sha256": digest(place.folder / _MADE)}
        place.journal.add(_WRITTEN, entry)
        return entry

    def _paired(self, place: Workplace, text: Path) -> Paired:
        """Return the paired activations: those that are given, an earlier run's, or made now."""
        inputs, ask, folder = self._inputs, self._ask, place.folder / PAIRED_NAME
        if ask.paired is not None:
            self._say(None)
            return open_paired(ask.paired)
        with suppress(BitsmithError):  # none, or a damaged one
            if inputs.fits(found := open_paired(folder)):
                remove_work(work_of(folder))  # of a run that was killed while it tidied up
                self._say(None)
                return found
        return self._run_pair(place, text, folder)

    def _run_pair(self, place: Workplace, text: Path, folder: Path) -> Paired:
        """Pair both models; where they cannot be paired, nothing is left."""
        try:
            return self._pair(text, folder)
        except OutputError:
            raise
        except BitsmithError:
            place.abandon()
            raise

    def _pair(self, text: Path, folder: Path) -> Paired:
        ask = self._ask
        return pair(
            ask.teacher,
            ask.student,
            text,
            folder,
            tokens=ask.tokens,
            ctx_tokens=ask.ctx_tokens,
            layer_map=ask.layer_map,
            samples=ask.samples,
            widest_square=self._inputs.widest_square,
            sparse=not ask.recipe.activations,
            overwrite=True,
            progress=self._progress,
            say_cost=None if self._say_cost is None else self._say,
        )

    def _say(self, cost: PairedCost | None) -> None:
        if self._say_cost is not None:
            self._say_cost(replace(_cost(self._inputs, measure=False), paired=cost))

    def _decided(self, trial: HeldOut, plan: MergePlan, place: Workplace) -> Decision:
        bench = Bench(trial, plan.view, place.journal)
        held = self._inputs.held
        return decide(
            bench,
            plan.alphas,
            factors=FACTORS if self._is_ruled else (1.0,),
            apart=self._is_ruled,
            sweep_budget=self._ask.sweep_budget,
            ends=plan.recipe.ends,
            fallback=self._ask.fallback,
            repeated=max(held.shared, held.repeated),
        )

    @property
    def _is_ruled(self) -> bool:
        return not isinstance(self._ask.recipe.alpha, int | float)

    def _write(self, plan: MergePlan, decision: Decision, place: Workplace) -> dict[str, Any]:
        folder, source = place.folder / _MADE, self._inputs.student.checkpoint
        alphas = decision.alphas.to_json()
        models = {"model": source, "teacher": self._inputs.teacher.checkpoint}
        finish = recorder(
            source,
            folder,
            {part: source_facts(model, folder) for part, model in models.items()},
            {
                "recipe": self._ask.recipe.to_json(),
                "alphas": alphas,
                "texts_sha256": list(self._inputs.texts.sha256),
                "paired_sha256": plan.paired.digest,
            },
        )
        if decision.alphas.is_zero:
            return copy_student(source, folder, finish=finish, progress=self._progress) | {"notes": []}
        view = plan.view(decision.alphas)
        notes = _notes(self._inputs.student, view)
        return {"notes": notes} | write_merged(
            view,
            folder,
            {**self._inputs.key, "alphas": alphas, "paired": plan.paired.digest},
            shard_bytes=self._at.shard_bytes,
            finish=finish,
            progress=self._progress,
        )

    def _record(self, plan: MergePlan, decision: Decision, texts: tuple[Path, Path]) -> dict[str, Any]:
        ask, held = self._ask, self._inputs.held
        manifest = plan.paired.manifest
        return {
            "kind": "merge",
            "bitsmith": __version__,
            "teacher": str(ask.teacher),
            "student": str(ask.student),
            "recipe": ask.recipe.to_json() | {"sweep_budget": ask.sweep_budget, "fallback": ask.fallback},
            "paired": {
                "path": str(plan.paired.path),
                "sha256": plan.paired.digest,
                "text": manifest.text,
                "text_sha256": manifest.text_sha256,
                "ctx_tokens": manifest.ctx_tokens,
                "chunks": manifest.chunks,
                "held_chunks": len(manifest.held_chunks),
                "fit_tokens": manifest.fit_tokens,
                "mapped_by": manifest.mapped_by,
            },
            "layer_map": list(plan.layer_map),
            "protocol": asdict(held.protocol)
            | {"text": str(texts[1]), "shared": held.shared, "repeated": held.repeated},
            "alphas": decision.alphas.to_json(),
            "decision": decision.to_json(),
            "plan": plan.to_json(),
            "type": self._at.type_name,
            "command": self._at.command,
        }

    def _refuse_packed(self) -> None:
        """Refuse a packed output that cannot be, before anything is run."""
        output, own = output_of(self._at.job), self._inputs.student.checkpoint
        if all(ref.dtype in FLOATS for ref in own.values()):
            plan_packed(replace(self._at.job, model=self._ask.student))
        if not (self._at.work / RESULT_NAME).exists():
            refuse_taken(
                self._at.out, self._at.overwrite, self._inputs.sources, folder=output in ("folder", "spi")
            )

    def _packed(self, place: Workplace) -> Written:
        """Compress the checkpoint that is in its place."""
        begun = _PACKING in place.journal.entries
        if not begun:
            place.journal.add(_PACKING, None)
        job = self._at.job
        return compress(replace(job, overwrite=job.overwrite or begun), self._progress)  # its own, then


def _notes(student: Model, view: MergedView) -> list[str]:
    """Return what a merge does not keep of its student, and what it adds."""
    notes = [
        f"{name} is added, {ref.size:,} parameters: the student's head was its embedding"
        for name, ref in view.items()
        if name not in student.tensors
    ]
    dropped = sum(spec.component == "mtp" for spec, _ in student.tensors.values())
    if dropped:
        notes.append(f"{dropped} MTP tensors of the student are left out: they read states that have changed")
    packed = sum(ref.dtype not in FLOATS for _, ref in student.tensors.values())
    if packed:
        notes.append(f"{packed} packed tensors of the student are written as {PACKED_AS}")
    return notes


def _measures(trial: HeldOut, decision: Decision) -> dict[str, Any]:
    """Return figures of what is written, on all held-out chunks."""
    student, teacher = trial.student, trial.teacher
    merged = decision.whole(student)
    return {
        "ppl_student": figure(student.ppl),
        "ppl_teacher": None if teacher is None else figure(teacher.ppl),
        "ppl_merged": None if merged is None else figure(merged.ppl),
        "ppl_merged_over_student": None if merged is None else figure(merged.ppl_over_student),
        "kld_student": _kld(student),
        "kld_merged": _kld(merged),
    }


def _kld(measure: TrialMeasure | None) -> dict[str, Any] | None:
    return None if measure is None or measure.kld_to_teacher is None else figure(measure.kld_to_teacher)


def _cost(inputs: MergeInputs, *, measure: bool) -> MergeCost:
    ask, sides, held = inputs.ask, inputs.sides, inputs.held.protocol
    pairing = None
    if inputs.corpus is not None:
        chunks, ctx = inputs.corpus.tokens.shape
        pairing = cost_of(
            sides,
            chunks * ctx,
            ctx_tokens=ctx,
            samples=len(inputs.corpus.held) * ctx,
            widest_square=inputs.widest_square,
            measure=measure,
        )
    trials = 1 + (2 * len(FACTORS) if ask.fallback else 0) + (ask.sweep_budget or 0)
    tokens = held.chunks * held.ctx_tokens
    adds = [tokens * sum(side.matrix_weights) for _, side in sides.named]
    written = sum(ref.nbytes for ref in inputs.student.checkpoint.values())
    return MergeCost(
        paired=pairing,
        held_tokens=tokens,
        trials=trials,
        trial_multiply_adds=adds[0] + adds[1] + trials * adds[1] // 2,
        plan_multiply_adds=_plan_multiply_adds(sides, ask.recipe),
        fold_multiply_adds=_fold_multiply_adds(sides, ends=ask.recipe.ends),
        written_bytes=written,
    )


def _plan_multiply_adds(sides: Sides, recipe: MergeRecipe) -> int:
    """Return those of eigenvectors (about 5 n³ a model and map) and of what each place's map keeps."""
    wide, narrow = sides.teacher.hidden, sides.student.hidden
    places = sides.student.n_layers + 1
    maps = 1 if recipe.basis == "global" else 2 * places
    return maps * 5 * (wide**3 + narrow**3) + places * wide * wide * narrow


def _fold_multiply_adds(sides: Sides, *, ends: bool) -> int:
    """Return those of one merge: each weight of the student is made of as many as the teacher is wide."""
    student = sides.student
    tables = 3 if student.model.arch.tied else 2  # a tied head is found by going through the vocabulary
    vocabulary = tables * student.model.embedding.size if ends else 0
    return sides.teacher.hidden * (sum(student.matrix_weights) + vocabulary)
