r"""Whether an answer is right: extraction, a fast path in this process, math-verify in killable workers.

Where public graders disagree, this one does as follows (each line has its cases in ``tests/rewards/test_policies.py``):

==================  =====================================================================================
several boxes       the last counts; boxes with only commas, "and", "or" and spacing between are one answer, the list
units               two units must be the same one, by name or abbreviation, never converted (12 cm is not 12 m, nor
                    120 mm); a unit on one side alone is not looked at; ``\$5`` is 5 dollars; "units" says nothing
percentages         the reference ``10\%`` is 10 and is 0.1; two percentages are compared as they are; a sign in the
                    answer alone is not looked at (``10\%`` answers 10, not 0.1): to append one gains nothing
degrees             ``90^\circ``, 90° and 90 degrees are 90, and no number of radians; ``\cos 60^\circ`` is 1/2
bases               ``2516_8`` needs the same base, or another one and the same value (``5_{10}``), or no base and the
                    same digits
sets, lists         order and repetition do not count; ``1, 2`` is ``\{1, 2\}``; neither is a tuple ``(1, 2)``, though
                    a list without brackets may answer a tuple, and a tuple such a list, in its order
intervals           brackets count: ``[1, 2)`` is not ``(1, 2)``; ``1 \le x < 2`` answers ``[1, 2)``; ``1, 2`` does
                    not answer ``[1, 2]``, nor ``[2, 1]``
mixed numbers       ``3\frac{1}{2}`` and ``3 1/2`` are 7/2; ``31/2`` is not
decimals            exact against decimals and integers; a decimal is a fraction or an irrational number if it agrees
                    with it to six decimals and to a ten-thousandth of its size (0.333333 is 1/3, 0.333 is not);
                    sums of decimals are exact (0.1 + 0.2 - 0.3 is 0)
repeating decimals  ``0.\overline{3}``, ``0.\bar{3}`` and ``0.(3)`` are 1/3
thousands           ``1,234``, ``1{,}234``, ``1\,234``, ``1 234`` and full-width digits are 1234; ``(1,234)`` is a pair
text                by words, whatever their case and font
choices             ``(A)``, ``A``, ``A.``, ``\text{A}`` are the letter; ``(C) 12`` is C and is 12
assignments         ``x = 5`` is 5, and is not ``y = 5``; ``5 = 6`` is never right; ``x = 4, y = 3`` is the tuple
                    (4, 3), in the order of the names, unless both sides name them
``\pm``             both values: ``\pm 3`` is ``3, -3``, not 3
presentation        ``$``, fonts, sizing, spacing, a final full stop and Unicode for LaTeX do not count; nor, in
                    algebra, does the case of a variable
==================  =====================================================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from types import TracebackType
from typing import Any, NamedTuple

from egspo_lightning.errors import require
from egspo_lightning.rewards import equivalence
from egspo_lightning.rewards.extraction import MAX_ANSWER_LENGTH, after_reasoning, extract_boxed
from egspo_lightning.rewards.fast_path import compare_fast, for_algebra
from egspo_lightning.rewards.workers import Outcome, WorkerPool

EXTRACTIONS = ("boxed", "lenient")

_POLICIES = 3
"""Counted up whenever a verdict may change, so that none is kept from before."""


class Grade(NamedTuple):
    """The verdict on one answer, and how it came about."""

    correct: bool
    status: str
    """graded, no_answer (none was found), timeout (past the deadline) or crashed (the worker died, or met its limit of
    memory)"""
    extracted: str | None
    """The answer that was found in the text."""
    seconds: float
    """Time in a worker; 0 where none was needed."""


class MathGrader:
    r"""Grades answers against references such as ``72`` or ``\frac{1}{2}``; a context manager.

    Worker processes are started by the first answer that needs algebra, never by plain numbers, and end with
    `close` or with this process. Usable from any thread; a forked or pickled copy starts workers of its own.

    Args:
        num_workers: Worker processes that grade at the same time.
        deadline_s: Seconds after which an answer counts as wrong, with status timeout.
        memory_limit_mb: Address space of a worker, in MiB; beyond it an answer counts as wrong.
        extraction: "boxed" reads the last balanced \boxed{} after the reasoning; "lenient" looks for an
            answer in free text as math-verify does.

    Raises:
        UserError: an argument is out of its range.
    """

    def __init__(
        self,
        *,
        num_workers: int = 1,
        deadline_s: float = 10.0,
        memory_limit_mb: int = 1024,
        extraction: str = "boxed",
    ) -> None:
        require(num_workers >= 1, "num_workers", num_workers, "at least 1")
        require(deadline_s > 0, "deadline_s", deadline_s, "a positive number of seconds")
        require(
            memory_limit_mb >= 256,
            "memory_limit_mb",
            memory_limit_mb,
            "at least 256: math-verify needs as much",
        )
        require(extraction in EXTRACTIONS, "extraction", repr(extraction), f"one of {', '.join(EXTRACTIONS)}")
        self.extraction = extraction
        self.deadline_s = deadline_s
        self.memory_limit_mb = memory_limit_mb
        self._pool = WorkerPool(num_workers, deadline_s, memory_limit_mb)

    def __enter__(self) -> MathGrader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def grade(self, completions: Sequence[str], golds: Sequence[str]) -> list[Grade]:
        """Grade whole completions, in their order; text before the last ``</think>`` is not looked at.

        Raises:
            ValueError: there are not as many references as completions.
            RuntimeError: the workers cannot be started, or another thread has closed the grader.
        """
        _require_pairs(completions, golds)
        if self.extraction == "boxed":
            return self._grade(map(extract_boxed, completions), golds)
        requests = [
            _request(after_reasoning(text), gold, "lenient") for text, gold in zip(completions, golds, strict=True)
        ]
        return [_lenient_grade(outcome) for outcome in self._pool.run(requests)]

    def grade_answers(self, answers: Sequence[str], golds: Sequence[str]) -> list[Grade]:
        r"""Grade bare answers, in their order; of one that holds a ``\boxed{}`` its content counts.

        Raises:
            ValueError: there are not as many references as answers.
            RuntimeError: the workers cannot be started, or another thread has closed the grader.
        """
        _require_pairs(answers, golds)
        return self._grade(map(_bare, answers), golds)

    def equivalence_classes(self, groups: Sequence[Sequence[str | None]]) -> list[list[int | None]]:
        """The class of each bare answer among the answers to its problem, to be voted over; None for no answer.

        Each item of ``groups`` holds the answers to one problem. Classes are numbered in order of appearance, and
        an answer joins the first one whose first member it equals; see `equivalence.equivalence_classes`.

        Raises:
            RuntimeError: the workers cannot be started, or another thread has closed the grader.
        """
        bare = [[None if answer is None else _bare(answer) for answer in group] for group in groups]
        return equivalence.equivalence_classes(bare, self._compare)

    def settings(self) -> dict[str, Any]:
        """What its verdicts depend on, for whoever keeps them: also the version of math-verify and of our policies."""
        return {
            "extraction": self.extraction,
            "deadline_s": self.deadline_s,
            "memory_limit_mb": self.memory_limit_mb,
            "grading": f"{_POLICIES}, math-verify {version('math-verify')}",
        }

    def close(self) -> None:
        """End the worker processes, within a second; may be called again, and grading after it starts new ones."""
        self._pool.close()

    def worker_pids(self) -> list[int]:
        """The live processes of this grader; empty until an answer needs algebra."""
        return self._pool.pids()

    def _compare(self, answers: Sequence[str], golds: Sequence[str]) -> list[bool | None]:
        grades = self._grade(answers, golds)
        return [grade.correct if grade.status == "graded" else None for grade in grades]

    def _grade(self, answers: Iterable[str | None], golds: Sequence[str]) -> list[Grade]:
        graded: list[tuple[str | None, Grade | None]] = []

        def requests() -> Iterator[dict[str, Any] | None]:  # made while the workers are at the ones before
            for answer, gold in zip(answers, map(_bare_gold, golds), strict=True):
                grade = _grade_fast(answer, gold)
                graded.append((answer, grade))
                yield _request(answer, gold, "boxed") if grade is None and answer is not None else None

        outcomes = iter(self._pool.run(requests()))
        return [_worker_grade(answer, next(outcomes)) if grade is None else grade for answer, grade in graded]


def _grade_fast(answer: str | None, gold: str) -> Grade | None:
    if answer is None:
        return Grade(False, "no_answer", None, 0.0)
    correct = compare_fast(answer, gold)
    return None if correct is None else Grade(correct, "graded", answer, 0.0)


def _worker_grade(answer: str | None, outcome: Outcome) -> Grade:
    correct = outcome.reply is not None and outcome.reply["correct"]
    return Grade(correct, outcome.status, answer, outcome.seconds)


def _lenient_grade(outcome: Outcome) -> Grade:
    if outcome.reply is None:
        return Grade(False, outcome.status, None, outcome.seconds)
    extracted = outcome.reply["extracted"]
    status = "no_answer" if extracted is None else "graded"
    return Grade(outcome.reply["correct"], status, extracted, outcome.seconds)


def _bare(answer: str) -> str | None:
    boxed = extract_boxed(answer)
    if boxed is None:
        boxed = answer.strip()
    return boxed if 0 < len(boxed) <= MAX_ANSWER_LENGTH else None


def _bare_gold(gold: str) -> str:
    return extract_boxed(gold) or gold


def _request(answer: str, gold: str, extraction: str) -> dict[str, Any]:
    if extraction == "boxed":
        answer, gold = for_algebra(answer, gold)
    return {"answer": answer, "gold": gold, "extraction": extraction}


def _require_pairs(answers: Sequence[str], golds: Sequence[str]) -> None:
    if len(answers) != len(golds):
        raise ValueError(f"as many references as answers are needed, got {len(golds)} for {len(answers)}")
