"""Interfaces of methods that treat tokens differently: token weights, and surrogates.

A method of token weights multiplies the surrogate of each token by a weight; EGSPO's is ``ops.entropy_gate``. A method
that changes the surrogate itself, its ratio or its clip, is a ``Surrogate``. Both see the rollouts as a ``TokenView``.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from egspo_lightning.errors import UserError
from egspo_lightning.ops.masking import require_shape
from egspo_lightning.ops.token_view import Statistics, TokenView

WEIGHT_RANGE = "A weight must be finite and at least 0: a negative one would reverse the sign of the update."


class StepNeeds(Protocol):
    """Needs that a method has of an optimizer step; by default none."""

    @property
    def needs_every_rollout(self) -> bool:
        """Whether optimizer steps must also hold rollouts of advantage 0, for statistics over them."""
        return False

    @property
    def needs_current_entropies(self) -> bool:
        """Whether optimizer steps must compute the entropies of the current policy."""
        return False


class TokenWeights(StepNeeds, Protocol):
    """Gives the weight of each token in the surrogate.

    Weights are detached. By default they are computed once for each rollout batch, before its first optimizer step,
    and stay the same over the PPO epochs. Statistics over all tokens go through ``tokens.over_ranks``: they are then
    the same on any number of ranks. A method that keeps state between rollout batches has ``state_dict`` and
    ``load_state_dict``; checkpoints save it.
    """

    @property
    def each_step(self) -> bool:
        """Whether to compute the weights anew in each optimizer step, from the current policy.

        The view is then one micro-batch on all ranks. Statistics over it depend on how an optimizer step is split:
        on ``trainer.accumulate_grad_batches``, ``data.max_tokens_per_micro_batch`` and the number of ranks.
        """
        return False

    @abstractmethod
    def weights(self, tokens: TokenView) -> Tensor:
        """The weight of each token, (B, T), at least 0; entries outside ``tokens.mask`` have no meaning."""


class Surrogate(StepNeeds, Protocol):
    """Gives the policy loss of each token, in place of PPO's clipped surrogate."""

    @abstractmethod
    def per_token(self, tokens: TokenView) -> Tensor:
        """The loss of each token, (B, T), with gradient through ``tokens.logprobs``, not yet masked or reduced."""


class Branches(NamedTuple):
    """Token weights by branch. Their sum, g_t, multiplies the surrogate.

    A method that has a second branch, which ``model.objective.low_branch_*`` may give another loss, has a method
    ``branches`` that returns them.
    """

    high: Tensor
    """(B, T): weight of the full update, s_t"""
    low: Tensor
    """(B, T): weight of the low branch, (1 - s_t) phi_t"""
    is_high: Tensor
    """(B, T) bool: tokens that count as high"""
    threshold: Tensor
    """() or (B, 1), nats: tau"""


@dataclass(frozen=True)
class TokenMethod:
    """How a run treats tokens: its weights, its surrogate, and the ranks that it runs on."""

    weights: TokenWeights
    surrogate: Surrogate | None = None
    """None is PPO's, with the clip of the objective."""
    over_ranks: Statistics = Statistics()  # noqa: RUF009  frozen, so it can be shared

    @property
    def needs_every_rollout(self) -> bool:
        """Whether either part needs rollouts of advantage 0."""
        return any(part.needs_every_rollout for part in self._parts)

    @property
    def needs_current_entropies(self) -> bool:
        """Whether either part needs the entropies of the current policy."""
        return any(part.needs_current_entropies for part in self._parts)

    @property
    def _parts(self) -> tuple[StepNeeds, ...]:
        return (self.weights,) if self.surrogate is None else (self.weights, self.surrogate)


def branches_of(method: TokenWeights, tokens: TokenView) -> Branches:
    """The weights of both branches, detached; a method without branches has all its weight in the high one.

    Raises:
        UserError: the method gives weights of another shape.
    """
    tokens = tokens._replace(logprobs=tokens.logprobs.detach())
    if hasattr(method, "branches"):
        high, low, is_high, threshold = method.branches(tokens)
    else:
        high = method.weights(tokens)
        require_shape(high, tokens.mask, f"model.token_weights: {type(method).__name__} must give weights")
        high = high.to(tokens.entropies.dtype)
        low, is_high, threshold = torch.zeros_like(high), tokens.mask, high.new_full((), -torch.inf)
    high, low = (torch.where(tokens.mask, weights.detach(), 0.0) for weights in (high, low))
    return Branches(high, low, is_high & tokens.mask, threshold)


def weights_of_step(method: TokenWeights, tokens: TokenView) -> tuple[Tensor, Tensor]:
    """The weights of both branches in an optimizer step, of a method that computes them anew in each.

    Raises:
        UserError: a weight is negative, infinite or NaN.
    """
    high, low, *_ = branches_of(method, tokens)
    if not are_sound(high + low):
        raise UserError(
            f"model.token_weights: {type(method).__name__} gave a weight below 0, infinite or NaN in an optimizer "
            f"step. {WEIGHT_RANGE}"
        )
    return high, low


def are_sound(weights: Tensor) -> Tensor:
    """Whether all weights are finite and at least 0, bool."""
    return ((weights >= 0) & weights.isfinite()).all()
