"""Advantage estimators over the rewards of a group: G completions of one problem, side by side."""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from egspo_lightning.ops.masking import Values, as_tensor


def group_relative(rewards: Values, group_size: int, *, scale_by_std: bool = True, eps: float = 1e-6) -> Tensor:
    """GRPO's advantage ``(R - mean) / (std + eps)`` within each group (arXiv 2402.03300, section 4.1.2).

    The std is the unbiased one. A group without spread gets exactly 0: it says nothing of what is better. Without
    ``scale_by_std`` it is Dr. GRPO's ``R - mean`` (arXiv 2503.20783).

    Args:
        rewards: (P * G,), the G completions of a problem next to one another
        group_size: G, at least 2
        scale_by_std: whether to divide by the group's std
        eps: added to the std
    """
    groups = _as_groups(rewards, group_size)
    centred = groups - groups.mean(-1, keepdim=True)
    has_spread = groups.amax(-1, keepdim=True) > groups.amin(-1, keepdim=True)
    if scale_by_std:
        centred = centred / (groups.std(-1, keepdim=True) + eps)
    return torch.where(has_spread, centred, torch.zeros_like(centred)).flatten()


def leave_one_out(rewards: Values, group_size: int) -> Tensor:
    """RLOO's advantage: the reward minus the mean of the others in the group (arXiv 2402.14740).

    ``A_i = R_i - (sum_j R_j - R_i) / (G - 1) = (R_i - mean) * G / (G - 1)``.

    Args:
        rewards: (P * G,), the G completions of a problem next to one another
        group_size: G, at least 2
    """
    groups = _as_groups(rewards, group_size)
    centred = (groups - groups.mean(-1, keepdim=True)) * (group_size / (group_size - 1))
    has_spread = groups.amax(-1, keepdim=True) > groups.amin(-1, keepdim=True)
    return torch.where(has_spread, centred, torch.zeros_like(centred)).flatten()


def _as_groups(rewards: Values, group_size: int) -> Tensor:
    rewards = as_tensor(rewards)
    rewards = rewards if rewards.dtype == torch.float64 else rewards.float()
    if group_size < 2 or rewards.ndim != 1 or rewards.numel() % group_size:
        raise ValueError(
            f"rewards must be (P * group_size,) with group_size >= 2, got {tuple(rewards.shape)} and {group_size}"
        )
    return rewards.view(-1, group_size)


class Advantage(Protocol):
    """Turns the rewards of a collection into advantages."""

    @property
    def min_generations(self) -> int:
        """The least number of completions a problem that it works with."""
        ...

    def estimate(self, rewards: Tensor, group_size: int) -> Tensor:
        """(P * G,) rewards, the G completions of a problem next to one another, to (P * G,) advantages."""
        ...


@dataclass(frozen=True)
class GroupRelative:
    """GRPO's advantage (default), see ``group_relative``.

    Args:
        scale_by_std: Divide by the group's standard deviation; without it the advantage is Dr. GRPO's.
    """

    scale_by_std: bool = True
    min_generations: ClassVar[int] = 2

    def estimate(self, rewards: Tensor, group_size: int) -> Tensor:
        """See ``group_relative``."""
        return group_relative(rewards, group_size, scale_by_std=self.scale_by_std)


@dataclass(frozen=True)
class LeaveOneOut:
    """RLOO's advantage, see ``leave_one_out``."""

    min_generations: ClassVar[int] = 2

    def estimate(self, rewards: Tensor, group_size: int) -> Tensor:
        """See ``leave_one_out``."""
        return leave_one_out(rewards, group_size)
