"""Sequences of different lengths in one pass through a transformers decoder, without padding between them.

All tokens stand in one row, (1, N); only attention, in which a token sees its own sequence alone, is told the
sequences apart. So the projections, which are most of the work, are as large as can be and waste nothing, and each
kernel is launched once, however different the lengths are. Positions count from 0 in each sequence.

Attention is transformers' own for "sdpa", except to short sequences on a CPU: the fused kernel there takes heads and
sequences one by one, in blocks of 32 tokens, and plain matrix products over all of them take half the time.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_in_runs"
"""Of the attention, among those of transformers."""


SHORT = 64
"""Tokens of a sequence that is attended to by plain products on a CPU; from about 100 on the fused kernel is faster."""


class Run(NamedTuple):
    """Sequences of one length, which stand next to each other."""

    num_rows: int
    width: int

    @property
    def num_tokens(self) -> int:
        """Of all of them."""
        return self.num_rows * self.width


class Runs:
    """Of a packed row, with a count of the layers that have told them apart, and of those among them with a window."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs, self.num_uses, self.num_windows = list(runs), 0, 0

    def attend(self, module: Any, queries: Tensor, keys: Tensor, values: Tensor, **settings: Any) -> Tensor:
        """Causal attention within each sequence, from (1, heads, N, D) each to (1, N, heads, D)."""
        self.num_uses += 1
        self.num_windows += settings.get("sliding_window") is not None
        sizes = [run.num_tokens for run in self.runs]
        parts = zip(*(states.split(sizes, dim=2) for states in (queries, keys, values)), strict=True)
        return torch.cat(
            [_attend(module, run, *part, **settings) for run, part in zip(self.runs, parts, strict=True)], 1
        )


def _attend(module: Any, run: Run, *states: Tensor, sliding_window: int | None = None, **settings: Any) -> Tensor:
    """Of the sequences of one run, as the rows of a batch."""
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
    """Whether plain products are faster, and the same."""
    is_plain = not settings.get("dropout") and settings.get("position_bias") is None
    is_causal = getattr(module, "is_causal", True) and settings.get("is_causal") is not False
    is_full = queries.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return run.width <= SHORT and queries.device.type == "cpu" and is_full and is_plain and is_causal


def _short_attention(queries: Tensor, keys: Tensor, values: Tensor, near: Tensor, scaling: float | None) -> Tensor:
    """``softmax(scaling Q K^T) V`` over the keys that are near, from (B, heads, T, D) each to (B, T, heads, D)."""
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
    """That of transformers for "sdpa", in which sequences are told apart where ``runs`` come along."""
    if runs is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return runs.attend(module, query, key, value, **kwargs), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def packed_states(decoder: Any, input_ids: Tensor, positions: Tensor, runs: Runs) -> Tensor:
    """Last hidden states of all tokens, (N, D).

    Args:
        decoder: of a model that ``use_packing`` has said yes to
        input_ids: (N,) int64, sequence after sequence, run after run
        positions: (N,) int64 within each sequence
        runs: how they are told apart
    """
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

    It has to take transformers' attention by name, "sdpa" so far, in each of its layers, with its window where it has
    one; and nothing else in it may let tokens see each other, as convolutions and recurrences do. Two sequences in one
    row are compared with each alone.
    """
    config = lm.config
    if config._attn_implementation not in ("sdpa", NAME) or not _is_plain(lm):
        return False
    lm.set_attn_implementation(NAME)
    is_told_apart = False
    try:
        is_told_apart = _tells_apart(lm)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):  # it takes no such arguments
        pass
    finally:
        if not is_told_apart:
            lm.set_attn_implementation("sdpa")
    return is_told_apart


def _is_plain(lm: Any) -> bool:
    """Whether what its config says lets sequences of any length share a row.

    Masks other than a causal one, with or without a window, would be lost; and in some rotary embeddings the length of
    one sequence decides on the angles of all.
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
    """Layers that see a window alone."""
    layers = getattr(config, "layer_types", None)
    if layers:
        return sum(kind == "sliding_attention" for kind in layers)
    return config.num_hidden_layers if getattr(config, "sliding_window", None) is not None else 0


@torch.no_grad()
def _tells_apart(lm: Any) -> bool:
    decoder, device = lm.get_decoder(), next(lm.parameters()).device
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
