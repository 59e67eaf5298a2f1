"""Adapts a checkpoint to a run with or without reference policy, value head and critic; refuses those of other models.

Weights, optimizer states and tokenizer are compared with those of the run.
"""

import hashlib
import json
from collections.abc import Collection
from typing import Any

from torch import Tensor

from egspo_lightning.errors import UserError, listed
from egspo_lightning.models.lora import is_reference, trained_name

OPTIMIZER_KEYS_OF_SCHEDULES = {"params", "initial_lr"}


def adapt_weights(
    weights: dict[str, Any],
    own: dict[str, Tensor],
    *,
    is_exact: bool,
    begins_with_egspo: bool = False,
    left_out: Collection[str] = (),
) -> None:
    """Add missing weights to a checkpoint's state dict, and drop those that the run does not have; in place.

    Args:
        weights: the checkpoint's; empty if it is sharded
        own: the run's initial weights
        is_exact: whether the checkpoint was made up to the end of SFT. The policy in it is then the reference, and a
            critic has learned nothing yet.
        begins_with_egspo: whether the checkpoint's run had no SFT. A reference adapter is then the initial adapter.
        left_out: weights that checkpoints of this run omit: the frozen ones under adapters

    Raises:
        UserError: the checkpoint holds another model, or lacks a network that the run needs.
    """
    if not weights:
        return
    weights.update({name: own[name] for name in left_out if name not in weights})
    for name in [name for name in weights if name not in own and _is_optional(name)]:
        del weights[name]
    _require_same_model(weights, own)
    if begins_with_egspo:
        weights.update({name: own[name] for name in own if is_reference(name) and name not in weights})
    missing = [name for name in own if name not in weights and _is_optional(name)]
    if missing and not is_exact:
        needs_reference = missing[0].startswith("reference.") or is_reference(missing[0])
        field = "objective.beta is above 0 or model.kl_reward is set" if needs_reference else "critic is set"
        remedy = "set beta to 0 and leave kl_reward out" if needs_reference else "leave it out"
        raise UserError(
            f"model.{field}, but the checkpoint holds no {'reference policy' if needs_reference else 'critic'}, and "
            f"its policy was trained beyond SFT. Start from sft.ckpt, or {remedy}."
        )
    for name in missing:  # a reference starts as a copy of the policy; a critic's weights are no copies
        source = trained_name(name) if is_reference(name) else name.replace("reference.", "policy.", 1)
        weights[name] = weights.get(source, own[name]).clone()


def _require_same_model(weights: dict[str, Any], own: dict[str, Tensor]) -> None:
    faults = [
        f"{name} has the shape {tuple(weights[name].shape)}, this run's {tuple(own[name].shape)}"
        for name in weights.keys() & own.keys()
        if weights[name].shape != own[name].shape
    ]
    faults += [f"{name} is not in this run's model" for name in weights.keys() - own.keys()]
    faults += [f"{name} is not in the checkpoint" for name in own.keys() - weights.keys() if not _is_optional(name)]
    if faults:
        raise UserError(
            f"ckpt_path: the checkpoint holds a model of another shape: {listed(sorted(faults))}. Set "
            "model.policy.name_or_path, model.policy.lora and model.critic as in the checkpoint's run."
        )


def _is_optional(name: str) -> bool:
    return name.startswith(("reference.", "critic.", "policy.value_head.")) or is_reference(name)


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of a tokenizer's vocabulary, EOS and padding token."""
    content = [sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id, tokenizer.pad_token_id]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def require_same_tokenizer(stored: str, own: str) -> None:
    """Refuse a checkpoint whose ids mean other tokens.

    Raises:
        UserError: the digests differ.
    """
    if stored != own:
        raise UserError(
            f"ckpt_path: the checkpoint's tokenizer (digest {stored}) differs from that of model.policy.name_or_path "
            f"(digest {own}): its ids would mean other tokens. Start from the model that the checkpoint was trained "
            "from."
        )


def number_parameters(states: list[dict[str, Any]], numbers: dict[str, int]) -> None:
    """Rename parameters in the optimizer states that FSDP2 writes, from names to numbers; in place.

    Args:
        states: the checkpoint's, one optimizer; states that use numbers stay as they are
        numbers: number by name of this run's trained parameters; other parameters get the numbers after these
    """
    for state in states:
        names = [name for group in state["param_groups"] for name in group["params"] if isinstance(name, str)]
        numbers = numbers | {name: len(numbers) + i for i, name in enumerate(n for n in names if n not in numbers)}
        state["state"] = {numbers.get(name, name): entries for name, entries in state["state"].items()}
        for group in state["param_groups"]:
            group["params"] = sorted(numbers.get(name, name) for name in group["params"])


def adapt_optimizer(
    states: list[dict[str, Any]], stored: str, fresh: dict[str, Any], own: str, *, is_entry: bool
) -> None:
    """Replace the state of an optimizer of another kind, or with other parameters, at the end of SFT; in place.

    Args:
        states: the checkpoint's, one optimizer
        stored: its kind, such as "AdamW"
        fresh: initial state of the run's optimizer
        own: the run's kind
        is_entry: whether the checkpoint was made at the end of SFT, when the optimizer restarts anyway

    Raises:
        UserError: kind or parameters differ in a checkpoint from any other time.
    """
    groups = [state["param_groups"] for state in (states[0], fresh)]
    theirs, ours = (set().union(*each) for each in groups)
    is_other = stored != own or bool((theirs ^ ours) - OPTIMIZER_KEYS_OF_SCHEDULES)
    sizes, own_sizes = ([len(group["params"]) for group in each] for each in groups)
    if is_entry and (is_other or sizes != own_sizes):
        states[0] = fresh
    elif is_other:
        raise UserError(
            f"ckpt_path: the checkpoint's optimizer is {stored}, and model.optimizer is {own}, which "
            "cannot continue from its moments. Take the checkpoint's own optimizer, or start from sft.ckpt."
        )
    elif sizes != own_sizes:
        raise UserError(
            f"ckpt_path: the optimizer in the checkpoint has {sizes} parameters by group, this run's {own_sizes}: "
            "model.critic or model.policy differ. Start from sft.ckpt, or use the checkpoint's own config."
        )
