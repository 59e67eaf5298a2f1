"""Records as dictionaries of tensors and numbers, which ``torch.load(weights_only=True)`` reads from a checkpoint."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from egspo_lightning.types import ExpertBatch, NetworkOutputs, RolloutBatch, ScoredRollouts, Stage, UpdateSize

RecordT = TypeVar("RecordT")
FIELDS: dict[str, Callable[..., Any]] = {
    "batch": RolloutBatch,
    "expert": ExpertBatch,
    "rollout": RolloutBatch,
    "rollouts": ScoredRollouts,
    "scores": NetworkOutputs,
    "update_size": UpdateSize,
}
"""Fields that are records themselves, in any record."""


def to_plain(value: Any) -> Any:
    """A named tuple as a dictionary, with the named tuples in its fields; tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.cpu()
    if hasattr(value, "_asdict"):
        return {name: to_plain(field) for name, field in value._asdict().items()}
    return str(value) if isinstance(value, Stage) else value


def from_plain(kind: Callable[..., RecordT], fields: Mapping[str, Any], device: torch.device | str = "cpu") -> RecordT:
    """The record of ``to_plain``, its tensors on a device."""

    def restore(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        return from_plain(FIELDS[name], value, device) if name in FIELDS and value is not None else value

    return kind(**{name: restore(name, value) for name, value in fields.items()})
