"""Batches as dictionaries of tensors and numbers, which ``torch.load(weights_only=True)`` reads from a checkpoint."""

from typing import Any, TypeVar

import torch
from torch import Tensor

from egspo_lightning.types import ExpertBatch, RolloutBatch, UpdateSize

BatchT = TypeVar("BatchT", RolloutBatch, ExpertBatch)


def to_plain(batch: RolloutBatch | ExpertBatch) -> dict[str, Any]:
    """The batch, its tensors on the CPU."""
    fields = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in batch._asdict().items()}
    return fields | {"update_size": [float(value) for value in batch.update_size]}


def from_plain(kind: type[BatchT], fields: dict[str, Any], device: torch.device | str = "cpu") -> BatchT:
    """The batch again, its tensors on a device."""
    placed: dict[str, Any] = {
        name: value.to(device) if isinstance(value, Tensor) else value for name, value in fields.items()
    }
    return kind(**(placed | {"update_size": UpdateSize(*fields["update_size"])}))
