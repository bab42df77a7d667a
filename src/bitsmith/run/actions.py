"""What a study's tasks can do: each action is one public function, its files in `out`, its facts as JSON.

An input is the name of a task in `needs`, whose artifact it then is, or a path. No action tells times, dates
or places: the same inputs give the same files and the same facts.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from bitsmith.archs import architecture_of, import_view
from bitsmith.errors import BitsmithError, printable
from bitsmith.progress import Progress
from bitsmith.run.audit import read_audit
from bitsmith.run.record import without_places
from bitsmith.run.study_lines import layer_cosines, row_cosines, row_tensor
from bitsmith.run.task import Action
from bitsmith.store import open_checkpoint
from bitsmith.store.journal import write_result
from bitsmith.store.statistics_manifest import MANIFEST_NAME, parse_manifest, write_manifest

STATISTICS = "statistics"
SAMPLES = "samples.json"
EVALUATION = "evaluation.json"
RECORD = "record.json"
INSPECTION = "inspection.json"
ASSAY = "assay.json"
SAHC = "model.sahc"
"""The folder of a `sahc`'s own files, which is there without a model too."""
GATE_LOG = "audit.jsonl"
"""Beside an artifact's files, and no part of them: what the gates of its recipe said, and when."""
MERGE_SUFFIX = ".merge"
"""Of the folder of a merge's own record, beside its model, which is called as the merge is."""
MODEL_NAMES = ("model.gguf", "model.cellm", "model")
"""What a compressed model is called in its artifact; a folder has no suffix."""

_UNSETTLED = {
    *("command", "seconds", "estimated_seconds", "prompt_seconds", "peak_memory_bytes"),
    *("resumed", "resumed_tensors", "out"),
}

_SOURCES = (
    *("model", "text", "candidate", "statistics", "plan_file", "calibration"),
    *("teacher", "student", "held"),
)

Params = Mapping[str, Any]
Inputs = Mapping[str, Path]
Facts = Mapping[str, Any]


def model_in(artifact: Path) -> Path:
    """Return the model in the artifact of a `compress`, a `sahc` or a `merge`; any other path as it is.

    Raises BitsmithError for a recipe's artifact that has none.
    """
    merged = (path.with_suffix("") for path in artifact.glob(f"*{MERGE_SUFFIX}"))
    known = (artifact / name for name in MODEL_NAMES)
    found = next((path for path in (*known, *merged) if path.exists()), artifact)
    if found is artifact and (artifact / SAHC).exists():
        raise BitsmithError("the recipe wrote no model: the gates of what it made did not pass")
    return found


def inspect(params: Params, inputs: Inputs, out: Path, progress: Progress) -> Facts:
    """Describe `model`: components, types, sizes in every stock mix."""
    from bitsmith.run.inspect import inspect as run  # noqa: PLC0415 (what an action loads is its own)

    model = _model(params, inputs)
    found = _settled(run(model).to_json(), params, inputs)
    write_result(out / INSPECTION, found)
    names = ("architecture", "parameters", "stored_bytes", "components")
    return {**{name: found[name] for name in names}, **_size(model)}


def assay(params: Params, inputs: Inputs, out: Path, progress: Progress) -> Facts:
    """Measure the spectra of `model`, of all matrices or those that `match`; tell the verdict."""
    from bitsmith.run.assay import RESULT_NAME  # noqa: PLC0415
    from bitsmith.run.assay import assay as run  # noqa: PLC0415

    statistics = _input(params, inputs, "statistics", STATISTICS)
    model, match = _model(params, inputs), params.get("match")
    result = run(model, out, match=match, statistics=statistics, overwrite=True, progress=progress)
    found = _settled(result.to_json(), params, inputs)
    write_result(out / RESULT_NAME, found)
    return {"verdict": found["verdict"], "matrices": len(found["matrices"])}


