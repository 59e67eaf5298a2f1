"""What the workers do, in this process: their shortcuts give what math-verify gives."""

from functools import partial
from typing import Any

import pytest
from antlr4 import PredictionMode
from antlr4.atn.ParserATNSimulator import ParserATNSimulator
from antlr4.dfa.DFA import DFA
from antlr4.PredictionContext import PredictionContextCache
from latex2sympy2_extended import latex2sympy2
from latex2sympy2_extended.antlr_parser import PSParser
from latex2sympy2_extended.latex2sympy2 import latex2sympy
from sympy import I, Interval, Matrix, Rational, Symbol, Tuple, factorial, log, pi, sqrt

from egspo_lightning.rewards import _verify
from egspo_lightning.rewards._difference import are_different, attempt
from egspo_lightning.rewards._samples import SAMPLES

x = Symbol("x", real=True)


def parse_fully(text: str) -> Any:
    """By the parser's own rule, with its full prediction from the start."""
    quick = PSParser.math
    PSParser.math = quick.__wrapped__
    try:
        return latex2sympy(text, is_real=True)
    finally:
        PSParser.math = quick


@pytest.mark.parametrize("text", [*SAMPLES, "-x^3", "7x^5+12x^2+3x+9", r"\frac{h^2}{m}", "3s^2", "1, 2; 3"])
def test_two_stages_give_the_tree_of_the_full_parse(text: str) -> None:
    assert latex2sympy(text, is_real=True) == parse_fully(text)


@pytest.mark.parametrize("text", [r"1 = \zzz = x", "(((", r"\frac{1}{", "5 5 ! ? 5", r"2 \unknown 3"])
def test_what_the_full_parse_refuses_is_refused(text: str) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT011 - all that the parser raises
        parse_fully(text)
    with pytest.raises(Exception):  # noqa: B017, PT011
        latex2sympy(text, is_real=True)


def learnt(texts: list[str], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """All states of a parser that begins anew, with their configurations in their order and the edges between them."""
    tables = [DFA(state, i) for i, state in enumerate(PSParser.atn.decisionToState)]
    monkeypatch.setattr(PSParser, "decisionsToDFA", tables)
    monkeypatch.setattr(PSParser, "sharedContextCache", PredictionContextCache())
    for text in texts:
        attempt(lambda text=text: latex2sympy(text, is_real=True), None)
    return [
        (
            (table.decision, state.stateNumber, state.prediction, state.isAcceptState, state.requiresFullContext),
            [str(config) for config in state.configs],
            [edge and edge.stateNumber for edge in state.edges or ()],
        )
        for table in tables
        for state in sorted(table.states, key=lambda state: state.stateNumber)
    ]


def test_the_quick_closure_learns_what_that_of_antlr_does(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [*SAMPLES[:40:3], "3s^2", r"\frac{1}{", "1 = 2 ="]
    quick = learnt(texts, monkeypatch)
    original = ParserATNSimulator.closureCheckingStopState.__wrapped__
    monkeypatch.setattr(ParserATNSimulator, "closureCheckingStopState", original)
    assert len(quick) > 100
    assert quick == learnt(texts, monkeypatch)


@pytest.mark.parametrize("text", ["0", "7", "007", "0.50", ".5", "1,234", "12,5.0", "1" * 60, "000", "1.2.3", "²", ""])
def test_a_number_that_is_read_once_is_what_it_is_read_twice(text: str) -> None:
    parser = latex2sympy2._Latex2Sympy()
    numbers = []
    for read in (parser.parse_number, parser.parse_number, partial(type(parser).parse_number.__wrapped__, parser)):
        number = attempt(partial(read, text), "raised")
        numbers.append((type(number), number))
    assert numbers[0] == numbers[1] == numbers[2]


def test_the_quick_prediction_comes_first() -> None:
    modes = []
    quick, full = PSParser.math, PSParser.math.__wrapped__

    def spy(parser: Any) -> Any:
        modes.append(parser._interp.predictionMode)
        return full(parser)

    quick.__closure__[0].cell_contents, before = spy, quick.__closure__[0].cell_contents
    try:
        latex2sympy("(1,2)")
        latex2sympy("3s^2")  # a case that only the full prediction parses
    finally:
        quick.__closure__[0].cell_contents = before
    assert modes == [PredictionMode.SLL, PredictionMode.SLL, PredictionMode.LL]


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
def test_certainly_different(gold: Any, answer: Any) -> None:
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
        (sqrt(10**300 + 1) - 10**150, 5),  # of which 100 digits say nothing
        (I, I + log(8) - 3 * log(2)),
    ],
)
def test_equal_values_are_left_open(gold: Any, answer: Any) -> None:
    assert not are_different(gold, answer)


@pytest.mark.parametrize(
    ("answer", "gold", "near"),
    [
        ("(x+1)^2-x^2-2x-1", "0", "(x+1)^2-x^2-2x-2"),
        (r"\sin^2x+\cos^2x-1", "0", r"\sin^2x+\cos^2x"),
        (r"\ln 8-3\ln 2", "0", r"\ln 8-2\ln 2"),
        (r"\sqrt{3-2\sqrt2}-\sqrt2+1", "0", r"\sqrt{3-2\sqrt2}-\sqrt2-1"),
        (r"(\ln 8-3\ln 2, 1)", "(0,1)", r"(\ln 8-3\ln 2, 2)"),
        ("0", r"\ln 8-3\ln 2", "1"),
    ],
)
def test_what_vanishes_is_zero(answer: str, gold: str, near: str) -> None:
    assert _verify.grade(answer, gold, "boxed")["correct"]
    assert not _verify.grade(near, gold, "boxed")["correct"]


def test_out_of_memory_is_never_taken_for_an_answer() -> None:
    def work() -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        attempt(work, None)
    assert attempt(lambda: 1 // 0, "other") == "other"


def test_what_numbers_cannot_compare_is_still_a_verdict() -> None:
    gold, answer = _verify._parse_bare("5"), _verify._parse_bare(r"5 \mod 7")
    with pytest.raises(TypeError, match="truth value"):
        are_different(gold, answer)
    assert _verify.grade(r"5 \mod 7", "5", "boxed")["correct"]
    assert not _verify.grade(r"5 \mod 7", "6", "boxed")["correct"]


def test_an_answer_without_a_parse_equals_nothing() -> None:
    assert not _verify.grade("((( 5", "5", "boxed")["correct"]
    assert not _verify.grade("((( 5", "((( 5 +", "boxed")["correct"]
