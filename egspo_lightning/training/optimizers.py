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
    optimizer: Callable[[Any], Optimizer],
    scheduler: Callable[[Optimizer], Any],
    field: str,
    learning_rate: float,
    *,
    group: int = 0,
    num_groups: int = 1,
) -> None:
    """Refuse a learning rate of a parameter group that the schedule does not read.

    Two schedules, from the rate and from a tenth of it, must not have the same highest rate.

    Args:
        optimizer: makes the optimizer from parameter groups
        scheduler: makes the schedule
        field: the rate's name in the config
        learning_rate: the rate
        group: number of the group
        num_groups: groups of the run's optimizer

    Raises:
        UserError: the schedule sets the rate itself, as OneCycleLR and CyclicLR do.
    """
    probes = [_probe(optimizer, rate, num_groups) for rate in (learning_rate, learning_rate / 10)]
    schedules = [build_scheduler(scheduler, probe) for probe in probes]
    if len({_highest_rate(*pair, group) for pair in zip(probes, schedules, strict=True)}) == 1:
        raise UserError(
            f"{field} = {learning_rate} has no effect with model.lr_scheduler {type(schedules[0]).__name__}, which "
            "sets the learning rate itself. Leave it out to follow the schedule, or use a schedule that multiplies "
            "the optimizer's rate, such as torch.optim.lr_scheduler.LinearLR."
        )


def _probe(factory: Callable[[Any], Optimizer], learning_rate: float, num_groups: int) -> Optimizer:
    """The configured optimizer over one number in each group, at a learning rate."""
    numbers = [{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(num_groups)]
    optimizer = build_optimizer(factory, numbers)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    return optimizer


def _highest_rate(optimizer: Optimizer, schedule: Any, group: int) -> float:
    """The highest learning rate of the first optimizer steps, or of all if the schedule ends earlier."""
    rates = []
    for _ in range(PROBED_STEPS):
        rates.append(float(optimizer.param_groups[group]["lr"]))
        optimizer.step()
        try:
            schedule.step()
        except ValueError:  # OneCycleLR beyond total_steps
            break
    return max(rates)
