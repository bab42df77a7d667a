"""Compress to whatever recipe, name and type ask for: a GGUF, a .cellm file, a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from bitsmith.errors import BitsmithError, OutputError, printable
from bitsmith.numerics.threads import at_most, one_blas_thread
from bitsmith.progress import Progress, silent
from bitsmith.run import job as gguf
from bitsmith.run.cellm import KINDS, CellmPlan, CellmRecord, plan_cellm, write_cellm
from bitsmith.run.execute import Record
from bitsmith.run.folder import SCHEMES, FolderPlan, FolderRecord, plan_folder, write_folder
from bitsmith.run.folder_layout import takes
from bitsmith.run.job import SAHC, SPI, Job
from bitsmith.run.plan import Plan
from bitsmith.run.sahc_planned import SahcPlan, plan_sahc
from bitsmith.run.sahc_rows import SahcRecord
from bitsmith.run.spi import SpiPlan, SpiRecord, plan_spi, write_spi
from bitsmith.store.atomic import refuse_taken
from bitsmith.store.hub import called, local

Output = Literal["gguf", "cellm", "folder", "spi", "sahc"]
Written: TypeAlias = Record | CellmRecord | FolderRecord | SpiRecord | SahcRecord
Planned: TypeAlias = Plan | CellmPlan | FolderPlan | SpiPlan | SahcPlan

_ALL = {"model", "out", "type_name", "statistics", "rounder", "overwrite", "device", "threads"}
_KNOWN: dict[Output, set[str]] = {
    "cellm": _ALL | {"tensor_types", "group", "like_seed", "selection"},
    "folder": _ALL | {"tensor_types", "group", "ignore"},
    "spi": _ALL - {"type_name"} | {"text", "recipe", "critical", "by", "seed"},
    "sahc": _ALL - {"type_name", "rounder"} | {"text", "recipe", "ctx_tokens", "chunks", "ppl_limit"},
}
_PACKED_ONLY = {
    "group", "like_seed", "selection", "ignore", "critical", "by", "seed", "chunks", "ppl_limit",
}  # fmt: skip
_FLAGS = {
    "statistics": "stats", "plan_file": "plan", "tensor_types": "tensor-type", "selection": "select",
    "type_name": "type", "ctx_tokens": "ctx",
}  # fmt: skip


@one_blas_thread()
def compress(job: Job, progress: Progress = silent) -> Written:
    """Compress as the job says, to the kind of file that `output_of` finds; `OUT.sha256` goes with it.

    Raises as `run.job.run`, `write_cellm`, `write_folder`, `write_spi` and `sahc` do, BitsmithError for
    options that the kind does not know, and for a recipe `sahc` whose last gates do not pass.
    """
    output = output_of(job)
    with device_named(job.device), at_most(job.threads):
        return _written(job, output, destination(job, output), progress)


@contextmanager
def device_named(name: str) -> Iterator[None]:
    """Encode and forward on the device called `name`; torch is loaded for another than the processor."""
    if name == "cpu":
        yield
        return
    from bitsmith.run.device import on_device  # noqa: PLC0415 (loads torch)

    with on_device(name):
        yield


def _written(job: Job, output: Output, out: Path, progress: Progress) -> Written:
    if output != "sahc":
        refuse_taken(out, job.overwrite, [], folder=output not in ("gguf", "cellm"))
    job = replace(job, out=out, model=local(job.model, progress))
    if output == "gguf":
        return gguf.run(job, progress)
    if output == "sahc":
        return _sahc(job, out, progress)
    common: dict[str, Any] = {
        "statistics": job.statistics,
        "overwrite": job.overwrite,
        "progress": progress,
    }
    record: CellmRecord | FolderRecord | SpiRecord
    if output == "cellm":
        record = write_cellm(job.model, out, **_cellm(job), rounder=job.rounder, **common)
    elif output == "folder":
        record = write_folder(job.model, out, **_folder(job), rounder=job.rounder, **common)
    else:
        record = write_spi(job.model, out, **_spi(job), **common)
    return record


@one_blas_thread()
def plan(job: Job, progress: Progress = silent) -> Planned:
    """Return what `compress` would write, with exact bytes; writes nothing but a plan that is asked for."""
    output = output_of(job)
    job = replace(job, out=destination(job, output), model=local(job.model, progress))
    if output == "cellm":
        return plan_cellm(job.model, **_cellm(job))
    if output == "folder":
        return plan_folder(job.model, **_folder(job), statistics=job.statistics, rounder=job.rounder)
    if output == "sahc":
        return plan_sahc(job.model, statistics=job.statistics)
    if output == "spi":
        return plan_spi(job.model, **_spi(job), statistics=job.statistics, progress=progress)
    return gguf.run_dry(job, progress)


def output_of(job: Job) -> Output:
    """Return what is to be written: the name's suffix decides, without one the recipe or the type.

    Raises BitsmithError for a type or a recipe of another kind, and for options that the kind does not know.
    """
    suffix = None if job.out is None else job.out.suffix
    scheme = (job.type_name or "").upper()
    output: Output = "gguf"
    if job.recipe in (SPI, SAHC):
        output = "spi" if job.recipe == SPI else "sahc"
    elif suffix == ".cellm":
        output = "cellm"
    elif takes(scheme) and (suffix != ".gguf" or scheme not in ("BF16", "F16")):
        output = "folder"
    if output == "gguf" and suffix not in (None, ".gguf"):
        raise OutputError(
            "cannot tell what to write: a GGUF's name must end in .gguf, a .cellm file's in .cellm, "
            f"and a folder takes --type {'|'.join(SCHEMES)} or --recipe spi|sahc",
            path=job.out,
        )
    if output in ("folder", "spi", "sahc") and suffix in (".gguf", ".cellm"):
        what = scheme if output == "folder" else f"recipe {output}"
        raise OutputError(f"{what} makes a folder, whose name has no such suffix", path=job.out)
    _refuse_unknown(job, output)
    return output


def destination(job: Job, output: Output) -> Path:
    """Return where to write: `out`, or a name made of the model's and the type's in the current folder."""
    if job.out is not None or output == "gguf":
        return job.destination
    what = output if output in (SPI, SAHC) else (job.type_name or "").upper()
    return Path(f"{called(job.model)}-{what}")


def _refuse_unknown(job: Job, output: Output) -> None:
    given = {field.name for field in fields(Job) if getattr(job, field.name) != field.default}
    unknown = given & _PACKED_ONLY if output == "gguf" else given - _KNOWN[output]
    if unknown:
        names = ", ".join(sorted(f"--{_FLAGS.get(name, name.replace('_', '-'))}" for name in unknown))
        what = {"gguf": "a GGUF", "cellm": "a .cellm file", "folder": "a packed folder"}
        raise BitsmithError(f"{what.get(output, f'recipe {output}')} is not made with {names}")


def _cellm(job: Job) -> dict[str, Any]:
    if job.type_name is None:
        raise BitsmithError(f"a .cellm file needs a type: --type {'|'.join(KINDS)}")
    return {
        "kind": job.type_name,
        "group": job.group,
        "like_seed": job.like_seed,
        "selection": job.selection,
        "tensor_types": job.tensor_types,
    }


def _folder(job: Job) -> dict[str, Any]:
    return {
        "scheme": (job.type_name or "").upper(),
        "group": job.group,
        "tensor_types": job.tensor_types,
        "ignore": job.ignore,
    }


def _spi(job: Job) -> dict[str, Any]:
    if job.text is not None and job.by is not None and not job.by.startswith("kld"):
        raise BitsmithError(f"--text is for --by kld, not for {printable(job.by)}")
    return {
        "critical": job.critical,
        "by": job.by,
        "seed": job.seed,
        "text": job.text,
        "rounder": "nearest" if job.statistics is None else job.rounder,
    }


def _sahc(job: Job, out: Path, progress: Progress) -> SahcRecord:
    """Run the recipe; raises BitsmithError without a text, and as `SahcRecord.refuse_failed` does."""
    if job.text is None:
        raise BitsmithError(
            "recipe sahc is judged on a text: --text FILE, which the model was not trained on"
        )
    from bitsmith.run.sahc import CTX_TOKENS, sahc  # noqa: PLC0415 (loads torch)
    from bitsmith.run.sahc_work import AUDIT_NAME, work_folder  # noqa: PLC0415

    result = sahc(
        job.model,
        job.text,
        out,
        statistics=job.statistics,
        ctx_tokens=job.ctx_tokens or CTX_TOKENS,
        chunks=job.chunks,
        ppl_limit=job.ppl_limit,
        overwrite=job.overwrite,
        progress=progress,
    )
    record = SahcRecord(out, work_folder(out), work_folder(out) / AUDIT_NAME, result)
    record.refuse_failed()
    return record
