"""Importance weights that correct for an engine whose sampling distribution differs from pi_old."""

import math

import pytest
import torch
from settled_weights import SETTLED, settled
from torch.testing import assert_close

from egspo_lightning.ops.attenuation import ConfidenceAttenuation, ConstantAttenuation
from egspo_lightning.ops.batching import balanced_batches, row_lengths
from egspo_lightning.ops.correction import SamplerCorrection, is_corrected, sampler_ratios, sampler_weights
from egspo_lightning.ops.objective import Coefficients, Objective
from egspo_lightning.training.micro_batches import RolloutShare
from egspo_lightning.types import NetworkOutputs

EXACT = {"rtol": 1e-12, "atol": 1e-13}
PHI = ConfidenceAttenuation()

# Two rows: a prompt token, then ratios 2, 1/4 and unknown; a prompt token, then 3, 3/2 and padding
OLD = torch.tensor([[9.0, 0.5, 0.2, 0.3], [9.0, 0.6, 0.3, 9.0]], dtype=torch.float64).log()
SAMPLED = torch.tensor([[1.0, 0.25, 0.8, math.nan], [1.0, 0.2, 0.2, 1.0]], dtype=torch.float64).log()
MASK = torch.tensor([[False, True, True, True], [False, True, True, False]])


@pytest.mark.parametrize(
    ("level", "mode", "expected"),
    [
        ("token", "off", [[1, 1, 1, 1], [1, 1, 1, 1]]),
        ("token", "truncated", [[1, 2, 0.25, 1], [1, 2.5, 1.5, 1]]),
        ("token", "masked", [[1, 2, 0, 1], [1, 0, 1.5, 1]]),  # 0.25 lies below 1 / 2.5, 3 above 2.5
        ("sequence", "off", [[1, 1, 1, 1], [1, 1, 1, 1]]),
        ("sequence", "truncated", [[1, 0.5, 0.5, 0.5], [1, 2.5, 2.5, 1]]),  # 2 / 4, and 3 * 1.5 = 4.5
        ("sequence", "masked", [[1, 0.5, 0.5, 0.5], [1, 0, 0, 1]]),
        ("geometric", "truncated", [[1, *[0.5 ** (1 / 3)] * 3], [1, 4.5**0.5, 4.5**0.5, 1]]),  # roots of 2 / 4 and 4.5
    ],
)
def test_weights_by_hand(level, mode, expected):
    weights = sampler_weights(sampler_ratios(OLD, SAMPLED, MASK, level=level), mode=mode, cap=2.5)
    assert_close(weights, torch.tensor(expected, dtype=torch.float64), **EXACT)


def test_floor_by_hand():
    ratios, bounds = torch.tensor([4.0, 2.0, 0.5, 0.25]), {"cap": 2.0, "floor": 0.3}
    assert sampler_weights(ratios, mode="truncated", **bounds).tolist() == pytest.approx([2.0, 2.0, 0.5, 0.3])
    assert sampler_weights(ratios, mode="masked", **bounds).tolist() == [0.0, 2.0, 0.5, 0.0]
    assert sampler_weights(ratios, mode="masked", cap=2.0, floor=0.0).tolist() == [0.0, 2.0, 0.5, 0.25]


def test_is_corrected_by_hand():
    ratios = [4.0, 2.0, 0.5, 0.25]
    assert is_corrected(ratios, mode="truncated", cap=2.0).tolist() == [True, False, False, False]
    assert is_corrected(ratios, mode="masked", cap=2.0).tolist() == [True, False, False, True]
    assert is_corrected(ratios, mode="off", cap=2.0).tolist() == [False] * 4


