"""Hostile chat templates: no way out of the sandbox, no end to time, memory or text that is not bounded."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bitsmith.errors import UnsupportedError
from bitsmith.run.compress import compress
from bitsmith.run.job import Job
from bitsmith.run.template import render
from bitsmith.run.vocabulary import chat_prompt
from bitsmith.store import open_gguf

OUT = "cycler.__init__.__globals__.os.system('touch escaped')"
ESCAPES = {
    "a function's globals": "{{ " + OUT + " }}",
    "what is offered": "{{ raise_exception.__globals__['sys'].exit() }}",
    "the subclasses": "{{ ''.__class__.__base__.__subclasses__()[0] }}",
    "a format": "{{ '{0.__class__.__base__}'.format('') }}",
    "the file system": "{% include '/etc/passwd' %}",
    "a change of what it was given": "{{ messages.append(1) }}",
}
ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a power": "{{ 7 ** (10 ** 9) }}",
    "a macro of itself": "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "a wide number": "{{ '%999999999999d' % 1 }}",
    "a string": "{{ 'a' * 10 ** 12 }}",
    "text": "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    "nesting": "{% if 1 %}" * 100_000,
    "brackets": "{{ " + "(" * 100_000,
    "an error's message": "{{ raise_exception('a\n' * 10 ** 8) }}",
}
NO_TEXT = {"half a character": r"{{ '\ud800' }}"}
DEFAULT = ("a function's globals", "loops", "half a character")
TEMPLATES = ESCAPES | ENDLESS | NO_TEXT
TOLD = {
    **dict.fromkeys(ESCAPES, r"its chat template fails: .*(unsafe|no loader)"),
    **dict.fromkeys(NO_TEXT, "not Unicode"),
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in DEFAULT else pytest.mark.slow) for kind in TEMPLATES]
)
def test_a_hostile_template_is_refused_in_a_line(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected, seconds = ("its chat template", 1) if kind in ENDLESS else (TOLD[kind], 60)
    with pytest.raises(UnsupportedError, match=expected) as caught:
        render(TEMPLATES[kind], {"messages": []}, tmp_path / "model", seconds=seconds)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "model")) and message.isprintable() and len(message) < 500
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_is_unsafe_is_nothing_to_filters(tmp_path: Path) -> None:
    for template in ("{{ ''|attr('__class__') }}", "{{ '{a.__init__}'.format_map({'a': cycler}) }}"):
        assert render(template, {}, tmp_path, seconds=60) == ""


def test_it_is_carried_as_text_and_refused_only_where_it_is_run(demo_model: Path, tmp_path: Path) -> None:
    folder, escaped = Path(shutil.copytree(demo_model, tmp_path / "model")), tmp_path / "escaped"
    template = ESCAPES["a function's globals"].replace("escaped", str(escaped))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    compress(Job(model=folder, out=tmp_path / "m.gguf", type_name="Q8_0"))
    with open_gguf(tmp_path / "m.gguf") as written:
        assert written.metadata["tokenizer.chat_template"] == template
    for path in (folder, tmp_path / "m.gguf"):
        with pytest.raises(UnsupportedError, match=r"chat template fails.*unsafe"):
            chat_prompt(path, "hello")
    assert not escaped.exists()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_a_template_does_not_outlive_a_killed_run() -> None:
    """Its processor time is limited by the system, not by the process that waits for it."""
    code = (
        "from pathlib import Path\nfrom bitsmith.run.template import render\n"
        f"render({ENDLESS['loops']!r}, {{}}, Path('m'), seconds=2)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    children: list[int] = []
    for _ in range(600):
        children = _children(parent.pid)
        if children:
            break
        time.sleep(0.05)
    assert children
    time.sleep(1)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    until = time.monotonic() + 60
    while any(_runs(child) for child in children) and time.monotonic() < until:
        time.sleep(0.2)
    assert not any(_runs(child) for child in children)


def _children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in listed.read_text().split()] if listed.exists() else []


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
