"""Access to TensorBoard where it is one of the loggers."""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger


def tensorboard_writer(trainer: Trainer) -> Any | None:
    """The SummaryWriter on the first rank, None elsewhere and without TensorBoard."""
    if not trainer.is_global_zero:
        return None
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            return logger.experiment
    return None
