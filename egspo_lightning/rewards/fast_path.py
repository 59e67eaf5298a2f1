r"""Fast path of the grader: verdicts on answers that need no algebra.

Most answers of a math benchmark are plain numbers or are spelled like the gold answer. The calling process decides
these. The verdict on all others is None, and math-verify decides.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from egspo_lightning.rewards.normalize import normalize, to_latex
from egspo_lightning.rewards.numbers import PERCENT, as_latex, compare_numbers, parse_number, value_in_base
from egspo_lightning.rewards.units import Quantity, split_letter, split_unit

Verdict = bool | None

_LETTER = re.compile(r"\(?([A-Ja-j])[).:]?")
_LETTERED = re.compile(r"(?:\(([A-J])\)|([A-J])[.:)])(?:\\ |[\s~:.])*(.+)", re.DOTALL)
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mbox)\s*\{([^{}\\$]*)\}")
_WORD = re.compile(r"[A-Za-z][A-Za-z'-]+(?: [A-Za-z'-]+)*")
_NAME = r"(?:[A-Za-z]|\\(?!frac|sqrt|text|le|ge|ne)[A-Za-z]+)\s*(?:_\s*(?:\w|\{\s*\\?\w+\s*\}))?"
_ASSIGNMENT = re.compile(rf"({_NAME}\s*(?:\(\s*{_NAME}\s*\))?)\s*=([^=<>,;]+)")
_SEPARATOR = re.compile(r"[,;]|\\text\{[\s,]*and\s*\}|(?<![A-Za-z\\])and(?![A-Za-z])")
_BRACKETS = (("(", ")"), ("(", "]"), ("[", ")"), ("[", "]"), (r"\{", r"\}"))
_ANGLE_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_DEGREES = re.compile(r"(\d+(?:\.\d+)?)\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))")
_PLUS_MINUS, _MINUS_PLUS = re.compile(r"\\pm(?![A-Za-z])"), re.compile(r"\\mp(?![A-Za-z])")
_BRACES = r"\{\}"
_SETS = {"", _BRACES}
_TUPLE_AND_LIST = {"()", ""}
_NO_PLAIN_LIST = re.compile(r"[()\[\]<>=;]|\\[{}]|\\(?:pm|mp|text|le|ge|in|ne|cup|cap)(?![A-Za-z])")
_THOUSANDS = re.compile(r"(?<!\d)\d{1,3},\d{3}(?!\d)|\{,\}")
_SPACED_NUMBERS = re.compile(r"-?[\d.]+(?:\s+[\d.]+)+")
_MAX_PARTS = 32
_MAX_LENGTH = 4096
"""Characters. math-verify grades longer answers, in a process with a deadline."""


def compare_fast(answer: str, gold: str) -> Verdict:
    r"""Return whether an answer equals the gold answer; None where that needs algebra.

    The table in ``rewards.grading`` states the grading rules.
    """
    if answer == gold and answer.strip():
        return True
    if max(len(answer), len(gold)) > _MAX_LENGTH:
        return None
    spellings = normalize(answer), normalize(gold)
    if not all(spellings):
        return None
    if spellings[0] == spellings[1]:
        return True
    if (choice := _compare_choices(answer, gold)) is not None:
        return choice
    left, right = _quantities(answer, gold)
    if left.unit is not None and right.unit is not None and left.unit != right.unit:
        return False
    return _compare_values(*map(normalize, _values(left.value, right.value)))


def for_algebra(answer: str, gold: str) -> tuple[str, str]:
    """Return LaTeX for math-verify, of a pair on which `compare_fast` has no verdict.

    Removes units, ``x =`` on one side or both, and a percent sign that only the answer has.
    """
    left, right = _values(*(quantity.value for quantity in _quantities(answer, gold)))
    if not PERCENT.search(right):
        left = PERCENT.sub("", left)
    left, right = _as_tuples(left, right)
    return _spell_out(left), _spell_out(right)


def _as_tuples(answer: str, gold: str) -> tuple[str, str]:
    """Put brackets around a list that is compared with a tuple, because its order counts."""
    lists = _split_list(normalize(answer)), _split_list(normalize(gold))
    if None in lists or {kind for kind, _ in filter(None, lists)} != _TUPLE_AND_LIST:
        return answer, gold
    left, right = (text if it and it[0] else f"({text})" for text, it in zip((answer, gold), lists, strict=True))
    return left, right


def _quantities(answer: str, gold: str) -> tuple[Quantity, Quantity]:
    left, right = (split_unit(to_latex(text)) for text in (answer, gold))
    if left.unit is None and _is_measured(right):
        left = split_letter(left.value)
    if right.unit is None and _is_measured(left):
        right = split_letter(right.value)
    return left, right


def _is_measured(quantity: Quantity) -> bool:
    return quantity.unit is not None or parse_number(normalize(quantity.value)) is not None


def _spell_out(text: str) -> str:
    """Rewrite what math-verify would misread: plain numbers, degrees in an angle's function, signs in a term."""
    if (number := parse_number(normalize(text))) is not None:
        return text if number.is_decimal or number.is_percent else as_latex(number)
    if _ANGLE_FUNCTION.search(text):
        text = _DEGREES.sub(r"{\\frac{\1 \\pi}{180}}", text)
    if len(_PLUS_MINUS.findall(text)) == 1 and "," not in text and r"\{" not in text:
        signs = (("+", "-"), ("-", "+"))
        text = ", ".join(_MINUS_PLUS.sub(minus, _PLUS_MINUS.sub(plus, text)).lstrip("+") for plus, minus in signs)
    return text


