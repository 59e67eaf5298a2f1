"""Grading of rollouts: adds texts, verdicts and rewards to sampled completions, while others are still sampled.

``grade_rollouts`` grades samples. ``OverlappedGrading`` calls it in a thread for complete groups while the engine
decodes the rest. The grader works in its own processes and the language model on a device, so sampling does
not wait for grading. The thread takes part in no collective, so ranks stay in step however long grading takes.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from egspo_lightning.data.decoding import decode
from egspo_lightning.rewards.composition import WeightedReward
from egspo_lightning.rewards.functions import Details
from egspo_lightning.rollout.engine import RolloutEngine, Sample, stream_samples
from egspo_lightning.rollout.policy_protocol import RolloutPolicy
from egspo_lightning.rollout.rollout_records import Prompt
from egspo_lightning.types import Completion, Sampling

_CANCEL_EVERY_S = 0.1


def sample_and_grade(
    policy: RolloutPolicy,
    engine: RolloutEngine,
    reward: WeightedReward,
    prompts: Sequence[Prompt],
    num_samples: int,
    sampling: Sampling,
) -> tuple[list[Completion], float]:
    """Sample and grade ``num_samples`` completions of each prompt; sampling and grading overlap. Collective.

    All ranks must call it equally often, with or without prompts.

    Returns:
        The completions, those of a prompt adjacent, and the seconds spent waiting for grades once sampling had ended.

    Raises:
        UserError: the reward did not give one finite number for each completion.
    """
    owners = [prompt for prompt in prompts for _ in range(num_samples)]

    def grade_some(numbers: Sequence[int], samples: Sequence[Sample]) -> list[Completion]:
        return grade_rollouts(policy, reward, [owners[i] for i in numbers], samples, sampling.max_completion_length)

    with OverlappedGrading(grade_some, len(owners), num_samples, cancel=reward.grader.close) as grading:
        for batch in stream_samples(policy, engine, prompts, num_samples, sampling):
            grading.add(batch)
        return grading.finish(), grading.seconds_waited


def grade_rollouts(
    policy: RolloutPolicy,
    reward: WeightedReward,
    prompts: Sequence[Prompt],
    samples: Sequence[Sample],
    max_completion_length: int,
) -> list[Completion]:
    """Grade samples, one for each prompt: the grader's verdicts first, then the rewards, which may use them.

    Raises:
        UserError: the reward did not give one finite number for each completion.
    """
    if not samples:
        return []
    decoded = decode(policy.tokenizer, [it.token_ids for it in prompts], [it.token_ids for it in samples])
    golds = [prompt.problem.answer for prompt in prompts]
    grades = reward.grader.grade([it.judged for it in decoded], golds)
    details = [
        Details(prompt.problem, it.prompt, len(sample.token_ids), max_completion_length, sample.is_truncated, verdict)
        for prompt, it, sample, verdict in zip(prompts, decoded, samples, grades, strict=True)
    ]
    scored = reward.score([it.text for it in decoded], golds, details)
    return [
        Completion(
            problem=detail.problem,
            token_ids=sample.token_ids,
            logprobs=sample.logprobs,
            text=it.text,
            is_truncated=sample.is_truncated,
            reward=result.reward,
            correct=detail.grade.correct,
            extracted=detail.grade.extracted,
            status=detail.grade.status,
            reward_terms=result.terms,
            entropies=sample.entropies,
        )
        for sample, it, detail, result in zip(samples, decoded, details, scored, strict=True)
    ]


class OverlappedGrading:
    """Grades complete groups of the samples that it receives, and gives all completions in the order of the requests.

    The last samples are graded in the caller's thread, since nothing is left to overlap with. As a context manager it
    ends all grading on exit, also after an exception.

    Args:
        grade: Turns request numbers and their samples into completions, in the same order. One call runs at a time.
        num_requests: Samples to receive.
        group_size: Adjacent requests that are graded together.
        cancel: Makes a running call of ``grade`` raise. Called from another thread after an exception, again and again
            until the call has ended. Without it, the exit waits for the call.
    """

    def __init__(
        self,
        grade: Callable[[Sequence[int], Sequence[Sample]], list[Completion]],
        num_requests: int,
        group_size: int,
        *,
        cancel: Callable[[], None] | None = None,
    ) -> None:
        self._grade, self._num_requests, self._group_size = grade, num_requests, group_size
        self._cancel = cancel
        self._samples: dict[int, Sample] = {}
        self._waiting: list[int] = []  # request numbers of samples not yet submitted
        self._futures: list[tuple[list[int], Future[list[Completion]]]] = []
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="grading")  # its thread starts with the first task
        self.seconds_waited = 0.0
        """Time that the caller spent waiting for grades."""

    def __enter__(self) -> "OverlappedGrading":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)
        if kind is not None and self._cancel is not None:
            running = [future for _, future in self._futures if not future.done()]
            while running:  # again and again: a call that has not reached its workers yet cannot be canceled
                self._cancel()
                running = list(wait(running, _CANCEL_EVERY_S).not_done)
        self._executor.shutdown(wait=True)

    def add(self, batch: Sequence[tuple[int, Sample]]) -> None:
        """Receive (request number, sample) pairs, and submit the groups that they complete.

        Raises:
            Exception: the error of an earlier batch whose grading has ended.
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
        """Wait for all completions, in the order of the requests.

        Raises:
            Exception: the error of a batch.
            RuntimeError: a sample is missing.
        """
        if missing := self._num_requests - len(self._samples):
            raise RuntimeError(f"data.engine gave no sample for {missing} of {self._num_requests} requests.")
        started = time.perf_counter()
        graded: dict[int, Completion] = {}
        for numbers, future in self._futures:
            graded.update(zip(numbers, future.result(), strict=True))
        if last := sorted(self._waiting):
            graded.update(zip(last, self._grade(last, [self._samples[number] for number in last]), strict=True))
        self.seconds_waited = time.perf_counter() - started
        return [graded[number] for number in range(self._num_requests)]

    def _take_whole_groups(self) -> list[int]:
        """Take the numbers of complete groups, in order, out of those that wait."""
        size = self._group_size
        counts = Counter(number // size for number in self._waiting)
        taken = sorted(number for number in self._waiting if counts[number // size] == size)
        self._waiting = [number for number in self._waiting if counts[number // size] < size]
        return taken
