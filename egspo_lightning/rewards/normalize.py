r"""The grader's fast path: verdicts on answers that need no algebra, and never a guess.

Most answers of a math benchmark are plain numbers or are spelt as the reference is. Those are decided here,
in the calling process. Everything else is None: ask math-verify.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

_MAX_DIGITS = 300
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
_UNICODE = str.maketrans({"−": "-", "–": "-", "°": r"^\circ", "\u00a0": " ", "，": ",", "\u2009": " "})

_SIZING = re.compile(r"\\(?:left|right)(?![A-Za-z])|\\[bB]igg?[lr]?(?![A-Za-z])|\\!")
_ORDINAL = re.compile(r"(?<=\d)\s*\^\{\s*\\(?:mathrm|text|textrm)\{(?:st|nd|rd|th)\}\s*\}")
_FRACTION_STYLE = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_LATEX_SPACE = re.compile(r"\\(?:[;: ]|$)|~|\\q?quad(?![A-Za-z])")
# Spaces matter in "3 1/2", in "\pi r" and after a comma that could separate thousands; elsewhere they do not.
_IDLE_SPACE = re.compile(r"(?<![\w.,])\s+|\s+(?![\w.,])|(?<=,)\s+(?!\d{3}(?!\d))")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}\\$]*)\}")

_GROUPED = r"\d{1,3}(?:(?:,|\{,\}|\\,)\d{3})+"
_DECIMAL = re.compile(rf"([+-]?)({_GROUPED}|\d*)(?:\.(\d+))?")
_INTEGER = r"(\d+)"
_SLASHED = re.compile(rf"([+-]?){_INTEGER}/{_INTEGER}")
_FRAC = re.compile(rf"([+-]?)\\frac(?:\{{{_INTEGER}\}}\{{{_INTEGER}\}}|(\d)(\d)|\s+(\d)(\d)|(\d)\{{{_INTEGER}\}})")
_REPEATING = re.compile(r"([+-]?)(\d*)\.(\d*)\\overline\{(\d+)\}")
_BASED = re.compile(r"([0-9][0-9A-F]{0,63})_(?:\{(\d{1,2})\}|(\d))")
_WORD = re.compile(r"[A-Za-z]{2,}")


class Number(NamedTuple):
    """An exact value, and whether it was written with a decimal point (so that it may be a rounded one)."""

    value: Fraction
    is_decimal: bool


def normalize(text: str) -> str:
    r"""One spelling for answers that differ in presentation: outer ``$``, sizing, spaces, final full stop.

    Only what cannot change the meaning is touched: ``(1,234)`` keeps its comma, ``3 1/2`` its space.
    """
    text = _SIZING.sub("", to_latex(text))
    text = _FRACTION_STYLE.sub(r"\\frac", text)
    text = _LATEX_SPACE.sub(" ", text).strip()
    if text.endswith(".") and not text.endswith(("..", r"\.")):
        text = text[:-1]
    return _IDLE_SPACE.sub("", " ".join(text.split()))


def to_latex(text: str) -> str:
    """The text without an outer ``$`` or an ordinal's ``th``; LaTeX for the Unicode minus and degree."""
    text = _ORDINAL.sub("", text.translate(_UNICODE)).strip()
    for opening, closing in _DELIMITERS:
        inner = text[len(opening) : len(text) - len(closing)]
        is_wrapped = text.startswith(opening) and text.endswith(closing) and not text.endswith("\\" + closing)
        if is_wrapped and inner.strip() and opening not in inner:
            return inner.strip()
    return text


def parse_number(normalized: str) -> Number | None:
    r"""The value of ``72``, ``1,234.5``, ``0.\overline{3}``, ``1/2`` or ``\frac{1}{2}``, as normalised.

    Thousands separators are read where they group every three digits. None for everything else, a zero
    denominator and anything over 300 characters: integers are never built from hostile digits.
    """
    if len(normalized) > _MAX_DIGITS:
        return None
    if (match := _SLASHED.fullmatch(normalized) or _FRAC.fullmatch(normalized)) is not None:
        sign, *parts = (part for part in match.groups() if part is not None)
        numerator, denominator = map(int, parts)
        return Number(Fraction(int(f"{sign}1") * numerator, denominator), False) if denominator else None
    if (match := _REPEATING.fullmatch(normalized)) is not None:
        sign, whole, fixed, period = match.groups()
        repeated = Fraction(int(period), 10 ** len(fixed) * (10 ** len(period) - 1))
        return Number(int(f"{sign}1") * (Fraction(f"{whole or 0}.{fixed or 0}") + repeated), False)
    match = _DECIMAL.fullmatch(normalized)
    if match is None or not (match[2] or match[3]):
        return None
    digits = re.sub(r"[^\d]", "", match[2]) or "0"
    return Number(Fraction(f"{match[1]}{digits}.{match[3] or 0}"), match[3] is not None)


def compare_fast(answer: str, gold: str) -> bool | None:
    r"""Whether an answer equals the reference, where that needs no algebra; None where it does.

    True for equal normalised spellings. Plain numbers are compared exactly, except that a decimal against a
    fraction it does not equal is None: it may be a rounded one. Numbers with a base (``101_2``) are compared
    by value. A word in ``\text{}`` is compared as a word (its letters are not variables), letter case aside.
    A tuple is not a set, and an answer such as ``5=6`` is wrong.
    """
    answer, gold = normalize(answer), normalize(gold)
    if not answer or not gold:
        return None
    if answer == gold:
        return True
    left, right = parse_number(answer), parse_number(gold)
    if left is not None and right is not None:
        return _compare_numbers(left, right)
    if _is_false_equation(answer):
        return False
    left_value, right_value = _value_in_base(answer), _value_in_base(gold)
    if left_value is not None and right_value is not None:
        return left_value == right_value
    words = _compare_words(answer, gold)
    if words is not None:
        return words
    if {_outer_brackets(answer), _outer_brackets(gold)} == {"()", r"\{\}"}:
        return False
    return None


def _compare_numbers(left: Number, right: Number) -> bool | None:
    if left.value == right.value:
        return True
    exact = left if right.is_decimal else right
    may_be_rounded = left.is_decimal != right.is_decimal and exact.value.denominator > 1
    return None if may_be_rounded else False


def _is_false_equation(answer: str) -> bool:
    sides = [parse_number(side) for side in answer.split("=")]
    exact = [side.value for side in sides if side is not None and not side.is_decimal]
    return len(exact) == len(sides) and len(set(exact)) > 1


def _value_in_base(text: str) -> int | None:
    match = _BASED.fullmatch(text)
    base = int(match[2] or match[3]) if match else 0
    if match is None or not 2 <= base <= 16:
        return None
    try:
        return int(match[1], base)
    except ValueError:
        return None


def _compare_words(answer: str, gold: str) -> bool | None:
    texts = _TEXT.fullmatch(answer), _TEXT.fullmatch(gold)
    if texts == (None, None):
        return None
    left = texts[0][1].strip() if texts[0] else answer
    right = texts[1][1].strip() if texts[1] else gold
    if left and left.casefold() == right.casefold():
        return True
    return False if _WORD.fullmatch(left) and _WORD.fullmatch(right) else None


def _outer_brackets(text: str) -> str | None:
    for opening, closing in (("(", ")"), (r"\{", r"\}")):
        if text.startswith(opening) and text.endswith(closing) and "," in text:
            inner = text[len(opening) : -len(closing)]
            return None if re.search(r"[()\[\]]|\\[{}]", inner) else opening + closing
    return None
