r"""Answer extraction: the last balanced ``\boxed{...}`` after the reasoning."""

from __future__ import annotations

import re

from egspo_lightning.rewards.think_blocks import after_reasoning

MAX_ANSWER_LENGTH = 512
"""Characters. A longer box is no answer, so that the grader never gets a page of LaTeX."""

# A backslash escapes the character after it: \{ and \} do not count as braces.
_TOKEN = re.compile(r"\\(?P<box>boxed|fbox|framebox)(?:\s*+\[[^\[\]{}]{0,20}\]){0,2}\s*+\{|\\.|[{}]", re.DOTALL)
_UNBRACED = re.compile(r"\\boxed\s++(-?\w[\w.,/]*)")
# Text that may separate the boxes of one answer.
_SEPARATORS = re.compile(r"(?:[\s,;$&~]|\\[,;:!()\[\] ]|\\q?quad|and|or|\\text\{\s*,?\s*(?:and|or)\s*\})*")
_JOINER = ", "  # with its space: 12,150 would be one number
_FRAMES = frozenset({"boxed", "fbox", "framebox"})


def extract_boxed(text: str) -> str | None:
    r"""Return the content of the last balanced ``\boxed{...}`` after the reasoning, stripped, in linear time.

    The last box is the balanced one that opens last: the innermost of nested boxes. A box that is never closed (in a
    truncated completion) does not hide an earlier one. Boxes separated only by commas, "and", "or" and spacing are
    one answer: ``\boxed{3}, \boxed{4}`` is ``3, 4``, so that several guesses gain nothing. Returns None where there
    is no box, or where the answer is blank or longer than `MAX_ANSWER_LENGTH`.
    """
    return _extract(text, frozenset({"boxed"}))


def extract_framed(text: str) -> str | None:
    r"""Extract as `extract_boxed`; ``\fbox{...}`` and ``\framebox{...}`` count as well."""
    return _extract(text, _FRAMES)


def extract_final(text: str) -> str | None:
    r"""Extract as `extract_boxed`; without a ``\boxed{}``, from ``\fbox{}``, ``\framebox{}`` or ``\boxed 42``."""
    return extract_boxed(text) or extract_framed(_UNBRACED.sub(r"\\boxed{\1}", text))


def _extract(text: str, commands: frozenset[str]) -> str | None:
    text = after_reasoning(text)
    contents: list[str] = []
    answer, following = "", len(text)
    for command, start, end in reversed(_balanced_boxes(text, commands)):
        if contents and (end >= following or not _SEPARATORS.fullmatch(text, end + 1, following)):
            break
        following = command
        content = text[start:end].strip()
        if content not in contents[:1]:  # an answer that is repeated is one answer
            contents.insert(0, content)
            answer = _JOINER.join(contents)
        if len(answer) > MAX_ANSWER_LENGTH:
            return None
    return answer or None


def _balanced_boxes(text: str, commands: frozenset[str]) -> list[tuple[int, int, int]]:
    """Return where the command and the content of each balanced box start and where it ends, in order of opening."""
    open_braces: list[tuple[int, int] | None] = []  # of a box: where its command and its content start
    boxes: list[tuple[int, int, int]] = []
    for token in _TOKEN.finditer(text):
        if token["box"] is not None:
            open_braces.append((token.start(), token.end()) if token["box"] in commands else None)
        elif token[0] == "{":
            open_braces.append(None)
        elif token[0] == "}" and open_braces and (opened := open_braces.pop()) is not None:
            boxes.append((*opened, token.start()))
    return sorted(boxes)
