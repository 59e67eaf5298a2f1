"""Views of rollouts for gates, token weights and surrogates: values per token, and statistics over all ranks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from egspo_lightning.ops.masking import Total, masked_sum, on_one_rank, quantile
from egspo_lightning.types import NetworkOutputs, RolloutBatch


@dataclass(frozen=True)
class Statistics:
    """Statistics over the tokens of all ranks, so that no method needs to know how many there are.

    All methods are collective: each rank must call them in the same order, with any number of tokens. Values and mask
    have one shape; results are scalars, detached. Without tokens on any rank a sum is 0, a mean or standard deviation
    0, and a quantile or extreme value NaN.
    """

    total: Total = on_one_rank
    """Adds a tensor over all ranks."""
    gather: Callable[[Tensor], Tensor] = on_one_rank
    """Concatenates vectors of different lengths over all ranks."""

    def count(self, mask: Tensor) -> Tensor:
        """Number of tokens in the mask, float64."""
        return self.total(mask.sum().double())

    def sum(self, values: Tensor, mask: Tensor) -> Tensor:
        """Sum over the mask, in the dtype of ``values``."""
        return self.total(masked_sum(values.detach(), mask))

    def mean(self, values: Tensor, mask: Tensor) -> Tensor:
        """Mean over the mask."""
        return self.sum(values, mask) / self.count(mask).clamp(min=1).to(values.dtype)

    def std(self, values: Tensor, mask: Tensor, *, unbiased: bool = True) -> Tensor:
        """Standard deviation over the mask: by N - 1, or by N if not ``unbiased``."""
        squares = self.sum((values - self.mean(values, mask)).square(), mask)
        count = self.count(mask) - int(unbiased)
        return (squares / count.clamp(min=1).to(values.dtype)).sqrt()

    def values(self, values: Tensor, mask: Tensor) -> Tensor:
        """The values of all tokens in the mask, (N,), in an order that may depend on the number of ranks."""
        return self.gather(values.detach()[mask])

    def quantile(self, values: Tensor, mask: Tensor, q: float) -> Tensor:
        """The quantile q in [0, 1] with linear interpolation, as numpy's."""
        ordered = self.values(values, mask).sort().values
        if ordered.numel() == 0:
            return values.new_full((), torch.nan)
        return quantile(ordered, q)

    def min(self, values: Tensor, mask: Tensor) -> Tensor:
        """The smallest value."""
        return -self.max(-values, mask)

    def max(self, values: Tensor, mask: Tensor) -> Tensor:
        """The largest value."""
        own = values.detach()[mask]
        pooled = self.gather(own.amax().reshape(1) if own.numel() else own)
        return pooled.amax() if pooled.numel() else values.new_full((), torch.nan)


class TokenView(NamedTuple):
    """Rollouts as a method sees them: one rank's rollout batch, or a micro-batch of it. B sequences, T tokens."""

    logprobs: Tensor
    """(B, T), nats, of the current policy: with gradient for a surrogate, detached for token weights"""
    old_logprobs: Tensor
    """(B, T), nats, of the sampling policy"""
    entropies: Tensor
    """(B, T), nats, of the sampling policy"""
    current_entropies: Tensor
    """(B, T), nats, of the current policy, detached; computed only for a method with ``needs_current_entropies``"""
    advantages: Tensor
    """(B, T)"""
    mask: Tensor
    """(B, T) bool: tokens of the loss that the policy sampled; entries elsewhere have no meaning"""
    rewards: Tensor
    """(B,)"""
    is_truncated: Tensor
    """(B,) bool: the length limit was reached before an EOS"""
    groups: Tensor
    """(B,) int64: number of the problem in the rollout batch, over all ranks"""
    members: Tensor
    """(B,) int64: number of the completion in its group"""
    number: int
    """number of the rollout batch in the run, from 0"""
    ref_logprobs: Tensor | None
    """(B, T), nats, of the reference policy; None if the loss has no KL term"""
    threshold: Tensor | None
    """(B, 1), nats: tau of the rollout batch; None while the weights of the rollout batch are computed"""
    over_ranks: Statistics
    """Statistics over the same view on all ranks."""

    @property
    def positions(self) -> Tensor:
        """(B, T) int64: number of the token in its completion, from 0; no meaning outside the mask."""
        return self.mask.cumsum(-1) - 1


def view_of(
    rollout: RolloutBatch, current: NetworkOutputs, over_ranks: Statistics, *, threshold: Tensor | None
) -> TokenView:
    """The view of rollouts and of the current policy's outputs on them."""
    return TokenView(
        logprobs=current.logprobs,
        old_logprobs=rollout.old_logprobs,
        entropies=rollout.entropies,
        current_entropies=current.entropies.detach(),
        advantages=rollout.advantages,
        mask=rollout.gated_mask,
        rewards=rollout.rewards,
        is_truncated=rollout.is_truncated,
        groups=rollout.groups,
        members=rollout.members,
        number=rollout.number,
        ref_logprobs=rollout.ref_logprobs,
        threshold=threshold,
        over_ranks=over_ranks,
    )
