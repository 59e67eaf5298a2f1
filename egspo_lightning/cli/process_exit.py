"""How ranks end: when one fails, those of its machine with it, which in a collective would wait for half an hour."""

import atexit
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch

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


def leave(code: int) -> None:
    """End a rank whose run has ended as it should, without taking the interpreter down; any other process goes on.

    Threads of torch's backends may still hold objects of Python by then, and would abort the process: the run would
    seem to have crashed, and torchrun would end the other ranks.

    Args:
        code: The exit code.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    torch.distributed.destroy_process_group()
    threading._shutdown()  # type: ignore[attr-defined]  # as the interpreter does, first of all
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
