"""Advantage estimators as a config names them: from the rewards of a whole collection to A_t."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from egspo_lightning.errors import require
from egspo_lightning.ops.advantages import against_group, gae, group_relative, leave_one_out, reinforce_plus_plus
from egspo_lightning.ops.masking import Total, masked_sum


class Experience(NamedTuple):
    """What there is to estimate advantages from: this rank's completions, those of one problem side by side."""

    token_rewards: Tensor
    """(P * G, T): the KL penalty, where there is one, at each token, and the reward at the last"""
    mask: Tensor
    """(P * G, T) bool: completion tokens"""
    values: Tensor | None
    """(P * G, T) of the critic, where there is one"""
    group_size: int
    """G"""
    total: Total
    """Adds a tensor over all ranks."""

    @property
    def rewards(self) -> Tensor:
        """(P * G,): of each completion, the KL penalty included."""
        return masked_sum(self.token_rewards, self.mask, -1)


class Estimate(NamedTuple):
    """Advantages and, where a critic is to learn them, returns; both (P * G, T)."""

    advantages: Tensor
    returns: Tensor | None = None


class Advantage(Protocol):
    """Turns the rewards of a collection into advantages."""

    @property
    def min_generations(self) -> int:
        """The least number of completions a problem that it works with."""
        ...

    @property
    def needs_values(self) -> bool:
        """Whether it needs a critic."""
        ...

    def estimate(self, experience: Experience) -> Estimate:
        """Advantages of a collection; what lies outside the mask is not looked at."""
        ...


@runtime_checkable
class ExpertAdvantage(Protocol):
    """An ``Advantage`` that can also credit an expert's solution beside a group."""

    def estimate_expert(self, rewards: Tensor, group_rewards: Tensor) -> Tensor:
        """(P,) rewards of experts' solutions, beside the (P, G) of the policy's completions, to (P,) advantages."""
        ...


@dataclass(frozen=True)
class GroupRelative(Advantage):
    """GRPO's advantage (default), see ``ops.advantages.group_relative``.

    Args:
        scale_by_std: Divide by the group's standard deviation; without it the advantage is Dr. GRPO's.
    """

    scale_by_std: bool = True
    min_generations: ClassVar[int] = 2
    needs_values: ClassVar[bool] = False

    def estimate(self, experience: Experience) -> Estimate:
        """The same advantage at every token of a completion."""
        per_row = group_relative(experience.rewards, experience.group_size, scale_by_std=self.scale_by_std)
        return Estimate(per_row.unsqueeze(1) * experience.mask)

    def estimate_expert(self, rewards: Tensor, group_rewards: Tensor) -> Tensor:
        """(P,) of an expert's solutions, beside the (P, G) rewards of the policy's; see ``against_group``."""
        return against_group(rewards, group_rewards, scale_by_std=self.scale_by_std)


@dataclass(frozen=True)
class LeaveOneOut(Advantage):
    """RLOO's advantage, see ``ops.advantages.leave_one_out``."""

    min_generations: ClassVar[int] = 2
    needs_values: ClassVar[bool] = False

    def estimate(self, experience: Experience) -> Estimate:
        """The same advantage at every token of a completion."""
        per_row = leave_one_out(experience.rewards, experience.group_size)
        return Estimate(per_row.unsqueeze(1) * experience.mask)

    def estimate_expert(self, rewards: Tensor, group_rewards: Tensor) -> Tensor:
        """(P,) of an expert's solutions: the reward minus the mean of the group, which does not hold the expert."""
        return against_group(rewards, group_rewards, scale_by_std=False)


@dataclass(frozen=True)
class ReinforcePlusPlus(Advantage):
    """REINFORCE++'s advantage, see ``ops.advantages.reinforce_plus_plus``; works with one completion a problem too.

    Args:
        gamma: Discount a token, in [0, 1].
    """

    gamma: float = 1.0
    min_generations: ClassVar[int] = 1
    needs_values: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require(0 <= self.gamma <= 1, "ReinforcePlusPlus.gamma", self.gamma, "in [0, 1]")

    def estimate(self, experience: Experience) -> Estimate:
        """Whitened over the collection, on all ranks."""
        return Estimate(
            reinforce_plus_plus(experience.token_rewards, experience.mask, gamma=self.gamma, total=experience.total)
        )


@dataclass(frozen=True)
class GAE(Advantage):
    """Generalized advantage estimation with the values of ``model.critic``, see ``ops.advantages.gae``.

    Args:
        gamma: Discount a token, in [0, 1].
        lam: Lambda, in [0, 1]: 0 trusts the critic, 1 the rewards.
    """

    gamma: float = 1.0
    lam: float = 0.95
    min_generations: ClassVar[int] = 1
    needs_values: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(0 <= self.gamma <= 1, "GAE.gamma", self.gamma, "in [0, 1]")
        require(0 <= self.lam <= 1, "GAE.lam", self.lam, "in [0, 1]")

    def estimate(self, experience: Experience) -> Estimate:
        """Whitened over the collection, on all ranks; the returns are not."""
        assert experience.values is not None
        advantages, returns = gae(
            experience.token_rewards,
            experience.values,
            experience.mask,
            gamma=self.gamma,
            lam=self.lam,
            total=experience.total,
        )
        return Estimate(advantages, returns)
