"""Shuffled order of training data: a pure function of the seed, so that resuming is exact."""

import random
from collections.abc import Sequence
from typing import Generic, TypeVar

ItemT = TypeVar("ItemT")


class EndlessOrder(Generic[ItemT]):
    """An endless order of items: each pass has each of them once, in a new order."""

    def __init__(self, items: Sequence[ItemT], seed: str) -> None:
        self.items, self._seed = items, seed
        self._pass, self._shuffled = -1, list[ItemT]()

    def draw(self, start: int, count: int) -> list[ItemT]:
        """Return the items number ``start`` to ``start + count - 1``."""
        return [self._item(position) for position in range(start, start + count)]

    def _item(self, position: int) -> ItemT:
        pass_number, place = divmod(position, len(self.items))
        if pass_number != self._pass:
            self._pass, self._shuffled = pass_number, list(self.items)
            random.Random(f"{self._seed}/{pass_number}").shuffle(self._shuffled)
        return self._shuffled[place]
