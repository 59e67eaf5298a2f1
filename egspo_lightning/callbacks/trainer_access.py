"""Access of callbacks to a run: module, datamodule, other callbacks, rollout batch, outputs of the current policy."""

from pathlib import Path
from typing import TypeVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from egspo_lightning.datamodule import HybridDataModule
from egspo_lightning.errors import UserError
from egspo_lightning.module import EGSPOModule
from egspo_lightning.rollout.rollout_records import CollectedRollouts
from egspo_lightning.rollout.scoring import TOKENS_PER_SCORING_BATCH
from egspo_lightning.types import NetworkOutputs

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


def outputs_now(module: EGSPOModule, input_ids: Tensor, mask: Tensor) -> NetworkOutputs:
    """Outputs of the current policy, in batches bounded in tokens, without gradient or random numbers. Collective."""
    size = max(TOKENS_PER_SCORING_BATCH // mask.shape[1], 1)
    batches = zip(input_ids.split(size), mask.split(size), strict=True)
    with module.sampling():
        parts = [module.networks.policy(ids, part, module.temperature) for ids, part in batches]
    return NetworkOutputs(torch.cat([part.logprobs for part in parts]), torch.cat([part.entropies for part in parts]))


def step_of_phase(trainer: Trainer) -> int:
    """The step at which the module has logged the metrics of the latest phase; 0 before training."""
    return max(trainer.global_step - 1, 0)


def resumes_in(trainer: Trainer, folder: Path) -> bool:
    """Whether the run resumes the run that wrote its files into a folder, instead of starting a new one there."""
    if trainer.ckpt_path is None:
        return False
    checkpoint = Path(trainer.ckpt_path)
    return checkpoint.name.startswith("hpc_ckpt_") or folder.resolve() in checkpoint.resolve().parents
