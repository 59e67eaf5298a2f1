"""Packed attention: sequences of different lengths in one pass through a transformers decoder, without padding.

All tokens stand in one row, (1, N), so the projections are one large matrix product without padding. Only attention
separates the sequences: a token sees its own sequence alone. Positions count from 0 in each sequence.

Attention is transformers' "sdpa", except for short sequences on a CPU. PyTorch's fused kernel takes heads and sequences
one by one there, in blocks of 32 tokens; plain matrix products over all of them take half the time.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_in_runs"
"""Name under which the attention function is registered with transformers."""
SHORT = 64
"""Longest sequence, in tokens, that uses plain products on a CPU; from about 100 on the fused kernel is faster."""
LATER = 2**62
"""Position of padding, which no token sees."""


class SharedPrompts(NamedTuple):
    """The prompts that the rows of a run continue."""

    run: int
    """number of the earlier run that holds them"""
    rows: Tensor
    """(R,) int64: the row of that run which each row continues"""
    lengths: Tensor
    """(R, 1) int64: tokens of the prompt of each row; (1, 1) if no row of that run is padded"""


class Run(NamedTuple):
    """Neighboring sequences of one length. With ``prompts``, they are the rest of sequences that begin with those."""

    num_rows: int
    width: int
    prompts: SharedPrompts | None = None


class Runs:
    """The runs of a packed row.

    ``num_uses`` counts the layers that called ``attend``, ``num_windows`` those of them with a sliding window.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs, self.num_uses, self.num_windows = list(runs), 0, 0
        self._visible: dict[tuple[int, int | None], Tensor] = {}

    def attend(
        self,
        module: Any,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        sliding_window: int | None = None,
        **settings: Any,
    ) -> Tensor:
        """Causal attention within each sequence, from (1, heads, N, D) each to (1, N, heads, D)."""
        self.num_uses += 1
        self.num_windows += sliding_window is not None
        parts = [self._split(states) for states in (queries, keys, values)]
        attended = []
        for number, run in enumerate(self.runs):
            own, (seen_keys, seen_values) = parts[0][number], (_with_prompts(run, part, number) for part in parts[1:])
            visible = self._mask(number, seen_keys.shape[2], sliding_window, queries.device)
            attended.append(_attend(module, own, seen_keys, seen_values, visible, settings).flatten(0, 1))
        return torch.cat(attended).unsqueeze(0)

    def _split(self, states: Tensor) -> list[Tensor]:
        """The states of each run, from (1, heads, N, D) to (rows, heads, width, D) each."""
        parts = states[0].split([run.num_rows * run.width for run in self.runs], dim=1)
        return [
            part.unflatten(1, (run.num_rows, run.width)).transpose(0, 1)
            for part, run in zip(parts, self.runs, strict=True)
        ]

    def _mask(self, number: int, num_keys: int, window: int | None, device: torch.device) -> Tensor | None:
        """``_visible`` of a run, made once for all layers; None if it is plainly causal."""
        run = self.runs[number]
        if window is not None and num_keys <= window:
            window = None
        if run.prompts is None and window is None:
            return None
        if (number, window) not in self._visible:
            self._visible[number, window] = _visible(run, num_keys, window, device)
        return self._visible[number, window]


def _with_prompts(run: Run, parts: Sequence[Tensor], number: int) -> Tensor:
    """Keys or values that a run sees: those of its prompts, if it has some, and its own."""
    if run.prompts is None:
        return parts[number]
    return torch.cat([parts[run.prompts.run].index_select(0, run.prompts.rows), parts[number]], 2)


def _visible(run: Run, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys each query may see, (rows or 1, 1, width, keys) bool, by their positions in the sequences."""
    own, before = torch.arange(run.width, device=device), torch.arange(num_keys - run.width, device=device)
    lengths = own.new_zeros(1, 1) if run.prompts is None else run.prompts.lengths
    queries = lengths + own
    prompts = before.expand(len(lengths), -1).masked_fill(before >= lengths, LATER)
    distances = queries.unsqueeze(2) - torch.cat([prompts, queries], 1).unsqueeze(1)
    near = distances >= 0 if window is None else (distances >= 0) & (distances < window)
    return near.unsqueeze(1)


def _attend(
    module: Any, queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None, settings: Mapping[str, Any]
) -> Tensor:
    """Attention of the rows of a batch, from (B, heads, T, D) each to (B, T, heads, D)."""
    if not _is_short(module, keys.shape[2], queries, settings):
        return sdpa_attention_forward(module, queries, keys, values, visible, **settings)[0]
    if visible is None:
        visible = torch.ones(2 * queries.shape[2:3], dtype=torch.bool, device=queries.device).tril()[None, None]
    return _short_attention(queries, keys, values, visible, settings.get("scaling"))


def _is_short(module: Any, num_keys: int, queries: Tensor, settings: Mapping[str, Any]) -> bool:
    """Whether plain products are faster and give the same result."""
    is_plain = not settings.get("dropout") and settings.get("position_bias") is None
    is_causal = getattr(module, "is_causal", True) and settings.get("is_causal") is not False
    is_full = queries.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return num_keys <= SHORT and queries.device.type == "cpu" and is_full and is_plain and is_causal


def _short_attention(queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scaling: float | None) -> Tensor:
    """``softmax(scaling Q K^T) V`` over the visible keys, from (B, heads, T, D) each to (B, T, heads, D)."""
    size, groups = queries.shape[:2], queries.shape[1] // keys.shape[1]
    if groups > 1:
        keys, values = (part.repeat_interleave(groups, 1) for part in (keys, values))
    scaled = queries * (queries.shape[-1] ** -0.5 if scaling is None else scaling)
    hidden = torch.zeros_like(visible, dtype=queries.dtype).masked_fill_(~visible, -torch.inf)
    if len(hidden) > 1:
        hidden = hidden.expand(-1, size[1], -1, -1)
    scores = torch.baddbmm(hidden.flatten(0, 1), scaled.flatten(0, 1), keys.flatten(0, 1).mT)
    return torch.bmm(scores.softmax(-1), values.flatten(0, 1)).unflatten(0, size).transpose(1, 2)


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    runs: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The "sdpa" attention of transformers; with ``runs``, packed sequences are kept apart."""
    if runs is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return runs.attend(module, query, key, value, **kwargs), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def trunk_of(lm: Any) -> Any:
    """The model without its output layer; ``get_decoder`` gives another part for some (Llama 4, ModernBERT)."""
    decoder = lm.get_decoder()
    if decoder is not lm and isinstance(decoder, PreTrainedModel):
        return decoder
    return next((child for child in lm.children() if isinstance(child, PreTrainedModel)), decoder)


def packed_states(decoder: Any, input_ids: Tensor, positions: Tensor, runs: Runs) -> Tensor:
    """Last hidden states of all tokens, (N, D).

    Args:
        decoder: of a model for which ``use_packing`` returned True
        input_ids, positions: (N,) int64, sequence after sequence, run after run; positions within each sequence
    """
    no_mask = input_ids.new_ones(1, 1, 1, 1, dtype=torch.bool)  # a mask of 4 axes keeps transformers from making one
    output = decoder(
        input_ids=input_ids.unsqueeze(0),
        position_ids=positions.unsqueeze(0),
        attention_mask=no_mask,
        use_cache=False,
        runs=runs,
    )
    states: Tensor = output.last_hidden_state[0]
    return states
