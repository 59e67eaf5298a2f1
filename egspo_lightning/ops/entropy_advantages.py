"""Advantages that differ by token or follow the entropy: GTPO, GRPO-S, and HAPO's average over tokens.

A group of G completions lies in consecutive rows, and all statistics are those of one group.
"""

import torch
from torch import Tensor

from egspo_lightning.ops.advantages import group_relative
from egspo_lightning.ops.masking import Values, as_floats, as_tensor, masked_mean, masked_sum

RIGHT_ABOVE = 0.5
"""A completion counts as right if its reward is above it, for rewards of 0 and 1."""
MAX_TOKEN_ADVANTAGE = 5.0


def gtpo(
    rewards: Values,
    entropies: Values,
    mask: Values,
    group_size: int,
    *,
    alpha1: float = 1.0,
    alpha2: float = 0.1,
    eps: float = 1e-8,
) -> Tensor:
    """GTPO's advantage of each token: ``gtpo_rewards``, whitened within the group (arXiv 2508.04349). (B, T)

    Tokens of right and of wrong answers are whitened apart, ``(x - mean) / sqrt(var + eps)`` with the biased variance,
    so a group of equal rewards still has advantages, from entropies alone. 0 outside the mask. The paper and the
    implementation in textpolicy do so; another, in Miner, whitens over the whole batch.
    """
    shaped = gtpo_rewards(rewards, entropies, mask, group_size, alpha1=alpha1, alpha2=alpha2, eps=eps)
    right, valid = _right_tokens(rewards, mask, group_size)
    advantages = torch.zeros_like(shaped)
    for side in (valid & right, valid & ~right):
        by_group, inside = shaped.view_as(side).flatten(1), side.flatten(1)
        centered = by_group - masked_mean(by_group, inside, 1).unsqueeze(1)
        centered = centered - masked_mean(centered, inside, 1).unsqueeze(1)  # again, for the rounding error of the mean
        variance = masked_mean(centered.square(), inside, 1).unsqueeze(1)
        whitened = centered * torch.rsqrt(variance + eps)
        advantages = torch.where(side.view_as(shaped), whitened.view_as(shaped), advantages)
    return advantages


def gtpo_rewards(
    rewards: Values,
    entropies: Values,
    mask: Values,
    group_size: int,
    *,
    alpha1: float,
    alpha2: float,
    eps: float = 1e-8,
) -> Tensor:
    """GTPO's reward of each token, which the token's entropy H shapes. (B, T)

    Right answers: ``alpha1 R + alpha2 d_t H_it / sum_k H_kt``, where k runs over the group's d_t right answers that
    have a token at position t. Wrong answers: ``-alpha1 - alpha2 h_t (1 / H_it) / sum_k (1 / H_kt)``, where k runs over
    the h_t wrong ones.

    Args:
        rewards: (B,)
        entropies, mask: (B, T), nats, of the sampling policy
        group_size: G
        alpha1: weight of the reward
        alpha2: weight of the entropy
        eps: added to H, and lower bound of the sums
    """
    right, valid = _right_tokens(rewards, mask, group_size)
    groups = as_floats(entropies).detach().view_as(valid)
    given = as_floats(rewards).view(-1, group_size, 1)
    positive = alpha1 * given + alpha2 * _relative_to_peers(groups, valid & right, eps)
    negative = -alpha1 - alpha2 * _relative_to_peers(1 / (groups + eps), valid & ~right, eps)
    return torch.where(right, positive, negative).flatten(0, 1)


def grpo_s(
    rewards: Values,
    entropies: Values,
    mask: Values,
    group_size: int,
    *,
    beta1: float = 1.0,
    beta2: float = 0.1,
    eps: float = 1e-6,
) -> Tensor:
    """GRPO-S's advantage of each completion, from its mean entropy H_i (arXiv 2508.04349). (B,)

    The reward ``beta1 + beta2 n H_i / sum_k H_k`` over the n right answers of the group, or
    ``-beta1 - beta2 n (1 / H_i) / sum_k (1 / H_k)`` over its n wrong ones, normalized as by GRPO:
    ``(s - mean) / (std + eps)``, with the unbiased std. A group of equal rewards still has advantages, from entropies
    alone. The arguments are those of ``gtpo_rewards``.
    """
    right = (as_floats(rewards) > RIGHT_ABOVE).view(-1, group_size)
    means = masked_mean(as_floats(entropies).detach(), mask, -1).view(-1, group_size)
    positive = beta1 + beta2 * _relative_to_peers(means, right, eps)
    negative = -beta1 - beta2 * _relative_to_peers(1 / (means + eps), ~right, eps)
    return group_relative(torch.where(right, positive, negative).flatten(), group_size, eps=eps)


def token_group_relative(
    rewards: Values, mask: Values, group_size: int, *, scale_by_std: bool = True, eps: float = 1e-6
) -> Tensor:
    """HAPO's ``(R - mean) / (std + eps)`` over all tokens of the group (arXiv 2509.16591). (B,)

    A completion counts once for each of its tokens in mean and (biased) std. A group with an advantage of 5 or more in
    size takes ``group_relative`` instead. The arguments are those of ``group_relative``, with the (B, T) mask.
    """
    plain = group_relative(rewards, group_size, scale_by_std=scale_by_std, eps=eps).view(-1, group_size)
    groups = as_floats(rewards).view(-1, group_size)
    lengths = as_tensor(mask).bool().sum(-1).view_as(groups).to(groups.dtype)
    shares = lengths / lengths.sum(-1, keepdim=True).clamp(min=1)
    centered = groups - (shares * groups).sum(-1, keepdim=True)
    if scale_by_std:
        centered = centered / ((shares * centered.square()).sum(-1, keepdim=True).sqrt() + eps)
    is_extreme = (centered.abs() >= MAX_TOKEN_ADVANTAGE).any(-1, keepdim=True)
    return torch.where(is_extreme, plain, centered).flatten()


def _right_tokens(rewards: Values, mask: Values, group_size: int) -> tuple[Tensor, Tensor]:
    """Which completions are right, (P, G, 1), and the mask by group, (P, G, T); both bool."""
    right = as_floats(rewards) > RIGHT_ABOVE
    return right.view(-1, group_size, 1), as_tensor(mask).bool().view(-1, group_size, as_tensor(mask).shape[-1])


def _relative_to_peers(values: Tensor, peers: Tensor, eps: float) -> Tensor:
    """Each value over the mean of the peers in its group, dimension 1."""
    total = masked_sum(values, peers, 1).clamp(min=eps)
    return values * (peers.sum(1) / total).unsqueeze(1)
