"""Batches through the trunk of a causal language model, to the states before their completion tokens.

Sequences are padded on the right, so under causal attention no token ever sees padding, and no attention mask is
needed: positions count from 0 in every row, and the fast attention kernels apply.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from egspo_lightning.models.packed_attention import Run, Runs, packed_states
from egspo_lightning.ops.batching import similar_length_batches
from egspo_lightning.ops.padding import row_lengths

PACKED_WORTH, PACKED_WORTH_GPU = 32, 128
"""Tokens of padding that are worth an attention of their own in a packed pass; on a GPU by arithmetic, not measured."""
PASS_WORTH = 128
"""The same of a pass through the whole trunk: launching its kernels takes about as long as they."""


class Sequences(NamedTuple):
    """A batch to take the statistics of."""

    input_ids: Tensor
    """(B, T), padded on the right"""
    completion_mask: Tensor
    """(B, T) bool; never true at position 0, which nothing predicts"""
    temperature: float = 1.0
    """the sampling temperature"""
    with_entropies: bool = True
    """whether anybody asks for them; otherwise they are 0"""


class Passes:
    """How rows go through a trunk.

    Args:
        packs: Whether it tells packed sequences apart, see ``packing``: then there is one pass, nearly without padding.
    """

    def __init__(self, packs: bool) -> None:
        self.packs = packs
        self.splits_rows = True
        """Whether there may be several passes otherwise; sharded, all ranks must make equally many."""

    def states(self, decoder: Any, parts: Sequence[Sequences]) -> list[Tensor]:
        """The states before the completion tokens of each batch, (N, D), in the order of its rows and tokens.

        Rows of like length stand together, whatever batch they are of, each run cut to its longest.
        """
        ids, mask = _joined(parts)
        runs, index, starts = self._layout(mask)
        flat = ids.flatten()[index]
        if self.packs:
            states = packed_states(decoder, flat, index % ids.shape[1], Runs(runs))
        else:
            parted = flat.split([run.num_tokens for run in runs])
            rows = [part.view(*run) for part, run in zip(parted, runs, strict=True)]
            states = torch.cat([decoder(input_ids=r, use_cache=False).last_hidden_state.flatten(0, 1) for r in rows])
        row, position = mask[:, 1:].nonzero(as_tuple=True)
        num_tokens = [int(part.completion_mask.sum()) for part in parts]
        return list(states.index_select(0, starts[row] + position).split(num_tokens))

    def _layout(self, mask: Tensor) -> tuple[list[Run], Tensor, Tensor]:
        """Runs, places of their tokens within the flattened batch, and where in the runs each row begins."""
        lengths = row_lengths(mask).clamp(min=2).tolist()
        order = similar_length_batches(lengths, batch_cost=self._worth(mask))
        runs = [Run(len(rows), lengths[rows[-1]]) for rows in order]
        starts, places, start = torch.empty(len(lengths), dtype=torch.long), [], 0
        for rows, (num_rows, width) in zip(order, runs, strict=True):
            numbers = torch.tensor(rows)
            places.append((numbers[:, None] * mask.shape[1] + torch.arange(width)).flatten())
            starts[numbers] = start + torch.arange(num_rows) * width
            start += num_rows * width
        return runs, torch.cat(places).to(mask.device), starts.to(mask.device)

    def _worth(self, mask: Tensor) -> int:
        """Tokens of padding that are worth a run of their own."""
        if self.packs:
            return PACKED_WORTH if mask.device.type == "cpu" else PACKED_WORTH_GPU
        return PASS_WORTH if self.splits_rows else mask.numel()


def _joined(parts: Sequence[Sequences]) -> tuple[Tensor, Tensor]:
    """All rows, as wide as the widest batch."""
    width = max(part.input_ids.shape[1] for part in parts)
    ids, mask = (
        torch.cat([pad(tensor, (0, width - tensor.shape[1])) for tensor in tensors])
        for tensors in zip(*((part.input_ids, part.completion_mask) for part in parts), strict=True)
    )
    return ids, mask
