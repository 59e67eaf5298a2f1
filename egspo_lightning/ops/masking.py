"""Sums, means and aggregations over the tokens that count."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]

Values = Tensor | Sequence[Any]
"""What the functions of this package take: a tensor, or (nested) sequences of numbers, read as float64."""


Total = Callable[[Tensor], Tensor]
"""Adds a tensor over all ranks, so that statistics of a batch do not depend on how many ranks share it."""


def on_one_rank(values: Tensor) -> Tensor:
    """The total where there is one rank alone: the values themselves."""
    return values


def as_tensor(values: Values) -> Tensor:
    """A tensor as it is; sequences as a tensor whose floats are float64, as Python's are."""
    if isinstance(values, Tensor):
        return values
    tensor = torch.as_tensor(values)
    return torch.as_tensor(values, dtype=torch.float64) if tensor.is_floating_point() else tensor


def as_floats(values: Values) -> Tensor:
    """The same for real numbers: whole ones become float64."""
    tensor = as_tensor(values)
    return tensor if tensor.is_floating_point() else tensor.double()


def shape_of(value: Any) -> tuple[int, ...] | str:
    """Shape of a tensor; of anything else the name of its type, for an error that tells what a plug-in gave."""
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def masked_sum(values: Values, mask: Values, dim: int | None = None) -> Tensor:
    """Sum of ``values`` where ``mask`` is true; what lies outside, NaN and infinity included, has no part in it."""
    values, mask = as_tensor(values), as_tensor(mask)
    kept = torch.where(mask.bool(), values, torch.zeros((), dtype=values.dtype, device=values.device))
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(values: Values, mask: Values, dim: int | None = None) -> Tensor:
    """Mean of ``values`` over ``mask``; 0 where the mask is empty."""
    values, mask = as_tensor(values), as_tensor(mask).bool()
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(values, mask, dim) / count.clamp(min=1).to(values.dtype)


def masked_whiten(values: Values, mask: Values, *, eps: float = 1e-8, total: Total = on_one_rank) -> Tensor:
    """Shift and scale to mean 0 and variance 1 over the mask: ``(x - mean) / sqrt(var + eps)``, 0 outside.

    The variance is the unbiased one; with fewer than two values it is taken as 0, so nothing becomes NaN.

    Args:
        values: any shape
        mask: the same shape
        eps: added to the variance
        total: adds a scalar over all ranks, where ``values`` is one rank's part of a batch
    """
    values, mask = as_tensor(values), as_tensor(mask).bool()
    count = total(mask.sum().to(values.dtype))
    mean = total(masked_sum(values, mask)) / count.clamp(min=1)
    # once more, for equal values to have no spread at all: of a rounding of the mean, 1 / sqrt(eps) makes noise
    mean = mean + total(masked_sum(values - mean, mask)) / count.clamp(min=1)
    centerd = torch.where(mask, values - mean, torch.zeros_like(values))
    variance = total(centerd.square().sum()) / (count - 1).clamp(min=1)
    return centerd * torch.rsqrt(variance + eps)


def aggregate(
    per_token: Values, mask: Values, mode: Aggregation, *, normalizer: Tensor | float | None = None
) -> Tensor:
    """Reduce per-token terms to the scalar that is differentiated.

    ==========================  =====================================================  ====================
    mode                        value                                                  default divisor N
    ==========================  =====================================================  ====================
    token-mean                  sum over all tokens / N                                tokens
    seq-mean-token-mean         sum over sequences of their token means / N            sequences
    seq-mean-token-sum          sum over all tokens / N                                sequences
    seq-mean-token-sum-norm     sum over all tokens / N                                sequences * mask width
    ==========================  =====================================================  ====================

    A sequence without a token that counts is left out of the sequence counts. Names and values are those of verl's
    ``agg_loss``; as there, the last mode makes every token of every update weigh the same (Dr. GRPO).

    Args:
        per_token: (B, T)
        mask: (B, T)
        mode: how to reduce
        normalizer: N, where this is a part (a micro-batch, a rank) of an update: the parts then add up to the value
            for the whole.
    """
    mask = as_tensor(mask).bool()
    num_sequences = mask.any(-1).sum()
    if mode == "token-mean":
        total, count = masked_sum(per_token, mask), mask.sum()
    elif mode == "seq-mean-token-mean":
        total, count = masked_mean(per_token, mask, -1).sum(), num_sequences
    elif mode == "seq-mean-token-sum":
        total, count = masked_sum(per_token, mask), num_sequences
    elif mode == "seq-mean-token-sum-norm":
        total, count = masked_sum(per_token, mask), num_sequences * mask.shape[-1]
    else:
        raise ValueError(f"mode must be one of {', '.join(get_args(Aggregation))}, got {mode!r}")
    return total / (count.clamp(min=1) if normalizer is None else normalizer)
