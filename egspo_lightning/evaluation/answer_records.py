"""An answered problem with its verdict: what metrics are made of, and what files of completions hold."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from egspo_lightning.types import Problem


class Answer(NamedTuple):
    """One sampled answer to a problem."""

    problem: Problem
    sample: int
    """Which of the problem's samples, from 0."""
    text: str
    extracted: str | None
    """The answer that was found in the text."""
    answer_class: int | None
    """Equal where two answers to one problem are equivalent, so that votes are over values; None for no answer."""
    correct: bool | None
    """None where the problem has no reference answer."""
    status: str
    """How the grader got to its verdict: graded, no_answer, timeout, crashed; no_reference where there is none."""
    length: int
    """Tokens, with the EOS."""
    is_truncated: bool
    """The length limit was reached before an EOS."""


def row_of(benchmark: str, answer: Answer) -> dict[str, Any]:
    """The answer as a row of a JSON Lines file."""
    problem, fields = answer.problem, answer._asdict()
    del fields["problem"]
    fields["completion"] = fields.pop("text")
    asked = {"benchmark": benchmark, "id": problem.id, "problem": problem.problem, "answer": problem.answer or None}
    return asked | {name: fields[name] for name in _COLUMNS}


_COLUMNS = ("sample", "completion", "extracted", "answer_class", "correct", "status", "length", "is_truncated")


def answer_of(row: dict[str, Any], problem: Problem) -> Answer:
    """What ``row_of`` has written of an answer to this problem."""
    fields = {name: row[name] for name in _COLUMNS}
    return Answer(problem=problem, text=fields.pop("completion"), **fields)


def by_problem(answers: Iterable[Answer]) -> Iterator[tuple[Problem, Sequence[Answer]]]:
    """The answers of each problem, which stand next to one another."""
    for problem, group in groupby(answers, key=lambda answer: answer.problem):
        yield problem, list(group)
