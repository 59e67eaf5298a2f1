r"""Labeled sum task: labeled numbers added one at a time, in one of two orders.

A problem reads ``b7 c3 d8 e7=?``. Its solution keeps a running total. It adds the numbers from left to right, as in
``b7+c3=10+d8=18+e7=25 \boxed{25}``, or the largest one first, as in ``d8+b7=15+e7=22+c3=25 \boxed{25}``. Both orders
give the answer, and demonstrations do not say which one is easier with more numbers.
"""

import random
import re
from dataclasses import dataclass
from itertools import accumulate
from string import ascii_lowercase
from typing import ClassVar

from egspo_lightning.data.tasks.family import ProblemFamily
from egspo_lightning.errors import require
from egspo_lightning.types import Demonstration, Problem

_PROBLEM = re.compile(r"[a-z][1-9][0-9]*(?: [a-z][1-9][0-9]*)+=\?")
_TERM = re.compile(r"([a-z])([0-9]+)")


@dataclass(frozen=True)
class LabeledSumTask(ProblemFamily):
    """Sums of numbers with consecutive letters.

    Problems with the same numbers are in the same split, whatever their letters and their order. With few different
    sums the sizes of the splits are approximate: the default has 1001 and 84 % of the draws in the train split.
    Demonstrations with fewer terms than the problems of a benchmark test whether a method learns more than they show.

    Args:
        min_terms: Fewest numbers in a problem, at least 2.
        max_terms: Most numbers in a problem, from min_terms to 26; all counts are equally likely to be drawn.
        max_number: Largest number, at least 2; the smallest is 1.
        in_order: Probability that a solution adds the numbers from left to right; else it adds the largest one that is
            left at each step, the first of equal ones.

    Raises:
        UserError: a value is out of range.
    """

    name: ClassVar[str] = "labeled_sums"

    min_terms: int = 10
    max_terms: int = 10
    max_number: int = 5
    in_order: float = 0.5

    def __post_init__(self) -> None:
        require(self.min_terms >= 2, "min_terms", self.min_terms, "at least 2")
        allowed = f"from min_terms ({self.min_terms}) to {len(ascii_lowercase)}"
        require(self.min_terms <= self.max_terms <= len(ascii_lowercase), "max_terms", self.max_terms, allowed)
        require(self.max_number >= 2, "max_number", self.max_number, "at least 2")
        require(0 <= self.in_order <= 1, "in_order", self.in_order, "from 0 to 1")

    def draw(self, rng: random.Random) -> str:
        """Draw the count, the first letter and the numbers; every draw is a problem of the family."""
        num_terms = rng.randint(self.min_terms, self.max_terms)
        first = rng.randint(0, len(ascii_lowercase) - num_terms)
        labels = ascii_lowercase[first : first + num_terms]
        return " ".join(f"{label}{rng.randint(1, self.max_number)}" for label in labels) + "=?"

    def key(self, text: str) -> str | None:
        """The numbers in ascending order; see ``ProblemFamily.key``."""
        if not _PROBLEM.fullmatch(text):
            return None
        terms = _terms(text)
        labels, numbers = "".join(label for label, _ in terms), sorted(number for _, number in terms)
        if (
            labels in ascii_lowercase
            and self.min_terms <= len(terms) <= self.max_terms
            and numbers[-1] <= self.max_number
        ):
            return "+".join(map(str, numbers))
        return None

    def answer(self, text: str) -> str:
        """The sum of the numbers."""
        return str(sum(number for _, number in _terms(text)))

    def solve(self, problem: Problem, seed: int | str = 0) -> Demonstration:
        r"""Running totals in one of the two orders, drawn by ``in_order``, and the last total in ``\boxed{}``."""
        terms = _terms(problem.problem)
        if random.Random(f"{seed}/{problem.problem}").random() >= self.in_order:
            terms.sort(key=lambda term: -term[1])
        totals = accumulate(number for _, number in terms)
        (label, number), *others = terms
        steps = (f"+{label}{number}={total}" for (label, number), total in zip(others, list(totals)[1:], strict=True))
        solution = f"{label}{number}" + "".join(steps) + f" \\boxed{{{self.answer(problem.problem)}}}"
        return Demonstration(problem.id, problem.problem, solution)


def _terms(text: str) -> list[tuple[str, int]]:
    return [(label, int(number)) for label, number in _TERM.findall(text)]
