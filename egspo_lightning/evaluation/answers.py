"""Answers in evaluation: how they are sampled, and the records of them, with verdicts."""

from dataclasses import dataclass
from typing import NamedTuple

from egspo_lightning.errors import UserError
from egspo_lightning.types import NonNegativeFloat, PositiveInt, PositiveShare, Problem, Sampling


@dataclass(frozen=True)
class AnswerSampling:
    """Sampling of the answers to each problem: one greedy answer by default.

    Args:
        num_samples: Answers sampled for each problem.
        temperature: Sampling temperature; 0 is greedy.
        top_p: Sample from the smallest set of tokens with this probability mass, in (0, 1].
        max_completion_length: Longest answer in tokens; null for the length of the training rollouts.
    """

    num_samples: PositiveInt = 1
    temperature: NonNegativeFloat = 0.0
    top_p: PositiveShare = 1.0
    max_completion_length: PositiveInt | None = None

    def require_different_samples(self, where: str) -> None:
        """Refuse several greedy answers; ``where`` begins the message.

        Raises:
            UserError: several samples are asked for at temperature 0.
        """
        if self.num_samples > 1 and self.temperature == 0:
            raise UserError(
                f"{where} num_samples is {self.num_samples}, but at temperature 0 all samples are the same. "
                "Set a temperature above 0, or num_samples to 1."
            )

    def within(self, max_completion_length: int) -> Sampling:
        """Return the sampling of one answer; the given length applies where none is set."""
        length = self.max_completion_length or max_completion_length
        return Sampling(int(length), float(self.temperature), float(self.top_p))


GREEDY = AnswerSampling()
"""Source of the default values."""


class Answer(NamedTuple):
    """One sampled answer to a problem."""

    problem: Problem
    sample: int
    """Number among the problem's samples, from 0."""
    completion: str
    """The text, without special tokens."""
    extracted: str | None
    """The answer that was found in it."""
    answer_class: int | None
    """Equal for equivalent answers to one problem, so that majority votes count values; None for no answer."""
    correct: bool | None
    """None where the problem has no gold answer."""
    status: str
    """The grader's: graded, no_answer, timeout or crashed; no_reference where the problem has no gold answer."""
    length: int
    """Tokens, with the EOS."""
    is_truncated: bool
    """The length limit was reached before an EOS."""
