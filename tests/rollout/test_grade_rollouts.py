"""Overlapped grading: order, threads, failures and interrupts."""

import threading
import time
from types import SimpleNamespace

import pytest

from egspo_lightning.rewards.grading import MathGrader
from egspo_lightning.rollout import grade_rollouts
from egspo_lightning.rollout.engine import Sample
from egspo_lightning.rollout.grade_rollouts import OverlappedGrading

SAMPLES = [Sample([i], False, [0.0]) for i in range(6)]
LONG_S = 20.0
"""Timeout that only a broken implementation reaches."""


def grading_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("grading")]


class Grade:
    """Grades sample ``[i]`` of request i as ``"i"`` and records its calls."""

    def __init__(self, on_call=lambda numbers: None):
        self.calls, self.threads = [], []
        self.on_call = on_call
        self.busy = threading.Lock()

    def __call__(self, numbers, samples):
        assert self.busy.acquire(blocking=False), "called twice at a time"
        try:
            self.calls.append(list(numbers))
            self.threads.append(threading.current_thread())
            self.on_call(numbers)
            assert [sample.token_ids for sample in samples] == [[number] for number in numbers]
            return [str(number) for number in numbers]
        finally:
            self.busy.release()


def take(grading, *batches):
    for batch in batches:
        grading.add([(i, SAMPLES[i]) for i in batch])


@pytest.mark.parametrize(
    ("size", "batches", "calls"),
    [
        (2, [[0, 1, 2, 3, 4, 5]], [[0, 1, 2, 3, 4, 5]]),
        (2, [[0, 1], [2, 3], [4, 5]], [[0, 1], [2, 3], [4, 5]]),
        (2, [[0, 1, 2], [3, 4, 5]], [[0, 1], [2, 3, 4, 5]]),  # groups stay whole
        (2, [[5, 3, 1], [0], [2, 4]], [[0, 1], [2, 3, 4, 5]]),
        (3, [[0, 3], [1, 4], [2], [5]], [[0, 1, 2], [3, 4, 5]]),
        (1, [[4], [2, 0], [5, 3, 1]], [[4], [0, 2], [1, 3, 5]]),
        (6, [[0, 1, 2], [3, 4, 5]], [[0, 1, 2, 3, 4, 5]]),
    ],
)
def test_whole_groups_are_graded_on_arrival_and_returned_in_order(size, batches, calls):
    grade = Grade()
    with OverlappedGrading(grade, 6, size) as grading:
        take(grading, *batches)
        assert grading.finish() == ["0", "1", "2", "3", "4", "5"]
    assert grade.calls == calls
    assert grade.threads[-1] is threading.main_thread()  # no sampling is left to overlap with the last call
    assert threading.main_thread() not in grade.threads[:-1]
    assert grading_threads() == []


def test_grading_runs_while_the_caller_samples():
    """The caller adds its next batch only after the first one has been graded in the background."""
    graded = threading.Event()
    grade = Grade(lambda numbers: graded.set())
    with OverlappedGrading(grade, 6, 2) as grading:
        take(grading, [0, 1])
        assert graded.wait(LONG_S)
        take(grading, [2, 3, 4, 5])
        assert len(grading.finish()) == 6


def test_caller_is_not_blocked_while_grading_runs():
    sampled = threading.Event()
    grade = Grade(lambda numbers: sampled.wait(LONG_S) or pytest.fail("the caller has waited"))
    with OverlappedGrading(grade, 6, 2) as grading:
        take(grading, [0, 1], [2, 3], [4, 5])
        sampled.set()
        assert len(grading.finish()) == 6


def test_zero_samples_cause_no_grading_call():
    grade = Grade()
    with OverlappedGrading(grade, 0, 2) as grading:
        assert grading.finish() == []
    assert grade.calls == []


