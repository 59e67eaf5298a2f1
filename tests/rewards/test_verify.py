"""math-verify as the grading workers call it, but in this process."""

from typing import Any

import pytest
from sympy import I, Interval, Matrix, Rational, Symbol, Tuple, factorial, log, pi, sqrt

from egspo_lightning.rewards import _verify
from egspo_lightning.rewards._difference import are_different, attempt
from egspo_lightning.rewards._latex import parse

x = Symbol("x", real=True)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        (x + 1, x + 2),
        (x**2, x**3),
        (sqrt(2), sqrt(3)),
        (1 / factorial(2004), 1 / factorial(2006)),
        (Rational(1, 10**30), Rational(2, 10**30)),
        (Rational(1, 10**30), log(8) - 3 * log(2)),
        (I, log(8) - 3 * log(2)),
        (Tuple(1, 2), Tuple(2, 1)),
        (Tuple(1, 2), Tuple(1, 2, 3)),
        (Interval(0, 1), Interval(0, 2)),
        (Interval(0, 1), Interval.open(0, 1)),
        (Interval(0, 1), Rational(1, 2)),
        (Matrix([1, 2]), Matrix([1, 3])),
        (Matrix([1, 2]), Matrix([[1, 2]])),
    ],
)
def test_are_different_is_true_for_different_values(gold: Any, answer: Any) -> None:
    assert are_different(gold, answer)
    assert are_different(answer, gold)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ((x + 1) ** 2, x**2 + 2 * x + 1),
        (sqrt(12), 2 * sqrt(3)),
        (1 / factorial(2004), 2005 / factorial(2005)),
        (Rational(1, 3), 0.333333 * Rational(1)),
        (pi, 3.141593 * Rational(1)),
        (Tuple(sqrt(4), x), Tuple(2, x)),
        (Interval(0, sqrt(4)), Interval(0, 2)),
        (Matrix([1, sqrt(4)]), Matrix([1, 2])),
        (sqrt(10**300 + 1) - 10**150, 5),  # 100 digits cannot decide
        (I, I + log(8) - 3 * log(2)),
    ],
)
def test_are_different_is_false_for_equal_or_undecided_values(gold: Any, answer: Any) -> None:
    assert not are_different(gold, answer)


@pytest.mark.parametrize(
    ("answer", "gold", "near_miss"),
    [
        ("(x+1)^2-x^2-2x-1", "0", "(x+1)^2-x^2-2x-2"),
        (r"\sin^2x+\cos^2x-1", "0", r"\sin^2x+\cos^2x"),
        (r"\ln 8-3\ln 2", "0", r"\ln 8-2\ln 2"),
        (r"\sqrt{3-2\sqrt2}-\sqrt2+1", "0", r"\sqrt{3-2\sqrt2}-\sqrt2-1"),
        (r"(\ln 8-3\ln 2, 1)", "(0,1)", r"(\ln 8-3\ln 2, 2)"),
        ("0", r"\ln 8-3\ln 2", "1"),
    ],
)
def test_expressions_that_simplify_to_zero_equal_zero(answer: str, gold: str, near_miss: str) -> None:
    assert _verify.grade(answer, gold, "boxed")[0]
    assert not _verify.grade(near_miss, gold, "boxed")[0]


def test_attempt_does_not_catch_memory_error() -> None:
    def work() -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        attempt(work, None)
    assert attempt(lambda: 1 // 0, "other") == "other"


def test_numerically_incomparable_answers_still_get_a_verdict() -> None:
    gold, answer = parse("5"), parse(r"5 \mod 7")
    with pytest.raises(TypeError, match="truth value"):
        are_different(gold, answer)
    assert _verify.grade(r"5 \mod 7", "5", "boxed")[0]
    assert not _verify.grade(r"5 \mod 7", "6", "boxed")[0]


def test_unparsable_answer_is_wrong() -> None:
    assert not _verify.grade("((( 5", "5", "boxed")[0]
    assert not _verify.grade("((( 5", "((( 5 +", "boxed")[0]
