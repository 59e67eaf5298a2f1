"""Masked sums, means, whitening and aggregation of per-token values."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from egspo_lightning.errors import UserError

Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]

Values = Tensor | Sequence[Any]
"""Argument of the functions of this package: a tensor, or (nested) sequences of numbers, read as float64."""

Total = Callable[[Tensor], Tensor]
"""Adds a tensor over all ranks, so that statistics of a batch do not depend on the number of ranks."""


def on_one_rank(values: Tensor) -> Tensor:
    """``Total`` of a single rank: the values themselves."""
    return values


def as_tensor(values: Values) -> Tensor:
    """Returns a tensor unchanged; converts sequences to a tensor with float64 for floats, as in Python."""
    if isinstance(values, Tensor):
        return values
    tensor = torch.as_tensor(values)
    return torch.as_tensor(values, dtype=torch.float64) if tensor.is_floating_point() else tensor


def as_floats(values: Values) -> Tensor:
    """``as_tensor``, with integers converted to float64."""
    tensor = as_tensor(values)
    return tensor if tensor.is_floating_point() else tensor.double()


def shape_of(value: Any) -> tuple[int, ...] | str:
    """Shape of a tensor, or the type name of another value, for error messages about plug-ins."""
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def require_shape(values: Any, like: Tensor, what: str) -> None:
    """Refuse values of a plug-in that have another shape than ``like``; ``what`` begins the message.

    Raises:
        UserError: with both shapes.
    """
    shape = tuple(like.shape)
    if shape_of(values) != shape:
        raise UserError(f"{what} of shape {shape}, got {shape_of(values)}.")


def quantile(ordered: Tensor, q: float) -> Tensor:
    """The quantile q in [0, 1] of a sorted vector, not empty, with linear interpolation, as numpy's."""
    position = q * (ordered.numel() - 1)
    below = min(int(position), ordered.numel() - 1)
    above = min(below + 1, ordered.numel() - 1)
    return torch.lerp(ordered[below], ordered[above], position - below)


def masked_sum(values: Values, mask: Values, dim: int | None = None) -> Tensor:
    """Sum of ``values`` where ``mask`` is true; ignores all other values, NaN and infinity included."""
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

    The variance is the unbiased one; it is 0 for fewer than two values, so nothing becomes NaN.

    ``total`` adds a scalar over all ranks, if ``values`` is one rank's part of a batch.
    """
    values, mask = as_tensor(values), as_tensor(mask).bool()
    count = total(mask.sum().to(values.dtype))
    mean = total(masked_sum(values, mask)) / count.clamp(min=1)
    # subtract the mean twice: for equal values, 1 / sqrt(eps) would amplify the rounding error of the first mean
    mean = mean + total(masked_sum(values - mean, mask)) / count.clamp(min=1)
    centered = torch.where(mask, values - mean, torch.zeros_like(values))
    variance = total(centered.square().sum()) / (count - 1).clamp(min=1)
    return centered * torch.rsqrt(variance + eps)


def aggregate(
    per_token: Values, mask: Values, mode: Aggregation, *, normalizer: Tensor | float | None = None
) -> Tensor:
    """Reduce per-token terms to a scalar loss.

    ==========================  =====================================================  ====================
    mode                        value                                                  default divisor N
    ==========================  =====================================================  ====================
    token-mean                  sum over all tokens / N                                tokens
    seq-mean-token-mean         sum over sequences of their token means / N            sequences
    seq-mean-token-sum          sum over all tokens / N                                sequences
    seq-mean-token-sum-norm     sum over all tokens / N                                sequences * mask width
    ==========================  =====================================================  ====================

    Sequences without a masked token do not count as sequences. Names and values are those of verl's ``agg_loss``. The
    last mode gives every token of every optimizer step the same weight (Dr. GRPO).

    Args:
        per_token, mask: (B, T)
        mode: see the table
        normalizer: N of the whole optimizer step; values of its micro-batches and ranks then add up to its value
    """
    mask = as_tensor(mask).bool()
    num_sequences = mask.any(-1).sum()
    counts = {
        "token-mean": mask.sum(),
        "seq-mean-token-mean": num_sequences,
        "seq-mean-token-sum": num_sequences,
        "seq-mean-token-sum-norm": num_sequences * mask.shape[-1],
    }
    if mode not in counts:
        raise ValueError(f"mode must be one of {', '.join(counts)}, got {mode!r}")
    is_mean = mode == "seq-mean-token-mean"
    total = masked_mean(per_token, mask, -1).sum() if is_mean else masked_sum(per_token, mask)
    return total / (counts[mode].clamp(min=1) if normalizer is None else normalizer)
