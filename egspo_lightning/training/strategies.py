"""Supported strategies of Lightning, and refusals of the others with an alternative.

| strategy | meaning |
|---|---|
| auto, single_device | one process |
| ddp, ddp_find_unused_parameters_* | whole networks on every rank, gradients averaged |
| fsdp2, fsdp (`FSDP2Strategy`) | weights, gradients and optimizer sharded over all ranks |
| fsdp2_cpu_offload, fsdp_cpu_offload | the same, with the shards in the host's memory |
| all others | refused at the start, see ``REFUSED`` |

Checkpoints of any of these resume under any other.
"""

from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
    StrategyRegistry,
)
from lightning.pytorch.strategies.xla import XLAStrategy
from lightning.pytorch.utilities import rank_zero_info

from egspo_lightning.errors import UserError
from egspo_lightning.models.fsdp import ShardingPlan
from egspo_lightning.training.fsdp2_strategy import AnyCheckpointIO, FSDP2Strategy

REFUSED: dict[type[Strategy], tuple[str, str]] = {
    FSDPStrategy: (
        "keeps weights in flat buffers, so ranks cannot sample different lengths and no parameter can be left out of "
        "an optimizer step",
        "fsdp2, which shards the same things, or fsdp2_cpu_offload, with the shards in the host's memory",
    ),
    DeepSpeedStrategy: (
        "keeps gradients and moments in its own buffers, so no optimizer step can be skipped, and the optimizer cannot "
        "restart at the end of SFT",
        "fsdp2: with reshard_after_forward false it shards like ZeRO stage 2, else like stage 3",
    ),
    ModelParallelStrategy: (
        "changes an optimizer that has not stepped yet by saving it, and cannot resume other strategies' checkpoints",
        "fsdp2 (egspo_lightning.training.fsdp2_strategy.FSDP2Strategy), which can, and needs no sizes",
    ),
    XLAStrategy: ("compiles fixed shapes, and completions have many lengths", "ddp or fsdp2 on GPUs"),
}
"""Strategy to the reason of its refusal, and the alternative."""


TRAINED_AS = {"fsdp": "fsdp2", "fsdp_cpu_offload": "fsdp2_cpu_offload"}
"""Names of PyTorch's first version of FSDP, and the strategy that trains instead."""


def offered_name(flag: Any) -> Any:
    """The strategy that trains under a flag: FSDP2 for the names of FSDP1, with one line that says so."""
    if not isinstance(flag, str) or flag not in TRAINED_AS:
        return flag
    name = TRAINED_AS[flag]
    rank_zero_info(f"trainer.strategy: {flag} trains as {name}, PyTorch's second version of FSDP.")
    return name


def require_known(flag: Any) -> None:
    """Refuse a strategy by its name, before anything is built.

    Raises:
        UserError: the name belongs to one of ``REFUSED``.
    """
    if isinstance(flag, str) and flag in StrategyRegistry.available_strategies():
        _require_offered(StrategyRegistry[flag]["strategy"])


def _require_offered(chosen: type[Strategy]) -> None:
    for kind, (reason, remedy) in REFUSED.items():
        if issubclass(chosen, kind) and not issubclass(chosen, FSDP2Strategy):
            raise UserError(f"trainer.strategy: {kind.__name__} {reason}. Use {remedy}.")


def require_strategy(trainer: Trainer) -> None:
    """Refuse an unsupported strategy or precision, and let the strategy read the checkpoints of all others.

    Raises:
        UserError: the strategy is one of ``REFUSED`` or does not support the start method or precision, or the
            precision would round the old log-probabilities of the rollouts.
    """
    strategy, precision = trainer.strategy, str(trainer.precision)
    _require_offered(type(strategy))
    if isinstance(strategy, DDPStrategy) and strategy._start_method != "popen":
        raise UserError(
            f"trainer.strategy: ddp with the start method {strategy._start_method!r} pickles the run for its ranks and "
            "gets nothing back, so metrics, tables and export would be lost. Use ddp, from a script or a terminal."
        )
    if isinstance(strategy, FSDP2Strategy) and precision.startswith("16"):
        raise UserError(
            f"trainer.precision {precision} scales the loss on each rank by itself, which sharded gradients do not "
            "allow. Use bf16-mixed, or 32-true."
        )
    if precision in ("bf16-true", "16-true"):
        raise UserError(
            f"trainer.precision {precision} rounds old log-probabilities and advantages to half precision. Use "
            "bf16-mixed, or 32-true with model.policy.dtype: bfloat16 for weights in half precision."
        )
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = AnyCheckpointIO()


def sharding_plan(trainer: Trainer) -> ShardingPlan:
    """The sharding plan of the run's strategy and precision."""
    return ShardingPlan(
        torch.bfloat16 if str(trainer.precision) == "bf16-mixed" else None,
        reshard_after_forward=getattr(trainer.strategy, "reshard_after_forward", True),
        cpu_offload=getattr(trainer.strategy, "cpu_offload", False),
    )
