"""Advantage estimators of GTPO, GRPO-S and HAPO, which a config names; see ``ops.entropy_advantages``."""

from dataclasses import dataclass
from typing import ClassVar

from egspo_lightning.ops.entropy_advantages import grpo_s, gtpo, token_group_relative
from egspo_lightning.ops.estimators import Advantage, Estimate, Experience, GroupRelative
from egspo_lightning.types import NonNegativeFloat


@dataclass(frozen=True)
class GTPO(Advantage):
    """GTPO's advantage of each token, shaped by its entropy, see ``ops.entropy_advantages.gtpo``.

    A completion is right if its reward is above 0.5. A group of equal rewards has advantages too.

    Args:
        alpha1: Weight of the reward.
        alpha2: Weight of the entropy.
    """

    alpha1: NonNegativeFloat = 1.0
    alpha2: NonNegativeFloat = 0.1
    min_generations: ClassVar[int] = 2

    def estimate(self, experience: Experience) -> Estimate:
        """One advantage for each token."""
        factors = {"alpha1": self.alpha1, "alpha2": self.alpha2}
        rewards, entropies, mask = experience.rewards, experience.entropies, experience.mask
        return Estimate(gtpo(rewards, entropies, mask, experience.group_size, **factors))


@dataclass(frozen=True)
class GRPOS(Advantage):
    """GRPO-S's advantage, shaped by the mean entropy of a completion, see ``ops.entropy_advantages.grpo_s``.

    A completion is right if its reward is above 0.5. A group of equal rewards has advantages too.

    Args:
        beta1: Weight of the verdict.
        beta2: Weight of the entropy.
    """

    beta1: NonNegativeFloat = 1.0
    beta2: NonNegativeFloat = 0.1
    min_generations: ClassVar[int] = 2

    def estimate(self, experience: Experience) -> Estimate:
        """One advantage for all tokens of a completion."""
        factors = {"beta1": self.beta1, "beta2": self.beta2}
        rewards, entropies, mask = experience.rewards, experience.entropies, experience.mask
        per_row = grpo_s(rewards, entropies, mask, experience.group_size, **factors)
        return Estimate(per_row.unsqueeze(1) * mask)


@dataclass(frozen=True)
class TokenGroupRelative(GroupRelative):
    """HAPO's group-relative advantage, in which a completion counts once for each of its tokens.

    See ``ops.entropy_advantages.token_group_relative``.
    """

    def estimate(self, experience: Experience) -> Estimate:
        """One advantage for all tokens of a completion."""
        rewards, mask, scale_by_std = experience.rewards, experience.mask, self.scale_by_std
        per_row = token_group_relative(rewards, mask, experience.group_size, scale_by_std=scale_by_std)
        return Estimate(per_row.unsqueeze(1) * mask)