def calibrate(params: Params, inputs: Inputs, out: Path, progress: Progress) -> Facts:
    """Run `text` through `model` and keep what its matrices see."""
    from bitsmith.run.calibrate import calibrate as run  # noqa: PLC0415 (loads torch)

    options = {name: params[name] for name in ("ctx_tokens", "chunks", "block", "saliency") if name in params}
    found = run(
        _model(params, inputs),
        _text(params),
        out / STATISTICS,
        overwrite=True,
        progress=progress,
        **options,
    )
    manifest = out / STATISTICS / MANIFEST_NAME
    kept = parse_manifest(manifest.read_bytes(), manifest)
    write_manifest(manifest, replace(kept, model=Path(kept.model).name, text=Path(kept.text).name))
    without_places(out / STATISTICS, [manifest])
    names = ("text_sha256", "ctx_tokens", "chunks", "held_chunks", "fit_tokens", "sites")
    return {name: getattr(found, name) for name in names}


def compress(params: Params, inputs: Inputs, out: Path, progress: Progress) -> Facts:
    """Write `model` as the other params say, the fields of `Job` and the `output`'s name in the artifact."""
    from bitsmith.run.compress import compress as run  # noqa: PLC0415
    from bitsmith.run.study_recipe import job_of  # noqa: PLC0415

    fields = {key: value for key, value in params.items() if key not in ("model", "output", "statistics")}
    model, name = _model(params, inputs), str(params.get("output", MODEL_NAMES[0]))
    if name not in MODEL_NAMES:
        raise BitsmithError(f"output is {printable(name)!r}, expected one of {', '.join(MODEL_NAMES)}")
    statistics = _input(params, inputs, "statistics", STATISTICS)
    if statistics is not None:
        fields["statistics"] = statistics
    written = out / name
    record = _settled(run(job_of(model, written, fields), progress).to_json(), params, inputs)
    without_places(written)
    write_result(out / RECORD, record)
    return {
        **_size(written),
        "path": name,
        "sha256": digest_of(written),
        "tensors": _tensors(record, model),
        "measured": record.get("measured", {}),
    }


def merge(params: Params, inputs: Inputs, out: Path, progress: Progress) -> Facts:
    """Merge `teacher` into `student` on `text`, by a `recipe`, as `output`; what was paired is not kept.

    Where the merge is no better than the student on held-out text, the student is what is written.
    """
    from bitsmith.run.merge import RESULT_NAME  # noqa: PLC0415 (loads torch)
    from bitsmith.run.merge import merge as run  # noqa: PLC0415
    from bitsmith.run.study_merge import merge_options  # noqa: PLC0415

    written = out / params["output"]
    run(out=written, overwrite=True, progress=progress, **merge_options(params))
    result = out / f"{written.name}{MERGE_SUFFIX}" / RESULT_NAME
    record = _settled(json.loads(result.read_bytes()), params, {**inputs, written.name: written})
    del record["paired"]["sha256"]  # of a manifest that tells places
    shutil.rmtree(result.parent)
    result.parent.mkdir()
    write_result(result, record)
    without_places(written)
    return {**_size(written), "path": written.name, "sha256": digest_of(written), "merge": record}


def sahc(params: Params, inputs: Inputs, out: Path, progress: Progress) -> Facts:
    """Compress `model` by the gated recipe, judged on `text`; without a model where its gates do not pass.

    The recipe's audit log tells times, so it goes beside the artifact's files.
    """
    from bitsmith.run.sahc import sahc as run  # noqa: PLC0415 (loads torch)
    from bitsmith.run.sahc_work import RESULT_NAME  # noqa: PLC0415

    model, written, audit = _model(params, inputs), out / "model", out.parent / GATE_LOG
    options = {name: params[name] for name in ("ctx_tokens", "chunks", "ppl_limit") if name in params}
    result = run(
        model,
        _text(params),
        written,
        work=out / SAHC,
        statistics=_input(params, inputs, "statistics", STATISTICS),
        audit=audit,
        overwrite=True,
        progress=progress,
        **options,
    )
    record = _settled(result.to_json(), params, inputs)
    write_result(out / SAHC / RESULT_NAME, record)
    made = written.exists()
    if made:
        without_places(written)
    facts = {**_size(written), "path": written.name, "sha256": digest_of(written)} if made else {}
    names = ("gates_passed", "gates_failed", "gates_unmeasured", "replans", "same_as_int4", "bytes_over_int4")
    return {
        **facts,
        **{name: record[name] for name in names},
        "ratio": record["sahc"]["ratio"],
        "ppl_over_int4": record["ppl_over_int4"],
        "tensors": [row_tensor(row) for row in record["rows"]] if made else [],
        "layers": [*layer_cosines(read_audit(audit)), *row_cosines(record["rows"])],
    }


