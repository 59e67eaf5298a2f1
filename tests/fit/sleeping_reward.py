"""Reward that sleeps for minutes."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path


class Sleeping:
    """Creates FOLDER/asleep and sleeps; with ``only_ahead`` only in the thread that samples ahead."""

    def __init__(self, folder: str, only_ahead: bool = False) -> None:
        self.folder, self.only_ahead = Path(folder), only_ahead

    def __call__(self, completions: Sequence[str], golds: Sequence[str]) -> list[float]:
        if self.only_ahead and threading.current_thread() is threading.main_thread():
            return [float(len(text) % 2) for text in completions]
        (self.folder / "asleep").touch()
        time.sleep(300)
        return [0.0 for _ in completions]
