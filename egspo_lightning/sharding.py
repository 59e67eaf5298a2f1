"""FSDP2: how a policy is cut into shards, and how it is made whole for sampling."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from egspo_lightning.policy import Policy, ValueHead


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Shard each transformer block, and what is left (embeddings, final norm, heads) with the network as the root."""
    names = {name for module in network.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    for module in network.modules():
        if type(module).__name__ in names or isinstance(module, ValueHead):  # whose type is not that of the trunk
            fully_shard(module, mesh=mesh)
    fully_shard(network, mesh=mesh)
    if isinstance(network, Policy):
        network.splits_rows = False


@contextmanager
def gathered(network: nn.Module) -> Iterator[None]:
    """Hold all weights on every rank, so that ranks may run different numbers of forward passes; collective.

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
            module.set_reshard_after_forward(module is not network, recurse=False)


def _make_root(network: nn.Module) -> None:
    """A first forward pass through the whole: FSDP2 takes the module that it first sees running for the root."""
    device = next(network.parameters()).device
    probe = torch.zeros(1, 2, dtype=torch.long, device=device)
    with torch.no_grad():
        network(probe, probe.bool().index_fill(1, torch.tensor([1], device=device), True))
