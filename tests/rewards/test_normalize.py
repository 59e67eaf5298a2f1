import time
from fractions import Fraction

import pytest

from egspo_lightning.rewards.fast_path import compare_fast
from egspo_lightning.rewards.normalize import normalize
from egspo_lightning.rewards.numbers import parse_number

RIGHT = [
    ("(1,2), 3", "3, (1,2)"),
    ("(1,2),(3,4)", r"\{(3,4),(1,2)\}"),
    (r"\text{a or b}", r"\text{b or a}"),
    ("72", "72"),
    (" $72$ ", "72"),
    ("72.", "72"),
    ("+5", "5"),
    ("005", "5"),
    ("5.0", "5"),
    (".5", r"\frac12"),
    ("0.5", r"\dfrac{1}{2}"),
    ("2/4", r"\frac{1}{2}"),
    (r"-\frac{1}{4}", "-0.25"),
    ("−5", "-5"),
    ("1234", "1,234"),
    ("1{,}234", "1234"),
    (r"1\,234", "1234"),
    (r"32,\!348", "32348"),
    ("1,234,567.89", "1234567.89"),
    (r"0.\overline{3}", r"\frac13"),
    (r"0.1\overline{6}", "1/6"),
    (r"\left( 1, 2 \right)", "(1,2)"),
    (r"\sqrt {3}", r"\sqrt{3}"),
    (r"\text{Evelyn}", "Evelyn"),
    (r"\text{evelyn}", r"\text{Evelyn}"),
    (r"\text{5}", "5"),
    (r"12^{\mathrm{th}}", "12"),
    ("101_2", "101_{2}"),
    ("101_2", "5_{10}"),
    ("185\\", "185"),
    ("9" * 400, "9" * 400),
    ("3 1/2", "7/2"),
    (r"3\frac{1}{2}", "3.5"),
    (r"-1\frac15", r"-\frac{6}{5}"),
    ("10%", "10"),
    (r"10\text{ percent}", r"10\%"),
    (r"33\frac{1}{3}\%", r"\frac{100}{3}"),
    ("90°", "90"),
    (r"90^{\circ}", r"90\text{ degrees}"),
    ("x=5", "5"),
    ("x = 5", "x=5.0"),
    (r"f(x) = 5", "5"),
    ("12 cm", r"12\text{ cm}"),
    (r"12\,\mathrm{cm}^2", "12 square centimeters"),
    (r"12\text{ cm}", "12"),
    ("12", r"12 \mbox{ inches}^2"),
    (r"12\text{ units}", "12 cm"),
    (r"\$18.90", "18.9"),
    (r"\$5", r"5\text{ dollars}"),
    ("３２，３４８", "32348"),
    ("1 234 567", "1234567"),
    (r"1\;234", "1234"),
    ("½", "0.5"),
    ("(211)", "211"),
    (r"\textbf{(019)}", "19"),
    (r"0.\bar{3}", "1/3"),
    ("0.(142857)", "1/7"),
    ("0.1(6)", "1/6"),
    ("2516_8", "2516"),
    ("(A)", "A"),
    (r"\text{(A)}", "a"),
    ("A.", r"\textbf{A}"),
    (r"\textbf{(C)}\ 12", "12"),
    (r"\textbf{(C)}\ 12", "C"),
    ("B: 7", "B"),
    ("(0.5, 3)", r"\left(\frac{1}{2}, 3\right)"),
    ("3, 1, 2", "1,2,3"),
    (r"\{3, 0.5\}", r"\{\frac12, 3\}"),
    ("1, 2", r"\{2, 1\}"),
    ("√3", r"\sqrt{3}"),
    ("x ≤ 3", r"x \leq 3"),
]

