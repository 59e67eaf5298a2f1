"""Collective operations over the ranks of a run. All ranks must call them together."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from egspo_lightning.ops.diagnostics import Metrics, Reduction


class Collectives(LightningModule):
    """Adds collective operations to a LightningModule."""

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Sum equally shaped tensors over all ranks."""
        if self.trainer.world_size == 1:
            return values
        return self.trainer.strategy.all_gather(values.to(self.device)).sum(0)

    def collect_over_ranks(self, value: Any) -> list[Any]:
        """Gather one picklable value from each rank, in the order of the ranks."""
        collected = [value] * self.trainer.world_size
        if self.trainer.world_size > 1:
            torch.distributed.all_gather_object(collected, value)
        return collected

    def gather_over_ranks(self, values: Tensor) -> Tensor:
        """Concatenate vectors of different lengths over all ranks."""
        if self.trainer.world_size == 1:
            return values
        return torch.cat([part.to(values.device) for part in self.collect_over_ranks(values.cpu())])

    def reduce_over_ranks(self, metrics: Mapping[Reduction, Metrics]) -> dict[str, float]:
        """Means and maxima of metrics over all ranks, in one collective."""
        keys = sorted((reduction, name) for reduction, found in metrics.items() for name in found)
        own = torch.stack([metrics[reduction][name].to(self.device) for reduction, name in keys])
        ranks = own.unsqueeze(0) if self.trainer.world_size == 1 else self.trainer.strategy.all_gather(own)
        both = zip(keys, ranks.mean(0).tolist(), ranks.amax(0).tolist(), strict=True)
        return {name: largest if reduction == "max" else mean for (reduction, name), mean, largest in both}
