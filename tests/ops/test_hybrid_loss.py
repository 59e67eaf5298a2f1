"""The hybrid loss L: its terms and weights, its gradients, and its sum over micro-batches."""

import math
from itertools import pairwise

import pytest
import torch
from settled_weights import SETTLED, settled
from torch.testing import assert_close

from egspo_lightning.errors import UserError
from egspo_lightning.ops.attenuation import ConfidenceAttenuation, ConstantAttenuation, EntropyRatioAttenuation
from egspo_lightning.ops.entropy_gate import EntropyGate
from egspo_lightning.ops.estimators import GAE, GroupRelative, LeaveOneOut
from egspo_lightning.ops.gate import QuantileGate
from egspo_lightning.ops.objective import Coefficients, Objective, sft_loss, value_loss
from egspo_lightning.ops.token_methods import TokenMethod, TokenWeights, branches_of
from egspo_lightning.ops.token_view import Statistics, view_of
from egspo_lightning.types import ExpertBatch, NetworkOutputs, UpdateSize

MODES = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
EXACT = {"rtol": 1e-12, "atol": 1e-13}
PHI = ConfidenceAttenuation()


def gradients(loss, *leaves):
    found = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
    return found[0] if len(leaves) == 1 else found


def expert_batch(mask):
    return ExpertBatch(torch.zeros(mask.shape, dtype=torch.long), mask, UpdateSize(float(mask.sum()), 2.0, 7.0, 0, 0))


def slow_mean(per_token, mask, mode):
    """``masking.aggregate`` as a slow loop, with a maximal completion length of 7."""
    pairs = zip(per_token.tolist(), mask.tolist(), strict=True)
    rows = [[v for v, m in zip(vs, ms, strict=True) if m] for vs, ms in pairs]
    rows = [row for row in rows if row]
    total = sum(map(sum, rows))
    return {
        "token-mean": total / sum(map(len, rows)),
        "seq-mean-token-mean": sum(sum(row) / len(row) for row in rows) / len(rows),
        "seq-mean-token-sum": total / len(rows),
        "seq-mean-token-sum-norm": total / len(rows) / 7,
    }[mode]


EXPERT_WEIGHTS = {
    "plain": {0.5: 1.0, 0.9: 1.0, 0.2: 1.0},
    "confidence": {0.5: 0.25, 0.9: 0.09, 0.2: 0.16},
    "dft": {0.5: 0.5, 0.9: 0.9, 0.2: 0.2},
    "srft": {0.5: 0.25, 0.9: 0.25, 0.2: 0.125},
}
"""Weights of tokens by their probability; for srft exp(-H) / 2 with mean entropies ln 2 and ln 4."""


