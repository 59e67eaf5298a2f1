"""Values out of range and contradictory settings are refused with the names of their fields."""

import math

import pytest
from jsonargparse import ArgumentError, ArgumentParser

from egspo_lightning.errors import UserError
from egspo_lightning.ops.attenuation import ConstantAttenuation
from egspo_lightning.ops.control_gates import PositionGate, RandomGate
from egspo_lightning.ops.correction import SamplerCorrection
from egspo_lightning.ops.entropy_gate import EntropyGate
from egspo_lightning.ops.estimators import GAE, ReinforcePlusPlus
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
    "mu": [-0.1, 1.1, NAN],
    "expert_shaping": [0.0, -0.1, NAN],
    "beta": [-0.1, NAN],
}
CASES = [(Objective, name, value) for name, values in OBJECTIVE.items() for value in values]
CASES += [
    (part, name, value)
    for part, name, values in [
        (ChordMu, "warmup_steps", [-1]),
        (ChordMu, "decay_steps", [-1]),
        (ChordMu, "peak", [-0.1, 1.1, NAN]),
        (ChordMu, "valley", [-0.1, 1.1, NAN]),
        (SamplerCorrection, "mode", ["clip"]),
        (SamplerCorrection, "level", ["group"]),
        (SamplerCorrection, "cap", [0.9, math.inf, NAN]),
        (EntropyGate, "width", [-0.1, math.inf, NAN]),
        (EntropyGate, "entropy", ["old"]),
        (RandomGate, "top_fraction", [0.0, -0.1, 1.1, NAN]),
        (RandomGate, "seed", [-1]),
        (PositionGate, "end", ["middle"]),
        (QuantileGate, "top_fraction", [0.0, -0.1, 1.1, NAN]),
        (QuantileGate, "running_decay", [-0.1, 1.0, NAN]),
        (QuantileGate, "over", ["row"]),
        (AbsoluteGate, "nats", [-0.1, math.inf, NAN]),
        (ConstantAttenuation, "value", [-0.1, 1.5, NAN]),
        (GAE, "gamma", [-0.1, 1.1, NAN]),
        (GAE, "lam", [-0.1, 1.1, NAN]),
        (ReinforcePlusPlus, "gamma", [-0.1, 1.1, NAN]),
        (KLReward, "coefficient", [0.0, -0.1, math.inf, NAN]),
        (KLReward, "target", [0.0, -0.1, NAN]),
        (KLReward, "horizon", [0, -1]),
        (EntropyBonus, "coefficient", [-0.1, math.inf, NAN]),
        (EntropyBonus, "target", [0.0, -0.1, NAN]),
        (EntropyBonus, "step", [0.0, -0.1, math.inf, NAN]),
    ]
    for value in values
]


def parse(part, settings):
    """Build ``part`` as the command line does."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(part, "part")
    return parser.instantiate(parser.parse_object({"part": settings})).part


@pytest.mark.parametrize(("part", "name", "value"), CASES)
def test_parser_error_on_out_of_range_value_names_field_value_and_range(part, name, value):
    with pytest.raises(ArgumentError) as refusal:
        parse(part, {name: value})
    message = str(refusal.value)
    assert f'"part.{name}"' in message
    assert str(value) in message
    assert "does not conform to restriction v>" in message or "Expected a typing.Literal" in message


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
def test_contradictory_settings_error_names_both_fields(part, settings, fields):
    with pytest.raises(UserError) as refusal:
        part(**settings)
    for name in fields:
        assert name in str(refusal.value)


@pytest.mark.parametrize(
    ("part", "settings"),
    [
        (Objective, {"epsilon_low": 0.0, "epsilon_high": 0.0, "dual_clip": 1.01, "mu": 1.0, "beta": 0.0}),
        (Objective, {"low_branch_epsilon_low": 0.0, "low_branch_epsilon_high": 0.0, "mu": 0.0}),
        (ChordMu, {"warmup_steps": 0, "decay_steps": 0, "peak": 1.0, "valley": 0.0}),
        (QuantileGate, {"top_fraction": 1.0, "running_decay": 0.0}),
        (AbsoluteGate, {"nats": 0.0}),
        (ConstantAttenuation, {"value": 0.0}),
        (ConstantAttenuation, {"value": 1.0}),
        (EntropyBonus, {"coefficient": 0.0, "target": 0.1}),
        (KLReward, {"horizon": 1}),
        (GAE, {"gamma": 0.0, "lam": 1.0}),
        (SamplerCorrection, {"cap": 1.0}),
    ],
)
def test_parser_accepts_values_at_the_bounds(part, settings):
    built = parse(part, settings)
    assert {name: getattr(built, name) for name in settings} == settings


@pytest.mark.parametrize("part", [KLReward, EntropyBonus])
def test_state_of_parsed_part_is_a_plain_float(part):
    """A checkpoint cannot hold the parser's subclasses of float."""
    assert type(parse(part, {"coefficient": 0.5}).state_dict()["current"]) is float


@pytest.mark.parametrize(
    "mu", [0.3, {"class_path": "egspo_lightning.ops.schedules.ChordMu", "init_args": {"valley": 0.3}}]
)
def test_mu_of_a_parsed_objective_is_a_plain_float(mu):
    objective = parse(Objective, {"mu": mu})
    assert objective.mu_at(300) == 0.3
    assert type(objective.mu_at(300)) is float
