"""Resume of the latest run: ``--ckpt_path last`` finds its last checkpoint and its log folder.

Lightning alone looks for "last" in the new run's own folder, which holds no checkpoint yet.
"""

import re
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn

from egspo_lightning.callbacks.phase_checkpoint import recover
from egspo_lightning.checkpointing.load import open_checkpoint
from egspo_lightning.errors import UserError


def resume_path(trainer: Trainer, *, starts_anew: bool) -> str | None:
    """Path of the last checkpoint of the latest run, whose log folder a resumed fit continues.

    Args:
        trainer: The trainer of the new run.
        starts_anew: Whether a missing checkpoint starts a new run, as in fit: one command then starts and resumes.

    Raises:
        UserError: there is no checkpoint, and the run needs one.
    """
    path, looked_in = last_checkpoint(trainer), places(trainer)
    if path is not None:
        step = open_checkpoint(Path(path))["global_step"]
        if starts_anew:
            go_on_logging(trainer, path, step)
    elif not starts_anew:
        raise UserError(f"ckpt_path: last: there is no checkpoint in {looked_in}. Give the path of one.")
    else:
        rank_zero_warn(f"ckpt_path: last: no checkpoint in {looked_in}; the run starts anew.")
    return path


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
