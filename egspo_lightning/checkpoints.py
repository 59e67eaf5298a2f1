"""Fits what a checkpoint holds to the networks of a run: with or without reference, value head and critic."""

from typing import Any

from torch import Tensor

from egspo_lightning.errors import UserError


def adapt_weights(weights: dict[str, Any], own: dict[str, Tensor], *, is_exact: bool) -> None:
    """Add to a module's state dict, in place, what it lacks, and drop what the run does not have.

    Args:
        weights: of the checkpoint: ``policy.*``, perhaps ``reference.*`` and ``critic.*``; empty where it is sharded
        own: of the run, as it was built
        is_exact: whether the checkpoint was made up to the end of SFT. The policy in it is then the reference, and a
            critic has learned nothing yet.

    Raises:
        UserError: the run needs a network that the checkpoint cannot give.
    """
    if not weights:
        return
    for name in [name for name in weights if name not in own and _is_optional(name)]:
        del weights[name]
    missing = [name for name in own if name not in weights and _is_optional(name)]
    if missing and not is_exact:
        needs_reference = missing[0].startswith("reference.")
        field = "objective.beta is above 0 or model.kl_reward is set" if needs_reference else "critic is set"
        remedy = "set beta to 0 and leave kl_reward out" if needs_reference else "leave it out"
        raise UserError(
            f"model.{field}, but the checkpoint holds no {'reference policy' if needs_reference else 'critic'}, and "
            f"its own policy has left SFT. Start from sft.ckpt, or {remedy}."
        )
    for name in missing:
        source = name.replace("reference.", "policy.", 1) if name.startswith("reference.") else None
        weights[name] = (own[name] if source is None else weights[source]).clone()


def adapt_optimizer(states: list[dict[str, Any]], fresh: dict[str, Any], *, is_entry: bool) -> None:
    """Where a checkpoint's optimiser has other parameters, put a fresh state in its place.

    Args:
        states: of the checkpoint, one optimiser
        fresh: state of the run's optimiser, as it was built
        is_entry: whether the checkpoint was made at the end of SFT, when the optimiser starts anew in any case

    Raises:
        UserError: it was not.
    """
    if not states or _group_sizes(states[0]) == _group_sizes(fresh):
        return
    if not is_entry:
        raise UserError(
            f"ckpt_path: the optimiser in the checkpoint has {_group_sizes(states[0])} parameters by group, this run's "
            f"{_group_sizes(fresh)}: model.critic or model.policy differ. Start from sft.ckpt, or use the "
            "checkpoint's own config."
        )
    states[0] = fresh


def _is_optional(name: str) -> bool:
    return name.startswith(("reference.", "critic.", "policy.value_head."))


def _group_sizes(state: dict[str, Any]) -> list[int]:
    return [len(group["params"]) for group in state["param_groups"]]
