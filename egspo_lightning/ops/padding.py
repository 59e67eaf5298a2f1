"""Right padding of sequences of different lengths, and the lengths of padded sequences."""

from collections.abc import Sequence

import torch
from torch import Tensor


def pad_right(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int) -> tuple[Tensor, Tensor]:
    """``input_ids`` and ``completion_mask``, (B, T), of (prompt, completion) pairs."""
    width = max(len(prompt) + len(completion) for prompt, completion in pairs)
    rows = ((*prompt, *completion) for prompt, completion in pairs)
    input_ids = torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in rows], dtype=torch.long)
    starts = torch.tensor([[len(prompt)] for prompt, _ in pairs])
    ends = torch.tensor([[len(prompt) + len(completion)] for prompt, completion in pairs])
    positions = torch.arange(width)
    return input_ids, (positions >= starts) & (positions < ends)


def row_lengths(completion_mask: Tensor) -> Tensor:
    """Length of each sequence: one past its last completion token, 0 where it has none. (B,)"""
    positions = torch.arange(1, completion_mask.shape[1] + 1, device=completion_mask.device)
    return (completion_mask * positions).amax(-1)
