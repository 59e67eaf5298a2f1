"""Whole weights of a policy, for an engine with a copy of its own: gathered and merged one at a time."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from egspo_lightning.models.lora_merge import merging


def whole_weights(lm: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters under the names of transformers, each as a whole tensor with its adapter merged.

    A sharded parameter is gathered when it is its turn. The caller drops each tensor before it asks for the next, so
    memory grows by one parameter, or by one layer with adapters. Gathering is collective: all ranks must take all
    parameters, which come in the same order everywhere.
    """
    is_tied = getattr(lm.config.get_text_config(), "tie_word_embeddings", True)
    parameters = dict(lm.named_parameters(remove_duplicate=is_tied))  # an adapted embedding unties the output layer
    return merging(lm, parameters, lambda name: _whole(parameters[name].detach()))


def _whole(weight: Tensor) -> Tensor:
    """The whole tensor; that of a shard is new, on the device that computes.

    Each rank broadcasts its shard: gloo's all-gather, and so ``full_tensor``, would hold the whole tensor twice.
    """
    if not isinstance(weight, DTensor):
        return weight
    assert weight.placements == (Shard(0),), "FSDP2 shards the first dimension"
    mesh, own = weight.device_mesh, weight.to_local()
    whole = torch.empty(weight.shape, dtype=weight.dtype, device=mesh.device_type)
    for rank, part in enumerate(whole.chunk(mesh.size())):
        if rank == mesh.get_local_rank():
            part.copy_(own)
        torch.distributed.broadcast(part, group=mesh.get_group(), group_src=rank)
    return whole


def compute_device(network: nn.Module) -> torch.device:
    """The device on which a network computes; an offloaded shard lies on another one."""
    weight = next(network.parameters())
    if not isinstance(weight, DTensor) or weight.device_mesh.device_type == "cpu":
        return weight.device
    return torch.device(weight.device_mesh.device_type, torch.accelerator.current_device_index())


def compute_dtype(network: nn.Module) -> torch.dtype:
    """The dtype in which a network computes."""
    device = compute_device(network)
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    dtype: torch.dtype = next(network.parameters()).dtype
    return dtype
