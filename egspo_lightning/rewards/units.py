r"""Units of quantities such as ``12 cm``, ``42\,\mathrm{m/s^2}``, ``\$18.90 \text{ per day}`` and ``42 apples``."""

from __future__ import annotations

import re
from collections import Counter
from math import prod
from typing import NamedTuple

from egspo_lightning.rewards.numbers import multiplied

# Canonical name to synonyms. Units are compared by name and never converted: 12 cm is not 120 mm.
_NAMES = {
    "mm": "millimeter millimetre",
    "cm": "centimeter centimetre",
    "dm": "decimeter decimetre",
    "m": "meter metre",
    "km": "kilometer kilometre",
    "inch": "inches in",
    "ft": "foot feet",
    "yd": "yard",
    "mi": "mile",
    "mg": "milligram",
    "g": "gram gm",
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
    "dollar": "usd",
    "cent": "",
    "euro": "eur",
    "mi/h": "mph",
    "km/h": "kmh kph kmph",
    "Hz": "",
    "am": "",
    "pm": "",
}
_CANONICAL = {
    word.casefold(): name
    for name, synonyms in _NAMES.items()
    for synonym in (name, *synonyms.split())
    for word in (synonym, f"{synonym}s")
}
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cube": 3}
_SYMBOLS = {r"\$": "dollar", "$": "dollar", "€": "euro", "£": "pound sterling", "¥": "yen", "₹": "rupee", "₽": "ruble"}
_CURRENCIES = frozenset([*_SYMBOLS.values(), "cent", "pound"])
SCALES = {
    "dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12,
    "万": 10**4, "亿": 10**8, "тыс": 10**3, "млн": 10**6, "млрд": 10**9,
}  # fmt: skip
_OTHER = {
    "neutral": "unit units degree degrees deg radian radians rad total all of the a an each altogether left",
    # words that change the value: the text stays as it is
    "operative": "or more less fewer than least most up to between factorial squared cubed times plus minus over "
    "divided by choose mod modulo base root not no except without if when where for unless below above under greater "
    "double twice half halves third thirds quarter quarters fifth fifths sixth sixths tenth tenths hundredth "
    "hundredths thousandth thousandths pair pairs score gross percent percentage pct point mil mille tausend millones "
    "millón millionen тысяч миллион миллионов миллиардов 千 百 十 億 萬 inverse negative power only",
}
_NEUTRAL, _OPERATIVE = (frozenset(words.split()) for words in _OTHER.values())
_USUAL = "|".join(sorted((word for word in _CANONICAL if len(word) > 1), key=len, reverse=True))
# Bare letters are a unit only where they are one of the usual words, or surely a noun; others may be variables.
_NOUN = r"(?:(?=[a-z]*[eio])[a-z]{3}|(?=[a-z]*[aeiouy])[a-z]{4,}|[^\W\d_A-Za-z]{1,3}|(?=\w*[^\W\d_A-Za-z])[^\W\d_]{4,})"
_BARE = rf"(?<![^\W\d_])(?<![\\_^])(?!(?:or|mod)(?![a-z]))(?:{_USUAL}|sq|per|in|m/s|{_NOUN})(?![^\W_])"
_TYPESET = r"\\Omega(?![A-Za-z])|\\mu\s*(?=\\text)|\\text\{(?:[^{}\\]|\{[^{}]*\}|\\(?:cdot|times|mu|Omega))*\}"
_ATOM = rf"(?:{_TYPESET}|{_BARE})(?:\^(?:-?\d|\{{-?\d+\}}))?"
_QUOTIENT = rf"\\frac\{{\s*(?:{_ATOM}|k?m)\s*\}}\{{\s*(?:{_ATOM}|[sh](?:\^2)?)\s*\}}"
_PHRASE = rf"(?:/?\s*{_ATOM}|{_QUOTIENT})(?:\s*(?:\\cdot|\\times|/|\.)?\s*{_ATOM})*"
_MEASURED = re.compile(
    rf"(.*?(?:[\d)}}!]|\\pi|\\circ|[A-Za-z](?=\s*/?\s*\\text)))\s*({_PHRASE}|[€£¥₹₽]|\\?\$)", re.DOTALL | re.IGNORECASE
)
_TEMPERATURE = re.compile(r"(.*)\^\\circ\s*(?:\\text\{\s*([CFK])\s*\}|([CFK]))")
_WORD = re.compile(r"([^\W\d_]+|/)(?:\^(-?\d+))?")
_LETTER = re.compile(r"(.*\d)\s([mgshl])")
_MAX_LENGTH = 512


