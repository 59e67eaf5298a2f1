"""Right padding of sequences of different lengths, and the lengths of padded sequences."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

BLANK_TOKENS = 2
"""Length of the masked row that stands in for an empty micro-batch: every rank must run forward and backward."""


def pad_right(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int) -> tuple[Tensor, Tensor]:
    """``input_ids`` and ``completion_mask``, (B, T), of (prompt, completion) pairs."""
    rows = [torch.tensor([*prompt, *completion], dtype=torch.long) for prompt, completion in pairs]
    masks = [torch.arange(len(row)) >= len(prompt) for row, (prompt, _) in zip(rows, pairs, strict=True)]
    return pad_sequence(rows, batch_first=True, padding_value=pad_id), pad_sequence(masks, batch_first=True)


def row_lengths(completion_mask: Tensor) -> Tensor:
    """Length of each sequence: one past its last completion token, 0 where it has none. (B,)"""
    positions = torch.arange(1, completion_mask.shape[1] + 1, device=completion_mask.device)
    return (completion_mask * positions).amax(-1)
