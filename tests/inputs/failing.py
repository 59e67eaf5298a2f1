"""A callback that fails on one rank in the middle of an epoch."""

import os
from typing import Any

from lightning.pytorch import Callback


class Fail(Callback):
    """Raises an exception, or exits the process without a message.

    Args:
        rank: The rank that fails.
        silently: Whether to exit the process at once, as when the kernel kills it for memory.
    """

    def __init__(self, rank: int, silently: bool = False) -> None:
        self.rank, self.silently = rank, silently

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Fail in the second epoch."""
        if trainer.global_rank == self.rank and trainer.current_epoch == 1:
            if self.silently:
                os._exit(9)
            raise RuntimeError(f"rank {self.rank} fails")
