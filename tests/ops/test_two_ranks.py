"""Methods on two ranks: loss and gradient of an optimizer step equal those of one rank, for every shipped class."""

import re
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import egspo_lightning
from egspo_lightning.ops.attenuation import EntropyRatioAttenuation
from egspo_lightning.ops.control_gates import InverseGate, PositionGate, RandomGate
from egspo_lightning.ops.entropy_estimators import GRPOS, GTPO, TokenGroupRelative
from egspo_lightning.ops.entropy_gate import EntropyGate
from egspo_lightning.ops.estimators import GAE, Advantage, GroupRelative, LeaveOneOut, ReinforcePlusPlus
from egspo_lightning.ops.expert_methods import HPT, SRFT
from egspo_lightning.ops.gate import QuantileGate
from egspo_lightning.ops.hapo import HAPO
from egspo_lightning.ops.objective import Objective
from egspo_lightning.ops.surrogates import CEGPPO, CISPO, GSPO, SAPO, KLCov
from egspo_lightning.ops.token_methods import Surrogate, TokenMethod, TokenWeights
from egspo_lightning.ops.token_view import Statistics
from egspo_lightning.ops.token_weight_methods import STEER, AdvantageReweighting, ClipCov
from egspo_lightning.types import NetworkOutputs

EXACT = {"rtol": 1e-10, "atol": 1e-10}
PAGE = Path(__file__).parents[2] / "docs" / "guides" / "own_gate.md"


def on_page():
    """The class of token weights in the guide."""
    (code,) = re.findall(r'^```python title="my_weights.py"\n(.*?)^```$', PAGE.read_text(), re.DOTALL | re.MULTILINE)
    names = {}
    exec(code, names)
    return names["SignedEntropyWeights"]()


GATES = [QuantileGate(0.3), RandomGate(0.3), InverseGate(0.3), PositionGate(0.3)]
WEIGHTS = [
    *(EntropyGate(gate, EntropyRatioAttenuation()) for gate in GATES),
    EntropyGate(QuantileGate(0.3), EntropyRatioAttenuation(), width=0.2, entropy="current"),
    STEER(),
    STEER(mapping="linear"),
    AdvantageReweighting(),
    ClipCov(fraction=0.3, lower=-10.0, upper=10.0),
    on_page(),
]
SURROGATES = [
    CISPO(ratio_max=1.1),
    GSPO(0.05, 0.05),
    GSPO(0.05, 0.05, level="token"),
    SAPO(),
    CEGPPO(),
    KLCov(fraction=0.3),
    HAPO(),
    SRFT(),
]
ADVANTAGES = [
    GroupRelative(),
    LeaveOneOut(),
    ReinforcePlusPlus(),
    GAE(),
    GTPO(),
    GRPOS(),
    TokenGroupRelative(),
    HPT(gate=1),
]
METHODS = [
    *({"token_weights": weights} for weights in WEIGHTS),
    *({"surrogate": surrogate} for surrogate in SURROGATES),
    *({"advantage": advantage} for advantage in ADVANTAGES),
    *({"advantage": HPT(gate=1), "aggregation": mode} for mode in ("seq-mean-token-mean", "seq-mean-token-sum-norm")),
]


def name_of(method):
    return "-".join(value if isinstance(value, str) else type(value).__name__ for value in method.values())


def shipped(protocol):
    """The package's classes of a protocol."""
    found = {c for c in protocol.__subclasses__() if c.__module__.startswith("egspo_lightning.ops")}
    return found.union(*(shipped(c) for c in found))


def test_every_shipped_class_is_compared():
    assert egspo_lightning.EGSPOModule  # imports all parts
    for protocol, instances in ((TokenWeights, WEIGHTS), (Surrogate, SURROGATES), (Advantage, ADVANTAGES)):
        assert shipped(protocol) <= {type(instance) for instance in instances}


@pytest.fixture
def one_step(make_gating, sized, on_ranks):
    """Loss parts and gradients of an optimizer step on the given ranks; the rollouts of a rank are one micro-batch."""

    def run(method, parts, whole):
        weights = method.get("token_weights", EntropyGate(QuantileGate(0.3), EntropyRatioAttenuation()))
        advantage = method.get("advantage", HPT(gate=1) if len(whole.expert_groups) else GroupRelative())
        objective = Objective(aggregation=method.get("aggregation", "token-mean"), expert_surrogate="nll")
        gating = make_gating(objective=objective, token_weights=weights, advantage=advantage)

        def work(rank, part):
            rollout = gating.apply(part, rank)[0]
            mask = rollout.completion_mask
            moved = rollout.old_logprobs + 0.3 * (1e3 * rollout.old_logprobs).sin()  # depends on the token alone
            current = NetworkOutputs((moved * mask).requires_grad_(), rollout.entropies * (1.5 + moved.sin()))
            rollout = rollout._replace(update_size=size)
            over_ranks = Statistics(rank.sum_over_ranks, rank.gather_over_ranks)
            loss = objective.egspo_loss(current, rollout, TokenMethod(weights, method.get("surrogate"), over_ranks))
            return loss.detach(), torch.autograd.grad(loss, current.logprobs)[0], part.num_sampled

        (alone,) = on_ranks(lambda rank, part: gating.apply(part, rank)[0], [whole])
        size = sized(alone).update_size
        return on_ranks(work, parts)

    return run


@pytest.mark.parametrize("method", METHODS, ids=name_of)
@pytest.mark.parametrize("at", [1, 2])
def test_two_ranks_have_the_loss_and_gradient_of_one(make_scored, split_scored, one_step, method, at):
    experts = (0, 1, 2) if isinstance(method.get("advantage"), HPT) else ()
    rewards = [0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.2, 0.0, 0.0, 1.0, 1.0, *(1.0 for _ in experts)]
    whole = make_scored(num_problems=3, expert_groups=experts, with_values=True, rewards=rewards)
    ((loss, gradient, _),) = one_step(method, [whole], whole)
    (first, second) = one_step(method, split_scored(whole, at), whole)
    assert_close(first[0] + second[0], loss, **EXACT)
    own = [part[1][: part[2]] for part in (first, second)]
    others = [part[1][part[2] :] for part in (first, second)]
    assert_close(torch.cat([*own, *others]), gradient, **EXACT)
    assert gradient.abs().max() > 1e-3


def test_weights_on_the_page_average_to_one_for_each_sign_of_the_advantage(make_rollout):
    rollout, _ = make_rollout({"token_weights": on_page()}, rewards=[0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.2])
    weights, mask = rollout.high_weights, rollout.completion_mask
    for side in (rollout.advantages > 0, rollout.advantages <= 0):
        assert weights[mask & side].mean().item() == pytest.approx(1.0, abs=1e-12)
        assert weights[mask & side].std() > 0.1
