"""Calls of math-verify. Only worker processes import this module: it loads sympy.

Never print a sympy object here: ``str`` of a parsed answer can run forever. An exception in a parse or a comparison
means that there is nothing to compare. MemoryError is the exception: it gives no verdict.
"""

from __future__ import annotations

from functools import lru_cache, partial
from itertools import product
from typing import Any

from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from math_verify.parser import parse_latex_cached

from egspo_lightning.rewards._difference import are_different, are_same_decimals, attempt

_MATH_MARKS = ("$", r"\boxed", r"\(", r"\[")
_EXTRACTION = (LatexExtractionConfig(), ExprExtractionConfig())
# rewards.units compares units earlier: math-verify drops them, and the variable of 3t with them.
_SPELLING = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
_CACHED = 4096
_WARM_UP = (
    r"\frac{\sqrt{3}}{2}",
    r"(1, 2]",
    r"\{1, 2\}",
    "x=2y+1",
    "3.5",
    r"\begin{pmatrix}1\\2\end{pmatrix}",
    r"\log_2 5 + \sin x",
    r"1 \pm 2x^3",
)


def grade(answer: str, gold: str, extraction: str) -> tuple[bool, str | None]:
    """Grade one answer. Returns whether it is correct, and its text, or None where there is no answer.

    With extraction "boxed" the answer is bare; with "lenient" math-verify looks for it in free text.

    Raises:
        MemoryError: this process has reached its memory limit; there is no verdict.
    """
    if extraction == "boxed":
        return _equal(_parse_bare(gold), _parse_bare(answer)), answer
    parsed = _parse_text(answer)
    correct = _verify(_parse_gold(gold), parsed, allow_set_relation_comp=False)
    return correct, next((part for part in parsed if isinstance(part, str)), None)


def warm_up() -> None:
    """Compile the patterns and fill the tables of the parser and of sympy. Forked workers share them."""
    for answer in _WARM_UP:
        grade(answer, answer, "boxed")
        grade(f"The answer is ${answer}$.", answer, "lenient")
    grade("2+x", "x+1", "boxed")
    grade(r"\sqrt{12}", r"2\sqrt{3}", "boxed")


def _equal(gold: Any, answer: Any) -> bool:
    if gold is None or answer is None:
        return False
    if are_same_decimals(gold, answer):
        return True
    if attempt(lambda: are_different(gold, answer), False):
        return False
    return _verify([gold], [answer], allow_set_relation_comp=True)  # 3 < x <= 4 answers (3, 4]


def _verify(golds: list[Any], answers: list[Any], **options: bool) -> bool:
    compare = partial(verify, timeout_seconds=None, raise_on_error=True, **options)
    return any(attempt(partial(compare, gold, answer), False) for gold, answer in product(golds, answers))


@lru_cache(maxsize=_CACHED)
def _parse_bare(text: str) -> Any:
    return attempt(lambda: parse_latex_cached(normalize_latex(text, _SPELLING)), None)


def _parse_text(text: str) -> list[Any]:
    return attempt(lambda: parse(text, _EXTRACTION, parsing_timeout=None, raise_on_error=True), [])


@lru_cache(maxsize=_CACHED)
def _parse_gold(gold: str) -> list[Any]:
    return _parse_text(gold if any(mark in gold for mark in _MATH_MARKS) else rf"\boxed{{{gold}}}")
