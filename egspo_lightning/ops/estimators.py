"""Advantage estimators that a config names, and the step from scored rollouts to A_t and returns."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from egspo_lightning.ops.advantages import against_group, gae, group_relative, leave_one_out, reinforce_plus_plus
from egspo_lightning.ops.losses import KLEstimator, kl_penalty
from egspo_lightning.ops.masking import Total, masked_sum
from egspo_lightning.types import ScoredRollouts, UnitInterval


class Experience(NamedTuple):
    """Input of an advantage estimator: one rank's completions, those of a problem in consecutive rows."""

    token_rewards: Tensor
    """(P * G, T): the reward at the last token, minus the KL penalty (if any) at every token"""
    mask: Tensor
    """(P * G, T) bool: completion tokens"""
    values: Tensor | None
    """(P * G, T) of the critic, if there is one"""
    group_size: int
    """G"""
    total: Total
    """Adds a tensor over all ranks."""
    entropies: Tensor
    """(P * G, T), nats, of the sampling policy"""

    @property
    def rewards(self) -> Tensor:
        """(P * G,): reward of each completion, minus its KL penalty."""
        return masked_sum(self.token_rewards, self.mask, -1)


class Estimate(NamedTuple):
    """Advantages and, for a critic, returns; both (P * G, T)."""

    advantages: Tensor
    returns: Tensor | None = None


class Advantage(Protocol):
    """Advantage estimator: turns the rewards of a rollout batch into advantages."""

    min_generations: ClassVar[int] = 1
    """Smallest group size G that it works with."""
    needs_values: ClassVar[bool] = False
    """Whether it needs a critic."""

    @abstractmethod
    def estimate(self, experience: Experience) -> Estimate:
        """Advantages of a rollout batch; entries outside the mask are ignored."""


@runtime_checkable
class ExpertAdvantage(Protocol):
    """An ``Advantage`` that also handles expert solutions among the rollouts."""

    def estimate_expert(self, rewards: Tensor, group_rewards: Tensor) -> Tensor:
        """(P,) advantages from the (P,) rewards of expert solutions and the (P, G) rewards of their groups."""


@dataclass(frozen=True)
class GroupRelative(Advantage):
    """GRPO's advantage (default), see ``ops.advantages.group_relative``.

    Args:
        scale_by_std: Divide by the group's standard deviation; without it the advantage is Dr. GRPO's.
    """

    scale_by_std: bool = True
    min_generations: ClassVar[int] = 2

    def estimate(self, experience: Experience) -> Estimate:
        """One advantage for all tokens of a completion."""
        per_row = group_relative(experience.rewards, experience.group_size, scale_by_std=self.scale_by_std)
        return Estimate(per_row.unsqueeze(1) * experience.mask)

    def estimate_expert(self, rewards: Tensor, group_rewards: Tensor) -> Tensor:
        """(P,) advantages of expert solutions, see ``against_group``."""
        return against_group(rewards, group_rewards, scale_by_std=self.scale_by_std)


@dataclass(frozen=True)
class LeaveOneOut(Advantage):
    """RLOO's advantage, see ``ops.advantages.leave_one_out``."""

    min_generations: ClassVar[int] = 2

    def estimate(self, experience: Experience) -> Estimate:
        """One advantage for all tokens of a completion."""
        per_row = leave_one_out(experience.rewards, experience.group_size)
        return Estimate(per_row.unsqueeze(1) * experience.mask)

    def estimate_expert(self, rewards: Tensor, group_rewards: Tensor) -> Tensor:
        """(P,) advantages of expert solutions: the reward minus the mean of the policy's own group."""
        return against_group(rewards, group_rewards, scale_by_std=False)


@dataclass(frozen=True)
class ReinforcePlusPlus(Advantage):
    """REINFORCE++'s advantage, see ``ops.advantages.reinforce_plus_plus``; a group may hold one completion.

    Args:
        gamma: Discount per token, in [0, 1].
    """

    gamma: UnitInterval = 1.0

    def estimate(self, experience: Experience) -> Estimate:
        """Advantages whitened over the rollout batch, on all ranks."""
        rewards, mask = experience.token_rewards, experience.mask
        return Estimate(reinforce_plus_plus(rewards, mask, gamma=self.gamma, total=experience.total))


@dataclass(frozen=True)
class GAE(Advantage):
    """Generalized advantage estimation with the values of ``model.critic``, see ``ops.advantages.gae``.

    Args:
        gamma: Discount per token, in [0, 1].
        lam: Lambda, in [0, 1]: 0 trusts the critic, 1 the rewards.
    """

    gamma: UnitInterval = 1.0
    lam: UnitInterval = 0.95
    needs_values: ClassVar[bool] = True

    def estimate(self, experience: Experience) -> Estimate:
        """Advantages whitened over the rollout batch, on all ranks; the returns are not whitened."""
        rewards, mask, values = experience.token_rewards, experience.mask, experience.values
        assert values is not None
        return Estimate(*gae(rewards, values, mask, gamma=self.gamma, lam=self.lam, total=experience.total))


def reward_kl(rollouts: ScoredRollouts, estimator: KLEstimator) -> Tensor:
    """KL of the sampling policy to the reference policy at each token, nats, 0 outside the completions. (B, T)"""
    scores = rollouts.scores
    assert scores.ref_logprobs is not None
    return kl_penalty(scores.logprobs, scores.ref_logprobs, estimator) * rollouts.completion_mask


def token_rewards(rewards: Tensor, mask: Tensor, penalty: Tensor | None = None) -> Tensor:
    """``-penalty_t`` at each token, plus the (B,) reward at the last token; a row without tokens gets none. (B, T)"""
    positions = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    last = positions == (mask * positions).amax(-1, keepdim=True)
    placed = rewards.unsqueeze(1) * last
    return placed if penalty is None else placed - penalty * mask


def estimate_credit(
    rollouts: ScoredRollouts, advantage: Advantage, *, penalty: Tensor | None, total: Total
) -> Estimate:
    """Advantages and returns of every row: sampled rows by the estimator, expert rows against their group."""
    num_sampled, mask, scores = rollouts.num_sampled, rollouts.completion_mask, rollouts.scores
    sampled, expert = slice(0, num_sampled), slice(num_sampled, None)
    rewards = token_rewards(rollouts.rewards, mask, penalty)[sampled]
    values = None if scores.values is None else scores.values[sampled]
    entropies, size = scores.entropies[sampled], rollouts.group_size
    estimate = advantage.estimate(Experience(rewards, mask[sampled], values, size, total, entropies))
    if rollouts.expert_groups.numel() == 0:
        return estimate
    assert isinstance(advantage, ExpertAdvantage)
    groups = rollouts.rewards[sampled].view(-1, rollouts.group_size)[rollouts.expert_groups]  # without the KL penalty
    expert_rows = advantage.estimate_expert(rollouts.rewards[expert], groups).unsqueeze(1) * mask[expert]
    return Estimate(torch.cat([estimate.advantages, expert_rows]), None)
