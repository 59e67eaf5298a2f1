"""Inference context for networks in training: eval mode, no gradients, training precision, gathered weights."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch

from egspo_lightning.models.fsdp import ShardingPlan, gathered


class InferenceMode:
    """Puts networks into eval mode and gathers their shards; may be entered again within itself."""

    def __init__(self) -> None:
        self._held: list[Any] = []

    @contextmanager
    def hold(self, networks: list[Any], precision: AbstractContextManager[Any], plan: ShardingPlan) -> Iterator[None]:
        """Hold networks whole and in eval mode, in the training precision; skip those that an outer call holds.

        With sharded networks, all ranks must enter together.
        """
        fresh = [network for network in networks if network not in self._held]
        was_training = [network.training for network in fresh]
        for network in fresh:
            network.eval()  # gradient checkpointing in train mode breaks the cache
        self._held += fresh
        try:
            with ExitStack() as stack:
                stack.enter_context(torch.no_grad())
                stack.enter_context(precision)
                for network in fresh:
                    stack.enter_context(gathered(network, plan))
                yield
        finally:
            for network, training in zip(fresh, was_training, strict=True):
                self._held.remove(network)
                network.train(training)
