"""The seed's experiments on merging a teacher into a student, run by one command on a pair of models."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bitsmith import __version__
from bitsmith.errors import BitsmithError, printable
from bitsmith.lab.merge_bench import Bench, Json, Setting
from bitsmith.lab.merge_cases import AnyCase, Sizes, Task
from bitsmith.lab.merge_catalog import SHARED_TOKENS, Experiment, chosen_experiments
from bitsmith.lab.merge_cost import experiments_cost
from bitsmith.lab.merge_tasks import write_task_text
from bitsmith.lab.models import STUDENT_MODEL, TEACHER_MODEL
from bitsmith.progress import Progress, silent
from bitsmith.run.claim_evidence import sha256_of
from bitsmith.run.evaluate import PROTOCOL, text_chunks
from bitsmith.run.evaluation import RESAMPLES
from bitsmith.run.paired_inputs import Sides, open_sides
from bitsmith.run.seed_claims import Cost
from bitsmith.store.atomic import atomic_file, remove
from bitsmith.store.hub import local
from bitsmith.store.journal import Journal, Key, content_key, result_folder, write_result

RESULT_NAME = "merge-experiments.json"
JOURNAL_NAME = ".merge-experiments.journal"
WORK_NAME = ".merge-experiments"

TOKENS = 140_000
CTX_TOKENS = 256
CHUNKS = 32

_PIECE_CHARACTERS = 2_000  # of each task by turns
_TOKEN_BYTES = 4  # more than a token of these texts takes, on average
_HELD_BYTES = 60_000
_MADE: Mapping[Task, tuple[str, bool]] = {
    "text": ("code", False),
    "held": ("code", True),
    "other": ("prose", False),
    "other_held": ("prose", True),
}


@dataclass(frozen=True)
class MergeExperiments:
    """The experiments on one pair: each one's question and rows; `texts` tells what was read, by its part.

    A row has `ppl`, `ppl_over_student` and `kld_to_teacher` (value, unit, low, high, interval; None where
    `unmeasured` says why or where the row measures something else), and facts.
    """

    teacher: str
    student: str
    texts: dict[str, dict[str, str]]
    protocol: dict[str, Any]
    tokens: int
    ctx_tokens: int
    chunks: int
    seed: int
    cost: tuple[Cost, ...]
    experiments: list[dict[str, Any]]
    resumed: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready record."""
        return {"kind": "merge-experiments", "bitsmith": __version__, **asdict(self)}


def merge_experiments(
    teacher: Path | None,
    student: Path | None,
    out: Path,
    *,
    text: Path | None = None,
    held: Path | None = None,
    other: Path | None = None,
    other_held: Path | None = None,
    tokens: int = TOKENS,
    ctx_tokens: int = CTX_TOKENS,
    chunks: int = CHUNKS,
    seed: int = 0,
    only: Sequence[str] | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
    say_cost: Callable[[Sequence[Cost]], None] | None = None,
) -> MergeExperiments:
    """Run all experiments of `EXPERIMENTS`, or those called `only`, on a teacher and a student.

    Models that are not given are the lab's bundled pair; texts are two tasks out of the standard library
    (code without docstrings, and their prose), written into `out`. Maps are found on at most `tokens` of
    `text` (and of `other`), figures on at most `chunks` chunks of `ctx_tokens` of `held` (`other_held`).
    Merges are measured in memory. `merge-experiments.json` in the folder `out` gets the result; a killed run
    goes on with the rows it had. `say_cost` is told beforehand what this takes.

    Raises BitsmithError for one model or text without the other it belongs to, an unknown experiment, a text
    that is both found and measured on, and as `open_sides` and `text_chunks` do; OutputError where `out`
    holds a result without `overwrite` or cannot be written. What a row alone cannot have makes that row
    unmeasured and says why.
    """
    started = time.monotonic()
    given: dict[Task, Path | None] = {"text": text, "held": held, "other": other, "other_held": other_held}
    chosen, models = chosen_experiments(only), _both(teacher, student, progress)
    _check_options(given, tokens, ctx_tokens, chunks)
    with open_sides(*models) as sides:
        result_folder(out, RESULT_NAME, overwrite, models)
        job = _prepared(sides, models, given, chosen, out, (tokens, ctx_tokens, chunks, seed))
    if say_cost is not None:
        say_cost(job.cost)
    with Journal(out / JOURNAL_NAME, job.key, overwrite=overwrite) as journal:
        resumed = len(journal.entries)
        with Bench(job.setting, out / WORK_NAME, journal, progress) as bench:
            found = _run(bench, chosen, job.rows, progress)
        result = _result(job, found, resumed, time.monotonic() - started)
        write_result(out / RESULT_NAME, result.to_json())
        journal.remove()  # before what it speaks of
        remove(out / WORK_NAME)
    return result


