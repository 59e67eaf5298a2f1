"""Passes of rows of different lengths through a model's trunk.

They take one packed pass where the model supports it (`packed_attention`), in which the prompt of several rows stands
once (`packed_layout`). Otherwise each run of rows of like length takes a padded pass. Rows are padded on the right, so
causal attention needs no mask, and positions count from 0 in every row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from egspo_lightning.models.packed_attention import Runs, packed_states
from egspo_lightning.models.packed_layout import Costs, lay_out
from egspo_lightning.models.packing_probe import keeps_states_with_shared_prompts, use_packing

PACKED_WORTH, PACKED_WORTH_GPU = 32, 128
"""Padding tokens above which a packed pass starts another run; on a GPU computed from its speed, not measured."""
PASS_WORTH = 128
"""Padding tokens above which another pass through the trunk is faster: launching its kernels has a fixed cost."""

PAIRS_PER_CHANNEL = 6
"""Pairs of query and key per channel that take as long as a token in the other layers: 24 D^2 and 4 D operations."""
MASKED_PAIR_GPU = 2.0
"""Time of a pair in attention with a mask, relative to the causal kernel of a GPU; an estimate, not measured."""


class Sequences(NamedTuple):
    """A batch of sequences, and which statistics of it are needed."""

    input_ids: Tensor
    """(B, T), padded on the right"""
    completion_mask: Tensor
    """(B, T) bool; never true at position 0, which nothing predicts"""
    temperature: float = 1.0
    """the sampling temperature"""
    with_entropies: bool = True
    """whether to compute entropies; otherwise they are 0"""


class TrunkPasses:
    """Passes of rows through the trunk of a language model."""

    def __init__(self, lm: Any) -> None:
        self.packs = use_packing(lm)
        """Whether the trunk keeps packed sequences apart."""
        self.shares_prompts = self.packs and keeps_states_with_shared_prompts(lm)
        """Whether the prompt of several packed rows may stand once."""
        self.splits_rows = True
        """Whether rows that are not packed may take several passes; under sharding all ranks need the same number."""

    def states(self, decoder: Any, parts: Sequence[Sequences]) -> list[Tensor]:
        """The states before the completion tokens of each batch, (N, D), in the order of its rows and tokens.

        Rows of like length form a run, whatever batch they belong to; each run is cut to its longest row.
        """
        ids, mask = _joined(parts)
        layout = lay_out(ids, mask, self._costs(mask, decoder))
        flat = ids.flatten()[layout.tokens]
        if self.packs:
            states = packed_states(decoder, flat, layout.tokens % ids.shape[1], Runs(layout.runs))
        else:
            parted = flat.split([run.num_rows * run.width for run in layout.runs])
            rows = [part.view(run.num_rows, run.width) for part, run in zip(parted, layout.runs, strict=True)]
            states = torch.cat([decoder(input_ids=r, use_cache=False).last_hidden_state.flatten(0, 1) for r in rows])
        places = layout.places(*mask[:, 1:].nonzero(as_tuple=True))
        num_tokens = [int(part.completion_mask.sum()) for part in parts]
        return list(states.index_select(0, places).split(num_tokens))

    def _costs(self, mask: Tensor, decoder: Any) -> Costs:
        if not self.packs:
            return Costs(PASS_WORTH if self.splits_rows else mask.numel())
        pairs = PAIRS_PER_CHANNEL * decoder.config.hidden_size if self.shares_prompts else 0
        if mask.device.type == "cpu":
            return Costs(PACKED_WORTH, pairs)
        return Costs(PACKED_WORTH_GPU, pairs, MASKED_PAIR_GPU)


def _joined(parts: Sequence[Sequences]) -> tuple[Tensor, Tensor]:
    """Input ids and masks of all rows, padded to the widest batch."""
    width = max(part.input_ids.shape[1] for part in parts)
    ids, mask = (
        torch.cat([pad(tensor, (0, width - tensor.shape[1])) for tensor in tensors])
        for tensors in zip(*((part.input_ids, part.completion_mask) for part in parts), strict=True)
    )
    return ids, mask
