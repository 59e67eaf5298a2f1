"""PhaseProgress: one progress bar for the whole run, with phase, stage, reward and entropy."""

import logging
import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from egspo_lightning.callbacks.trainer_access import module_of

SECONDS_BETWEEN_LINES = 10.0
"""Interval of the plain lines that replace the bar where the output is not a terminal."""

SHOWN = {
    "loss/sft": "sft loss",
    "rollout/reward_mean": "reward",
    "policy/entropy": "entropy",
    "rollout/length_mean": "length",
}


class _Description(TextColumn):
    """The one column that a narrow terminal cuts."""

    def render(self, task: Task) -> Text:
        text = super().render(task)
        text.no_wrap, text.overflow = True, "ellipsis"
        return text


class PhaseProgress(ProgressBar):
    """Shows phase, stage and the main metrics as one bar, or as plain lines where there is no terminal."""

    _console = Console(stderr=True)  # of the class: it holds locks, which cannot be pickled for spawned ranks
    _progress: Progress | None = None
    _last_line = 0.0
    _streams: tuple[tuple[logging.StreamHandler[Any], Any], ...] = ()
    """Handlers of Lightning's log messages with their streams, which are replaced while the bar is open."""
    is_enabled = True
    """Whether anything is printed."""

    def disable(self) -> None:
        """Print nothing; Lightning calls this on all ranks but the first."""
        self.is_enabled = False

    def enable(self) -> None:
        """Print again."""
        self.is_enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar."""
        self._stage = module_of(pl_module).stage_label
        if not self.is_enabled or not self._console.is_terminal:
            return
        self._progress = Progress(
            _Description("{task.description}", markup=False, table_column=Column()),
            BarColumn(20, table_column=Column(no_wrap=True)),
            TextColumn("phase {task.completed}/{task.total}", table_column=Column(no_wrap=True)),
            TimeElapsedColumn(Column(no_wrap=True)),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            console=self._console,
        )
        self._progress.start()
        handlers = logging.getLogger("lightning.pytorch").handlers
        found = [handler for handler in handlers if type(handler) is logging.StreamHandler]  # not one for a file
        self._streams = tuple((handler, handler.setStream(sys.stderr)) for handler in found)  # prints above the bar
        self._task = self._progress.add_task("starting", total=self._total(trainer), completed=trainer.current_epoch)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the stage: at the end of the phase the module may have the next phase's stage."""
        self._stage = module_of(pl_module).stage_label

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Advance the bar by a phase."""
        if not self.is_enabled:
            return
        metrics = trainer.callback_metrics
        shown = [f"{label} {float(metrics[name]):.3g}" for name, label in SHOWN.items() if name in metrics]
        text = " · ".join([f"[{self._stage}]", *shown])
        if self._progress is not None:
            self._progress.update(self._task, completed=trainer.current_epoch + 1, description=text)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self.print(f"phase {trainer.current_epoch + 1}/{self._total(trainer) or '?'} {text}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        for handler, stream in self._streams:
            handler.setStream(stream or handler.stream)
        self._streams = ()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the bar, so that the terminal is as before."""
        self.on_train_end(trainer, pl_module)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar."""
        if self.is_enabled:
            self._console.print(*args, highlight=False, markup=False, soft_wrap=True)

    @staticmethod
    def _total(trainer: Trainer) -> int | None:
        return trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs >= 0 else None
