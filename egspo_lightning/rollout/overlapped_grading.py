"""Grading while sampling goes on: what is sampled is graded in a thread while the rest is decoded.

Graders work in processes of their own and language models on a device, so neither waits for the other. Nothing in the
thread talks to other ranks, so ranks stay in step however long grading takes them.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType

from egspo_lightning.rollout.engine import Sample
from egspo_lightning.types import Completion

Grade = Callable[[Sequence[int], Sequence[Sample]], list[Completion]]
"""Request numbers and their samples to completions, in their order."""

_CANCEL_EVERY_S = 0.1


class OverlappedGrading:
    """Takes samples in as they come, grades whole groups, and gives all completions in the order of the requests.

    What comes last is graded in the caller's thread: there is nothing left to overlap it with. A context manager:
    whatever ends it, nothing is graded any more when it has ended.

    Args:
        grade: Grades; never called twice at a time.
        num_requests: Samples to come.
        group_size: Requests that are graded together: each ``group_size`` in a row.
        cancel: Makes the call of ``grade`` that is under way raise, from another thread; called again and again
            until it has, when an exception ends this. Without one the call is waited for.
    """

    def __init__(
        self, grade: Grade, num_requests: int, group_size: int, *, cancel: Callable[[], None] | None = None
    ) -> None:
        self._grade, self._num_requests, self._group_size = grade, num_requests, group_size
        self._cancel = cancel
        self._samples: dict[int, Sample] = {}
        self._waiting: list[int] = []  # the numbers of samples that are not handed to the grader yet
        self._futures: list[tuple[list[int], Future[list[Completion]]]] = []
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="grading")  # its thread starts with the first task
        self.seconds_waited = 0.0
        """Time in which the caller had nothing to do but wait for grades."""

    def __enter__(self) -> "OverlappedGrading":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)
        if kind is not None and self._cancel is not None:
            under_way = [future for _, future in self._futures if not future.done()]
            while under_way:  # a call that has not come to its workers yet has nothing that could be cancelled
                self._cancel()
                under_way = list(wait(under_way, _CANCEL_EVERY_S).not_done)
        self._executor.shutdown(wait=True)

    def add(self, batch: Sequence[tuple[int, Sample]]) -> None:
        """Take in samples with the numbers of their requests.

        Raises:
            Exception: what grading an earlier batch has raised; it is not waited for.
        """
        for _, future in self._futures:
            if future.done():
                future.result()
        self._samples.update(batch)
        self._waiting += [number for number, _ in batch]
        if len(self._samples) < self._num_requests and (whole := self._take_whole_groups()):
            samples = [self._samples[number] for number in whole]
            self._futures.append((whole, self._executor.submit(self._grade, whole, samples)))

    def finish(self) -> list[Completion]:
        """All completions, in the order of the requests.

        Raises:
            Exception: what grading has raised.
            RuntimeError: a sample has not come.
        """
        missing = self._num_requests - len(self._samples)
        if missing:
            raise RuntimeError(f"data.engine gave no sample for {missing} of {self._num_requests} requests.")
        started = time.perf_counter()
        graded: dict[int, Completion] = {}
        for numbers, future in self._futures:
            graded.update(zip(numbers, future.result(), strict=True))
        last = sorted(self._waiting)
        if last:
            graded.update(zip(last, self._grade(last, [self._samples[number] for number in last]), strict=True))
        self.seconds_waited = time.perf_counter() - started
        return [graded[number] for number in range(self._num_requests)]

    def _take_whole_groups(self) -> list[int]:
        """The waiting numbers of groups whose samples are all there, in order; they wait no longer."""
        counts: dict[int, int] = {}
        for number in self._waiting:
            counts[number // self._group_size] = counts.get(number // self._group_size, 0) + 1
        whole = {group for group, count in counts.items() if count == self._group_size}
        taken = sorted(number for number in self._waiting if number // self._group_size in whole)
        self._waiting = [number for number in self._waiting if number // self._group_size not in whole]
        return taken
