"""Reward for random weights: it varies within groups, so that few groups are flat and skipped."""

from collections.abc import Sequence


class EvenCharacters:
    """Share of characters with an even code."""

    def __call__(self, completions: Sequence[str], golds: Sequence[str]) -> list[float]:
        """Return one share for each completion."""
        return [_share(text) for text in completions]


def _share(text: str) -> float:
    return sum(ord(character) % 2 == 0 for character in text) / max(len(text), 1)