@dataclass(frozen=True)
class _Job:
    """What is run: the texts' digests and the rows by experiment, what it costs, the journal's key."""

    setting: Setting
    digests: dict[Task, str]
    rows: dict[str, list[AnyCase]]
    cost: tuple[Cost, ...]
    key: Key


def _prepared(
    sides: Sides,
    models: tuple[Path, Path],
    given: Mapping[Task, Path | None],
    chosen: Mapping[str, Experiment],
    out: Path,
    window: tuple[int, int, int, int],
) -> _Job:
    """Make the texts that are not given and count what is run; `window` is tokens, context, chunks, seed."""
    tokens, ctx_tokens, chunks, seed = window
    texts = _texts(out, given, any(one.needs_other for one in chosen.values()), tokens)
    digests = {task: str(sha256_of(path)) for task, path in texts.items()}
    _expect_apart(texts, digests)
    used = {
        task: _tokens(sides, path, ctx_tokens, tokens, 2 if task in ("text", "other") else 1)
        for task, path in texts.items()
    }
    setting = Setting(*models, texts, _names(given), used, ctx_tokens, chunks, seed)
    sizes = _sizes(sides, setting)
    rows = {name: list(one.rows(sizes)) for name, one in chosen.items()}
    named = dict(zip(("tokens", "context", "chunks", "seed"), window, strict=True))
    key = content_key(sides.student.model.source, {"texts": digests, **named})
    key["teacher"] = sides.teacher.model.source.source_digest
    cost = experiments_cost(sides, sizes, rows, chunks)
    return _Job(setting, digests, rows, cost, key)


def _result(job: _Job, found: list[Json], resumed: int, seconds: float) -> MergeExperiments:
    setting, names = job.setting, job.setting.names
    texts = {
        str(task): {"name": names[task], "path": printable(str(path)), "sha256": job.digests[task]}
        for task, path in setting.texts.items()
    }
    return MergeExperiments(
        teacher=printable(str(setting.teacher)),
        student=printable(str(setting.student)),
        texts=texts,
        protocol=_protocol(setting),
        tokens=setting.tokens["text"],
        ctx_tokens=setting.ctx_tokens,
        chunks=setting.chunks,
        seed=setting.seed,
        cost=job.cost,
        experiments=found,
        resumed=resumed,
        seconds=seconds,
    )


def _run(
    bench: Bench, chosen: Mapping[str, Experiment], rows: Mapping[str, Sequence[AnyCase]], progress: Progress
) -> list[Json]:
    total, done = sum(map(len, rows.values())), 0
    found: list[Json] = []
    for name, cases in rows.items():
        made = []
        for case in cases:
            progress("rows", done, total)
            made.append(bench.row(case))
            done += 1
        found.append({"name": name, "words": chosen[name].words, "rows": made})
    progress("rows", done, total)
    return found


def _both(teacher: Path | None, student: Path | None, progress: Progress) -> tuple[Path, Path]:
    if teacher is None and student is None:
        return TEACHER_MODEL, STUDENT_MODEL
    if teacher is None or student is None:
        raise BitsmithError("give both a teacher and a student, or neither for the bundled pair")
    return local(teacher, progress), local(student, progress)


