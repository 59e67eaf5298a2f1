"""Callback and reward that end one rank in mid-epoch, by an error or by SIGKILL."""

import os
import signal
from collections.abc import Sequence
from typing import Any, Literal

from lightning.pytorch import Callback


class DyingRank(Callback):
    """Ends one rank before its sixth optimizer step."""

    def __init__(self, rank: int, how: Literal["error", "kill"]) -> None:
        super().__init__()
        self.rank, self.how = rank, how

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank != self.rank or trainer.global_step < 5:
            return
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ArithmeticError("the rank has divided by zero")


class FailingAhead:
    """Reward that fails on one rank after the first rollout batch; with max_staleness 1 it fails in a thread."""

    def __init__(self, rank: int, num_completions: int) -> None:
        self.rank, self.num_left = rank, num_completions

    def __call__(self, completions: Sequence[str], golds: Sequence[str]) -> list[float]:
        self.num_left -= len(completions)
        if self.num_left < 0 and int(os.environ.get("LOCAL_RANK", "0")) == self.rank:
            raise ArithmeticError("the rank has divided by zero")
        return [float(len(text) % 2) for text in completions]
