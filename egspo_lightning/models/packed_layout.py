"""Layout of a packed pass: which token stands where, so that a prompt that several rows begin with stands once.

Rows of like length form a run. Rows with equal prompts form a group: a run of prompts holds its prompt, and runs of
completions hold the rest of its rows (the idea of Prefix Grouper, arXiv 2506.05433). The state before the first
completion token is then the same state for all rows of the group.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from egspo_lightning.models.packed_attention import Run, SharedPrompts
from egspo_lightning.ops.batching import row_lengths, similar_length_batches


class Layout(NamedTuple):
    """Places of the tokens of a batch, (B, T), in the packed row of N tokens."""

    runs: list[Run]
    tokens: Tensor
    """(N,) int64: number of each packed token in the flattened batch"""
    begins: Tensor
    """(2, B) int64: where position 0 of each row is, or would be, counted from its prompt and from its own tokens"""
    shared: Tensor
    """(B,) int64: tokens of each row that belong to a shared prompt"""

    def places(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Where tokens stand in the packed row, all (n,) int64."""
        in_prompt, own = self.begins[:, rows]
        return torch.where(positions < self.shared[rows], in_prompt, own) + positions


class Costs(NamedTuple):
    """Costs by which the layout decides."""

    run: int
    """tokens of padding, or of repeated prompts, above which another run is faster"""
    pairs_per_token: int = 0
    """pairs of query and key in attention that take as long as the other layers for a token; 0 shares no prompts"""
    masked_pair: float = 1.0
    """time of a pair in attention with a mask, relative to causal attention"""


def lay_out(ids: Tensor, mask: Tensor, costs: Costs) -> Layout:
    """Arrange the rows of a batch in runs.

    Args:
        ids: (B, T) int64
        mask: (B, T) bool, the completion tokens
        costs: decides where another run starts and which prompts are shared
    """
    lengths = row_lengths(mask).clamp(min=2).tolist()
    groups = _groups(ids, mask, lengths, costs) if costs.pairs_per_token else []
    alone = set(range(len(lengths))).difference(*(group.rows for group in groups))
    builder = _Builder(mask)
    for rows in _alike(sorted(alone), lengths, costs.run):
        builder.add(rows, [0] * len(rows), max(lengths[row] for row in rows))
    prompt_cost = costs.run if mask.device.type == "cpu" else 0  # padded prompts need a mask for each row
    for numbers in _alike(range(len(groups)), [group.length for group in groups], prompt_cost):
        builder.add_groups([groups[number] for number in numbers], lengths, costs.run)
    return builder.layout()


class _Group(NamedTuple):
    """Rows with the same prompt."""

    length: int
    """tokens of the prompt"""
    rows: list[int]

    @property
    def saved(self) -> int:
        """Tokens that need not be computed again."""
        return self.length * (len(self.rows) - 1)

    def pays(self, lengths: Sequence[int], costs: Costs) -> bool:
        """Whether the saved tokens take longer than attention with a mask, which computes pairs that causal skips."""
        pairs = sum(
            costs.masked_pair * (lengths[row] - self.length) * lengths[row] - lengths[row] ** 2 / 2 for row in self.rows
        )
        return self.saved * costs.pairs_per_token > pairs


def _groups(ids: Tensor, mask: Tensor, lengths: Sequence[int], costs: Costs) -> list[_Group]:
    """Groups of rows whose prompt is worth sharing."""
    prompts = mask.int().argmax(1).tolist()  # 0 for rows without a completion
    rows: dict[tuple[int, ...], list[int]] = {}
    for row, (tokens, length) in enumerate(zip(ids.tolist(), prompts, strict=True)):
        rows.setdefault(tuple(tokens[:length]), []).append(row)
    found = [_Group(len(prompt), members) for prompt, members in rows.items() if prompt and len(members) > 1]
    groups = [group for group in found if group.pays(lengths, costs)]
    return groups if sum(group.saved for group in groups) > costs.run else []


def _alike(items: Sequence[int], lengths: Mapping[int, int] | Sequence[int], batch_cost: int) -> list[list[int]]:
    """Split items, which number ``lengths``, into batches of similar length."""
    batches = similar_length_batches([lengths[item] for item in items], batch_cost=batch_cost)
    return [[items[place] for place in batch] for batch in batches if batch]


class _Builder:
    """Adds runs to a layout."""

    def __init__(self, mask: Tensor) -> None:
        self.device, self.width = mask.device, mask.shape[1]
        self.runs: list[Run] = []
        self.tokens: list[Tensor] = []
        self.size = 0
        self.begins = torch.zeros(2, mask.shape[0], dtype=torch.long)
        self.shared = torch.zeros(mask.shape[0], dtype=torch.long)

    def add(self, rows: list[int], firsts: list[int], width: int, prompts: SharedPrompts | None = None) -> Tensor:
        """Add a run of ``width`` tokens of each row from its first position; return where position 0 would be."""
        numbers, starts = torch.tensor(rows), torch.tensor(firsts)
        positions = (starts.unsqueeze(1) + torch.arange(width)).clamp(max=self.width - 1)  # the rest is padding
        self.tokens.append((numbers.unsqueeze(1) * self.width + positions).flatten())
        begins = self.size + torch.arange(len(rows)) * width - starts
        self.begins[1, numbers] = begins
        self.runs.append(Run(len(rows), width, prompts))
        self.size += len(rows) * width
        return begins

    def add_groups(self, groups: list[_Group], lengths: Sequence[int], run_cost: int) -> None:
        """Add a run of prompts of like length, and runs of the rows that continue them."""
        run, widest = len(self.runs), max(group.length for group in groups)
        begins = self.add([group.rows[0] for group in groups], [0] * len(groups), widest).tolist()
        owners = {row: number for number, group in enumerate(groups) for row in group.rows}
        # without the last token of a row, whose state predicts nothing; at least one, so that no run is empty
        own = {row: max(lengths[row] - groups[number].length - 1, 1) for row, number in owners.items()}
        for rows in _alike(list(owners), own, run_cost):
            numbers = [owners[row] for row in rows]
            firsts = [groups[number].length for number in numbers]
            known = torch.tensor([widest] if min(firsts) == widest else firsts, device=self.device).unsqueeze(1)
            prompts = SharedPrompts(run, torch.tensor(numbers, device=self.device), known)
            self.add(rows, firsts, max(own[row] for row in rows), prompts)
            self.begins[0, rows] = torch.tensor([begins[number] for number in numbers])
            self.shared[rows] = torch.tensor(firsts)

    def layout(self) -> Layout:
        """The layout of all runs, on the device of the batch."""
        parts = (torch.cat(self.tokens), self.begins, self.shared)
        return Layout(self.runs, *(part.to(self.device) for part in parts))
