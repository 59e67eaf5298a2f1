"""Backward pass of ``ops.token_stats.token_stats``, tile by tile."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from egspo_lightning.ops.logit_tiles import LogitTiles, columns_of

MOSTLY = 7 / 8
"""Share of tokens with an upstream gradient from which on all tokens are kept: a selection is a copy."""


def active_tokens(like: Tensor, *gradients: Tensor | None) -> Tensor | None:
    """Numbers of the tokens with an upstream gradient other than 0; None if nearly all have one."""
    is_active = torch.zeros_like(like, dtype=torch.bool)
    for gradient in gradients:
        if gradient is not None:
            is_active |= gradient != 0
    numbers = is_active.nonzero().squeeze(1)
    return None if len(numbers) >= MOSTLY * len(like) else numbers


def select(tokens: Tensor | slice | None, *tensors: Tensor | None) -> list[Any]:
    """The given tokens of each tensor that is not None; ``tokens`` None selects all."""
    return [tensor if tensor is None or tokens is None else tensor[tokens] for tensor in tensors]


def head_gradients(
    tiles: LogitTiles, upstream: Sequence[Any], wide: torch.dtype, trains_head: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden states, weight and bias, in dtype ``wide``; empty for a frozen head.

    ``upstream`` holds input_ids, log_norms, entropies, grad_logprobs and grad_entropies of all tokens, (N,) each.
    """
    hidden, weight = tiles.hidden, tiles.weight
    if tiles.is_single:
        grad = _grad_logits(tiles, tiles.tokens[0], tiles.entries[0], *upstream)
        grad_bias = grad.sum(0) if tiles.bias is not None else weight.new_empty(0, dtype=wide)
        grad = grad.to(weight.dtype)
        return (grad @ weight).to(wide), (grad.T @ hidden if trains_head else weight.new_empty(0)).to(wide), grad_bias
    grad_hidden = torch.zeros_like(hidden, dtype=wide)
    grad_weight = torch.zeros_like(weight, dtype=wide) if trains_head else weight.new_empty(0, dtype=wide)
    grad_bias = weight.new_zeros(weight.shape[0], dtype=wide)
    for tokens in tiles.tokens:
        part = select(tokens, *upstream)
        for entries in tiles.entries:
            grad = _grad_logits(tiles, tokens, entries, *part)
            if tiles.bias is not None:
                grad_bias[entries] += grad.sum(0)
            grad = grad.to(weight.dtype)
            _add_product(grad_hidden[tokens], grad, weight[entries])
            if trains_head:
                _add_product(grad_weight[entries], grad.T, hidden[tokens])
    return grad_hidden, grad_weight, grad_bias


def _grad_logits(
    tiles: LogitTiles,
    tokens: slice,
    entries: slice,
    input_ids: Tensor,
    log_norms: Tensor,
    entropies: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropies: Tensor | None,
) -> Tensor:
    """Gradient with respect to the head's output in one tile, before the division by the temperature, (n, v)."""
    if grad_entropies is None:
        grad_logprobs = torch.zeros_like(log_norms) if grad_logprobs is None else grad_logprobs
        factors = (-grad_logprobs / tiles.temperature).unsqueeze(-1)
        if tiles.probs is not None:
            grad = tiles.probs[tokens, entries] * factors
        else:
            grad = tiles.logits(tokens, entries).sub_(log_norms.unsqueeze(-1)).exp_().mul_(factors)
    else:
        log_probs = tiles.logits(tokens, entries).sub_(log_norms.unsqueeze(-1))
        probs = torch.exp(log_probs, out=tiles.buffer("second", log_probs.shape, log_probs.dtype))
        constant = grad_entropies * entropies + (0 if grad_logprobs is None else grad_logprobs)
        grad = log_probs.mul_(-grad_entropies.unsqueeze(-1)).sub_(constant.unsqueeze(-1))
        grad = grad.mul_(probs).div_(tiles.temperature)
    if grad_logprobs is not None:
        columns, is_inside = columns_of(input_ids, entries)
        own = torch.where(is_inside, grad_logprobs / tiles.temperature, 0.0)
        grad.scatter_add_(-1, columns, own.unsqueeze(-1))
    return grad


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``, in one call where the dtypes agree."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
