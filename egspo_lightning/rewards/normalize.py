r"""Normalization of answers: removes typesetting and Unicode variants.

math-verify reads the result of `to_latex`. The result of `normalize` is only compared with others.
"""

from __future__ import annotations

import re
from functools import lru_cache

_CACHED = 4096
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))

_UNICODE = str.maketrans(
    {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}  # full width
    | dict.fromkeys("~\u00a0\u2002\u2003\u2009\u202f\u3000", " ")
    | dict.fromkeys("\u200b\u2060\ufeff")  # of no width
    | dict.fromkeys("−–‐‑﹣", "-")
    | {"°": r"^\circ ", "²": "^2", "³": "^3", "√": r"\sqrt ", "π": r"\pi ", "θ": r"\theta ", "∞": r"\infty "}
    | {"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "×": r"\times ", "·": r"\cdot ", "÷": r"\div "}
    | {"∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}"}
    | {"¾": r"\frac{3}{4}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "、": ","}
)
_RADICAL = re.compile(r"√\s*(?:\(([^()]*)\)|(\d+|[A-Za-z]))")
_FONT = re.compile(r"\\(?:textbf|textit|textrm|textnormal|mathbf|mathit|mathrm|boldsymbol|bm|bold)\s*\{([^{}]*)\}")
_TYPESETTING = {
    # an ordinal's th
    re.compile(r"(?<=\d)\s*\^\s*(?:\{\s*)?\\(?:mathrm|text|textrm)\{(?:st|nd|rd|th)\}(?:\s*\})?|(?<=\d)th\b"): "",
    re.compile(r"\\(?:displaystyle|textstyle|bf|rm|it)(?![A-Za-z])\s*"): "",
    # subscripts
    re.compile(r"_\s*(?:\{\s*)?\\(?:mathrm|text|textrm|mathit)\s*\{\s*([A-Za-z0-9]+)\s*\}(?:\s*\})?"): r"_{\1}",
    re.compile(r"_\s*\{\s*\\(max|min)\s*\}"): r"_{\1}",
    re.compile(r"_\s*\{\s*([A-Za-z0-9])\s*\}(?![A-Za-z0-9])"): r"_\1",
}
_SYNONYMS = {
    # sizing
    re.compile(r"\\(?:left|right)(?![A-Za-z])|\\[bB]igg?[lr]?(?![A-Za-z])|\\!\s*"): "",
    re.compile(r"\\[dtc]frac(?![A-Za-z])"): r"\\frac",
    re.compile(r"\\(le|ge|ne)q(?![A-Za-z])"): r"\\\1",
    re.compile(r"\\varnothing(?![A-Za-z])"): r"\\emptyset",
    re.compile(r"\\sqrt\s*([A-Za-z0-9])(?![A-Za-z0-9])"): r"\\sqrt{\1}",
    re.compile(r"\\(?:[;: ]|$)|~|\\q?quad(?![A-Za-z])"): " ",
}
# Spaces have a meaning in "3 1/2", in "\pi r" and after a comma that could separate thousands.
_NEEDLESS_SPACE = re.compile(r"(?<![\w.,])\s+|\s+(?![\w.,])|(?<=,)\s+(?!\d{3}(?!\d))")


@lru_cache(maxsize=_CACHED)
def normalize(text: str) -> str:
    r"""Return one spelling for answers that differ in outer ``$``, sizing, spaces or a final full stop.

    Nothing that may carry meaning changes: ``(1,234)`` keeps its comma, ``3 1/2`` its space.
    """
    text = _replace(_SYNONYMS, to_latex(text)).strip()
    return _NEEDLESS_SPACE.sub("", " ".join(text.split()))


@lru_cache(maxsize=_CACHED)
def to_latex(text: str) -> str:
    """Replace Unicode by LaTeX, and remove an outer ``$``, fonts, an ordinal's ``th`` and a final full stop."""
    text = _RADICAL.sub(r"\\sqrt{\1\2}", text).translate(_UNICODE)
    text = _replace(_TYPESETTING, text).strip()
    text = _without_stop(_without_delimiters(_without_stop(text)))
    if (match := _FONT.fullmatch(text)) is not None and any(character.isdigit() for character in match[1]):
        return match[1].strip()
    return text


def _replace(replacements: dict[re.Pattern[str], str], text: str) -> str:
    for pattern, replacement in replacements.items():
        text = pattern.sub(replacement, text)
    return text


def _without_stop(text: str) -> str:
    is_stop = text.endswith(".") and not text.endswith(("..", r"\.", r"\right."))
    return text[:-1].rstrip() if is_stop else text


def _without_delimiters(text: str) -> str:
    for opening, closing in _DELIMITERS:
        inner = text[len(opening) : len(text) - len(closing)]
        is_wrapped = text.startswith(opening) and text.endswith(closing) and not text.endswith("\\" + closing)
        if is_wrapped and inner.strip() and opening not in inner:
            return inner.strip()
    return text
