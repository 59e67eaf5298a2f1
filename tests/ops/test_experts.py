"""Expert rows in the rollout batch (LUFFY): their loss by hand, and the terms that exclude them."""

import math

import pytest
import torch
from settled_weights import SETTLED, settled
from torch.testing import assert_close

from egspo_lightning.ops.attenuation import ConfidenceAttenuation, ConstantAttenuation
from egspo_lightning.ops.estimators import GroupRelative, LeaveOneOut
from egspo_lightning.ops.expert_methods import HPT, SRFT
from egspo_lightning.ops.gate import AbsoluteGate, QuantileGate
from egspo_lightning.ops.objective import Coefficients, Objective
from egspo_lightning.ops.token_view import Statistics, view_of

MODES = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
EXACT = {"rtol": 1e-12, "atol": 1e-13}
MIXED = {"num_problems": 2, "expert_groups": (1, 0), "rewards": [1.0, 0.0, 0.0, 0.0] + [0.0] * 4 + [1.0, 1.0]}
"""Group 0 has mean 1/4 and std 1/2; group 1 has std 0. Their expert rows are in reverse order."""


def gradient(loss, leaf):
    (grad,) = torch.autograd.grad(loss, leaf)
    return grad


@pytest.mark.parametrize(
    ("advantage", "expected"),
    [(GroupRelative(), 1.5), (GroupRelative(scale_by_std=False), 0.75), (LeaveOneOut(), 0.75)],
)
def test_expert_advantage_is_relative_to_its_own_group(make_rollout, advantage, expected):
    rollout, _ = make_rollout({"advantage": advantage}, **MIXED)
    mask = rollout.completion_mask
    assert rollout.is_expert.tolist() == [False] * 8 + [True] * 2
    assert rollout.advantages[8][mask[8]].tolist() == pytest.approx([1.0] * int(mask[8].sum()), abs=1e-5)
    assert rollout.advantages[9][mask[9]].tolist() == pytest.approx([expected] * int(mask[9].sum()), abs=1e-5)
    assert not rollout.advantages[~mask].any()


def test_expert_rows_do_not_change_sampled_advantages(make_rollout):
    with_experts, _ = make_rollout(**MIXED)
    without, _ = make_rollout(**(MIXED | {"expert_groups": (), "rewards": MIXED["rewards"][:8]}))
    own = [with_experts.advantages[b][with_experts.completion_mask[b]].unique().tolist() for b in range(8)]
    assert own == [without.advantages[b][without.completion_mask[b]].unique().tolist() for b in range(8)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("settings", "width"), [({}, 0.0), ({"low_branch": "nll"}, 0.0), ({"dual_clip": 3.0}, 0.3)])
def test_expert_loss_by_hand_is_neither_gated_nor_clipped(make_rollout, mode, settings, width):
    objective = Objective(aggregation=mode, expert_shaping=0.25, **settings)
    rollout, current = make_rollout({"objective": objective}, **MIXED)
    far = current.logprobs.detach().clone()
    far[8:][rollout.completion_mask[8:]] = math.log(0.75)  # p = 3/4 whatever pi_old: f = 3/4
    far.requires_grad_()
    losses = []
    for attenuation in (ConfidenceAttenuation(), ConstantAttenuation(0.0)):
        both = objective.egspo_loss(current._replace(logprobs=far), settled(rollout, attenuation, width=width), SETTLED)
        own = rollout._replace(completion_mask=rollout.sampled_mask)
        losses.append(
            both - objective.egspo_loss(current._replace(logprobs=far), settled(own, attenuation, width=width), SETTLED)
        )
    size, lengths = rollout.update_size, rollout.completion_mask[8:].sum(-1).tolist()
    a = (1.0, 1 / (0.5 + 1e-6) * 0.75)
    per_row = [
        -0.75 * a[k] * {"token-mean": n / size.num_tokens, "seq-mean-token-mean": 1 / 10}.get(mode, n / 10)
        for k, n in enumerate(lengths)
    ]
    expected = sum(per_row) / (7 if mode.endswith("norm") else 1)
    assert [loss.item() for loss in losses] == pytest.approx([expected] * 2, abs=1e-9)
    grad = gradient(losses[0], far)
    assert_close(grad[:8], torch.zeros_like(grad[:8]), **EXACT)
    # d f / d log p = p gamma / (p + gamma)^2 = 3/16
    slopes = grad[8:].sum(-1).tolist()
    assert slopes == pytest.approx([row / 0.75 * 3 / 16 / (7 if mode.endswith("norm") else 1) for row in per_row])


