"""Builds the optimizer and the schedule that a config names, and refuses those that training cannot use."""

from collections.abc import Callable
from typing import Any

from torch.distributed.tensor import DTensor
from torch.optim import LBFGS, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from egspo_lightning.errors import UserError


def build_optimizer(factory: Callable[[Any], Optimizer], parameters: Any) -> Optimizer:
    """The optimizer over parameters or groups of them; Adam and AdamW in torch's fused form, unless they say otherwise.

    Raises:
        UserError: its arguments are out of range, it evaluates the loss several times a step, or it cannot step weights
            that are sharded.
    """
    try:
        optimizer = factory(parameters)
    except (ValueError, TypeError) as error:
        raise UserError(f"model.optimizer: {error}. Change its init_args.") from error
    if isinstance(optimizer, LBFGS):
        raise UserError(
            "model.optimizer: LBFGS evaluates the loss several times a step, so that no update could be "
            "skipped. Use one of a gradient a step, such as torch.optim.AdamW."
        )
    if any(isinstance(parameter, DTensor) for group in optimizer.param_groups for parameter in group["params"]):
        require_shardable(optimizer)
    _fuse(optimizer)
    return optimizer


def require_shardable(optimizer: Optimizer) -> None:
    """Refuse an optimizer for weights that are sharded, where it cannot step them.

    Raises:
        UserError: it is one of bitsandbytes, whose kernels take whole tensors alone.
    """
    if _package(optimizer) == "bitsandbytes":
        raise UserError(
            f"model.optimizer: {type(optimizer).__name__} of bitsandbytes cannot step weights that trainer.strategy "
            "fsdp2 shards. Use torch.optim.AdamW, whose moments are sharded as well, or trainer.strategy auto or ddp."
        )


def _package(optimizer: Optimizer) -> str:
    return type(optimizer).__module__.split(".")[0]


def _fuse(optimizer: Optimizer) -> None:
    """The same step in one kernel, a fraction of the time of torch's default where parameters are many and small."""
    if type(optimizer) not in (Adam, AdamW):
        return
    for group in optimizer.param_groups:
        is_open = group["fused"] is None and not group["foreach"]
        if is_open and all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in group["params"]):
            group["fused"] = True


def build_scheduler(factory: Callable[[Optimizer], Any], optimizer: Optimizer) -> Any:
    """The schedule of the learning rate, stepped once an update.

    Raises:
        UserError: its arguments are out of range, or it waits for a metric, which no update has.
    """
    try:
        scheduler = factory(optimizer)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"model.lr_scheduler: {error}. Change its init_args.") from error
    if isinstance(scheduler, ReduceLROnPlateau):
        raise UserError(
            "model.lr_scheduler: ReduceLROnPlateau answers to a metric, and schedules here are stepped once an update. "
            "Use one of the step, such as torch.optim.lr_scheduler.LinearLR."
        )
    return scheduler