@pytest.mark.parametrize("weighting", EXPERT_WEIGHTS)
def test_mu_interpolates_between_rl_and_sft_gradients(make_rollout, weighting):
    rollout, current = make_rollout()
    objective, expert = Objective(), expert_batch(torch.tensor([[False, True, True], [True, False, False]]))
    theirs = torch.tensor([[0.0, 0.5, 0.9], [0.2, 0.0, 0.0]], dtype=torch.float64).clamp(min=0.1).log()
    theirs.requires_grad_()
    entropies = torch.tensor([[9.0, 0.0, 2.0], [2.0, 9.0, 9.0]], dtype=torch.float64) * math.log(2)
    sft = sft_loss(theirs, expert, weighting=weighting, entropies=entropies)
    weights = EXPERT_WEIGHTS[weighting]
    assert sft.item() == pytest.approx(-sum(w * math.log(p) for p, w in weights.items()) / 3, abs=1e-12)
    alone = objective.egspo_loss(current, rollout, SETTLED)
    rl, expected = (
        gradients(alone, current.logprobs),
        [[0.0, -weights[0.5] / 3, -weights[0.9] / 3], [-weights[0.2] / 3, 0.0, 0.0]],
    )
    for mu in (0.0, 0.25, 1.0):
        loss, metrics = objective.hybrid_loss(current, rollout, SETTLED, sft, Coefficients(mu=mu))
        ours, experts = gradients(loss, current.logprobs, theirs)
        assert loss.item() == pytest.approx((1 - mu) * alone.item() + mu * sft.item(), abs=1e-12)
        assert_close(ours, (1 - mu) * rl, **EXACT)
        assert_close(experts, mu * torch.tensor(expected, dtype=torch.float64), **EXACT)
        assert metrics["loss/egspo"].item() == pytest.approx(alone.item(), abs=1e-12)
        assert metrics["loss/sft"].item() == pytest.approx(sft.item(), abs=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("estimator", ["k1", "abs", "k2", "k3", "k3+"])
def test_kl_term_matches_slow_loop_and_is_not_gated(make_rollout, mode, estimator):
    objective = Objective(beta=0.5, kl_estimator=estimator, aggregation=mode)
    rollout, current = make_rollout({"objective": objective}, with_reference=True)
    loss, metrics = objective.hybrid_loss(
        current, settled(rollout, ConstantAttenuation(0.0)), SETTLED, None, Coefficients(mu=0.0)
    )
    d = current.logprobs.detach() - rollout.ref_logprobs
    kl = {"k1": d, "abs": d.abs(), "k2": d**2 / 2}.get(estimator, torch.exp(-d) + d - 1)
    term = slow_mean(kl, rollout.completion_mask, mode)
    assert metrics["loss/kl"].item() == pytest.approx(term, abs=1e-12)
    assert loss.item() == pytest.approx(metrics["loss/egspo"].item() + 0.5 * term, abs=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_entropy_term_is_the_mean_over_tokens_and_is_not_gated(make_rollout, mode):
    objective = Objective(aggregation=mode)
    rollout, current = make_rollout()
    weights = Coefficients(mu=0.0, entropy=0.25)
    loss, metrics = objective.hybrid_loss(current, settled(rollout, ConstantAttenuation(0.0)), SETTLED, None, weights)
    term = slow_mean(current.entropies, rollout.completion_mask, "token-mean")  # in nats a token, in every mode
    assert metrics["loss/entropy"].item() == pytest.approx(term, abs=1e-12)
    assert loss.item() == pytest.approx(metrics["loss/egspo"].item() - 0.25 * term, abs=1e-12)
    # descent raises the entropy of every token
    grad = gradients(loss, current.entropies)
    assert ((grad < 0) == rollout.completion_mask).all()
    _, without = objective.hybrid_loss(current, rollout, SETTLED, None, Coefficients(mu=0.0))
    assert set(without) == set(metrics) - {"loss/entropy"}


def test_loss_with_beta_zero_has_no_kl_term(make_rollout):
    rollout, current = make_rollout(with_reference=True)  # beta is 0: only kl_reward would use the reference
    _, metrics = Objective().hybrid_loss(current, rollout, SETTLED, None, Coefficients(mu=0.0))
    assert rollout.ref_logprobs is None
    assert "loss/kl" not in metrics


def test_policy_weight_zero_trains_only_the_critic(make_rollout):
    objective = Objective(beta=0.5)
    parts = {"objective": objective, "advantage": GAE()}
    rollout, current = make_rollout(parts, with_reference=True, with_values=True)
    theirs = torch.full((1, 2), -0.7, dtype=torch.float64, requires_grad=True)
    sft = sft_loss(theirs, expert_batch(torch.ones(1, 2, dtype=torch.bool)), weighting="plain")
    weights = Coefficients(mu=0.25, policy=0.0, value=0.5, entropy=0.1)
    loss, metrics = objective.hybrid_loss(current, rollout, SETTLED, sft, weights)
    assert loss.item() == 0.0
    leaves = (current.logprobs, current.entropies, theirs, current.values)
    for grad in gradients(loss, *leaves):
        assert not grad.any()
    assert metrics["loss/egspo"].item() != 0.0  # still logged
    error, _ = value_loss(current.values, rollout, clip=0.2)
    *policy, critic = gradients(loss + weights.value * error, *leaves)
    assert not any(grad.any() for grad in policy)
    assert critic[rollout.completion_mask].any()


@pytest.mark.parametrize("advantage", [GroupRelative(), GroupRelative(scale_by_std=False), LeaveOneOut()])
@pytest.mark.parametrize("mode", MODES)
def test_group_with_equal_rewards_has_no_gradient(make_rollout, advantage, mode):
    objective = Objective(aggregation=mode)
    rollout, current = make_rollout({"advantage": advantage}, rewards=[0.3] * 4 + [1.0, 0.0, 0.0, 1.0])
    loss, _ = objective.hybrid_loss(current, rollout, SETTLED, None, Coefficients(mu=0.0))
    grad = gradients(loss, current.logprobs)
    assert not grad[:4].any()
    assert grad[4:].any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bounds", [[0, 8], [0, 4, 8], [0, 2, 4, 6, 8], list(range(9)), [0, 3, 8]])
def test_losses_and_gradients_of_micro_batches_add_up(make_rollout, take, mode, bounds):
    objective = Objective(aggregation=mode, beta=0.1, rescale_weights=True)
    parts = {"width": 0.2, "objective": objective, "advantage": GAE(), "gate": QuantileGate(0.3, over="sequence")}
    rollout, current = make_rollout(parts, with_reference=True, with_values=True)
    weights, expert = Coefficients(mu=0.25, value=0.5, entropy=0.1), torch.zeros((), dtype=torch.float64)

    def run(rows):
        part, now = take(rollout, current, rows)
        loss, metrics = objective.hybrid_loss(now, part, SETTLED, expert, weights)
        error, more = value_loss(now.values, part, clip=0.2)
        return loss + weights.value * error, metrics | more

    whole, whole_metrics = run(slice(0, 8))
    parts = [run(slice(a, b)) for a, b in pairwise(bounds)]
    total = sum(loss for loss, _ in parts)
    assert_close(total, whole, **EXACT)
    leaves = (current.logprobs, current.entropies, current.values)
    for ours, expected in zip(gradients(total, *leaves), gradients(whole, *leaves), strict=True):
        assert expected.any()
        assert_close(ours, expected, **EXACT)
    for name, value in whole_metrics.items():
        assert sum(metrics[name] for _, metrics in parts).item() == pytest.approx(value.item(), abs=1e-6), name


@pytest.mark.parametrize("mode", MODES)
def test_loss_ignores_values_outside_completions(make_rollout, mode):
    objective = Objective(beta=0.1, aggregation=mode)
    parts = {"objective": objective, "advantage": GAE()}
    rollout, current = make_rollout(parts, with_reference=True, with_values=True)
    mask = rollout.completion_mask
    names = ("old_logprobs", "entropies", "ref_logprobs", "advantages", "old_values", "returns")
    weights = Coefficients(mu=0.0, entropy=0.1)

    def run(poison):
        dirty = {name: torch.where(mask, getattr(rollout, name), poison) for name in names}
        now = NetworkOutputs(*(torch.where(mask, value, poison) for value in current[:3]))
        loss, metrics = objective.hybrid_loss(now, rollout._replace(**dirty), SETTLED, None, weights)
        error, more = value_loss(now.values, rollout._replace(**dirty), clip=0.2)
        return loss + error, metrics | more

    clean, clean_metrics = run(0.0)
    leaves = (current.logprobs, current.entropies, current.values)
    for poison in (torch.nan, torch.inf, 1e9):
        dirty, metrics = run(poison)
        assert_close(dirty, clean, **EXACT)
        assert_close(metrics, clean_metrics, **EXACT)
        assert_close(gradients(dirty, *leaves), gradients(clean, *leaves), **EXACT)


@pytest.mark.parametrize("mode", MODES)
def test_empty_micro_batch_gives_zeros(make_rollout, mode):
    objective = Objective(beta=0.1, aggregation=mode)
    parts = {"objective": objective, "advantage": GAE()}
    rollout, current = make_rollout(parts, with_reference=True, with_values=True)
    nothing = rollout._replace(
        completion_mask=torch.zeros_like(rollout.completion_mask), update_size=UpdateSize(0, 0, 7.0, 0, 0)
    )
    weights = Coefficients(mu=0.0, entropy=0.1)
    loss, metrics = objective.hybrid_loss(current, nothing, SETTLED, None, weights)
    error, more = value_loss(current.values, nothing, clip=0.2)
    sft = sft_loss(
        current.logprobs, ExpertBatch(None, nothing.completion_mask, nothing.update_size), weighting="confidence"
    )
    for grad in gradients(loss + error + sft, *current[:3]):
        assert torch.equal(grad, torch.zeros_like(grad))
    assert all(value.item() == 0.0 for value in [loss, error, sft, *metrics.values(), *more.values()])


class Learned:
    """A trainable attenuation, which also records whether its inputs carry gradients."""

    def __init__(self):
        self.strength = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        self.saw_gradient = False

    def phi(self, old_logprobs, entropies, threshold):
        self.saw_gradient |= entropies.requires_grad
        return self.strength * entropies.sigmoid()


@pytest.mark.parametrize(("settings", "width"), [({}, 0.0), ({"low_branch": "nll"}, 0.0), ({}, 0.3)])
def test_no_gradient_flows_through_phi_gate_or_current_entropies(make_rollout, settings, width):
    rollout, current = make_rollout()
    learned = Learned()
    method = TokenMethod(EntropyGate(attenuation=learned, width=width, entropy="current"))
    high, low, *_ = branches_of(method.weights, view_of(rollout, current, Statistics(), threshold=rollout.threshold))
    assert not high.requires_grad
    assert not low.requires_grad
    loss, _ = Objective(**settings).hybrid_loss(current, rollout, method, None, Coefficients(mu=0.0))
    _, entropies, strength = gradients(loss, current.logprobs, current.entropies, learned.strength)
    assert not entropies.any()
    assert strength.item() == 0.0
    assert not learned.saw_gradient


@pytest.mark.parametrize("value", [-0.5, math.nan, math.inf])
def test_weights_of_a_step_below_zero_or_not_finite_are_refused(make_rollout, value):
    class Given(TokenWeights):
        each_step = True

        def weights(self, tokens):
            return torch.full_like(tokens.logprobs, value)

    rollout, current = make_rollout()
    with pytest.raises(
        UserError, match=r"model\.token_weights: Given gave a weight below 0, infinite or NaN in an opt"
    ):
        Objective().egspo_loss(current, rollout, TokenMethod(Given()))


def test_gate_uses_the_entropy_that_it_names(make_rollout):
    rollout, current = make_rollout({"attenuation": EntropyRatioAttenuation()})
    tau, mask, weights = rollout.threshold, rollout.completion_mask, Coefficients(mu=0.0)
    found = {}
    for whose, entropies in (("sampling", rollout.entropies), ("current", current.entropies.detach())):
        method = TokenMethod(EntropyGate(attenuation=EntropyRatioAttenuation(), entropy=whose))
        is_high = (entropies >= tau).double()
        by_hand = rollout._replace(
            high_weights=is_high * mask, low_weights=(1 - is_high) * (entropies / tau).clamp(0, 1) * mask
        )
        found[whose], _ = Objective().hybrid_loss(current, rollout, method, None, weights)
        expected, _ = Objective().hybrid_loss(current, by_hand, SETTLED, None, weights)
        assert_close(found[whose], expected, **EXACT)
    assert found["sampling"] != found["current"]
    assert not torch.equal(rollout.entropies >= tau, current.entropies >= tau)


@pytest.mark.parametrize("clip", [0.2, None])
def test_value_loss_is_the_token_mean_of_clipped_errors(make_rollout, clip):
    rollout, current = make_rollout({"advantage": GAE()}, with_values=True)
    loss, metrics = value_loss(current.values, rollout, clip=clip)
    triples = zip(
        *(x[rollout.completion_mask].tolist() for x in (current.values, rollout.old_values, rollout.returns)),
        strict=True,
    )
    errors, moved = [], 0
    for value, old, target in triples:
        held = value if clip is None else min(max(value, old - clip), old + clip)
        errors.append(max((value - target) ** 2, (held - target) ** 2) / 2)
        moved += clip is not None and abs(value - old) > clip
    assert loss.item() == pytest.approx(sum(errors) / len(errors), abs=1e-12)
    assert metrics["loss/value"].item() == loss.item()
    share = metrics.get("value/moved_fraction")
    assert share is None if clip is None else share.item() == pytest.approx(moved / len(errors), abs=1e-6)
