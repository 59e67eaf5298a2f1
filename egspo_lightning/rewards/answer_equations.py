r"""Sides of equations in answers, and the values of variables that an answer names."""

from __future__ import annotations

import re
from string import ascii_letters

from egspo_lightning.rewards.answer_lists import OR, SIGN, split

_SUBSCRIPT = r"_(?:\w|\{[^{}]*\})"
_NAME = rf"(?:[A-Za-z]+|\\(?!frac|sqrt|text|le|ge|ne)[A-Za-z]+)(?:{_SUBSCRIPT}|'|\^\{{-1\}}(?=\())*"
_LEFT = re.compile(rf"{_NAME}(?:\((?:{_NAME}|\d+)(?:,(?:{_NAME}|\d+))*\))?|\((?:{_NAME},)+{_NAME}\)")
_NO_NAME = re.compile(rf"{_SUBSCRIPT}|\([^()]*\)")
_POINT = re.compile(r"(?:[ABD-Z]|\\text\{[A-Z]\})(\([^()]*,[^()]*\))")
_COMMAND = re.compile(r"\\[A-Za-z]+")


def as_tuple(text: str, other: str) -> str:
    """Return ``(4,3)`` for ``y=3,x=4``, in the order of the alphabet, unless the other text names its values, too.

    ``P(1,2)`` is ``(1,2)`` for a tuple, ``x=y=1`` is ``(1,1)`` for a list. Returns the text for all else, also for
    ``x_1=3,x_2=4``.
    """
    if (point := _POINT.fullmatch(text)) and other.startswith("("):
        return point[1]
    if "=" not in text or "=" in other:
        return text
    if len(chain := text.split("=")) > 2 and "," not in text and "," in other:
        return f"({','.join([chain[-1]] * len(chain[:-1]))})" if all(map(_LEFT.fullmatch, chain[:-1])) else text
    parts = [split(part, "=") for part in split(OR.sub(",", text))]
    if not all(len(part) == 2 and _LEFT.fullmatch(part[0]) for part in parts):
        return text
    values = {part[0].partition("_")[0].lstrip("\\"): part[1] for part in parts}
    names = sorted(values) if "".join(sorted(values)) in ascii_letters else list(values)
    return f"({','.join(values[name] for name in names)})" if 2 <= len(values) == len(parts) else text


def is_equation(text: str, other: str) -> bool:
    """Whether a text is one equation, and no list of them that the other text lists, too."""
    if len(split(text, "=")) == 1 and r"\approx" not in text:
        return False
    return len(split(OR.sub(",", text))) == 1 and ("=" not in other or not SIGN.search(text))


def sides(text: str) -> list[str]:
    """Return the sides of an equation, its name first; an approximation after the value is dropped."""
    exact, _, approximate = text.partition(r"\approx")
    text = f"{exact}={approximate}" if approximate and _LEFT.fullmatch(exact) else exact
    found = [side for side in split(text, "=") if side] or [text]
    return found[::-1] if _LEFT.fullmatch(found[-1]) and not _LEFT.fullmatch(found[0]) else found


def is_name(side: str) -> bool:
    """Whether a side of an equation names its value: x, f(x), A_1, no 2x."""
    if _LEFT.fullmatch(side):
        return True
    rest = _NO_NAME.sub("", side)
    return bool(re.search("[A-Za-z]", rest)) and not re.search(r"[\d+-]", rest)


def is_constant(side: str) -> bool:
    """Whether a side of an equation has digits and no variables."""
    return any(character.isdigit() for character in side) and not re.search("[A-Za-z_]", _COMMAND.sub("", side))
