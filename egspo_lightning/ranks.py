"""Ends the other ranks of this machine when this one fails: in a collective they would wait for it for half an hour."""

import signal
import subprocess
import time
from collections.abc import Sequence
from typing import Any

SECONDS_TO_END = 10.0
"""From SIGTERM, which a rank in a collective does not hear, to SIGKILL."""


def end_other_ranks(trainer: Any) -> None:
    """End those that this process has started; ranks started by torchrun or SLURM are ended by these."""
    started: Sequence[subprocess.Popen[bytes]] = getattr(trainer.strategy.launcher, "procs", ())
    alive = [process for process in started if process.poll() is None]
    for process in alive:
        process.send_signal(signal.SIGTERM)
    until = time.monotonic() + SECONDS_TO_END
    for process in alive:
        try:
            process.wait(max(until - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
