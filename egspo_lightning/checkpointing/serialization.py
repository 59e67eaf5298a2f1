"""Batches as dictionaries of tensors and numbers, which ``torch.load(weights_only=True)`` reads from a checkpoint."""

from typing import Any, TypeVar

import torch
from torch import Tensor

from egspo_lightning.types import ExpertBatch, RolloutBatch, ScoredRollouts, Scores, UpdateSize

BatchT = TypeVar("BatchT", RolloutBatch, ExpertBatch, ScoredRollouts)
PARTS: dict[str, Any] = {"update_size": UpdateSize, "scores": Scores}
"""Fields that are records themselves."""


def to_plain(batch: RolloutBatch | ExpertBatch | ScoredRollouts) -> dict[str, Any]:
    """The batch, its tensors on the CPU."""
    return {
        name: [_on(part, "cpu") for part in value] if name in PARTS else _on(value, "cpu")
        for name, value in batch._asdict().items()
    }


def from_plain(kind: type[BatchT], fields: dict[str, Any], device: torch.device | str = "cpu") -> BatchT:
    """The batch again, its tensors on a device."""
    placed: dict[str, Any] = {
        name: PARTS[name](*(_on(part, device) for part in value)) if name in PARTS else _on(value, device)
        for name, value in fields.items()
    }
    return kind(**placed)


def _on(value: Any, device: torch.device | str) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
