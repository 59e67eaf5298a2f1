"""Optimizers and learning-rate schedules: builds those of the config, and refuses unsupported ones."""

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import LBFGS, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from egspo_lightning.errors import UserError


def build_optimizer(factory: Callable[[Any], Optimizer], parameters: Any) -> Optimizer:
    """Build the optimizer over parameters or parameter groups; Adam and AdamW are fused, unless the config decides.

    Raises:
        UserError: its arguments are out of range, it evaluates the loss several times a step, or it cannot step sharded
            weights.
    """
    try:
        optimizer = factory(parameters)
    except (ValueError, TypeError) as error:
        raise UserError(f"model.optimizer: {error}. Change its init_args.") from error
    if isinstance(optimizer, LBFGS):
        raise UserError(
            "model.optimizer: LBFGS evaluates the loss several times a step, so no optimizer step could be skipped. "
            "Use an optimizer that takes one gradient a step, such as torch.optim.AdamW."
        )
    if any(isinstance(parameter, DTensor) for group in optimizer.param_groups for parameter in group["params"]):
        require_shardable(optimizer)
    for group in optimizer.param_groups if type(optimizer) in (Adam, AdamW) else ():
        is_open = group["fused"] is None and not group["foreach"]
        if is_open and all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in group["params"]):
            group["fused"] = True  # one kernel steps all parameters: much faster for many small ones
    return optimizer


def require_shardable(optimizer: Optimizer) -> None:
    """Refuse an optimizer that cannot step sharded weights.

    Raises:
        UserError: it comes from bitsandbytes, whose kernels take only whole tensors.
    """
    if type(optimizer).__module__.split(".")[0] == "bitsandbytes":
        raise UserError(
            f"model.optimizer: {type(optimizer).__name__} of bitsandbytes cannot step weights that trainer.strategy "
            "fsdp2 shards. Use torch.optim.AdamW, whose moments are sharded as well, or trainer.strategy auto or ddp."
        )


def build_scheduler(factory: Callable[[Optimizer], Any], optimizer: Optimizer) -> Any:
    """Build the learning-rate schedule, which advances once per optimizer step.

    Raises:
        UserError: its arguments are out of range, or it depends on a metric.
    """
    try:
        scheduler = factory(optimizer)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"model.lr_scheduler: {error}. Change its init_args.") from error
    if isinstance(scheduler, ReduceLROnPlateau):
        raise UserError(
            "model.lr_scheduler: ReduceLROnPlateau depends on a metric, and schedules advance once per optimizer step. "
            "Use a schedule over steps, such as torch.optim.lr_scheduler.LinearLR."
        )
    return scheduler


PROBED_STEPS = 1000
"""Optimizer steps over which two schedules are compared."""


def require_rate_kept(
    optimizer: Callable[[Any], Optimizer], scheduler: Callable[[Optimizer], Any], learning_rate: float
) -> None:
    """Refuse a learning rate of stage EGSPO that the schedule does not read.

    Two schedules, from the rate and from a tenth of it, must not have the same highest rate.

    Raises:
        UserError: the schedule sets the rate itself, as OneCycleLR and CyclicLR do.
    """
    if _highest_rate(optimizer, scheduler, learning_rate) != _highest_rate(optimizer, scheduler, learning_rate / 10):
        return
    name = type(build_scheduler(scheduler, _probe(optimizer, learning_rate))).__name__
    raise UserError(
        f"stage_transition.learning_rate = {learning_rate} has no effect with model.lr_scheduler {name}, which sets "
        "the learning rate itself. Leave learning_rate out, so that both stages follow the schedule, or use a schedule "
        "that multiplies the optimizer's rate, such as torch.optim.lr_scheduler.LinearLR."
    )


def _probe(factory: Callable[[Any], Optimizer], learning_rate: float) -> Optimizer:
    """The configured optimizer over one number, at a learning rate."""
    optimizer = build_optimizer(factory, [torch.nn.Parameter(torch.zeros(1))])
    optimizer.param_groups[0]["lr"] = learning_rate
    return optimizer


def _highest_rate(
    factory: Callable[[Any], Optimizer], scheduler: Callable[[Optimizer], Any], learning_rate: float
) -> float:
    """The highest learning rate of the first optimizer steps, or of all if the schedule ends earlier."""
    optimizer = _probe(factory, learning_rate)
    schedule, rates = build_scheduler(scheduler, optimizer), []
    for _ in range(PROBED_STEPS):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        try:
            schedule.step()
        except ValueError:  # OneCycleLR beyond total_steps
            break
    return max(rates)
