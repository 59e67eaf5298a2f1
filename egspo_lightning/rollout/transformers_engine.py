"""Transformers engine: samples with the training model in a decode loop, in place of ``generate``.

The loop suits models with a cache of keys and values. Others are decoded by ``generate_decoding``, which is slower.

Differences from ``generate``:

- All completions of a prompt share one prefill.
- Rows that have ended leave the batch, and can be graded while the others are decoded.
- Each completion has its own random stream. So a sample depends on its seed and prompt alone, whatever the batch, the
  number of ranks and the global random state.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache

from egspo_lightning.errors import PASS_ERRORS
from egspo_lightning.rollout.engine import Request, RolloutEngine, Sample
from egspo_lightning.rollout.generate_decoding import decode_by_generate
from egspo_lightning.rollout.token_sampling import RandomStreams, TokenSampler
from egspo_lightning.types import Count, Sampling

SHRINK_BELOW = 0.75
"""Ended rows are dropped once at most this share of the batch still runs: dropping rows copies the cache."""
YIELD_FROM = 0.25
"""Dropped rows are yielded for grading once they are at least this share of the batch as it began."""


@dataclass
class TransformersEngine(RolloutEngine):
    """Samples with the training model itself, so weights never need to be synchronized.

    Args:
        max_batch_size: Most completions decoded at a time; fewer need less memory for the cache.
    """

    max_batch_size: Count = 256
    is_reentrant: ClassVar[bool] = True
    """Threads may sample at the same time: calls share no state."""

    def stream(
        self, lm: Any, requests: Sequence[Request], sampling: Sampling, *, eos_ids: Sequence[int], pad_id: int
    ) -> Iterator[list[tuple[int, Sample]]]:
        """See ``RolloutEngine``; prompts of similar length are batched together."""
        lengths = [len(request.prompt_ids) for request in requests]
        order = sorted(range(len(requests)), key=lengths.__getitem__)  # keeps equal prompts adjacent
        uses_loop = suits_decode_loop(lm)
        decode = _decode if uses_loop else decode_by_generate
        runs = [order] if uses_loop else [list(run) for _, run in groupby(order, key=lengths.__getitem__)]
        size = self.max_batch_size
        for part in (run[start : start + size] for run in runs for start in range(0, len(run), size)):
            batch = [requests[i] for i in part]
            for done in decode(lm, batch, sampling, eos_ids=eos_ids, pad_id=pad_id):
                yield [(part[row], sample) for row, sample in done]

    def generate(
        self, lm: Any, requests: Sequence[Request], sampling: Sampling, *, eos_ids: Sequence[int], pad_id: int
    ) -> list[Sample]:
        """All samples at once, in the order of the requests."""
        batches = self.stream(lm, requests, sampling, eos_ids=eos_ids, pad_id=pad_id)
        return [sample for _, sample in sorted(pair for batch in batches for pair in batch)]


@torch.no_grad()
def _decode(
    lm: Any, requests: list[Request], sampling: Sampling, *, eos_ids: Sequence[int], pad_id: int
) -> Iterator[list[tuple[int, Sample]]]:
    """Yield (row, sample) pairs as rows leave the batch."""
    device = next(lm.parameters()).device
    limit = sampling.max_completion_length
    streams = RandomStreams([request.seed for request in requests], device) if sampling.temperature > 0 else None
    state = _prefill(lm, requests, pad_id, device)
    ends = torch.tensor(list(eos_ids), device=device)
    sampler = TokenSampler(len(requests), state.logits.shape[-1], sampling, device)
    rows = torch.arange(len(requests), device=device)  # row numbers of the shrinking batch in the whole batch
    running = torch.ones(len(requests), dtype=torch.bool, device=device)  # which of these rows have not ended
    dropped = rows[:0]  # and not yielded yet
    for step in range(limit):
        uniforms = None if streams is None else streams.draw(limit - step)
        chosen = sampler.draw(state.logits, uniforms, rows, running)
        running = running & ~torch.isin(chosen, ends)
        num_running = int(running.sum())  # the only wait for the device in a step
        if num_running == 0 or step == limit - 1:
            break
        if num_running <= SHRINK_BELOW * len(rows):
            dropped = torch.cat([dropped, rows[~running]])
            if len(dropped) >= YIELD_FROM * len(requests):
                yield sampler.samples(dropped)
                dropped = rows[:0]
            kept = running.nonzero().squeeze(1)
            state.select(kept)
            rows, chosen, running = rows[kept], chosen[kept], running[kept]
            if streams is not None:
                streams.select(kept)
        state.advance(lm, chosen)
    yield sampler.samples(torch.cat([dropped, rows]), rows[running])


class CompactCache(DynamicCache):
    """Cache that keeps keys and values in the dtype in which attention computes.

    Under autocast, rotary embeddings promote them to float32, which would double the memory of the cache. Attention
    casts them back at every step.
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
    """The cache of the rows in the batch, and the logits of their next token."""

    cache: DynamicCache
    logits: Tensor  # (B, V)
    attention_mask: Tensor | None  # (B, T) int64; None where no row is padded
    positions: Tensor  # (B, 1): position of the next token

    def select(self, kept: Tensor) -> None:
        """Keep only these rows."""
        self.cache.batch_select_indices(kept)
        self.positions = self.positions[kept]
        if self.attention_mask is not None:
            self.attention_mask = self.attention_mask[kept]

    def advance(self, lm: Any, chosen: Tensor) -> None:
        """Run the model on the chosen tokens, (B,)."""
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
    runs = [(prompt, len(list(run))) for prompt, run in groupby(request.prompt_ids for request in requests)]
    prompts, repeats = zip(*runs, strict=True)
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.tensor([[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    mask = (torch.arange(width, device=device) >= (width - lengths).unsqueeze(1)).long()
    is_padded = any(len(prompt) < width for prompt in prompts)
    cache = CompactCache(config=lm.config)
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
    repeated = mask[index] if is_padded else None
    return _DecodeState(cache, output.logits[index, -1], repeated, lengths[index].unsqueeze(1))


_SUITS_LOOP: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def suits_decode_loop(lm: Any) -> bool:
    """Whether the decode loop gives a model's own logits; tried once, on two prompts of different lengths."""
    if lm not in _SUITS_LOOP:
        _SUITS_LOOP[lm] = False
        with suppress(*PASS_ERRORS):  # its cache holds something else than keys and values
            _SUITS_LOOP[lm] = _has_own_logits(lm)
    return _SUITS_LOOP[lm]


@torch.no_grad()
def _has_own_logits(lm: Any) -> bool:
    """Whether logits after a prefill with padding, a selection of rows and two steps are those of each row alone."""
    device = next(lm.parameters()).device
    long, short = (torch.tensor([row], device=device) for row in ([1, 2, 3, 2, 0, 3, 3, 1], [0, 3, 1, 2, 3]))
    rows = [short, long, long]
    with torch.autocast(device.type, enabled=False):
        state = _prefill(lm, [Request(row[0, :-2].tolist(), "") for row in rows], 0, device)
        state.select(torch.tensor([2, 0, 1], device=device))
        rows = [long, short, long]
        for step in (-2, -1):
            state.advance(lm, torch.cat([row[:, step] for row in rows]))
        alone = torch.cat([lm(input_ids=row, use_cache=False).logits[:, -1] for row in rows])
    distance = (state.logits - alone).float().norm() / alone.float().norm()
    return bool(distance < (1e-2 if alone.dtype == torch.float32 else 0.25))
