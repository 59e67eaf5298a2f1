"""Callbacks of compared runs, and helpers to add a callback to a command line and to find it after the run."""

import json
import time
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import Callback, LightningModule, Trainer

from egspo_lightning.callbacks.math_benchmark import MathBenchmark
from egspo_lightning.callbacks.trainer_access import callbacks_of
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


class EvenEvaluations(Callback):
    """Measures the benchmarks every n epochs, counted from the SFT checkpoint: at the same points for every seed.

    Args:
        first_epoch: Epochs of the checkpoint.
        every_n_epochs: Epochs between two evaluations.
    """

    def __init__(self, first_epoch: int, every_n_epochs: int) -> None:
        super().__init__()
        self.first_epoch, self.every_n_epochs = first_epoch, every_n_epochs

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure every n epochs."""
        if (trainer.current_epoch + 1 - self.first_epoch) % self.every_n_epochs == 0:
            for benchmark in callbacks_of(trainer, MathBenchmark):
                benchmark.measure(trainer, pl_module)


class ProgressFile(Callback):
    """Writes the number of finished epochs and the number of all to a file, for the process that shows them.

    Args:
        path: The file.
        first_epoch: Epochs of the checkpoint, which do not count.
        num_epochs: Number of all epochs, by default the trainer's; SFT may end earlier.
    """

    def __init__(self, path: str, first_epoch: int, num_epochs: int | None) -> None:
        super().__init__()
        self.path, self.first_epoch, self.num_epochs = Path(path), first_epoch, num_epochs

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the numbers; the file is replaced, so that no reader sees half of it."""
        partial = self.path.with_suffix(".partial")
        done = trainer.current_epoch + 1 - self.first_epoch
        partial.write_text(json.dumps([done, self.num_epochs or trainer.max_epochs]))
        partial.replace(self.path)
