"""Checkpoint compatibility: refuses the weights, tokenizer or optimizer of another model."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from egspo_lightning.errors import UserError

NUM_SHOWN = 3
"""Weights that an error message lists."""
OPTIMIZER_KEYS_OF_SCHEDULES = {"params", "initial_lr"}


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of a tokenizer's vocabulary, EOS and padding token."""
    content = [sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id, tokenizer.pad_token_id]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def require_same_tokenizer(stored: str | None, own: str) -> None:
    """Refuse a checkpoint whose ids mean other tokens.

    Args:
        stored: digest in the checkpoint; None in checkpoints without one
        own: digest of this run's tokenizer

    Raises:
        UserError: they differ.
    """
    if stored not in (None, own):
        raise UserError(
            f"ckpt_path: the checkpoint's tokenizer (digest {stored}) differs from that of model.policy.name_or_path "
            f"(digest {own}): its ids would mean other tokens. Start from the model that the checkpoint was trained "
            "from."
        )


def require_same_shapes(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse weights of another model; sharded checkpoints, which are empty here, are checked when they are loaded.

    Raises:
        UserError: naming weights and their shapes in checkpoint and run.
    """
    if not weights:
        return
    told = [
        f"{name} has the shape {tuple(weights[name].shape)}, this run's {tuple(own[name].shape)}"
        for name in weights.keys() & own.keys()
        if weights[name].shape != own[name].shape
    ]
    told += [f"{name} is not in this run's model" for name in weights.keys() - own.keys()]
    told += [f"{name} is not in the checkpoint" for name in own.keys() - weights.keys()]
    if told:
        shown = "; ".join(sorted(told)[:NUM_SHOWN])
        more = f" (and {len(told) - NUM_SHOWN} more)" if len(told) > NUM_SHOWN else ""
        raise UserError(
            f"ckpt_path: the checkpoint holds a model of another shape: {shown}{more}. Set model.policy.name_or_path "
            "(and model.critic) as in the checkpoint's run."
        )


def fit_optimizer_kind(
    states: list[dict[str, Any]], stored: str | None, fresh: dict[str, Any], own: str, *, is_entry: bool
) -> None:
    """Replace the state of another kind of optimizer by a fresh one, at the end of SFT; in place.

    Args:
        states: the checkpoint's, one optimizer
        stored: its kind, such as "AdamW"; None in checkpoints without it
        fresh: initial state of the run's optimizer
        own: the run's kind
        is_entry: whether the checkpoint was made at the end of SFT, when the optimizer restarts anyway

    Raises:
        UserError: the kinds differ in a checkpoint from any other time.
    """
    theirs, ours = ({key for group in state["param_groups"] for key in group} for state in (states[0], fresh))
    is_other = (stored or own) != own or bool((theirs ^ ours) - OPTIMIZER_KEYS_OF_SCHEDULES)
    if is_other and is_entry:
        states[0] = fresh
    elif is_other:
        raise UserError(
            f"ckpt_path: the checkpoint's optimizer is {stored or 'another one'}, and model.optimizer is {own}, which "
            "cannot continue from its moments. Take the checkpoint's own optimizer, or start from sft.ckpt."
        )
