"""Main program of the grader's processes: a warm parent that imports math-verify once, and the workers it forks.

Run as ``python -m egspo_lightning.rewards._worker_main FD DEADLINE_S MEMORY_LIMIT_MB``. FD is a socket to the client.
Each message on it carries the socket of a new worker, and the reply is the worker's pid. When the client closes FD or
dies, the parent ends its workers and itself.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import resource
import signal
import socket
import sys
import time
from multiprocessing.connection import Connection

from egspo_lightning.rewards import _verify

_GARBAGE = (20_000, 10, 10)
"""Thresholds of the garbage collector. A parse exceeds the default of 700 objects several times."""


def main(control_fd: int, deadline_s: float, memory_limit_mb: int) -> None:
    """Fork workers on request until the client is gone."""
    control = socket.socket(fileno=control_fd)
    logging.disable(logging.CRITICAL)  # math-verify warns that its own timeouts are off
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    _verify.warm_up()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GARBAGE)
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 32, 1)
        if not message:
            break
        pid = os.fork()
        if pid == 0:
            control.close()
            _grade_until_end(Connection(descriptors[0]), deadline_s, memory_limit_mb)
        os.close(descriptors[0])
        control.sendall(str(pid).encode())
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)  # this process leads the group of its workers
    with contextlib.suppress(ChildProcessError):  # with SIGCHLD ignored, raised when the last one has ended
        os.wait()


def _grade_until_end(client: Connection, deadline_s: float, memory_limit_mb: int) -> None:
    try:
        _limit(memory_limit_mb)
        while True:
            request = client.recv()
            started = time.monotonic()
            # The default action of SIGALRM ends the process even inside C code, where no handler would run.
            signal.setitimer(signal.ITIMER_REAL, deadline_s)
            correct, extracted = _verify.grade(*request)
            signal.setitimer(signal.ITIMER_REAL, 0)
            client.send((correct, extracted, time.monotonic() - started))
    finally:  # also out of memory: the client takes an end without a reply for a crash
        os._exit(0)


def _limit(memory_limit_mb: int) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the parent has no other stream
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError):  # macOS has no such limit; the deadline still holds
        resource.setrlimit(resource.RLIMIT_AS, (memory_limit_mb * 2**20,) * 2)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
