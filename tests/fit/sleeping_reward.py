"""A reward that takes its time."""

import time
from collections.abc import Sequence
from pathlib import Path


class Sleeping:
    """Sleeps for minutes; FOLDER/asleep says that it does."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def __call__(self, completions: Sequence[str], golds: Sequence[str]) -> list[float]:
        (self.folder / "asleep").touch()
        time.sleep(300)
        return [0.0 for _ in completions]
