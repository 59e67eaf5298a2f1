"""Histograms and text for all loggers: TensorBoard, Weights & Biases, MLflow, CSV and others.

A logger that cannot show one of them gets another form where one exists; a message says so when training starts.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch import Tensor

SHOWS_HISTOGRAMS = (TensorBoardLogger, WandbLogger)
SHOWS_TEXT = (TensorBoardLogger, WandbLogger, MLFlowLogger)


def note_once(trainer: Trainer, key: str, able: tuple[type[Logger], ...], instead: str) -> None:
    """Print which loggers are not ``able`` to show the output of a callback (by its config key), and what they get."""
    others = [type(logger).__name__ for logger in trainer.loggers if not isinstance(logger, able)]
    if others:
        rank_zero_info(f"{key}: {', '.join(others)} {instead}")


@rank_zero_only
def log_histograms(trainer: Trainer, histograms: Mapping[str, Tensor], step: int) -> None:
    """Log values as histograms, or as the metrics of ``summary`` where a logger has none. First rank only."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            for tag, values in histograms.items():
                logger.experiment.add_histogram(tag, values, step)
        elif isinstance(logger, WandbLogger):
            import wandb

            shown: Any = {tag: wandb.Histogram(values.float().cpu().numpy()) for tag, values in histograms.items()}
            logger.log_metrics(shown, step)
        else:
            numbers = {f"{tag}/{name}": v for tag, values in histograms.items() for name, v in summary(values).items()}
            logger.log_metrics(numbers, step)


@rank_zero_only
def log_text(trainer: Trainer, tag: str, text: str, step: int) -> None:
    """Log Markdown to the loggers that keep text. First rank only."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(tag, text, step)
        elif isinstance(logger, WandbLogger):
            logger.log_text(tag, columns=["step", "text"], data=[[str(step), text]], step=step)
        elif isinstance(logger, MLFlowLogger):
            assert logger.run_id is not None
            logger.experiment.log_text(logger.run_id, text, f"{tag}/step-{step:08d}.md")


def summary(values: Tensor) -> dict[str, float]:
    """Summarize values as mean and the quantiles p10, p50 and p90, each one of the values (the lower one).

    Args:
        values: (N,) with N > 0
    """
    array = values.detach().float().cpu().numpy()
    p10, p50, p90 = np.quantile(array, (0.1, 0.5, 0.9), method="inverted_cdf").tolist()
    return {"mean": array.mean().item(), "p10": p10, "p50": p50, "p90": p90}


def tensorboard_of(trainer: Trainer) -> list[TensorBoardLogger]:
    """The TensorBoard loggers, on the first rank; none on others."""
    loggers = trainer.loggers if trainer.is_global_zero else []
    return [logger for logger in loggers if isinstance(logger, TensorBoardLogger)]
