"""What callbacks reach for: this project's module and datamodule, and where the run that they are in came from."""

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer

from egspo_lightning.datamodule import HybridDataModule
from egspo_lightning.errors import UserError
from egspo_lightning.module import EGSPOModule


def module_of(pl_module: LightningModule) -> EGSPOModule:
    """The module, which these callbacks know more of than Lightning does."""
    if not isinstance(pl_module, EGSPOModule):
        raise UserError(f"This callback works with EGSPOModule, got {type(pl_module).__name__}.")
    return pl_module


def data_of(trainer: Trainer) -> HybridDataModule:
    """The datamodule of the running trainer."""
    datamodule = getattr(trainer, "datamodule", None)
    if not isinstance(datamodule, HybridDataModule):
        raise UserError(f"This callback works with HybridDataModule, got {type(datamodule).__name__}.")
    return datamodule


def goes_on_in(trainer: Trainer, folder: str | Path) -> bool:
    """Whether the run resumes one that has left its files in a folder, rather than starting another one there."""
    if trainer.ckpt_path is None:
        return False
    checkpoint = Path(trainer.ckpt_path)
    return checkpoint.name.startswith("hpc_ckpt_") or Path(folder).resolve() in checkpoint.resolve().parents
