"""Rewards as callables: completions and reference answers in, a number for each out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from egspo_lightning.errors import require
from egspo_lightning.rewards.grading import Grade, MathGrader
from egspo_lightning.types import Problem


class Details(NamedTuple):
    """What else is known of a completion, for rewards that look at more than its text."""

    problem: Problem
    prompt: str
    """What the policy was given, with special tokens."""
    num_tokens: int
    """Tokens of the completion, with the EOS."""
    max_completion_length: int
    """Tokens that it could have had."""
    is_truncated: bool
    """The length limit came before an EOS."""
    grade: Grade
    """The verdict on its answer."""


class Reward(Protocol):
    """Anything that gives completions a number each: an object with ``__call__``, or a function.

    It is called with whole groups (all completions of a problem, next to one another; experts' solutions apart), some
    at a time and one call after another: while others are being sampled, from another thread, which has PyTorch's own
    defaults for gradients and devices. A parameter ``details`` that has a default is given a `Details` a completion.
    """

    # Any, and by position: so the command line takes parameters of any name, with annotations or without
    def __call__(self, completions: Any, golds: Any, /) -> Any:
        """One finite number a completion, in their order.

        Args:
            completions: (B) texts, without special tokens
            golds: (B) reference answers, as their source has written them
        """


class CorrectnessReward(Reward):
    r"""Two rewards: one for a right final ``\boxed{}`` answer, one for everything else.

    Args:
        correct: Reward of a right answer.
        incorrect: Reward of a wrong answer, and of none, a timeout or a crash of the grader.
        num_workers: Grader processes that work at the same time; none is started while plain numbers suffice.
        deadline_s: Seconds after which an answer counts as incorrect.
        memory_limit_mb: Address space of a grader process, in MiB; an answer that needs more is incorrect.

    Raises:
        UserError: an argument is out of its range.
    """

    def __init__(
        self,
        correct: float = 1.0,
        incorrect: float = 0.0,
        num_workers: int = 1,
        deadline_s: float = 10.0,
        memory_limit_mb: int = 1024,
    ) -> None:
        for name, value in (("correct", correct), ("incorrect", incorrect)):
            require(math.isfinite(value), f"data.reward.{name}", value, "a finite number")
        self.correct = correct
        self.incorrect = incorrect
        self.grader = MathGrader(num_workers=num_workers, deadline_s=deadline_s, memory_limit_mb=memory_limit_mb)

    def __call__(
        self, completions: Sequence[str], golds: Sequence[str], details: Sequence[Details] = ()
    ) -> list[float]:
        """Score completions, in their order; those whose verdict is known are not graded again.

        Raises:
            ValueError: there are not as many references as completions.
            RuntimeError: the grader's processes cannot be started.
        """
        grades = [detail.grade for detail in details] or self.grader.grade(completions, golds)
        return [self.correct if grade.correct else self.incorrect for grade in grades]

    def close(self) -> None:
        """End the grader's processes; may be called again, and scoring after it starts new ones."""
        self.grader.close()
