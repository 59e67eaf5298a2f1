r"""Exact parsing and comparison of plain numbers, which need no algebra."""

from __future__ import annotations

import contextlib
import re
from fractions import Fraction
from typing import NamedTuple

_MAX_DIGITS = 300
_GROUPED = r"\d{1,3}(?:[, ']\d{3})+|\d{1,2}(?:,\d{2})+,\d{3}"  # also in lakhs and crores
_DECIMAL = re.compile(rf"({_GROUPED}|\d*)(?:\.(\d+))?\.?")
_CONTINENTAL = re.compile(r"(\d{1,3}(?:[. ]\d{3})+),(\d+)|(\d{1,3}(?:\.\d{3}){2,})|(0),(\d{3,})")  # 1.234,5
_SCIENTIFIC = re.compile(r"(?:(.+?)\s*(?:\\times|\\cdot|\*)\s*)?10\^(?:\{(-?\d{1,3})\}|(\d))")
_FRACTION = re.compile(r"(\d+)/(\d+)|\\frac(?:\{(-?\d+)\}|(\d))(?:\{(\d+)\}|(\d))|\\frac\s+(\d)\s*(\d)")
_MIXED = re.compile(rf"(\d+)(?: |\s*(?=\\))({_FRACTION.pattern})")
_REPEATING = re.compile(r"(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\s*(?:\{(\d+)\}|(\d))|\((\d+)\))(?:\\ldots)?")
_CONTINUED = re.compile(r"(\d*)\.(\d*?)(\d+?)\3+\\ldots")  # 0.1666...
LAST_PERCENT = re.compile(r"\s*(?:\\?%|\\text\{\s*(?:\\?%|percent(?:age)?|pct)\s*\}|percent(?:age)?|pct)\Z")
_LAST_DEGREES = re.compile(r"\^\\circ\Z")
_BASED = re.compile(r"([0-9][0-9A-Fa-f,]{0,63}|[A-Z][0-9A-Z]{0,63})_(?:\{(\d{1,2})\}|(\d))")


class Number(NamedTuple):
    """An exact value, with its notation."""

    value: Fraction
    is_decimal: bool
    """Whether it has a decimal point, so that it may be rounded."""


def parse_number(normalized: str) -> Number | None:
    r"""Parse ``72``, ``1,234.5``, ``0.\overline{3}``, ``3\frac{1}{2}``, ``4.5\times10^{33}``, after `normalize`.

    Thousands separators must group every three digits. Returns None for all else, a zero denominator and texts of
    more than 300 characters, so that hostile digits never become integers.
    """
    if len(normalized) > _MAX_DIGITS:
        return None
    text = _LAST_DEGREES.sub("", _without_parentheses(normalized))
    sign, unsigned = (text[0], text[1:]) if text.startswith(("+", "-")) else ("", text)
    number = _parse_unsigned(_without_parentheses(unsigned.strip()))
    if number is None:
        return None
    return Number(-number.value if sign == "-" else number.value, number.is_decimal)


def compare_numbers(answer: Number, gold: Number) -> bool | None:
    """Return whether two numbers are equal; None for a decimal that may be a rounded fraction."""
    if answer.value == gold.value:
        return True
    rounded = [number.value for number in (answer, gold) if not number.is_decimal]
    may_be_rounded = answer.is_decimal != gold.is_decimal and rounded[0].denominator > 1
    return None if may_be_rounded else False


def multiplied(text: str, factor: Fraction | int) -> str:
    """Return a normalized text for a value times a scale such as million, or percent."""
    number = parse_number(text)
    top, bottom = (Fraction(factor) * (number.value if number else 1)).as_integer_ratio()
    scaled = f"{top}" if bottom == 1 else rf"{'-' * (top < 0)}\frac{{{abs(top)}}}{{{bottom}}}"
    return scaled if number else rf"{scaled}\cdot({text})"


def value_in_base(text: str) -> int | None:
    """Return the value of a number that names its base, such as ``101_2`` and ``FF_{16}``; None for all else."""
    match = _BASED.fullmatch(text)
    base = int(match[2] or match[3]) if match else 0
    if match is None or not 2 <= base <= 36:
        return None
    with contextlib.suppress(ValueError):  # a digit is not below the base
        return int(match[1].replace(",", ""), base)
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
        return _repeating(match[1], match[2], match[3] or match[4] or match[5])
    if (match := _CONTINUED.fullmatch(text)) is not None:
        return _repeating(*match.groups())
    if (match := _SCIENTIFIC.fullmatch(text)) is not None:
        mantissa = _parse_unsigned(match[1]) if match[1] else Number(Fraction(1), False)
        exponent = int(match[2] or match[3])
        return mantissa and Number(mantissa.value * Fraction(10) ** exponent, mantissa.is_decimal)
    if (match := _CONTINENTAL.fullmatch(text)) is not None:
        whole, decimals = match[1] or match[3] or match[4], match[2] or match[5]
        return Number(Fraction(f"{re.sub('[. ]', '', whole)}.{decimals or 0}"), decimals is not None)
    match = _DECIMAL.fullmatch(text)
    if match is None or not (match[1] or match[2]):
        return None
    digits = re.sub(r"[^\d]", "", match[1]) or "0"
    return Number(Fraction(f"{digits}.{match[2] or 0}"), match[2] is not None)


def _repeating(whole: str, decimals: str, period: str) -> Number:
    repeated = Fraction(int(period), 10 ** len(decimals) * (10 ** len(period) - 1))
    return Number(Fraction(f"{whole or 0}.{decimals or 0}") + repeated, False)
