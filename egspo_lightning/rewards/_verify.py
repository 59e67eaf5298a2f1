"""math-verify as the workers call it. Imported in their processes alone: it loads sympy.

No sympy object is ever printed here: ``str`` of a parsed answer can take for ever.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

_MATH_MARKS = ("$", r"\boxed", r"\(", r"\[")
_EXTRACTION = (LatexExtractionConfig(), ExprExtractionConfig())


def grade(answer: str, gold: str, extraction: str) -> dict[str, Any]:
    """The verdict on one answer: ``correct``, and ``extracted``, its text or None where there is no answer.

    With extraction "boxed" the answer is bare; with "lenient" it is looked for in free text.
    """
    parsed = _parse_text(answer) if extraction == "lenient" else _parse_bare(answer)
    correct = verify(
        _parse_gold(gold, extraction),
        parsed,
        allow_set_relation_comp=extraction == "boxed",  # 3 < x <= 4 answers (3, 4]
        timeout_seconds=None,
    )
    return {"correct": bool(correct), "extracted": _extracted(parsed)}


def warm_up() -> None:
    """Compile the patterns and build the parser's tables, which forked processes then share."""
    for answer in (
        r"\frac{\sqrt{3}}{2}",
        r"(1, 2]",
        r"\{1, 2\}",
        "x=2y+1",
        r"\begin{pmatrix}1\\2\end{pmatrix}",
        "3.5",
    ):
        grade(answer, answer, "boxed")
        grade(f"The answer is ${answer}$.", answer, "lenient")
    grade("2+x", "x+1", "boxed")


def _parse_text(text: str) -> list[Any]:
    return parse(text, _EXTRACTION, parsing_timeout=None)


def _parse_bare(answer: str) -> list[Any]:
    return _parse_text(rf"\boxed{{{answer}}}")


@lru_cache(maxsize=1024)
def _parse_gold(gold: str, extraction: str) -> list[Any]:
    if extraction == "lenient" and any(mark in gold for mark in _MATH_MARKS):
        return _parse_text(gold)
    return _parse_bare(gold)


def _extracted(parsed: list[Any]) -> str | None:
    return next((part for part in parsed if isinstance(part, str)), None)
