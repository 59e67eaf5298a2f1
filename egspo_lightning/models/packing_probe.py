"""Packing probe: whether a model keeps packed sequences apart, and whether they may share prompts."""

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from egspo_lightning.models.packed_attention import NAME, Run, Runs, packed_states, trunk_of
from egspo_lightning.models.packed_layout import Costs, lay_out


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
    positions = torch.cat([torch.arange(run.width, device=device).repeat(run.num_rows) for run in runs.runs])
    packed = packed_states(decoder, torch.cat([ids.flatten() for ids in rows]), positions, runs)
    if (runs.num_uses, runs.num_windows) != (lm.config.num_hidden_layers, _num_windows(lm.config)):
        return False
    if packed.is_meta:
        return True
    alone = torch.cat([decoder(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1) for ids in rows])
    return _are_equal(packed, alone)


@torch.no_grad()
def keeps_states_with_shared_prompts(lm: Any) -> bool:
    """Whether a model that packs has the same states where the prompt of several rows stands once."""
    decoder, device = trunk_of(lm), next(lm.parameters()).device
    if device.type == "meta":
        return False
    ids = torch.tensor([[1, 2, 3, 0, 2, 1], [1, 2, 3, 2, 0, 1], [2, 0, 1, 3, 0, 2], [2, 0, 3, 3, 1, 0]], device=device)
    mask = torch.arange(6, device=device) >= torch.tensor([[3], [3], [2], [2]], device=device)
    layout = lay_out(ids, mask, Costs(run=1, pairs_per_token=100))
    packed = packed_states(decoder, ids.flatten()[layout.tokens], layout.tokens % ids.shape[1], Runs(layout.runs))
    rows, positions = mask[:, 1:].nonzero(as_tuple=True)
    alone = decoder(input_ids=ids, use_cache=False).last_hidden_state[rows, positions]
    return _are_equal(packed[layout.places(rows, positions)], alone)


def _are_equal(packed: Tensor, alone: Tensor) -> bool:
    distance = (packed - alone).float().norm() / alone.float().norm()
    return bool(distance < (1e-4 if packed.dtype == torch.float32 else 2e-2))
