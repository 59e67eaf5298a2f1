r"""Grader: extracts answers and compares them with gold answers, in this process or with math-verify in workers.

Public graders disagree on the cases below; this grader decides them as the table says. Each line has its test cases
in ``tests/rewards/test_grading_rules.py``. The guide "Grading rules" says what other graders do.

==================  =====================================================================================
boxes               the last ``\boxed{}`` counts; boxes with only commas, "and", "or" and spacing between are one
                    answer, the list; without a ``\boxed{}``, ``\fbox{}``, ``\framebox{}`` and ``\boxed 42`` count
units               two units must be the same one, by name or abbreviation, never converted (12 cm is not 12 m, nor
                    120 mm); a unit or a noun on one side alone is ignored (``42 apples``, ``\$5 \text{ per hour}``);
                    scale words multiply (5 million is 5000000, not 5); "5 or more" is not 5
percentages         the gold answer ``10\%`` is 10 and is 0.1; two percentages are compared as they are; a sign in the
                    answer alone is ignored (``10\%`` answers 10, not 0.1), so appending one gains nothing
degrees             ``90^\circ``, 90° and 90 degrees are 90, and no number of radians; ``\cos 60^\circ`` is 1/2
bases               ``2516_8`` needs the same base, or another one and the same value (``5_{10}``), or no base and the
                    same digits
sets, lists         order and repetition do not count; ``1, 2`` is ``\{1, 2\}``; neither is a tuple ``(1, 2)``, though
                    a list without brackets may answer a tuple, and a tuple such a list, in its order; an ellipsis
                    is an element
intervals           brackets count: ``[1, 2)`` is not ``(1, 2)``; inequalities, set builders and unions are the set of
                    their solutions; ``1, 2`` does not answer ``[1, 2]``, nor ``[2, 1]``
mixed numbers       ``3\frac{1}{2}`` and ``3 1/2`` are 7/2; ``31/2`` is not
decimals            exact against decimals and integers; a decimal is a fraction or an irrational number if it agrees
                    with it to six decimals and to a ten-thousandth of its size (0.333333 is 1/3, 0.333 is not);
                    sums of decimals are exact (0.1 + 0.2 - 0.3 is 0); ``4.5e33`` is ``4.5 \times 10^{33}``
repeating decimals  ``0.\overline{3}``, ``0.\bar{3}``, ``0.(3)`` and ``0.333...`` are 1/3
thousands           ``1,234``, ``1{,}234``, ``1\,234``, ``1 234``, ``12,34,567``, ``1.234,5`` and full-width digits are
                    numbers; ``(1,234)`` is a pair; ``70,110`` is 70110 and is the list ``70, 110``
text                by words, whatever their case and font; letters such as ``ABC`` are a word, ``xy`` is a product
choices             ``(A)``, ``A``, ``A.``, ``\text{A}`` are the letter; ``(C) 12`` is C and is 12
equations           ``x = 5`` and ``5 = x`` are 5, and are not ``y = 5``; ``x = 5 = 7`` is never right; ``x = 4, y = 3``
                    is the tuple (4, 3), in the order of the names, unless both sides name them; two equations are
                    equal if one is a multiple of the other (``2x - y + 1 = 0`` is ``y = 2x + 1``)
``\pm``             both values: ``\pm 3`` is ``3, -3``, not 3; ``(\pm 3, \pm 4)`` is four pairs
symbols             case, index and prime count: ``R`` is not ``r``, ``I_0`` not ``I_1``, ``f'(x)`` not ``f(x)``;
                    ``i`` is the imaginary unit, ``I`` and ``\gamma`` are symbols; symbols may be taken as positive
                    (``\ln ab`` is ``\ln a + \ln b``)
ratios, times       ``1:2:3`` is ``2:4:6``, not 1/6; ``1:2`` is 1/2; ``12:30`` is a time and ``2026-09-01`` a date
presentation        ``$``, fonts, sizing, spacing, remarks ("Answer:", "exactly"), final punctuation, plain notation
                    (``pi/2``, ``sqrt(3)``, ``x**2``) and Unicode for LaTeX do not count
==================  =====================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, Literal

from egspo_lightning.errors import require
from egspo_lightning.rewards import equivalence
from egspo_lightning.rewards.extraction import MAX_ANSWER_LENGTH, extract_boxed, extract_final
from egspo_lightning.rewards.fast_path import compare_fast
from egspo_lightning.rewards.think_blocks import after_reasoning
from egspo_lightning.rewards.workers import Grade, WorkerPool
from egspo_lightning.types import Count, PositiveFloat

Extraction = Literal["boxed", "lenient"]

_RULES_VERSION = 4
"""Version of the grading rules. Increase it if a verdict may change: stored verdicts of older versions are dropped."""


class MathGrader:
    r"""Grades answers against gold answers such as ``72`` or ``\frac{1}{2}``; a context manager.

    The first answer that needs algebra starts the worker processes; plain numbers never do. They end with `close` or
    with this process. Usable from any thread; a forked or pickled copy starts workers of its own.

    Args:
        num_workers: Worker processes that grade at the same time.
        deadline_s: Seconds after which an answer counts as wrong, with status timeout.
        memory_limit_mb: Address space of a worker, in MiB, at least 256; beyond it an answer counts as wrong.
        extraction: "boxed" reads the last balanced \boxed{} after the reasoning; "lenient" finds an answer in free
            text, too, by the patterns of math-verify. Both are compared alike.

    Raises:
        UserError: memory_limit_mb is below 256.
    """

    def __init__(
        self,
        *,
        num_workers: Count = 1,
        deadline_s: PositiveFloat = 10.0,
        memory_limit_mb: Count = 1024,
        extraction: Extraction = "boxed",
    ) -> None:
        require(memory_limit_mb >= 256, "memory_limit_mb", memory_limit_mb, "at least 256, which math-verify needs")
        self.extraction: Extraction = extraction
        self.deadline_s, self.memory_limit_mb = float(deadline_s), int(memory_limit_mb)
        self._pool = WorkerPool(int(num_workers), self.deadline_s, self.memory_limit_mb)

    def __enter__(self) -> MathGrader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def grade(
        self, completions: Sequence[str], golds: Sequence[str], extraction: Extraction | None = None
    ) -> list[Grade]:
        """Grade whole completions, in their order; reasoning in them is ignored (`after_reasoning`).

        ``extraction`` replaces the grader's own.

        Raises:
            ValueError: the numbers of completions and gold answers differ.
            RuntimeError: the workers cannot be started, or another thread has closed the grader.
        """
        if (extraction or self.extraction) == "boxed":
            return self._grade(extract_final, completions, golds)
        pairs = zip(completions, golds, strict=True)
        return self._pool.run([(after_reasoning(text), gold, "lenient") for text, gold in pairs])

    def grade_answers(self, answers: Sequence[str], golds: Sequence[str]) -> list[Grade]:
        r"""Grade bare answers, in their order; where one holds a ``\boxed{}``, the content of the box counts.

        Raises:
            ValueError: the numbers of answers and gold answers differ.
            RuntimeError: the workers cannot be started, or another thread has closed the grader.
        """
        return self._grade(_bare, answers, golds)

    def equivalence_classes(self, groups: Sequence[Sequence[str | None]]) -> list[list[int | None]]:
        """Return the class of each bare answer among the answers to its problem, for votes; None for no answer.

        Each item of ``groups`` holds the answers to one problem; see `equivalence.equivalence_classes`.

        Raises:
            RuntimeError: the workers cannot be started, or another thread has closed the grader.
        """
        bare = [[None if answer is None else _bare(answer) for answer in group] for group in groups]
        return equivalence.equivalence_classes(bare, self._compare)

    def settings(self) -> dict[str, Any]:
        """Return all that verdicts depend on, with the versions of math-verify and of the grading rules."""
        return {
            "extraction": self.extraction,
            "deadline_s": self.deadline_s,
            "memory_limit_mb": self.memory_limit_mb,
            "grading": f"{_RULES_VERSION}, math-verify {version('math-verify')}",
        }

    def close(self) -> None:
        """End the worker processes within a second; may be called again. Grading after it starts new ones."""
        self._pool.close()

    def worker_pids(self) -> list[int]:
        """Return the pids of this grader's live processes; empty until an answer needs algebra."""
        return self._pool.pids()

    def _compare(self, answers: Sequence[str], golds: Sequence[str]) -> list[bool | None]:
        grades = self._grade(str, answers, golds)
        return [grade.correct if grade.status == "graded" else None for grade in grades]

    def _grade(self, extract: Callable[[str], str | None], texts: Sequence[str], golds: Sequence[str]) -> list[Grade]:
        pairs = [(extract(text), extract_boxed(gold) or gold) for text, gold in zip(texts, golds, strict=True)]
        grades = [_grade_fast(answer, gold) for answer, gold in pairs]
        undecided = [(answer or "", gold) for (answer, gold), grade in zip(pairs, grades, strict=True) if grade is None]
        by_algebra = iter(self._pool.run([(*pair, "boxed") for pair in undecided]))
        return [grade or next(by_algebra)._replace(extracted=it) for (it, _), grade in zip(pairs, grades, strict=True)]


def _grade_fast(answer: str | None, gold: str) -> Grade | None:
    if answer is None:
        return Grade(False, "no_answer", None, 0.0)
    correct = compare_fast(answer, gold)
    return None if correct is None else Grade(correct, "graded", answer, 0.0)


def _bare(answer: str) -> str | None:
    boxed = extract_boxed(answer) or answer.strip()
    return boxed if 0 < len(boxed) <= MAX_ANSWER_LENGTH else None