def test_srft_raises_right_completions_by_entropy_and_lowers_wrong_ones(make_rollout):
    rollout, current = make_rollout(rewards=MIXED["rewards"][:8])
    loss = SRFT().per_token(view_of(rollout, current, Statistics(), threshold=None))
    for row, right in enumerate(reward > 0 for reward in MIXED["rewards"][:8]):
        mask = rollout.completion_mask[row]
        logprobs, entropies = (values[row][mask].tolist() for values in (current.logprobs, current.entropies))
        weight = -0.1 * math.exp(sum(entropies) / len(entropies)) if right else 1.0
        assert loss[row][mask].tolist() == pytest.approx([weight * value for value in logprobs], abs=1e-12)


def test_hpt_trains_unsolved_problems_by_sft_and_others_by_grpo(make_rollout):
    objective = Objective(expert_surrogate="nll")
    rollout, current = make_rollout({"objective": objective, "advantage": HPT()}, **MIXED)
    loss = objective.egspo_loss(current, rollout, SETTLED)
    grad, mask = gradient(loss, current.logprobs), rollout.completion_mask
    assert not grad[4:8].any()  # group 1 has no right completion
    assert not grad[9].any()  # the expert solution of group 0, which has one
    assert_close(grad[8], -mask[8].double() / rollout.update_size.num_tokens, **EXACT)
    grpo, _ = make_rollout(**MIXED)
    assert torch.equal(rollout.advantages[:4], grpo.advantages[:4])


def test_hpt_gate_counts_right_completions(make_rollout):
    rewards = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0]
    for gate, expected in ((0, [0.0, 0.0]), (1, [0.0, 1.0]), (2, [1.0, 1.0])):  # of groups 1 and 0
        rollout, _ = make_rollout({"advantage": HPT(gate=gate)}, **(MIXED | {"rewards": rewards}))
        assert rollout.advantages[8:].amax(-1).tolist() == expected
        assert [bool(rows.any()) for rows in rollout.advantages[:8].split(4)] == [gate < 1, gate < 2]


def test_metrics_and_threshold_exclude_expert_tokens(make_rollout):
    rollout, current = make_rollout(**MIXED)
    mask, tau = rollout.sampled_mask, rollout.threshold[0].item()
    assert mask.sum() == rollout.update_size.num_sampled_tokens < rollout.update_size.num_tokens
    own = sorted(rollout.entropies[:8][rollout.completion_mask[:8]].tolist())
    position = 0.7 * (len(own) - 1)
    below = own[int(position)]
    assert tau == pytest.approx(below + (position % 1) * (own[int(position) + 1] - below), abs=1e-12)
    objective, weights = Objective(), Coefficients(mu=0.0, entropy=0.5)
    _, metrics = objective.hybrid_loss(current, rollout, SETTLED, None, weights)
    poisoned = current.logprobs.detach().clone()
    poisoned[8:] += 3.0
    moved = current._replace(logprobs=poisoned, entropies=current.entropies.detach() + rollout.is_expert.unsqueeze(1))
    _, others = objective.hybrid_loss(moved, rollout, SETTLED, None, weights)
    for name in ("policy/approx_kl", "policy/clip_fraction_low", "policy/clip_fraction_high", "loss/entropy"):
        assert metrics[name].item() == others[name].item() != 0.0, name
    assert metrics["loss/egspo"].item() != others["loss/egspo"].item()


def test_kl_term_excludes_expert_tokens(make_rollout):
    objective = Objective(beta=1.0, kl_estimator="k1")
    rollout, current = make_rollout({"objective": objective}, with_reference=True, **MIXED)
    _, metrics = objective.hybrid_loss(current, rollout, SETTLED, None, Coefficients(mu=0.0))
    d = (current.logprobs - rollout.ref_logprobs)[:8][rollout.completion_mask[:8]]
    assert metrics["loss/kl"].item() == pytest.approx(d.sum().item() / rollout.update_size.num_tokens, abs=1e-12)


@pytest.mark.parametrize("gate", [QuantileGate(0.3), QuantileGate(0.3, over="sequence"), AbsoluteGate(0.7)])
def test_weight_scale_excludes_expert_tokens(make_rollout, gate):
    objective = Objective(rescale_weights=True)
    rollout, _ = make_rollout({"objective": objective, "gate": gate}, **MIXED)
    weights = (rollout.high_weights + rollout.low_weights) * rollout.weight_scale
    assert weights[rollout.sampled_mask].mean().item() == pytest.approx(1.0, abs=1e-12)
    assert rollout.weight_scale[0].item() > 1.1
