"""Sequences of different lengths in one pass through a transformers decoder, without padding between them.

All tokens stand in one row, (1, N); only attention, in which a token sees its own sequence alone, is told the
sequences apart. So the projections, which are most of the work, are as large as can be and waste nothing, and each
kernel is launched once, however different the lengths are. Positions count from 0 in each sequence.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_in_runs"
"""Of the attention, among those of transformers."""


class Run(NamedTuple):
    """Sequences of one length, which stand next to each other."""

    num_rows: int
    width: int


class Runs:
    """Of a packed row, with a count of the layers that have told them apart."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs, self.num_uses = list(runs), 0

    def attend(self, module: Any, queries: Tensor, keys: Tensor, values: Tensor, **settings: Any) -> Tensor:
        """Causal attention within each sequence, from (1, heads, N, D) each to (1, N, heads, D)."""
        self.num_uses += 1
        sizes = [run.num_rows * run.width for run in self.runs]
        parts = zip(*(states.split(sizes, dim=2) for states in (queries, keys, values)), strict=True)
        return torch.cat(
            [_attend(module, run, *part, **settings) for run, part in zip(self.runs, parts, strict=True)], 1
        )


def _attend(module: Any, run: Run, *states: Tensor, sliding_window: int | None = None, **settings: Any) -> Tensor:
    """Of the sequences of one run, as the rows of a batch."""
    rows = [part[0].unflatten(1, run).transpose(0, 1) for part in states]
    mask = None
    if sliding_window is not None and run.width > sliding_window:
        near = torch.ones(run.width, run.width, dtype=torch.bool, device=rows[0].device)
        mask = near.tril().triu(1 - sliding_window)[None, None]
    queries, keys, values = rows
    attended, _ = sdpa_attention_forward(module, queries, keys, values, mask, **settings)
    return attended.flatten(0, 1).unsqueeze(0)


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    runs: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """That of transformers for "sdpa", in which sequences are told apart where ``runs`` come along."""
    if runs is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return runs.attend(module, query, key, value, **kwargs), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def packed_states(decoder: Any, input_ids: Tensor, positions: Tensor, runs: Sequence[Run]) -> Tensor:
    """Last hidden states of all tokens, (N, D).

    Args:
        decoder: of a model that ``use_packing`` has said yes to
        input_ids: (N,) int64, sequence after sequence, run after run
        positions: (N,) int64 within each sequence
        runs: how they are told apart
    """
    return _states(decoder, input_ids, positions, Runs(runs))


def _states(decoder: Any, input_ids: Tensor, positions: Tensor, runs: Runs) -> Tensor:
    no_mask = input_ids.new_ones(1, 1, 1, 1, dtype=torch.bool)  # given one of 4 axes, transformers makes none
    output = decoder(
        input_ids=input_ids.unsqueeze(0),
        position_ids=positions.unsqueeze(0),
        attention_mask=no_mask,
        use_cache=False,
        runs=runs,
    )
    states: Tensor = output.last_hidden_state[0]
    return states


def use_packing(lm: Any) -> bool:
    """Let a causal language model tell packed sequences apart, and say whether it does.

    It has to take transformers' attention by name, "sdpa" so far, in each of its layers, and nothing else in it may let
    tokens see each other, as convolutions and recurrences do. Two sequences in one row are compared with each alone.
    """
    config = lm.config.get_text_config()
    if config._attn_implementation not in ("sdpa", NAME):
        return False
    lm.set_attn_implementation(NAME)
    if _tells_apart(lm, config.num_hidden_layers):
        return True
    lm.set_attn_implementation("sdpa")
    return False


@torch.no_grad()
def _tells_apart(lm: Any, num_layers: int) -> bool:
    decoder, device = lm.get_decoder(), next(lm.parameters()).device
    rows = [torch.tensor([[1, 2, 3], [2, 0, 1]], device=device), torch.tensor([[3, 1, 2, 0, 3]], device=device)]
    runs = Runs([Run(*ids.shape) for ids in rows])
    positions = torch.cat([torch.arange(width, device=device).repeat(num_rows) for num_rows, width in runs.runs])
    try:
        packed = _states(decoder, torch.cat([ids.flatten() for ids in rows]), positions, runs)
    except TypeError:  # it takes no further arguments
        return False
    if runs.num_uses != num_layers or packed.is_meta:
        return runs.num_uses == num_layers
    alone = torch.cat([decoder(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1) for ids in rows])
    tolerance = 1e-3 if packed.dtype == torch.float32 else 5e-2
    return torch.allclose(packed, alone, rtol=tolerance, atol=tolerance)
