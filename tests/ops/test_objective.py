"""The loss: identities, signs, and what a mutation of it would break."""

import math
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from egspo_lightning.errors import UserError
from egspo_lightning.ops.gate import ConfidenceAttenuation, ConstantAttenuation, OpenGate, QuantileGate
from egspo_lightning.ops.losses import kl_penalty, ppo_clip
from egspo_lightning.ops.masking import aggregate
from egspo_lightning.ops.objective import Objective, gate_metrics, gate_sums, gate_weights
from egspo_lightning.types import ExpertBatch, RolloutBatch, UpdateSize

MODES = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
MAX_LENGTH = 6.0


def size_of(mask):
    sequences = mask.any(-1).sum().item()
    return UpdateSize(float(mask.sum()), float(sequences), MAX_LENGTH, float(mask.sum()))


def make_rollout(gate=None, *, seed=0, rows=8, with_reference=False, advantages=None):
    """Random rollouts in float64, and log-probabilities of a policy that has moved since."""
    generator = torch.Generator().manual_seed(seed)

    def randn():
        return torch.randn(rows, 6, generator=generator, dtype=torch.float64)

    mask = torch.arange(6) < torch.randint(1, 7, (rows, 1), generator=generator)
    old = -randn().abs() - 0.05
    entropies = randn().abs() * mask
    rollout = RolloutBatch(
        input_ids=torch.zeros(rows, 6, dtype=torch.long),
        completion_mask=mask,
        old_logprobs=old * mask,
        entropies=entropies,
        ref_logprobs=(old + 0.1 * randn()) * mask if with_reference else None,
        advantages=(randn()[:, :1] if advantages is None else advantages) * mask,
        rewards=torch.zeros(rows),
        threshold=(gate or QuantileGate(0.3)).threshold(entropies[mask]),
        policy_version=0,
        update_size=size_of(mask),
    )
    return rollout, ((old + 0.3 * randn()) * mask).requires_grad_()


def take(rollout, rows):
    """Some rows as a micro-batch of the same update."""
    fields = ("input_ids", "completion_mask", "old_logprobs", "entropies", "ref_logprobs", "advantages", "rewards")
    parts = {name: getattr(rollout, name)[rows] for name in fields if getattr(rollout, name) is not None}
    return rollout._replace(**parts)


def plain_ppo(logprobs, rollout, mode, **clip):
    per_token = ppo_clip(logprobs, rollout.old_logprobs, rollout.advantages, **clip)
    divisor = rollout.completion_mask.any(-1).sum() * MAX_LENGTH if mode.endswith("norm") else None
    return aggregate(per_token, rollout.completion_mask, mode, normalizer=divisor)


