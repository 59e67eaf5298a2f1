r"""Lists in answers: elements, brackets, separators of thousands, and the values of ``\pm``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import product

from egspo_lightning.rewards.numbers import parse_number

Reading = tuple[str, list[str]] | str
"""A list with its brackets and elements, or a single value."""

OR = re.compile(r"\s*(?<![A-Za-z\\])or(?![A-Za-z])\s*")
SIGN = re.compile(r"\\(pm|mp)(?![A-Za-z])")
_BRACKETS = (("(", ")"), ("(", "]"), ("[", ")"), ("[", "]"), (r"\{", r"\}"))
_THOUSANDS = re.compile(r"(?<![\d.])\d{1,3}(?:,\d{3})+(?!\d)|(?<![\d.])\d{1,2}(?:,\d{2})+,\d{3}(?!\d)")
_MAX_PARTS = 32


def readings(text: str) -> list[Reading]:
    """Return how a text may be read: 70,110 is a number and a list."""
    text, is_single = OR.sub(",", text), False
    found: list[Reading] = []
    for opening, closing in (("", ""), *_BRACKETS):
        inner = text[len(opening) : len(text) - len(closing)]
        if not (text.startswith(opening) and text.endswith(closing) and _is_balanced(inner)):
            continue
        splits = split(inner), [part.replace("\0", ",") for part in split(_THOUSANDS.sub(_glued, inner))]
        is_single |= not opening and (len(splits[1]) == 1 < len(splits[0]) or parse_number(text) is not None)
        for parts in splits:
            parts = parts if opening in ("(", "[") else [signed for part in parts for signed in _signed(part)]
            is_list = 1 < len(parts) <= _MAX_PARTS or (opening == r"\{" and len(parts) == 1)
            if is_list and all(parts) and (opening + closing, parts) not in found:
                found.append((opening + closing, parts))
        if found:
            break
    return [text, *found] if is_single or not found else found


def _glued(match: re.Match[str]) -> str:
    return match[0].replace(",", "\0")


def split(text: str, separator: str = ",") -> list[str]:
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
    signs = SIGN.findall(text)
    if not 1 <= len(signs) <= 3 or text.startswith(r"\{"):
        return [text]
    choices: Iterable[Iterable[str]] = product("+-", repeat=len(signs))
    if "mp" in signs:
        choices = ["".join(sign if it == "pm" else other for it in signs) for sign, other in ("+-", "-+")]
    return [_with_signs(text, choice) for choice in choices]


def _with_signs(text: str, signs: Iterable[str]) -> str:
    remaining = iter(signs)
    return SIGN.sub(lambda _: next(remaining), text).lstrip("+")
