"""PhaseCheckpoint: checkpoints between optimizer steps, written atomically, and one after the last phase."""

import os
from pathlib import Path
from typing import Any
from weakref import proxy

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from egspo_lightning.callbacks.run_callback import RunCallback
from egspo_lightning.checkpointing import atomic_files
from egspo_lightning.training.trainer import RunTrainer


class PhaseCheckpoint(RunCallback, ModelCheckpoint):
    """Lightning's ModelCheckpoint. A run that was killed at any time resumes from these checkpoints bit for bit.

    ``last.ckpt`` of a finished run is the final policy, whatever ended the run (max_epochs, max_steps, max_time or a
    callback), and whatever the interval and ``save_top_k`` are. Where another checkpoint holds the same state, it is a
    hard link to it. Mid-epoch checkpoints (``every_n_train_steps``, ``train_time_interval``) are saved between two
    optimizer steps, never among the micro-batches of one; a run that is told to stop completes its optimizer step.
    One that is due at a phase's last optimizer step is saved after the phase. ``RunTrainer`` replaces a file only
    once the new one is complete.
    """

    of_run = (
        "_last_global_step_saved",
        "_last_checkpoint_saved",
        "last_model_path",
        "best_model_path",
        "best_model_score",
        "best_k_models",
        "kth_best_model_path",
        "kth_value",
        "current_score",
        "_must_stop",
    )
    _must_stop = False
    """Whether the run was told to stop within an optimizer step."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the ``last.ckpt`` that the run resumes from: as a hard link it holds the path of an older one."""
        super().on_train_start(trainer, pl_module)
        path = str(trainer.ckpt_path or "")
        if os.path.dirname(path) == self.dirpath and os.path.basename(path).startswith(self.CHECKPOINT_NAME_LAST):
            self.last_model_path = path

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save between two optimizer steps, if a checkpoint is due or the run ends; a stop waits for its step's end."""
        stops, is_whole = trainer.should_stop or self._must_stop, not trainer.fit_loop.epoch_loop._should_accumulate()
        trainer.should_stop, self._must_stop = stops and is_whole, stops and not is_whole
        if is_between_optimizer_steps(trainer):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            if _ends(trainer):
                self._save_final(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if a checkpoint is due or the run ends."""
        super().on_train_batch_end(trainer, pl_module, None, None, 0)  # due at the phase's last optimizer step
        super().on_train_epoch_end(trainer, pl_module)
        is_due = self._every_n_epochs >= 1 and (trainer.current_epoch + 1) % self._every_n_epochs == 0
        if _ends(trainer) or trainer.current_epoch + 1 == trainer.max_epochs or is_due:
            self._save_final(trainer)

    def save_now(self, trainer: Trainer) -> str:
        """Save ``last.ckpt``, whatever the interval, and return its path. Collective."""
        if not self.last_model_path or self._last_global_step_saved != trainer.global_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        return self.last_model_path or self._last_checkpoint_saved

    def _save_final(self, trainer: Trainer) -> None:
        """Save the state as it is, unless a checkpoint has it. Collective."""
        if self._should_skip_saving_checkpoint(trainer):
            return
        candidates = self._monitor_candidates(trainer)
        if self.monitor is None or trainer.is_last_batch:  # within a phase the monitored value is an older one
            self._save_topk_checkpoint(trainer, candidates)
        self._save_last_checkpoint(trainer, candidates)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        for logger in trainer.loggers:
            logger.save()  # a resumed run does not log the earlier steps again
        saved = self._last_checkpoint_saved if self._last_global_step_saved == trainer.global_step else filepath
        is_replaced = os.path.isfile(saved) or isinstance(trainer, RunTrainer)  # others write shards into the old files
        if saved != filepath and os.path.exists(saved) and is_replaced:
            _link(trainer, saved, filepath)
        else:
            trainer.save_checkpoint(filepath, self.save_weights_only)
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))


def is_between_optimizer_steps(trainer: Trainer) -> bool:
    """Whether the micro-batch that has just ended completed an optimizer step, and not the phase."""
    return not trainer.is_last_batch and not trainer.fit_loop.epoch_loop._should_accumulate()


def _ends(trainer: Trainer) -> bool:
    """Whether the run ends after this optimizer step, before ``max_epochs``."""
    can_stop = trainer.should_stop and trainer.fit_loop._can_stop_early
    return bool(can_stop) or trainer.global_step == trainer.max_steps


def _link(trainer: Trainer, saved: str, path: str) -> None:
    """Give a saved checkpoint (a file or a folder of shards) a second name, atomically. Collective.

    The second name is a hard link, which stays valid when the first is deleted, or a copy where there are none.
    """
    trainer.strategy.barrier()
    if trainer.is_global_zero:
        partial = atomic_files.partial_of(Path(path))
        atomic_files.link(Path(saved), partial)
        atomic_files.replace(partial, Path(path))
    trainer.strategy.barrier()
