"""Typed accessors used by callbacks: the module, the datamodule, and the rollout batch to look at."""

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer

from egspo_lightning.datamodule import HybridDataModule
from egspo_lightning.errors import UserError
from egspo_lightning.module import EGSPOModule
from egspo_lightning.rollout.rollout_records import CollectedRollouts


def module_of(pl_module: LightningModule) -> EGSPOModule:
    """The module with its own type.

    Raises:
        UserError: it is another LightningModule.
    """
    if not isinstance(pl_module, EGSPOModule):
        raise UserError(f"This callback works with EGSPOModule, got {type(pl_module).__name__}.")
    return pl_module


def data_of(trainer: Trainer) -> HybridDataModule:
    """The trainer's datamodule.

    Raises:
        UserError: it is another LightningDataModule.
    """
    datamodule = getattr(trainer, "datamodule", None)
    if not isinstance(datamodule, HybridDataModule):
        raise UserError(f"This callback works with HybridDataModule, got {type(datamodule).__name__}.")
    return datamodule


def due_rollout_batch(trainer: Trainer, every_n: int) -> CollectedRollouts | None:
    """The rollout batch that the ending phase trained on, if it is one of every n; ``every_n`` 0 gives none."""
    data = data_of(trainer)
    is_due = every_n > 0 and (data.num_rollout_batches - 1) % every_n == 0
    return data.rollouts if is_due else None


def resumes_in(trainer: Trainer, folder: str | Path) -> bool:
    """Whether the run resumes the run that wrote its files into a folder, instead of starting a new one there."""
    if trainer.ckpt_path is None:
        return False
    checkpoint = Path(trainer.ckpt_path)
    return checkpoint.name.startswith("hpc_ckpt_") or Path(folder).resolve() in checkpoint.resolve().parents
