r"""Comparison by algebra: sympy and math-verify. Only worker processes import this module: it loads sympy.

Never print a sympy object here: ``str`` of a parsed answer can run forever. An exception in a parse or a comparison
means that there is nothing to compare. MemoryError is the exception: it gives no verdict.
"""

from __future__ import annotations

import re
from functools import lru_cache, partial
from typing import Any

from latex2sympy2_extended.logic import And
from math_verify import verify
from sympy import Abs, Eq, Expr, Intersection, Set, Symbol, Union, fraction, simplify, together
from sympy.core.relational import Relational

from egspo_lightning.rewards._difference import are_different, are_same_decimals, attempt
from egspo_lightning.rewards._latex import parse
from egspo_lightning.rewards._lenient import find_answer
from egspo_lightning.rewards.fast_path import compare
from egspo_lightning.rewards.normalize import normalize

_CACHED = 4096
_BUILDER = re.compile(r"\\\{\s*([a-zA-Z])(?:\\in\s*\\mathbb\{R\})?\s*[:|](.*)\\\}")
_MEMBER = re.compile(r"([a-zA-Z]|[a-zA-Z]\([a-zA-Z]\))\\in(?![A-Za-z])")
_OR, _AND = re.compile(r"(?<![A-Za-z\\])or(?![A-Za-z])"), re.compile(r",(?=[^\[\](){}]*(?:[<>]|\\[lgn]e(?![a-z])))")
_RELATION = re.compile(r"[<>]|\\[lgn]e(?![a-z])")
_CALL = re.compile(r"(?<![A-Za-z\\])([a-zA-Z])\([a-z]\)")  # f(x)
_MATH = re.compile(r"(?<!\\)\$|\\boxed|\\[(\[]")
_WARM_UP = (
    r"\frac{\sqrt{3}}{2}",
    r"(1, 2] \cup (3, \infty)",
    "x=2y+1",
    "3.5",
    r"\begin{pmatrix}1\\2\end{pmatrix}",
    r"\log_2 5 + \sin x",
    r"1 \pm 2x^3",
)


def grade(answer: str, gold: str, extraction: str) -> tuple[bool, str | None]:
    """Grade one answer. Returns whether it is correct, and its text, or None where there is no answer.

    With extraction "boxed" the answer is bare; with "lenient" it is looked for in free text.

    Raises:
        MemoryError: this process has reached its memory limit; there is no verdict.
    """
    found: str | None = answer
    if extraction == "lenient":
        found = find_answer(answer, _is_readable)
        gold = (_MATH.search(gold) and find_answer(gold, _is_readable)) or gold
    return found is not None and bool(compare(found, gold, decide)), found


def warm_up() -> None:
    """Compile the patterns and fill the tables of the parser and of sympy. Forked workers share them."""
    for answer in _WARM_UP:
        grade(f"{answer}+0", answer, "boxed")
        grade(f"The answer is ${answer}$.", answer, "lenient")
    for answer, gold in (("2+x", "x+1"), ("x^2+2x+1", "(x+1)^2"), ("3<x<4", "(3,4)"), (r"\ln a+\ln b", r"\ln(ab)")):
        grade(answer, gold, "boxed")
    grade(r"\sqrt{12}", r"2\sqrt{3}", "boxed")


def decide(answer: str, gold: str) -> bool:
    """Compare two normalized texts without units, names and brackets of lists."""
    parsed = _parse(answer), _parse(gold)
    return parsed[0] is not None and parsed[1] is not None and _equal(parsed[1], parsed[0])


def _is_readable(text: str) -> bool:
    return _parse(normalize(text)) is not None


@lru_cache(maxsize=_CACHED)
def _parse(text: str) -> Any:
    return attempt(lambda: _region(text), None)


def _region(text: str) -> Any:
    """Parse a value, or what stands for a set of numbers: set builders, inequalities with "and" and "or", unions."""
    if (builder := _BUILDER.fullmatch(text)) is not None:
        return _region(builder[2])
    text = _MEMBER.sub("", text)
    if _RELATION.search(text):
        text = _CALL.sub(r"\1", text)
    for separator, combine in ((_OR, Union), (_AND, Intersection)):
        if len(parts := separator.split(text)) > 1:
            regions = [_as_set(_region(part.strip())) for part in parts]
            return combine(*regions) if all(isinstance(region, Set) for region in regions) else None
    return parse(f"x{text}" if _RELATION.match(text) else text)


def _as_set(value: Any) -> Any:
    if isinstance(value, And):
        return Intersection(*(_as_set(part) for part in value._unsorted_args))
    return value.as_set() if isinstance(value, Relational) and len(value.free_symbols) == 1 else value


def _equal(gold: Any, answer: Any) -> bool:
    if are_same_decimals(gold, answer) or attempt(lambda: bool(gold == answer), False):
        return True
    if isinstance(gold, (Relational, And)) and isinstance(answer, (Relational, And)):
        return attempt(lambda: _are_same_relations(gold, answer), False)
    sets = [attempt(partial(_as_set, value), None) for value in (gold, answer)]
    if all(isinstance(value, Set) for value in sets):
        return bool(attempt(lambda: _are_same_sets(*sets), False))
    if isinstance(gold, (Relational, And)) or isinstance(answer, (Relational, And)):
        return False
    if attempt(lambda: are_different(gold, answer), False):
        return False
    if isinstance(gold, Expr) and isinstance(answer, Expr):
        return attempt(lambda: _are_same_values(gold, answer), False)
    return attempt(lambda: verify(gold, answer, timeout_seconds=None, raise_on_error=True), False)


def _are_same_relations(gold: Any, answer: Any) -> bool:
    if isinstance(gold, Eq) and isinstance(answer, Eq):
        left, right = (fraction(together(it.lhs - it.rhs))[0] for it in (gold, answer))
        ratio = simplify(left / right)
        return bool(ratio.is_number and ratio.is_finite and ratio != 0)
    if gold.free_symbols != answer.free_symbols:
        return False
    sets = _as_set(gold), _as_set(answer)
    if all(isinstance(value, Set) for value in sets):
        return _are_same_sets(*sets)
    return bool(verify(gold, answer, timeout_seconds=None, raise_on_error=True))


def _are_same_sets(gold: Set, answer: Set) -> bool:
    return bool(gold == answer or gold.symmetric_difference(answer).is_empty)


def _are_same_values(gold: Expr, answer: Expr) -> bool:
    if isinstance(gold, Symbol) or isinstance(answer, Symbol):  # math-verify ignores the case of their names
        return bool(gold == answer or simplify(gold - answer) == 0)
    if verify(gold, answer, timeout_seconds=None, raise_on_error=True):
        return True
    if gold.has(Abs) or answer.has(Abs):
        return False
    positive = {symbol: Symbol(symbol.name, positive=True) for symbol in gold.free_symbols | answer.free_symbols}
    return bool(positive) and simplify(gold.xreplace(positive) - answer.xreplace(positive)) == 0