def test_grading_error_is_raised_when_the_next_batch_is_added():
    def fail(numbers):
        raise ZeroDivisionError(f"at {numbers}")

    grade = Grade(fail)
    with OverlappedGrading(grade, 6, 2) as grading:
        take(grading, [0, 1])
        grading._futures[0][1].exception(LONG_S)  # wait for the error
        with pytest.raises(ZeroDivisionError, match=r"at \[0, 1\]"):
            take(grading, [2, 3])  # so sampling stops early
    assert grade.calls == [[0, 1]]
    assert grading_threads() == []


@pytest.mark.parametrize("failing", [[0, 1], [2, 3], [4, 5]])
def test_grading_error_is_raised_by_finish_at_the_latest(failing):
    sampled = threading.Event()

    def fail(numbers):
        sampled.wait(LONG_S)
        if numbers == failing:
            raise ZeroDivisionError(f"at {numbers}")

    with OverlappedGrading(Grade(fail), 6, 2) as grading:
        take(grading, [0, 1], [2, 3], [4, 5])
        sampled.set()
        with pytest.raises(ZeroDivisionError, match=f"at \\{failing}"):
            grading.finish()
    assert grading_threads() == []


def test_interrupted_sampling_finishes_current_grading_and_drops_the_queue():
    begun, ending = threading.Event(), threading.Event()

    def hold(numbers):
        begun.set()
        ending.wait(LONG_S)

    def sample():
        with OverlappedGrading(grade, 6, 2) as grading:
            take(grading, [0, 1], [2, 3])
            assert begun.wait(LONG_S)
            threading.Timer(0.05, ending.set).start()
            raise KeyboardInterrupt

    grade = Grade(hold)
    with pytest.raises(KeyboardInterrupt):
        sample()
    assert grade.calls == [[0, 1]]  # [2, 3] was queued
    assert grading_threads() == []


def test_interrupt_cancels_running_grading():
    """A worker has an answer that would take minutes to grade."""
    hanging_answer = r"9^{9^{9^{9}}}+x"
    begun = threading.Event()
    raised = []

    def grade(numbers, samples):
        begun.set()
        try:
            return grader.grade_answers([hanging_answer] * len(numbers), ["5"] * len(numbers))
        except RuntimeError as error:
            raised.append(str(error))
            raise

    def sample(delay):
        begun.clear()
        with OverlappedGrading(grade, 6, 2, cancel=grader.close) as grading:
            take(grading, [0, 1])
            assert begun.wait(LONG_S)
            time.sleep(delay)
            raise KeyboardInterrupt

    with MathGrader(deadline_s=10 * LONG_S) as grader:
        grader.grade_answers(["x+1"], ["1+x"])  # starts the workers
        for delay in (0.3, 0.0):  # during the call of the pool, and possibly before it
            started = time.monotonic()
            with pytest.raises(KeyboardInterrupt):
                sample(delay)
            assert time.monotonic() - started < LONG_S / 2
            assert grading_threads() == []
        assert grader.worker_pids() == []
        assert grader.grade_answers(["x+1"], ["1+x"])[0].correct
    assert len(raised) == 2
    assert "closed" in raised[0]


def test_missing_samples_raise_an_error_with_counts():
    with OverlappedGrading(Grade(), 6, 2) as grading:
        take(grading, [0, 1], [3, 4])
        with pytest.raises(RuntimeError, match=r"data\.engine gave no sample for 2 of 6 requests"):
            grading.finish()


def test_seconds_waited_counts_only_blocking_time(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(grade_rollouts, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def work(numbers):
        now[0] += {(0, 1): 1.0, (2, 3): 2.0, (4, 5): 4.0}[tuple(numbers)]

    with OverlappedGrading(Grade(work), 6, 2) as grading:
        for batch in ([0, 1], [2, 3]):
            take(grading, batch)
            grading._futures[-1][1].result(LONG_S)
        take(grading, [4, 5])
        grading.finish()
    assert grading.seconds_waited == 4.0