@pytest.mark.parametrize("logprob", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_non_finite_sampler_logprob_gives_ratio_one(logprob, level):
    sampled = torch.where(MASK, logprob, 0.0)
    assert torch.equal(sampler_ratios(OLD, sampled, MASK, level=level), torch.ones_like(OLD))


def test_ratios_do_not_overflow():
    mask = torch.ones(1, 100, dtype=torch.bool)
    for level in ("token", "sequence", "geometric"):
        for sign in (1.0, -1.0):
            ratios = sampler_ratios(torch.zeros(1, 100), torch.full((1, 100), -sign * 30.0), mask, level=level)
            assert_close(ratios, torch.full((1, 100), math.exp(sign * 20)), rtol=1e-6, atol=0.0)


def with_sampler_ratios(rollout, ratios):
    """The rollout with the log-probabilities of an engine that sampled its tokens at pi_old / ratio."""
    return rollout._replace(sampled_logprobs=rollout.old_logprobs - torch.as_tensor(ratios).log())


@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_corrected_loss_by_hand_for_both_signs_of_advantage(make_rollout, advantage):
    """One row is enough: with the gate open, the loss of two tokens at ratio 1 is -A (c_1 + c_2) / 2."""
    rollout, _ = make_rollout()
    first = rollout._replace(
        completion_mask=torch.zeros_like(rollout.completion_mask),
        advantages=torch.full_like(rollout.advantages, advantage),
        threshold=torch.full_like(rollout.threshold, -math.inf),
        update_size=rollout.update_size._replace(num_tokens=2.0),
    )
    first.completion_mask[0, 1:3] = True
    ratios = torch.ones_like(first.old_logprobs)
    ratios[0, 1:3] = torch.tensor([3.0, 0.25])
    expected = {
        ("token", "truncated"): -advantage * (2.5 + 0.25) / 2,
        ("token", "masked"): 0.0,
        ("sequence", "truncated"): -advantage * (0.75 + 0.75) / 2,
        ("sequence", "masked"): -advantage * (0.75 + 0.75) / 2,
    }
    current = NetworkOutputs(first.old_logprobs.clone().requires_grad_(), first.entropies)
    for (level, mode), loss in expected.items():
        objective = Objective(sampler_correction=SamplerCorrection(mode, level, 2.5))
        ours = objective.egspo_loss(
            current, settled(with_sampler_ratios(first, ratios), ConstantAttenuation(0.0)), SETTLED
        )
        assert ours.item() == pytest.approx(loss, abs=1e-12), (level, mode)


def random_ratios(rollout, seed=0):
    return torch.randn(rollout.old_logprobs.shape, generator=torch.Generator().manual_seed(seed)).double().exp()


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["truncated", "masked"])
def test_corrected_gradient_is_plain_gradient_times_weight(make_rollout, mode, level):
    """The weights carry no gradient, and the correction does not change the normalizer."""
    rollout, current = make_rollout()
    rollout = with_sampler_ratios(rollout, random_ratios(rollout))
    rollout = rollout._replace(
        old_logprobs=rollout.old_logprobs.requires_grad_(), sampled_logprobs=rollout.sampled_logprobs.detach()
    )
    correction = SamplerCorrection(mode, level, 1.5)
    weights = sampler_weights(
        sampler_ratios(rollout.old_logprobs, rollout.sampled_logprobs, rollout.completion_mask, level=level),
        mode=mode,
        cap=1.5,
    )
    assert not weights.requires_grad
    assert ((weights != 1) & rollout.completion_mask).sum() > 10
    plain, ours = (
        torch.autograd.grad(objective.egspo_loss(current, rollout, SETTLED), (current.logprobs, rollout.old_logprobs))
        for objective in (Objective(), Objective(sampler_correction=correction))
    )
    assert_close(ours[0], plain[0] * weights, **EXACT)
    assert_close(ours[1], plain[1] * weights, **EXACT)


def test_kl_sft_and_entropy_terms_are_not_corrected(make_rollout):
    parts = {"objective": Objective(beta=0.1)}
    rollout, current = make_rollout(parts, with_reference=True)
    rollout = with_sampler_ratios(rollout, random_ratios(rollout))
    found = {
        mode: Objective(beta=0.1, sampler_correction=SamplerCorrection(mode)).hybrid_loss(
            current, rollout, SETTLED, torch.tensor(0.7).double(), Coefficients(mu=0.2, entropy=0.3)
        )[1]
        for mode in ("off", "masked")
    }
    for name in ("loss/kl", "loss/sft", "loss/entropy", "policy/approx_kl"):
        assert torch.equal(found["off"][name], found["masked"][name]), name
    assert found["off"]["loss/egspo"] != found["masked"]["loss/egspo"]


