"""Sampled answers with their verdicts: the input of metrics and the content of completion files."""

from typing import NamedTuple

from egspo_lightning.types import Problem


class Answer(NamedTuple):
    """One sampled answer to a problem."""

    problem: Problem
    sample: int
    """Number among the problem's samples, from 0."""
    text: str
    extracted: str | None
    """The answer that was found in the text."""
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
