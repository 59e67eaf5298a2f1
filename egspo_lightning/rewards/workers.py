"""Pool of grading workers: processes that can be killed at any moment, even inside C code.

Each request has a deadline and each worker a memory limit. A request that exceeds one fails alone.
"""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import wait
from typing import Any, NamedTuple

from egspo_lightning.rewards._processes import Processes, Worker

_GRACE_S = 0.5
"""A worker ends itself at the deadline. The client kills it this much later."""


class Outcome(NamedTuple):
    """A worker's reply, or None with the status timeout or crashed."""

    reply: dict[str, Any] | None
    status: str
    seconds: float


class WorkerPool:
    """Grades lists of requests in worker processes. The first `run` starts them.

    Usable from any thread, one `run` at a time. A fork or a pickled copy of the pool starts workers of its own.
    """

    def __init__(self, num_workers: int, deadline_s: float, memory_limit_mb: int) -> None:
        self._num_workers, self._deadline_s, self._memory_limit_mb = num_workers, deadline_s, memory_limit_mb
        self._processes = Processes(deadline_s, memory_limit_mb)
        weakref.finalize(self, self._processes.close)

    def __reduce__(self) -> tuple[type[WorkerPool], tuple[int, float, int]]:
        return WorkerPool, (self._num_workers, self._deadline_s, self._memory_limit_mb)

    def pids(self) -> list[int]:
        """Return the pids of the live processes: the parent, then the idle workers. Empty before the first request."""
        return self._processes.pids()

    def run(self, requests: Sequence[dict[str, Any]]) -> list[Outcome]:
        """Return the outcomes in the order of the requests.

        Raises:
            RuntimeError: the workers' parent process does not start (its own message is on stderr), or another
                thread has called `close`.
        """
        waiting, outcomes = deque(enumerate(requests)), {}
        if waiting:
            with self._processes.use() as busy:
                while waiting or busy:
                    while waiting and len(busy) < self._num_workers:
                        self._send(*waiting.popleft())
                    for worker in self._ready_or_late(busy):
                        outcomes[worker.number] = self._settle(worker)
        return [outcomes[number] for number in range(len(requests))]

    def close(self) -> None:
        """End all processes within a second, whatever they do. A later `run` starts new ones."""
        self._processes.close()

    def _send(self, number: int, request: dict[str, Any]) -> None:
        while True:
            self._processes.require_open()
            worker = self._processes.take()
            worker.number, worker.started = number, time.monotonic()
            try:
                worker.send(request)
            except OSError:
                self._processes.discard(worker)
            else:
                return

    def _ready_or_late(self, busy: Sequence[Worker]) -> list[Worker]:
        limit_s = self._deadline_s + _GRACE_S
        wait_s = min(worker.started for worker in busy) + limit_s - time.monotonic()
        ready = wait([worker.connection for worker in busy], max(0.0, wait_s))
        self._processes.require_open()
        now = time.monotonic()
        return [worker for worker in busy if worker.connection in ready or now - worker.started >= limit_s]

    def _settle(self, worker: Worker) -> Outcome:
        reply = worker.receive() if worker.connection.poll() else None
        seconds = time.monotonic() - worker.started
        if reply is not None:
            self._processes.release(worker)
            return Outcome(reply, "graded", reply["seconds"])
        self._processes.require_open()
        self._processes.discard(worker)
        return Outcome(None, "timeout" if seconds >= self._deadline_s else "crashed", seconds)