def _compare_values(answer: str, gold: str) -> Verdict:
    """Compare normalized texts without units."""
    if not answer or not gold:
        return None
    if answer == gold:
        return True
    comparisons = _compare_plain_numbers, _compare_equations, _compare_based, _compare_words, _compare_lists
    verdicts = (compare(answer, gold) for compare in comparisons)
    return next((verdict for verdict in verdicts if verdict is not None), None)


def _compare_plain_numbers(answer: str, gold: str) -> Verdict:
    left, right = parse_number(answer), parse_number(gold)
    if left is not None and right is not None:
        return compare_numbers(left, right)
    has_spaces = any(_SPACED_NUMBERS.fullmatch(text) for text in (answer, gold))  # math-verify would read 1 2 as 12
    return False if has_spaces and (left is not None or right is not None) else None


def _values(answer: str, gold: str) -> tuple[str, str]:
    """Return the assigned values, where one side is an assignment or both assign to the same name."""
    named = _named_values(answer), _named_values(gold)
    if (named[0] is None) != (named[1] is None):
        return named[0] or answer, named[1] or gold
    left, right = _ASSIGNMENT.fullmatch(answer), _ASSIGNMENT.fullmatch(gold)
    if left and right and normalize(left[1]) != normalize(right[1]):
        return answer, gold
    return left[2] if left else answer, right[2] if right else gold


def _named_values(text: str) -> str | None:
    """Return ``(4, 3)`` for ``y=3, x=4``, in the order of the names; None for all else, also for ``x_1=3, x_2=4``."""
    parts = [_ASSIGNMENT.fullmatch(part.strip(" $")) for part in _SEPARATOR.split(text)] if "=" in text else []
    values = {normalize(part[1]).partition("_")[0].lstrip("\\"): part[2].strip() for part in parts if part}
    if not 2 <= len(values) == len(parts):
        return None
    return f"({', '.join(values[name] for name in sorted(values))})"


def _compare_equations(answer: str, gold: str) -> Verdict:
    """Refuse ``5=6``, whatever the gold answer is."""
    sides = [parse_number(side) for side in answer.split("=")]
    exact = [side.value for side in sides if side is not None and not side.is_decimal and not side.is_percent]
    return False if len(exact) == len(sides) and len(set(exact)) > 1 else None


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
    texts = _TEXT.fullmatch(answer), _TEXT.fullmatch(gold)
    if texts == (None, None):
        return None
    left, right = (match[1].strip(" .") if match else text for match, text in zip(texts, (answer, gold), strict=True))
    if left and left.casefold() == right.casefold():
        return True
    return False if _WORD.fullmatch(left) and _WORD.fullmatch(right) else None


def _compare_choices(answer: str, gold: str) -> Verdict:
    """Compare letters of a multiple choice, alone or before the text of the choice."""
    answer, gold = (_TEXT.sub(r"\1", to_latex(text)).strip() for text in (answer, gold))
    left, right = _LETTER.fullmatch(answer), _LETTER.fullmatch(gold)
    if left and right:
        return left[1].casefold() == right[1].casefold()
    left, right = _LETTERED.fullmatch(answer), _LETTERED.fullmatch(gold)
    choice, other = (left, gold) if left else (right, answer)
    if choice is None or (left and right):
        return None
    if letter := _LETTER.fullmatch(other):
        return letter[1] == (choice[1] or choice[2])
    return compare_fast(choice[3], gold) if left else compare_fast(answer, choice[3])


def _compare_lists(answer: str, gold: str) -> Verdict:
    left, right = _split_list(answer), _split_list(gold)
    if left is None or right is None:
        return None
    (left_kind, answers), (right_kind, golds) = left, right
    if {left_kind, right_kind} <= _SETS:
        return _in_any_order(answers, golds)
    if left_kind == right_kind or {left_kind, right_kind} == _TUPLE_AND_LIST:  # 1, 2 may be meant as (1, 2)
        return _in_order(answers, golds)
    if not left_kind or not right_kind:
        return None
    are_intervals = len(answers) == len(golds) == 2
    return False if are_intervals or {left_kind, right_kind} == {"()", _BRACES} else None


def _in_order(answers: Sequence[str], golds: Sequence[str]) -> Verdict:
    if len(answers) != len(golds):
        return False
    verdicts = [_compare_values(answer, gold) for answer, gold in zip(answers, golds, strict=True)]
    return False if False in verdicts else None if None in verdicts else True


def _in_any_order(answers: Sequence[str], golds: Sequence[str]) -> Verdict:
    """Compare as sets: repeated elements count once."""
    rows = [[_compare_values(answer, gold) for gold in golds] for answer in answers]
    lines = [*rows, *(list(column) for column in zip(*rows, strict=True))]
    if any(set(line) == {False} for line in lines):
        return False
    return True if all(True in line for line in lines) else None


def _split_list(text: str) -> tuple[str, list[str]] | None:
    """Return a list's brackets and parts; None where there is one part, or nesting, or perhaps grouped digits."""
    opening, closing = next(((a, b) for a, b in _BRACKETS if text.startswith(a) and text.endswith(b)), ("", ""))
    inner = text[len(opening) : len(text) - len(closing)]
    if _NO_PLAIN_LIST.search(inner) or _THOUSANDS.search(inner):
        return None
    parts = _split_outside_braces(inner)
    return (opening + closing, parts) if 2 <= len(parts) <= _MAX_PARTS and all(parts) else None


def _split_outside_braces(text: str) -> list[str]:
    parts, depth = [""], 0
    for character in text:
        depth += (character == "{") - (character == "}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]
