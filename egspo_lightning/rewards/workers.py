"""Requests spread over worker processes that can be killed at any moment, even inside C code.

Each request has a deadline and each worker a limit of memory: what goes past them costs that request alone. Requests
are made while the workers are at the ones before, and some ahead, so that neither waits for the other where many in a
row need a worker, or none does. A worker has some to go on with, and gets those of which it has most parsed already.
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

_MAX_AHEAD = 512
"""Requests that are made before a worker has room for them."""

_LOOK_EVERY_S = 0.001
"""How often the workers are looked after while requests are made."""


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

    def run(self, requests: Iterable[dict[str, Any] | None]) -> list[Outcome]:
        """The outcomes, in the order of the requests.

        Where making one takes long, None in between lets the pool look after its workers meanwhile.

        Raises:
            RuntimeError: the workers' parent process does not start, its own message is on stderr; or another
                thread has called `close`.
        """
        num_workers, deadline_s, _ = self._arguments
        source = iter(requests)
        first = next((request for request in source if request is not None), None)
        if first is None:
            return []
        with self._processes.use(), selectors.DefaultSelector() as selector:
            run = _Run(self._processes, selector, num_workers, deadline_s)
            return run.outcomes(chain([first], source))

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
        self._waiting: deque[tuple[int, dict[str, Any]]] = deque()
        """Requests with their numbers: made ahead, or sent to a worker that never came to them."""
        self._num_made, self._all_made = 0, False
        self._looked = 0.0
        self._outcomes: dict[int, Outcome] = {}

    def outcomes(self, requests: Iterator[dict[str, Any] | None]) -> list[Outcome]:
        """All of them, in the order of the requests."""
        while not self._all_made or self._waiting or self._processes.busy:
            if self._waiting and self._are_few():
                while self._waiting and self._has_room():
                    self._send(*self._waiting.popleft())
            if self._all_made or len(self._waiting) >= _MAX_AHEAD or self._is_due():
                self._collect()
            else:
                self._make(requests)
        return [self._outcomes[number] for number in range(self._num_made)]

    def _make(self, requests: Iterator[dict[str, Any] | None]) -> None:
        for request in requests:
            if request is not None:
                self._waiting.append((self._num_made, request))
                self._num_made += 1
            return
        self._all_made = True

    def _are_few(self) -> bool:
        busy = self._processes.busy
        return len(busy) < self._num_workers or any(len(worker.queue) <= _MIN_QUEUE for worker in busy)

    def _has_room(self) -> bool:
        busy = self._processes.busy
        return len(busy) < self._num_workers or any(map(_has_room, busy))

    def _is_due(self) -> bool:
        """Whether a worker has replied or is late; looked up no more often than it has to be."""
        now = time.monotonic()
        if now - self._looked < _LOOK_EVERY_S or not self._processes.busy:
            return False
        is_due = bool(self._selector.select(0)) or now >= self._limit()
        if not is_due:  # or there may be more of them
            self._looked = now
        return is_due

    def _limit(self) -> float:
        """When the first worker will be late."""
        return min(worker.started() for worker in self._processes.busy) + self._deadline_s + _GRACE_S

    def _send(self, index: int, request: dict[str, Any]) -> None:
        while True:
            worker = self._choose(request)
            sent = Sent(index, request, time.monotonic())  # not after sending: the worker may begin at once
            try:
                send_frame(worker.sock, request)
            except OSError as error:
                self._stop(worker, is_alive=isinstance(error, TimeoutError))
                continue
            worker.queue.append(sent)
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
        if not self._processes.busy:
            return
        wait_s = max(0.0, self._limit() - time.monotonic())
        ready = {key.data for key, _ in self._selector.select(wait_s)}
        self._processes.require_open()
        for worker in list(self._processes.busy):
            is_late = time.monotonic() - worker.started() >= self._deadline_s + _GRACE_S
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
            self._waiting.extendleft((it.number, it.request) for it in reversed(worker.queue))  # it never came to these
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
