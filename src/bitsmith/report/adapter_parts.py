"""What the adapters of runs to studies share: names, commands, the original's row, protocols, digests."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from bitsmith.errors import printable
from bitsmith.report.study_json import Study, read_study
from bitsmith.store.hub_names import last_name

Json = Mapping[str, Any]

ORIGINAL = "original"
PROTOCOL = "evaluation"
UNSAID = ("The source of this report does not say on which machine it was made.",)


def study_of(source: Json, title: str, **parts: Any) -> Study:
    """Return a study of its parts; version and seconds are the source's."""
    version = str(source.get("bitsmith", "unknown"))
    return read_study(
        {
            "bitsmith": version,
            "title": title,
            "environment": {"bitsmith": version},
            "seconds": source.get("seconds"),
            **parts,
        }
    )


def command(*words: Any) -> str:
    """Return a command of bitsmith as a shell takes it."""
    return printable(shlex.join(["bitsmith", *map(str, words)]), 4000)


def text_options(protocol: Json) -> list[str]:
    """Return the options that repeat a protocol."""
    options = ["--text", protocol["text"], "--ctx", str(protocol["ctx_tokens"])]
    options += ["--chunks", str(protocol["chunks"])]
    return options + (["--seed", str(protocol["seed"])] if protocol["seed"] else [])


def original_row(artifact: Json, measures: Json, model: str) -> dict[str, Any]:
    """Return the yardstick's row."""
    return {
        "name": ORIGINAL,
        "group": ORIGINAL,
        "what": "as stored",
        "model": model,
        "path": str(artifact["path"]),
        "is_original": True,
        "measures": measures,
        "protocol": PROTOCOL,
        **size(artifact["file_bytes"], artifact["weights"], artifact["bpw"]),
    }


def size(file_bytes: int | None, weights: int | None, bpw: float | None = None) -> dict[str, Any]:
    """Return a row's bytes, weights and `bpw`, of whole files where the source tells no other."""
    if bpw is None and file_bytes and weights:
        bpw = 8 * file_bytes / weights
    return {"file_bytes": file_bytes, "weights": weights, "bpw": bpw}


def protocol_part(protocol: Json) -> dict[str, Any]:
    """Return the one protocol of a source."""
    return {"name": PROTOCOL, "settings": dict(protocol)}


def text_digest(protocol: Json) -> dict[str, str]:
    """Return the digest of the text that was measured on."""
    return {"what": f"text {protocol['text']}", "sha256": protocol["text_sha256"]}


def name_of(path: Any) -> str:
    """Return a path's last part as a name."""
    return printable(last_name(str(path)))


def measured(measure: Json, style: str = ".4g") -> str:
    """Return a measure as `value unit (low … high)`."""
    value = f"{measure['value']:{style}} {measure['unit']}"
    if measure["low"] is None or measure["high"] is None:
        return f"{value} (interval unmeasured)"
    return f"{value} ({measure['low']:{style}} … {measure['high']:{style}})"


def dicts(rows: Sequence[Any]) -> list[dict[str, Any]]:
    """Return parts of a study as plain values."""
    return [row.model_dump(mode="json") for row in rows]
