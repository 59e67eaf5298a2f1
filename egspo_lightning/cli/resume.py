"""``--ckpt_path last``: the last checkpoint of the latest run, and the log folder of that run.

With Lightning alone, "last" is looked for in the new run's own folder, where there is none yet.
"""

import re
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from egspo_lightning.callbacks.phase_checkpoint import recover


def last_checkpoint(trainer: Trainer) -> str | None:
    """The newest ``last*.ckpt`` where runs of this trainer leave them."""
    found = []
    for folder in _folders(trainer):
        recover(folder)
        found += list(folder.glob("last*.ckpt"))
    return str(max(found, key=lambda path: path.stat().st_mtime)) if found else None


def places(trainer: Trainer) -> str:
    """Where ``last_checkpoint`` looks, in words."""
    given, root = _given_folder(trainer), _root(trainer)
    return str(given or (root / "checkpoints" if not trainer.loggers else root / "version_*" / "checkpoints"))


def go_on_logging(trainer: Trainer, checkpoint: str, step: int) -> None:
    """Let TensorBoard write into the folder of the run that is resumed, and hide what that run did after it had saved.

    Other loggers have a folder of their own for each start, or are told which run to go on with (``id``, ``run_id``).

    Args:
        trainer: The one that resumes.
        checkpoint: What it resumes from.
        step: The optimizer steps that the checkpoint has taken.
    """
    version = re.fullmatch(r"version_(\d+)", Path(checkpoint).parent.parent.name)
    for logger in trainer.loggers:
        is_of_run = isinstance(logger, TensorBoardLogger) and Path(checkpoint).is_relative_to(logger.root_dir)
        if version is not None and is_of_run and isinstance(logger, TensorBoardLogger):
            logger._version = int(version.group(1))
            logger._kwargs["purge_step"] = step + 1


def _folders(trainer: Trainer) -> list[Path]:
    """The folders that checkpoints may lie in."""
    given, root = _given_folder(trainer), _root(trainer)
    folders = [given] if given is not None else [root / "checkpoints", *root.glob("version_*/checkpoints")]
    return [folder for folder in folders if folder.is_dir()]


def _given_folder(trainer: Trainer) -> Path | None:
    callback = trainer.checkpoint_callback
    dirpath = callback.dirpath if isinstance(callback, ModelCheckpoint) else None
    return None if dirpath is None else Path(dirpath)


def _root(trainer: Trainer) -> Path:
    """The folder of all runs, as ModelCheckpoint has it."""
    logger: Any = trainer.loggers[0] if trainer.loggers else None
    if logger is None:
        return Path(trainer.default_root_dir)
    return Path(logger.save_dir or trainer.default_root_dir) / str(logger.name)
