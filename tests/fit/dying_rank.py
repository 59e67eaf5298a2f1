"""A rank that ends in the midst of a phase: by an error, or killed from outside."""

import os
import signal
from typing import Any, Literal

from lightning.pytorch import Callback


class DyingRank(Callback):
    """Ends one rank before its sixth batch."""

    def __init__(self, rank: int, how: Literal["error", "kill"]) -> None:
        super().__init__()
        self.rank, self.how = rank, how

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank != self.rank or trainer.global_step < 5:
            return
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ArithmeticError("the rank has divided by zero")
