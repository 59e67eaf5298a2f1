"""Log-probability of a token and entropy of the distribution it came from, both in nats, in one pass."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from egspo_lightning.ops.masking import Values, as_tensor

CPU_TILE, GPU_TILE = 2**21, 2**25
"""Logits held at a time where no sizes are given: 8 MiB in float32, and 128 MiB."""

TILE_TOKENS = 2048
"""Tokens a tile, where there are so many: for them a tile of the head is read, and its gradient written, once."""

MOSTLY = 7 / 8
"""Share of tokens with an upstream gradient from which on none is left out: choosing copies what is chosen."""


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


def stats_from_probs(probs: Tensor, logits: Tensor, input_ids: Tensor, *, with_entropies: bool = True) -> TokenStats:
    """The same where the softmax is there already, without an exponential or a logarithm for each entry.

    With m the largest logit ``log p_v = z_v - m + log max_w p_w``; so ``H = -log max_w p_w - sum_v p_v (z_v - m)``, two
    terms that are never negative.

    Args:
        probs: (N, V), float32 or wider
        logits: (N, V), z, over the temperature; with entropies they are overwritten
        input_ids: (N,) int64
        with_entropies: whether anybody asks for them; otherwise they are 0
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
    """The same from hidden states, a tile of tokens x vocabulary at a time: the logits (N, V) never exist at once.

    With z the logits over the temperature, p their softmax and m a running maximum, ``s = sum_v exp(z_v - m)`` and
    ``u = sum_v exp(z_v - m) (z_v - m)`` are carried from tile to tile; then ``log p_y = z_y - m - log s`` and
    ``H = log s - u / s``, whose two terms are never negative, so that nothing cancels.

    The backward pass makes each tile anew, which costs one more matrix product with the head:
    ``d log p_y / dz = onehot(y) - p`` and ``d H / dz = -p (log p + H)``. Tokens without an upstream gradient have no
    part in it, unless they are few. Where a single tile holds all, its p is kept from the forward pass, and serves for
    ``d log p_y / dz``.

    Args:
        hidden_states: (..., D), the state before each token
        lm_head: the output layer, or its weight (V, D)
        input_ids: (...) int64
        temperature: the sampling temperature
        chunk_size: tokens a tile; by default ``TILE_TOKENS``, or more where a tile then still has the whole vocabulary
        vocab_chunk_size: vocabulary entries a tile; by default as many as make ``CPU_TILE`` or ``GPU_TILE`` logits
        with_entropies: whether anybody asks for them; otherwise they are 0, and cost nothing
    """
    weight: Tensor = lm_head if isinstance(lm_head, Tensor) else lm_head.weight
    bias: Tensor | None = None if isinstance(lm_head, Tensor) else lm_head.bias
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device) and hidden_states.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        hidden_states, weight = hidden_states.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    logprobs, entropies = _TiledTokenStats.apply(
        hidden_states.reshape(-1, hidden_states.shape[-1]),
        weight,
        bias,
        input_ids.reshape(-1),
        temperature,
        chunk_size,
        vocab_chunk_size,
        with_entropies,
    )
    return TokenStats(logprobs.view(input_ids.shape), entropies.view(input_ids.shape))


