"""Advantages from rewards: pure functions. ``ops.estimators`` has the classes that a config names."""

import torch
from torch import Tensor

from egspo_lightning.ops.masking import Total, Values, as_floats, as_tensor, masked_whiten, on_one_rank


def group_relative(rewards: Values, group_size: int, *, scale_by_std: bool = True, eps: float = 1e-6) -> Tensor:
    """GRPO's advantage ``(R - mean) / (std + eps)`` within each group (arXiv 2402.03300, section 4.1.2).

    The std is the unbiased one. A flat group gets exactly 0. Without ``scale_by_std`` the advantage is Dr. GRPO's
    ``R - mean`` (arXiv 2503.20783).

    Args:
        rewards: (P * G,), the G completions of a problem in consecutive rows
        group_size: G, at least 2
        scale_by_std: divide by ``std + eps`` of the group
    """
    groups = _as_groups(rewards, group_size)
    centered = groups - groups.mean(-1, keepdim=True)
    if scale_by_std:
        centered = centered / (groups.std(-1, keepdim=True) + eps)
    return torch.where(_has_spread(groups), centered, torch.zeros_like(centered)).flatten()


def leave_one_out(rewards: Values, group_size: int) -> Tensor:
    """RLOO's advantage: the reward minus the mean of the other rewards in the group (arXiv 2402.14740).

    ``A_i = R_i - (sum_j R_j - R_i) / (G - 1) = (R_i - mean) * G / (G - 1)``. The arguments are those of
    ``group_relative``.
    """
    return group_relative(rewards, group_size, scale_by_std=False) * (group_size / (group_size - 1))


def against_group(
    expert_rewards: Values, group_rewards: Values, *, scale_by_std: bool = True, eps: float = 1e-6
) -> Tensor:
    """Advantage of an expert's solution over the policy's own completions: ``(R* - mean) / (std + eps)``. (P,)

    Mean and std are those of the on-policy group alone (ours; LUFFY, arXiv 2504.14945, pools both), so the expert does
    not move the policy's own baseline. A flat group has no scale; there the advantage is ``R* - mean``.

    Args:
        expert_rewards: (P,)
        group_rewards: (P, G), G at least 2
        scale_by_std: divide by ``std + eps`` of the group
    """
    groups = as_floats(group_rewards)
    centered = as_floats(expert_rewards) - groups.mean(-1)
    if not scale_by_std:
        return centered
    return torch.where(_has_spread(groups).squeeze(-1), centered / (groups.std(-1) + eps), centered)


def gae(
    token_rewards: Values, values: Values, mask: Values, *, gamma: float, lam: float, total: Total = on_one_rank
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (arXiv 1506.02438, equation 16), as (advantages, returns), both (B, T).

    ``A_t = sum_k (gamma lam)^k delta_{t+k}`` with ``delta_t = r_t + gamma V_{t+1} - V_t`` and V = 0 after the last
    token. The returns ``A_t + V_t`` are formed before the advantages are whitened over the mask. The sum skips tokens
    outside the mask; they are 0 in both results.

    Args:
        token_rewards, mask: (B, T)
        values: (B, T), of the state before each token
        gamma: discount per token, in [0, 1]
        lam: lambda, in [0, 1]: 0 trusts the critic, 1 the rewards
        total: adds a scalar over all ranks
    """
    rewards, values, mask = as_floats(token_rewards), as_floats(values), as_tensor(mask).bool()
    next_values, next_value = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        next_values[:, t] = next_value
        next_value = torch.where(mask[:, t], values[:, t], next_value)
    advantages = _discounted_sum(rewards + gamma * next_values - values, mask, gamma * lam)
    returns = torch.where(mask, advantages + values, torch.zeros_like(values))
    return masked_whiten(advantages, mask, total=total), returns


def reinforce_plus_plus(token_rewards: Values, mask: Values, *, gamma: float, total: Total = on_one_rank) -> Tensor:
    """REINFORCE++'s advantage: the discounted reward to go, whitened over the batch (arXiv 2501.03262). (B, T)

    The arguments are those of ``gae``.
    """
    mask = as_tensor(mask).bool()
    return masked_whiten(_discounted_sum(as_floats(token_rewards), mask, gamma), mask, total=total)


def _discounted_sum(terms: Tensor, mask: Tensor, discount: float) -> Tensor:
    """``sum_k discount^k terms_{t+k}`` over the tokens of the mask, (B, T)."""
    sums, following = torch.zeros_like(terms), torch.zeros_like(terms[:, 0])
    for t in reversed(range(terms.shape[1])):
        following = torch.where(mask[:, t], terms[:, t] + discount * following, following)
        sums[:, t] = following
    return sums


def _has_spread(groups: Tensor) -> Tensor:
    """(P, G) to (P, 1)"""
    return groups.amax(-1, keepdim=True) > groups.amin(-1, keepdim=True)


def _as_groups(rewards: Values, group_size: int) -> Tensor:
    rewards = as_floats(rewards)
    if group_size < 2 or rewards.ndim != 1 or rewards.numel() % group_size:
        raise ValueError(
            f"rewards must be (P * group_size,) with group_size >= 2, got {tuple(rewards.shape)} and {group_size}"
        )
    return rewards.view(-1, group_size)