WRONG = [
    ("", ""),
    ("1,23", "123"),
    ("(1,234)", "1234"),
    ("(1,234)", "(1234)"),
    ("1, 234", "1234"),
    (r"\pm 3", "3"),
    (r"\{(1,2)\}", "(1,2)"),
    ("72", "73"),
    ("-5", "5"),
    ("1.234", "1234"),
    ("12", "1/2"),
    ("1/3", "1/2"),
    ("4.9999999", "5"),
    ("0.0000001", "0.0000002"),
    ("123456789012345678901", "123456789012345678902"),
    (r"\text{Yes}", r"\text{No}"),
    (r"\text{neve}", r"\text{even}"),
    ("ddo", r"\text{odd}"),
    ("2516_9", "2516_8"),
    (r"\{1,2\}", "(1,2)"),
    ("(1,2)", r"\{1,2\}"),
    ("5=6", "6"),
    ("12 cm", "12 m"),
    (r"5.4\text{ cents}", r"5.4\text{ dollars}"),
    ("12 cm", "13"),
    (r"\$5", "5 cents"),
    ("3 1/2", "31/2"),
    (r"3\frac{1}{2}", r"\frac{3}{2}"),
    (r"10\%", r"0.1\%"),
    (r"10\%", "1"),
    ("101_2", "5"),
    ("101_2", "7"),
    ("1 2", "12"),
    ("A", "B"),
    ("(A)", r"\text{B}"),
    (r"\textbf{(C)}\ 12", "13"),
    ("(1,2)", "(2,1)"),
    ("(1,2,3)", "(1,2)"),
    ("[1,2]", "(1,2)"),
    ("[1,2)", "(1,2]"),
    ("1, 2", "1, 3"),
    (r"\{1,2\}", r"\{1,2,3\}"),
    ("x=5", "6"),
    ("1 2345", "12345"),
    ("½", "5"),
    (r"5\text{ m}", "5 cm"),
    (r"5 m", r"5\text{ s}"),
]

UNDECIDED = [
    ("0.(3)", "0.3"),
    ("x", "5"),
    ("3t", "3"),
    ("5/0", "5"),
    ("xy", "yx"),
    ("a_{12}", "b_{12}"),
    ("x=5", "y=5"),
    ("0.333333", r"\frac13"),
    (r"1 \pm 2", "3, -1"),
    ("x<5", r"(-\infty,5)"),
    ("9" * 400, "9" * 399),
]


@pytest.mark.parametrize(("answer", "gold"), RIGHT)
def test_fast_path_accepts_equal_answers(answer: str, gold: str) -> None:
    assert compare_fast(answer, gold) is True
    assert compare_fast(gold, answer) is True


def test_percent_gold_accepts_fraction_but_percent_answer_does_not() -> None:
    assert compare_fast("0.1", r"10\%") is True
    assert compare_fast(r"10\%", "0.1") is False


@pytest.mark.parametrize(("answer", "gold"), WRONG)
def test_fast_path_rejects_different_answers(answer: str, gold: str) -> None:
    assert compare_fast(answer, gold) is False


@pytest.mark.parametrize(("answer", "gold"), UNDECIDED)
def test_fast_path_leaves_undecided_answers_to_math_verify(answer: str, gold: str) -> None:
    assert compare_fast(answer, gold) is None


def test_normalize_keeps_meaningful_characters() -> None:
    assert normalize("(1, 234)") == "(1, 234)"
    assert normalize("(1, 2)") == "(1,2)"
    assert normalize(r"\pi r") == r"\pi r"
    assert normalize(r"$$ \dfrac{1}{2} $$") == r"\frac{1}{2}"
    assert normalize("$1$ and $2$") == "1,2"
    assert normalize("1...") == r"1\ldots"


def test_parse_number_is_exact() -> None:
    number = parse_number("0.1")
    assert number is not None
    assert number.value == Fraction(1, 10)
    assert parse_number(r"\frac{1}{0}") is None
    assert parse_number(".") is None


def test_fast_path_on_a_million_digits_is_fast() -> None:
    started = time.process_time()
    assert compare_fast("9" * 10**6, "8" * 10**6) is None
    assert time.process_time() - started < 1.0
