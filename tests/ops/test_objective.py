"""L_EGSPO: equal to PPO with an open gate, and the effect of gate, phi and low branch."""

import math

import pytest
import torch
from settled_weights import SETTLED, settled, without_gate
from torch.testing import assert_close

from egspo_lightning.ops.attenuation import ConfidenceAttenuation, ConstantAttenuation, EntropyRatioAttenuation
from egspo_lightning.ops.estimators import GAE, GroupRelative, LeaveOneOut, ReinforcePlusPlus
from egspo_lightning.ops.gate import AbsoluteGate, OpenGate, QuantileGate
from egspo_lightning.ops.objective import Coefficients, Objective
from egspo_lightning.types import NetworkOutputs, RolloutBatch, UpdateSize

MODES = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
ESTIMATORS = [
    GroupRelative(),
    GroupRelative(scale_by_std=False),
    LeaveOneOut(),
    ReinforcePlusPlus(0.9),
    GAE(0.99, 0.9),
]
EXACT = {"rtol": 1e-12, "atol": 1e-13}


def gradient(loss, leaf):
    (grad,) = torch.autograd.grad(loss, leaf)
    return grad


def slow_loss(current, rollout, mode, *, low=0.2, high=0.2, weight=lambda b, t: 1.0):
    """PPO loss and its gradient with respect to the log-probabilities, as a slow loop over tokens."""
    logprobs, old, advantages = (x.tolist() for x in (current.logprobs, rollout.old_logprobs, rollout.advantages))
    mask = rollout.completion_mask.tolist()
    lengths = [sum(row) for row in mask]
    sequences = sum(n > 0 for n in lengths)
    loss, grad = 0.0, [[0.0] * len(row) for row in mask]
    for b, row in enumerate(mask):
        divisor = {
            "token-mean": sum(lengths),
            "seq-mean-token-mean": lengths[b] * sequences,
            "seq-mean-token-sum": sequences,
            "seq-mean-token-sum-norm": sequences * 7,
        }[mode]
        for t, counts in enumerate(row):
            if counts:
                ratio, a = math.exp(logprobs[b][t] - old[b][t]), advantages[b][t]
                is_clipped = (a > 0 and ratio > 1 + high) or (a < 0 and ratio < 1 - low)
                bounded = min(max(ratio, 1 - low), 1 + high) if is_clipped else ratio
                loss -= weight(b, t) * bounded * a / divisor
                grad[b][t] = 0.0 if is_clipped else -weight(b, t) * ratio * a / divisor
    return torch.tensor(loss, dtype=torch.float64), torch.tensor(grad, dtype=torch.float64)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("advantage", ESTIMATORS)
@pytest.mark.parametrize(
    ("gate", "attenuation", "width"),
    [
        (OpenGate(), ConfidenceAttenuation(), 0.0),
        (OpenGate(), EntropyRatioAttenuation(), 0.5),
        (QuantileGate(0.3), ConstantAttenuation(1.0), 0.0),
        (QuantileGate(0.3, over="sequence"), ConstantAttenuation(1.0), 0.5),
        (AbsoluteGate(0.0), ConstantAttenuation(0.0), 0.0),
    ],
)
def test_open_gate_or_phi_one_equals_ppo(make_rollout, mode, advantage, gate, attenuation, width):
    objective = Objective(aggregation=mode, epsilon_high=0.28)
    parts = {"gate": gate, "advantage": advantage, "attenuation": attenuation, "width": width, "objective": objective}
    rollout, current = make_rollout(parts, with_values=True)
    assert rollout.advantages.any()
    ours = objective.egspo_loss(current, rollout, SETTLED)
    loss, grad = slow_loss(current, rollout, mode, high=0.28)
    assert_close(ours, loss, **EXACT)
    assert_close(gradient(ours, current.logprobs), grad, **EXACT)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("over", ["batch", "sequence"])
