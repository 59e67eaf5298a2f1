"""Selection of tokens over all ranks: by score, by a hash, or by covariance; the same tokens on any number of ranks.

Where scores are equal, a hash of the token's place in the rollout batch (problem, completion, position) decides. So a
fixed share of the tokens is selected exactly, whatever the scores are.
"""

import math

import torch
from torch import Tensor

from egspo_lightning.ops.token_view import Statistics, TokenView

_PLACE_BITS = 21
"""Bits of a completion's number in its group, and of a position, in a token's place."""


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


def num_above_quantile(fraction: float, mask: Tensor, over_ranks: Statistics) -> int:
    """How many of N distinct values are at or above their quantile ``1 - fraction``.

    It is ``N - ceil((1 - fraction) (N - 1))``, which differs from ``fraction N`` by less than one.
    """
    count = int(over_ranks.count(mask).item())
    return count - math.ceil((1 - fraction) * (count - 1)) if count else 0


def lowest(keys: Tensor, candidates: Tensor, num: int, over_ranks: Statistics) -> Tensor:
    """The candidates with the ``num`` lowest of all ranks' keys, bool; all if there are fewer. Keys must differ."""
    pooled = over_ranks.values(keys, candidates)
    if num >= pooled.numel():
        return candidates
    return candidates & (keys <= pooled.kthvalue(num).values) if num > 0 else torch.zeros_like(candidates)


def highest(scores: Tensor, keys: Tensor, mask: Tensor, num: int, over_ranks: Statistics) -> Tensor:
    """The ``num`` masked tokens of all ranks with the highest scores, bool; the lowest keys decide between ties.

    Args:
        scores, keys, mask: of one shape; keys from ``token_hash``
        num: the same on all ranks
        over_ranks: joins the tokens of all ranks
    """
    pooled = over_ranks.values(scores, mask)
    if num == 0 or num >= pooled.numel():
        return mask & (num > 0)
    threshold = pooled.kthvalue(pooled.numel() - num + 1).values
    above = mask & (scores > threshold)
    num_left = num - int((pooled > threshold).sum())
    return above | lowest(keys, mask & (scores == threshold), num_left, over_ranks)


def token_hash(tokens: TokenView, seed: int = 0) -> Tensor:
    """A pseudo-random number of each token, (B, T) int64, from its group, member, position and ``seed`` alone.

    The tokens of a rollout batch have different numbers, because each step is a bijection.
    """
    rows = (tokens.groups << _PLACE_BITS) + tokens.members
    places = (rows.unsqueeze(1) << _PLACE_BITS) + tokens.positions.clamp(min=0)
    return mix(places + mix(torch.tensor(seed % 2**63)).item())


def mix(numbers: Tensor) -> Tensor:
    """The finalizer of SplitMix64 (Steele et al. 2014), a bijection of 64-bit integers; multiplications wrap."""
    for bits, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        numbers = (numbers ^ _shift_right(numbers, bits)) * factor
    return numbers ^ _shift_right(numbers, 31)


def _shift_right(values: Tensor, bits: int) -> Tensor:
    """Shift without copies of the sign bit."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)
