"""Keeping the answers of an evaluation on disk, and taking up those of one that was cut off."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from egspo_lightning.callbacks.trainer_access import data_of, module_of
from egspo_lightning.evaluation.journal import Journal, fingerprint
from egspo_lightning.module import EGSPOModule

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def open_journal(trainer: Trainer, pl_module: LightningModule, name: str, folder: Path) -> Journal:
    """The journal of a benchmark, whose earlier answers the datamodule then gives again. Collective.

    Args:
        trainer: The running one.
        pl_module: Whose answers they are.
        name: The benchmark's.
        folder: Where to; "{fingerprint}" in it stands for weights and settings.

    Raises:
        UserError: the folder holds answers of other weights, problems or sampling.
    """
    answerer, module = data_of(trainer).answerer, module_of(pl_module)
    settings = answerer.settings(name, data_of(trainer).encoder)
    settings |= {"precision": str(trainer.precision), "weights": weights_digest(module)}
    place = Path(str(folder).replace("{fingerprint}", fingerprint(settings)))
    num_samples, _ = answerer.sampling(name)
    journal = Journal(place, settings, answerer.problems(name), num_samples, trainer.global_rank)
    journal.claim()
    trainer.strategy.barrier()
    earlier = journal.read()
    trainer.strategy.barrier()  # nobody appends before all have read
    answerer.remember(name, earlier)
    if earlier:
        rank_zero_info(
            f"{name}: {len(earlier)} of {len(journal.problems)} problems were answered before, in {place}; they are "
            "not answered again. Delete that folder to begin anew."
        )
    return journal


def close_journal(trainer: Trainer, journal: Journal) -> None:
    """Bring the answers of all ranks together. Collective."""
    trainer.strategy.barrier()
    if trainer.is_global_zero:
        journal.merge()
    trainer.strategy.barrier()
    data_of(trainer).answerer.remember(journal.settings["benchmark"], {})


def checkpoint_of(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """Which checkpoint is measured, and the optimizer steps that it, or the running fit, has taken."""
    if trainer.state.fn == TrainerFn.FITTING or trainer.ckpt_path is None:
        return {"ckpt_path": None, "step": trainer.global_step}
    return {"ckpt_path": str(trainer.ckpt_path), "step": module_of(pl_module).loaded_step}


def weights_digest(module: EGSPOModule) -> str:
    """The sum of the bits of each parameter of the policy: equal for equal weights, however they are sharded."""
    assert module.policy is not None, "configure_model has not run"
    sums = [_bits(module, parameter) for _, parameter in sorted(module.policy.named_parameters())]
    return fingerprint({"bits": torch.stack(sums).tolist()})


def _bits(module: EGSPOModule, parameter: nn.Parameter) -> Tensor:
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    total = local.detach().contiguous().view(_BITS[parameter.element_size()]).sum(dtype=torch.int64)
    return module.sum_over_ranks(total) if isinstance(parameter, DTensor) else total
