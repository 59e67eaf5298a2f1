"""Process handles of the grader: the warm parent process, and the workers that it forks.

All of them end with the client, however it ends. `Processes.close` ends them within a second, whatever they do.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_START_S = 120.0
_END_S = 0.3
"""Time that the parent has to end by itself when its client is gone. It needs longer while it imports sympy."""


@dataclass(eq=False)
class Worker:
    """The client's end of one forked worker. A busy worker has one request."""

    connection: Connection
    pid: int
    number: int = -1
    """Index of its request."""
    started: float = 0.0
    """When the request was sent, on the monotonic clock."""

    def send(self, request: Any) -> None:
        """Send a request.

        Raises:
            OSError: the worker has ended, or it is stopped and reads nothing.
        """
        self.connection.send(request)

    def receive(self) -> Any:
        """Return the reply, or None where the worker has ended without one."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            return None

    def kill(self) -> None:
        """Kill the process. Its pid cannot be another's while the connection is open."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


class _Parent:
    """The warm parent process and the control socket to it."""

    def __init__(self, deadline_s: float, memory_limit_mb: int) -> None:
        self._timeout_s = deadline_s + 1.0
        self.control, theirs = socket.socketpair()
        self.control.settimeout(_START_S)
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        arguments = [str(theirs.fileno()), str(float(deadline_s)), str(int(memory_limit_mb))]
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "egspo_lightning.rewards._worker_main", *arguments],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                # sympy orders terms by their hashes: the same seed gives the same verdict
                env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0"},
                start_new_session=True,  # Ctrl-C in the terminal is for the client alone
            )

    def fork(self) -> Worker | None:
        """Fork a new worker. Returns None where the parent has ended."""
        ours, theirs = socket.socketpair()
        # A worker that is stopped neither reads nor writes. It must not block the client.
        timeout = struct.pack("ll", int(self._timeout_s), int(self._timeout_s % 1 * 1e6))
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
        with ours, theirs:
            try:
                socket.send_fds(self.control, [b"fork"], [theirs.fileno()])
                pid = self.control.recv(32)
            except OSError:
                return None
            except BaseException:  # Ctrl-C: a later request must not read this reply
                self.control.close()
                raise
            return Worker(Connection(ours.detach()), int(pid)) if pid else None

    def end(self) -> int:
        """End the parent and its workers. Returns its exit code."""
        with contextlib.suppress(OSError):
            self.control.shutdown(socket.SHUT_RDWR)  # wakes a thread that waits for it; closing does not
        try:
            return self.process.wait(timeout=_END_S)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)  # the group holds the workers, too, even stopped ones
            return self.process.wait()
        finally:
            self.control.close()


class Processes:
    """All processes of one pool. Apart from the pool, so that a finalizer can hold it."""

    def __init__(self, deadline_s: float, memory_limit_mb: int) -> None:
        self._limits = (deadline_s, memory_limit_mb)
        self.forget()
        _all.add(self)

    def forget(self) -> None:
        """Start without processes in a forked child: those that exist belong to the process that forked it."""
        for worker in getattr(self, "idle", ()):
            worker.connection.close()
        if (parent := getattr(self, "_parent", None)) is not None:
            parent.control.close()
            parent.process.returncode = 0
        self._in_use, self._parent_lock = threading.Lock(), threading.Lock()
        self._num_closing = 0
        self._parent: _Parent | None = None
        self.idle: list[Worker] = []
        self.busy: list[Worker] = []

    def pids(self) -> list[int]:
        """Return the pids of the parent and then of the idle workers. Empty before the first request."""
        parent = self._parent
        return [] if parent is None else [parent.process.pid, *(worker.pid for worker in self.idle)]

    @contextlib.contextmanager
    def use(self) -> Iterator[list[Worker]]:
        """Lend the list of busy workers to one thread at a time. An exception, such as Ctrl-C, kills these workers.

        Raises:
            RuntimeError: another thread closes the processes.
        """
        with self._in_use:
            try:
                self.require_open()
                yield self.busy
            finally:
                while self.busy:
                    self.discard(self.busy[-1])

    def require_open(self) -> None:
        """Raise RuntimeError while `close` waits for its turn."""
        if self._num_closing:
            raise RuntimeError("the grader was closed, by another thread, before all was graded.")

    def take(self) -> Worker:
        """Return an idle worker, or a new one, as busy.

        Raises:
            RuntimeError: the parent does not start (its own message is on stderr), or another thread closes it.
        """
        worker = self.idle.pop() if self.idle else self._fork()
        self.busy.append(worker)
        return worker

    def release(self, worker: Worker) -> None:
        """Make a busy worker idle."""
        self.busy.remove(worker)
        self.idle.append(worker)

    def discard(self, worker: Worker) -> None:
        """Kill a busy worker."""
        worker.kill()
        worker.connection.close()
        self.busy.remove(worker)

    def close(self) -> None:
        """End all processes at once. A thread that uses them gets a RuntimeError."""
        with self._parent_lock:
            self._num_closing += 1
        try:
            for worker in list(self.busy):
                worker.kill()
            self._end_parent()
            with self._in_use:
                for worker in self.idle:
                    worker.connection.close()
                self.idle.clear()
        finally:
            with self._parent_lock:
                self._num_closing -= 1

    def _end_parent(self) -> int | None:
        with self._parent_lock:
            parent, self._parent = self._parent, None
            return None if parent is None else parent.end()

    def _start_parent(self) -> _Parent:
        with self._parent_lock:
            self.require_open()
            self._parent = _Parent(*self._limits)
            return self._parent

    def _fork(self) -> Worker:
        for _ in range(2):  # a parent that was killed is replaced once
            worker = (self._parent or self._start_parent()).fork()
            if worker is not None:
                return worker
            self.require_open()
            exit_code = self._end_parent()
        raise RuntimeError(f"the grader's parent process ended with exit code {exit_code}; its message is above.")


_all: weakref.WeakSet[Processes] = weakref.WeakSet()


def _forget_inherited() -> None:
    for processes in list(_all):
        processes.forget()


os.register_at_fork(after_in_child=_forget_inherited)
