"""FSDP2 sharding: shards networks over ranks, and gathers their weights for sampling and scoring."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from egspo_lightning.models.policy import Policy, ValueHead
from egspo_lightning.models.whole_weights import compute_device


@dataclass(frozen=True)
class ShardingPlan:
    """How networks are sharded.

    Args:
        param_dtype: Type in which weights are gathered and computed; None keeps the type of the shards.
        reshard_after_forward: See ``FSDP2Strategy``.
        cpu_offload: See ``FSDP2Strategy``; a block's shard is copied to the device when it is gathered.
    """

    param_dtype: torch.dtype | None = None
    reshard_after_forward: bool = True
    cpu_offload: bool = False

    @property
    def precision(self) -> MixedPrecisionPolicy:
        """FSDP2's precision: gradients are summed over ranks in float32, whatever the weights are gathered in."""
        return MixedPrecisionPolicy(self.param_dtype, None if self.param_dtype is None else torch.float32)

    def offloading(self, device_type: str) -> OffloadPolicy:
        """FSDP2's offload policy; memory is pinned for devices other than the CPU: copies then overlap computation."""
        return CPUOffloadPolicy(pin_memory=device_type != "cpu") if self.cpu_offload else OffloadPolicy()


def shard(network: nn.Module, mesh: DeviceMesh, plan: ShardingPlan = ShardingPlan()) -> None:
    """Shard each transformer block, and the rest (embeddings, final norm, heads) with the network as the root.

    A value head stays in float32, in which ``ValueHead`` computes.
    """
    names = {name for module in network.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    settings: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": plan.reshard_after_forward,
        "offload_policy": plan.offloading(mesh.device_type),
    }
    for module in network.modules():
        if isinstance(module, ValueHead):  # whose type may differ from the trunk's
            fully_shard(module, mp_policy=MixedPrecisionPolicy(), **settings)
        elif type(module).__name__ in names:
            fully_shard(module, mp_policy=plan.precision, **settings)
    fully_shard(network, mp_policy=plan.precision, **settings)
    passes: Any = network.passes
    passes.splits_rows = False
    if isinstance(network, Policy):
        register_fsdp_forward_method(network, Policy.together.__name__)


@contextmanager
def gathered(network: nn.Module, plan: ShardingPlan = ShardingPlan()) -> Iterator[None]:
    """Gather all weights on every rank, so that ranks may run different numbers of forward passes; collective.

    Does nothing for a network that is not sharded.
    """
    shards = [module for module in network.modules() if isinstance(module, FSDPModule)]
    if not shards:
        yield
        return
    _make_root(network)
    for module in shards:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in shards:
            module.reshard()
            keeps = module is network or not plan.reshard_after_forward
            module.set_reshard_after_forward(not keeps, recurse=False)


def _make_root(network: nn.Module) -> None:
    """Run a forward pass through the whole network: FSDP2 takes the first module that runs as the root."""
    device = compute_device(network)
    probe = torch.zeros(1, 2, dtype=torch.long, device=device)
    with torch.no_grad():
        network(probe, probe.bool().index_fill(1, torch.tensor([1], device=device), True))