def claims(params: Params, inputs: Inputs, out: Path, progress: Progress) -> Facts:
    """Test the seeds' claims, or `only` some, on `model`; what they rest on is not kept."""
    from bitsmith.run.study_claims import RESULT_NAME  # noqa: PLC0415 (loads torch)
    from bitsmith.run.study_claims import study_claims as run  # noqa: PLC0415

    options = {name: params[name] for name in ("only", "ctx_tokens", "chunks", "seed") if name in params}
    found = run(
        _model(params, inputs),
        out,
        text=_input(params, inputs, "text"),
        statistics=_input(params, inputs, "statistics", STATISTICS),
        calibration=_input(params, inputs, "calibration"),
        overwrite=True,
        progress=progress,
        **options,
    )
    for left in out.iterdir():
        if left.is_dir():
            shutil.rmtree(left)
    record = _settled(found.to_json(), params, inputs)
    write_result(out / RESULT_NAME, record)
    names = ("name", "words", "seed", "outcome", "found", "protocol", "measure")
    return {"claims": [{name: one[name] for name in names} for one in record["claims"]]}


def reference(params: Params, inputs: Inputs, out: Path, progress: Progress) -> Facts:
    """Run `text` through `model` and keep the states that its logits are made of, for every `evaluate`."""
    from bitsmith.run.reference_states import STATES_NAME, write_states  # noqa: PLC0415 (loads torch)

    model = _model(params, inputs)
    protocol = write_states(model, _text(params), out / STATES_NAME, **_window(params), progress=progress)
    return {"scored_tokens": protocol.scored_tokens, "text_sha256": protocol.text_sha256, **_size(model)}


def evaluate(params: Params, inputs: Inputs, out: Path, progress: Progress) -> Facts:
    """Measure `candidate` against `model` on `text`; `states` are the artifact of a `reference`."""
    from bitsmith.run.evaluate import Reference  # noqa: PLC0415 (loads torch)
    from bitsmith.run.reference_states import STATES_NAME, KnownReference  # noqa: PLC0415

    candidate = _input(params, inputs, "candidate")
    if candidate is None:
        raise BitsmithError("evaluate needs a candidate")
    states = _input(params, inputs, "states", STATES_NAME)
    model, text, window = _model(params, inputs), _text(params), {**_window(params), "progress": progress}
    opened = (
        Reference(model, text, **window) if states is None else KnownReference(model, text, states, **window)
    )
    with opened as known:
        evaluation, _ = known.measure(model_in(candidate))
    found = _settled(evaluation.to_json(), params, inputs)
    write_result(out / EVALUATION, found)
    return {name: found[name] for name in ("measures", "protocol", "candidate", "reference", "warnings")}


def generate(params: Params, inputs: Inputs, out: Path, progress: Progress) -> Facts:
    """Continue each of `prompts` with `model`, `tokens` tokens at most."""
    from bitsmith.run.continuation import continue_prompt  # noqa: PLC0415 (loads torch)
    from bitsmith.run.sampling import Sampling  # noqa: PLC0415

    sampling = Sampling(**params.get("sampling", {"temperature": 0.0}))
    tokenizer = None if params.get("tokenizer") is None else Path(params["tokenizer"])
    path, samples = _model(params, inputs), []
    for done, prompt in enumerate(params["prompts"]):
        progress("generate", done, len(params["prompts"]))
        found = continue_prompt(
            path,
            prompt,
            params.get("tokens", 64),
            sampling,
            chat=params.get("chat", False),
            tokenizer=tokenizer,
        )
        samples.append(
            {"prompt": prompt, "text": found.text, "stopped": found.stopped, "tokens": found.n_tokens}
        )
    write_result(out / SAMPLES, {"samples": samples})
    return {"samples": samples}


ACTIONS: dict[str, Action] = {
    action.__name__: action
    for action in (inspect, assay, calibrate, merge, compress, sahc, claims, reference, evaluate, generate)
}
"""Every action by its name in a task."""


