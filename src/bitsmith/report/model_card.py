"""A study as files to publish: a Markdown model card with snippets to run it, `report.json`, the page."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from bitsmith.errors import OutputError, printable
from bitsmith.report import study_tables as tables
from bitsmith.report.markdown import UNMEASURED, markdown_table, plain, write_markdown
from bitsmith.report.study_json import Artifact, Study
from bitsmith.report.study_page import summary_of, write_study_page
from bitsmith.report.study_tables import Table
from bitsmith.store.journal import write_result

PAGE_NAME, JSON_NAME, CARD_NAME = "report.html", "report.json", "README.md"

_SAMPLE_CHARACTERS = 600
_SAMPLES = 12


def write_report(out: Path, study: Study) -> tuple[Path, Path, Path]:
    """Write the page, `report.json` and the model card into the folder `out`, over earlier ones.

    Returns their paths in that order. Raises OutputError where the folder cannot be made or written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot be made: {error.strerror or error}", path=out) from error
    page = write_study_page(out / PAGE_NAME, study)
    write_result(out / JSON_NAME, study.to_json())
    return page, out / JSON_NAME, write_markdown(out / CARD_NAME, model_card(study))


def model_card(study: Study) -> str:
    """Return the study as a Markdown model card; names, samples and texts of files are escaped.

    The first artifact of each kind (GGUF, .cellm, folder) gets the snippets to run it.
    """
    parts = [f"# {plain(study.title)}", *(plain(line) for line in summary_of(study))]
    for title, table in (
        ("Artifacts", tables.artifact_table(study)),
        ("Points of others", tables.peer_table(study)),
        ("Claims", tables.claim_table(study)),
        ("Errors by component", tables.component_table(study)),
        ("Gate log: what did not pass", _failed(tables.gate_table(study))),
    ):
        if table.rows:
            parts += [f"## {title}", _markdown(table)]
    parts += _snippets(study)
    parts += _samples(study)
    parts += _repeat(study)
    return "\n\n".join(parts) + "\n"


def modelfile(artifact: str, ctx_tokens: int | None = None) -> str:
    """Return an Ollama Modelfile for a GGUF; the context is the one it was measured at, if any.

    Ollama takes the chat template from the GGUF.
    """
    lines = [f"FROM ./{printable(artifact)}"]
    if ctx_tokens is not None:
        lines.append(f"PARAMETER num_ctx {ctx_tokens}")
    return "\n".join(lines) + "\n"


def _snippets(study: Study) -> Iterator[str]:
    rows = [row for row in study.artifacts if not row.is_original and row.path]
    kinds: dict[str, Artifact] = {}
    for row in rows:
        kinds.setdefault(_kind(row), row)
    if kinds:
        yield "## Use"
    for kind, row in kinds.items():
        name = printable(Path(row.path).name)
        word = shlex.quote(name)
        if kind == "gguf":
            yield f"llama.cpp and Ollama ({plain(name)}):"
            yield _block(f"llama-cli -m {word} -p 'Hello'\nollama create NAME -f Modelfile")
            yield "Modelfile:"
            yield _block(modelfile(name))
        elif kind == "cellm":
            yield f"bitsmith ({plain(name)}):"
            yield _block(f"bitsmith generate {word} -p 'Hello'")
        else:
            yield f"transformers and vLLM ({plain(name)}); config.json names the packing:"
            yield _block(
                f"from transformers import AutoModelForCausalLM\n"
                f"model = AutoModelForCausalLM.from_pretrained({name!r})\n\nvllm serve {word}"
            )


def _kind(row: Artifact) -> str:
    suffix = Path(row.path).suffix.lower()
    return suffix.lstrip(".") if suffix in (".gguf", ".cellm") else "folder"


def _samples(study: Study) -> Iterator[str]:
    if study.samples:
        first = study.samples[0]
        how = first.passages[-1].how if first.passages else ""
        yield "## Samples"
        yield f"After the first prompt, {plain(how)}:"
        yield _block(printable(first.prompt, _SAMPLE_CHARACTERS))
        for one in [one for one in first.passages if one.how == how][:_SAMPLES]:
            yield f"{plain(one.artifact)}: {plain(one.note)}"
            yield _block(printable(one.text, _SAMPLE_CHARACTERS))


def _repeat(study: Study) -> Iterator[str]:
    yield "## How to repeat it"
    commands = list(
        dict.fromkeys([*study.commands, *(line for row in study.artifacts for line in row.commands)])
    )
    yield _block("\n".join(printable(line, 4000) for line in commands) or f"# commands: {UNMEASURED}")
    for protocol in study.protocols:
        rows = [(str(name), str(value)) for name, value in protocol.settings.items()]
        yield f"Protocol {plain(protocol.name)}:"
        yield markdown_table(("setting", "value"), rows)
    if study.environment:
        yield "Environment:"
        yield markdown_table(("what", "value"), list(study.environment.items()))
    digests = [(one.what, one.sha256) for one in study.digests]
    digests += [(row.name, row.sha256) for row in study.artifacts if row.sha256]
    if digests:
        yield markdown_table(("what", "SHA-256"), list(dict.fromkeys(digests)))
    if study.notes:
        yield "\n".join(f"- {plain(note)}" for note in study.notes)


def _failed(table: Table) -> Table:
    at = table.columns.index("outcome")
    rows = [row for row in table.rows if row[at].text in ("FAIL", "UNMEASURED")]
    return Table(table.columns, rows, [None] * len(rows))


def _markdown(table: Table) -> str:
    return markdown_table(table.columns, [[cell.text for cell in row] for row in table.rows])


def _block(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.rstrip().split("\n"))
