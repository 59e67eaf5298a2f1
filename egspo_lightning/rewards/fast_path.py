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
from string import ascii_letters

from egspo_lightning.rewards.normalize import normalize
from egspo_lightning.rewards.numbers import LAST_PERCENT, compare_numbers, multiplied, parse_number, value_in_base
from egspo_lightning.rewards.units import split_letter, split_unit

Verdict = bool | None
Decide = Callable[[str, str], Verdict]
"""Compares an answer and a gold answer without units and names, that are no lists."""

_LETTER = re.compile(r"\(?([A-Ja-j])[).:]?")
_LETTERED = re.compile(r"(?:\(([A-J])\)|([A-J])[.:)]|\\text\{\(?([A-J])[).]+\})[\s:.]*(.+)", re.DOTALL)
_WORDS = re.compile(r"[A-Za-z][A-Za-z'-]*(?: [A-Za-z'-]+)*")
_COLONS = re.compile(r"\d+(?::\d+)+")
_TIME = re.compile(r"(\d{1,2}):([0-5]\d)(?![\d:])\s*(?:\\text\{)?([ap]\.?m)?\.?\}?", re.IGNORECASE)
_DATE = re.compile(r"\d{4}-\d{1,2}-\d{1,2}|\d{1,2}([/.-])\d{1,2}\1(?:\d{4}|\d{2})")
_SUBSCRIPT = r"_(?:\w|\{[^{}]*\})"
_NAME = rf"(?:[A-Za-z]+|\\(?!frac|sqrt|text|le|ge|ne)[A-Za-z]+)(?:{_SUBSCRIPT}|'|\^\{{-1\}}(?=\())*"
_LEFT = re.compile(rf"{_NAME}(?:\((?:{_NAME}|\d+)(?:,(?:{_NAME}|\d+))*\))?|\((?:{_NAME},)+{_NAME}\)")
_NO_NAME = re.compile(rf"{_SUBSCRIPT}|\([^()]*\)")
_VARIABLE = re.compile(r"(?<=[A-Za-z])\([a-z]\)$")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_OR = re.compile(r"\s*(?<![A-Za-z\\])or(?![A-Za-z])\s*")
_QUALIFIER = re.compile(
    r"[\s,(]*(?:\\text\{[^{}]*\}\s*)?(?:[a-z]\\in\s*\\(?:mathbb|text)\{[ZNQRC]\}(?:[_^]?\{?[+*]\}?)?"
    r"|[a-z]\s*\\text\{is an? (?:integer|natural number)\}"
    r"|[a-z]=(?:0|1),(?:\\pm)?[12],(?:(?:\\pm)?[23],)?\\ldots)\)?$"
)
_REGION = re.compile(r"[<>]|\\(?:le|ge|ne|in|notin|cup|cap|setminus|mathbb|emptyset)(?![A-Za-z])|[(\[].*\\infty.*[\])]")
_BRACKETS = (("(", ")"), ("(", "]"), ("[", ")"), ("[", "]"), (r"\{", r"\}"))
_SET = r"\{\}"
_THOUSANDS = re.compile(r"(?<![\d.])\d{1,3}(?:,\d{3})+(?!\d)|(?<![\d.])\d{1,2}(?:,\d{2})+,\d{3}(?!\d)")
_SIGN = re.compile(r"\\(pm|mp)(?![A-Za-z])")
_SPACED_NUMBERS = re.compile(r"-?[\d.]+(?:\s+[\d.]+)+")
_CHOOSE = re.compile(r"(?:\\text\{)?([CPA])\}?(?:_\{?(\d{1,3})\}?\^\{?(\d{1,3})\}?|\^\{?(\d{1,3})\}?_\{?(\d{1,3})\}?)")
_CALLED = re.compile(r"C\((\d{1,3}),(\d{1,3})\)")
_MAX_PARTS = 32
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
    for by_kind in (_compare_clock, _compare_based, _compare_words):
        if (verdict := by_kind(answer, gold)) is not None:
            return verdict
    if (choices := _choices(answer, gold)) is not None:
        return choices if isinstance(choices, bool) else _compare(*choices, decide)
    answer, gold = _QUALIFIER.sub("", answer), _QUALIFIER.sub("", gold)
    if answer == gold:
        return True
    if _REGION.search(answer) or _REGION.search(gold):
        return decide(answer, gold)
    answer, gold = _as_tuple(answer, gold), _as_tuple(gold, answer)
    if _is_equation(answer, gold) or _is_equation(gold, answer):
        return _compare_equations(answer, gold, decide)
    if parse_number(answer) and parse_number(gold):  # 1,000,001 is no list where 1,000,000 is the gold answer
        return _compare_single(answer, gold, decide)
    return _any(_compare_readings(*pair, decide) for pair in product(_readings(answer), _readings(gold)))