class _Row(NamedTuple):
    role: str
    layer: int | None


def _model(params: Params, inputs: Inputs) -> Path:
    found = _input(params, inputs, "model")
    if found is None:
        raise BitsmithError("the task names no model")
    return model_in(found) if params["model"] in inputs else found


def _text(params: Params) -> Path:
    if not isinstance(params.get("text"), str):
        raise BitsmithError("the task names no text")
    return Path(params["text"])


def _window(params: Params) -> dict[str, Any]:
    return {name: params[name] for name in ("ctx_tokens", "chunks") if name in params}


def _input(params: Params, inputs: Inputs, name: str, inside: str = "") -> Path | None:
    """Return what `params[name]` names: the artifact of a needed task (the part `inside` it), or a path."""
    value = params.get(name)
    if value is None:
        return None
    return inputs[value] / inside if value in inputs else Path(value)


def _settled(value: Any, params: Params, inputs: Inputs) -> Any:
    """Return a record without times, and with names in place of where artifacts and sources lie."""
    places = {str(path): name for name, path in inputs.items()}
    places |= {str(params[name]): Path(params[name]).name for name in _SOURCES if name in params}
    return _replaced(value, places)


def _replaced(value: Any, places: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _replaced(one, places) for key, one in value.items() if key not in _UNSETTLED}
    if isinstance(value, list | tuple):
        return [_replaced(one, places) for one in value]
    if isinstance(value, str | Path):
        value = str(value)
        for place in sorted(places, key=len, reverse=True):
            value = value.replace(place, places[place])
    return value


def _size(path: Path) -> dict[str, Any]:
    """Return the bytes of a model's weight files, its weights, and the bits that each takes."""
    with open_checkpoint(path) as checkpoint:
        weights = sum(ref.size for ref in checkpoint.values())
        stored_bytes = sum(ref.nbytes for ref in checkpoint.values())
        file_bytes = sum(file.stat().st_size for file in checkpoint.files)
    return {"file_bytes": file_bytes, "weights": weights, "bpw": 8 * stored_bytes / max(1, weights)}


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file, or of what `sha256sum` lists of a folder's files, sorted by name.

    In the folder: `LC_ALL=C sha256sum * | sha256sum`.
    """
    if not path.is_dir():
        return _sha256(path)
    files = sorted(one.relative_to(path).as_posix() for one in path.rglob("*") if one.is_file())
    lines = "".join(f"{_sha256(path / name)}  {name}\n" for name in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb", buffering=0) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _tensors(record: Mapping[str, Any], model: Path) -> list[dict[str, Any]]:
    """Return a line per tensor as the study's JSON has them, whatever was written."""
    stored = record if "tensors" in record else record.get("folder", {})
    plan = {row["hf_name"]: row for row in record.get("plan", {}).get("rows", ())}
    places = _places(model)
    return [_tensor(one, plan, places) for one in stored.get("tensors", ())]


def _tensor(one: Mapping[str, Any], plan: Mapping[str, Any], places: Mapping[str, _Row]) -> dict[str, Any]:
    name = one.get("hf_name", one.get("name", ""))
    row, place = plan.get(name, {}), places.get(name, _Row("", None))
    rounding = one.get("rounding", {})
    rounder = rounding.get("rounder", one.get("rounder", ""))
    return {
        "name": name,
        "role": place.role,
        "layer": place.layer,
        "shape": list(one.get("shape", row.get("shape", ()))),
        "type": one.get("type") or one.get("scheme") or one.get("grid") or one.get("dtype", ""),
        "nbytes": one["nbytes"],
        "squared_error": one.get("relative_error"),
        "held_squared_error": one.get("held_error", rounding.get("held_errors", {}).get(rounder)),
        "rounder": rounder or "",
        "note": one.get("note", row.get("note", "")),
    }


def _places(model: Path) -> dict[str, _Row]:
    """Return role and layer by tensor name; nothing for an architecture that is not known."""
    with open_checkpoint(model) as checkpoint:
        try:
            arch = architecture_of(checkpoint) if checkpoint.config else import_view(checkpoint).arch
        except BitsmithError:
            return {}
        return {spec.name: _Row(spec.role, spec.layer) for spec in arch.specs()}
