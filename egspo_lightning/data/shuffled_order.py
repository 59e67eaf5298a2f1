"""Shuffled order of training data: a pure function of the seed, so that resuming is exact."""

import random


class EndlessOrder:
    """An endless order: each pass has each of ``size`` items once, in a new order."""

    def __init__(self, size: int, seed: str) -> None:
        self._size, self._seed = size, seed
        self._pass, self._order = -1, list[int]()

    def __getitem__(self, position: int) -> int:
        """The item at a position of the endless order."""
        pass_number, place = divmod(position, self._size)
        if pass_number != self._pass:
            self._pass, self._order = pass_number, list(range(self._size))
            random.Random(f"{self._seed}/{pass_number}").shuffle(self._order)
        return self._order[place]