# Kinds of text that are compared as they are


def _compare_clock(answer: str, gold: str) -> Verdict:
    """Compare times and dates: neither is a ratio, a quotient or a difference."""
    for pattern in (_DATE, _TIME):
        left, right = pattern.fullmatch(answer), pattern.fullmatch(gold)
        if left and right:
            times = ([part and part.replace(".", "").casefold() for part in match.groups()] for match in (left, right))
            return pattern is _TIME and all(None in pair or len(set(pair)) == 1 for pair in zip(*times, strict=True))
        if (left and (_COLONS.fullmatch(gold) or parse_number(gold))) or (right and parse_number(answer)):
            return False
    return None


def _compare_based(answer: str, gold: str) -> Verdict:
    left, right = value_in_base(answer), value_in_base(gold)
    if left is not None and right is not None:
        return left == right
    if left is None and right is None:
        return None
    # A number without its base answers only one with the same digits.
    plain, based = (answer, gold) if left is None else (gold, answer)
    return plain == based.partition("_")[0] if parse_number(plain) is not None else None


def _compare_words(answer: str, gold: str) -> Verdict:
    words, plain = [_is_text(text) for text in (answer, gold)], [_without_font(text) for text in (answer, gold)]
    if all(words) or (any(words) and all(run.isalpha() and run.islower() for run in plain)):  # cat is not act
        return plain[0].casefold() == plain[1].casefold()
    return False if any(words) and (parse_number(answer) or parse_number(gold)) else None


def _without_font(text: str) -> str:
    return " ".join(re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).split()).strip(" .")


def _is_text(text: str) -> bool:
    """Return whether a text is words or a sequence of letters, whose order counts; no product such as ``xy``."""
    text = _without_font(text)
    return _WORDS.fullmatch(text) is not None and any(_is_word(it) for it in text.split() if it not in ("and", "or"))


def _is_word(run: str) -> bool:
    if run.isupper():  # points, or outcomes
        return len(run) >= 2
    if run not in (run.lower(), run.capitalize()):  # nRT
        return False
    if len(run) == 3 and run[1] in "aeiou":  # cat, sum; abc and cba are products
        return True
    return len(run) >= 2 and any(vowel in run.lower() for vowel in ("aeiouy" if len(run) >= 4 else "eio"))


def _choices(answer: str, gold: str) -> bool | tuple[str, str] | None:
    """Compare letters of a multiple choice, or return what is left to compare after the letter of one of the texts.

    Returns None where there is no choice. ``a`` answers ``A``; ``A`` does not answer ``a``, a variable.
    """
    left, right = _LETTER.fullmatch(answer), _LETTER.fullmatch(gold)
    if left and right:
        are_variables = answer == left[1] and gold == right[1].lower()
        return left[1] == right[1] if are_variables else left[1].casefold() == right[1].casefold()
    left, right = _LETTERED.fullmatch(answer), _LETTERED.fullmatch(gold)
    choice, other = (left, gold) if left else (right, answer)
    if choice is None or (left and right):
        return None
    if letter := _LETTER.fullmatch(other):
        return letter[1] == (choice[1] or choice[2] or choice[3])
    return (choice[4], gold) if left else (answer, choice[4])


# Lists

Reading = tuple[str, list[str]] | str
"""A list with its brackets and elements, or a single value."""


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


