"""The processes behind the grader: a warm parent that imports math-verify once, and the graders it forks.

Run as ``python -m egspo_lightning.rewards._worker_main FD``, where FD is a socket to the client. Each request
carries the socket of a new grader and that grader's limits; the reply is the grader's pid. When the client
has closed the socket or has died, the parent ends its graders and itself.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import resource
import signal
import socket
import sys
import time

from egspo_lightning.rewards import _verify
from egspo_lightning.rewards._wire import receive_frame, send_frame

_GARBAGE = (20_000, 10, 10)
"""Objects that may await a collection, some megabytes; the default of 700 is met several times a parse."""


def main(control_fd: int) -> None:
    """Fork graders on request until the client is gone."""
    control = socket.socket(fileno=control_fd)
    logging.disable(logging.CRITICAL)  # math-verify warns that its own timeouts are off, as they must be here
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    _verify.warm_up()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GARBAGE)
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 4096, 1)
        if not message:
            break
        pid = os.fork()
        if pid == 0:
            control.close()
            _grade_until_end(socket.socket(fileno=descriptors[0]), **json.loads(message))
        os.close(descriptors[0])
        send_frame(control, {"pid": pid})
    _end_graders()


def _end_graders() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)  # this process leads the group of its graders
    with contextlib.suppress(ChildProcessError):  # with SIGCHLD ignored, raised when the last one has gone
        os.wait()


def _grade_until_end(client: socket.socket, deadline_s: float, memory_limit_mb: int) -> None:
    try:
        _limit(memory_limit_mb)
        while (request := receive_frame(client)) is not None:
            # The default action of SIGALRM ends the process also inside C code, where no handler would run.
            signal.setitimer(signal.ITIMER_REAL, deadline_s)
            reply = _verify.grade(**request)
            signal.setitimer(signal.ITIMER_REAL, 0)
            send_frame(client, {**reply, "finished": time.monotonic()})
    finally:  # also out of memory: an end without a reply is how the client learns of it
        os._exit(0)


def _limit(memory_limit_mb: int) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError):  # macOS has no such limit; the deadline still holds
        resource.setrlimit(resource.RLIMIT_AS, (memory_limit_mb * 2**20,) * 2)


if __name__ == "__main__":
    main(int(sys.argv[1]))
