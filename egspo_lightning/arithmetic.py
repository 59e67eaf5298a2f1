r"""A family of arithmetic problems with worked solutions, generated from a seed without any file.

A problem reads ``47+85=?`` and its solution works column by column from the right, each column with the carry
of the one before: ``7+5=12 4+8+1=13 \boxed{132}``. A wrong step gives a wrong digit, so reward and reasoning
go together.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate
from typing import Literal

from egspo_lightning.errors import UserError
from egspo_lightning.types import Demonstration, Problem

Split = Literal["train", "validation", "test"]
SPLITS: dict[Split, range] = {"train": range(8), "validation": range(8, 9), "test": range(9, 10)}
"""The hash buckets, of ten, that each split holds."""

_MAX_ATTEMPTS = 10_000
_EXPRESSION = re.compile(r"[0-9]+(?:[+-][0-9]+)+=\?")


@dataclass(frozen=True)
class ArithmeticTask:
    """A family of problems: chains of additions (and subtractions) whose running totals are never negative.

    A problem belongs to one split for good, by a hash of its text with the terms in sorted order; so splits
    are disjoint whatever the seed, and ``47+85`` and ``85+47`` are always in the same one.

    Args:
        num_terms: Numbers in a problem, at least 2.
        num_digits: Decimal digits of each number, at least 1; two digits are 10 to 99.
        operators: "+" for sums alone, "+-" for a random choice at every place.

    Raises:
        UserError: a number is out of range, or the operators are others.
    """

    num_terms: int = 2
    num_digits: int = 2
    operators: Literal["+", "+-"] = "+"

    def __post_init__(self) -> None:
        if self.num_terms < 2:
            raise UserError(f"num_terms must be at least 2, got {self.num_terms}.")
        if self.num_digits < 1:
            raise UserError(f"num_digits must be at least 1, got {self.num_digits}.")
        if self.operators not in ("+", "+-"):
            raise UserError(f'operators must be "+" or "+-", got {self.operators!r}.')

    def problem(self, seed: int | str, split: Split, index: int, excluded: frozenset[str] = frozenset()) -> Problem:
        """Problem number ``index`` of an endless stream, a pure function of the arguments.

        Problems repeat, as draws with replacement do.
        ``excluded`` holds problem texts that are never given; the next draw takes the place of such a one.

        Raises:
            UserError: the split does not exist, or has next to nothing that is not excluded.
        """
        if split not in SPLITS:
            raise UserError(f"split must be one of {', '.join(SPLITS)}, got {split!r}.")
        rng = random.Random(f"{seed}/{split}/{index}")
        for _ in range(_MAX_ATTEMPTS):
            terms = self._draw(rng)
            if _belongs(terms, split) and (text := _text(terms)) not in excluded:
                return Problem(f"arithmetic/{text.removesuffix('=?')}", text, str(sum(terms)))
        raise UserError(
            f"No problem for split {split!r} in {_MAX_ATTEMPTS} draws with num_terms={self.num_terms}, "
            f"num_digits={self.num_digits} and {len(excluded)} excluded problems. "
            "Raise num_terms or num_digits."
        )

    def distinct(self, seed: int | str, split: Split, count: int) -> list[Problem]:
        """The first ``count`` problems of the stream with different texts; fewer are a prefix of more.

        Raises:
            UserError: the split has fewer different problems.
        """
        if count < 1:
            raise UserError(f"The number of problems must be at least 1, got {count}.")
        found: dict[str, Problem] = {}
        num_draws = 20 * count + 1000  # enough to meet all problems of the split where all are asked for
        for index in range(num_draws):
            problem = self.problem(seed, split, index)
            found.setdefault(problem.problem, problem)
            if len(found) == count:
                return list(found.values())
        raise UserError(
            f"{count} different problems of split {split!r} are asked for, but only {len(found)} came up in "
            f"{num_draws} draws with num_terms={self.num_terms}, num_digits={self.num_digits} and "
            f"operators={self.operators!r}. Ask for fewer, or raise num_terms or num_digits."
        )

    def contains(self, text: str, split: Split) -> bool:
        """Whether ``text`` is a problem of this family and split."""
        if not _EXPRESSION.fullmatch(text):
            return False
        terms = _terms(text)
        operators_fit = self.operators == "+-" or min(terms) > 0
        numbers_fit = len(terms) == self.num_terms and all(abs(term) in self._numbers() for term in terms)
        return operators_fit and numbers_fit and _text(terms) == text and _belongs(terms, split)

    def _numbers(self) -> range:
        return range(10 ** (self.num_digits - 1), 10**self.num_digits)

    def _draw(self, rng: random.Random) -> list[int]:
        """Signed terms, the first of them positive."""
        numbers = self._numbers()
        terms = [rng.randrange(numbers.start, numbers.stop) for _ in range(self.num_terms)]
        if self.operators == "+":
            return terms
        return [terms[0], *(term if rng.random() < 0.5 else -term for term in terms[1:])]


def solve(problem: Problem) -> Demonstration:
    r"""The worked solution of an arithmetic problem, ending in ``\boxed{}``.

    A chain takes a line a term, and each line but the last ends in the running total:
    ``7+5=12 4+8+1=13 47+85=132`` and then ``2+9=11 3+5+1=9 1+0=1 \boxed{191}``.
    """
    total, *terms = _terms(problem.problem)
    lines = []
    for place, term in enumerate(terms, start=1):
        is_last = place == len(terms)
        end = f"\\boxed{{{total + term}}}" if is_last else f"{total}{term:+d}={total + term}"
        steps = _addition(total, term) if term > 0 else _subtraction(total, -term)
        lines.append(" ".join([*steps, end]))
        total += term
    return Demonstration(problem.id, problem.problem, "\n".join(lines))


def _text(terms: list[int]) -> str:
    return f"{terms[0]}" + "".join(f"{term:+d}" for term in terms[1:]) + "=?"


def _terms(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"[+-]?[0-9]+", text)]


def _belongs(terms: list[int], split: Split) -> bool:
    """Whether no running total is negative and the hash of the sorted terms falls in the split."""
    if min(accumulate(terms)) < 0:
        return False
    digest = blake2b(_text(sorted(terms, reverse=True)).encode(), digest_size=4).digest()
    return int.from_bytes(digest) % 10 in SPLITS[split]


def _columns(first: int, second: int) -> Iterator[tuple[int, int]]:
    """The digits of two numbers, column by column from the right, the shorter one padded with zeros."""
    for _ in range(max(len(str(first)), len(str(second)))):
        yield first % 10, second % 10
        first, second = first // 10, second // 10


def _addition(first: int, second: int) -> Iterator[str]:
    carry = 0
    for top, bottom in _columns(first, second):
        column = top + bottom + carry
        yield f"{top}+{bottom}{'+1' if carry else ''}={column}"
        carry = column // 10


def _subtraction(first: int, second: int) -> Iterator[str]:
    """Columns of ``first - second``, not negative; a borrowed ten is part of the column's first number."""
    borrow = 0
    for top, bottom in _columns(first, second):
        has_borrowed = top - bottom - borrow < 0
        top += 10 * has_borrowed
        yield f"{top}-{bottom}{'-1' if borrow else ''}={top - bottom - borrow}"
        borrow = int(has_borrowed)
