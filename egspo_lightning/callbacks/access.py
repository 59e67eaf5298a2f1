"""What callbacks reach for: this project's module and datamodule."""

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
