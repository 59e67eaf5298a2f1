"""Module state in checkpoints: weights that are left out, and fitting a checkpoint to the run that resumes it."""

from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.optim import Optimizer

from egspo_lightning.checkpointing.adapt import adapt_optimizer, number_parameters
from egspo_lightning.errors import UserError
from egspo_lightning.models import lora


def frozen_under_adapters(module: nn.Module) -> set[str]:
    """Names of the weights that adapters leave frozen: a resumed run loads them from the model again."""
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    return {name for name in module.state_dict() if name not in trained and not lora.is_adapter(name)}


def require_same_reference(*, began_with_egspo: bool, base_is_reference: bool) -> None:
    """Check that checkpoint and run with adapters have the same reference policy.

    Args:
        began_with_egspo: whether the checkpoint's run began with stage EGSPO
        base_is_reference: whether this run's reference policy is the model without its adapter

    Raises:
        UserError: only one of them has SFT before EGSPO.
    """
    if base_is_reference and not began_with_egspo:
        raise UserError(
            "model.initial_stage: egspo takes the model without its adapter as the reference, but the checkpoint's "
            "adapter was trained by SFT, and its reference is the adapter of the end of SFT. Set "
            "model.initial_stage to sft: the run goes on in the checkpoint's stage all the same."
        )
    if began_with_egspo and not base_is_reference:
        raise UserError(
            "model.initial_stage: sft keeps the adapter of the end of SFT as the reference, but the checkpoint's "
            "run began with stage EGSPO, and its reference is the model without adapter. Set model.initial_stage "
            "to egspo."
        )


def fit_optimizer_states(
    checkpoint: dict[str, Any], module: nn.Module, trained: list[nn.Parameter], optimizer: Optimizer, *, is_entry: bool
) -> None:
    """Change the optimizer states of a checkpoint, in place, to those of this run's optimizer.

    Args:
        checkpoint: as Lightning has loaded it
        module: names the parameters
        trained: the optimizer's parameters, in its order
        optimizer: a new one of this run
        is_entry: whether the checkpoint was saved on entering stage EGSPO
    """
    states, saved_kind = checkpoint["optimizer_states"], checkpoint["egspo"].get("optimizer")
    numbers = {id(parameter): number for number, parameter in enumerate(trained)}
    number_parameters(states, {name: numbers[id(p)] for name, p in module.named_parameters() if id(p) in numbers})
    adapt_optimizer(states, saved_kind, optimizer.state_dict(), type(optimizer).__name__, is_entry=is_entry)


def random_state_of_rank(states: list[Any], rank: int, world_size: int) -> dict[str, Any] | None:
    """The saved random state of one rank; None where the checkpoint has none for it."""
    if len(states) not in (0, world_size):
        rank_zero_info(
            f"The checkpoint was written on {len(states)} ranks, and this run has {world_size}: it goes on with "
            "the same data, but sums over ranks are rounded otherwise, so it is not bit-identical."
        )
    return states[rank] if rank < len(states) else None
