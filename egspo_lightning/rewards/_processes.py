"""The processes of a pool as its client holds them: the warm parent, and the workers that it forks.

They end with the client, however it ends; `Processes.close` ends them within a second, whatever they do.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from egspo_lightning.rewards._wire import receive_frame

_START_S = 120.0
_END_S = 0.3
"""Within which the parent ends by itself when its client has gone; it does not while it imports sympy."""

_KNOWN = 4096


class Sent(NamedTuple):
    """A request that a worker has."""

    number: int
    request: dict[str, Any]
    time: float
    """On the monotonic clock, which is that of all processes."""


@dataclass(eq=False)
class Worker:
    """The client's end of one forked worker, and the requests that it has, the first of them in work."""

    sock: socket.socket
    pid: int
    queue: deque[Sent] = field(default_factory=deque)
    finished: float = 0.0
    """When it was done with the one before, on its clock."""
    is_open: bool = True
    """Whether it takes requests."""
    known: set[int] = field(default_factory=set)
    """Hashes of the texts that it has parsed."""

    def started(self) -> float:
        """When it began with what it has in work."""
        return max(self.finished, self.queue[0].time)

    def unknown(self, texts: Iterable[str]) -> int:
        """How much it would have to parse, in characters: what a parse takes grows with them."""
        return sum(len(text) for text in texts if hash(text) not in self.known)

    def learn(self, texts: Iterable[str]) -> None:
        """Note what it has parsed, about as much as it keeps itself."""
        if len(self.known) >= _KNOWN:
            self.known.clear()
        self.known.update(map(hash, texts))

    def kill(self) -> None:
        """While the socket is open the pid is still its own."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


class _Parent:
    """The warm parent process and the control socket to it."""

    def __init__(self) -> None:
        self.control, theirs = socket.socketpair()
        self.control.settimeout(_START_S)
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "egspo_lightning.rewards._worker_main", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                # sympy's order of things follows the hash seed: one verdict for one pair
                env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0"},
                start_new_session=True,  # Ctrl-C in the terminal is for the client alone
            )

    def fork(self, limits: dict[str, float]) -> Worker | None:
        """A new worker; None where the parent is gone."""
        ours, theirs = socket.socketpair()
        ours.settimeout(limits["deadline_s"] + 1.0)  # a worker that is stopped, not dead, reads nothing
        with theirs:
            try:
                socket.send_fds(self.control, [json.dumps(limits).encode()], [theirs.fileno()])
                reply = receive_frame(self.control)
            except OSError:
                reply = None
            except BaseException:  # Ctrl-C: a reply that is still to come must not be taken for a later one
                self.control.close()
                raise
        if reply is None:
            ours.close()
            return None
        return Worker(ours, reply["pid"])

    def end(self) -> int:
        """End the parent and its workers; its exit code."""
        with contextlib.suppress(OSError):
            self.control.shutdown(socket.SHUT_RDWR)  # wakes a thread that waits for it, as closing does not
        try:
            return self.process.wait(timeout=_END_S)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)  # of its session, so also the workers, even those stopped
            return self.process.wait()
        finally:
            self.control.close()


class Processes:
    """What a pool holds of the operating system; apart from the pool so that a finalizer can hold it."""

    def __init__(self, limits: dict[str, float]) -> None:
        self._limits = limits
        self.forget()
        _all.add(self)

    def forget(self) -> None:
        """Begin without any, leaving those that there are to the process that this one was forked from."""
        for worker in getattr(self, "idle", ()):
            worker.sock.close()
        if (parent := getattr(self, "_parent", None)) is not None:
            parent.control.close()
            parent.process.returncode = 0
        self._in_use, self._parent_lock = threading.Lock(), threading.Lock()
        self._num_closing = 0
        self._parent: _Parent | None = None
        self.idle: list[Worker] = []
        self.busy: set[Worker] = set()

    def pids(self) -> list[int]:
        """The parent, then the idle workers; empty before the first request."""
        parent = self._parent
        return [] if parent is None else [parent.process.pid, *(worker.pid for worker in self.idle)]

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """One thread at a time; workers that an exception, such as Ctrl-C, has left with a request end.

        Raises:
            RuntimeError: they are being closed.
        """
        with self._in_use:
            try:
                self.require_open()
                yield
            finally:
                for worker in self.busy:
                    worker.kill()
                    worker.sock.close()
                self.busy.clear()

    def require_open(self) -> None:
        """Raise RuntimeError while `close` waits for its turn."""
        if self._num_closing:
            raise RuntimeError("the grader was closed, by another thread, before all was graded.")

    def take(self) -> Worker:
        """An idle worker or a new one, which is then busy.

        Raises:
            RuntimeError: the parent does not start, its own message is on stderr; or they are being closed.
        """
        worker = self.idle.pop() if self.idle else self._fork()
        self.busy.add(worker)
        return worker

    def release(self, worker: Worker) -> None:
        """Of a busy one: idle, or gone where it takes no requests any more."""
        self.busy.discard(worker)
        if worker.is_open:
            self.idle.append(worker)
        else:
            worker.sock.close()

    def close(self) -> None:
        """End all, at once, also those that another thread uses: it gets a RuntimeError."""
        with self._parent_lock:
            self._num_closing += 1
        try:
            for worker in list(self.busy):
                worker.kill()
            self._end_parent()
            with self._in_use:
                for worker in self.idle:
                    worker.sock.close()
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
            self._parent = _Parent()
            return self._parent

    def _fork(self) -> Worker:
        for _ in range(2):  # a parent that was killed is replaced once
            worker = (self._parent or self._start_parent()).fork(self._limits)
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
