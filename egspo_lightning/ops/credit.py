"""From the rewards of a collection to what each token is credited with: A_t, and the returns of a critic."""

import torch
from torch import Tensor

from egspo_lightning.ops.estimators import Advantage, Estimate, Experience, ExpertAdvantage
from egspo_lightning.ops.losses import KLEstimator, kl_penalty
from egspo_lightning.ops.masking import Total
from egspo_lightning.types import ScoredRollouts


def reward_kl(rollouts: ScoredRollouts, estimator: KLEstimator) -> Tensor:
    """KL of the policy that sampled to the reference at each token, nats, 0 outside the completions. (B, T)"""
    scores = rollouts.scores
    assert scores.ref_logprobs is not None
    return kl_penalty(scores.logprobs, scores.ref_logprobs, estimator) * rollouts.completion_mask


def token_rewards(rewards: Tensor, mask: Tensor, penalty: Tensor | None = None) -> Tensor:
    """``-penalty_t`` at each token, plus the reward at the last. (B, T)

    Args:
        rewards: (B,)
        mask: (B, T); a row without tokens gets no reward
        penalty: (B, T), such as ``coefficient KL_t``, taken off where given
    """
    positions = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    last = positions == (mask * positions).amax(-1, keepdim=True)
    placed = rewards.unsqueeze(1) * last
    return placed if penalty is None else placed - penalty * mask


def estimate_credit(
    rollouts: ScoredRollouts, advantage: Advantage, *, penalty: Tensor | None, total: Total
) -> Estimate:
    """Advantages (and returns) of every row: the policy's by the estimator, the experts' against their group."""
    sampled = slice(0, rollouts.num_sampled)
    rewards = token_rewards(rollouts.rewards, rollouts.completion_mask, penalty)
    values = rollouts.scores.values
    estimate = advantage.estimate(
        Experience(
            token_rewards=rewards[sampled],
            mask=rollouts.completion_mask[sampled],
            values=None if values is None else values[sampled],
            group_size=rollouts.group_size,
            total=total,
        )
    )
    if rollouts.expert_groups.numel() == 0:
        return estimate
    groups = rollouts.rewards[sampled].view(-1, rollouts.group_size)[rollouts.expert_groups]  # no KL, as the expert's
    assert isinstance(advantage, ExpertAdvantage)
    expert = advantage.estimate_expert(rollouts.rewards[rollouts.num_sampled :], groups)
    expert_rows = expert.unsqueeze(1) * rollouts.completion_mask[rollouts.num_sampled :]
    return Estimate(torch.cat([estimate.advantages, expert_rows]), None)
