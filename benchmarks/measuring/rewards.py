"""Rewards for random weights: they vary within groups, so that few groups are flat and skipped."""

from collections.abc import Sequence


class EvenCharacters:
    """Share of characters with an even code."""

    def __call__(self, completions: Sequence[str], golds: Sequence[str]) -> list[float]:
        """Return one share for each completion."""
        return [_share(text) for text in completions]


def _share(text: str) -> float:
    return sum(ord(character) % 2 == 0 for character in text) / max(len(text), 1)


class EverySecond:
    """1 for every second completion, whatever its text: no group of an even size is flat."""

    def __call__(self, completions: Sequence[str], golds: Sequence[str]) -> list[float]:
        """Return one reward for each completion."""
        return [float(i % 2) for i in range(len(completions))]
