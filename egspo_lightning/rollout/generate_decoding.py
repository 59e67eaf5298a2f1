"""Decoding by transformers' ``generate``, for models that the engine's decode loop cannot decode.

These models keep a recurrent state in place of keys and values (Mamba, RWKV), or take neither positions nor padding.
``generate`` knows how each of them is decoded. Here it decodes prompts of one length at a time, so nothing is padded,
and each completion draws from its own random stream, as in the decode loop. There is no shared prefill, and ended rows
stay in the batch.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from egspo_lightning.rollout.engine import Request, Sample
from egspo_lightning.rollout.token_sampling import RandomStreams, TokenSampler
from egspo_lightning.types import Sampling


@torch.no_grad()
def decode_by_generate(
    lm: Any, requests: Sequence[Request], sampling: Sampling, *, eos_ids: Sequence[int], pad_id: int
) -> Iterator[list[tuple[int, Sample]]]:
    """Yield all (row, sample) pairs at once; the prompts have one length."""
    device = next(lm.parameters()).device
    input_ids = torch.tensor([list(request.prompt_ids) for request in requests], device=device)
    draws = _Draws([request.seed for request in requests], sampling, torch.tensor(list(eos_ids), device=device))
    config = GenerationConfig(
        max_new_tokens=sampling.max_completion_length,
        do_sample=False,  # the only token that _Draws leaves is the most probable one
        eos_token_id=list(eos_ids) or None,
        pad_token_id=pad_id,
    )
    with _without_defaults(lm):
        lm.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=config,
            logits_processor=LogitsProcessorList([draws]),
            synced_gpus=False,  # weights are gathered, and ranks are independent
        )
    yield draws.samples()


class _Draws(LogitsProcessor):
    """Draws the next token of each row from the row's random stream, and makes all other tokens impossible."""

    def __init__(self, seeds: Sequence[str], sampling: Sampling, ends: Tensor) -> None:
        self._sampling, self._ends, self._num_left = sampling, ends, sampling.max_completion_length
        self._streams = RandomStreams(seeds, ends.device) if sampling.temperature > 0 else None
        self._rows = torch.arange(len(seeds), device=ends.device)
        self._running = torch.ones(len(seeds), dtype=torch.bool, device=ends.device)
        self._sampler: TokenSampler | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self._running.any():  # generate may take a step more on a GPU
            return scores
        if self._sampler is None:
            self._sampler = TokenSampler(len(scores), scores.shape[-1], self._sampling, scores.device)
        uniforms = None if self._streams is None else self._streams.draw(self._num_left)
        chosen = self._sampler.draw(scores, uniforms, self._rows, self._running)
        self._running, self._num_left = self._running & ~torch.isin(chosen, self._ends), self._num_left - 1
        return torch.full_like(scores, -torch.inf).scatter(1, chosen.unsqueeze(1), 0.0)

    def samples(self) -> list[tuple[int, Sample]]:
        """All samples; rows that are still running are truncated."""
        assert self._sampler is not None
        return self._sampler.samples(self._rows, self._rows[self._running])


@contextmanager
def _without_defaults(lm: Any) -> Iterator[None]:
    """Leave out the model's own generation settings: repetition penalties and the like change the distribution."""
    kept, lm.generation_config = lm.generation_config, GenerationConfig()
    try:
        yield
    finally:
        lm.generation_config = kept
