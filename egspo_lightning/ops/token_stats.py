"""Token statistics: log-probability of a token and entropy of its distribution, both in nats, in one pass."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from egspo_lightning.ops.logit_tiles import LogitTiles, columns_of, tile_shape, wide_dtype
from egspo_lightning.ops.masking import Values, as_tensor
from egspo_lightning.ops.token_stats_backward import active_tokens, head_gradients, select


class TokenStats(NamedTuple):
    """Statistics of each token, float32 (float64 where the input is)."""

    logprobs: Tensor
    """log p(token), nats"""
    entropies: Tensor
    """H(p) = -sum_v p_v log p_v, nats"""


def token_stats_from_logits(logits: Values, input_ids: Values, *, temperature: float = 1.0) -> TokenStats:
    """Statistics of ``p = softmax(logits / temperature)`` at the given tokens.

    Args:
        logits: (..., V), the logits that predict each token (already shifted); any float dtype, computed in float32
            or wider
        input_ids: (...) int64
        temperature: the sampling temperature; sampling, current and reference policy must use the same
    """
    logits, input_ids = as_tensor(logits), as_tensor(input_ids)
    log_probs = (logits.to(wide_dtype(logits.dtype)) / temperature).log_softmax(-1)
    chosen = log_probs.gather(-1, input_ids.unsqueeze(-1)).squeeze(-1)
    # not log Z - E[logit], which cancels: with logits of 100 it is off by 1e-5 in float32
    return TokenStats(chosen, -(log_probs.exp() * log_probs).sum(-1))


def stats_from_probs(probs: Tensor, logits: Tensor, input_ids: Tensor, *, with_entropies: bool = True) -> TokenStats:
    """Token statistics from an existing softmax, without an exponential or a logarithm for each entry.

    With m the largest logit, ``log p_v = z_v - m + log max_w p_w``. Then ``H = -log max_w p_w - sum_v p_v (z_v - m)``,
    two terms that are never negative.

    Args:
        probs: (N, V), float32 or wider
        logits: (N, V), z, over the temperature; overwritten if ``with_entropies``, without which entropies are 0
        input_ids: (N,) int64
    """
    top, log_top = logits.amax(-1, keepdim=True), probs.amax(-1).log()
    chosen = (logits.gather(-1, input_ids.unsqueeze(-1)) - top).squeeze(-1) + log_top
    if not with_entropies:
        return TokenStats(chosen, torch.zeros_like(chosen))
    return TokenStats(chosen, -torch.linalg.vecdot(probs, logits.sub_(top)) - log_top)


def token_stats(
    hidden_states: Tensor,
    lm_head: nn.Linear | Tensor,
    input_ids: Tensor,
    *,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    vocab_chunk_size: int | None = None,
    with_entropies: bool = True,
) -> TokenStats:
    """Token statistics from hidden states, tile by tile: the logits (N, V) never exist at once.

    With z the logits over the temperature, p their softmax and m a running maximum, the forward pass accumulates
    ``s = sum_v exp(z_v - m)`` and ``u = sum_v exp(z_v - m) (z_v - m)`` over the tiles. Then
    ``log p_y = z_y - m - log s`` and ``H = log s - u / s``, whose two terms are never negative, so nothing cancels.

    The backward pass computes each tile again, one more matrix product with the head:
    ``d log p_y / dz = onehot(y) - p`` and ``d H / dz = -p (log p + H)``. It skips tokens without an upstream gradient,
    unless they are few. If a single tile holds everything, the forward pass keeps p for ``d log p_y / dz``.

    Args:
        hidden_states: (..., D), the state before each token
        lm_head: the output layer, or its weight (V, D)
        input_ids: (...) int64
        temperature: the sampling temperature
        chunk_size: tokens in a tile; by default ``TILE_TOKENS``, or more if a tile then still has the whole vocabulary
        vocab_chunk_size: vocabulary entries in a tile; by default as many as make ``CPU_TILE`` or ``GPU_TILE`` logits
        with_entropies: False skips the entropies and returns zeros
    """
    weight: Tensor = lm_head if isinstance(lm_head, Tensor) else lm_head.weight
    bias: Tensor | None = None if isinstance(lm_head, Tensor) else lm_head.bias
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device) and hidden_states.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        hidden_states, weight = hidden_states.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    states = hidden_states.reshape(-1, hidden_states.shape[-1])
    sizes = chunk_size, vocab_chunk_size
    stats = _TiledTokenStats.apply(states, weight, bias, input_ids.reshape(-1), temperature, sizes, with_entropies)
    return TokenStats(*(values.view(input_ids.shape) for values in stats))


def token_stats_bytes(num_tokens: int, weight: Tensor, *, device: str = "cpu") -> int:
    """Upper limit of the bytes that ``token_stats`` needs, forward and backward, beyond its inputs and their gradients.

    Of ``weight``, (V, D), only shape, dtype and ``requires_grad`` count. The device type decides the size of the tiles.
    """
    entries, hidden = weight.shape
    wide = wide_dtype(weight.dtype).itemsize
    height, width = tile_shape(num_tokens, entries, device)
    tile = height * width
    states = num_tokens * hidden * (weight.element_size() + wide)  # those with a gradient, and that gradient
    head = entries * hidden * wide if weight.requires_grad else 0
    buffers = tile * wide * (1 if weight.element_size() == wide else 2)
    buffers += tile * wide if tile == num_tokens * entries else 0  # kept from forward to backward
    return states + head + buffers + 8 * num_tokens * wide


class _TiledTokenStats(torch.autograd.Function):
    """Computes the logits again in the backward pass, tile by tile; a single tile's probabilities are kept."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (N, D)
        weight: Tensor,  # (V, D)
        bias: Tensor | None,  # (V,)
        input_ids: Tensor,  # (N,)
        temperature: float,
        chunk_sizes: tuple[int | None, int | None],
        with_entropies: bool,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(hidden.device.type, enabled=False):
            tiles = LogitTiles(hidden, weight, bias, temperature, chunk_sizes)
            measure = _single_tile if tiles.is_single else _many_tiles
            log_norms, chosen, entropies, probs = measure(tiles, input_ids, with_entropies)
        ctx.save_for_backward(hidden, weight, bias, input_ids, log_norms, entropies, probs)
        ctx.settings = temperature, chunk_sizes
        ctx.set_materialize_grads(False)
        if not with_entropies:
            ctx.mark_non_differentiable(entropies)
        return chosen, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropies: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, input_ids, log_norms, entropies, probs = ctx.saved_tensors
        active = active_tokens(log_norms, grad_logprobs, grad_entropies)
        hidden_active, *rest = select(active, hidden, input_ids, log_norms, entropies, grad_logprobs, grad_entropies)
        kept = select(active, probs)[0] if grad_entropies is None else None
        with torch.autocast(hidden.device.type, enabled=False):
            temperature, chunk_sizes = ctx.settings
            tiles = LogitTiles(hidden_active, weight, bias, temperature, chunk_sizes, kept)
            trains_head = any(ctx.needs_input_grad[1:3])
            grad_active, grad_weight, grad_bias = head_gradients(tiles, rest, log_norms.dtype, trains_head)
        grad_hidden = grad_active.to(hidden.dtype)
        if active is not None:
            grad_hidden = torch.zeros_like(hidden).index_copy_(0, active, grad_hidden)
        if not trains_head:
            return grad_hidden, *[None] * 6
        own_bias = None if bias is None else grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight.to(weight.dtype), own_bias, *[None] * 4


