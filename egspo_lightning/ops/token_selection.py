"""Selection of tokens over all ranks: by covariance, by rank, or at random by a hash."""

import torch
from torch import Tensor

from egspo_lightning.ops.token_view import Statistics, TokenView


def advantage_covariance(logprobs: Tensor, advantages: Tensor, mask: Tensor, over_ranks: Statistics) -> Tensor:
    """``(A_t - mean A) (log pi_t - mean log pi)`` of each token, (B, T), detached (arXiv 2505.22617).

    Its mean over tokens estimates how fast the entropy falls. The means are over the mask, on all ranks.
    """
    logprobs = logprobs.detach()
    centered = advantages - over_ranks.mean(advantages, mask)
    return centered * (logprobs - over_ranks.mean(logprobs, mask))


def share_of_tokens(fraction: float, mask: Tensor, over_ranks: Statistics) -> int:
    """``fraction`` of the tokens in the mask on all ranks, rounded down, at least 1."""
    return max(int(fraction * over_ranks.count(mask).item()), 1)


def lowest(keys: Tensor, candidates: Tensor, num: int, over_ranks: Statistics) -> Tensor:
    """The candidates with the ``num`` lowest of all ranks' keys, bool; all if there are fewer. Keys must differ."""
    pooled = over_ranks.values(keys, candidates)
    if num >= pooled.numel():
        return candidates
    return candidates & (keys <= pooled.kthvalue(num).values) if num > 0 else torch.zeros_like(candidates)


def highest(scores: Tensor, num: int, tokens: TokenView) -> Tensor:
    """The ``num`` tokens of all ranks with the highest scores, bool (B, T); ``token_hash`` decides between ties."""
    mask, over_ranks = tokens.mask, tokens.over_ranks
    pooled = over_ranks.values(scores, mask)
    if num >= pooled.numel():
        return mask
    threshold = pooled.kthvalue(pooled.numel() - num + 1).values
    above = mask & (scores > threshold)
    num_left = num - int(over_ranks.count(above).item())
    return above | lowest(token_hash(tokens), mask & (scores == threshold), num_left, over_ranks)


def token_hash(tokens: TokenView, seed: int = 0) -> Tensor:
    """A pseudo-random number of each token, (B, T) int64, from its group, member, position and ``seed`` alone.

    A draw by lowest hash is the same on any number of ranks (SplitMix64; multiplications wrap).
    """
    state = torch.full_like(tokens.positions, seed)
    for part in (tokens.groups.unsqueeze(1), tokens.members.unsqueeze(1), tokens.positions):
        state = (state ^ part) - 0x61C8864680B583EB
        state = (state ^ _shift_right(state, 30)) * -0x40A7B892E31B1A47
        state = (state ^ _shift_right(state, 27)) * -0x6B2FB644ECCEEE15
        state = state ^ _shift_right(state, 31)
    return state


def _shift_right(values: Tensor, bits: int) -> Tensor:
    """Shift without copies of the sign bit."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)
