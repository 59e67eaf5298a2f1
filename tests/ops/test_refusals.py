"""Values out of range and combinations that mean nothing are refused by the names of their fields."""

import math
import re

import pytest

from egspo_lightning.errors import UserError
from egspo_lightning.ops.attenuation import ConstantAttenuation
from egspo_lightning.ops.gate import AbsoluteGate, QuantileGate
from egspo_lightning.ops.objective import Objective
from egspo_lightning.ops.schedules import ChordMu
from egspo_lightning.training.adaptive_coefficients import EntropyBonus, KLReward

NAN = math.nan

OBJECTIVE = {
    "epsilon_low": [-0.1, 1.0, NAN],
    "epsilon_high": [-0.1, NAN],
    "low_branch_epsilon_low": [-0.1, 1.0, NAN],
    "low_branch_epsilon_high": [-0.1, NAN],
    "dual_clip": [1.0, 0.0, -3.0, NAN],
    "gate_width": [-0.1, math.inf, NAN],
    "mu": [-0.1, 1.1, NAN],
    "expert_shaping": [0.0, -0.1, NAN],
    "beta": [-0.1, NAN],
}
CASES = [(Objective, "model.objective", name, value) for name, values in OBJECTIVE.items() for value in values]
CASES += [
    (part, prefix, name, value)
    for part, prefix, name, values in [
        (ChordMu, "model.objective.mu", "warmup_steps", [-1]),
        (ChordMu, "model.objective.mu", "decay_steps", [-1]),
        (ChordMu, "model.objective.mu", "peak", [-0.1, 1.1, NAN]),
        (ChordMu, "model.objective.mu", "valley", [-0.1, 1.1, NAN]),
        (QuantileGate, "QuantileGate", "top_fraction", [0.0, -0.1, 1.1, NAN]),
        (QuantileGate, "QuantileGate", "running_decay", [-0.1, 1.0, NAN]),
        (QuantileGate, "QuantileGate", "over", ["row"]),
        (AbsoluteGate, "AbsoluteGate", "nats", [-0.1, NAN]),
        (ConstantAttenuation, "ConstantAttenuation", "value", [-0.1, 1.5, NAN]),
        (KLReward, "model.kl_reward", "coefficient", [0.0, -0.1, math.inf, NAN]),
        (KLReward, "model.kl_reward", "target", [0.0, -0.1, NAN]),
        (KLReward, "model.kl_reward", "horizon", [0, -1]),
        (EntropyBonus, "model.entropy_bonus", "coefficient", [-0.1, math.inf, NAN]),
        (EntropyBonus, "model.entropy_bonus", "target", [0.0, -0.1, NAN]),
        (EntropyBonus, "model.entropy_bonus", "step", [0.0, -0.1, NAN]),
    ]
    for value in values
]


@pytest.mark.parametrize(("part", "prefix", "name", "value"), CASES)
def test_a_value_out_of_range_is_told_with_its_field_and_what_is_allowed(part, prefix, name, value):
    with pytest.raises(UserError, match=rf"^{re.escape(prefix)}\.{name} must be .*got '?{value}'?\."):
        part(**{name: value})


@pytest.mark.parametrize(
    ("part", "settings", "fields"),
    [
        (QuantileGate, {"running_decay": 0.5, "over": "sequence"}, ["running_decay", "over"]),
        (QuantileGate, {"running_decay": 0.0, "over": "sequence"}, ["running_decay", "over"]),
        (
            Objective,
            {"low_branch": "nll", "low_branch_epsilon_low": 0.1},
            ["low_branch: nll", "low_branch_epsilon_low"],
        ),
        (
            Objective,
            {"low_branch": "nll", "low_branch_epsilon_high": 0.0},
            ["low_branch: nll", "low_branch_epsilon_high"],
        ),
        (EntropyBonus, {"coefficient": 0.0}, ["model.entropy_bonus.coefficient", "target"]),
        (KLReward, {"estimator": "k3+"}, ["model.kl_reward.estimator", "k3"]),
    ],
)
def test_a_combination_that_means_nothing_is_told_with_both_fields(part, settings, fields):
    with pytest.raises(UserError) as refusal:
        part(**settings)
    for name in fields:
        assert name in str(refusal.value)


@pytest.mark.parametrize(
    ("part", "settings"),
    [
        (Objective, {"epsilon_low": 0.0, "epsilon_high": 0.0, "dual_clip": 1.01, "mu": 1.0, "beta": 0.0}),
        (Objective, {"low_branch_epsilon_low": 0.0, "low_branch_epsilon_high": 0.0, "gate_width": 0.0, "mu": 0.0}),
        (ChordMu, {"warmup_steps": 0, "decay_steps": 0, "peak": 1.0, "valley": 0.0}),
        (QuantileGate, {"top_fraction": 1.0, "running_decay": 0.0}),
        (AbsoluteGate, {"nats": 0.0}),
        (ConstantAttenuation, {"value": 0.0}),
        (ConstantAttenuation, {"value": 1.0}),
        (EntropyBonus, {"coefficient": 0.0, "target": 0.1}),
        (KLReward, {"horizon": 1}),
    ],
)
def test_values_at_the_bounds_are_taken(part, settings):
    part(**settings)
