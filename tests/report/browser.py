"""Headless Chromium, where it is installed, spoken to over its own debugging pipe."""

from __future__ import annotations

import base64
import json
import os
import select
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
_PATIENCE = 600  # seconds for one answer: only what hangs takes so long


class Browser:
    """One page of a browser.

    Attributes:
        console: Every message on the page's console, uncaught errors included.
        requests: Every address that the page asked for.
    """

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self.console: list[str] = []
        self.requests: list[str] = []
        self._pipes = to_browser, from_browser
        self._read = b""
        self._last = 0
        self._session = ""
        target = self.command("Target.createTarget", url="about:blank")["targetId"]
        found = self.command("Target.attachToTarget", targetId=target, flatten=True)
        self._session = found["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.command(f"{domain}.enable")

    def command(self, method: str, **parameters: Any) -> Any:
        """The answer to a command of the Chrome DevTools protocol."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._pipes[0], json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._last:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            self._note(answer)

    def open(self, address: str) -> None:
        """Load a page to its end."""
        self.command("Page.navigate", url="about:blank")
        self.command("Page.navigate", url=address)
        self.wait_until(
            f"document.readyState + location.href == {json.dumps('complete' + address)}"
        )

    def js(self, script: str, *arguments: Any) -> Any:
        """The value that the body of a function returns; it may use `arguments`."""
        call = f"(function () {{ {script} }}).apply(null, {json.dumps(list(arguments))})"
        found = self.command("Runtime.evaluate", expression=call, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait_until(self, condition: str) -> None:
        """Wait until an expression is true, however busy the machine is."""
        deadline = time.monotonic() + _PATIENCE
        while not self.js(f"return {condition}"):
            assert time.monotonic() < deadline, f"never true: {condition}"
            time.sleep(0.05)

    def resize(self, width: int, height: int = 900) -> None:
        """Set the size of the page, which may be narrower than a window can be."""
        self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        # figures follow a frame later
        wait = "new Promise(r => requestAnimationFrame(() => setTimeout(r, 400)))"
        self.command("Runtime.evaluate", expression=wait, awaitPromise=True)

    def screenshot(self) -> bytes:
        """What is on the screen, as PNG."""
        found = self.command("Page.captureScreenshot")
        return base64.b64decode(found["data"])

    def pdf(self) -> bytes:
        """The page as it is printed."""
        return base64.b64decode(self.command("Page.printToPDF", landscape=True)["data"])

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._read:
            ready, _, _ = select.select([self._pipes[1]], [], [], _PATIENCE)
            assert ready, "the browser does not answer"
            part = os.read(self._pipes[1], 1 << 20)
            assert part, "the browser has ended"
            self._read += part
        text, _, self._read = self._read.partition(b"\0")
        answer: dict[str, Any] = json.loads(text)
        return answer

    def _note(self, event: dict[str, Any]) -> None:
        method, found = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(found["request"]["url"])
        elif method == "Runtime.consoleAPICalled":
            self.console.append(str(found["args"]))
        elif method == "Runtime.exceptionThrown":
            self.console.append(str(found["exceptionDetails"]))
        elif method == "Log.entryAdded":
            self.console.append(found["entry"]["text"])


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A fresh browser; skips the test where there is none."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("chromium is not installed")
    reads, to_browser = os.pipe()
    from_browser, writes = os.pipe()
    # Chromium reads commands from descriptor 3 and answers on 4, which the pipes may hold already
    join = f"exec {program} {' '.join(_ARGUMENTS)} --user-data-dir={shlex.quote(str(profile))}"
    process = subprocess.Popen(
        ["bash", "-c", f"exec 8<&{reads} 9>&{writes}; exec 3<&8 4>&9 8<&- 9>&-; {join}"],
        pass_fds=(reads, writes),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(reads)
    os.close(writes)
    try:
        yield Browser(to_browser, from_browser)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for descriptor in (to_browser, from_browser):
            os.close(descriptor)
