"""Sequences of different lengths as rectangles, padded on the right, and back."""

from collections.abc import Sequence

import torch
from torch import Tensor


def pad_right(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int) -> tuple[Tensor, Tensor]:
    """(prompt, completion) pairs as ``input_ids`` and ``completion_mask``, (B, T)."""
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


def like_lengths(lengths: Sequence[int], *, worth: int) -> list[list[int]]:
    """Rows, shortest first, in runs of like length: cut where that saves more than ``worth`` tokens of padding."""
    return _cut(sorted(range(len(lengths)), key=lambda row: lengths[row]), lengths, worth)


def _cut(rows: list[int], lengths: Sequence[int], worth: int) -> list[list[int]]:
    longest = lengths[rows[-1]] if rows else 0
    savings = [(i * (longest - lengths[rows[i - 1]]), i) for i in range(1, len(rows))]
    saved, place = max(savings, default=(0, 0))
    if saved <= worth:
        return [rows]
    return [*_cut(rows[:place], lengths, worth), *_cut(rows[place:], lengths, worth)]
