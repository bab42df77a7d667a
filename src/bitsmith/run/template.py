"""Render a model's chat template: in a process of its own, sandboxed, with limits, for it may be hostile."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from bitsmith.errors import BitsmithError, UnsupportedError, printable

_MEMORY_BYTES = 1 << 30
_TEXT_CHARACTERS = 1 << 24


def render(template: str, variables: Mapping[str, Any], path: Path, seconds: float = 10.0) -> str:
    """Return what the Jinja `template` of the model at `path` makes of `variables`.

    Offered as transformers does: blocks trimmed, `break` and `continue`, `raise_exception`, `strftime_now`,
    and a `tojson` that leaves characters as they are. The process may take `seconds` (and no more should this
    one be killed), 1 GiB, both where the system can limit that, and write 16 Mi characters.

    Raises UnsupportedError where the template fails or goes beyond that.
    """
    request = json.dumps({"template": template, "variables": dict(variables), "seconds": seconds})
    command = [sys.executable, "-P", "-m", "bitsmith.run.template"]
    try:
        done = subprocess.run(  # noqa: S603
            command, input=request, capture_output=True, encoding="utf-8", timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise UnsupportedError(f"its chat template takes over {seconds:g} s", path=path) from error
    answer = json.loads(done.stdout) if done.returncode == 0 else {"error": "its process was stopped"}
    if "text" not in answer:
        raise UnsupportedError(f"its chat template fails: {printable(str(answer['error']))}", path=path)
    text = str(answer["text"])
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UnsupportedError("its chat template makes text that is not Unicode", path=path) from error
    return text


def _main() -> None:
    request = json.load(sys.stdin)
    _limit(request["seconds"])
    try:
        answer = {"text": _rendered(request["template"], request["variables"])}
    except Exception as error:  # whatever a hostile template provokes
        answer = {"error": str(error) or type(error).__name__}
    json.dump(answer, sys.stdout)


def _rendered(template: str, variables: dict[str, Any]) -> str:
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: PLC0415 - the caller does without it

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols"],
        autoescape=False,
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    text = environment.from_string(template).render(**variables)
    if len(text) > _TEXT_CHARACTERS:
        raise BitsmithError(f"it makes {len(text)} characters, {_TEXT_CHARACTERS} at most are taken")
    return text


def _limit(seconds: float) -> None:
    """Bound memory, processor time and files written; no core is left behind."""
    with suppress(ImportError):  # not POSIX
        import resource  # noqa: PLC0415

        processor = int(seconds) + 2
        limits = {"RLIMIT_AS": _MEMORY_BYTES, "RLIMIT_CPU": processor, "RLIMIT_FSIZE": 0, "RLIMIT_CORE": 0}
        for name, most in limits.items():
            with suppress(AttributeError, OSError, ValueError):  # unknown, or limited more tightly already
                resource.setrlimit(getattr(resource, name), (most, most))


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _refuse(message: str) -> NoReturn:
    raise BitsmithError(message)


def _now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)


if __name__ == "__main__":
    _main()
