"""Pool of grading workers: processes that can be killed at any moment, even inside C code.

Each request has a deadline and each worker a memory limit. A request that exceeds one fails alone.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import wait
from typing import NamedTuple

from egspo_lightning.rewards._processes import WarmParent, Worker

_GRACE_S = 0.5
"""A worker ends itself at the deadline. The client kills it this much later."""

Request = tuple[str, str, str]
"""Answer, gold answer, and "boxed" for a bare answer or "lenient" for free text."""


class Grade(NamedTuple):
    """The verdict on one answer."""

    correct: bool
    status: str
    """graded, no_answer (none was found), timeout (past the deadline) or crashed (the worker died or reached its memory
    limit)"""
    extracted: str | None
    """The answer that was found in the text."""
    seconds: float
    """Time in a worker; 0 where none was needed."""


class WorkerPool:
    """Grades lists of requests in worker processes. The first `run` starts them.

    Usable from any thread, one `run` at a time. A fork or a pickled copy of the pool starts workers of its own. The
    processes end with `close`, with the pool, and with this process, however it ends.
    """

    def __init__(self, num_workers: int, deadline_s: float, memory_limit_mb: int) -> None:
        self._num_workers, self._deadline_s, self._memory_limit_mb = num_workers, deadline_s, memory_limit_mb
        self._start_empty()
        _pools.add(self)

    def _start_empty(self) -> None:
        self._in_use, self._parent_lock = threading.Lock(), threading.Lock()
        self._num_closed = self._num_closed_before_run = 0
        self._parent: WarmParent | None = None
        self._idle: list[Worker] = []
        self._busy: list[Worker] = []

    def __reduce__(self) -> tuple[type[WorkerPool], tuple[int, float, int]]:
        return WorkerPool, (self._num_workers, self._deadline_s, self._memory_limit_mb)

    def pids(self) -> list[int]:
        """Return the pids of the live processes: the parent, then the idle workers. Empty before the first request."""
        parent = self._parent
        return [] if parent is None else [parent.pid, *(worker.pid for worker in self._idle)]

    def run(self, requests: Sequence[Request]) -> list[Grade]:
        """Return the grades in the order of the requests.

        Raises:
            RuntimeError: the workers' parent process does not start (its own message is on stderr), or another
                thread has called `close`.
        """
        waiting, grades = deque(enumerate(requests)), {}
        num_closed = self._num_closed
        with self._in_use:
            self._num_closed_before_run = num_closed  # as counted before this thread waited for its turn
            try:
                while waiting or self._busy:
                    while waiting and len(self._busy) < self._num_workers:
                        self._send(*waiting.popleft())
                    for worker in self._ready_or_late():
                        grades[worker.number] = self._receive(worker)
            finally:  # after an exception, such as Ctrl-C, some are still busy
                while self._busy:
                    self._discard(self._busy[-1])
        return [grades[number] for number in range(len(requests))]

    def close(self) -> None:
        """End all processes within a second. Another thread's `run` raises RuntimeError; a later one starts anew."""
        with self._parent_lock:
            self._num_closed += 1
            for worker in list(self._busy):
                worker.kill()
            if self._parent is not None:
                self._parent.end()
            self._parent, self._idle = None, []

    def leave(self) -> None:
        """Start without processes in a forked child: those that exist belong to the process that forked it."""
        if self._parent is not None:
            self._parent.leave()
        self._start_empty()

    def _send(self, number: int, request: Request) -> None:
        while True:
            idle = self._idle  # another thread's `close` replaces this list
            worker = idle.pop() if idle else self._fork()
            worker.number, worker.started = number, time.monotonic()
            self._busy.append(worker)
            try:
                worker.connection.send(request)
            except OSError:  # it has ended, or it is stopped and reads nothing
                self._discard(worker)
            else:
                return

    def _ready_or_late(self) -> list[Worker]:
        limit_s = self._deadline_s + _GRACE_S
        wait_s = min(worker.started for worker in self._busy) + limit_s - time.monotonic()
        ready = wait([worker.connection for worker in self._busy], max(0.0, wait_s))
        now = time.monotonic()
        return [worker for worker in self._busy if worker.connection in ready or now - worker.started >= limit_s]

    def _receive(self, worker: Worker) -> Grade:
        try:
            reply = worker.connection.recv() if worker.connection.poll() else None
        except (EOFError, OSError):  # it has ended
            reply = None
        if reply is None:
            seconds = time.monotonic() - worker.started
            self._require_open()
            self._discard(worker)
            return Grade(False, "timeout" if seconds >= self._deadline_s else "crashed", None, seconds)
        self._busy.remove(worker)
        self._idle.append(worker)
        correct, extracted, seconds = reply
        return Grade(correct, "no_answer" if extracted is None else "graded", extracted, seconds)

    def _discard(self, worker: Worker) -> None:
        worker.kill()
        worker.connection.close()
        self._busy.remove(worker)

    def _fork(self) -> Worker:
        for _ in range(2):  # a parent that was killed is replaced once
            parent = self._living_parent()
            if (worker := parent.fork()) is not None:
                return worker
            self._parent, exit_code = None, parent.end()
        self._require_open()
        raise RuntimeError(f"the grader's parent process ended with exit code {exit_code}; its message is above.")

    def _living_parent(self) -> WarmParent:
        with self._parent_lock:
            self._require_open()
            if self._parent is None:
                self._parent = WarmParent(self._deadline_s, self._memory_limit_mb)
                weakref.finalize(self, self._parent.end)
            return self._parent

    def _require_open(self) -> None:
        if self._num_closed != self._num_closed_before_run:
            raise RuntimeError("the grader was closed, by another thread, before all was graded.")


_pools: weakref.WeakSet[WorkerPool] = weakref.WeakSet()


def _leave_all() -> None:
    for pool in list(_pools):
        pool.leave()


os.register_at_fork(after_in_child=_leave_all)
