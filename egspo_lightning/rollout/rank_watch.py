"""Rank watchdog: ends this process where another rank has died and this one waits for it.

A rank that waits for its peer in C++ or on a GPU runs no Python code, so it raises no error and handles no SIGTERM. A
thread of its own watches the others.
"""

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

GRACE_S = 3.0
"""Time in which the launcher, or an error of this rank, may end the run with a better message."""
_LOOK_EVERY_S = 1.0


def num_ranks() -> int:
    """Number of ranks; 1 without a process group."""
    has_group = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if has_group else 1


def gather(value: Any, group: Any = None) -> list[Any]:
    """Gather one picklable value from each rank of a process group. Collective."""
    found = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(found, value, group=group)
    return found


def processes_here() -> list[int]:
    """Process ids of the ranks that run on this machine. Collective."""
    machine = socket.gethostname()
    return [process for other, process in gather((machine, os.getpid())) if other == machine]


@contextmanager
def watched(processes: Sequence[int], grace_s: float = GRACE_S) -> Iterator[None]:
    """End this process with exit code 1 if another one ends within the block, and the block does not end soon after.

    Args:
        processes: ids of processes on this machine, of which none may end before it leaves its own block
        grace_s: seconds that the block has left then
    """
    if set(processes) <= {os.getpid()}:
        yield
        return
    from psutil import Process  # vLLM depends on it

    others, left = [Process(process) for process in processes if process != os.getpid()], threading.Event()
    threading.Thread(target=_watch, args=(others, left, grace_s), name="rank-watch", daemon=True).start()
    try:
        yield
    finally:
        left.set()


def _watch(others: Sequence[Any], left: threading.Event, grace_s: float) -> None:
    while not (ended := [other.pid for other in others if _has_ended(other)]):
        if left.wait(_LOOK_EVERY_S):
            return
    if left.wait(grace_s):
        return
    _end(
        f"A rank of this run has ended (process {ended[0]}) while another one (process {os.getpid()}) needed it for "
        "sampling with vLLM. The other one ends too."
    )


@contextmanager
def deadline(seconds: float, message: str) -> Iterator[None]:
    """End this process with a message and exit code 1 if the block takes longer, even where it waits in C++."""
    timer = threading.Timer(seconds, _end, [message])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _end(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
    os._exit(1)


def _has_ended(process: Any) -> bool:
    from psutil import STATUS_ZOMBIE, NoSuchProcess

    try:
        return not process.is_running() or process.status() == STATUS_ZOMBIE
    except NoSuchProcess:
        return True


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end this process at once within the block, even where it waits in C++.

    Lightning's handler would begin a collective operation in the middle of another one, and the ranks would hang.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