def _check_options(given: Mapping[Task, Path | None], tokens: int, ctx_tokens: int, chunks: int) -> None:
    if chunks < 1:
        raise BitsmithError(f"{chunks} chunks leave nothing to measure")
    if tokens < 2 * ctx_tokens:
        raise BitsmithError(f"{tokens} tokens are too few: two chunks of {ctx_tokens} are the least")
    pairs: tuple[tuple[Task, Task], ...] = (("text", "held"), ("other", "other_held"))
    for found_on, judged_on in pairs:
        if (given[found_on] is None) != (given[judged_on] is None):
            raise BitsmithError(
                f"give both --{found_on} and --{judged_on.replace('_', '-')}: what maps are found on, and "
                "what they are measured on"
            )
    for path in given.values():
        if path is not None and not path.exists():
            raise BitsmithError("does not exist", path=path)


def _texts(out: Path, given: Mapping[Task, Path | None], wants_other: bool, tokens: int) -> dict[Task, Path]:
    """Return the texts that are needed; what was not given is made."""
    found: dict[Task, Path] = {}
    for task, (name, held_out) in _MADE.items():
        if not wants_other and task.startswith("other"):
            continue
        path = given[task]
        if path is None:
            path = out / f"{name}{'.held' if held_out else ''}.txt"
            wanted = tokens if task == "text" else min(tokens, SHARED_TOKENS)
            limit = _HELD_BYTES if held_out else _TOKEN_BYTES * wanted
            write_task_text(name, path, limit, held_out=held_out)
        found[task] = path
    if wants_other:
        found["mixed"] = _mixed(found["held"], found["other_held"], out / "mixed.held.txt")
    return found


def _mixed(one: Path, other: Path, out: Path) -> Path:
    """Write pieces of two texts by turns, as long as both last."""
    pieces = []
    for path in (one, other):
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BitsmithError(f"is not UTF-8 or cannot be read: {error}", path=path) from error
        pieces.append([text[n : n + _PIECE_CHARACTERS] for n in range(0, len(text), _PIECE_CHARACTERS)])
    with atomic_file(out, overwrite=True) as stream:
        stream.write("\n".join(piece for pair in zip(*pieces, strict=False) for piece in pair).encode())
    return out


def _expect_apart(texts: Mapping[Task, Path], digests: Mapping[Task, str]) -> None:
    """Refuse a text that is given twice."""
    seen: dict[str, Task] = {}
    for task, digest in digests.items():
        if digest in seen:
            raise BitsmithError(f"is the same text as {texts[seen[digest]]}", path=texts[task])
        seen[digest] = task


def _tokens(sides: Sides, path: Path, ctx_tokens: int, limit: int, least: int) -> int:
    """Return how many tokens of a text are used: whole chunks.

    Raises BitsmithError for fewer than `least` chunks, and as `text_chunks` does.
    """
    _, protocol = text_chunks(sides.student.model, path, ctx_tokens, None)
    if protocol.chunks_available < least:
        raise BitsmithError(
            f"has {protocol.text_tokens} tokens, {least} chunks of {ctx_tokens} are the least", path=path
        )
    return min(limit, protocol.text_tokens) // ctx_tokens * ctx_tokens


def _names(given: Mapping[Task, Path | None]) -> dict[Task, str]:
    """Return what the texts are called in the rows."""
    names: dict[Task, str] = {}
    for task, (made, held_out) in _MADE.items():
        path = given[task]
        said = f"{made}{', held out' if held_out else ''}"
        names[task] = said if path is None else printable(path.name, 60)
    return names | {"mixed": f"{names['held']} and {names['other_held']} by turns"}


def _sizes(sides: Sides, setting: Setting) -> Sizes:
    used, ctx = setting.tokens, setting.ctx_tokens
    held = min(used["held"], setting.chunks * ctx)
    return Sizes(sides.student.n_layers, used["text"], used.get("other", 0), held, ctx)


def _protocol(setting: Setting) -> dict[str, Any]:
    return {
        "name": PROTOCOL,
        "ctx_tokens": setting.ctx_tokens,
        "chunks": setting.chunks,
        "used_tokens": {setting.names[task]: count for task, count in setting.tokens.items()},
        "resamples": RESAMPLES,
        "seed": setting.seed,
        "interval": "95 % paired bootstrap over chunks",
    }
