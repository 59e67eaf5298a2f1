"""Reward protocol, and the reward for a correct answer: completions and gold answers in, a number for each out."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from egspo_lightning.errors import require
from egspo_lightning.rewards.grading import Extraction, MathGrader
from egspo_lightning.rewards.workers import Grade
from egspo_lightning.types import Count, PositiveFloat, Problem


class Details(NamedTuple):
    """Facts about a completion, for rewards that use more than its text."""

    problem: Problem
    prompt: str
    """The tokens that the policy continued, as text with special tokens."""
    num_tokens: int
    """Tokens of the completion, EOS included."""
    max_completion_length: int
    """The length limit, in tokens."""
    is_truncated: bool
    """Whether it reached the length limit before an EOS."""
    grade: Grade
    """The verdict on its answer."""


class Reward(Protocol):
    """A callable that maps completions to numbers: an object with ``__call__``, or a function.

    Each call gets some whole groups: all completions of a problem, next to one another. Solutions of expert
    demonstrations come in calls of their own. Calls never overlap. They come from a thread beside the one that
    samples, with PyTorch's defaults for gradients and devices. A reward may have a parameter ``details`` with a
    default; it then receives one `Details` for each completion. Further parameters receive the columns of the data that
    have their names, one value for each completion; ``**kwargs`` receives all columns (see `rewards.column_arguments`).
    """

    @abstractmethod
    # Any, by position only: the command line accepts parameters of any name, annotated or not
    def __call__(self, completions: Any, golds: Any, /) -> Any:
        """Return one finite number for each completion, in their order.

        Args:
            completions: (B) texts, without special tokens
            golds: (B) gold answers, as their source writes them
        """


class CorrectnessReward(Reward):
    r"""Two rewards: one for a correct final ``\boxed{}`` answer, one for everything else.

    Args:
        correct: Reward of a correct answer.
        incorrect: Reward of a wrong answer, a missing answer, and a timeout or crash of the grader.
        num_workers: Grader processes that work at the same time; plain numbers need none.
        deadline_s: Seconds after which an answer counts as incorrect.
        memory_limit_mb: Address space of a grader process, in MiB, at least 256; answers that need more are incorrect.
        extraction: "boxed" reads the last \boxed{}; "lenient" also finds an answer in free text.

    Raises:
        UserError: a reward is not finite, or memory_limit_mb is below 256.
    """

    needs_answers = True
    """A completion without an answer gets no reward, so demonstrations without one are dropped."""

    def __init__(
        self,
        correct: float = 1.0,
        incorrect: float = 0.0,
        num_workers: Count = 1,
        deadline_s: PositiveFloat = 10.0,
        memory_limit_mb: Count = 1024,
        extraction: Extraction = "boxed",
    ) -> None:
        for name, value in (("correct", correct), ("incorrect", incorrect)):
            require(math.isfinite(value), f"data.reward.{name}", value, "a finite number")
        self.correct, self.incorrect = correct, incorrect
        self.grader = MathGrader(
            num_workers=num_workers, deadline_s=deadline_s, memory_limit_mb=memory_limit_mb, extraction=extraction
        )

    def __call__(
        self, completions: Sequence[str], golds: Sequence[str], details: Sequence[Details] = ()
    ) -> list[float]:
        """Score completions, in their order; ``details`` hold verdicts already, so that nothing is graded again.

        Raises:
            ValueError: the numbers of completions and gold answers differ.
            RuntimeError: the grader's processes cannot be started.
        """
        grades = [detail.grade for detail in details] or self.grader.grade(completions, golds)
        return [self.correct if grade.correct else self.incorrect for grade in grades]

    def close(self) -> None:
        """End the grader's processes; may be called again. Scoring after it starts new ones."""
        self.grader.close()
