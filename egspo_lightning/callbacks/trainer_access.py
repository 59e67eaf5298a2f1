"""Typed accessors used by callbacks: module, datamodule, other callbacks, rollout batch."""

from pathlib import Path
from typing import TypeVar

from lightning.pytorch import Callback, LightningModule, Trainer

from egspo_lightning.datamodule import HybridDataModule
from egspo_lightning.errors import UserError
from egspo_lightning.module import EGSPOModule
from egspo_lightning.rollout.rollout_records import CollectedRollouts

CallbackT = TypeVar("CallbackT", bound=Callback)


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


def callbacks_of(trainer: Trainer, kind: type[CallbackT]) -> list[CallbackT]:
    """The trainer's callbacks of this class."""
    return [callback for callback in getattr(trainer, "callbacks", []) if isinstance(callback, kind)]


def due_rollout_batch(trainer: Trainer, every_n: int) -> CollectedRollouts | None:
    """The rollout batch that the ending phase trained on, if it is one of every n; ``every_n`` 0 gives none."""
    data = data_of(trainer)
    is_due = every_n > 0 and (data.phases.num_rollout_batches - 1) % every_n == 0
    return data.phases.rollouts if is_due else None


def step_of_phase(trainer: Trainer) -> int:
    """The step at which the module has logged the metrics of the latest phase; 0 before training."""
    return max(trainer.global_step - 1, 0)


def resumes_in(trainer: Trainer, folder: Path) -> bool:
    """Whether the run resumes the run that wrote its files into a folder, instead of starting a new one there."""
    if trainer.ckpt_path is None:
        return False
    checkpoint = Path(trainer.ckpt_path)
    return checkpoint.name.startswith("hpc_ckpt_") or folder.resolve() in checkpoint.resolve().parents
