"""Process exit of ranks: a failing rank ends the others on its machine, which may wait in a collective."""

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
"""Time from SIGTERM, which a rank inside a collective does not handle, to SIGKILL."""


def end_other_ranks(trainer: Any) -> None:
    """End the ranks that this process started; torchrun and SLURM end the ranks that they started."""
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
    """Exit the process of a rank after a successful run, without finalizing the interpreter; otherwise do nothing.

    Threads of torch's backends may still hold Python objects, and would abort the process during finalization. The run
    would seem to have crashed, and torchrun would end the other ranks.

    Args:
        code: The exit code.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    torch.distributed.destroy_process_group()
    threading._shutdown()  # type: ignore[attr-defined]  # the interpreter's own first step at exit
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
