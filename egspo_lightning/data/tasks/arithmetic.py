r"""Arithmetic task: sums and differences, worked column by column.

A problem reads ``47+85=?``. Its solution works column by column from the right, each with the carry of the column
before: ``7+5=12 4+8+1=13 \boxed{132}``. A wrong step gives a wrong digit, so the reward depends on the reasoning.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar, Literal

from egspo_lightning.data.tasks.family import ProblemFamily
from egspo_lightning.errors import require
from egspo_lightning.types import Demonstration, Problem

MOST = 1000
"""Upper limit for terms and digits: Python prints numbers of at most 4300 digits."""
_EXPRESSION = re.compile(r"[0-9]+(?:[+-][0-9]+)+=\?")


@dataclass(frozen=True)
class ArithmeticTask(ProblemFamily):
    """Chains of additions (and subtractions) whose running totals are never negative.

    Problems with the same signed terms, such as ``47+85`` and ``85+47``, are in the same split.

    Args:
        num_terms: Numbers in a problem, at least 2.
        num_digits: Decimal digits of each number, at least 1; two digits are 10 to 99.
        operators: "+" for sums alone, "+-" for a random choice at every place.

    Raises:
        UserError: a number is out of range.
    """

    name: ClassVar[str] = "arithmetic"

    num_terms: int = 2
    num_digits: int = 2
    operators: Literal["+", "+-"] = "+"

    def __post_init__(self) -> None:
        require(2 <= self.num_terms <= MOST, "num_terms", self.num_terms, f"at least 2 and at most {MOST}")
        require(1 <= self.num_digits <= MOST, "num_digits", self.num_digits, f"at least 1 and at most {MOST}")

    def draw(self, rng: random.Random) -> str:
        """Draw numbers of the right length and operators; the running total may be negative."""
        numbers = self._numbers()
        terms = [rng.randrange(numbers.start, numbers.stop) for _ in range(self.num_terms)]
        if self.operators == "+":
            return _text(terms)
        return _text([terms[0], *(term if rng.random() < 0.5 else -term for term in terms[1:])])

    def key(self, text: str) -> str | None:
        """The text with its terms in descending order; see ``ProblemFamily.key``."""
        if not _EXPRESSION.fullmatch(text):
            return None
        terms = _terms(text)
        operators_fit = self.operators == "+-" or min(terms) > 0
        numbers_fit = len(terms) == self.num_terms and all(abs(term) in self._numbers() for term in terms)
        if operators_fit and numbers_fit and _text(terms) == text and min(accumulate(terms)) >= 0:
            return _text(sorted(terms, reverse=True))
        return None

    def answer(self, text: str) -> str:
        """The total."""
        return str(sum(_terms(text)))

    def solve(self, problem: Problem, seed: int | str = 0) -> Demonstration:
        r"""The only worked solution, which ends in ``\boxed{}``.

        A chain has one line per term, and each line but the last ends in the running total:
        ``7+5=12 4+8+1=13 47+85=132`` and then ``2+9=11 3+5+1=9 1+0=1 \boxed{191}``.
        """
        total, *terms = _terms(problem.problem)
        lines = []
        for place, term in enumerate(terms, start=1):
            is_last = place == len(terms)
            end = f"\\boxed{{{total + term}}}" if is_last else f"{total}{term:+d}={total + term}"
            lines.append(" ".join([*_column_steps(total, term), end]))
            total += term
        return Demonstration(problem.id, problem.problem, "\n".join(lines))

    def _numbers(self) -> range:
        return range(10 ** (self.num_digits - 1), 10**self.num_digits)


def _text(terms: list[int]) -> str:
    return f"{terms[0]}" + "".join(f"{term:+d}" for term in terms[1:]) + "=?"


def _terms(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"[+-]?[0-9]+", text)]


def _column_steps(total: int, term: int) -> Iterator[str]:
    """Columns of ``total + term``, from the right; a borrowed ten is part of the column's first number."""
    sign, operator = (1, "+") if term > 0 else (-1, "-")
    bottom_number, carry = abs(term), False
    for _ in range(len(str(max(total, abs(term))))):
        total, top = divmod(total, 10)
        bottom_number, bottom = divmod(bottom_number, 10)
        result = top + sign * (bottom + carry)
        borrowed = 10 if result < 0 else 0
        yield f"{top + borrowed}{operator}{bottom}{f'{operator}1' if carry else ''}={result + borrowed}"
        carry = not 0 <= result < 10
