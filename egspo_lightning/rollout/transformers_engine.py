"""Sampling with transformers' own forward pass and cache, in a decode loop that wastes little.

What `generate` does not do and this does: the prompt is computed once for all its completions; rows that have ended
leave the batch; each completion has a random stream of its own, so that a sample depends on its seed and prompt and
not on batch composition, number of ranks or global RNG state.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from egspo_lightning.errors import UserError
from egspo_lightning.rollout.engine import Request, Sample
from egspo_lightning.types import Sampling

SHRINK_BELOW = 0.75
"""Ended rows are dropped when this share of the batch or less is still running: dropping copies the cache."""
STEPS_AHEAD = 64
"""Random numbers are drawn for this many steps at a time: in one go for a short limit, not all of a long one."""


@dataclass(frozen=True)
class TransformersEngine:
    """Samples with the training model itself, so weights never need to be synchronised.

    Args:
        max_batch_size: Completions decoded at a time; less needs less memory for the cache.
    """

    max_batch_size: int = 256
    is_reentrant: ClassVar[bool] = True
    """Nothing is kept from call to call, so threads may sample at the same time."""

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
    streams = RandomStreams([request.seed for request in requests], device) if sampling.temperature > 0 else None
    state = _prefill(lm, requests, pad_id, device)
    ends = torch.tensor(list(eos_ids), device=device)
    written = _Written.blank(len(requests), limit, device)
    rows = torch.arange(len(requests), device=device)  # where each row of the shrinking batch belongs
    running = torch.ones(len(requests), dtype=torch.bool, device=device)  # of those rows
    for step in range(limit):
        drawn = sample_tokens(state.logits, None if streams is None else streams.draw(limit - step), sampling)
        written.put(rows, step, drawn, running)
        running = running & ~torch.isin(drawn.tokens, ends)
        num_running = int(running.sum())  # the one time a step that the host waits for the device
        if num_running == 0 or step == limit - 1:
            break
        chosen = drawn.tokens
        if num_running <= SHRINK_BELOW * len(rows):
            kept = running.nonzero().squeeze(1)
            state.select(kept)
            rows, chosen, running = rows[kept], chosen[kept], running[kept]
            if streams is not None:
                streams.select(kept)
        state.advance(lm, chosen)
    return written.samples(rows[running])


@dataclass(frozen=True)
class _Written:
    """What has been sampled, (B, limit) each, and how long each completion is, (B,)."""

    tokens: Tensor
    logprobs: Tensor
    entropies: Tensor
    lengths: Tensor

    @classmethod
    def blank(cls, size: int, limit: int, device: torch.device) -> "_Written":
        shape = size, limit
        tokens, logprobs, entropies = (
            torch.zeros(shape, device=device, dtype=t) for t in (torch.long, *2 * (torch.float32,))
        )
        return cls(tokens, logprobs, entropies, torch.zeros(size, dtype=torch.long, device=device))

    def put(self, rows: Tensor, step: int, drawn: "Drawn", running: Tensor) -> None:
        """Write a step; what rows that have ended are given lies beyond their length."""
        for whole, column in zip((self.tokens, self.logprobs, self.entropies), drawn, strict=True):
            whole[rows, step] = column
        self.lengths[rows] += running

    def samples(self, running: Tensor) -> list[Sample]:
        """One a row; those that still run have been cut off."""
        is_cut = torch.zeros_like(self.lengths, dtype=torch.bool).index_fill_(0, running, True)
        longest = int(self.lengths.max())  # the limit may be many times that
        tokens, logprobs, entropies = (whole[:, :longest] for whole in (self.tokens, self.logprobs, self.entropies))
        columns = (tokens, self.lengths, is_cut, logprobs, entropies)
        return [
            Sample(tokens[:length], cut, logprobs[:length], entropies[:length])
            for tokens, length, cut, logprobs, entropies in zip(*(c.tolist() for c in columns), strict=True)
        ]


class RandomStreams:
    """Numbers in [0, 1), a stream for each row of a batch: a function of the row's seed alone.

    Args:
        seeds: Their names.
        device: Where the numbers are needed.
    """

    def __init__(self, seeds: Sequence[str], device: torch.device) -> None:
        self._generators = [random.Random(seed) for seed in seeds]
        self._device = device
        self._ahead = torch.empty(len(seeds), 0, device=device)  # (B, steps), drawn and not yet used up
        self._used = 0  # steps of them

    def draw(self, num_left: int) -> Tensor:
        """The next number of each row, (B,) float32; ``num_left`` are the most that will be asked for, with these."""
        if self._used == self._ahead.shape[1]:
            steps, self._used = range(min(STEPS_AHEAD, num_left)), 0
            numbers = [[draw() for _ in steps] for draw in (generator.random for generator in self._generators)]
            self._ahead = torch.tensor(numbers, dtype=torch.float32, device=self._device)
        self._used += 1
        return self._ahead[:, self._used - 1]

    def select(self, kept: Tensor) -> None:
        """Keep these rows alone."""
        self._ahead = self._ahead[kept]
        self._generators = [self._generators[row] for row in kept.tolist()]


class CompactCache(DynamicCache):
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


class Drawn(NamedTuple):
    """One token a row, with the statistics of the distribution at the sampling temperature, (B,) each."""

    tokens: Tensor
    logprobs: Tensor
    entropies: Tensor


def sample_tokens(logits: Tensor, uniforms: Tensor | None, sampling: Sampling) -> Drawn:
    """One token a row by inverting the distribution function: the first v with ``sum_{w <= v} p_w > u``.

    One softmax serves for sampling and statistics; those are of the whole distribution, whatever ``top_p``, and at
    temperature 1 where sampling is greedy.

    Args:
        logits: (B, V)
        uniforms: (B,) in [0, 1]; None for greedy
        sampling: temperature and top_p
    """
    scaled = logits.float() if sampling.temperature in (0, 1) else logits.float() / sampling.temperature
    log_probs = scaled.log_softmax(-1)
    probs = log_probs.exp()
    if uniforms is None or sampling.temperature == 0:
        tokens = logits.argmax(-1)
    else:
        tokens = _invert(probs, uniforms, sampling.top_p)
    logprobs = log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    with torch.autocast(logits.device.type, enabled=False):  # it would take the product in half precision
        entropies = -torch.linalg.vecdot(probs, log_probs)
    return Drawn(tokens, logprobs, entropies)


def _invert(probs: Tensor, uniforms: Tensor, top_p: float) -> Tensor:
    if top_p < 1:
        probs = _nucleus(probs, top_p)
    cumulative = probs.cumsum(-1)
    total = cumulative[:, -1]  # 1 but for rounding
    # a uniform just below 1 is 1 in float32: without the bound it would choose the last token, possible or not
    target = (uniforms * total).minimum(total.nextafter(torch.zeros_like(total)))
    chosen = torch.searchsorted(cumulative, target.unsqueeze(1), right=True).squeeze(1)
    return chosen.clamp(max=probs.shape[-1] - 1)  # only NaN exceeds it


def _nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Zero all but the most probable tokens that reach ``top_p`` together."""
    ranked, order = probs.sort(-1, descending=True)
    kept = ranked.cumsum(-1) - ranked < top_p
    return torch.zeros_like(probs).scatter(-1, order, ranked * kept)
