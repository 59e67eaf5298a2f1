r"""Expression task: expressions reduced one operation at a time, in one of many orders.

A problem reads ``3*(5-1)-4-2=?``. Its solution is a chain of expressions of equal value, each with one operation less
than the one before: ``3*4-4-2=12-4-2=12-6=\boxed{6}``. The choice of the next operation is free, so its tokens have
high entropy. The result of an operation is determined, and an error in it makes all later steps wrong.

With ``names_operations`` each step has a line, which names the operation and its result before the new expression::

    5-1=4:3*4-4-2
    -4-2=-6:3*4-6
    3*4=12:12-6
    12-6=6:\boxed{6}
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, product
from math import prod
from typing import ClassVar, NamedTuple

from egspo_lightning.data.tasks.family import ProblemFamily
from egspo_lightning.errors import require
from egspo_lightning.types import Demonstration, Problem

Factor = tuple[int, ...]
"""A number ``(5,)``, or two in parentheses: ``(5, -4)`` is 5-4."""

_FACTOR = r"(?:[0-9]+|\([0-9]+[+-][0-9]+\))"
_TERM = re.compile(rf"([+-]?)({_FACTOR}(?:\*{_FACTOR})?)")


class Term(NamedTuple):
    """A signed number or product: ``-2*(5-4)`` is ``Term(-1, ((2,), (5, -4)))``."""

    sign: int
    factors: tuple[Factor, ...]

    @property
    def value(self) -> int:
        """The value of the term."""
        return self.sign * prod(map(sum, self.factors))

    @property
    def num_operators(self) -> int:
        """Number of operations within the term."""
        return sum(map(len, self.factors)) - 1

    def __str__(self) -> str:
        """The term with its sign, "+" included."""
        factors = (f"({f[0]}{f[1]:+d})" if len(f) == 2 else str(f[0]) for f in self.factors)
        return ("-" if self.sign < 0 else "+") + "*".join(factors)


Terms = tuple[Term, ...]


@dataclass(frozen=True)
class ExpressionTask(ProblemFamily):
    """Signed sums of numbers, products, and products with a parenthesis, with at least one product each.

    Problems that only differ in the order of terms, factors or addends are in the same split.

    Args:
        num_operators: Operations in a problem, which is the number of steps of its solution; 1 to 8.
        max_number: Largest number in a problem, at least 2; the smallest is 1.
        max_value: Largest absolute value of any intermediate result; at least max_number.
        names_operations: Each step of a solution names its operation before the new expression; see above.

    Raises:
        UserError: a value is out of range.
    """

    name: ClassVar[str] = "expressions"

    num_operators: int = 4
    max_number: int = 5
    max_value: int = 20
    names_operations: bool = False

    def __post_init__(self) -> None:
        require(1 <= self.num_operators <= 8, "num_operators", self.num_operators, "from 1 to 8")
        require(self.max_number >= 2, "max_number", self.max_number, "at least 2")
        allowed = f"at least max_number ({self.max_number})"
        require(self.max_value >= self.max_number, "max_value", self.max_value, allowed)

    def draw(self, rng: random.Random) -> str:
        """Draw an expression of the right shape; values may become too large, or a parenthesis negative."""
        shape = rng.choice(_shapes(self.num_operators))
        terms = (Term(1 if i == 0 else _sign(rng), self._factors(rng, size)) for i, size in enumerate(shape))
        return _text(tuple(terms)) + "=?"

    def key(self, text: str) -> str | None:
        """Terms, factors and addends in descending order; see ``ProblemFamily.key``."""
        terms = _terms(text.removesuffix("=?"))
        if _text(terms) + "=?" != text or not self._fits(terms):
            return None
        ordered = (Term(t.sign, tuple(sorted(tuple(sorted(f)) for f in t.factors))) for t in terms)
        return "".join(map(str, sorted(ordered)))

    def answer(self, text: str) -> str:
        """The value of the expression."""
        return str(sum(term.value for term in _terms(text.removesuffix("=?"))))

    def solve(self, problem: Problem, seed: int | str = 0) -> Demonstration:
        r"""A chain of expressions that ends in ``\boxed{}``; each step is drawn uniformly from ``operations``."""
        rng = random.Random(f"{seed}/{problem.problem}")
        terms, steps = _terms(problem.problem.removesuffix("=?")), []
        while possible := list(operations(terms)):
            operation, terms = rng.choice(possible)
            steps.append((f"{operation}:" if self.names_operations else "", _text(terms)))
        *steps, (operation, value) = steps
        lines = [*(f"{name}{expression}" for name, expression in steps), f"{operation}\\boxed{{{value}}}"]
        return Demonstration(problem.id, problem.problem, ("\n" if self.names_operations else "=").join(lines))

    def _factors(self, rng: random.Random, num_operators: int) -> tuple[Factor, ...]:
        """A number, a product of two numbers, or a product of a number and a parenthesis in either order."""
        first, second, third = (rng.randint(1, self.max_number) for _ in range(3))
        if num_operators == 0:
            return ((first,),)
        factors = ((first,), (second,)) if num_operators == 1 else ((first,), (second, _sign(rng) * third))
        return factors if rng.random() < 0.5 else factors[::-1]

    def _fits(self, terms: Terms) -> bool:
        factors = [factor for term in terms for factor in term.factors]
        shape = tuple(term.num_operators for term in terms)
        return (
            shape in _shapes(self.num_operators)
            and terms[0].sign > 0
            and all(1 <= abs(number) <= self.max_number for factor in factors for number in factor)
            and all(sum(factor) > 0 for factor in factors)
            and all(abs(value) <= self.max_value for value in _partial_sums(terms))
        )


def operations(terms: Terms) -> Iterator[tuple[str, Terms]]:
    """Yield each possible operation on an expression, as ``5-1=4``, and the expression after it; a number has none.

    An operation replaces a parenthesis, a product of two numbers, or two neighboring terms by their value. Signed
    neighbors are summed with their signs: ``9-8-6=9-14``. The sign before a product is not part of it.
    """
    for i, (sign, factors) in enumerate(terms):
        before, after = terms[:i], terms[i + 1 :]
        for j, factor in enumerate(factors):
            if len(factor) == 2:
                new = Term(sign, (*factors[:j], (sum(factor),), *factors[j + 1 :]))
                yield _sum(*factor), (*before, new, *after)
        value = terms[i].value
        if len(factors) == 2 and terms[i].num_operators == 1:
            yield f"{factors[0][0]}*{factors[1][0]}={abs(value)}", (*before, _number(value), *after)
        if after and terms[i].num_operators == after[0].num_operators == 0:
            yield _sum(value, after[0].value), (*before, _number(value + after[0].value), *after[1:])


def _sum(first: int, second: int) -> str:
    return f"{first}{second:+d}={first + second}"


def _number(value: int) -> Term:
    return Term(-1 if value < 0 else 1, ((abs(value),),))


def _sign(rng: random.Random) -> int:
    return rng.choice((1, -1))


def _text(terms: Terms) -> str:
    return "".join(map(str, terms)).removeprefix("+")


def _terms(text: str) -> Terms:
    """Parse an expression; for any other text, ``_text`` does not return the text from the result."""
    parsed = []
    for sign, factors in _TERM.findall(text):
        numbers = (tuple(map(int, re.findall(r"-?[0-9]+", factor))) for factor in factors.split("*"))
        parsed.append(Term(-1 if sign == "-" else 1, tuple(numbers)))
    return tuple(parsed)


def _partial_sums(terms: Terms) -> Iterator[int]:
    """The sums of neighboring terms, of all lengths."""
    for start in range(len(terms)):
        yield from accumulate(term.value for term in terms[start:])


@cache
def _shapes(num_operators: int) -> tuple[tuple[int, ...], ...]:
    """All lists of operator counts within terms, so that operators within and between terms sum to num_operators."""
    return tuple(
        shape
        for length in range(1, num_operators + 1)
        for shape in product(range(3), repeat=length)
        if any(shape) and sum(shape) + length - 1 == num_operators
    )
