"""Headless Chromium and TensorBoard for tests and screenshots, driven by the WebDriver protocol (W3C)."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
]
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
"""The key of an element's reference, fixed by the standard."""
SECONDS_TO_START = 60

ALL_TEXT = """
const texts = [];
const walk = node => {
  if (node.nodeType === Node.TEXT_NODE) texts.push(node.textContent);
  if (node.shadowRoot) walk(node.shadowRoot);
  for (const child of node.childNodes) if (!['STYLE', 'SCRIPT'].includes(child.nodeName)) walk(child);
};
walk(document.body);
return texts.join(' ').replace(/\\s+/g, ' ');
"""
"""JavaScript that returns all text of a page, including the text of web components, which TensorBoard uses."""


class Browser:
    """A WebDriver session with one page."""

    def __init__(self, address: str) -> None:
        self.address = address

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Send one WebDriver command and return its value."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.address}{path}", data, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, page: Path | str) -> None:
        """Load a file or an address."""
        self.call("POST", "/url", {"url": page.as_uri() if isinstance(page, Path) else page})

    def run(self, script: str, *arguments: Any) -> Any:
        """Run a script in the page and return its result."""
        return self.call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def find(self, selector: str) -> dict[str, str]:
        """Return the first element that matches a CSS selector."""
        return self.call("POST", "/element", {"using": "css selector", "value": selector})

    def point_at(self, element: dict[str, str]) -> None:
        """Move the mouse pointer onto an element."""
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        move = {"type": "pointerMove", "duration": 0, "x": 0, "y": 0, "origin": element}
        self.call("POST", "/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": [move]}]})

    def wait_for(self, *texts: str, seconds: float = 60) -> str:
        """Return all text of the page once it contains the given texts.

        Raises:
            TimeoutError: a text does not appear in time.
        """
        deadline = time.monotonic() + seconds
        while True:
            found = self.run(ALL_TEXT)
            missing = [text for text in texts if text not in found]
            if not missing:
                return found
            if time.monotonic() > deadline:
                raise TimeoutError(f"The page does not show {missing}, but: {found[:2000]}")
            time.sleep(0.2)

    def screenshot(self) -> str:
        """Return the page as a PNG in base64."""
        return self.call("GET", "/screenshot")


def missing_browser() -> str | None:
    """Return what must be installed to run a browser, or None."""
    if shutil.which("chromedriver") is None or _chromium() is None:
        return "needs a browser: apt-get install chromium chromium-driver"
    return None


@contextmanager
def chromium(profile: Path, *, width: int = 1200, height: int = 900) -> Iterator[Browser]:
    """Start Chromium with an empty profile and a page of ``width`` by ``height`` pixels.

    Raises:
        RuntimeError: Chromium does not start.
    """
    port = _free_port()
    with _process([shutil.which("chromedriver") or "chromedriver", f"--port={port}"]):
        session = Browser(f"http://127.0.0.1:{port}")
        arguments = [*ARGUMENTS, f"--window-size={width},{height}", f"--user-data-dir={profile}"]
        options = {"args": arguments, "binary": _chromium()}
        started = _start(session, {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}})
        session.address += f"/session/{started['sessionId']}"
        yield session
        session.call("DELETE", "")


@contextmanager
def tensorboard(log_dir: Path) -> Iterator[str]:
    """Start TensorBoard on a folder; yields its address when it responds."""
    port = _free_port()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(log_dir), "--host=127.0.0.1", f"--port={port}"]
    with _process(command):
        address = f"http://127.0.0.1:{port}"
        _until(lambda: urllib.request.urlopen(f"{address}/data/environment", timeout=60).close())
        yield address


@contextmanager
def _process(command: list[str]) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _start(session: Browser, capabilities: dict[str, Any]) -> Any:
    try:
        return _until(lambda: session.call("POST", "/session", capabilities))
    except urllib.error.HTTPError as error:
        raise RuntimeError(error.read().decode()) from error


def _until(attempt: Any) -> Any:
    """Repeat an attempt until the server responds, and return its result."""
    deadline = time.monotonic() + SECONDS_TO_START
    while True:
        try:
            return attempt()
        except urllib.error.HTTPError:
            raise
        except urllib.error.URLError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
