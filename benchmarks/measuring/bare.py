"""Lower bound of an iteration's compute: bare model passes over the same tokens."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from egspo_lightning.ops.batching import row_lengths
from measuring.timing import Reading, Stopwatch


def bare_steps(module: Any, batches: Sequence[Any]) -> None:
    """Forward and backward passes of the cross entropy over as many tokens as an iteration's batches hold.

    Each micro-batch becomes a rectangle without padding, with the same number of rows and, up to rounding, tokens.
    """
    for batch in batches:
        for part in (batch.rollout, batch.expert):
            if part is not None and bool(part.completion_mask.any()):
                _bare_pass(module.policy.lm, part.input_ids, part.completion_mask)


def _bare_pass(lm: Any, input_ids: Tensor, mask: Tensor) -> None:
    lengths = row_lengths(mask)
    width = min(round(lengths.float().mean().item()), input_ids.shape[1])
    num_targets = min(int(mask.sum()), input_ids.shape[0] * (width - 1))
    ids = input_ids[:, :width]
    hidden = lm.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    logits = lm.get_output_embeddings()(hidden[:, :-1].flatten(0, 1)[-num_targets:])
    F.cross_entropy(logits, ids[:, 1:].flatten()[-num_targets:]).backward()


@torch.no_grad()
def bare_decode(lm: Any, prompts: Tensor, repeats: int, lengths: Sequence[int]) -> Reading:
    """Time the forward passes that decoding needs for completions of these lengths, and nothing else.

    Args:
        lm: language model
        prompts: (P, T) distinct prompts of equal length
        repeats: completions per prompt
        lengths: lengths of the P * repeats completions, in tokens
    """
    cache = DynamicCache(config=lm.config)
    watch, left = Stopwatch(), torch.tensor(sorted(lengths, reverse=True))
    watch.start()
    lm(input_ids=prompts, past_key_values=cache, use_cache=True, logits_to_keep=1)
    watch.stop()
    cache.batch_select_indices(torch.arange(len(prompts)).repeat_interleave(repeats))
    for step in range(1, max(lengths)):
        running = int((left > step).sum())
        if running < len(left):
            left = left[:running]
            cache.batch_select_indices(torch.arange(running))
        ids = prompts[:1, -1:].expand(running, 1)
        watch.start()
        lm(input_ids=ids, past_key_values=cache, use_cache=True)
        watch.stop()
    return watch.total
