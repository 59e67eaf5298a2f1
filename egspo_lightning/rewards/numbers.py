r"""Exact parsing and comparison of plain numbers, which need no algebra."""

from __future__ import annotations

import contextlib
import re
from fractions import Fraction
from typing import NamedTuple

_MAX_DIGITS = 300
_GROUPED = r"\d{1,3}(?:(?:,|\{,\}|\\,|,\\,| )\d{3})+"
_DECIMAL = re.compile(rf"({_GROUPED}|\d*)(?:\.(\d+))?\.?")
_FRACTION = re.compile(r"(\d+)/(\d+)|\\frac(?:\{(-?\d+)\}|(\d))(?:\{(\d+)\}|(\d))|\\frac\s+(\d)\s*(\d)")
_MIXED = re.compile(rf"(\d+)(?: |\s*(?=\\))({_FRACTION.pattern})")
_REPEATING = re.compile(r"(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\s*(?:\{(\d+)\}|(\d))|\((\d+)\))(?:\\l?dots|\.{3})?")
PERCENT = re.compile(r"\s*(?:\\?%|\\text\{\s*(?:\\?%|percent)\s*\}|percent)")
_LAST_PERCENT = re.compile(rf"{PERCENT.pattern}\Z")
_LAST_DEGREES = re.compile(r"\^(?:\{\\circ\}|\\circ)\Z")
_BASED = re.compile(r"([0-9][0-9A-Fa-f]{0,63})_(?:\{(\d{1,2})\}|(\d))")


class Number(NamedTuple):
    """An exact value, with its notation."""

    value: Fraction
    is_decimal: bool
    """Whether it has a decimal point, so that it may be rounded."""
    is_percent: bool = False
    """Whether a percent sign follows; the value is the number before it, 10 for ``10\\%``."""


def parse_number(normalized: str) -> Number | None:
    r"""Parse ``72``, ``1,234.5``, ``0.\overline{3}``, ``3\frac{1}{2}``, ``10\%`` or ``90^\circ``, after `normalize`.

    Thousands separators must group every three digits. Returns None for all else, a zero denominator and texts of
    more than 300 characters, so that hostile digits never become integers.
    """
    if len(normalized) > _MAX_DIGITS:
        return None
    text, num_percents = _LAST_PERCENT.subn("", _without_parentheses(normalized))
    if not num_percents:
        text = _LAST_DEGREES.sub("", text)
    sign, unsigned = (text[0], text[1:]) if text.startswith(("+", "-")) else ("", text)
    number = _parse_unsigned(_without_parentheses(unsigned.strip()))
    if number is None:
        return None
    return Number(-number.value if sign == "-" else number.value, number.is_decimal, bool(num_percents))


def compare_numbers(answer: Number, gold: Number) -> bool | None:
    """Return whether two numbers are equal; None for a decimal that may be a rounded fraction.

    A percentage as the gold answer means its number and a hundredth of it. A sign in the answer alone is ignored:
    with two readings, an answer could only gain from a sign.
    """
    has_two_readings = gold.is_percent and not answer.is_percent
    golds = [gold.value, gold.value / 100] if has_two_readings else [gold.value]
    if answer.value in golds:
        return True
    rounded = golds if answer.is_decimal else [answer.value]
    may_be_rounded = answer.is_decimal != gold.is_decimal and any(exact.denominator > 1 for exact in rounded)
    return None if may_be_rounded else False


def as_latex(number: Number) -> str:
    """Return a spelling that math-verify cannot misread."""
    top, bottom = number.value.as_integer_ratio()
    sign = "-" if top < 0 else ""
    return f"{top}" if bottom == 1 else rf"{sign}\frac{{{abs(top)}}}{{{bottom}}}"


def value_in_base(text: str) -> int | None:
    """Return the value of a number that names its base, such as ``101_2``; None for all else."""
    match = _BASED.fullmatch(text)
    base = int(match[2] or match[3]) if match else 0
    if match is None or not 2 <= base <= 16:
        return None
    with contextlib.suppress(ValueError):  # a digit is not below the base
        return int(match[1], base)
    return None


def _without_parentheses(text: str) -> str:
    """Remove parentheses around one number: AMC's solutions write ``(211)``. With a comma it may be a pair."""
    is_single = text.startswith("(") and text.endswith(")") and not re.search("[(),]", text[1:-1])
    return text[1:-1].strip() if is_single else text


def _parse_unsigned(text: str) -> Number | None:
    if (match := _FRACTION.fullmatch(text)) is not None:
        numerator, denominator = (int(part) for part in match.groups() if part is not None)
        return Number(Fraction(numerator, denominator), False) if denominator else None
    if (match := _MIXED.fullmatch(text)) is not None:
        part = _parse_unsigned(match[2])
        return Number(int(match[1]) + part.value, False) if part and part.value >= 0 else None
    if (match := _REPEATING.fullmatch(text)) is not None:
        period = match[3] or match[4] or match[5]
        repeated = Fraction(int(period), 10 ** len(match[2]) * (10 ** len(period) - 1))
        return Number(Fraction(f"{match[1] or 0}.{match[2] or 0}") + repeated, False)
    match = _DECIMAL.fullmatch(text)
    if match is None or not (match[1] or match[2]):
        return None
    digits = re.sub(r"[^\d]", "", match[1]) or "0"
    return Number(Fraction(f"{digits}.{match[2] or 0}"), match[2] is not None)
