"""Packed attention: sequences of different lengths in one pass through a transformers decoder, without padding.

All tokens stand in one row, (1, N), so the projections are one large matrix product without padding. Only attention
separates the sequences: a token sees its own sequence alone. Positions count from 0 in each sequence.

Attention is transformers' "sdpa", except for short sequences on a CPU. PyTorch's fused kernel takes heads and sequences
one by one there, in blocks of 32 tokens; plain matrix products over all of them take half the time.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import prod
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


class Run(NamedTuple):
    """Neighboring sequences of one length."""

    num_rows: int
    width: int


class Runs:
    """The runs of a packed row.

    ``num_uses`` counts the layers that called ``attend``, ``num_windows`` those of them with a sliding window.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs, self.num_uses, self.num_windows = list(runs), 0, 0

    def attend(self, module: Any, queries: Tensor, keys: Tensor, values: Tensor, **settings: Any) -> Tensor:
        """Causal attention within each sequence, from (1, heads, N, D) each to (1, N, heads, D)."""
        self.num_uses += 1
        self.num_windows += settings.get("sliding_window") is not None
        sizes = [prod(run) for run in self.runs]
        parts = zip(*(states.split(sizes, dim=2) for states in (queries, keys, values)), strict=True)
        return torch.cat(
            [_attend(module, run, *part, **settings) for run, part in zip(self.runs, parts, strict=True)], 1
        )


def _attend(module: Any, run: Run, *states: Tensor, sliding_window: int | None = None, **settings: Any) -> Tensor:
    """Attention within the sequences of one run, as the rows of a batch."""
    queries, keys, values = (part[0].unflatten(1, run).transpose(0, 1) for part in states)
    near = None
    if sliding_window is not None and run.width > sliding_window:
        near = _causal(run.width, queries.device).triu(1 - sliding_window)
    if _is_short(module, run, queries, settings):
        near = _causal(run.width, queries.device) if near is None else near
        attended = _short_attention(queries, keys, values, near, settings.get("scaling"))
    else:
        mask = None if near is None else near[None, None]
        attended, _ = sdpa_attention_forward(module, queries, keys, values, mask, **settings)
    return attended.flatten(0, 1).unsqueeze(0)


def _causal(width: int, device: torch.device) -> Tensor:
    """(width, width) bool: which keys each query may see."""
    return torch.ones(width, width, dtype=torch.bool, device=device).tril()


def _is_short(module: Any, run: Run, queries: Tensor, settings: Mapping[str, Any]) -> bool:
    """Whether plain products are faster and give the same result."""
    is_plain = not settings.get("dropout") and settings.get("position_bias") is None
    is_causal = getattr(module, "is_causal", True) and settings.get("is_causal") is not False
    is_full = queries.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return run.width <= SHORT and queries.device.type == "cpu" and is_full and is_plain and is_causal


def _short_attention(queries: Tensor, keys: Tensor, values: Tensor, near: Tensor, scaling: float | None) -> Tensor:
    """``softmax(scaling Q K^T) V`` over the keys in ``near``, from (B, heads, T, D) each to (B, T, heads, D)."""
    size, groups = queries.shape[:2], queries.shape[1] // keys.shape[1]
    if groups > 1:
        keys, values = (part.repeat_interleave(groups, 1) for part in (keys, values))
    scaled = queries * (queries.shape[-1] ** -0.5 if scaling is None else scaling)
    far = torch.zeros_like(near, dtype=queries.dtype).masked_fill_(~near, -torch.inf)
    scores = torch.baddbmm(far, scaled.flatten(0, 1), keys.flatten(0, 1).mT)
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


def use_packing(lm: Any) -> bool:
    """Switch a causal language model to packed attention if its results stay right, and return whether they do.

    Each layer must look attention up by name (now "sdpa"), and pass on its sliding window if it has one. No other
    layer may mix tokens, as convolutions and recurrences do. Packed sequences are compared with each sequence alone.
    """
    config = lm.config
    if config._attn_implementation not in ("sdpa", NAME) or not _is_plain(lm):
        return False
    lm.set_attn_implementation(NAME)
    with suppress(TypeError, ValueError, RuntimeError, AttributeError, IndexError):  # it takes no such arguments
        if _keeps_sequences_apart(lm):
            return True
    lm.set_attn_implementation("sdpa")
    return False


def _is_plain(lm: Any) -> bool:
    """Whether sequences of any length may share a row, by the model's config.

    Other masks than a causal one or a window would be lost; in some rotary embeddings the longest row changes all.
    """
    config = lm.config
    layers = set(getattr(config, "layer_types", None) or ())
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    return (
        config.get_text_config() is config
        and lm._can_set_attn_implementation()
        and layers <= {"full_attention", "sliding_attention"}
        and not kinds & {"longrope", "dynamic"}
    )


def _num_windows(config: Any) -> int:
    """Number of layers with a sliding window."""
    layers = getattr(config, "layer_types", None)
    if layers:
        return sum(kind == "sliding_attention" for kind in layers)
    return config.num_hidden_layers if getattr(config, "sliding_window", None) is not None else 0


@torch.no_grad()
def _keeps_sequences_apart(lm: Any) -> bool:
    """Whether sequences of two runs have the same states packed as alone."""
    decoder, device = trunk_of(lm), next(lm.parameters()).device
    rows = [torch.tensor([[1, 2, 3], [2, 0, 1]], device=device), torch.tensor([[3, 1, 2, 0, 3]], device=device)]
    runs = Runs([Run(*ids.shape) for ids in rows])
    positions = torch.cat([torch.arange(width, device=device).repeat(num_rows) for num_rows, width in runs.runs])
    packed = packed_states(decoder, torch.cat([ids.flatten() for ids in rows]), positions, runs)
    if (runs.num_uses, runs.num_windows) != (lm.config.num_hidden_layers, _num_windows(lm.config)):
        return False
    if packed.is_meta:
        return True
    alone = torch.cat([decoder(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1) for ids in rows])
    distance = (packed - alone).float().norm() / alone.float().norm()
    return bool(distance < (1e-4 if packed.dtype == torch.float32 else 2e-2))