class Quantity(NamedTuple):
    """A value without its unit, and the unit's name or None."""

    value: str
    unit: str | None


def split_unit(text: str) -> Quantity:
    r"""Split a normalized text into value and unit; without a unit at its end or a currency before it, it is the value.

    A unit follows a value: in ``\text{}``, as one of the usual abbreviations, or as nouns. Scale words (million, dozen)
    multiply the value; words such as "or more" leave the text as it is. "units" and degrees are dropped.
    """
    if len(text) > _MAX_LENGTH:
        return Quantity(text, None)
    if (match := _TEMPERATURE.fullmatch(text)) is not None:
        return Quantity(match[1], match[2] or match[3])
    sign = "-" if text.startswith("-") else ""
    for symbol, name in _SYMBOLS.items():
        rest = text[len(sign + symbol) :].strip()
        if text.startswith(sign + symbol) and re.match(r"-?[\d.\\(]", rest):
            return Quantity(sign + _split_phrase(rest).value, name)
    return _split_phrase(text)


def split_letter(text: str) -> Quantity:
    """Split a number, a space and a letter, such as ``5 m``, which may be a product as well."""
    match = _LETTER.fullmatch(text)
    return Quantity(match[1], _canonical([(match[2], "")])) if match else Quantity(text, None)


def _split_phrase(text: str) -> Quantity:
    match = _MEASURED.fullmatch(text)
    if match is None or not any(letter.isdigit() for letter in match[1]):
        return Quantity(text, None)
    value, phrase = match[1].strip(), match[2]
    if phrase in _SYMBOLS:
        return Quantity(value, _SYMBOLS[phrase])
    words = _words(phrase)
    names = [name for name, _ in words]
    if _OPERATIVE.intersection(names):
        return Quantity(text, None)
    factor = prod(SCALES.get(name.removesuffix("s"), 1) for name in names)
    return Quantity(value if factor == 1 else multiplied(value, factor), _canonical(words))


def _words(phrase: str) -> list[tuple[str, str]]:
    """Return the words and the slashes of a unit with their exponents."""
    phrase = re.sub(r"\\frac\{(.*)\}\{(.*)\}", r"\1/\2", phrase)
    phrase = phrase.replace(r"\Omega", "ohm").replace(r"\mu", "micro")
    phrase = re.sub(r"\\[A-Za-z]+|in (?=total|all)", " ", phrase)
    return _WORD.findall(re.sub(r"[{}]|(?<=[a-z])\.", "", phrase).casefold())


def _canonical(words: list[tuple[str, str]]) -> str | None:
    """Return one name for the product of all words with their powers, in any order; None where no unit is left."""
    powers: Counter[str] = Counter()
    sign, factor = 1, 1
    for word, exponent in words:
        if word in ("/", "per"):
            sign = -1
        elif word in _POWERS:
            factor = _POWERS[word]
        elif word not in _NEUTRAL and word.removesuffix("s") not in SCALES:
            name = _CANONICAL.get(word, word.removesuffix("s") if len(word) > 3 else word)
            for part, direction in zip(name.split("/"), (1, -1), strict=False):
                powers[part] += sign * direction * factor * int(exponent or 1)
            sign, factor = 1, 1
    if money := _CURRENCIES.intersection(powers):
        return min(money)
    return " ".join(f"{name}^{power}" for name, power in sorted(powers.items())) or None
