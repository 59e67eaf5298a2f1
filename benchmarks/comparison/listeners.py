"""Callbacks that a compared run carries."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class Stopwatch(Callback):
    """Seconds spent in phases: sampling, grading, scoring and updates.

    Callbacks that are named in the config come before the project's own, so that evaluations at the end of a phase are
    left out. The one at the start of the first phase, of the checkpoint itself, is in.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0
        self._started = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A phase begins."""
        self._started = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A phase ends."""
        self.seconds += time.perf_counter() - self._started


class StopAfterSFT(Callback):
    """Ends the run with the checkpoint that StageTransition writes."""

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Nothing else saves: checkpoints of the run are switched off."""
        trainer.should_stop = True
