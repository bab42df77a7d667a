"""What a model card says of running its artifacts: front matter, config, Modelfile, commands."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from bitsmith.errors import printable
from bitsmith.report.markdown import lines_of, plain
from bitsmith.report.study_json import Artifact, Study

_METHOD = "bitsmith"
_HUB = re.compile(r"([A-Za-z0-9][\w.-]*)/([A-Za-z0-9][\w.-]*)@[0-9a-f]{40,64}")
_CACHED = re.compile(r"models--([A-Za-z0-9][\w.-]*?)--([A-Za-z0-9][\w.-]*?)(?=/|$)")
_MAX_CONFIG_BYTES = 1 << 22
_SHOWN = 3
_TAGS = {"compressed-tensors": "compressed-tensors", "bitsandbytes": "bitsandbytes", "gguf": "gguf"}


def front_matter(study: Study) -> str:
    """Return the YAML that model hubs read: tags, the library, and the original's name on a hub if it tells.

    `ORG/NAME@COMMIT` and a folder of the hub's own cache (`models--ORG--NAME`) tell it, no other path does.
    """
    made = [row for row in study.artifacts if not row.is_original and row.path]
    kinds = list(dict.fromkeys(_kind(row, None)[0] for row in made))
    known: dict[str, Any] = {}
    bases = [f"{one[1]}/{one[2]}" for row in study.artifacts for one in _origins(row.model or row.path)]
    if bases:
        relation = "merge" if study.merges else "quantized"
        known |= {"base_model": list(dict.fromkeys(bases)), "base_model_relation": relation}
    library = (
        "gguf"
        if kinds == ["gguf"]
        else "transformers"
        if set(kinds) & {"compressed-tensors", "bitsandbytes"}
        else ""
    )
    known |= {"library_name": library} if library else {}
    packed = [_TAGS[kind] for kind in kinds if kind in _TAGS]
    what = ["merge"] if study.merges else []
    if packed or not study.merges:
        what.append("quantized")
    known |= {"tags": [_METHOD, *what, *packed]}
    return f"---\n{yaml.safe_dump(known, sort_keys=False, allow_unicode=False)}---"


def _origins(model: str) -> Iterator[re.Match[str]]:
    whole = _HUB.fullmatch(model)
    yield from [whole] if whole else _CACHED.finditer(model)


def snippets(study: Study, folder: Path | None) -> Iterator[str]:
    """Yield how to run the closest artifact of each kind, with paths from `folder`."""
    kinds: dict[str, list[tuple[Artifact, dict[str, Any]]]] = {}
    for row in study.artifacts:
        if row.path and not row.is_original:
            kind, config = _kind(row, folder)
            kinds.setdefault(kind, []).append((row, config))
    if kinds:
        yield "## Use"
    for kind, rows in kinds.items():
        row, config = min(rows, key=lambda pair: _divergence(pair[0]))
        name = printable(_place(row, folder), 500)
        title = plain(row.name)
        if kind == "gguf":
            yield f"{title}: llama.cpp, Ollama, bitsmith"
            run = f"ollama create {_tag(row.name)} -f Modelfile\nollama run {_tag(row.name)}"
            yield block(f"llama-cli -m {shlex.quote(name)} -p 'Hello'\n{run}\n{_generate(name)}")
            yield "Modelfile:"
            yield block(modelfile(name))
        elif kind == "cellm":
            yield f"{title}: cellm, bitsmith (where no tokenizer lies beside it: --tokenizer ORIGINAL)"
            yield block(_generate(name))
        elif kind == _METHOD:
            yield f"{title}: only bitsmith loads it; nothing else knows these factors"
            yield block(f"{_generate(name)}\nbitsmith evaluate ORIGINAL {shlex.quote(name)} --text FILE")
        else:
            yield f"{title}: transformers, vLLM, bitsmith; config.json names the packing"
            yield block(
                "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
                f"model = AutoModelForCausalLM.from_pretrained({name!r})\n"
                f"tokenizer = AutoTokenizer.from_pretrained({name!r})"
            )
            yield block(f"vllm serve {shlex.quote(name)}\n{_generate(name)}")
        if config:
            yield "`quantization_config` of its config.json, long lists cut:"
            yield block(json.dumps({"quantization_config": _cut(config)}, indent=2))


def modelfile(artifact: str, ctx_tokens: int | None = None) -> str:
    """Return an Ollama Modelfile for a GGUF, with a context if one is given.

    Ollama takes the chat template from the GGUF.
    """
    path = printable(artifact, 500)
    lines = [f"FROM {path if path.startswith(('/', './', '../')) else f'./{path}'}"]
    if ctx_tokens is not None:
        lines.append(f"PARAMETER num_ctx {ctx_tokens}")
    return "\n".join(lines) + "\n"


def block(text: str) -> str:
    """Return lines as an indented code block, their control characters escaped."""
    return "\n".join(f"    {line}" for line in lines_of(text.rstrip()).split("\n"))


def _kind(row: Artifact, folder: Path | None) -> tuple[str, dict[str, Any]]:
    """Return what loads an artifact: its suffix, or a folder's packing with its `quantization_config`."""
    suffix = Path(row.path).suffix.lower().lstrip(".")
    if suffix in ("gguf", "cellm"):
        return suffix, {}
    config = _quantization(row, folder)
    return str(config.get("quant_method", "folder")), config


def _quantization(row: Artifact, folder: Path | None) -> dict[str, Any]:
    for place in _places(row, folder):
        path = place / "config.json"
        try:
            if path.is_file() and path.stat().st_size <= _MAX_CONFIG_BYTES:
                found = json.loads(path.read_bytes()).get("quantization_config")
                return found if isinstance(found, dict) else {}
        except (OSError, ValueError, AttributeError, RecursionError):
            continue
    return {}


def _places(row: Artifact, folder: Path | None) -> list[Path]:
    path = Path(row.path)
    return [path] if folder is None or path.is_absolute() else [path, folder / path]


def _place(row: Artifact, folder: Path | None) -> str:
    """Return an artifact's path from `folder` where it lies under it, else its name."""
    if folder is not None:
        for path in _places(row, folder):
            if path.exists() and path.resolve().is_relative_to(folder.resolve()):
                return str(path.resolve().relative_to(folder.resolve()))
    return Path(row.path).name


def _divergence(row: Artifact) -> float:
    found = row.measures.get("mean_kld")
    return float("inf") if found is None else found.value


def _generate(name: str) -> str:
    return f"bitsmith generate {shlex.quote(name)} -p 'Hello'"


def _tag(name: str) -> str:
    """Return a name as Ollama takes it."""
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._") or "model"


def _cut(value: Any) -> Any:
    """Return JSON whose long lists and objects end after a few entries, and say how many there are."""
    if isinstance(value, dict):
        kept = dict(list(value.items())[:_SHOWN]) if len(value) > 12 else value
        more = {"…": f"{len(value) - len(kept)} more"} if len(kept) < len(value) else {}
        return {printable(str(key)): _cut(one) for key, one in kept.items()} | more
    if isinstance(value, list):
        more_items = [f"… {len(value) - _SHOWN} more"] if len(value) > 2 * _SHOWN else []
        return [_cut(one) for one in (value[:_SHOWN] if more_items else value)] + more_items
    return printable(value, 300) if isinstance(value, str) else value
