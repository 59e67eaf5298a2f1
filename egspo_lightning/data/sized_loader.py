"""The one kind of data loader here: sized and lazy."""

from collections.abc import Callable, Iterator
from typing import Any


class SizedLoader:
    """A loader whose length is known and whose batches are made when they are asked for, not before.

    The length keeps Lightning from prefetching, which would sample rollouts from a policy that is one update old.
    """

    def __init__(self, length: int, batches: Callable[[], Iterator[Any]]) -> None:
        self._length, self._batches = length, batches

    def __len__(self) -> int:
        """Batches an epoch."""
        return self._length

    def state_dict(self) -> dict[str, Any]:
        """Nothing: where a phase stands, and its rollouts, are in the datamodule's state.

        With ``load_state_dict`` it tells Lightning that a loader can be resumed.
        """
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to take up."""

    def __iter__(self) -> Iterator[Any]:
        """Start making them."""
        return self._batches()
