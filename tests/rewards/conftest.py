import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from egspo_lightning.rewards.grading import MathGrader


@pytest.fixture(scope="module")
def grader() -> Iterator[MathGrader]:
    with MathGrader(num_workers=2, deadline_s=1.0) as grader:
        yield grader


@pytest.fixture(scope="module")
def patient_grader() -> Iterator[MathGrader]:
    """A grader whose deadline is not reached."""
    with MathGrader(deadline_s=60.0) as grader:
        yield grader


@pytest.fixture
def wait_until_gone() -> Callable[[list[int]], None]:
    def wait(pids: list[int], timeout_s: float = 5.0) -> None:
        limit = time.monotonic() + timeout_s
        while alive := [pid for pid in pids if _is_alive(pid)]:
            assert time.monotonic() < limit, f"still there: {alive}"
            time.sleep(0.02)

    return wait


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    try:  # a zombie counts as gone
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return not Path("/proc").is_dir()
