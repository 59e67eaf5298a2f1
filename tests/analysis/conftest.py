"""Real runs with records of three collections, and a real browser, driven by the WebDriver protocol (W3C)."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger

from egspo_lightning.analysis.reading import Records, load
from egspo_lightning.callbacks import TokenRecords
from egspo_lightning.ops.gate import OpenGate

OPTIONS = {"initial_stage": "egspo"}


def train(tiny_run, folder: Path, **module) -> Path:
    run = tiny_run(
        TokenRecords(every_n_collections=1),
        module=OPTIONS | module,
        trainer={"max_epochs": 3, "logger": CSVLogger(folder, name=None, version="run")},
    ).fit()
    return Path(run.trainer.log_dir)


@pytest.fixture
def log_dir(tiny_run, tmp_path) -> Path:
    return train(tiny_run, tmp_path / "gated")


@pytest.fixture
def open_log_dir(tiny_run, tmp_path) -> Path:
    return train(tiny_run, tmp_path / "open", gate=OpenGate())


@pytest.fixture
def records(log_dir) -> Records:
    return load({"gated": log_dir})


@pytest.fixture
def two_runs(log_dir, open_log_dir) -> Records:
    return load({"gated": log_dir, "open": open_log_dir})


ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--window-size=1200,900",
]
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
"""The key of an element's reference, fixed by the standard."""


class Browser:
    """One session with one page."""

    def __init__(self, address: str) -> None:
        self.address = address

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.address}{path}", data, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, page: Path) -> None:
        self.call("POST", "/url", {"url": page.as_uri()})

    def run(self, script: str, *arguments: Any) -> Any:
        return self.call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def find(self, selector: str) -> dict[str, str]:
        return self.call("POST", "/element", {"using": "css selector", "value": selector})

    def point_at(self, element: dict[str, str]) -> None:
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        move = {"type": "pointerMove", "duration": 0, "x": 0, "y": 0, "origin": element}
        self.call("POST", "/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": [move]}]})

    def screenshot(self) -> str:
        """PNG in base64."""
        return self.call("GET", "/screenshot")


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    """Chromium with an empty profile; skips where it is not installed."""
    driver = shutil.which("chromedriver")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if driver is None or chromium is None:
        pytest.skip("needs a browser: apt-get install chromium chromium-driver")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        session = Browser(f"http://127.0.0.1:{port}")
        options = {"args": [*ARGUMENTS, f"--user-data-dir={tmp_path / 'profile'}"], "binary": chromium}
        started = _start(session, {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}})
        session.address += f"/session/{started['sessionId']}"
        yield session
        session.call("DELETE", "")
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def _start(session: Browser, capabilities: dict[str, Any]) -> Any:
    deadline = time.monotonic() + 60
    while True:
        try:
            return session.call("POST", "/session", capabilities)
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode()) from error
        except urllib.error.URLError:  # it does not listen yet
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
