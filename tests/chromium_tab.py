"""One real headless Chromium driven over a pipe: pages with keys, clicks, media features and window sizes."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import time
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from chromium import chromium

_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-default-apps",
    "--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND", "--force-color-profile=srgb",
    "--remote-debugging-pipe", "about:blank",
)  # fmt: skip
_TO, _FROM = 3, 4  # where Chromium reads commands and writes answers
_SECONDS = 120
_KEYS = {"Tab": (9, ""), "Enter": (13, "\r"), " ": (32, " "), "Escape": (27, "")}


class Browser:
    """A browser process; a context manager."""

    def __init__(self) -> None:
        self._profile = tempfile.mkdtemp()
        command = [chromium(), f"--user-data-dir={self._profile}", *_FLAGS]
        (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
        high = [fcntl.fcntl(one, fcntl.F_DUPFD_CLOEXEC, 64) for one in (theirs_in, theirs_out)]
        nothing = os.open(os.devnull, os.O_RDWR)
        actions = [(os.POSIX_SPAWN_DUP2, nothing, fd) for fd in (0, 1, 2)]
        actions += [(os.POSIX_SPAWN_DUP2, fd, to) for fd, to in zip(high, (_TO, _FROM), strict=True)]
        self._process = os.posix_spawn(command[0], command, os.environ, file_actions=actions, setpgroup=0)
        for fd in (theirs_in, theirs_out, nothing, *high):
            os.close(fd)
        self._in, self._out, self._rest, self._last = ours_in, ours_out, b"", 0
        self.events: deque[dict[str, Any]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._out)
        os.close(self._in)
        os.killpg(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)
        shutil.rmtree(self._profile, ignore_errors=True)

    def open(self, page: Path, **options: Any) -> Tab:
        """Open a page, with the options of `Tab`, and wait until it is loaded."""
        return Tab(self, page, **options)

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Send a command of the DevTools protocol and return its result; events go to `events`."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        data = json.dumps(message if session is None else message | {"sessionId": session}).encode() + b"\0"
        while data:
            data = data[os.write(self._out, data) :]
        while True:
            found = self.read()
            if found.get("id") == self._last:
                assert "error" not in found, f"{method}: {found['error']}"
                result: dict[str, Any] = found["result"]
                return result

    def read(self) -> dict[str, Any]:
        """Return the next message; an event is kept too."""
        until = time.monotonic() + _SECONDS
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], max(0, until - time.monotonic()))
            part = os.read(self._in, 1 << 20) if ready else b""
            assert part, "Chromium ended, or says nothing"
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(line)
        if "method" in found:
            self.events.append(found)
        return found


class Tab:
    """One page: what it logs (`console`), what it asks for (`requests`), and ways to use it."""

    def __init__(
        self,
        browser: Browser,
        page: Path,
        *,
        size: tuple[int, int] = (1280, 900),
        mobile: bool = False,
        media: dict[str, str] | None = None,
    ) -> None:
        self._browser = browser
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._target = target
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self._mobile = mobile
        self.resize(*size)
        self.prefer(media or {"prefers-color-scheme": "light"})
        self.call("Page.navigate", url=page.resolve().as_uri())
        self._url = page.resolve().as_uri()
        while not any(one["method"] == "Page.loadEventFired" for one in self._events()):
            browser.read()

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command to the page."""
        return self._browser.call(method, self._session, **params)

    def prefer(self, features: dict[str, str], kind: str = "") -> None:
        """Have media features, and `print` or `screen`."""
        named = [{"name": name, "value": value} for name, value in features.items()]
        self.call("Emulation.setEmulatedMedia", media=kind, features=named)
        self.do("new Promise(done => setTimeout(done, 50))")  # the page hears of it by an event

    def resize(self, width: int, height: int) -> None:
        """Give the window another size in CSS pixels, and the page time to follow."""
        options = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": self._mobile}
        self.call("Emulation.setDeviceMetricsOverride", **options)
        self.do("new Promise(done => setTimeout(done, 150))")

    def do(self, script: str) -> Any:
        """Return the JSON value of an expression, after all promises."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def press(self, *keys: str) -> None:
        """Press keys as a keyboard does; `Shift+Tab` is Tab with Shift."""
        for given in keys:
            key = given.removeprefix("Shift+")
            code, text = _KEYS.get(key, (0, key))
            more = {"modifiers": 8 if key != given else 0, "key": key, "windowsVirtualKeyCode": code}
            kind = "keyDown" if text else "rawKeyDown"
            self.call("Input.dispatchKeyEvent", type=kind, code=key, text=text, **more)
            self.call("Input.dispatchKeyEvent", type="keyUp", code=key, **more)

    def click(self, x: float, y: float) -> None:
        """Move the mouse to a place of the window and click."""
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            pressed = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **pressed)

    def screenshot(self, path: Path, *, whole: bool = False) -> Path:
        """Write a PNG of the window, or of the whole page."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=whole, **self._clip(whole))
        path.write_bytes(base64.b64decode(found["data"]))
        return path

    def _clip(self, whole: bool) -> dict[str, Any]:
        if not whole:
            return {}
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}

    @property
    def console(self) -> list[str]:
        """What the page logged, threw or was refused."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(one["params"])[:400] for one in self._events() if one["method"] in kinds]

    @property
    def requests(self) -> list[str]:
        """What the page asked for beside itself; data within it is no request."""
        events = [one for one in self._events() if one["method"] == "Network.requestWillBeSent"]
        urls = [str(one["params"]["request"]["url"]) for one in events]
        return [url for url in urls if url != self._url and not url.startswith(("data:", "blob:"))]

    def close(self) -> None:
        """Close the page."""
        self._browser.call("Target.closeTarget", targetId=self._target)

    def _events(self) -> list[dict[str, Any]]:
        return [one for one in self._browser.events if one.get("sessionId") == self._session]
