"""One gradient step of a tiny softmax policy: the sign of each change in probability."""

import pytest
import torch
from settled_weights import SETTLED

from egspo_lightning.ops.attenuation import ConfidenceAttenuation, ConstantAttenuation, EntropyRatioAttenuation
from egspo_lightning.ops.estimators import GAE, GroupRelative, LeaveOneOut, ReinforcePlusPlus
from egspo_lightning.ops.gate import QuantileGate
from egspo_lightning.ops.objective import Coefficients, Objective
from egspo_lightning.ops.token_stats import token_stats_from_logits
from egspo_lightning.types import NetworkOutputs

ESTIMATORS = [GroupRelative(), GroupRelative(scale_by_std=False), LeaveOneOut(), ReinforcePlusPlus(), GAE()]
REWARDS = [1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0]


@pytest.fixture
def step(make_scored, make_gating, sized, on_ranks):
    """Takes a step; returns changes in log-probability, masks of low and high tokens, and the correct rows."""

    def run(advantage, objective, attenuation=None, gate=None, gate_width=0.0):
        torch.manual_seed(0)
        scored = make_scored(rewards=REWARDS)
        rows, width = scored.input_ids.shape
        temper = 4 * torch.rand(rows, width, 1, dtype=torch.float64)  # low and high entropies
        logits = (temper * torch.randn(rows, width, 6, dtype=torch.float64)).requires_grad_()
        with torch.no_grad():
            tokens = logits.softmax(-1).flatten(0, 1).multinomial(1).view(rows, width)
            old = token_stats_from_logits(logits, tokens)
        mask = scored.completion_mask
        # a critic starts at 0
        scores = NetworkOutputs(old.logprobs * mask, old.entropies * mask, torch.zeros_like(old.logprobs))
        parts = {
            "objective": objective,
            "advantage": advantage,
            "attenuation": attenuation,
            "gate": gate,
            "width": gate_width,
        }
        admission = make_gating(**{name: part for name, part in parts.items() if part is not None})
        scored = scored._replace(input_ids=tokens, scores=scores)
        ((rollout, _),) = on_ranks(lambda rank, part: admission.apply(part, rank), [scored])
        rollout = sized(rollout)
        now = token_stats_from_logits(logits, tokens)
        loss, _ = objective.hybrid_loss(
            NetworkOutputs(now.logprobs, now.entropies), rollout, SETTLED, None, Coefficients(mu=0.0)
        )
        loss.backward()
        with torch.no_grad():
            after = token_stats_from_logits(logits - 1e-3 * logits.grad, tokens).logprobs
        low = mask & (rollout.entropies < rollout.threshold)
        assert low.sum() > mask.sum() / 2
        return after - old.logprobs, low, mask & ~low, (scored.rewards > 0).unsqueeze(1)

    return run


@pytest.mark.parametrize("advantage", ESTIMATORS)
@pytest.mark.parametrize("attenuation", [ConfidenceAttenuation(), ConstantAttenuation(0.1), EntropyRatioAttenuation()])
def test_step_lowers_tokens_of_wrong_rows_and_raises_those_of_right_rows(step, advantage, attenuation):
    moved, low, high, right = step(advantage, Objective(), attenuation)
    for tokens in (low, high):
        assert (moved[tokens & right] > 0).all()
        assert (moved[tokens & ~right] < 0).all()


@pytest.mark.parametrize(
    "objective",
    [
        Objective(rescale_weights=True),
        Objective(low_branch_epsilon_high=0.4),
        Objective(dual_clip=3.0),
        Objective(aggregation="seq-mean-token-mean"),
    ],
)
@pytest.mark.parametrize("width", [0.0, 0.1])
@pytest.mark.parametrize("gate", [QuantileGate(0.2), QuantileGate(0.2, over="sequence")])
def test_step_has_the_same_signs_for_every_gate_and_objective_variant(step, objective, gate, width):
    moved, low, high, right = step(GroupRelative(), objective, gate=gate, gate_width=width)
    for tokens in (low, high):
        assert (moved[tokens & right] > 0).all()
        assert (moved[tokens & ~right] < 0).all()


@pytest.mark.parametrize("advantage", ESTIMATORS)
def test_nll_low_branch_raises_low_tokens_of_wrong_rows(step, advantage):
    moved, low, high, right = step(advantage, Objective(low_branch="nll"))
    assert (moved[low & ~right] > 0).all()
    assert (moved[low & right] > 0).all()
    assert (moved[high & right] > 0).all()
    assert (moved[high & ~right] < 0).all()


def test_nll_low_branch_ignores_advantages_of_low_tokens(make_rollout):
    rollout, current = make_rollout()
    low = rollout.completion_mask & (rollout.entropies < rollout.threshold)
    grads = []
    for factor in (1.0, -1.0, 0.0):
        turned = rollout._replace(advantages=factor * rollout.advantages)
        loss = Objective(low_branch="nll").egspo_loss(current, turned, SETTLED)
        grads.append(torch.autograd.grad(loss, current.logprobs)[0])
    assert torch.equal(grads[0][low], grads[1][low])
    assert torch.equal(grads[0][low], grads[2][low])
    p = rollout.old_logprobs.exp()[low]
    torch.testing.assert_close(grads[0][low], -p * (1 - p) / rollout.completion_mask.sum())
