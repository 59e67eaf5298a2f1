"""Worker processes that can be killed at any moment, even inside C code, and are back within milliseconds.

A small parent process imports math-verify once and forks the workers (``_worker_main``). Each has a deadline
for every request, and an address-space limit. When this process ends, however it ends, so do they.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from egspo_lightning.rewards._wire import receive_frame, send_frame

_GRACE_S = 0.5
_START_S = 120.0
_MAX_AT_ONCE = 16
"""Requests that a worker has at a time: it goes from one to the next without waiting for this process."""


class Outcome(NamedTuple):
    """A worker's reply, or None with the status of its end: timeout or crashed."""

    reply: dict[str, Any] | None
    status: str
    seconds: float


@dataclass(eq=False)
class _Worker:
    """The client's end of one forked worker, and the requests that it has, the first of them in work."""

    sock: socket.socket
    pid: int
    indices: deque[int] = field(default_factory=deque)
    started: float = 0.0
    """When it began with the first, on the monotonic clock, which is that of all processes."""

    def kill(self) -> None:
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

    def fork(self, limits: dict[str, float]) -> _Worker | None:
        """A new worker; None where the parent is gone."""
        ours, theirs = socket.socketpair()
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
        return _Worker(ours, reply["pid"])

    def end(self) -> int | None:
        """End the parent and its workers; its exit code."""
        self.control.close()
        try:
            return self.process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            return self.process.wait()


class _State:
    """What a pool holds of the operating system; apart from the pool so that a finaliser can hold it."""

    lock: threading.Lock
    parent: _Parent | None
    idle: list[_Worker]

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.lock = threading.Lock()
        self.parent = None
        self.idle = []

    def close(self) -> None:
        for worker in self.idle:
            worker.sock.close()
        self.idle.clear()
        if self.parent is not None:
            parent, self.parent = self.parent, None
            parent.end()

    def forget(self) -> None:
        """Drop what a fork of the client has inherited: it belongs to the client."""
        for worker in self.idle:
            worker.sock.close()
        if self.parent is not None:
            self.parent.control.close()
            self.parent.process.returncode = 0
        self.reset()


_states: weakref.WeakSet[_State] = weakref.WeakSet()


def _forget_inherited() -> None:
    for state in list(_states):
        state.forget()


os.register_at_fork(after_in_child=_forget_inherited)


class WorkerPool:
    """Workers over one list of requests; nothing is started before the first `run`.

    Usable from any thread, one `run` at a time. A fork or a pickled copy of it starts workers of its own.
    """

    def __init__(self, num_workers: int, deadline_s: float, memory_limit_mb: int) -> None:
        self._arguments = (num_workers, deadline_s, memory_limit_mb)
        self._num_workers = num_workers
        self._deadline_s = deadline_s
        self._limits = {"deadline_s": deadline_s, "memory_limit_mb": memory_limit_mb}
        self._state = _State()
        _states.add(self._state)
        weakref.finalize(self, self._state.close)

    def __reduce__(self) -> tuple[type[WorkerPool], tuple[int, float, int]]:
        return WorkerPool, self._arguments

    def pids(self) -> list[int]:
        """The live processes: the parent, then the idle workers. Empty before the first request."""
        parent = self._state.parent
        return [] if parent is None else [parent.process.pid, *(worker.pid for worker in self._state.idle)]

    def run(self, requests: Sequence[dict[str, Any]]) -> list[Outcome]:
        """The outcomes, in the order of the requests.

        Raises:
            RuntimeError: the workers' parent process does not start; its own message is on stderr.
        """
        outcomes: dict[int, Outcome] = {}
        pending = deque(range(len(requests)))
        with self._state.lock, selectors.DefaultSelector() as busy:
            try:
                while pending or busy.get_map():
                    while pending and len(busy.get_map()) < self._num_workers:
                        self._send(requests, pending, busy)
                    self._collect(busy, pending, outcomes)
            finally:  # workers that an exception, such as Ctrl-C, has left with a request
                for key in busy.get_map().values():
                    key.data.kill()
                    key.data.sock.close()
        return [outcomes[index] for index in range(len(requests))]

    def close(self) -> None:
        """End all processes; a later `run` starts new ones."""
        with self._state.lock:
            self._state.close()

    def _send(self, requests: Sequence[dict[str, Any]], pending: deque[int], busy: selectors.BaseSelector) -> None:
        # Fewer towards the end, so that no worker is left with a queue while others have nothing to do.
        count = min(_MAX_AT_ONCE, -(-len(pending) // (2 * self._num_workers)))
        indices = deque(pending.popleft() for _ in range(count))
        while True:
            worker = self._state.idle.pop() if self._state.idle else self._fork()
            worker.indices, worker.started = indices, time.monotonic()
            try:
                send_frame(worker.sock, [requests[index] for index in indices])
            except OSError:  # it died while idle
                worker.sock.close()
                continue
            busy.register(worker.sock, selectors.EVENT_READ, worker)
            return

    def _collect(self, busy: selectors.BaseSelector, pending: deque[int], outcomes: dict[int, Outcome]) -> None:
        limit = self._deadline_s + _GRACE_S
        oldest = min(key.data.started for key in busy.get_map().values())
        ready = {key.data for key, _ in busy.select(max(0.0, oldest + limit - time.monotonic()))}
        for worker in [key.data for key in busy.get_map().values()]:
            is_late = time.monotonic() - worker.started >= limit
            if worker not in ready and is_late:
                worker.kill()  # its socket is open, so the pid is still its own
            if worker in ready or is_late:
                index, outcome = self._settle(worker)
                outcomes[index] = outcome
                if outcome.reply is None or not worker.indices:
                    busy.unregister(worker.sock)
                    self._release(worker, pending, is_alive=outcome.reply is not None)

    def _settle(self, worker: _Worker) -> tuple[int, Outcome]:
        """What has become of the request that a worker was at."""
        reply = receive_frame(worker.sock)
        index = worker.indices.popleft()
        if reply is None:
            seconds = time.monotonic() - worker.started
            return index, Outcome(None, "timeout" if seconds >= self._deadline_s else "crashed", seconds)
        seconds, worker.started = reply["finished"] - worker.started, reply["finished"]
        return index, Outcome(reply, "graded", seconds)

    def _release(self, worker: _Worker, pending: deque[int], *, is_alive: bool) -> None:
        if is_alive:
            self._state.idle.append(worker)
        else:
            pending.extendleft(reversed(worker.indices))  # it never came to these
            worker.sock.close()

    def _fork(self) -> _Worker:
        for _ in range(2):  # a parent that was killed is replaced once
            if self._state.parent is None:
                self._state.parent = _Parent()
            worker = self._state.parent.fork(self._limits)
            if worker is not None:
                return worker
            parent, self._state.parent = self._state.parent, None
            exit_code = parent.end()
        raise RuntimeError(f"the grader's parent process ended with exit code {exit_code}; its message is above.")
