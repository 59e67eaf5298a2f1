r"""Comparison of an answer with a gold answer by their text, down to values that need algebra.

Most answers of a math benchmark are plain numbers or are spelled like the gold answer. The calling process decides
these (`compare_fast`). The verdict on all others is None there; a worker process calls `compare` with algebra.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from itertools import product
from math import comb, perm

from egspo_lightning.rewards.answer_equations import as_tuple, is_constant, is_equation, is_name, sides
from egspo_lightning.rewards.answer_kinds import Verdict, compare_based, compare_choices, compare_clock, compare_words
from egspo_lightning.rewards.answer_lists import Reading, readings, split
from egspo_lightning.rewards.normalize import normalize
from egspo_lightning.rewards.numbers import LAST_PERCENT, compare_numbers, multiplied, parse_number
from egspo_lightning.rewards.units import split_letter, split_unit

Decide = Callable[[str, str], Verdict]
"""Compares an answer and a gold answer without units and names, that are no lists."""

_VARIABLE = re.compile(r"(?<=[A-Za-z])\([a-z]\)$")
_QUALIFIER = re.compile(
    r"[\s,(]*(?:\\text\{[^{}]*\}\s*)?(?:[a-z]\\in\s*\\(?:mathbb|text)\{[ZNQRC]\}(?:[_^]?\{?[+*]\}?)?"
    r"|[a-z]\s*\\text\{is an? (?:integer|natural number)\}|\\text\{(?:for|where) (?:all |any |an? )?integers?\}[a-z]"
    r"|[a-z]=(?:0|1),(?:\\pm)?[12],(?:(?:\\pm)?[23],)?\\ldots)\)?$"
)
_REGION = re.compile(r"[<>]|\\(?:le|ge|ne|in|notin|cup|cap|setminus|mathbb|emptyset)(?![A-Za-z])|[(\[].*\\infty.*[\])]")
_SPACED_NUMBERS = re.compile(r"-?[\d.]+(?:\s+[\d.]+)+")
_COMMA = re.compile(r"-?\d+,(?!\d{3}$)\d+")
_SET = r"\{\}"
_CHOOSE = re.compile(r"(?:\\text\{)?([CPA])\}?(?:_\{?(\d{1,3})\}?\^\{?(\d{1,3})\}?|\^\{?(\d{1,3})\}?_\{?(\d{1,3})\}?)")
_CALLED = re.compile(r"C\((\d{1,3}),(\d{1,3})\)")
_MAX_LENGTH = 4096
"""Characters. A worker grades longer answers, with a deadline."""


def compare_fast(answer: str, gold: str) -> Verdict:
    r"""Return whether an answer equals the gold answer; None where that needs algebra.

    The table in ``rewards.grading`` states the grading rules.
    """
    if answer == gold and answer.strip():
        return True
    if max(len(answer), len(gold)) > _MAX_LENGTH:
        return None
    try:
        return compare(answer, gold, lambda *_: None)
    except RecursionError:  # brackets in brackets
        return None


def compare(answer: str, gold: str, decide: Decide) -> Verdict:
    """Return whether an answer equals the gold answer; ``decide`` compares what needs algebra."""
    return _compare(normalize(answer), normalize(gold), decide)


def _compare(answer: str, gold: str, decide: Decide) -> Verdict:
    """Compare normalized texts, or elements of lists."""
    if not answer or not gold:
        return False
    if answer == gold:
        return True
    for by_kind in (compare_clock, compare_based, compare_words):
        if (verdict := by_kind(answer, gold)) is not None:
            return verdict
    if (choices := compare_choices(answer, gold)) is not None:
        return choices if isinstance(choices, bool) else _compare(*choices, decide)
    answer, gold = _QUALIFIER.sub("", answer), _QUALIFIER.sub("", gold)
    if answer == gold:
        return True
    if _REGION.search(answer) or _REGION.search(gold):
        return decide(answer, gold)
    answer, gold = as_tuple(answer, gold), as_tuple(gold, answer)
    if is_equation(answer, gold) or is_equation(gold, answer):
        return _compare_equations(answer, gold, decide)
    if _COMMA.fullmatch(answer) and answer.replace(",", ".") == gold:  # 3,14
        return True
    if parse_number(answer) and parse_number(gold):  # 1,000,001 is no list where 1,000,000 is the gold answer
        return _compare_single(answer, gold, decide)
    return _any(_compare_readings(*pair, decide) for pair in product(readings(answer), readings(gold)))


def _compare_readings(answer: Reading, gold: Reading, decide: Decide) -> Verdict:
    if isinstance(answer, str) and isinstance(gold, str):
        return _compare_single(answer, gold, decide)
    (left, answers), (right, golds) = (it if isinstance(it, tuple) else ("single", [it]) for it in (answer, gold))
    if {left, right} <= {"single", "", _SET}:  # 5, 5 is 5
        rows = [[_compare(answer, gold, decide) for gold in golds] for answer in answers]
        return _all(_any(line) for line in [*rows, *zip(*rows, strict=True)])
    if (left == right or {left, right} == {"", "()"}) and len(answers) == len(golds):  # 1, 2 may be meant as (1, 2)
        return _all(_compare(*pair, decide) for pair in zip(answers, golds, strict=True))
    return False


def _compare_equations(answer: str, gold: str, decide: Decide) -> Verdict:
    left, right = sides(answer), sides(gold)
    constants = [side for side in left if is_constant(side)]
    chain = _all(_compare_single(side, constants[-1], decide) for side in constants[:-1])
    if chain is False:  # 2 + 3 = 6, whatever the gold answer is
        return False
    if len(left) > 1 and len(right) > 1:
        if _VARIABLE.sub("", left[0]) == _VARIABLE.sub("", right[0]):  # f(n) = 1 is f(x) = 1
            if left[-1].isalpha() and right[-1].isalpha():  # a product, no word
                return decide(left[-1], right[-1])
            return _all([chain, _compare(left[-1], right[-1], decide)])
        return decide(f"{left[0]}={left[-1]}", f"{right[0]}={right[-1]}")
    if len(right) > 1:
        return any(map(is_name, right[:-1])) and _compare(answer, right[-1], decide)
    if left[-1] == "0" and not is_name(left[0]):
        return False
    return _all([chain, _compare(left[-1], gold, decide)])


def _compare_single(answer: str, gold: str, decide: Decide) -> Verdict:
    left, right = split_unit(answer), split_unit(gold)
    if left.unit is None and (right.unit is not None or parse_number(right.value) is not None):
        left = split_letter(left.value)
    if right.unit is None and (left.unit is not None or parse_number(left.value) is not None):
        right = split_letter(right.value)
    if left.unit is not None and right.unit is not None and left.unit != right.unit:
        return False
    if (left.value, right.value) != (answer, gold):
        return _compare(left.value, right.value, decide)
    if LAST_PERCENT.search(answer) or LAST_PERCENT.search(gold):
        return _compare_percentages(answer, gold, decide)
    if ":" in answer or ":" in gold:
        return _compare_ratios(split(answer, ":"), split(gold, ":"), decide)
    return _compare_values(answer, gold, decide)


def _compare_percentages(answer: str, gold: str, decide: Decide) -> Verdict:
    """Compare without percent signs. The gold answer's sign alone means its number and a hundredth of it.

    A sign in the answer alone is ignored: with two readings, an answer could only gain from a sign.
    """
    value = LAST_PERCENT.sub("", gold)
    golds = [value]
    if value != gold and not LAST_PERCENT.search(answer):
        golds.append(multiplied(value, Fraction(1, 100)))
    return _any(_compare(LAST_PERCENT.sub("", answer), it, decide) for it in golds)


def _compare_ratios(answers: Sequence[str], golds: Sequence[str], decide: Decide) -> Verdict:
    """Compare ratios of as many terms; a ratio of two terms is their quotient, too."""
    if max(len(answers), len(golds)) > 2 and len(answers) != len(golds):
        return False
    left, right = (
        [rf"\frac{{{term}}}{{{terms[-1]}}}" for term in terms[:-1]] or list(terms) for terms in (answers, golds)
    )
    return _all(_compare_values(*pair, decide) for pair in zip(left, right, strict=True))


def _compare_values(answer: str, gold: str, decide: Decide) -> Verdict:
    left, right = parse_number(answer), parse_number(gold)
    if left is not None and right is not None:
        verdict = compare_numbers(left, right)
        return decide(answer, gold) if verdict is None else verdict
    if left is None and right is None:
        return decide(answer, gold)
    if any(_SPACED_NUMBERS.fullmatch(text) for text in (answer, gold)):
        return False  # 1 2 is not 12
    return decide(_count(answer), _count(gold))


def _count(text: str) -> str:
    r"""Replace ``C(5,2)``, ``C_5^2`` and permutations such as ``A_5^2`` by their numbers."""

    def number(match: re.Match[str]) -> str:
        kind, *numbers = match.groups() if match.re is _CHOOSE else ("C", *match.groups())
        k, n = sorted(int(it) for it in numbers if it)
        return str(comb(n, k) if kind == "C" else perm(n, k))

    return _CALLED.sub(number, _CHOOSE.sub(number, text))


def _any(verdicts: Iterable[Verdict]) -> Verdict:
    """True if one is True, else None if one is undecided."""
    found: Verdict = False
    for verdict in verdicts:
        if verdict:
            return True
        found = None if verdict is None else found
    return found


def _all(verdicts: Iterable[Verdict]) -> Verdict:
    """False if one is False, else None if one is undecided."""
    found: Verdict = True
    for verdict in verdicts:
        if verdict is False:
            return False
        found = None if verdict is None else found
    return found
