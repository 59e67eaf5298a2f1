"""Whether a checkpoint's weights, tokenizer and optimizer can be those of this run: told, where they cannot."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from egspo_lightning.errors import UserError

NUM_SHOWN = 3
OPTIMIZER_KEYS_OF_SCHEDULES = {"params", "initial_lr"}


def tokenizer_digest(tokenizer: Any) -> str:
    """Equal for tokenizers that give every token the same id and end completions by the same one."""
    told = [sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id, tokenizer.pad_token_id]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def require_same_tokenizer(stored: str | None, own: str) -> None:
    """Refuse ids that would mean other tokens.

    Args:
        stored: digest in the checkpoint; None in those of versions that kept none
        own: of this run's tokenizer

    Raises:
        UserError: they differ.
    """
    if stored not in (None, own):
        raise UserError(
            f"ckpt_path: the checkpoint's tokenizer (digest {stored}) is not that of model.policy.name_or_path (digest "
            f"{own}): its ids would mean other tokens. Start from the model that the checkpoint was trained from."
        )


def require_same_shapes(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse weights of another model; a checkpoint without any is sharded, and judged where it is loaded.

    Raises:
        UserError: naming weights, their shapes in the checkpoint and those of the run.
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
            f"ckpt_path: the checkpoint is of a model of another shape: {shown}{more}. Give model.policy.name_or_path "
            "(and model.critic) as they were."
        )


def fit_optimizer_kind(
    states: list[dict[str, Any]], stored: str | None, fresh: dict[str, Any], own: str, *, is_entry: bool
) -> None:
    """Refuse the state of another kind of optimizer; at the end of SFT, where it starts anew, take a fresh one.

    Args:
        states: of the checkpoint, one optimizer
        stored: its kind, such as "AdamW"; None in checkpoints of versions that did not keep it
        fresh: state of the run's optimizer, as it was built
        own: the run's kind
        is_entry: whether the checkpoint was made at the end of SFT

    Raises:
        UserError: they differ elsewhere.
    """
    theirs, ours = ({key for group in state["param_groups"] for key in group} for state in (states[0], fresh))
    is_other = (stored or own) != own or bool((theirs ^ ours) - OPTIMIZER_KEYS_OF_SCHEDULES)
    if is_other and is_entry:
        states[0] = fresh
    elif is_other:
        raise UserError(
            f"ckpt_path: the checkpoint's optimizer is {stored or 'another one'}, and model.optimizer is {own}, which "
            "cannot go on from its moments. Give the checkpoint's own optimizer, or start from sft.ckpt."
        )
