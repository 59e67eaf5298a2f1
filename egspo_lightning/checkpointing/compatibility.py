"""Checkpoint compatibility: refuses the weights or the tokenizer of another model."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from egspo_lightning.errors import UserError, listed


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of a tokenizer's vocabulary, EOS and padding token."""
    content = [sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id, tokenizer.pad_token_id]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def require_same_tokenizer(stored: str | None, own: str) -> None:
    """Refuse a checkpoint whose ids mean other tokens; ``stored`` is None in checkpoints without a digest.

    Raises:
        UserError: the digests differ.
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
        raise UserError(
            f"ckpt_path: the checkpoint holds a model of another shape: {listed(sorted(told))}. Set "
            "model.policy.name_or_path (and model.critic) as in the checkpoint's run."
        )
