"""Fits what a checkpoint holds to the networks of a run: with or without reference, value head and critic."""

from collections.abc import Collection
from typing import Any

from torch import Tensor

from egspo_lightning.errors import UserError
from egspo_lightning.models.lora import is_adapter, is_reference, trained_name


def adapt_weights(
    weights: dict[str, Any], own: dict[str, Tensor], *, is_exact: bool, left_out: Collection[str] = ()
) -> None:
    """Add to a module's state dict, in place, what it lacks, and drop what the run does not have.

    Args:
        weights: of the checkpoint: ``policy.*``, perhaps ``reference.*`` and ``critic.*``; empty where it is sharded
        own: of the run, as it was built
        is_exact: whether the checkpoint was made up to the end of SFT. The policy in it is then the reference, and a
            critic has learned nothing yet.
        left_out: what checkpoints of this run do not hold: the frozen weights under adapters

    Raises:
        UserError: the run needs a network that the checkpoint cannot give.
    """
    if not weights:
        return
    weights.update({name: own[name] for name in left_out if name not in weights})
    _require_same_adapters(weights, own)
    for name in [name for name in weights if name not in own and _is_optional(name)]:
        del weights[name]
    missing = [name for name in own if name not in weights and _is_optional(name)]
    if missing and not is_exact:
        needs_reference = missing[0].startswith("reference.") or is_reference(missing[0])
        field = "objective.beta is above 0 or model.kl_reward is set" if needs_reference else "critic is set"
        remedy = "set beta to 0 and leave kl_reward out" if needs_reference else "leave it out"
        raise UserError(
            f"model.{field}, but the checkpoint holds no {'reference policy' if needs_reference else 'critic'}, and "
            f"its own policy has left SFT. Start from sft.ckpt, or {remedy}."
        )
    for name in missing:
        weights[name] = weights.get(_learned_from(name), own[name]).clone()


def _learned_from(name: str) -> str:
    """What a weight of the reference was copied from; a critic's weights are its own."""
    return trained_name(name) if is_reference(name) else name.replace("reference.", "policy.", 1)


def _require_same_adapters(weights: dict[str, Any], own: dict[str, Tensor]) -> None:
    theirs, ours = (
        {name: tuple(value.shape) for name, value in held.items() if is_adapter(name) and not is_reference(name)}
        for held in (weights, own)
    )
    theirs = {name: shape for name, shape in theirs.items() if not name.startswith("critic.")}
    ours = {name: shape for name, shape in ours.items() if not name.startswith("critic.")}
    if theirs != ours:
        raise UserError(
            f"model.policy.lora: the checkpoint has {len(theirs)} weights of adapters, this run {len(ours)}, and their "
            "names and shapes differ. Take the checkpoint's own model.policy.lora, or start from its exported model."
        )


def number_parameters(states: list[dict[str, Any]], numbers: dict[str, int]) -> None:
    """Let optimizers' states that were written by FSDP2, by the names of parameters, go by their numbers; in place.

    Args:
        states: of the checkpoint, one optimizer; those that go by numbers stay as they are
        numbers: of this run's trained parameters; one that the run does not have gets a number behind them
    """
    for state in states:
        names = [name for group in state["param_groups"] for name in group["params"] if isinstance(name, str)]
        numbers = numbers | {name: len(numbers) + i for i, name in enumerate(n for n in names if n not in numbers)}
        state["state"] = {numbers.get(name, name): entries for name, entries in state["state"].items()}
        for group in state["param_groups"]:
            group["params"] = sorted(numbers.get(name, name) for name in group["params"])


def adapt_optimizer(states: list[dict[str, Any]], fresh: dict[str, Any], *, is_entry: bool) -> None:
    """Where a checkpoint's optimizer has other parameters, put a fresh state in its place.

    Args:
        states: of the checkpoint, one optimizer
        fresh: state of the run's optimizer, as it was built
        is_entry: whether the checkpoint was made at the end of SFT, when the optimizer starts anew in any case

    Raises:
        UserError: it was not.
    """
    if not states or _group_sizes(states[0]) == _group_sizes(fresh):
        return
    if not is_entry:
        raise UserError(
            f"ckpt_path: the optimizer in the checkpoint has {_group_sizes(states[0])} parameters by group, this run's "
            f"{_group_sizes(fresh)}: model.critic or model.policy differ. Start from sft.ckpt, or use the "
            "checkpoint's own config."
        )
    states[0] = fresh


def _is_optional(name: str) -> bool:
    return name.startswith(("reference.", "critic.", "policy.value_head.")) or is_reference(name)


def _group_sizes(state: dict[str, Any]) -> list[int]:
    return [len(group["params"]) for group in state["param_groups"]]