def _single_tile(tiles: LogitTiles, input_ids: Tensor, with_entropies: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-normalizer, log-probability and entropy of all tokens, (N,) each, and their probabilities, (N, V)."""
    logits = tiles.logits(tiles.tokens[0], tiles.entries[0])
    probs, found = logits.softmax(-1), logits.gather(-1, input_ids.unsqueeze(-1)).squeeze(-1)
    chosen, entropies = stats_from_probs(probs, logits, input_ids, with_entropies=with_entropies)
    return found - chosen, chosen, entropies, probs


def _many_tiles(tiles: LogitTiles, input_ids: Tensor, with_entropies: bool) -> tuple[Tensor, Tensor, Tensor, None]:
    """Log-normalizer, log-probability and entropy of all tokens, (N,) each, tile by tile; keeps no probabilities."""
    wide = wide_dtype(tiles.hidden.dtype)
    log_norms, chosen, entropies = (tiles.hidden.new_empty(len(input_ids), dtype=wide) for _ in range(3))
    for tokens in tiles.tokens:
        log_norms[tokens], chosen[tokens], entropies[tokens] = _fold(tiles, tokens, input_ids[tokens], with_entropies)
    return log_norms, chosen, entropies, None


def _fold(tiles: LogitTiles, tokens: slice, input_ids: Tensor, with_entropies: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Log-normalizer, log-probability and entropy of the tokens of one row of tiles, (n,) each."""
    lowest, wide = torch.finfo(torch.float32).min, wide_dtype(tiles.hidden.dtype)
    maxima = tiles.hidden.new_full(input_ids.shape, lowest, dtype=wide)
    sums, moments, chosen = (torch.zeros_like(maxima) for _ in range(3))
    for entries in tiles.entries:
        logits = tiles.logits(tokens, entries)
        columns, is_inside = columns_of(input_ids, entries)
        chosen = torch.where(is_inside, logits.gather(-1, columns).squeeze(-1), chosen)
        risen = torch.maximum(maxima, logits.amax(-1))
        shift, maxima = maxima - risen, risen
        logits.sub_(maxima.unsqueeze(-1))
        weights = torch.exp(logits, out=tiles.buffer("second", logits.shape, logits.dtype))
        if with_entropies:
            moments = shift.exp() * (moments + shift * sums) + torch.linalg.vecdot(weights, logits)
        sums = shift.exp() * sums + weights.sum(-1)
    log_sums = sums.log()
    entropies = log_sums - moments / sums if with_entropies else torch.zeros_like(log_sums)
    return maxima + log_sums, chosen - maxima - log_sums, entropies
