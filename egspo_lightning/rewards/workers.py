"""Requests spread over worker processes that can be killed at any moment, even inside C code.

Each request has a deadline and each worker a limit of memory: what goes past them costs that request alone. Requests
are taken one by one, and may be made while the workers are at the ones before. A worker has some to go on with, so
that it never waits for this process, and gets those of which it has most parsed already.
"""

from __future__ import annotations

import selectors
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

from egspo_lightning.rewards._processes import Processes, Sent, Worker
from egspo_lightning.rewards._wire import receive_frame, send_frame

_GRACE_S = 0.5
_MAX_QUEUE, _MIN_QUEUE = 16, 4
"""Requests that a worker has at a time; it gets new ones, some at once, when it has no more than the lower number."""

_MAX_LEAD = 8
"""By how many requests one worker's queue may be longer than another's for what it has parsed already."""


class Outcome(NamedTuple):
    """A worker's reply, or None with the status of its end: timeout or crashed."""

    reply: dict[str, Any] | None
    status: str
    seconds: float


class WorkerPool:
    """Workers over one list of requests; nothing is started before the first `run`.

    Usable from any thread, one `run` at a time. A fork or a pickled copy of it starts workers of its own.
    """

    def __init__(self, num_workers: int, deadline_s: float, memory_limit_mb: int) -> None:
        self._arguments = (num_workers, deadline_s, memory_limit_mb)
        self._processes = Processes({"deadline_s": deadline_s, "memory_limit_mb": memory_limit_mb})
        weakref.finalize(self, self._processes.close)

    def __reduce__(self) -> tuple[type[WorkerPool], tuple[int, float, int]]:
        return WorkerPool, self._arguments

    def pids(self) -> list[int]:
        """The live processes: the parent, then the idle workers. Empty before the first request."""
        return self._processes.pids()

    def run(self, requests: Iterable[dict[str, Any]]) -> list[Outcome]:
        """The outcomes, in the order of the requests.

        Raises:
            RuntimeError: the workers' parent process does not start, its own message is on stderr; or another
                thread has called `close`.
        """
        num_workers, deadline_s, _ = self._arguments
        numbered = enumerate(requests)
        first = next(numbered, None)
        if first is None:
            return []
        with self._processes.use(), selectors.DefaultSelector() as selector:
            run = _Run(self._processes, selector, num_workers, deadline_s)
            return run.outcomes(chain([first], numbered))

    def close(self) -> None:
        """End all processes within a second, whatever they do; a later `run` starts new ones."""
        self._processes.close()


class _Run:
    """One list of requests on its way through the workers."""

    def __init__(
        self, processes: Processes, selector: selectors.BaseSelector, num_workers: int, deadline_s: float
    ) -> None:
        self._processes, self._selector = processes, selector
        self._num_workers, self._deadline_s = num_workers, deadline_s
        self._returned: deque[tuple[int, dict[str, Any]]] = deque()
        """What a worker had and never came to."""
        self._outcomes: dict[int, Outcome] = {}

    def outcomes(self, requests: Iterator[tuple[int, dict[str, Any]]]) -> list[Outcome]:
        """All of them, in the order of the requests."""
        while True:
            if self._are_few():
                while self._has_room() and (item := self._next(requests)) is not None:
                    self._send(*item)
            if not self._processes.busy:
                return [self._outcomes[index] for index in range(len(self._outcomes))]
            self._collect()

    def _next(self, requests: Iterator[tuple[int, dict[str, Any]]]) -> tuple[int, dict[str, Any]] | None:
        return self._returned.popleft() if self._returned else next(requests, None)

    def _are_few(self) -> bool:
        busy = self._processes.busy
        return len(busy) < self._num_workers or any(len(worker.queue) <= _MIN_QUEUE for worker in busy)

    def _has_room(self) -> bool:
        busy = self._processes.busy
        return len(busy) < self._num_workers or any(map(_has_room, busy))

    def _send(self, index: int, request: dict[str, Any]) -> None:
        while True:
            worker = self._choose(request)
            try:
                send_frame(worker.sock, request)
            except OSError as error:
                self._stop(worker, is_alive=isinstance(error, TimeoutError))
                continue
            worker.queue.append(Sent(index, request, time.monotonic()))
            worker.learn(_texts(request))
            return

    def _choose(self, request: dict[str, Any]) -> Worker:
        """A new worker while there may be more, then the one that has least to parse for it."""
        self._processes.require_open()
        busy = self._processes.busy
        free = [worker for worker in busy if _has_room(worker)]
        shortest = min((len(worker.queue) for worker in free), default=None)
        if shortest is None or (shortest and len(busy) < self._num_workers):
            worker = self._processes.take()
            self._selector.register(worker.sock, selectors.EVENT_READ, worker)
            return worker
        texts = _texts(request)
        near = [worker for worker in free if len(worker.queue) <= shortest + _MAX_LEAD]
        return min(near, key=lambda worker: (worker.unknown(texts), len(worker.queue)))

    def _stop(self, worker: Worker, *, is_alive: bool) -> None:
        """Send it no more. Its end, once its last replies are read, is seen as that of any other."""
        worker.is_open = False
        if is_alive:
            worker.kill()
        if not worker.queue:
            self._release(worker)

    def _collect(self) -> None:
        limit = self._deadline_s + _GRACE_S
        oldest = min(worker.started() for worker in self._processes.busy)
        ready = {key.data for key, _ in self._selector.select(max(0.0, oldest + limit - time.monotonic()))}
        self._processes.require_open()
        for worker in list(self._processes.busy):
            is_late = time.monotonic() - worker.started() >= limit
            if worker not in ready and is_late:
                worker.kill()
            if worker in ready or is_late:
                self._settle(worker)

    def _settle(self, worker: Worker) -> None:
        """What has become of the request that a worker was at."""
        reply = receive_frame(worker.sock)
        if reply is None:
            self._processes.require_open()
        started, sent = worker.started(), worker.queue.popleft()
        if reply is None:
            seconds = time.monotonic() - started
            status = "timeout" if seconds >= self._deadline_s else "crashed"
            self._returned.extend((it.number, it.request) for it in worker.queue)  # it never came to these
            worker.queue.clear()
            worker.is_open = False
        else:
            worker.finished = reply["finished"]
            seconds, status = worker.finished - started, "graded"
        self._outcomes[sent.number] = Outcome(reply, status, seconds)
        if not worker.queue:
            self._release(worker)

    def _release(self, worker: Worker) -> None:
        self._selector.unregister(worker.sock)
        self._processes.release(worker)


def _has_room(worker: Worker) -> bool:
    return worker.is_open and len(worker.queue) < _MAX_QUEUE


def _texts(request: dict[str, Any]) -> tuple[str, str]:
    return request["gold"], request["answer"]
