"""Resume of the latest run: ``--ckpt_path last`` finds its last checkpoint and its log folder.

Lightning alone looks for "last" in the new run's own folder, which holds no checkpoint yet.
"""

import re
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from egspo_lightning.checkpointing.atomic_files import recover
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
    folders, searched = _checkpoint_folders(trainer)
    for folder in folders:
        rank_zero_only(recover)(folder)
    found = [path for folder in folders for path in folder.glob("last*.ckpt")]
    if found:
        last = max(found, key=lambda path: path.stat().st_mtime)
        step = open_checkpoint(last)["global_step"]
        if starts_anew:
            _continue_logs(trainer, last, step)
        return str(last)
    if not starts_anew:
        raise UserError(f"ckpt_path: last: there is no checkpoint in {searched}. Give the path of one.")
    rank_zero_warn(f"ckpt_path: last: no checkpoint in {searched}; the run starts anew.")
    return None


def _checkpoint_folders(trainer: Trainer) -> tuple[list[Path], Path]:
    """The folders in which runs of this trainer keep their checkpoints, and a pattern of them for messages."""
    callback, root = trainer.checkpoint_callback, Path(trainer.default_root_dir)
    if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None:
        folder = Path(callback.dirpath)
        return [folder] if folder.is_dir() else [], folder
    pattern = root / "checkpoints"
    if trainer.loggers:  # the folder that ModelCheckpoint chooses
        logger: Any = trainer.loggers[0]
        root = Path(logger.save_dir or root) / str(logger.name)
        pattern = root / "version_*" / "checkpoints"
    folders = [root / "checkpoints", *root.glob("version_*/checkpoints")]
    return [folder for folder in folders if folder.is_dir()], pattern


def _continue_logs(trainer: Trainer, checkpoint: Path, step: int) -> None:
    """Let TensorBoard write into the folder of the resumed run, and hide its entries after optimizer step ``step``.

    Other loggers start a new folder, or take the run to continue as an argument (``id``, ``run_id``).
    """
    version = re.fullmatch(r"version_(\d+)", checkpoint.parent.parent.name)
    for logger in trainer.loggers:
        if version and isinstance(logger, TensorBoardLogger) and checkpoint.is_relative_to(logger.root_dir):
            logger._version = int(version.group(1))
            logger._kwargs["purge_step"] = step + 1
