"""Weights of tokens from other methods, which multiply the surrogate: pure functions, and the classes of a config.

Weights are (B, T), at least 0 and detached.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from egspo_lightning.errors import UserError
from egspo_lightning.ops.losses import clipped_tokens
from egspo_lightning.ops.token_methods import TokenWeights
from egspo_lightning.ops.token_selection import advantage_covariance, lowest, share_of_tokens, token_hash
from egspo_lightning.ops.token_view import Statistics, TokenView
from egspo_lightning.types import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveShare, UnitInterval

MIN_PROBABILITY = 1e-8
MIN_LARGEST_CHANGE = 0.02
"""Entropy changes below this have weight near 1 in STEER's exponential mapping."""


def entropy_change(logprobs: Tensor, old_logprobs: Tensor, entropies: Tensor, advantages: Tensor) -> Tensor:
    """STEER's estimate of how much each token changes the entropy, ``|r A (1 - p) (ln p + H)|``. (B, T)

    From arXiv 2510.10150, with p of the current policy. p is clamped to [1e-8, 1 - 1e-8] and p_old to at least 1e-8.
    """
    p = logprobs.detach().exp().clamp(MIN_PROBABILITY, 1 - MIN_PROBABILITY)
    old_p = old_logprobs.exp().clamp(min=MIN_PROBABILITY)
    return (advantages / old_p * p * (1 - p) * (p.log() + entropies)).abs()


def linear_weights(change: Tensor, mask: Tensor, *, low: float, high: float, over_ranks: Statistics) -> Tensor:
    """``high`` at the smallest change, ``low`` at the largest, linear between; their mean if all changes are equal."""
    smallest, largest = over_ranks.min(change, mask), over_ranks.max(change, mask)
    spread = largest - smallest
    weights = high - (change - smallest) * (high - low) / torch.where(spread > 0, spread, 1.0)
    return torch.where(spread > 0, weights, (low + high) / 2)


def exponential_weights(change: Tensor, mask: Tensor, *, low: float, over_ranks: Statistics) -> Tensor:
    """``low ** (change / max(largest change, 0.02))``: 1 at no change, ``low`` at the largest."""
    largest = over_ranks.max(change, mask).nan_to_num(0.0).clamp(min=MIN_LARGEST_CHANGE)  # NaN without tokens
    return (low ** (change / largest)).clamp(low, 1.0)


def probability_weights(
    old_logprobs: Tensor, advantages: Tensor, *, slope: float, base: float, negative: float = 1.0
) -> Tensor:
    """``slope p_old + base``, times ``negative`` where A <= 0 (arXiv 2505.12929). (B, T)"""
    weights = slope * old_logprobs.detach().exp() + base
    return torch.where(advantages > 0, weights, negative * weights)


@dataclass(frozen=True)
class STEER(TokenWeights):
    """STEER: lower weights for tokens that would change the entropy most, see ``entropy_change``.

    Follows the authors' code. Smallest and largest change are over the tokens of all ranks (theirs: of one rank's
    micro-batch). The weights do not have mean 1. The exponential mapping is the paper's.

    Args:
        mapping: exponential, or linear.
        weight_min: Weight at the largest change.
        weight_max: Weight at the smallest change of the linear mapping; the exponential one has 1 there.
    """

    mapping: Literal["exponential", "linear"] = "exponential"
    weight_min: PositiveFloat = 0.8
    weight_max: PositiveFloat = 1.2
    each_step: ClassVar[bool] = True
    needs_every_rollout: ClassVar[bool] = True
    """Rollouts of advantage 0 have the smallest change."""

    def __post_init__(self) -> None:
        is_linear = self.mapping == "linear"
        largest = self.weight_max if is_linear else 1.0
        if not self.weight_min < largest:
            bound = f"STEER.weight_max = {self.weight_max}" if is_linear else "1, the weight of no change"
            raise UserError(f"STEER.weight_min = {self.weight_min} must be below {bound}.")

    def weights(self, tokens: TokenView) -> Tensor:
        """The weight of each token, (B, T)."""
        change = entropy_change(tokens.logprobs, tokens.old_logprobs, tokens.entropies, tokens.advantages)
        mask, over_ranks = tokens.mask, tokens.over_ranks
        if self.mapping == "exponential":
            return exponential_weights(change, mask, low=self.weight_min, over_ranks=over_ranks)
        return linear_weights(change, mask, low=self.weight_min, high=self.weight_max, over_ranks=over_ranks)


@dataclass(frozen=True)
class AdvantageReweighting(TokenWeights):
    """Advantage reweighting (AR): unlikely tokens weigh less, ``alpha p_old + 1 - alpha``.

    Follows the paper, which is ``both_linear_normal`` of the authors' code; the other forms there are not offered.

    Args:
        alpha: Share of the weight that follows the probability, in [0, 1].
        negative_weight: Further factor where A <= 0.
    """

    alpha: UnitInterval = 0.2
    negative_weight: NonNegativeFloat = 1.0

    def weights(self, tokens: TokenView) -> Tensor:
        """The weight of each token, (B, T)."""
        factors = {"slope": self.alpha, "base": 1 - self.alpha, "negative": self.negative_weight}
        return probability_weights(tokens.old_logprobs, tokens.advantages, **factors)


@dataclass(frozen=True)
class ClipCov(TokenWeights):
    """Clip-Cov: drops a random share of the tokens whose covariance lies in a range (arXiv 2505.22617).

    Candidates have ``lower < covariance < upper`` (see ``advantage_covariance``) and are not cut by the ratio's clip.
    Of them ``max(1, fraction N)`` tokens get weight 0; N still counts them. The authors draw with an unseeded
    generator, from a micro-batch of one rank. Here the draw is the same on any number of ranks: it takes the lowest
    hashes of group, completion, position, seed and rollout batch.

    Args:
        fraction: Share of all tokens to drop, if there are as many candidates.
        lower: Lower bound of the covariance.
        upper: Upper bound of the covariance.
        epsilon_low: Lower clip of the ratio, as in the surrogate.
        epsilon_high: Upper clip of the ratio, as in the surrogate.
        seed: Another seed gives another draw.
    """

    fraction: PositiveShare = 2e-4
    lower: float = 1.0
    upper: float = 5.0
    epsilon_low: UnitInterval = 0.2
    epsilon_high: NonNegativeFloat = 0.2
    seed: NonNegativeInt = 0
    each_step: ClassVar[bool] = True
    needs_every_rollout: ClassVar[bool] = True
    """Rollouts of advantage 0 count in the means."""

    def weights(self, tokens: TokenView) -> Tensor:
        """0 at dropped tokens, otherwise 1. (B, T)"""
        num = share_of_tokens(self.fraction, tokens.mask, tokens.over_ranks)
        seed = (int(self.seed) << 32) + tokens.number
        dropped = lowest(token_hash(tokens, seed), self.candidates(tokens), num, tokens.over_ranks)
        return (~dropped).to(tokens.logprobs.dtype)

    def candidates(self, tokens: TokenView) -> Tensor:
        """Tokens that may be dropped, (B, T) bool."""
        covariance = advantage_covariance(tokens.logprobs, tokens.advantages, tokens.mask, tokens.over_ranks)
        below, above = clipped_tokens(
            tokens.logprobs.detach(),
            tokens.old_logprobs,
            tokens.advantages,
            clip_low=self.epsilon_low,
            clip_high=self.epsilon_high,
        )
        return tokens.mask & ~below & ~above & (covariance > self.lower) & (covariance < self.upper)
