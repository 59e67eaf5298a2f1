"""Callbacks of compared runs, and helpers to add a callback to a command line and to find it after the run."""

import json
import time
from typing import Any, TypeVar

from lightning.pytorch import Callback, LightningModule, Trainer

from egspo_lightning.cli.main import EgspoCLI

C = TypeVar("C", bound=Callback)


def callback_flag(kind: type[Callback], **init_args: Any) -> str:
    """The flag that adds a callback to a run."""
    spec = {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": init_args}
    return f"--trainer.callbacks+={json.dumps(spec)}"


def find_callback(cli: EgspoCLI, kind: type[C]) -> C:
    """The callback of this type in a finished run."""
    callbacks: list[Callback] = cli.trainer.callbacks  # type: ignore[attr-defined]
    return next(callback for callback in callbacks if isinstance(callback, kind))


class PhaseTimer(Callback):
    """Adds up the seconds spent in phases: sampling, grading, scoring and optimizer steps.

    Callbacks of the config run before the project's own, so evaluations at the end of a phase do not count. The
    evaluation at the start of the first phase, of the checkpoint itself, counts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0
        self._started = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self.seconds += time.perf_counter() - self._started


class StopAfterSFT(Callback):
    """Ends the run when StageTransition has written its checkpoint."""

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Stop the trainer; nothing else saves checkpoints in these runs."""
        trainer.should_stop = True
