"""Logged diagnostics against hand calculations."""

import math

import pytest
import torch
from settled_weights import without_gate

from egspo_lightning.ops.diagnostics import policy_metrics, rollout_batch_metrics, rollout_batch_sums, value_metrics
from egspo_lightning.types import RolloutBatch, UpdateSize


def make(**fields):
    """One row with a prompt token and three sampled tokens, and one expert row, which most metrics exclude."""
    doubles = {"dtype": torch.float64}
    return RolloutBatch(
        input_ids=torch.zeros(2, 4, dtype=torch.long),
        completion_mask=torch.tensor([[False, True, True, True], [True, True, False, False]]),
        old_logprobs=torch.full((2, 4), -3.0, **doubles),
        entropies=torch.tensor([[9.0, 2.0, 0.25, 0.75], [9.0, 9.0, 9.0, 9.0]], **doubles),
        ref_logprobs=None,
        old_values=None,
        advantages=torch.tensor([[9.0, 2.0, -1.0, 2.0], [1.0, 1.0, 0.0, 0.0]], **doubles),
        returns=None,
        rewards=torch.zeros(2),
        is_expert=torch.tensor([False, True]),
        is_masked=torch.tensor([False, False]),
        **without_gate(torch.ones(2, 4, **doubles))
        | {
            "threshold": torch.ones(2, 1, **doubles),
            "is_high": torch.tensor([[True, True, False, False], [True] * 4]),
        },
        policy_version=0,
        update_size=UpdateSize(7.0, 3.0, 4.0, 6.0, 4.0),
    )._replace(**fields)


def test_policy_metrics_are_divided_by_sampled_tokens_of_the_step():
    rollout = make()
    ratios = torch.tensor([[9.0, 1.5, 0.5, 1.1], [9.0, 9.0, 9.0, 9.0]], dtype=torch.float64)
    metrics = policy_metrics(rollout.old_logprobs + ratios.log(), rollout, 0.2, 0.28)
    # divided by the four sampled tokens of the optimizer step, three of which are in this micro-batch
    assert metrics["policy/approx_kl"].item() == pytest.approx(-math.log(1.5 * 0.5 * 1.1) / 4, abs=1e-12)
    assert metrics["policy/clip_fraction_low"].item() == 0.25
    assert metrics["policy/clip_fraction_high"].item() == 0.25


def test_moved_fraction_counts_all_completion_tokens():
    old = torch.zeros(2, 4, dtype=torch.float64)
    values = torch.tensor([[9.0, 0.3, -0.3, 0.1], [0.2, 0.25, 9.0, 9.0]], dtype=torch.float64)
    rollout = make(old_values=old)
    assert value_metrics(values, rollout, 0.2)["value/moved_fraction"].item() == pytest.approx(3 / 6)
    assert value_metrics(values, rollout, None) == {}


def test_rollout_batch_metrics_by_hand():
    weights = torch.tensor([[9.0, 1.0, 0.25, 0.5], [9.0, 9.0, 9.0, 9.0]])
    metrics = {k: v.item() for k, v in rollout_batch_metrics(rollout_batch_sums(make(), weights)).items()}
    assert metrics == pytest.approx(
        {
            "gate/high_fraction": 1 / 3,
            "gate/tied_fraction": 0.0,
            "gate/high_weight_fraction": 1 / 1.75,
            "gate/weight_mean": 1.75 / 3,
            "gate/weight_sum": 1.75,
            "gate/threshold": 1.0,
            "policy/entropy": 1.0,
            "policy/entropy_high": 2.0,
            "policy/entropy_low": 0.5,
        },
        abs=1e-6,
    )


def test_tied_fraction_counts_tokens_at_the_threshold_that_are_left_out():
    entropies = torch.tensor([[9.0, 1.0, 1.0, 0.75], [9.0, 9.0, 9.0, 9.0]], dtype=torch.float64)
    rollout, weights = make(entropies=entropies), torch.ones(2, 4)  # one of two tokens at tau = 1 is high
    assert rollout_batch_metrics(rollout_batch_sums(rollout, weights))["gate/tied_fraction"].item() == pytest.approx(
        1 / 3
    )
    by_another_rule = rollout_batch_sums(rollout, weights, is_by_entropy=False)
    assert rollout_batch_metrics(by_another_rule)["gate/tied_fraction"].item() == 0.0


def test_weights_of_zero_have_no_share():
    metrics = rollout_batch_metrics(rollout_batch_sums(make(), torch.zeros(2, 4)))
    assert "gate/high_weight_fraction" not in metrics


def test_threshold_metric_averages_rows_with_finite_threshold():
    rollout = make(is_expert=torch.tensor([False, False]), threshold=torch.tensor([[1.0], [3.0]]))
    weights = torch.ones(2, 4)
    assert rollout_batch_metrics(rollout_batch_sums(rollout, weights))["gate/threshold"].item() == 2.0
    one_row = rollout._replace(completion_mask=torch.tensor([[True] * 4, [False] * 4]))
    assert rollout_batch_metrics(rollout_batch_sums(one_row, weights))["gate/threshold"].item() == 1.0
    for infinite in (math.inf, -math.inf):
        at_infinity = rollout._replace(threshold=torch.full((2, 1), infinite))
        assert "gate/threshold" not in rollout_batch_metrics(rollout_batch_sums(at_infinity, weights))


def test_explained_variance_by_hand():
    # returns 1, 2, 6 (variance 14/3) and values 0, 2, 4: errors 1, 0, 2 (variance 2/3)
    returns = torch.tensor([[9.0, 1.0, 2.0, 6.0], [9.0] * 4], dtype=torch.float64)
    values = torch.tensor([[0.0, 0.0, 2.0, 4.0], [0.0] * 4], dtype=torch.float64)
    metrics = rollout_batch_metrics(rollout_batch_sums(make(returns=returns, old_values=values), torch.ones(2, 4)))
    assert metrics["value/mean"].item() == pytest.approx(2.0)
    assert metrics["value/return_mean"].item() == pytest.approx(3.0)
    assert metrics["value/explained_variance"].item() == pytest.approx(1 - (2 / 3) / (14 / 3), abs=1e-5)


def test_metrics_carry_no_gradient():
    logprobs = torch.full((2, 4), -2.0, dtype=torch.float64, requires_grad=True)
    rollout = make(old_values=torch.zeros(2, 4))
    metrics = policy_metrics(logprobs, rollout, 0.2, 0.2) | value_metrics(logprobs, rollout, 0.2)
    metrics |= rollout_batch_sums(rollout._replace(entropies=logprobs), logprobs)
    assert not any(value.requires_grad for value in metrics.values())
