r"""Answers that are compared as text: times, dates, numbers with a base, words, and letters of a multiple choice."""

from __future__ import annotations

import re

from egspo_lightning.rewards.numbers import parse_number, value_in_base

Verdict = bool | None
"""None where the comparison needs algebra."""

_LETTER = re.compile(r"\(?([A-Ja-j])[).:]?")
_LETTERED = re.compile(r"(?:\(([A-J])\)|([A-J])[.:)]|\\text\{\(?([A-J])[).]+\})[\s:.]*(.+)", re.DOTALL)
_WORDS = re.compile(r"[A-Za-z][A-Za-z'-]*(?: [A-Za-z'-]+)*")
_COLONS = re.compile(r"\d+(?::\d+)+")
_TIME = re.compile(r"(\d{1,2}):([0-5]\d)(?![\d:])\s*(?:\\text\{)?([ap]\.?m)?\.?\}?", re.IGNORECASE)
_DATE = re.compile(r"\d{4}-\d{1,2}-\d{1,2}|\d{1,2}([/.-])\d{1,2}\1(?:\d{4}|\d{2})")


def compare_clock(answer: str, gold: str) -> Verdict:
    """Compare times and dates: neither is a ratio, a quotient or a difference."""
    for pattern in (_DATE, _TIME):
        left, right = pattern.fullmatch(answer), pattern.fullmatch(gold)
        if left and right:
            times = ([part and part.replace(".", "").casefold() for part in match.groups()] for match in (left, right))
            return pattern is _TIME and all(None in pair or len(set(pair)) == 1 for pair in zip(*times, strict=True))
        if (left and (_COLONS.fullmatch(gold) or parse_number(gold))) or (right and parse_number(answer)):
            return False
    return None


def compare_based(answer: str, gold: str) -> Verdict:
    """Compare numbers of which at least one names its base."""
    left, right = value_in_base(answer), value_in_base(gold)
    if left is not None and right is not None:
        return left == right
    if left is None and right is None:
        return None
    # A number without its base answers only one with the same digits.
    plain, based = (answer, gold) if left is None else (gold, answer)
    return plain == based.partition("_")[0] if parse_number(plain) is not None else None


def compare_words(answer: str, gold: str) -> Verdict:
    """Compare words and sequences of letters, whose order counts."""
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


def compare_choices(answer: str, gold: str) -> bool | tuple[str, str] | None:
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
