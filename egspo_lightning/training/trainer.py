"""Lightning's Trainer with a separate log folder for each run, whatever the logger, and atomic checkpoints."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from egspo_lightning.checkpointing import atomic_files


def log_folder(trainer: Trainer) -> Path:
    """The folder of the run's files. Collective: Lightning broadcasts it."""
    return Path(trainer.log_dir or trainer.default_root_dir)


class RunTrainer(Trainer):
    """Lightning's Trainer, whose ``log_dir`` is a separate folder for each run.

    Some loggers (MLflow, Weights & Biases) have one folder for all runs, or none. Config, records and model of one run
    would overwrite those of another there. With them it is ``<folder>/<name>/<version>``, where ModelCheckpoint saves.
    """

    @property
    def log_dir(self) -> str | None:
        """The run's folder. Collective."""
        first = self.loggers[0] if self.loggers else None
        if first is None or isinstance(first, TensorBoardLogger | CSVLogger):
            return super().log_dir
        version = first.version if isinstance(first.version, str) else f"version_{first.version}"
        folder = Path(first.save_dir or self.default_root_dir) / str(first.name) / version
        return self.strategy.broadcast(str(folder))

    def save_checkpoint(
        self, filepath: str | Path, weights_only: bool | None = None, storage_options: Any | None = None
    ) -> None:
        """Save a checkpoint (a file or a folder of shards) atomically. Collective.

        For a URL the store must guarantee that.
        """
        if "://" in str(filepath):
            super().save_checkpoint(filepath, weights_only, storage_options)
            return
        path = Path(filepath)
        partial = atomic_files.partial_of(path)
        rank_zero_only(atomic_files.delete)(partial)
        self.strategy.barrier()
        try:
            super().save_checkpoint(partial, weights_only, storage_options)
            rank_zero_only(atomic_files.replace)(partial, path)
            self.strategy.barrier()
        except OSError:
            rank_zero_only(atomic_files.delete)(partial)
            raise
