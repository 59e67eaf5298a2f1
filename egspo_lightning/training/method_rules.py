"""Rules for the parts of the module: which advantage, critic, gate, token weights and surrogate fit together."""

from collections.abc import Iterable
from typing import Any

from egspo_lightning.errors import UserError
from egspo_lightning.ops.attenuation import ConfidenceAttenuation, ConstantAttenuation
from egspo_lightning.ops.entropy_estimators import GRPOS, GTPO
from egspo_lightning.ops.entropy_gate import EntropyGate
from egspo_lightning.ops.estimators import Advantage, GroupRelative
from egspo_lightning.ops.expert_methods import HPT
from egspo_lightning.ops.gate import OpenGate, QuantileGate
from egspo_lightning.ops.token_methods import Surrogate, TokenWeights


def require_method(module: Any) -> None:
    """Check that critic, gate, advantage and KL settings fit together.

    Args:
        module: the EGSPOModule

    Raises:
        UserError: naming both settings.
    """
    _require_attributes("advantage", module.advantage, Advantage.__annotations__, Advantage)
    needs = ("needs_every_rollout", "needs_current_entropies")
    _require_attributes("token_weights", module.token_weights, ("each_step", *needs), TokenWeights)
    if module.surrogate is not None:
        _require_attributes("surrogate", module.surrogate, needs, Surrogate)
    _require_critic(module)
    _require_gate(module)
    _require_surrogate(module)
    _require_kl_reward(module)


def _require_kl_reward(module: Any) -> None:
    """Refuse a KL in the reward with advantages that would distort it."""
    name = type(module.advantage).__name__
    if module.kl_reward is None:
        return
    remedy = "choose another advantage, or put the KL into the loss by model.objective.beta."
    if isinstance(module.advantage, GTPO | GRPOS | HPT):
        raise UserError(
            f"model.kl_reward with model.advantage {name} would change which completions count as right (a reward "
            f"above 0.5). Leave kl_reward out, {remedy}"
        )
    if isinstance(module.advantage, GroupRelative) and module.advantage.scale_by_std:
        raise UserError(
            f"model.kl_reward with model.advantage {name} would scale the KL of groups with equal rewards to "
            f"advantages of standard deviation 1. Set model.advantage.scale_by_std to false, {remedy}"
        )


def _require_attributes(field: str, part: Any, names: Iterable[str], base: type) -> None:
    """Refuse a class of the user's own that lacks attributes which its base class has."""
    lacking = [name for name in names if not hasattr(part, name)]
    if lacking:
        raise UserError(
            f"model.{field} {type(part).__name__} has no {' and no '.join(lacking)}. Set it, or derive the class from "
            f"egspo_lightning.{base.__name__}, which has defaults."
        )


def _require_critic(module: Any) -> None:
    name, needs_values = type(module.advantage).__name__, module.advantage.needs_values
    if needs_values and module.critic_config is None:
        raise UserError(
            f"model.advantage {name} needs model.critic, which is null. Set model.critic.trunk to shared (a value "
            "head on the policy) or own, or choose another advantage."
        )
    if module.critic_config is not None and not needs_values:
        raise UserError(
            f"model.critic is set, but model.advantage {name} uses no values. Leave model.critic out, or set "
            "model.advantage to egspo_lightning.ops.estimators.GAE."
        )


def _require_gate(module: Any) -> None:
    """Refuse settings of the gate without effect: an open gate, phi = 0, or token weights without a gate."""
    weights, low_branch = module.token_weights, module.objective.changed_low_branch
    name = type(weights).__name__
    if not isinstance(weights, EntropyGate):
        _require_no_gate(module, name)
        return
    _require_one_gate(module)
    changed = [f"model.objective.{field}" for field in low_branch]
    changed += ["model.objective.rescale_weights"] * module.objective.rescale_weights
    changed += ["model.token_weights.width"] * (weights.width > 0)
    changed += ["model.token_weights.entropy"] * (weights.entropy == "current")
    if isinstance(weights.gate, OpenGate) and changed:
        raise UserError(
            f"{changed[0]} has no effect with model.gate OpenGate, which switches the gate off. Leave it out, or "
            "choose another gate."
        )
    has_no_weight = isinstance(weights.attenuation, ConstantAttenuation) and weights.attenuation.value == 0
    if has_no_weight and "low_branch" in low_branch:
        raise UserError(
            "model.objective.low_branch: nll trains low-entropy tokens, and model.attenuation ConstantAttenuation "
            "with value 0 gives them no weight. Raise value, or set low_branch to ppo."
        )


def _require_one_gate(module: Any) -> None:
    """Refuse a gate or attenuation beside the one of the token weights."""
    for name in _changed_parts(module):
        given = getattr(module, name)
        if getattr(module.token_weights, name) is not given:
            raise UserError(
                f"model.{name} {type(given).__name__} has no effect, because model.token_weights.{name} is set. Leave "
                "one of them out."
            )


def _changed_parts(module: Any) -> list[str]:
    """Which of model.gate and model.attenuation is not the default."""
    defaults = {"gate": QuantileGate(), "attenuation": ConfidenceAttenuation()}
    return [name for name, default in defaults.items() if getattr(module, name) != default]


def _require_no_gate(module: Any, name: str) -> None:
    """Refuse settings of the gate with token weights that have none."""
    has_branches = hasattr(module.token_weights, "branches")
    low_branch = [] if has_branches else module.objective.changed_low_branch
    changed = [f"model.objective.{field}" for field in low_branch]
    changed += [f"model.{name}" for name in _changed_parts(module)]
    if changed:
        raise UserError(
            f"{changed[0]} has no effect with model.token_weights {name}, which has no gate. Leave it out, or set "
            "model.token_weights to EntropyGate."
        )


def _require_surrogate(module: Any) -> None:
    """Refuse settings of PPO's clip with another surrogate."""
    changed = module.objective.changed_clip_settings
    if module.surrogate is not None and changed:
        name = type(module.surrogate).__name__
        raise UserError(
            f"model.objective.{changed[0]} belongs to PPO's surrogate, which model.surrogate {name} replaces. "
            f"Leave it out, or set the arguments of {name} (--model.surrogate.help {name})."
        )
