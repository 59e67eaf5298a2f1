"""Log-probability of a token and entropy of the distribution it came from, both in nats, in one pass."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from egspo_lightning.ops.masking import Values, as_tensor

CHUNK_ELEMENTS = 2**25
"""Logits held at a time where no chunk size is given: 128 MiB in float32."""


class TokenStats(NamedTuple):
    """Per token, float32 (float64 where the input is)."""

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
        temperature: the sampling temperature; old, new and reference policy must use the same
    """
    logits, input_ids = _widen(as_tensor(logits)) / temperature, as_tensor(input_ids)
    log_probs = logits.log_softmax(-1)
    chosen = log_probs.gather(-1, input_ids.unsqueeze(-1)).squeeze(-1)
    # not log Z - E[logit], which cancels: with logits of 100 it is off by 1e-5 in float32
    return TokenStats(chosen, -(log_probs.exp() * log_probs).sum(-1))


def token_stats(
    hidden_states: Tensor,
    lm_head: nn.Linear | Tensor,
    input_ids: Tensor,
    *,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> TokenStats:
    """The same from hidden states, a chunk of tokens at a time: the logits (N, V) never exist at once.

    The backward pass recomputes each chunk's logits, which costs one more matrix product with the head, and needs
    memory for one chunk. With z the logits over the temperature, p their softmax:
    ``d log p_y / dz = onehot(y) - p`` and ``d H / dz = -p (log p + H)``.

    Args:
        hidden_states: (..., D), the state before each token
        lm_head: the output layer, or its weight (V, D)
        input_ids: (...) int64
        temperature: the sampling temperature
        chunk_size: tokens a chunk; by default as many as make ``CHUNK_ELEMENTS`` logits
    """
    weight: Tensor = lm_head if isinstance(lm_head, Tensor) else lm_head.weight
    bias: Tensor | None = None if isinstance(lm_head, Tensor) else lm_head.bias
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_states, weight = hidden_states.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if chunk_size is None:
        chunk_size = max(CHUNK_ELEMENTS // weight.shape[0], 16)
    logprobs, entropies = _ChunkedTokenStats.apply(
        hidden_states.reshape(-1, hidden_states.shape[-1]),
        weight,
        bias,
        input_ids.reshape(-1),
        temperature,
        chunk_size,
    )
    return TokenStats(logprobs.view(input_ids.shape), entropies.view(input_ids.shape))


def _widen(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    logits = _widen(torch.nn.functional.linear(hidden, weight, bias))
    return logits if temperature == 1.0 else logits / temperature


class _ChunkedTokenStats(torch.autograd.Function):
    """Forward keeps hidden states, log-normalisers and entropies; backward recomputes the logits by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (N, D)
        weight: Tensor,  # (V, D)
        bias: Tensor | None,  # (V,)
        input_ids: Tensor,  # (N,)
        temperature: float,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        wide = hidden.dtype if hidden.dtype == torch.float64 else torch.float32
        log_norms, chosen, entropies = (hidden.new_empty(hidden.shape[0], dtype=wide) for _ in range(3))
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], chunk_size):
                part = slice(start, start + chunk_size)
                logits = _logits(hidden[part], weight, bias, temperature)
                log_norms[part] = logits.logsumexp(-1)
                log_probs = logits.sub_(log_norms[part].unsqueeze(-1))
                chosen[part] = log_probs.gather(-1, input_ids[part].unsqueeze(-1)).squeeze(-1)
                entropies[part] = -torch.linalg.vecdot(log_probs.exp(), log_probs)
        ctx.save_for_backward(hidden, weight, bias, input_ids, log_norms, entropies)
        ctx.temperature, ctx.chunk_size = temperature, chunk_size
        ctx.set_materialize_grads(False)
        return chosen, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropies: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, input_ids, log_norms, entropies = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=log_norms.dtype)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=log_norms.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], ctx.chunk_size):
                part = slice(start, start + ctx.chunk_size)
                log_probs = _logits(hidden[part], weight, bias, ctx.temperature) - log_norms[part].unsqueeze(-1)
                grad = _grad_logits(log_probs, input_ids[part], entropies[part], grad_logprobs, grad_entropies, part)
                grad = (grad / ctx.temperature).to(weight.dtype)
                grad_hidden[part] = grad @ weight
                grad_weight += grad.T @ hidden[part]
                if grad_bias is not None:
                    grad_bias += grad.sum(0)
        grad_bias = None if grad_bias is None else grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight.to(weight.dtype), grad_bias, None, None, None


def _grad_logits(
    log_probs: Tensor,
    input_ids: Tensor,
    entropies: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropies: Tensor | None,
    part: slice,
) -> Tensor:
    """Gradient with respect to ``logits / temperature`` of one chunk, (n, V)."""
    probs = log_probs.exp()
    grad = torch.zeros_like(probs)
    if grad_logprobs is not None:
        upstream = grad_logprobs[part].unsqueeze(-1)
        grad -= probs * upstream
        grad.scatter_add_(-1, input_ids.unsqueeze(-1), upstream)
    if grad_entropies is not None:
        grad -= probs * (log_probs + entropies.unsqueeze(-1)) * grad_entropies[part].unsqueeze(-1)
    return grad
