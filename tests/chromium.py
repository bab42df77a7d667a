"""Pages opened in real headless Chromium: what they log, what they ask the network for, how they look."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numba import njit

_NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-default-apps",
    "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--hide-scrollbars",
    "--force-color-profile=srgb", "--virtual-time-budget=20000", "--dump-dom",
)  # fmt: skip
_BROWSERS_OWN = "not an origin"  # what the net log calls the initiator of Chromium's own requests


@dataclass(frozen=True)
class Visit:
    """One opened page: console lines, what it requested from elsewhere, its DOM, its pixels (`H W 3`)."""

    console: list[str]
    requests: list[str]
    dom: str
    screenshot: Path
    pixels: np.ndarray


def chromium() -> str:
    """Return the browser's path; where there is none, fail in CI and skip elsewhere."""
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        reason = "no Chromium on this machine: apt-get install chromium (make test does it for root)"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    return found


def visit(page: Path, folder: Path, *, dark: bool = False, size: tuple[int, int] = (1280, 1600)) -> Visit:
    """Open `page` in a fresh profile under `folder` and wait until its scripts have run."""
    shot, log = folder / f"{page.stem}.png", folder / f"{page.stem}-net.json"
    run = subprocess.run(
        [
            chromium(), *_FLAGS, f"--user-data-dir={folder / 'profile'}",
            f"--window-size={size[0]},{size[1]}", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            f"--screenshot={shot}", f"--log-net-log={log}", page.resolve().as_uri(),
        ],
        capture_output=True, text=True, encoding="utf-8", timeout=120, check=False,
    )  # fmt: skip
    if run.returncode or not shot.exists() or not log.exists():
        pytest.fail(f"Chromium ended with {run.returncode}: {run.stderr[-2000:]}")
    console = re.findall(r":CONSOLE[:(]\d+\)?\] (.*)", run.stderr)
    return Visit(console, _requests(log), run.stdout, shot, read_png(shot))


def _requests(log: Path) -> list[str]:
    """Return the URLs that the page, not the browser, asked for."""
    events = json.loads(log.read_text(encoding="utf-8"))["events"]
    asked = [event.get("params", {}) for event in events]
    return [p["url"] for p in asked if "url" in p and p.get("initiator", _BROWSERS_OWN) != _BROWSERS_OWN]


def read_png(path: Path) -> np.ndarray:
    """Return an 8-bit RGB or RGBA PNG as `H W 3`."""
    raw, at, parts, header = path.read_bytes(), 8, [], b""
    while at < len(raw):
        (length,), kind = struct.unpack(">I", raw[at : at + 4]), raw[at + 4 : at + 8]
        body = raw[at + 8 : at + 8 + length]
        header = body if kind == b"IHDR" else header
        parts += [body] if kind == b"IDAT" else []
        at += 12 + length
    width, height, depth, colour = struct.unpack(">IIBB", header[:10])
    assert (depth, colour) in {(8, 2), (8, 6)}, "an 8-bit RGB or RGBA PNG"
    channels = 3 if colour == 2 else 4
    lines = np.frombuffer(zlib.decompress(b"".join(parts)), np.uint8).reshape(height, 1 + width * channels)
    return _unfiltered(lines, channels).reshape(height, width, channels)[..., :3]


@njit(cache=True)
def _unfiltered(lines, step):
    """PNG, section 9: a byte is stored less its left or upper neighbour, their mean, or Paeth's choice."""
    out = np.zeros((lines.shape[0], lines.shape[1] - 1), np.uint8)
    for y in range(out.shape[0]):
        kind = lines[y, 0]
        for x in range(out.shape[1]):
            left = np.int64(out[y, x - step]) if x >= step else 0
            above = np.int64(out[y - 1, x]) if y else 0
            corner = np.int64(out[y - 1, x - step]) if y and x >= step else 0
            guess = 0
            if kind == 1:
                guess = left
            elif kind == 2:
                guess = above
            elif kind == 3:
                guess = (left + above) // 2
            elif kind == 4:
                to_left, to_above = abs(above - corner), abs(left - corner)
                to_corner = abs(left + above - 2 * corner)
                if to_left <= to_above and to_left <= to_corner:
                    guess = left
                else:
                    guess = above if to_above <= to_corner else corner
            out[y, x] = (np.int64(lines[y, 1 + x]) + guess) & 255
    return out
