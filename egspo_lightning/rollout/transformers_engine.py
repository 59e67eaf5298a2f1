"""Sampling with transformers' own forward pass and cache, in a decode loop that wastes little.

What `generate` does not do and this does: the prompt is computed once for all its completions; rows that have ended
leave the batch; each completion has a random stream of its own, so that a sample depends on its seed and prompt and
not on batch composition, number of ranks or global RNG state.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from egspo_lightning.errors import UserError
from egspo_lightning.ops.token_stats import token_stats_from_logits
from egspo_lightning.rollout.engine import Request, Sample
from egspo_lightning.types import Sampling

SHRINK_BELOW = 0.75
"""Ended rows are dropped when this share of the batch or less is still running: dropping copies the cache."""


@dataclass(frozen=True)
class TransformersEngine:
    """Samples with the training model itself, so weights never need to be synchronised.

    Args:
        max_batch_size: Completions decoded at a time; less needs less memory for the cache.
    """

    max_batch_size: int = 256

    def __post_init__(self) -> None:
        if self.max_batch_size < 1:
            raise UserError(f"TransformersEngine.max_batch_size must be at least 1, got {self.max_batch_size}.")

    def stream(
        self, lm: Any, requests: Sequence[Request], sampling: Sampling, *, eos_ids: Sequence[int], pad_id: int
    ) -> Iterator[list[tuple[int, Sample]]]:
        """See ``RolloutEngine``; prompts of like length are batched together."""
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids))  # stable: equal ones stay
        for start in range(0, len(order), self.max_batch_size):
            part = order[start : start + self.max_batch_size]
            batch = [requests[i] for i in part]
            yield list(zip(part, _decode(lm, batch, sampling, eos_ids=eos_ids, pad_id=pad_id), strict=True))

    def generate(
        self, lm: Any, requests: Sequence[Request], sampling: Sampling, *, eos_ids: Sequence[int], pad_id: int
    ) -> list[Sample]:
        """All samples at once, in the order of the requests: for whoever has nothing to do in between."""
        batches = self.stream(lm, requests, sampling, eos_ids=eos_ids, pad_id=pad_id)
        return [sample for _, sample in sorted(pair for batch in batches for pair in batch)]


@torch.no_grad()
def _decode(
    lm: Any, requests: list[Request], sampling: Sampling, *, eos_ids: Sequence[int], pad_id: int
) -> list[Sample]:
    device = next(lm.parameters()).device
    limit = sampling.max_completion_length
    uniforms = _uniforms(requests, limit).to(device) if sampling.temperature > 0 else None
    state = _prefill(lm, requests, pad_id, device)
    ends = torch.tensor(list(eos_ids), device=device)
    tokens = torch.full((len(requests), limit), pad_id, device=device)
    logprobs = torch.zeros(len(requests), limit, device=device)
    lengths = torch.full((len(requests),), limit, device=device)
    ended = torch.zeros(len(requests), dtype=torch.bool, device=device)
    rows = torch.arange(len(requests), device=device)  # where each row of the shrinking batch belongs
    for step in range(limit):
        chosen = sample_tokens(state.logits, None if uniforms is None else uniforms[rows, step], sampling)
        running = ~ended[rows]
        tokens[rows, step] = torch.where(running, chosen, pad_id)
        logprobs[rows, step] = token_stats_from_logits(
            state.logits, chosen, temperature=sampling.temperature or 1.0
        ).logprobs
        hit = running & torch.isin(chosen, ends)
        lengths[rows[hit]] = step + 1
        ended[rows[hit]] = True
        keep = ~ended[rows]
        num_running = int(keep.sum())
        if num_running == 0 or step == limit - 1:
            break
        if num_running <= SHRINK_BELOW * len(rows):
            kept = keep.nonzero().squeeze(1)
            state.select(kept)
            rows, chosen = rows[kept], chosen[kept]
        state.advance(lm, chosen)
    return [
        Sample(row[:length], not has_ended, values[:length])
        for row, length, has_ended, values in zip(
            tokens.tolist(), lengths.tolist(), ended.tolist(), logprobs.tolist(), strict=True
        )
    ]


class _CompactCache(DynamicCache):
    """Keeps keys and values in the type that attention computes in.

    Rotary embeddings promote them to float32 under autocast, which would double the memory of the cache for nothing:
    attention casts them back at every step.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the states of new tokens."""
        device = key_states.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return keys, values


@dataclass
class _DecodeState:
    """The cache of the running rows, and the logits of their next token."""

    cache: DynamicCache
    logits: Tensor  # (B, V)
    attention_mask: Tensor | None  # (B, T) int64; None where no row is padded: then nothing needs a mask
    positions: Tensor  # (B, 1): position of the next token

    def select(self, kept: Tensor) -> None:
        """Keep these rows alone."""
        self.cache.batch_select_indices(kept)
        self.positions = self.positions[kept]
        if self.attention_mask is not None:
            self.attention_mask = self.attention_mask[kept]

    def advance(self, lm: Any, chosen: Tensor) -> None:
        """Feed the chosen tokens, (B,)."""
        if self.attention_mask is not None:
            self.attention_mask = torch.nn.functional.pad(self.attention_mask, (0, 1), value=1)
        output = lm(
            input_ids=chosen.unsqueeze(1),
            attention_mask=self.attention_mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.logits = output.logits[:, -1]
        self.positions = self.positions + 1


def _prefill(lm: Any, requests: list[Request], pad_id: int, device: torch.device) -> _DecodeState:
    """Run each distinct prompt once, padded on the left, and repeat its cache for its completions."""
    prompts, repeats = _distinct([request.prompt_ids for request in requests])
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.tensor([[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    mask = (torch.arange(width, device=device) >= (width - lengths).unsqueeze(1)).long()
    is_padded = any(len(prompt) < width for prompt in prompts)
    cache = _CompactCache(config=lm.config)
    output = lm(
        input_ids=input_ids,
        attention_mask=mask if is_padded else None,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    index = torch.repeat_interleave(torch.tensor(repeats, device=device))
    cache.batch_select_indices(index)
    return _DecodeState(
        cache, output.logits[index, -1], mask[index] if is_padded else None, lengths[index].unsqueeze(1)
    )


def _distinct(prompts: Sequence[Sequence[int]]) -> tuple[list[Sequence[int]], list[int]]:
    """Runs of equal prompts as (prompts, lengths of the runs)."""
    distinct: list[Sequence[int]] = []
    repeats: list[int] = []
    for prompt in prompts:
        if distinct and prompt == distinct[-1]:
            repeats[-1] += 1
        else:
            distinct.append(prompt)
            repeats.append(1)
    return distinct, repeats


def sample_tokens(logits: Tensor, uniforms: Tensor | None, sampling: Sampling) -> Tensor:
    """One token a row by inverting the distribution function: the first v with ``sum_{w <= v} p_w > u``.

    Args:
        logits: (B, V)
        uniforms: (B,) in [0, 1]; None for greedy
        sampling: temperature and top_p
    """
    if uniforms is None or sampling.temperature == 0:
        return logits.argmax(-1)
    probs = torch.softmax(logits.float() / sampling.temperature, -1)
    if sampling.top_p < 1:
        probs = _nucleus(probs, sampling.top_p)
    cumulative = probs.cumsum(-1)
    total = cumulative[:, -1]  # 1 but for rounding
    # a uniform just below 1 is 1 in float32: without the bound it would choose the last token, possible or not
    target = (uniforms * total).minimum(total.nextafter(torch.zeros_like(total)))
    chosen = torch.searchsorted(cumulative, target.unsqueeze(1), right=True).squeeze(1)
    return chosen.clamp(max=logits.shape[-1] - 1)  # only NaN exceeds it


def _nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Zero all but the most probable tokens that reach ``top_p`` together."""
    ranked, order = probs.sort(-1, descending=True)
    kept = ranked.cumsum(-1) - ranked < top_p
    return torch.zeros_like(probs).scatter(-1, order, ranked * kept)


def _uniforms(requests: list[Request], limit: int) -> Tensor:
    """(B, limit) in [0, 1), each row a function of its request's seed alone."""

    def stream(seed: str) -> Iterator[float]:
        draw = random.Random(seed).random
        return (draw() for _ in range(limit))

    return torch.tensor([list(stream(request.seed)) for request in requests], dtype=torch.float32)
