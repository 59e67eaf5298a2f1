r"""Units of quantities such as ``12 cm``, ``12\text{ cm}^2`` and ``\$18.90``."""

from __future__ import annotations

import re
from typing import NamedTuple

# Canonical name to synonyms. Units are compared by name and never converted: 12 cm is not 120 mm.
_NAMES = {
    "mm": "millimeter millimetre",
    "cm": "centimeter centimetre",
    "dm": "decimeter decimetre",
    "m": "meter meter",
    "km": "kilometer kilometre",
    "in": "inch inches",
    "ft": "foot feet",
    "yd": "yard",
    "mi": "mile",
    "mg": "milligram",
    "g": "gram",
    "kg": "kilogram",
    "lb": "pound lbs",
    "oz": "ounce",
    "ml": "milliliter millilitre",
    "l": "liter litre",
    "gal": "gallon",
    "s": "second sec",
    "min": "minute",
    "h": "hour hr",
    "day": "",
    "week": "",
    "month": "",
    "year": "yr",
    "mph": "miperh",
    "km/h": "kmh kph kmph kmperh",
    "m/s": "mpers",
    "degree": "deg",
    "radian": "rad",
    "dollar": "usd",
    "cent": "",
    "euro": "eur",
    "unit": "",
    "square": "sq",
}
_CANONICAL = {
    word: name
    for name, synonyms in _NAMES.items()
    for synonym in (name, *synonyms.split())
    for word in (synonym, f"{synonym}s")
}
_GENERIC = frozenset({"", "unit", "degree"})
_POWERS = {"square": "^2", "cubic": "^3", "cube": "^3"}
_SYMBOLS = {r"\$": "dollar", "$": "dollar", "€": "euro", "£": "pound sterling", "¥": "yen"}

_POWER = r"(?:\^\s*(?:(\d)|\{\s*(\d)\s*\}))?"
_TYPESET = re.compile(rf"\\(?:text|mathrm|mbox|textrm|operatorname|rm)\s*\{{([^{{}}\\$]*)\}}\s*{_POWER}$")
# Bare letters are a unit only where they are one of these words; others may be variables.
_WORDS = "|".join(sorted((word for word in _CANONICAL if len(word) > 1), key=len, reverse=True))
_BARE = re.compile(
    rf"(?<![A-Za-z\\{{])((?:(?:square|sq|cubic)\s*)?(?:{_WORDS})(?:\s*per\s*(?:{_WORDS}))?)\s*{_POWER}$", re.IGNORECASE
)
_LETTER = re.compile(r"(.*\d)(?:\\[ ,;]|~|\s)\s*([mgshl])")
_NUMERAL_END = re.compile(r"(?:[\d})]|\\circ|\\pi)\s*$")
_WORD = re.compile(r"[A-Za-z/.\s]*")


class Quantity(NamedTuple):
    """A value without its unit, and the unit's name or None."""

    value: str
    unit: str | None


def split_unit(text: str) -> Quantity:
    r"""Split a text into value and unit. Without a unit at its end, or ``\$`` before it, the text is the value.

    A unit follows a digit or a closing bracket, in ``\text{}``, ``\mathrm{}`` or ``\mbox{}`` or as one of the usual
    words. "units" and degrees are dropped.
    """
    for symbol, name in _SYMBOLS.items():
        if text.startswith(symbol) and re.match(r"\s*[\d.\\]", text[len(symbol) :]):
            return Quantity(text[len(symbol) :].strip(), name)
    text, unit = text.rstrip(), ""
    while (part := _last_part(text)) is not None:  # \text{ square } \text{ cm }^2
        text, name = part
        unit = f"{name} {unit}".strip()
    return Quantity(text, _canonical(unit))


def split_letter(text: str) -> Quantity:
    """Split a number, a space and a letter, such as ``5 m``, which may be a product as well."""
    match = _LETTER.fullmatch(text)
    return Quantity(match[1], match[2]) if match else Quantity(text, None)


def _last_part(text: str) -> tuple[str, str] | None:
    for pattern in (_TYPESET, _BARE):
        match = pattern.search(text)
        if match is None:
            continue
        value = re.sub(r"(?:\\[ ,;:!]|~|\s)+$", "", text[: match.start()])
        if _has_number(value) and _WORD.fullmatch(match[1]):
            power = match[2] or match[3]
            return value, match[1].strip() + (f"^{power}" if power else "")
    return None


def _has_number(value: str) -> bool:
    return bool(_NUMERAL_END.search(value) or _TYPESET.search(value)) and any(letter.isdigit() for letter in value)


def _canonical(unit: str) -> str | None:
    words = [_name(word) for word in re.split(r"[\s.]+", unit.strip().casefold())]
    power = "".join(_POWERS.get(word, "") for word in words)
    joined = "".join(word for word in words if word not in _POWERS)
    name = _CANONICAL.get(joined, joined)
    return None if name in _GENERIC else name + power


def _name(word: str) -> str:
    base, caret, power = word.partition("^")
    return _CANONICAL.get(base, base[:-1] if len(base) > 3 and base.endswith("s") else base) + caret + power