def _readings(text: str) -> list[Reading]:
    """Return how a text may be read: 70,110 is a number and a list."""
    text, is_single = _OR.sub(",", text), False
    readings: list[Reading] = []
    for opening, closing in (("", ""), *_BRACKETS):
        inner = text[len(opening) : len(text) - len(closing)]
        if not (text.startswith(opening) and text.endswith(closing) and _is_balanced(inner)):
            continue
        splits = _split(inner), [part.replace("\0", ",") for part in _split(_THOUSANDS.sub(_glued, inner))]
        is_single |= not opening and (len(splits[1]) == 1 < len(splits[0]) or parse_number(text) is not None)
        for parts in splits:
            parts = parts if opening in ("(", "[") else [signed for part in parts for signed in _signed(part)]
            is_list = 1 < len(parts) <= _MAX_PARTS or (opening == r"\{" and len(parts) == 1)
            if is_list and all(parts) and (opening + closing, parts) not in readings:
                readings.append((opening + closing, parts))
        if readings:
            break
    return [text, *readings] if is_single or not readings else readings


def _glued(match: re.Match[str]) -> str:
    return match[0].replace(",", "\0")


def _split(text: str, separator: str = ",") -> list[str]:
    """Split at separators outside of brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _is_balanced(text: str) -> bool:
    depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return False
    return depth == 0


def _signed(text: str) -> list[str]:
    r"""Return both values of ``\pm``; of several, all combinations, unless ``\mp`` ties them."""
    signs = _SIGN.findall(text)
    if not 1 <= len(signs) <= 3 or text.startswith(r"\{"):
        return [text]
    choices: Iterable[Iterable[str]] = product("+-", repeat=len(signs))
    if "mp" in signs:
        choices = ["".join(sign if it == "pm" else other for it in signs) for sign, other in ("+-", "-+")]
    return [_with_signs(text, choice) for choice in choices]


def _with_signs(text: str, signs: Iterable[str]) -> str:
    remaining = iter(signs)
    return _SIGN.sub(lambda _: next(remaining), text).lstrip("+")


# Names


def _as_tuple(text: str, other: str) -> str:
    """Return ``(4,3)`` for ``y=3,x=4``, in the order of the alphabet, unless the other text names its values, too.

    ``x=y=1`` is ``(1,1)`` for a list. Returns the text for all else, also for ``x_1=3,x_2=4``.
    """
    if "=" not in text or "=" in other:
        return text
    if len(chain := text.split("=")) > 2 and "," not in text and "," in other:
        return f"({','.join([chain[-1]] * len(chain[:-1]))})" if all(map(_LEFT.fullmatch, chain[:-1])) else text
    parts = [_split(part, "=") for part in _split(_OR.sub(",", text))]
    if not all(len(part) == 2 and _LEFT.fullmatch(part[0]) for part in parts):
        return text
    values = {part[0].partition("_")[0].lstrip("\\"): part[1] for part in parts}
    names = sorted(values) if "".join(sorted(values)) in ascii_letters else list(values)
    return f"({','.join(values[name] for name in names)})" if 2 <= len(values) == len(parts) else text


def _is_equation(text: str, other: str) -> bool:
    if len(_split(text, "=")) == 1 and r"\approx" not in text:
        return False
    return len(_split(_OR.sub(",", text))) == 1 and ("=" not in other or not _SIGN.search(text))


def _compare_equations(answer: str, gold: str, decide: Decide) -> Verdict:
    left, right = _sides(answer), _sides(gold)
    constants = [side for side in left if _is_constant(side)]
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
        return any(map(_is_name, right[:-1])) and _compare(answer, right[-1], decide)
    if left[-1] == "0" and not _is_name(left[0]):
        return False
    return _all([chain, _compare(left[-1], gold, decide)])


def _sides(text: str) -> list[str]:
    """Return the sides of an equation, its name first; an approximation after the value is dropped."""
    exact, _, approximate = text.partition(r"\approx")
    text = f"{exact}={approximate}" if approximate and _LEFT.fullmatch(exact) else exact
    sides = [side for side in _split(text, "=") if side] or [text]
    return sides[::-1] if _LEFT.fullmatch(sides[-1]) and not _LEFT.fullmatch(sides[0]) else sides


def _is_name(side: str) -> bool:
    if _LEFT.fullmatch(side):
        return True
    rest = _NO_NAME.sub("", side)
    return bool(re.search("[A-Za-z]", rest)) and not re.search(r"[\d+-]", rest)


def _is_constant(side: str) -> bool:
    return any(character.isdigit() for character in side) and not re.search("[A-Za-z_]", _COMMAND.sub("", side))


# Single values


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
        return _compare_ratios(_split(answer, ":"), _split(gold, ":"), decide)
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
