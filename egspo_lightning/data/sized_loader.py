"""Data loader with a known length and lazy batches."""

from collections.abc import Callable, Iterator
from typing import Any


class SizedLoader:
    """A loader with a known length that makes each batch when it is asked for.

    Lightning prefetches from loaders without a length, so rollouts would come from a policy that is one step old.
    """

    def __init__(self, length: int, batches: Callable[[], Iterator[Any]]) -> None:
        self._length, self._batches = length, batches

    def __len__(self) -> int:
        """Batches per epoch."""
        return self._length

    def state_dict(self) -> dict[str, Any]:
        """Empty: the datamodule's state holds the position in a phase, and the rollouts.

        With ``load_state_dict`` it tells Lightning that the loader can be resumed.
        """
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore."""

    def __iter__(self) -> Iterator[Any]:
        """Start an epoch."""
        return self._batches()