def token_stats_bytes(num_tokens: int, weight: Tensor, *, device: str = "cpu") -> int:
    """Bytes that ``token_stats`` needs at most, forward and backward, beyond its inputs and their gradients.

    Args:
        num_tokens: N
        weight: (V, D), of which only shape, dtype and whether it is trained count
        device: type of the device, which decides on the tiles
    """
    entries, hidden = weight.shape
    wide = 4 if weight.dtype != torch.float64 else 8
    elements = CPU_TILE if device == "cpu" else GPU_TILE
    height = min(max(TILE_TOKENS, elements // entries), max(num_tokens, 1))
    tile = height * min(max(elements // height, 1), entries)
    states = num_tokens * hidden * (weight.element_size() + wide)  # those with a gradient, and that gradient
    of_head = entries * hidden * wide if weight.requires_grad else 0
    buffers = tile * wide * (1 if weight.element_size() == wide else 2)
    buffers += tile * wide if tile == num_tokens * entries else 0  # kept from forward to backward
    return states + of_head + buffers + 8 * num_tokens * wide


def _widen(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


class _Tiles:
    """Cuts tokens x vocabulary into tiles, and computes their logits into one buffer."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        temperature: float,
        chunk_size: int | None,
        vocab_chunk_size: int | None,
        probs: Tensor | None = None,
    ) -> None:
        self.hidden, self.weight, self.bias, self.temperature = hidden, weight, bias, temperature
        self.probs = probs
        """(N, V), where the forward pass has kept them"""
        (num_tokens, _), (num_entries, _) = hidden.shape, weight.shape
        elements = CPU_TILE if hidden.device.type == "cpu" else GPU_TILE
        height = min(chunk_size or max(TILE_TOKENS, elements // num_entries), max(num_tokens, 1))
        width = min(vocab_chunk_size or max(elements // height, 1), num_entries)
        self.tokens = [slice(i, min(i + height, num_tokens)) for i in range(0, num_tokens, height)]
        self.entries = [slice(i, min(i + width, num_entries)) for i in range(0, num_entries, width)]
        self._size, self._buffers = height * width, dict[tuple[str, torch.dtype], Tensor]()

    @property
    def is_single(self) -> bool:
        """Whether one tile holds everything."""
        return len(self.tokens) == len(self.entries) == 1

    def logits(self, tokens: slice, entries: slice) -> Tensor:
        """(n, v) over the temperature, float32 or wider, in a buffer that the next call uses again."""
        hidden, weight = self.hidden[tokens], self.weight[entries]
        product = self.buffer("product", torch.Size((len(hidden), len(weight))), hidden.dtype)
        if self.bias is None:
            torch.mm(hidden, weight.T, out=product)
        else:
            torch.addmm(self.bias[entries], hidden, weight.T, out=product)
        wide = _wide_dtype(hidden.dtype)
        logits = product if hidden.dtype == wide else self.buffer("wide", product.shape, wide).copy_(product)
        return logits if self.temperature == 1.0 else logits.div_(self.temperature)

    def buffer(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """(n, v), contiguous; what it held is lost."""
        if (name, dtype) not in self._buffers:
            self._buffers[name, dtype] = self.hidden.new_empty(self._size, dtype=dtype)
        return self._buffers[name, dtype][: shape.numel()].view(shape)


class _TiledTokenStats(torch.autograd.Function):
    """Forward keeps hidden states, log-normalizers and entropies; backward recomputes the logits tile by tile.

    Unless there is one tile: then its probabilities are kept, which need no more than it has.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (N, D)
        weight: Tensor,  # (V, D)
        bias: Tensor | None,  # (V,)
        input_ids: Tensor,  # (N,)
        temperature: float,
        chunk_size: int | None,
        vocab_chunk_size: int | None,
        with_entropies: bool,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(hidden.device.type, enabled=False):
            tiles = _Tiles(hidden, weight, bias, temperature, chunk_size, vocab_chunk_size)
            measure = _at_once if tiles.is_single else _in_turn
            log_norms, chosen, entropies, probs = measure(tiles, input_ids, with_entropies)
        ctx.save_for_backward(hidden, weight, bias, input_ids, log_norms, entropies, probs)
        ctx.settings = temperature, chunk_size, vocab_chunk_size
        ctx.set_materialize_grads(False)
        if not with_entropies:
            ctx.mark_non_differentiable(entropies)
        return chosen, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropies: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, input_ids, log_norms, entropies, probs = ctx.saved_tensors
        active = _pulled(log_norms, grad_logprobs, grad_entropies)
        hidden_active, *rest = _select(active, hidden, input_ids, log_norms, entropies, grad_logprobs, grad_entropies)
        kept = _select(active, probs)[0] if grad_entropies is None else None
        with torch.autocast(hidden.device.type, enabled=False):
            temperature, chunk_size, vocab_chunk_size = ctx.settings
            tiles = _Tiles(hidden_active, weight, bias, temperature, chunk_size, vocab_chunk_size, kept)
            trains_head = any(ctx.needs_input_grad[1:3])
            grad_active, grad_weight, grad_bias = _pull_back(tiles, _Upstream(*rest), log_norms.dtype, trains_head)
        grad_hidden = grad_active.to(hidden.dtype)
        if active is not None:
            grad_hidden = torch.zeros_like(hidden).index_copy_(0, active, grad_hidden)
        if not trains_head:
            return grad_hidden, *[None] * 7
        of_bias = None if bias is None else grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight.to(weight.dtype), of_bias, *[None] * 5


def _pulled(like: Tensor, *pulls: Tensor | None) -> Tensor | None:
    """Numbers of the tokens that have an upstream gradient; None where nearly all have."""
    is_pulled = torch.zeros_like(like, dtype=torch.bool)
    for pull in pulls:
        if pull is not None:
            is_pulled |= pull != 0
    numbers = is_pulled.nonzero().squeeze(1)
    return None if len(numbers) >= MOSTLY * len(like) else numbers


def _select(tokens: Tensor | None, *tensors: Tensor | None) -> list[Any]:
    """Some tokens' part of each tensor that is there; None selects all."""
    return [tensor if tensor is None or tokens is None else tensor[tokens] for tensor in tensors]


def _at_once(tiles: _Tiles, input_ids: Tensor, with_entropies: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-normalizer, log-probability and entropy of all tokens, (N,) each, and their probabilities, (N, V)."""
    logits, own = tiles.logits(tiles.tokens[0], tiles.entries[0]), input_ids.unsqueeze(-1)
    probs, found = logits.softmax(-1), logits.gather(-1, own).squeeze(-1)
    chosen, entropies = stats_from_probs(probs, logits, input_ids, with_entropies=with_entropies)
    return found - chosen, chosen, entropies, probs


def _in_turn(tiles: _Tiles, input_ids: Tensor, with_entropies: bool) -> tuple[Tensor, Tensor, Tensor, None]:
    """The same tile by tile; probabilities are not kept."""
    wide = _wide_dtype(tiles.hidden.dtype)
    log_norms, chosen, entropies = (tiles.hidden.new_empty(len(input_ids), dtype=wide) for _ in range(3))
    for tokens in tiles.tokens:
        log_norms[tokens], chosen[tokens], entropies[tokens] = _fold(tiles, tokens, input_ids[tokens], with_entropies)
    return log_norms, chosen, entropies, None


def _fold(tiles: _Tiles, tokens: slice, input_ids: Tensor, with_entropies: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Log-normalizer, log-probability and entropy of some tokens, (n,) each."""
    maxima = tiles.hidden.new_full(
        input_ids.shape, torch.finfo(torch.float32).min, dtype=_wide_dtype(tiles.hidden.dtype)
    )
    sums, moments, chosen = (torch.zeros_like(maxima) for _ in range(3))
    for entries in tiles.entries:
        logits = tiles.logits(tokens, entries)
        found, inside = _at(logits, input_ids, entries)
        chosen = torch.where(inside, found, chosen)
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


def _at(logits: Tensor, input_ids: Tensor, entries: slice) -> tuple[Tensor, Tensor]:
    """The tokens' own logits, and whether they lie in this part of the vocabulary, (n,) each."""
    local = input_ids - entries.start
    inside = (local >= 0) & (local < logits.shape[1])
    return logits.gather(-1, local.clamp(0, logits.shape[1] - 1).unsqueeze(-1)).squeeze(-1), inside


class _Upstream(NamedTuple):
    """What the backward pass knows of each token, (N,) each."""

    input_ids: Tensor
    log_norms: Tensor
    entropies: Tensor
    pull_logprobs: Tensor | None
    pull_entropies: Tensor | None

    def of(self, tokens: slice) -> "_Upstream":
        """Some tokens' part."""
        pull_logprobs = None if self.pull_logprobs is None else self.pull_logprobs[tokens]
        pull_entropies = None if self.pull_entropies is None else self.pull_entropies[tokens]
        own = self.input_ids[tokens], self.log_norms[tokens], self.entropies[tokens]
        return _Upstream(*own, pull_logprobs, pull_entropies)


def _pull_back(
    tiles: _Tiles, upstream: _Upstream, wide: torch.dtype, trains_head: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden states, weight and bias, in ``wide``; those of a frozen head are empty."""
    hidden, weight = tiles.hidden, tiles.weight
    if tiles.is_single:
        grad = _grad_logits(tiles, tiles.tokens[0], tiles.entries[0], upstream)
        grad_bias = grad.sum(0) if tiles.bias is not None else weight.new_empty(0, dtype=wide)
        grad = grad.to(weight.dtype)
        return (grad @ weight).to(wide), (grad.T @ hidden if trains_head else weight.new_empty(0)).to(wide), grad_bias
    grad_hidden = torch.zeros_like(hidden, dtype=wide)
    grad_weight = torch.zeros_like(weight, dtype=wide) if trains_head else weight.new_empty(0, dtype=wide)
    grad_bias = weight.new_zeros(weight.shape[0], dtype=wide)
    for tokens in tiles.tokens:
        part = upstream.of(tokens)
        for entries in tiles.entries:
            grad = _grad_logits(tiles, tokens, entries, part)
            if tiles.bias is not None:
                grad_bias[entries] += grad.sum(0)
            grad = grad.to(weight.dtype)
            _add_product(grad_hidden[tokens], grad, weight[entries])
            if trains_head:
                _add_product(grad_weight[entries], grad.T, hidden[tokens])
    return grad_hidden, grad_weight, grad_bias


def _grad_logits(tiles: _Tiles, tokens: slice, entries: slice, upstream: _Upstream) -> Tensor:
    """Gradient with respect to the head's output in one tile, (n, v): that of ``logits / temperature`` over it."""
    input_ids, log_norms, entropies, pull_logprobs, pull_entropies = upstream
    if pull_entropies is None:
        pull_logprobs = torch.zeros_like(log_norms) if pull_logprobs is None else pull_logprobs
        factors = (-pull_logprobs / tiles.temperature).unsqueeze(-1)
        if tiles.probs is not None:
            grad = tiles.probs[tokens, entries] * factors
        else:
            grad = tiles.logits(tokens, entries).sub_(log_norms.unsqueeze(-1)).exp_().mul_(factors)
    else:
        log_probs = tiles.logits(tokens, entries).sub_(log_norms.unsqueeze(-1))
        probs = torch.exp(log_probs, out=tiles.buffer("second", log_probs.shape, log_probs.dtype))
        constant = pull_entropies * entropies + (0 if pull_logprobs is None else pull_logprobs)
        grad = log_probs.mul_(-pull_entropies.unsqueeze(-1)).sub_(constant.unsqueeze(-1))
        grad = grad.mul_(probs).div_(tiles.temperature)
    if pull_logprobs is not None:
        local = input_ids - entries.start
        inside = (local >= 0) & (local < grad.shape[1])
        own = torch.where(inside, pull_logprobs / tiles.temperature, 0.0)
        grad.scatter_add_(-1, local.clamp(0, grad.shape[1] - 1).unsqueeze(-1), own.unsqueeze(-1))
    return grad


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``, in place where the types allow it."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
