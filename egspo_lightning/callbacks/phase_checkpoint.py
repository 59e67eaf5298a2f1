"""PhaseCheckpoint: checkpoints between optimizer steps, written atomically, and one after the last phase."""

import os
import shutil
from pathlib import Path
from typing import Any
from weakref import proxy

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only

PARTIAL, PREVIOUS = ".partial", ".previous"
"""Suffixes of a checkpoint that is being written, and of the one that it replaces until that is deleted."""


class PhaseCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, whose checkpoints a run resumes from bit for bit, whenever it was killed.

    It also saves after the last of ``max_epochs``, whatever its interval: ``last.ckpt`` of a finished run is the final
    policy. Mid-epoch checkpoints (``every_n_train_steps``, ``train_time_interval``) are saved between two optimizer
    steps, never among the micro-batches of one. One that is due at a phase's last optimizer step is saved after the
    phase. A file is replaced only once the new one is complete.
    """

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if a checkpoint is due and the phase is between two optimizer steps."""
        if is_between_optimizer_steps(trainer):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if a checkpoint is due."""
        super().on_train_batch_end(trainer, pl_module, None, None, 0)  # due at the phase's last optimizer step
        interval = self._every_n_epochs
        if trainer.current_epoch + 1 == trainer.max_epochs:
            self._every_n_epochs = 1
        super().on_train_epoch_end(trainer, pl_module)
        self._every_n_epochs = interval

    def save_now(self, trainer: Trainer) -> str:
        """Save ``last.ckpt``, whatever the interval, and return its path. Collective."""
        if not self.last_model_path or self._last_global_step_saved != trainer.global_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        return self.last_model_path or self._last_checkpoint_saved

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        for logger in trainer.loggers:
            logger.save()  # a resumed run does not log the earlier steps again
        save_whole(trainer, filepath, weights_only=self.save_weights_only)
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))


def is_between_optimizer_steps(trainer: Trainer) -> bool:
    """Whether the micro-batch that has just ended completed an optimizer step, and not the phase."""
    return not trainer.is_last_batch and not trainer.fit_loop.epoch_loop._should_accumulate()


def save_whole(trainer: Trainer, path: str | Path, *, weights_only: bool = False) -> None:
    """Save a checkpoint (a file or a folder of shards) atomically: the old or the new one always exists. Collective.

    For a URL the store must guarantee that.
    """
    if "://" in str(path):
        trainer.save_checkpoint(path, weights_only)
        return
    path = Path(path)
    partial = path.with_name(path.name + PARTIAL)
    _delete(partial)
    trainer.strategy.barrier()
    try:
        trainer.save_checkpoint(partial, weights_only)
        trainer.strategy.barrier()
        _replace(partial, path)
        trainer.strategy.barrier()
    except OSError:
        _delete(partial)
        raise


@rank_zero_only
def recover(folder: Path) -> None:
    """Clean up after a ``save_whole`` that was killed."""
    for previous in folder.glob(f"*{PREVIOUS}"):
        path = previous.with_name(previous.name.removesuffix(PREVIOUS))
        if path.exists():
            _delete(previous)
        else:
            previous.rename(path)
    for partial in folder.glob(f"*{PARTIAL}"):
        _delete(partial)


@rank_zero_only
def _replace(partial: Path, path: Path) -> None:
    """Replace a file in one step once it is on disk; a folder cannot be, so the old one is renamed first."""
    if partial.is_file():
        with partial.open("rb") as file:
            os.fsync(file.fileno())
    if not path.is_dir() or path.is_symlink():
        os.replace(partial, path)
        return
    previous = path.with_name(path.name + PREVIOUS)
    _delete(previous)
    path.rename(previous)
    partial.rename(path)
    _delete(previous)


@rank_zero_only
def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
