"""Batches of rows of similar length: under a token budget, into balanced parts, or where padding is expensive.

The rows are sorted by length, shortest first, and that order is cut into batches. Rows of similar length share a batch,
which keeps padding low. Rows of equal length keep their order. ``pad_right`` makes tensors of rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

BLANK_TOKENS = 2
"""Length of the masked row that stands in for an empty micro-batch: every rank must run forward and backward."""


def batches_within(lengths: Sequence[int], max_tokens: int, *, padded: bool = False) -> list[list[int]]:
    """Row numbers in the fewest batches of at most ``max_tokens`` tokens; a longer row gets a batch of its own.

    Each batch takes as many rows as fit, which is optimal for sorted rows.

    Args:
        lengths: tokens of each row
        max_tokens: token budget of a batch
        padded: count each row as long as the longest of its batch
    """
    batches: list[list[int]] = []
    num_tokens = 0
    for row in _shortest_first(lengths):
        others = num_tokens if not padded or not batches else len(batches[-1]) * lengths[row]
        num_tokens = others + lengths[row]
        if not batches or num_tokens > max_tokens:
            batches.append([])
            num_tokens = lengths[row]
        batches[-1].append(row)
    return batches


def balanced_batches(lengths: Sequence[int], num_batches: int) -> list[list[int]]:
    """Row numbers in ``num_batches`` batches whose largest has the fewest tokens possible; some may be empty.

    ``lengths`` are the tokens of each row, without padding.
    """
    low, high = max(lengths, default=0), sum(lengths)
    while low < high:  # binary search for the smallest budget that needs at most num_batches
        middle = (low + high) // 2
        if len(batches_within(lengths, middle)) <= num_batches:
            high = middle
        else:
            low = middle + 1
    batches = batches_within(lengths, high)
    return batches + [[] for _ in range(num_batches - len(batches))]


def similar_length_batches(lengths: Sequence[int], *, batch_cost: int) -> list[list[int]]:
    """Row numbers in batches that are cut wherever a cut saves more than ``batch_cost`` tokens of padding."""
    return _cut(_shortest_first(lengths), lengths, batch_cost)


def _cut(rows: list[int], lengths: Sequence[int], batch_cost: int) -> list[list[int]]:
    longest = lengths[rows[-1]] if rows else 0
    savings = [(i * (longest - lengths[rows[i - 1]]), i) for i in range(1, len(rows))]
    saved, place = max(savings, default=(0, 0))
    if saved <= batch_cost:
        return [rows]
    return [*_cut(rows[:place], lengths, batch_cost), *_cut(rows[place:], lengths, batch_cost)]


def _shortest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda row: lengths[row])


def pad_right(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int) -> tuple[Tensor, Tensor]:
    """``input_ids`` and ``completion_mask``, (B, T), of (prompt, completion) pairs."""
    rows = [torch.tensor([*prompt, *completion], dtype=torch.long) for prompt, completion in pairs]
    masks = [torch.arange(len(row)) >= len(prompt) for row, (prompt, _) in zip(rows, pairs, strict=True)]
    return pad_sequence(rows, batch_first=True, padding_value=pad_id), pad_sequence(masks, batch_first=True)


def row_lengths(completion_mask: Tensor) -> Tensor:
    """Length of each sequence: one past its last completion token, 0 where it has none. (B,)"""
    positions = torch.arange(1, completion_mask.shape[1] + 1, device=completion_mask.device)
    return (completion_mask * positions).amax(-1)