def test_phi_zero_masks_low_tokens(make_rollout, mode, over):
    rollout, current = make_rollout({"gate": QuantileGate(0.3, over=over)})
    tau, entropies = rollout.threshold.tolist(), rollout.entropies.tolist()
    loss, grad = slow_loss(current, rollout, mode, weight=lambda b, t: float(entropies[b][t] >= tau[b][0]))
    ours = Objective(aggregation=mode).egspo_loss(current, settled(rollout, ConstantAttenuation(0.0)), SETTLED)
    assert_close(ours, loss, **EXACT)
    assert_close(gradient(ours, current.logprobs), grad, **EXACT)
    assert 0 < (grad != 0).sum() < rollout.completion_mask.sum() / 2


@pytest.mark.parametrize("mode", MODES)
def test_low_branch_is_scaled_by_phi_per_token(make_rollout, mode):
    rollout, current = make_rollout()
    tau, old, entropies = rollout.threshold[0].item(), rollout.old_logprobs.tolist(), rollout.entropies.tolist()

    def weight(b, t):
        p = math.exp(old[b][t])
        return 1.0 if entropies[b][t] >= tau else p * (1 - p)

    loss, grad = slow_loss(current, rollout, mode, weight=weight)
    ours = Objective(aggregation=mode).egspo_loss(current, settled(rollout, ConfidenceAttenuation()), SETTLED)
    assert_close(ours, loss, **EXACT)
    assert_close(gradient(ours, current.logprobs), grad, **EXACT)


def by_hand(**fields):
    """A prompt, a high token (H = 2, p = e^-1) and a low token (H = 1/4, p = 1/2); A = 2 and tau = 1."""
    doubles = {"dtype": torch.float64}
    rollout = (
        RolloutBatch(
            input_ids=torch.zeros(1, 3, dtype=torch.long),
            completion_mask=torch.tensor([[False, True, True]]),
            old_logprobs=torch.tensor([[0.0, -1.0, math.log(0.5)]], **doubles),
            entropies=torch.tensor([[0.0, 2.0, 0.25]], **doubles),
            ref_logprobs=None,
            old_values=None,
            advantages=torch.tensor([[0.0, 2.0, 2.0]], **doubles),
            returns=None,
            rewards=torch.zeros(1),
            is_expert=torch.tensor([False]),
            is_masked=torch.tensor([False]),
            **without_gate(torch.zeros(1, 3, **doubles)),
            policy_version=0,
            update_size=UpdateSize(2.0, 1.0, 2.0, 2.0, 2.0),
        )
        ._replace(threshold=torch.tensor([[1.0]], **doubles))
        ._replace(**fields)
    )
    ratios = torch.tensor([[0.0, math.log(1.1), math.log(1.5)]], **doubles)
    return rollout, NetworkOutputs((rollout.old_logprobs + ratios).requires_grad_(), rollout.entropies)


HIGH, LOW = 1.1 * 2, 1.2 * 2  # ratios 1.1 and 1.5, the second clipped at 1.2
# with width 1/2: the high shares of the two tokens, and their weights with phi = p (1 - p)
HIGH_SHARE, LOW_SHARE = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(1.5))
SOFT_HIGH = HIGH_SHARE + (1 - HIGH_SHARE) * math.exp(-1) * (1 - math.exp(-1))
SOFT_LOW = LOW_SHARE + (1 - LOW_SHARE) * 0.25


