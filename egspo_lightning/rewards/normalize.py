r"""Normalization of answers: one spelling for typesetting, Unicode, plain text and LaTeX shorthand.

Every comparison reads its result, and math-verify does, so both texts of a pair are read alike.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

from egspo_lightning.rewards.spellings import GREEK, SPACING, SYNONYMS, Rules

_CACHED = 4096

_SYMBOLS = dict.fromkeys("~\u00a0\u2002\u2003\u2009\u202f\u3000", " ")
_SYMBOLS |= dict.fromkeys("\u200b\u2060\ufeff", "") | dict.fromkeys("−–‐‑﹣", "-") | dict.fromkeys("∙⋅·", r"\cdot ")
_SYMBOLS |= {"°": r"^\circ ", "º": r"^\circ ", "℃": r"^\circ C", "℉": r"^\circ F", "√": r"\sqrt ", "∞": r"\infty "}
_SYMBOLS |= {"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "±": r"\pm ", "∓": r"\mp ", "×": r"\times "}
_SYMBOLS |= {"÷": r"\div ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∉": r"\notin ", "∅": r"\emptyset "}
_SYMBOLS |= {"∖": r"\setminus ", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "、": ","}
_SYMBOLS |= {
    "∧": r"\land ",
    "∨": r"\lor ",
    "′": "'",
    "’": "'",
    "…": r"\ldots ",
    "⁄": "/",
    "→": r"\to ",
    "∛": r"\sqrt[3]",
    "✓": "",
    "✔": "",
    "∴": r"\therefore ",
}
_SYMBOLS |= {letter: rf"\mathbb{{{name}}}" for letter, name in zip("ℕℤℚℝℂ", "NZQRC", strict=True)}
_RADICAL = re.compile(r"√\s*(?:\(([^()]*)\)|(\d+|[A-Za-z]))")
_RAISED = re.compile("[⁰¹²³⁴-⁹⁺⁻⁽⁾ⁿⁱ]+|[₀-₉₊₋₍₎ₐ-ₜ]+")
_VULGAR = re.compile(r"([¼-¾⅐-⅞])|([\d⁰¹²³⁴-⁹]+)⁄([\d₀-₉]+)")  # a fraction character, or digits with the fraction slash

_FONT = re.compile(
    r"\\(?:text(?:bf|it|rm|normal|sf|sl|sc|tt|up)?|[hm]box|math(?:rm|bf|it|sf|tt|normal)|boldsymbol|bm|bold|underline|operatorname\*?)"
    r"\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
)
_ESCAPED = re.compile(r"\\\\(?=[A-Za-z])")  # a doubled backslash, where no matrix has rows


_REMARKS = (
    r"exact(?:ly)?|approx(?:imately)?\.?|about|roughly|around|precisely|the|my|our|so|thus|hence|therefore"
    r"|rounded(?: to (?:the nearest [a-z]+|\w+ (?:decimal|significant) [a-z]+))?"
    r"|number|ans|final|correct|answer|result|solution|total|value|simplified|is|are|equals|equal to"
)
_REMARK = rf"(?:{_REMARKS})(?![A-Za-z])[\s:,]*"
# Text around an answer that is no part of it.
_WRAPPERS = [
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"\*{1,3}([^*]+)\*{1,3}|__(.+)__|\"(.+)\"|``?(.+?)(?:''|`)",
        r"(?:\\text)?\{((?:[^{}\\]|\\.|\{[^{}]*\})*)\}",
        r"(.*[^.,;\s\\])\s*(?:[,;:]|\.(?!\.))",
        r"(?:[=:]|\\(?:to|therefore|implies|Rightarrow|approx|sim|simeq|doteq|equiv)(?![A-Za-z]))(.+)",
        rf"(?i:(?:{_REMARK}|\\text\{{\s*(?:{_REMARK})+\}}\s*:?)+)(.+)",
        rf"(.*\S)\s*(?i:\(\s*(?:{_REMARK})+\)|\\text\{{\s*\(?\s*(?:{_REMARK})+\)?\s*\}})",
        r"(?:\\text\{)?[A-Z][a-z]{2,}:\s*\}?\s*(.+)",
    )
]
_INTEGER = re.compile(r"-?\d+")
# Spaces have a meaning in "3 1/2", in "\pi r" and after a comma that could separate thousands.
_NEEDLESS_SPACE = re.compile(r"(?<![\w.,])\s+|\s+(?![\w.,])|(?<=,)\s+(?!\d{3}(?!\d))")


@lru_cache(maxsize=_CACHED)
def normalize(text: str) -> str:
    r"""Return one spelling for answers that differ in typesetting, wrappers, Unicode, shorthand or plain notation.

    Nothing that may carry meaning changes: ``(1,234)`` keeps its comma, ``3 1/2`` its space, ``\text{ cm}`` its unit.
    """
    if _INTEGER.fullmatch(text):
        return text
    if r"\begin" not in text:
        text = _ESCAPED.sub(r"\\", text)
    text = _without_dollars(_replace(SPACING, _from_unicode(text)))
    text = _unwrap(_FONT.sub(r"\\text{\1}", text).strip())
    text = _replace(SYNONYMS, text).strip()
    return _NEEDLESS_SPACE.sub("", " ".join(text.split()))


def _from_unicode(text: str) -> str:
    if text.isascii():
        return text.replace("~", " ")
    text = _RADICAL.sub(r"\\sqrt{\1\2}", text)
    text = _VULGAR.sub(lambda match: "\\frac{" + _plain(match[0]).replace("⁄", "}{") + "}", text)
    text = _RAISED.sub(lambda match: ("^" if match[0][0] in "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ" else "_") + _braced(match[0]), text)
    return "".join(_SYMBOLS.get(letter) or _letter(letter) if not letter.isascii() else letter for letter in text)


def _without_dollars(text: str) -> str:
    """Remove the delimiters of math; an odd one out is a currency."""
    dollars = re.compile(r"(?<!\\)\$")
    return dollars.sub(" ", text) if len(dollars.findall(text)) % 2 == 0 else text


def _letter(letter: str) -> str:
    if letter in _SYMBOLS:  # an empty replacement
        return ""
    words = unicodedata.name(letter, "").split()
    is_greek = words[:1] == ["GREEK"] and words[2:3] == ["LETTER"] and len(words) == 4
    if is_greek and (name := words[3].lower().replace("lamda", "lambda")) in GREEK:
        return "\\" + (name.capitalize() if words[1] == "CAPITAL" else name) + " "
    return _plain(letter)


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text)


def _braced(text: str) -> str:
    return f"{{{_plain(text).replace('−', '-')}}}"


def _replace(rules: Rules, text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def _unwrap(text: str) -> str:
    before = ""
    while before != text:
        before = text
        for match in filter(None, (pattern.fullmatch(text) for pattern in _WRAPPERS)):
            text = next((part for part in match.groups() if part is not None), "").strip() or text
            break
    return text
