"""Rewards as the rollouts call them: completions and references in, a number and a grade for each out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from egspo_lightning.errors import UserError
from egspo_lightning.rewards.grading import Grade, MathGrader


class Scored(NamedTuple):
    """The reward of one completion, with the verdict behind it."""

    reward: float
    grade: Grade


class Reward(Protocol):
    """Anything that scores completions against reference answers, in their order."""

    def __call__(self, completions: Sequence[str], golds: Sequence[str]) -> list[Scored]:
        """One `Scored` a completion."""


class CorrectnessReward:
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
            if not math.isfinite(value):
                raise UserError(f"data.reward.{name} must be a finite number, got {value}.")
        self.correct = correct
        self.incorrect = incorrect
        self._grader = MathGrader(num_workers=num_workers, deadline_s=deadline_s, memory_limit_mb=memory_limit_mb)

    def __call__(self, completions: Sequence[str], golds: Sequence[str]) -> list[Scored]:
        """Score completions, in their order.

        Raises:
            ValueError: there are not as many references as completions.
            RuntimeError: the grader's processes cannot be started.
        """
        grades = self._grader.grade(completions, golds)
        return [Scored(self.correct if grade.correct else self.incorrect, grade) for grade in grades]

    def close(self) -> None:
        """End the grader's processes; may be called again, and scoring after it starts new ones."""
        self._grader.close()
