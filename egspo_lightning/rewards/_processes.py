"""Process handles of the grader: the warm parent process, and the workers that it forks."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

_START_S = 120.0
_END_S = 0.3
"""Time that the parent has to end by itself when its client is gone. It needs longer while it imports sympy."""


@dataclass(eq=False)
class Worker:
    """The client's end of one forked worker."""

    connection: Connection
    pid: int
    number: int = -1
    """Index of its request."""
    started: float = 0.0
    """When the request was sent, on the monotonic clock."""

    def kill(self) -> None:
        """Kill the process, whatever it does."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


class WarmParent:
    """A process that has imported math-verify and forks workers. It ends with its client, and its workers with it."""

    def __init__(self, deadline_s: float, memory_limit_mb: int) -> None:
        self._timeout_s = deadline_s + 1.0
        self._control, theirs = socket.socketpair()
        self._control.settimeout(_START_S)
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        arguments = [str(theirs.fileno()), str(float(deadline_s)), str(int(memory_limit_mb))]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "egspo_lightning.rewards._worker_main", *arguments],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                # sympy orders terms by their hashes: the same seed gives the same verdict
                env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0"},
                start_new_session=True,  # Ctrl-C in the terminal is for the client alone
            )
        self.pid = self._process.pid

    def fork(self) -> Worker | None:
        """Fork a new worker. Returns None where the parent has ended."""
        ours, theirs = socket.socketpair()
        # A worker that is stopped neither reads nor writes. It must not block the client.
        timeout = struct.pack("ll", int(self._timeout_s), int(self._timeout_s % 1 * 1e6))
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
        with ours, theirs:
            try:
                socket.send_fds(self._control, [b"fork"], [theirs.fileno()])
                pid = self._control.recv(32)
            except OSError:
                return None
            except BaseException:  # Ctrl-C: a later request must not read this reply
                self._control.close()
                raise
            return Worker(Connection(ours.detach()), int(pid)) if pid else None

    def end(self) -> int:
        """End the parent and its workers within a second; may be called again. Returns the parent's exit code."""
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)  # wakes a thread that waits for it; closing does not
        try:
            return self._process.wait(timeout=_END_S)
        except subprocess.TimeoutExpired:
            os.killpg(self.pid, signal.SIGKILL)  # the group holds the workers, too, even stopped ones
            return self._process.wait()
        finally:
            self._control.close()

    def leave(self) -> None:
        """Forget the process, in a forked child: it belongs to the process that forked the child."""
        self._control.close()
        self._process.returncode = 0
