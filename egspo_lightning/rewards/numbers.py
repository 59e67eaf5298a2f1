r"""Exact parsing and comparison of plain numbers, which need no algebra."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

_MAX_DIGITS = 300

_GROUPED = r"\d{1,3}(?:(?:,|\{,\}|\\,|,\\,| )\d{3})+"
_DECIMAL = re.compile(rf"({_GROUPED}|\d*)(?:\.(\d+))?\.?")
_FRAC = (
    r"\\frac(?:\{(?P<n1>-?\d+)\}\{(?P<d1>\d+)\}|(?P<n2>\d)(?P<d2>\d)|\s+(?P<n3>\d)\s*(?P<d3>\d)"
    r"|(?P<n4>\d)\{(?P<d4>\d+)\}|\{(?P<n5>\d+)\}(?P<d5>\d))"
)
_FRACTION = re.compile(rf"(?P<n0>\d+)/(?P<d0>\d+)|{_FRAC}")
_MIXED = re.compile(r"(\d+)(?:\s*(\\frac.+)| (\d+/\d+))")
_REPEATING = re.compile(
    r"(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\s*(?:\{(?P<a>\d+)\}|(?P<b>\d))|\((?P<c>\d+)\))(?:\\ldots|\\dots|\.\.\.)?"
)
_SIGNED = re.compile(r"([+-]?)(.*)", re.DOTALL)
PERCENT = re.compile(r"\s*(?:\\?%|\\text\{\s*(?:\\?%|percent)\s*\}|percent)")
_DEGREES = re.compile(r"\^(?:\{\\circ\}|\\circ)")
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
    text, is_percent = _without_suffix(_without_parentheses(normalized), PERCENT)
    text, _ = (text, False) if is_percent else _without_suffix(text, _DEGREES)
    match = _SIGNED.fullmatch(text)
    assert match is not None
    number = _parse_unsigned(_without_parentheses(match[2].strip()))
    if number is None:
        return None
    return Number(-number.value if match[1] == "-" else number.value, number.is_decimal, is_percent)


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
    try:
        return int(match[1], base)
    except ValueError:
        return None


def _without_suffix(text: str, suffix: re.Pattern[str]) -> tuple[str, bool]:
    for match in suffix.finditer(text):
        if match.end() == len(text):
            return text[: match.start()].rstrip(), True
    return text, False


def _without_parentheses(text: str) -> str:
    """Remove parentheses around one number: AMC's solutions write ``(211)``. With a comma it may be a pair."""
    is_single = text.startswith("(") and text.endswith(")") and not re.search("[(),]", text[1:-1])
    return text[1:-1].strip() if is_single else text


def _parse_unsigned(text: str) -> Number | None:
    if (match := _FRACTION.fullmatch(text)) is not None:
        numerator, denominator = (int(part) for part in match.groupdict().values() if part is not None)
        return Number(Fraction(numerator, denominator), False) if denominator else None
    if (match := _MIXED.fullmatch(text)) is not None:
        part = _FRACTION.fullmatch(match[2] or match[3]) and _parse_unsigned(match[2] or match[3])
        return Number(int(match[1]) + part.value, False) if part and part.value >= 0 else None
    if (match := _REPEATING.fullmatch(text)) is not None:
        period = match["a"] or match["b"] or match["c"]
        repeated = Fraction(int(period), 10 ** len(match[2]) * (10 ** len(period) - 1))
        return Number(Fraction(f"{match[1] or 0}.{match[2] or 0}") + repeated, False)
    match = _DECIMAL.fullmatch(text)
    if match is None or not (match[1] or match[2]):
        return None
    digits = re.sub(r"[^\d]", "", match[1]) or "0"
    return Number(Fraction(f"{digits}.{match[2] or 0}"), match[2] is not None)
