"""Equivalence classes of the answers to one problem, over which votes are counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

from egspo_lightning.rewards.fast_path import compare_fast
from egspo_lightning.rewards.normalize import normalize

Compare = Callable[[Sequence[str], Sequence[str]], Sequence[bool | None]]
"""Returns whether each answer equals its counterpart; None where the comparison failed."""

_PROBE = "1"


def equivalence_classes(groups: Sequence[Sequence[str | None]], compare: Compare) -> list[list[int | None]]:
    """Return the class of each answer, numbered in order of appearance within its group; None for no answer.

    An answer joins the first class all of whose members it equals, each of the two as the gold answer. Equality is not
    transitive (12 cm and 12 m both equal 12, not each other), but all members of a class are equal. Calls of
    ``compare`` serve all groups, and only pairs that spelling and plain numbers leave open. An answer that cannot be
    compared with 1 forms its own class: a group with an answer that hangs waits for it once, not once a pair.
    """
    waiting = [_by_spelling(group) for group in groups]
    classes: list[dict[str, int]] = [{} for _ in groups]
    comparison = _Comparison(compare)
    newest = 0
    while any(waiting):
        founders = [next(iter(answers.values()), "") for answers in waiting]
        pairs = [
            (text, founder) for answers, founder in zip(waiting, founders, strict=True) for text in answers.values()
        ]
        equal = comparison.mutually_equal(pairs)
        alike = [
            {spelling: text for spelling, text in answers.items() if (text, founder) in equal}
            for answers, founder in zip(waiting, founders, strict=True)
        ]
        equal = comparison.mutually_equal(
            [pair for answers in alike for pair in combinations(list(answers.values())[1:], 2)]
        )
        for group, answers in enumerate(alike):
            members: list[str] = []
            for spelling, text in answers.items():
                if all((member, text) in equal for member in members[1:]):
                    members.append(text)
                    classes[group][spelling] = newest
                    del waiting[group][spelling]
        newest += 1
    return [
        [None if answer is None else of_spelling[normalize(answer)] for answer in group]
        for group, of_spelling in zip(groups, classes, strict=True)
    ]


class _Comparison:
    """Calls ``compare`` where the fast path is undecided, and never again with an answer on which it failed."""

    def __init__(self, compare: Compare) -> None:
        self._compare = compare
        self._is_usable: dict[str, bool] = {}

    def mutually_equal(self, pairs: Sequence[tuple[str, str]]) -> set[tuple[str, str]]:
        """Return the pairs that are equal, whichever of the two is the gold answer."""
        equal = self._equal(pairs)
        reverse = set(self._equal([(gold, answer) for answer, gold in equal]))
        return {(answer, gold) for answer, gold in equal if (gold, answer) in reverse}

    def _equal(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        verdicts = {pair: pair[0] == pair[1] or compare_fast(*pair) for pair in pairs}
        undecided = [pair for pair, verdict in verdicts.items() if verdict is None]
        new = dict.fromkeys(answer for pair in undecided for answer in pair if answer not in self._is_usable)
        for (answer, _), verdict in self._ask([(answer, _PROBE) for answer in new]):
            self._is_usable[answer] = verdict is not None
        comparable = [pair for pair in undecided if all(self._is_usable[answer] for answer in pair)]
        verdicts.update(self._ask(comparable))
        return [pair for pair in pairs if verdicts[pair]]

    def _ask(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[tuple[str, str], bool | None]]:
        verdicts = self._compare([answer for answer, _ in pairs], [gold for _, gold in pairs]) if pairs else ()
        return list(zip(pairs, verdicts, strict=True))


def _by_spelling(answers: Sequence[str | None]) -> dict[str, str]:
    """Return the first answer of each spelling, in order of appearance."""
    first: dict[str, str] = {}
    for answer in answers:
        if answer is not None:
            first.setdefault(normalize(answer), answer)
    return first