def gradient(loss, logprobs):
    (grad,) = torch.autograd.grad(loss, logprobs)
    return grad


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("gate", "attenuation"), [(OpenGate(), ConfidenceAttenuation()), (QuantileGate(0.3), ConstantAttenuation(1.0))]
)
def test_gate_off_and_phi_one_are_ppo(mode, gate, attenuation):
    rollout, logprobs = make_rollout(gate)
    ours, _ = Objective(aggregation=mode, epsilon_high=0.28).egspo_loss(logprobs, rollout, attenuation)
    ppo = plain_ppo(logprobs, rollout, mode, clip_low=0.2, clip_high=0.28)
    assert_close(ours, ppo, rtol=1e-12, atol=1e-12)
    assert_close(gradient(ours, logprobs), gradient(ppo, logprobs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_phi_zero_is_a_hard_mask(mode):
    rollout, logprobs = make_rollout()
    loss, _ = Objective(aggregation=mode).egspo_loss(logprobs, rollout, ConstantAttenuation(0.0))
    grad = gradient(loss, logprobs)
    high = rollout.entropies >= rollout.threshold
    assert 0 < (high & rollout.completion_mask).sum() < rollout.completion_mask.sum()
    assert torch.equal(grad[~high], torch.zeros_like(grad[~high]))
    plain = gradient(plain_ppo(logprobs, rollout, mode, clip_low=0.2, clip_high=0.2), logprobs)
    assert_close(grad[high], plain[high], rtol=1e-12, atol=1e-12)


def test_the_low_branch_is_attenuated_by_phi_token_by_token():
    rollout, logprobs = make_rollout()
    loss, _ = Objective().egspo_loss(logprobs, rollout, ConfidenceAttenuation())
    plain = gradient(plain_ppo(logprobs, rollout, "token-mean", clip_low=0.2, clip_high=0.2), logprobs)
    p = rollout.old_logprobs.exp()
    expected = torch.where(rollout.entropies >= rollout.threshold, plain, p * (1 - p) * plain)
    assert_close(gradient(loss, logprobs), expected, rtol=1e-12, atol=1e-12)


def test_the_loss_by_hand():
    # Two tokens: a high one (H 2.0, weight 1) and a low one (H 0.1, p = 1/2, weight 1/4). Ratios 1.1 and 1.5;
    # A = 2, so the second is clipped at 1.2: L = -(1.1 * 2 + 1/4 * 1.2 * 2) / 2.
    rollout = RolloutBatch(
        input_ids=torch.zeros(1, 3, dtype=torch.long),
        completion_mask=torch.tensor([[False, True, True]]),
        old_logprobs=torch.tensor([[0.0, -1.0, math.log(0.5)]], dtype=torch.float64),
        entropies=torch.tensor([[0.0, 2.0, 0.1]], dtype=torch.float64),
        ref_logprobs=None,
        advantages=torch.tensor([[0.0, 2.0, 2.0]], dtype=torch.float64),
        rewards=torch.zeros(1),
        threshold=torch.tensor(1.0, dtype=torch.float64),
        policy_version=0,
        update_size=UpdateSize(2.0, 1.0, 2.0, 2.0),
    )
    logprobs = rollout.old_logprobs + torch.tensor([[0.0, math.log(1.1), math.log(1.5)]], dtype=torch.float64)
    loss, metrics = Objective().egspo_loss(logprobs, rollout, ConfidenceAttenuation())
    assert loss.item() == pytest.approx(-(1.1 * 2 + 0.25 * 1.2 * 2) / 2, abs=1e-12)
    assert metrics["policy/clip_fraction_high"].item() == 0.5
    assert metrics["policy/clip_fraction_low"].item() == 0.0
    assert metrics["policy/approx_kl"].item() == pytest.approx(-(math.log(1.1) + math.log(1.5)) / 2, abs=1e-7)
    sums = gate_sums(rollout, ConfidenceAttenuation())
    gate = {name: value.item() for name, value in gate_metrics(sums).items()}
    assert gate == pytest.approx(
        {
            "gate/high_fraction": 0.5,
            "gate/weight_mean": 0.625,
            "gate/weight_sum": 1.25,
            "policy/entropy": 1.05,
            "policy/entropy_high": 2.0,
            "policy/entropy_low": 0.1,
        },
        abs=1e-6,
    )


@pytest.mark.parametrize("attenuation", [ConfidenceAttenuation(), ConstantAttenuation(0.1)])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_wrong_trajectory_lowers_its_tokens_and_a_right_one_raises_them(attenuation, sign):
    advantages = torch.full((8, 1), sign, dtype=torch.float64)
    rollout, _ = make_rollout(advantages=advantages)
    logprobs = rollout.old_logprobs.clone().requires_grad_()
    loss, _ = Objective().egspo_loss(logprobs, rollout, attenuation)
    step = -gradient(loss, logprobs)  # gradient descent moves log-probabilities along it
    low = rollout.completion_mask & (rollout.entropies < rollout.threshold)
    high = rollout.completion_mask & ~low
    assert low.any()
    assert (step[low].sign() == sign).all()
    assert (step[high].sign() == sign).all()


def test_no_gradient_flows_through_the_gate():
    rollout, logprobs = make_rollout()
    entangled = rollout._replace(old_logprobs=logprobs, entropies=-logprobs)  # as if the gate followed the policy
    assert not gate_weights(entangled, ConfidenceAttenuation()).requires_grad
    frozen = rollout._replace(old_logprobs=logprobs.detach(), entropies=-logprobs.detach())
    ours, _ = Objective().egspo_loss(
        logprobs, entangled._replace(old_logprobs=logprobs.detach()), ConstantAttenuation(0.3)
    )
    plain, _ = Objective().egspo_loss(logprobs, frozen, ConstantAttenuation(0.3))
    assert_close(gradient(ours, logprobs), gradient(plain, logprobs), rtol=0, atol=0)


def test_a_group_without_spread_gives_no_gradient():
    rollout, logprobs = make_rollout(advantages=torch.zeros(8, 1, dtype=torch.float64))
    loss, _ = Objective().egspo_loss(logprobs, rollout, ConfidenceAttenuation())
    assert torch.equal(gradient(loss, logprobs), torch.zeros_like(logprobs))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bounds", [[0, 8], [0, 4, 8], [0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 0, 3, 8]])
def test_micro_batches_add_up_to_the_update(mode, bounds):
    rollout, logprobs = make_rollout(with_reference=True)
    expert_loss = torch.zeros((), dtype=torch.float64)
    objective = Objective(aggregation=mode, beta=0.1, mu=0.25)
    whole, whole_metrics = objective.hybrid_loss(logprobs, rollout, ConfidenceAttenuation(), expert_loss)
    parts = [
        objective.hybrid_loss(logprobs[a:b], take(rollout, slice(a, b)), ConfidenceAttenuation(), expert_loss)
        for a, b in pairwise(bounds)
    ]
    total = sum(loss for loss, _ in parts)
    assert_close(total, whole, rtol=1e-12, atol=1e-12)
    assert_close(gradient(total, logprobs), gradient(whole, logprobs), rtol=1e-12, atol=1e-14)
    for name, value in whole_metrics.items():
        assert sum(metrics[name] for _, metrics in parts).item() == pytest.approx(value.item(), abs=1e-6), name


def test_what_lies_outside_the_completion_has_no_part():
    rollout, logprobs = make_rollout(with_reference=True)
    mask, poison = rollout.completion_mask, torch.tensor(torch.nan, dtype=torch.float64)
    dirty = rollout._replace(
        **{
            name: torch.where(mask, getattr(rollout, name), poison)
            for name in ("old_logprobs", "entropies", "ref_logprobs", "advantages")
        }
    )
    objective, expert_loss = Objective(beta=0.1), torch.zeros((), dtype=torch.float64)
    clean_loss, _ = objective.hybrid_loss(logprobs, rollout, ConfidenceAttenuation(), expert_loss)
    dirty_loss, metrics = objective.hybrid_loss(logprobs, dirty, ConfidenceAttenuation(), expert_loss)
    assert_close(dirty_loss, clean_loss, rtol=1e-12, atol=1e-12)
    assert all(value.isfinite() for value in metrics.values())


def test_mu_one_is_sft_and_mu_zero_is_pure_rl():
    rollout, logprobs = make_rollout()
    expert = ExpertBatch(rollout.input_ids, rollout.completion_mask, rollout.update_size)
    expert_logprobs = torch.full((8, 6), -0.7, dtype=torch.float64, requires_grad=True)
    sft = Objective().sft_loss(expert_logprobs, expert)
    assert sft.item() == pytest.approx(0.7, abs=1e-12)
    alone, _ = Objective().egspo_loss(logprobs, rollout, ConfidenceAttenuation())
    for mu, expected in ((1.0, sft), (0.0, alone), (0.25, 0.75 * alone + 0.25 * sft)):
        loss, _ = Objective(mu=mu).hybrid_loss(logprobs, rollout, ConfidenceAttenuation(), sft)
        assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    only_sft, _ = Objective(mu=1.0).hybrid_loss(logprobs, rollout, ConfidenceAttenuation(), sft)
    assert torch.equal(gradient(only_sft, logprobs), torch.zeros_like(logprobs))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k3+"])
def test_the_kl_term_is_not_gated(estimator):
    rollout, logprobs = make_rollout(with_reference=True)
    objective = Objective(beta=0.5, mu=0.0, kl_estimator=estimator)
    loss, _ = objective.hybrid_loss(logprobs, rollout, ConstantAttenuation(0.0), torch.zeros((), dtype=torch.float64))
    alone, _ = objective.egspo_loss(logprobs, rollout, ConstantAttenuation(0.0))
    kl = aggregate(kl_penalty(logprobs, rollout.ref_logprobs, estimator), rollout.completion_mask, "token-mean")
    assert_close(loss, alone + 0.5 * kl, rtol=1e-12, atol=1e-12)


def test_k3_plus_has_the_value_of_k3_and_the_gradient_of_k2():
    logprobs = torch.tensor([-1.0, -2.0, -0.3], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-1.5, -1.0, -0.3], dtype=torch.float64)
    k3_plus = kl_penalty(logprobs, reference, "k3+")
    assert_close(k3_plus, kl_penalty(logprobs, reference, "k3"), rtol=1e-12, atol=1e-12)
    assert_close(gradient(k3_plus.sum(), logprobs), logprobs.detach() - reference, rtol=1e-12, atol=1e-12)


def test_dual_clip_bounds_the_loss_of_a_wrong_token_that_became_likely():
    rollout, _ = make_rollout(OpenGate(), rows=1, advantages=torch.full((1, 1), -1.0, dtype=torch.float64))
    logprobs = (rollout.old_logprobs + 5.0) * rollout.completion_mask
    free, _ = Objective().egspo_loss(logprobs, rollout, ConfidenceAttenuation())
    held, _ = Objective(dual_clip=3.0).egspo_loss(logprobs, rollout, ConfidenceAttenuation())
    assert free.item() == pytest.approx(math.exp(5), rel=1e-9)
    assert held.item() == pytest.approx(3.0, abs=1e-9)


@pytest.mark.parametrize(
    ("field", "value"),
    [("epsilon_low", 1.0), ("epsilon_low", -0.1), ("epsilon_high", -1), ("dual_clip", 1.0), ("mu", 1.5), ("beta", -1)],
)
def test_values_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(UserError, match=rf"model\.objective\.{field} must be .*got {value}"):
        Objective(**{field: value})
