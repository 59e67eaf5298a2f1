"""Lightning's Trainer with a separate log folder for each run, whatever the logger."""

from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger


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
