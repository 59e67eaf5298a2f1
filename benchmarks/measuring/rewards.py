"""A reward that a policy with random weights sometimes earns: groups have a spread, so that updates have work."""

from collections.abc import Sequence

from egspo_lightning.rewards.functions import Scored
from egspo_lightning.rewards.grading import Grade


class EvenCharacters:
    """Share of characters with an even code."""

    def __call__(self, completions: Sequence[str], golds: Sequence[str]) -> list[Scored]:
        """One a completion."""
        return [Scored(_share(text), Grade(False, "no_answer", None, 0.0)) for text in completions]


def _share(text: str) -> float:
    return sum(ord(character) % 2 == 0 for character in text) / max(len(text), 1)
