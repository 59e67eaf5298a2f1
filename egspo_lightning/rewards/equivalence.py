"""Equivalence classes of the answers to one problem, over which votes are counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import NamedTuple

from egspo_lightning.rewards.fast_path import compare_fast
from egspo_lightning.rewards.normalize import normalize

Compare = Callable[[Sequence[str], Sequence[str]], Sequence[bool | None]]
"""Returns whether each answer equals its counterpart; None where the comparison failed."""

_PROBE = "1"


def equivalence_classes(groups: Sequence[Sequence[str | None]], compare: Compare) -> list[list[int | None]]:
    """Return the class of each answer, numbered in order of appearance within its group; None for no answer.

    An answer joins the first class whose first member it equals, with that member as the gold answer. Equality is
    not transitive (12 cm and 12 m both equal 12, not each other), so the order of appearance decides. One call of
    ``compare`` serves all groups, and only pairs that spelling and plain numbers leave open. An answer that cannot be
    compared with 1 forms its own class: a group with an answer that hangs waits for it once, not once a pair.
    """
    spellings = [[None if answer is None else normalize(answer) for answer in group] for group in groups]
    waiting = [_by_spelling(group, row) for group, row in zip(groups, spellings, strict=True)]
    classes: list[dict[str, int]] = [{} for _ in groups]
    comparison = _Comparison(compare)
    newest = 0
    while any(waiting):
        founders = [(group, next(iter(answers))) for group, answers in enumerate(waiting) if answers]
        others = [(group, spelling) for group, _ in founders for spelling in islice(waiting[group], 1, None)]
        founded = {group: waiting[group][spelling] for group, spelling in founders}
        equal = comparison.equal([_Pair(waiting[group][spelling], founded[group]) for group, spelling in others])
        joined = [other for other, is_equal in zip(others, equal, strict=True) if is_equal]
        for group, spelling in founders + joined:
            classes[group][spelling] = newest
            del waiting[group][spelling]
        newest += 1
    return [
        [None if spelling is None else classes[group][spelling] for spelling in row]
        for group, row in enumerate(spellings)
    ]


class _Pair(NamedTuple):
    answer: str
    founder: str


class _Comparison:
    """Calls ``compare`` where the fast path is undecided, and never again with an answer that broke it."""

    def __init__(self, compare: Compare) -> None:
        self._compare = compare
        self._is_usable: dict[str, bool] = {}

    def equal(self, pairs: Sequence[_Pair]) -> list[bool]:
        fast = [compare_fast(*pair) for pair in pairs]
        undecided = [pair for pair, verdict in zip(pairs, fast, strict=True) if verdict is None]
        self._probe(answer for pair in undecided for answer in pair)
        comparable = [pair for pair in undecided if all(self._is_usable[answer] for answer in pair)]
        verdicts = dict(zip(comparable, self._ask(comparable), strict=True))
        return [
            bool(verdicts.get(pair) if verdict is None else verdict) for pair, verdict in zip(pairs, fast, strict=True)
        ]

    def _probe(self, answers: Iterable[str]) -> None:
        new = [_Pair(answer, _PROBE) for answer in dict.fromkeys(answers) if answer not in self._is_usable]
        for pair, verdict in zip(new, self._ask(new), strict=True):
            self._is_usable[pair.answer] = verdict is not None

    def _ask(self, pairs: Sequence[_Pair]) -> Sequence[bool | None]:
        return self._compare([pair.answer for pair in pairs], [pair.founder for pair in pairs]) if pairs else ()


def _by_spelling(answers: Sequence[str | None], spellings: Sequence[str | None]) -> dict[str, str]:
    """Return the first answer of each spelling, in order of appearance."""
    first: dict[str, str] = {}
    for answer, spelling in zip(answers, spellings, strict=True):
        if answer is not None and spelling is not None:
            first.setdefault(spelling, answer)
    return first
