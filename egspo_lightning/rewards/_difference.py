"""Numerical comparison of parsed answers: finds most answers that differ, without algebra.

Only ``simplify`` proves two expressions equal; their values at one point show that they differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

from sympy import Expr, FiniteSet, Float, Integer, Interval, MatrixBase, Rational, Symbol, Tuple, UnevaluatedExpr, Union

_DIGITS = 15
_EXACT = 1e-9
"""Relative tolerance of expressions without a decimal point."""

_DECIMAL = (2e-6, 1e-4)
"""Absolute and relative tolerance of a decimal that may be rounded to six decimals."""

_NOISE = 1000
"""A value without a significant digit may be this many times the size that ``evalf`` returns."""


def are_different(gold: Any, answer: Any) -> bool:
    """Return True where two parsed answers cannot be equal, False where they may be."""
    if isinstance(gold, MatrixBase) and isinstance(answer, MatrixBase):
        return gold.shape != answer.shape or _any_different(gold.flat(), answer.flat())
    if isinstance(gold, Tuple) and isinstance(answer, Tuple):
        return len(gold) != len(answer) or _any_different(gold, answer)
    if isinstance(gold, Interval) and isinstance(answer, Interval):
        ends = (gold.start, gold.end), (answer.start, answer.end)
        return (gold.left_open, gold.right_open) != (answer.left_open, answer.right_open) or _any_different(*ends)
    if _is_scalar(gold) and _is_scalar(answer):
        return _have_different_values(gold, answer)
    if _is_infinite(gold) or _is_infinite(answer):
        return _is_scalar(gold) or _is_scalar(answer)
    return _differ_as_sets(gold, answer)


def are_same_decimals(gold: Any, answer: Any) -> bool:
    """Return True where two parsed answers are equal with exact decimals: 0.1 + 0.2 - 0.3 is 0."""

    return bool(attempt(lambda: (gold.atoms(Float) | answer.atoms(Float)) and _exact(gold) == _exact(answer), False))


def _exact(value: Any) -> Any:
    return value.xreplace({decimal: Rational(str(decimal)) for decimal in value.atoms(Float)})


def _differ_as_sets(gold: Any, answer: Any) -> bool:
    sides = [_elements(gold), _elements(answer)]
    if sides[0] is None or sides[1] is None:
        return False
    return _lacks_one(sides[0], sides[1]) or _lacks_one(sides[1], sides[0])


def _elements(value: Any) -> Sequence[Any] | None:
    if isinstance(value, (FiniteSet, Tuple)):
        return tuple(value.args)
    return (value,) if _is_scalar(value) else None


def _is_infinite(value: Any) -> bool:
    """Return whether a value is an interval with a length above 0, or a union that holds one."""
    if isinstance(value, Union):
        return any(_is_infinite(part) for part in value.args)
    return isinstance(value, Interval) and value.start != value.end


def _any_different(gold: Iterable[Any], answer: Iterable[Any]) -> bool:
    return any(are_different(left, right) for left, right in zip(gold, answer, strict=True))


def _lacks_one(elements: Sequence[Any], others: Sequence[Any]) -> bool:
    return any(all(are_different(element, other) for other in others) for element in elements)


def _is_scalar(value: Any) -> bool:
    # math-verify keeps a percentage as an unevaluated factor: it has two values.
    return isinstance(value, Expr) and not value.has(UnevaluatedExpr)


def _have_different_values(gold: Expr, answer: Expr) -> bool:
    values = _value(gold), _value(answer)
    if values[0] is None or values[1] is None:
        return False
    (left, left_noise), (right, right_noise) = (_without_noise(value) for value in values)
    size = max(abs(left), abs(right))
    distance = abs(left - right) - left_noise - right_noise
    if gold.has(Float) or answer.has(Float):
        return bool(distance > _DECIMAL[0] or distance > _DECIMAL[1] * size)
    return bool(distance > _EXACT * size)


def _without_noise(value: Any) -> tuple[Any, Any]:
    """Replace parts without a significant digit by 0. Returns the value and a bound of what was replaced.

    ``evalf`` returns -0.e-122, a bound, for expressions that are 0 everywhere, such as (x+1)^2-x^2-2x-1.
    """
    noise = [part for part in value.atoms(Float) if part._prec == 1]
    return value.xreplace(dict.fromkeys(noise, Integer(0))), _NOISE * sum(abs(Float(part, _DIGITS)) for part in noise)


@lru_cache(maxsize=4096)
def _value(expression: Expr) -> Any:
    """Evaluate at a fixed point, to 15 digits. Returns None where there is no finite value."""

    def evaluate() -> Any:
        point = {symbol: _coordinate(symbol) for symbol in expression.free_symbols if isinstance(symbol, Symbol)}
        value = expression.evalf(_DIGITS, subs=point)
        return value if value.is_number and value.is_finite and not value.free_symbols else None

    return attempt(evaluate, None)


def attempt(work: Callable[[], Any], otherwise: Any) -> Any:
    """Return the result of ``work``, or ``otherwise`` where it raises.

    Raises:
        MemoryError: the work ran out of memory, which says nothing about an answer.
    """
    try:
        return work()
    except MemoryError:
        raise
    except Exception:
        return otherwise


def _coordinate(symbol: Symbol) -> Rational:
    """Return an irregular number between 1 and 2 that depends on the symbol's name alone."""
    code = sum((position + 7) * ord(letter) for position, letter in enumerate(symbol.name))
    return Rational(100_003 + (code * 7919) % 99_991, 100_003)
