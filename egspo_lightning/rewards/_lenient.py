"""Lenient extraction: the answer in free text, found by the patterns of math-verify."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import groupby
from operator import itemgetter

from latex2sympy2_extended.math_normalization import extract_boxed_content
from math_verify import ExprExtractionConfig, LatexExtractionConfig
from math_verify.parser import get_extraction_regexes

_CONFIGS = (LatexExtractionConfig(boxed_match_priority=-1), ExprExtractionConfig())
_VALUE = r"[A-Za-z]\w?(?:\([A-Za-z]\))?\s*=\s*-?\d+(?:[./]\d+)?"
_PLAIN_VALUES = re.compile(rf"{_VALUE}(?:\s*(?:,|;|or|and)\s*{_VALUE})+(?=\s*\.?\s*\Z)")
"""Several values at the end of a text without LaTeX, such as "x=1 or x=-1"; math-verify finds only the last number."""
_FINAL = 50
"""Priority of "final answer is" among the patterns; boxes follow, then "answer", then any formula or number."""


def find_answer(text: str, is_readable: Callable[[str], bool]) -> str | None:
    """Return the first answer in a text that can be read, else the first; None where there is none.

    Several plain values at the end come first. Then the order is that of math-verify: what follows "final answer is",
    the last boxes, what follows "answer", and the last formula or number.
    """
    found = list(dict.fromkeys(_candidates(text)))
    return next(filter(is_readable, found), found[0] if found else None)


def _candidates(text: str) -> Iterator[str]:
    if "\\" not in text and "$" not in text and (values := _PLAIN_VALUES.search(text)) is not None:
        yield values[0]
        return
    found = get_extraction_regexes(_CONFIGS)
    patterns = sorted(((priority, pattern) for pairs, _ in found for pattern, priority in pairs), key=itemgetter(0))
    boxed = extract_boxed_content(text, "last").strip()
    if boxed.count("{") > boxed.count("}"):  # the box is never closed
        boxed = boxed.removeprefix("{")
    for priority, group in groupby(patterns, key=itemgetter(0)):
        if priority > _FINAL and boxed != text.strip():
            yield boxed
            return
        matches = [match for _, pattern in group for match in pattern.finditer(text)]
        matches.sort(key=lambda match: (-match.end(), match.start()))
        yield from map(_text, matches)


def _text(match: re.Match[str]) -> str:
    groups = {name: value for name, value in match.groupdict().items() if value}
    formulas = [value for name, value in groups.items() if "latex" in name]
    if formulas:
        return ", ".join(formulas) + r"\%" * ("first_percent" in groups)
    number = "".join(value for name, value in groups.items() if name.startswith(("integer", "expr")))
    decimals = "".join(value for name, value in groups.items() if name.startswith("decimal"))
    return number + decimals.replace(",", ".") + r"\%" * ("percent" in groups)
