"""Which of several answers to one problem are the same answer: what votes are counted over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import NamedTuple

from egspo_lightning.rewards.normalize import compare_fast, normalize

Compare = Callable[[Sequence[str], Sequence[str]], Sequence[bool | None]]
"""Whether each of the first equals its counterpart in the second; None where that could not be found out."""

_PROBE = "1"


def equivalence_classes(groups: Sequence[Sequence[str | None]], compare: Compare) -> list[list[int | None]]:
    """The class of each answer, numbered in order of appearance within its group; None for no answer.

    An answer joins the first class whose first member it equals, as an answer equals a reference. That is not
    transitive (12 cm and 12 m both equal 12, not each other), so it is the order of appearance that settles where
    such an answer belongs. ``compare`` is asked for all groups at once, and only where spelling and plain numbers
    decide nothing. An answer that it cannot compare with 1 is a class of its own: a group with an answer that hangs
    waits for it once, not once a pair.
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
    """``compare`` behind the fast path, and never with an answer that has once been found to break it."""

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
    """The first answer of each spelling, in order of appearance."""
    first: dict[str, str] = {}
    for answer, spelling in zip(answers, spellings, strict=True):
        if answer is not None and spelling is not None:
            first.setdefault(spelling, answer)
    return first