def test_expert_rows_are_not_corrected(make_rollout):
    rollout, current = make_rollout(expert_groups=[0, 1])
    expert = rollout.is_expert.unsqueeze(1)
    corrected = Objective(sampler_correction=SamplerCorrection("truncated", cap=50.0))
    ratios = torch.where(expert, 7.0, 1.0)
    assert_close(
        corrected.egspo_loss(current, with_sampler_ratios(rollout, ratios), SETTLED),
        Objective().egspo_loss(current, rollout, SETTLED),
        **EXACT,
    )


def test_mode_off_or_missing_sampler_logprobs_give_the_plain_loss(make_rollout):
    rollout, current = make_rollout()
    plain = Objective().egspo_loss(current, rollout, SETTLED)
    assert torch.equal(
        Objective().egspo_loss(current, with_sampler_ratios(rollout, random_ratios(rollout)), SETTLED),
        plain,
    )
    corrected = Objective(sampler_correction=SamplerCorrection("masked"))
    assert torch.equal(corrected.egspo_loss(current, rollout, SETTLED), plain)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_corrected_losses_of_micro_batches_add_up(make_rollout, level):
    rollout, current = make_rollout()
    rollout = with_sampler_ratios(rollout, random_ratios(rollout))
    objective = Objective(sampler_correction=SamplerCorrection("truncated", level))
    rollout.input_ids[:, 0] = torch.arange(len(rollout.input_ids))  # identifies the rows
    whole = objective.egspo_loss(current, rollout, SETTLED)
    share = RolloutShare(rollout, list(range(8)), row_lengths(rollout.completion_mask).tolist())
    parts = [share.batch(run) for run in balanced_batches(share.lengths, 3)]
    total = torch.zeros(()).double()
    for part in parts:
        rows, width = part.input_ids[:, 0], part.input_ids.shape[1]
        values = NetworkOutputs(current.logprobs[rows, :width], current.entropies[rows, :width])
        total = total + objective.egspo_loss(values, part, SETTLED)
    assert len(parts) == 3
    assert_close(total, whole, **EXACT)


@pytest.mark.parametrize("splits", [1, 2])
def test_sampler_metrics_match_slow_loop_over_all_ranks(make_scored, make_gating, split_scored, on_ranks, splits):
    scored = make_scored(expert_groups=[0, 1])
    ratios = torch.randn(scored.completion_mask.shape, generator=torch.Generator().manual_seed(1)).double().exp()
    sampled_logprobs = scored.scores.logprobs - ratios.log()
    sampled_logprobs[scored.num_sampled :] = math.nan
    scored = scored._replace(sampled_logprobs=sampled_logprobs)
    parts = [scored] if splits == 1 else split_scored(scored, 1)

    def admit(rank, part):
        correction = SamplerCorrection("masked", "token", 1.5)
        return make_gating(objective=Objective(sampler_correction=correction)).apply(part, rank)[1]

    sampled = [
        ratios[row, column].item()
        for row in range(scored.num_sampled)
        for column in range(ratios.shape[1])
        if scored.completion_mask[row, column]
    ]
    for metrics in on_ranks(admit, parts):
        assert metrics["policy/sampler_ratio_mean"].item() == pytest.approx(sum(sampled) / len(sampled), rel=1e-9)
        assert metrics["policy/sampler_ratio_max"].item() == pytest.approx(max(sampled), rel=1e-9)
        dropped = sum(not 1 / 1.5 <= value <= 1.5 for value in sampled)
        assert metrics["policy/sampler_corrected_fraction"].item() == pytest.approx(dropped / len(sampled), rel=1e-9)
        assert 0 < dropped < len(sampled)


def test_no_sampler_metrics_without_sampler_logprobs(make_scored, make_gating, on_ranks):
    (metrics,) = on_ranks(lambda rank, part: make_gating().apply(part, rank)[1], [make_scored()])
    assert not [name for name in metrics if "sampler" in name]
