"""Chromium without a window, spoken to through a pipe; no package is needed for that."""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip
LIMIT = 30  # seconds without a word


def found() -> str:
    """The browser on PATH; without one, an exit with a sentence."""
    for name in NAMES:
        if path := shutil.which(name):
            return path
    sys.exit(f"the site is looked at in a browser, and PATH has none of {', '.join(NAMES)}. Install one: apt install chromium")


class Browser:
    """One page of a browser: commands of the DevTools protocol, and the events that came meanwhile."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read = write, read
        self._number, self._buffer = 0, b""
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.do("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.do("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.do(f"{domain}.enable")

    def do(self, method: str, **params: Any) -> dict[str, Any]:
        """The answer to a command."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self.events.append(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], LIMIT)[0]:
                raise RuntimeError(f"the browser was silent for {LIMIT} seconds")
            got = os.read(self._read, 1 << 16)
            if not got:
                raise RuntimeError("the browser has ended")
            self._buffer += got
        line, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(line)

    def look(self, width: int, height: int, scheme: str) -> None:
        """The size of the window, and whether the reader likes it ``"light"`` or ``"dark"``."""
        self.do("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.do("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def go(self, url: str) -> list[dict[str, Any]]:
        """Load a page, and return the events of that."""
        self.events.clear()
        self.do("Page.navigate", url=url)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())
        self.ask("new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))")
        return list(self.events)

    def ask(self, script: str) -> Any:
        """The value of a script in the page."""
        answer = self.do("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["text"])
        return answer["result"].get("value")

    def picture(self, path: Path, *, whole: bool = False) -> None:
        """A PNG of what is seen, or of the whole page."""
        data = self.do("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(data))


@contextmanager
def opened() -> Iterator[Browser]:
    """A browser with an empty profile, ended afterwards."""
    program = found()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        theirs_read, ours_write = os.pipe()
        ours_read, theirs_write = os.pipe()
        # Chromium reads commands from descriptor 3 and writes answers to 4.
        command = f'exec "$0" "$@" 3<&{theirs_read} 4>&{theirs_write}'
        process = subprocess.Popen(  # noqa: S603 (a browser, found by name)
            ["/bin/bash", "-c", command, program, *QUIET, f"--user-data-dir={profile}"],
            pass_fds=(theirs_read, theirs_write),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_read)
        os.close(theirs_write)
        try:
            browser = Browser(ours_write, ours_read)
            yield browser
            browser.do("Page.close")
        finally:
            process.terminate()
            process.wait(LIMIT)
