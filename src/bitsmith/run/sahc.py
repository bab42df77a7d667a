"""Recipe `sahc`: a published spectral hybrid plan, every row gated and replanned, beside int4 alone."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from bitsmith.archs import claim
from bitsmith.errors import printable
from bitsmith.log import event
from bitsmith.numerics.threads import one_blas_thread
from bitsmith.progress import Progress, silent
from bitsmith.run.evaluate import Reference, open_model, text_chunks
from bitsmith.run.evaluation import Protocol
from bitsmith.run.folder import KEPT as STORED_SCHEME
from bitsmith.run.folder import plan_folder, write_folder
from bitsmith.run.gate import FORWARD_COSINE, PPL, PPL_RATIO, Judged, all_pass
from bitsmith.run.guide import Guide, finite_rows
from bitsmith.run.packer import Matrix
from bitsmith.run.sahc_artifact import Gates, artifact_gates
from bitsmith.run.sahc_layer import Cosine, LayerProbe, lowest
from bitsmith.run.sahc_methods import ROUNDER, ROW_GROUP, Weights
from bitsmith.run.sahc_plan import STORED, PlanRow, int4_types, only, plan_rows, prunings
from bitsmith.run.sahc_result import compared, component_rows, counted, quantizer_faults
from bitsmith.run.sahc_rows import SahcResult, SahcRow, Written
from bitsmith.run.sahc_trial import Forward, Pick, Trials, row_of
from bitsmith.run.sahc_work import (
    BASELINE_NAME,
    CANDIDATE_NAME,
    RESULT_NAME,
    Workplace,
    refuse_output,
    work_folder,
)
from bitsmith.run.workplace import digest
from bitsmith.store.checkpoint import Checkpoint
from bitsmith.store.journal import content_key, key_digest, write_result

MODEL_NAME = "model"
CTX_TOKENS = 512
PROBE_CHUNKS = 8
_WORST_SHARE = 0.25  # of the rows that are replanned at once where perplexity fails


@one_blas_thread()
def sahc(
    model: Path,
    text: Path,
    out: Path,
    *,
    work: Path | None = None,
    statistics: Path | None = None,
    probe: Path | None = None,
    ctx_tokens: int = CTX_TOKENS,
    chunks: int | None = None,
    probe_chunks: int = PROBE_CHUNKS,
    ppl_limit: float | None = None,
    ppl_ratio_limit: float = PPL_RATIO.limit,
    cosine_limit: float = FORWARD_COSINE.limit,
    keep_int4: bool = False,
    audit: Path | None = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress = silent,
) -> SahcResult:
    """Compress `model` (a Hugging Face folder) by the recipe into the model folder `out`, measured on `text`.

    Every tensor starts with its component's planned method (`run.sahc_plan.COMPONENTS`) and takes the next of
    its chain when a gate does not pass: truncation, rounding, total error, error over theory, bytes over
    plan, not dominated by row-int4, and the cosine of what its layer adds to hidden states of `probe`
    (default: the text itself; its first `probe_chunks` chunks), alone and with its whole layer. The artifact
    is then read back: shapes, finite values, layers, perplexity; where that fails, the rows with the lowest
    cosines are replanned and it is written again. Row-int4 alone is written and measured the same way.
    `ppl_limit` is 100 by default, or none where the original itself is not below that: then the ratio judges.
    With `statistics` low rank and integers are found in the metric of the inputs, in the plan and in row-int4
    alone; gates stay as they are, on the weights.

    `out` and its `OUT.sha256` appear when every gate has passed. The folder `work` (default: `OUT.sahc`
    beside it, on its file system) gets `sahc.json`, `audit.jsonl` (or the file `audit`), and `int4/` with
    `keep_int4`. A killed run goes on behind the last finished part, and ends with the same bytes. Where the
    artifact's gates do not pass nothing becomes `out`, and there is no ratio.

    Raises BitsmithError as `evaluate` and `write_folder` do, and for a `ppl_limit` that the original itself
    does not pass, UnsupportedError for a packed source, DamagedFileError for a weight that is not finite,
    OutputError where `out` or a result is there without `overwrite` or cannot be written.
    """
    started = time.monotonic()
    work = work_folder(out) if work is None else work
    plan_folder(model, STORED_SCHEME, statistics=statistics)  # refuse what cannot be written
    gates = Gates(
        replace(FORWARD_COSINE, limit=cosine_limit), ppl_limit, replace(PPL_RATIO, limit=ppl_ratio_limit)
    )
    with Reference(model, text, ctx_tokens, chunks, seed, progress) as reference:
        checkpoint = reference.model.checkpoint
        sources = [*checkpoint.files, text, *([] if statistics is None else [statistics])]
        refuse_output(out, work, overwrite, sources)
        tokens, protocol = text_chunks(reference.model, probe or text, ctx_tokens, probe_chunks, seed)
        _refuse_damaged(checkpoint, progress)
        guide = None if statistics is None else Guide(checkpoint, statistics, ROUNDER)
        key = content_key(
            checkpoint,
            {
                **asdict(reference.protocol),
                "protocol of the probe": asdict(protocol),
                "gates": asdict(gates),
                "statistics": None if guide is None else key_digest(guide.key(checkpoint, [])),
            },
        )
        with Workplace(out, work, key, overwrite, sources, audit) as place:
            resumed = len(place.journal.entries)
            place.log.add(
                "sahc",
                printable(str(model)),
                value=resumed,
                evidence="parts finished by an earlier run",
                decision="resume" if resumed else "start",
            )
            result = _Run(reference, tokens, gates, guide, statistics, place, progress).result(
                protocol, keep_int4
            )
            result = replace(result, resumed=resumed, seconds=time.monotonic() - started)
            write_result(work / RESULT_NAME, result.to_json())
            place.journal.remove()
    return result


def _refuse_damaged(checkpoint: Checkpoint, progress: Progress) -> None:
    """Raise DamagedFileError for the first weight that is not finite, before anything is measured."""
    for done, ref in enumerate(checkpoint.values()):
        progress("check weights", done, len(checkpoint))
        for start, stop in ref.slices():
            finite_rows(ref, start, stop, checkpoint.path)
    progress("check weights", len(checkpoint), len(checkpoint))


class _Run:
    """One run: parts of the plan in the forward's order, then artifacts; the journal keeps each."""

    def __init__(
        self,
        reference: Reference,
        tokens: Any,
        gates: Gates,
        guide: Guide | None,
        statistics: Path | None,
        place: Workplace,
        progress: Progress,
    ) -> None:
        self._reference, self._model = reference, reference.model
        self._checkpoint: Checkpoint = reference.model.checkpoint
        self._guide, self._statistics = guide, statistics
        self._tokens, self._place, self._journal, self._log = tokens, place, place.journal, place.log
        self._gates, self._cosine_gate = gates, gates.cosine
        self._progress = progress
        self._trials = Trials(place.log, self._cosine_gate)
        self._plan = plan_rows(claim(self._checkpoint))

    def result(self, probe: Protocol, keep_int4: bool) -> SahcResult:
        """Return what was found; the output is in its place if every gate has passed."""
        int4 = self._written(BASELINE_NAME, int4_types(self._plan), keep=keep_int4)
        if not keep_int4:
            self._place.drop(BASELINE_NAME)
        rows, rounds, written = self._passing(self._rows())
        if written.ratio is not None:
            self._place.place(written.sha256, kind="sahc")
        else:
            rows = [replace(row, ratio=None) for row in rows]
        passed, failed, unmeasured = counted(rows, written.gates)
        return SahcResult(
            model=printable(str(self._checkpoint.path)),
            statistics=None if self._statistics is None else printable(str(self._statistics)),
            original=self._reference.artifact,
            protocol=self._reference.protocol,
            probe=f"{probe.chunks} chunks of {probe.ctx_tokens} tokens, text {probe.text_sha256}",
            rows=tuple(rows),
            components=component_rows(rows),
            rounds=rounds,
            sahc=written,
            int4=int4,
            ppl_over_int4=compared(written, int4),
            bytes_over_int4=written.artifact.file_bytes / int4.artifact.file_bytes,
            quantizer=quantizer_faults(rows),
            gates_passed=passed,
            gates_failed=failed,
            gates_unmeasured=unmeasured,
            replans=sum(row.replans for row in rows),
            same_as_int4=_types(rows) == int4_types(self._plan),
        )

    def _rows(self) -> list[SahcRow]:
        """Return every row gated, in the plan's order."""
        parts = self._parts()
        waiting = [name for name, _ in parts if f"part {name}" not in self._journal.entries]
        probe = LayerProbe(self._model, self._tokens) if waiting else None
        found: dict[str, SahcRow] = {}
        for done, (name, plans) in enumerate(parts):
            self._progress("parts", done, len(parts))
            entry = f"part {name}"
            if probe is not None and entry not in self._journal.entries:
                event("part", part=name)
                self._journal.add(entry, [asdict(row) for row in self._part(probe, plans)])
            for row in TypeAdapter(list[SahcRow]).validate_python(self._journal.entries[entry]):
                found[row.name] = row
        self._progress("parts", len(parts), len(parts))
        return [found[plan.name] for plan in self._plan]

    def _parts(self) -> list[tuple[str, list[PlanRow]]]:
        """Return rows by what is judged together: embedding, layers in order, head, all the others."""
        named: dict[str, list[PlanRow]] = {}
        for plan in self._plan:
            label = f"layer {plan.layer}" if plan.place == "layer" else plan.place or "rest"
            named.setdefault(label, []).append(plan)
        tied = self._model.arch.tied
        layers = sorted((label for label in named if label.startswith("layer")), key=lambda one: int(one[6:]))
        order = [*([] if tied else ["embed"]), *layers, "embed" if tied else "head", "rest"]
        return [(label, named[label]) for label in order if label in named]

    def _part(self, probe: LayerProbe, plans: Sequence[PlanRow]) -> list[SahcRow]:
        """Gate the rows of one part, alone and together."""
        layer = plans[0].layer if plans[0].place == "layer" else None
        if layer is not None:
            probe.enter(layer)
        blocks = (
            {}
            if layer is None
            else prunings(self._checkpoint, plans, self._model.arch.text_config, self._guide)
        )
        picks: dict[str, Pick] = {}
        for plan in plans:
            weights = self._weights(plan, blocks)
            picks[plan.name] = self._trials.choose(plan, weights, self._forward(probe, plan))
        if layer is not None:
            self._together(probe, layer, picks)
        return [row_of(pick) for pick in picks.values()]

    def _together(self, probe: LayerProbe, layer: int, picks: dict[str, Pick]) -> None:
        """Replan the row with the lowest cosine alone until the layer passes as a whole."""
        while changed := {name: pick.decoded for name, pick in picks.items() if pick.decoded is not None}:
            found = probe.layer(changed)
            judged = self._cosine_gate.judge(
                found.value, low=found.low, high=found.high, evidence=found.evidence
            )
            worst = min(changed, key=lambda name: picks[name].cosine or -1.0)
            decision = "keep the layer" if judged.passed else f"replan {worst}"
            self._log.judged("sahc gate", f"layer {layer}, all rows", judged, decision)
            if judged.passed:
                return
            pick = picks[worst]
            picks[worst] = self._trials.advanced(pick, judged, self._forward(probe, pick.plan))

    def _forward(self, probe: LayerProbe, plan: PlanRow) -> Forward:
        """Return how a row's weights are judged by a forward."""

        def cosine(values: Any) -> Cosine | None:
            if plan.place == "layer":
                return probe.layer({plan.name: values})
            if plan.place == "head":
                return probe.head(values)
            if plan.place == "embed":
                found = [probe.embedding(values)]
                return lowest([*found, probe.head(values)] if self._model.arch.tied else found)
            return None

        return cosine

    def _weights(self, plan: PlanRow, blocks: Mapping[str, Any]) -> Weights:
        """Return a row's weights; those without a choice are not read."""
        if len(plan.chain) == 1:
            return Weights(np.zeros((0, 0), np.float32))
        ref, path = self._checkpoint[plan.name], self._checkpoint.path
        parts = [finite_rows(ref, start, stop, path) for start, stop in ref.slices()]
        kept, axis = blocks.get(plan.name, (None, 0))
        return Weights(np.concatenate(parts), kept, axis, Matrix(ref, path, self._guide))

    def _passing(self, rows: list[SahcRow]) -> tuple[list[SahcRow], int, Written]:
        """Write rows until the artifact passes, or nothing is left to replan."""
        rounds = 0
        while True:
            rounds += 1
            planned = sum(row.stored_bytes for row in rows)
            written = self._written(CANDIDATE_NAME, _types(rows), planned, keep=True)
            failed = [gate for gate in written.gates if gate["outcome"] != "PASS"]
            ppl = [gate for gate in failed if gate["name"] in (PPL.name, PPL_RATIO.name)]
            if failed and ppl == failed and (more := self._replanned(rows, rounds)) is not None:
                rows = more
                continue
            if failed:
                self._place.drop(CANDIDATE_NAME)
                said = ", ".join(gate["name"] for gate in failed)
                self._log.add("sahc", MODEL_NAME, evidence=said, decision="no output: no ratio is reported")
            return rows, rounds, written

    def _replanned(self, rows: list[SahcRow], rounds: int) -> list[SahcRow] | None:
        """Return the rows with those of the lowest cosines one step further; None where all are kept."""
        movable = [row for row in rows if row.method != STORED.name]
        if not movable:
            return None
        ordered = sorted(movable, key=lambda row: (_cosine_of(row), row.name))
        worst = {row.name for row in ordered[: max(1, int(_WORST_SHARE * len(ordered)))]}
        entry = f"replan {rounds}"
        if entry not in self._journal.entries:
            moved = self._moved({row.name: row for row in rows if row.name in worst})
            self._journal.add(entry, [asdict(row) for row in moved])
        found = TypeAdapter(list[SahcRow]).validate_python(self._journal.entries[entry])
        done = {row.name: row for row in found}
        return [done.get(row.name, row) for row in rows]

    def _moved(self, rows: Mapping[str, SahcRow]) -> list[SahcRow]:
        """Return rows behind their present methods, gated again, alone."""
        probe, moved = LayerProbe(self._model, self._tokens), []
        for plan in (plan for _, plans in self._parts() for plan in plans if plan.name in rows):
            if plan.place == "layer" and plan.layer is not None:
                probe.enter(plan.layer)
            row, names = rows[plan.name], [method.name for method in plan.chain]
            at = names.index(row.method) + 1
            decision = f"replan: {names[at]}"
            self._log.add("sahc plan", row.name, evidence="perplexity of the artifact", decision=decision)
            before = (*row.attempts[:-1], replace(row.attempts[-1], decision=decision))
            weights = self._weights(plan, {})
            pick = self._trials.choose(plan, weights, self._forward(probe, plan), at, before)
            moved.append(row_of(pick))
        return moved

    def _written(
        self, name: str, types: Sequence[tuple[str, str]], planned: int | None = None, keep: bool = False
    ) -> Written:
        """Return an artifact as written and measured, once; to `keep` it, it is there if it has passed."""
        entry = f"{name} {hashlib.sha256(repr(types).encode()).hexdigest()}"
        known = self._journal.entries.get(entry)
        gone = known is not None and keep and not self._place.has(name, known["sha256"])
        if known is None or (gone and known["ratio"] is not None):
            self._journal.add(entry, asdict(self._made(name, types, planned)))
        return TypeAdapter(Written).validate_python(self._journal.entries[entry])

    def _made(self, name: str, types: Sequence[tuple[str, str]], planned: int | None) -> Written:
        path, label = self._place.folder / name, BASELINE_NAME if name == BASELINE_NAME else MODEL_NAME
        write_folder(
            self._checkpoint.path,
            path,
            STORED_SCHEME,
            group=ROW_GROUP,
            tensor_types=types,
            statistics=self._statistics,
            rounder=ROUNDER,
            overwrite=True,
            progress=self._progress,
        )
        with open_model(path) as candidate:
            probe = LayerProbe(self._model, self._tokens)
            judged = artifact_gates(self._checkpoint, candidate.checkpoint, probe, planned, self._cosine_gate)
        self._tell(label, judged)
        found, scores = self._reference.measure(path)
        of_perplexity = self._gates.of_perplexity(found)
        self._tell(label, of_perplexity)
        judged += of_perplexity
        ratio = self._reference.artifact.file_bytes / found.candidate.file_bytes
        return Written(
            artifact=replace(found.candidate, path=label),
            ratio=ratio if all_pass(judged) else None,
            measures=found.measures,
            chunk_nll_nats=tuple(scores.nll_cand.mean(axis=1).tolist()),
            gates=tuple(one.to_json() for one in judged),
            sha256=digest(path),
        )

    def _tell(self, label: str, judged: Sequence[Judged]) -> None:
        for one in judged:
            said = "passed" if one.passed else "the artifact does not pass"
            self._log.judged("sahc artifact", label, one, said)


def _types(rows: Sequence[SahcRow]) -> list[tuple[str, str]]:
    return [only(row.name, row.scheme) for row in rows if row.method != STORED.name]


def _cosine_of(row: SahcRow) -> float:
    """Return the last forward cosine that was measured of a row."""
    found = [
        gate["value"]
        for attempt in row.attempts
        for gate in attempt.gates
        if gate["name"] == FORWARD_COSINE.name and gate["value"] is not None
    ]
    return float(found[-1]) if found else -1.0
