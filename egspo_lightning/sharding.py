"""FSDP2: how a policy is cut into shards, and how it is made whole for sampling."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from egspo_lightning.policy import Policy


def shard(policy: Policy, mesh: DeviceMesh) -> None:
    """Shard each transformer block, and what is left (embeddings, final norm, head) with the policy as the root."""
    names = set(policy.lm._no_split_modules or ())
    for module in policy.lm.modules():
        if type(module).__name__ in names:
            fully_shard(module, mesh=mesh)
    fully_shard(policy, mesh=mesh)


@contextmanager
def gathered(policy: Policy) -> Iterator[None]:
    """Hold all weights on every rank, so that ranks may run different numbers of forward passes; collective.

    Does nothing for a policy that is not sharded.
    """
    shards = [module for module in policy.modules() if isinstance(module, FSDPModule)]
    if not shards:
        yield
        return
    _make_root(policy)
    for module in shards:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in shards:
            module.reshard()
            module.set_reshard_after_forward(module is not policy, recurse=False)


def _make_root(policy: nn.Module) -> None:
    """A first forward pass through the whole: FSDP2 takes the module that it first sees running for the root."""
    device = next(policy.parameters()).device
    probe = torch.zeros(1, 2, dtype=torch.long, device=device)
    with torch.no_grad():
        policy(probe, probe.bool().index_fill(1, torch.tensor([1], device=device), True))
