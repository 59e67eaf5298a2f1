"""Where the answer of a completion stands: the last balanced ``\\boxed{...}`` after the reasoning."""

from __future__ import annotations

import re

MAX_ANSWER_LENGTH = 512
"""Characters; a longer box is no answer, so that the grader is never handed a page of LaTeX."""

# A backslash takes the character after it along, so that \{ and \} do not count as braces.
_TOKEN = re.compile(r"\\boxed\s*+\{|\\.|[{}]", re.DOTALL)


def after_reasoning(text: str) -> str:
    """The text after the last ``</think>``; reasoning that is opened and never closed is left out too."""
    return text.rpartition("</think>")[2].partition("<think>")[0]


def extract_boxed(text: str) -> str | None:
    r"""The content of the last balanced ``\boxed{...}`` after the reasoning, stripped, in linear time.

    The last box is the balanced one that opens last: of nested boxes the innermost, and a box that is never
    closed (a truncated completion) does not hide an earlier one. None where there is no such box, or where it
    is blank or longer than `MAX_ANSWER_LENGTH`.
    """
    text = after_reasoning(text)
    found = _last_balanced_box(text)
    if found is None:
        return None
    start, end = found
    if end - start > MAX_ANSWER_LENGTH:
        return None
    return text[start:end].strip() or None


def _last_balanced_box(text: str) -> tuple[int, int] | None:
    open_braces: list[tuple[int, bool]] = []  # where the content starts, whether it is a box's
    last: tuple[int, int] | None = None
    for token in _TOKEN.finditer(text):
        if token[0].endswith("{") and token[0] != r"\{":
            open_braces.append((token.end(), token[0] != "{"))
        elif token[0] == "}" and open_braces:
            start, is_box = open_braces.pop()
            if is_box and (last is None or start > last[0]):
                last = start, token.start()
    return last
