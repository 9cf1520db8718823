"""A headless Chromium, driven over the DevTools protocol by the pipe that it opens for it."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE_S = 30.0
_FLAGS = (
    *("--headless=new", "--remote-debugging-pipe", "--no-first-run", "--no-default-browser-check"),
    *("--disable-gpu", "--disable-extensions", "--disable-background-networking", "--mute-audio"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
    *("--hide-scrollbars", "--lang=en"),
)

_EXEC = """
import os, sys
for where, given in enumerate(sys.argv[1:3], start=3):
    os.dup2(int(given), where)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Becomes the browser, with its pipes at the numbers where it looks for them."""


def found_browser() -> str | None:
    """The path of a Chromium; None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Navigated(Exception):
    """The page has changed while a script ran in it."""


class Page:
    """A tab.

    Attributes:
      events: of the protocol, in order: (method, parameters).
    """

    def __init__(self, browser: "Browser", session: str) -> None:
        self._browser, self._session = browser, session
        self.events = browser.events.setdefault(session, [])
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the protocol."""
        return self._browser.call(method, self._session, **params)

    def show(self, width: int, height: int, scheme: str = "light") -> None:
        """Let the window be of so many pixels, and the color scheme "light" or "dark"."""
        phone = width < 500
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=phone,
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def open(self, url: str) -> None:
        """Go to a URL."""
        self.call("Page.navigate", url=url)

    def value(self, expression: str) -> Any:
        """What an expression of JavaScript gives; a promise is awaited.

        Raises:
          AssertionError: it throws.
        """
        asked: dict[str, Any] = {"awaitPromise": True, "returnByValue": True, "userGesture": True}
        given = self.call("Runtime.evaluate", expression=expression, **asked)
        assert "exceptionDetails" not in given, given["exceptionDetails"]
        return given["result"].get("value")

    def until(self, expression: str, within_s: float = PATIENCE_S) -> Any:
        """Wait until an expression is true; its value."""
        script = f"""new Promise((done, late) => {{
            const end = performance.now() + {within_s * 1e3};
            const look = () => {{
                let value;
                try {{ value = {expression}; }} catch (error) {{ value = null; }}
                if (value) done(value);
                else if (performance.now() > end) late(document.body.innerText);
                else setTimeout(look, 20);
            }};
            look();
        }})"""
        while True:
            with suppress(Navigated):  # it was asked of the page before
                return self.value(script)

    def press(self, key: str, **more: Any) -> None:
        """Press a key and let it go."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, **more)

    def type(self, text: str) -> None:
        """Type a text into what has the focus."""
        self.call("Input.insertText", text=text)

    def picture(self, path: Path) -> None:
        """Write what is seen as a PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def of(self, method: str) -> list[dict[str, Any]]:
        """The parameters of all events of a kind."""
        return [params for name, params in self.events if name == method]

    def complaints(self) -> list[str]:
        """What the console shows as errors or warnings."""
        logged = [each["entry"] for each in self.of("Log.entryAdded")]
        said = self.of("Runtime.consoleAPICalled")
        return [
            *(each["text"] for each in logged if each["level"] in ("error", "warning")),
            *(str(each["args"]) for each in said if each["type"] in ("error", "warning")),
            *(str(each["exceptionDetails"]) for each in self.of("Runtime.exceptionThrown")),
        ]


class Browser:
    """A running Chromium.

    Attributes:
      events: of the protocol, by session.
    """

    def __init__(self, path: str, folder: Path) -> None:
        commands, to_browser = map(_above_those_of_the_browser, os.pipe())
        from_browser, answers = map(_above_those_of_the_browser, os.pipe())
        flags = [*_FLAGS, f"--user-data-dir={folder}"]
        if os.geteuid() == 0:
            flags.append("--no-sandbox")  # Chromium refuses to run as root with it
        self._process = subprocess.Popen(
            [sys.executable, "-c", _EXEC, str(commands), str(answers), path, *flags, "about:blank"],
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self._to, self._from = to_browser, from_browser
        self._unread, self._number = b"", 0
        self.events: dict[str, list[tuple[str, dict[str, Any]]]] = {}

    def page(self) -> Page:
        """A new tab, without cookies or a cache of others."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        return Page(self, attached["sessionId"])

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """A command of the protocol; events that come meanwhile are kept."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                error = answer.get("error")
                if error is not None and "navigated" in error["message"]:
                    raise Navigated(error)
                assert error is None, (method, error)
                return answer["result"]
            if "method" in answer:
                of_session = self.events.setdefault(answer.get("sessionId", ""), [])
                of_session.append((answer["method"], answer["params"]))

    def close(self) -> None:
        """End it."""
        try:
            self.call("Browser.close")
            self._process.wait(PATIENCE_S)
        finally:
            self._process.kill()
            self._process.wait()
            os.close(self._to)
            os.close(self._from)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._from], [], [], 2 * PATIENCE_S)
            piece = os.read(self._from, 1 << 20) if ready else b""
            assert piece, "the browser is silent, or has ended"
            self._unread += piece
        message, _, self._unread = self._unread.partition(b"\0")
        return json.loads(message)


def _above_those_of_the_browser(descriptor: int) -> int:
    """The same file under a number that is neither 3 nor 4."""
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(descriptor)
    return moved


@contextmanager
def browser(path: str, folder: Path) -> Iterator[Browser]:
    """A browser that ends with the block; `folder` is for its files."""
    made = Browser(path, folder)
    try:
        yield made
    finally:
        made.close()
