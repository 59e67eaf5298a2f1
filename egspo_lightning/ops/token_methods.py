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
from egspo_lightning.ops.masking import shape_of
from egspo_lightning.ops.token_view import Statistics, TokenView


class TokenWeights(Protocol):
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

    @property
    def needs_every_rollout(self) -> bool:
        """Whether optimizer steps must also hold rollouts of advantage 0, for statistics over them."""
        return False

    @property
    def needs_current_entropies(self) -> bool:
        """Whether optimizer steps must compute the entropies of the current policy."""
        return False

    @abstractmethod
    def weights(self, tokens: TokenView) -> Tensor:
        """The weight of each token, (B, T), at least 0; entries outside ``tokens.mask`` have no meaning."""


class Surrogate(Protocol):
    """Gives the policy loss of each token, in place of PPO's clipped surrogate."""

    @property
    def needs_every_rollout(self) -> bool:
        """As of ``TokenWeights``."""
        return False

    @property
    def needs_current_entropies(self) -> bool:
        """As of ``TokenWeights``."""
        return False

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
        return self.weights.needs_every_rollout or (self.surrogate is not None and self.surrogate.needs_every_rollout)

    @property
    def needs_current_entropies(self) -> bool:
        """Whether either part needs the entropies of the current policy."""
        has_own = self.surrogate is not None and self.surrogate.needs_current_entropies
        return self.weights.needs_current_entropies or has_own


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
        require_shape(high, tokens, f"model.token_weights: {type(method).__name__} must give weights")
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
    weights = high + low
    if not ((weights >= 0) & weights.isfinite()).all():
        raise UserError(
            f"model.token_weights: {type(method).__name__} gave a weight below 0, infinite or NaN in an optimizer "
            "step. A weight must be finite and at least 0: a negative one would reverse the sign of the update."
        )
    return high, low


def require_shape(values: Tensor, tokens: TokenView, what: str) -> None:
    """Refuse a plug-in's values of another shape than (B, T).

    Raises:
        UserError: naming the plug-in and both shapes.
    """
    if shape_of(values) != tuple(tokens.mask.shape):
        raise UserError(f"{what} of shape {tuple(tokens.mask.shape)}, got {shape_of(values)}.")