@pytest.mark.parametrize(
    ("settings", "attenuation", "fields", "expected"),
    [
        ({}, ConfidenceAttenuation(), {}, HIGH + 0.25 * LOW),
        ({}, ConstantAttenuation(0.1), {}, HIGH + 0.1 * LOW),
        ({}, EntropyRatioAttenuation(), {}, HIGH + 0.25 * LOW),  # H / tau = 1/4
        ({}, EntropyRatioAttenuation(), {"threshold": torch.tensor([[2.0]]).double()}, HIGH + 0.125 * LOW),
        ({}, EntropyRatioAttenuation(), {"threshold": torch.tensor([[torch.inf]]).double()}, 0.0),
        ({}, ConfidenceAttenuation(), {"weight_scale": torch.tensor([[1.5]]).double()}, 1.5 * (HIGH + 0.25 * LOW)),
        ({"low_branch_epsilon_high": 0.4}, ConfidenceAttenuation(), {}, HIGH + 0.25 * 1.4 * 2),
        ({"epsilon_low": 0.6, "low_branch_epsilon_low": 0.4}, ConfidenceAttenuation(), {}, HIGH + 0.25 * LOW),
        ({"epsilon_high": 0.05, "low_branch_epsilon_high": 0.4}, ConfidenceAttenuation(), {}, 2.1 + 0.25 * 2.8),
        ({"low_branch": "nll"}, ConfidenceAttenuation(), {}, HIGH + 0.25 * math.log(0.5 * 1.5)),
        ({}, ConfidenceAttenuation(), {"width": 0.5}, SOFT_HIGH * HIGH + SOFT_LOW * LOW),
    ],
)
def test_egspo_loss_by_hand(settings, attenuation, fields, expected):
    width = fields.get("width", 0.0)
    rollout, current = by_hand(**{name: value for name, value in fields.items() if name != "width"})
    loss = Objective(**settings).egspo_loss(current, settled(rollout, attenuation, width=width), SETTLED)
    assert loss.item() == pytest.approx(-expected / 2, abs=1e-12)


def test_low_branch_with_negative_advantage_by_hand():
    # ratios 1.1 and 0.5, A = -2: the ratio of the low token is clipped at 1 - epsilon_low
    rollout, current = by_hand(advantages=torch.tensor([[0.0, -2.0, -2.0]]).double())
    logprobs = current.logprobs.detach() + torch.tensor([[0.0, 0.0, math.log(0.5 / 1.5)]])
    for settings, held in (
        ({}, 0.8),
        ({"low_branch_epsilon_low": 0.4}, 0.6),
        ({"epsilon_high": 0.5, "low_branch_epsilon_high": 9.0}, 0.8),
    ):
        loss = Objective(**settings).egspo_loss(
            NetworkOutputs(logprobs, rollout.entropies), settled(rollout, ConfidenceAttenuation()), SETTLED
        )
        assert loss.item() == pytest.approx((1.1 * 2 + 0.25 * held * 2) / 2, abs=1e-12)


def test_loss_with_tiny_gate_width_equals_hard_gate(make_rollout):
    rollout, current = make_rollout()
    hard, soft = (
        Objective().egspo_loss(current, settled(rollout, ConfidenceAttenuation(), width=width), SETTLED)
        for width in (0.0, 1e-9)
    )
    off = rollout.completion_mask & (rollout.entropies == rollout.threshold)
    assert not off.any()  # at tau itself a soft gate is half open
    assert_close(soft, hard, **EXACT)
    assert_close(gradient(soft, current.logprobs), gradient(hard, current.logprobs), **EXACT)


def test_dual_clip_bounds_both_branches(make_rollout):
    rollout, current = make_rollout()
    rollout = rollout._replace(advantages=-rollout.completion_mask.double())
    logprobs = (rollout.old_logprobs + 5.0) * rollout.completion_mask
    free, held = (
        Objective(dual_clip=bound).egspo_loss(
            NetworkOutputs(logprobs, current.entropies), settled(rollout, ConstantAttenuation(1.0)), SETTLED
        )
        for bound in (None, 3.0)
    )
    assert free.item() == pytest.approx(math.exp(5), rel=1e-9)
    assert held.item() == pytest.approx(3.0, abs=1e-9)


@pytest.mark.parametrize(
    ("settings", "expected"), [({}, False), ({"beta": 0.1}, True), ({"low_branch": "nll"}, True), ({"mu": 1.0}, False)]
)
def test_needs_every_rollout_iff_zero_advantage_rollouts_have_a_gradient(make_rollout, settings, expected):
    objective = Objective(**settings)
    assert objective.needs_every_rollout is expected
    rollout, current = make_rollout({"objective": objective}, with_reference=True, rewards=[0.5] * 8)
    loss, _ = objective.hybrid_loss(
        current, settled(rollout, ConfidenceAttenuation()), SETTLED, None, Coefficients(objective.mu_at(0))
    )
    assert gradient(loss, current.logprobs).any() == expected
