"""Equivalence classes of the answers to one problem, over which votes are counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
    waiting = [_by_spelling(group) for group in groups]
    classes: list[dict[str, int]] = [{} for _ in groups]
    comparison = _Comparison(compare)
    newest = 0
    while any(waiting):
        spellings = [(group, spelling) for group, answers in enumerate(waiting) for spelling in answers]
        founders = [next(iter(answers.values()), "") for answers in waiting]
        equal = comparison.equal([(waiting[group][spelling], founders[group]) for group, spelling in spellings])
        for (group, spelling), is_equal in zip(spellings, equal, strict=True):
            if is_equal:
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

    def equal(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        verdicts = {pair: pair[0] == pair[1] or compare_fast(*pair) for pair in pairs}
        undecided = [pair for pair, verdict in verdicts.items() if verdict is None]
        new = dict.fromkeys(answer for pair in undecided for answer in pair if answer not in self._is_usable)
        for (answer, _), verdict in self._ask([(answer, _PROBE) for answer in new]):
            self._is_usable[answer] = verdict is not None
        comparable = [pair for pair in undecided if all(self._is_usable[answer] for answer in pair)]
        verdicts.update(self._ask(comparable))
        return [bool(verdicts[pair]) for pair in pairs]

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
