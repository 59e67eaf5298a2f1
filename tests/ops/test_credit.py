import math

import pytest
import torch
from torch.testing import assert_close

from egspo_lightning.ops.estimators import (
    GAE,
    GroupRelative,
    ReinforcePlusPlus,
    estimate_credit,
    reward_kl,
    token_rewards,
)
from egspo_lightning.types import NetworkOutputs

MASK = torch.tensor([[False, True, True, False], [True, False, False, False], [False] * 4])


def one_rank(values):
    return values


def test_reward_is_placed_at_the_last_token():
    placed = token_rewards(torch.tensor([2.0, -1.0, 7.0]), MASK)
    assert placed.tolist() == [[0.0, 0.0, 2.0, 0.0], [-1.0, 0.0, 0.0, 0.0], [0.0] * 4]


def test_penalty_is_subtracted_at_each_token():
    placed = token_rewards(torch.tensor([2.0, -1.0, 7.0]), MASK, torch.full((3, 4), 0.25))
    assert placed.tolist() == [[0.0, -0.25, 1.75, 0.0], [-1.25, 0.0, 0.0, 0.0], [0.0] * 4]


@pytest.mark.parametrize(("estimator", "per_token"), [("k1", 0.5), ("abs", 0.5), ("k2", 0.125)])
def test_reward_kl_is_between_sampling_and_reference_policy(make_scored, estimator, per_token):
    scored = make_scored(with_reference=True)
    apart = scored.scores._replace(ref_logprobs=scored.scores.logprobs - 0.5)
    kl = reward_kl(scored._replace(scores=apart), estimator)
    assert_close(kl, per_token * scored.completion_mask.double())
    other_way = scored.scores._replace(ref_logprobs=scored.scores.logprobs + 0.5)
    assert reward_kl(scored._replace(scores=other_way), "k3").max().item() == pytest.approx(math.exp(0.5) - 1.5)


def test_kl_penalty_changes_every_advantage(make_scored):
    scored = make_scored(with_values=True, rewards=[1.0] * 8)
    penalty = 0.01 * torch.arange(8 * 8, dtype=torch.float64).view(8, 8)
    for advantage in (GroupRelative(), ReinforcePlusPlus(), GAE()):
        plain = estimate_credit(scored, advantage, penalty=None, total=one_rank).advantages
        assert not torch.equal(plain, estimate_credit(scored, advantage, penalty=penalty, total=one_rank).advantages)
    # with equal rewards, the completion with the largest penalty has the lowest advantage
    advantages = estimate_credit(scored, GroupRelative(), penalty=penalty, total=one_rank).advantages
    total_penalty = torch.where(scored.completion_mask, penalty, 0.0).sum(-1).view(2, 4)
    assert torch.equal(advantages.amin(-1).view(2, 4).argmin(-1), total_penalty.argmax(-1))


def test_only_gae_has_returns(make_scored):
    scored = make_scored(with_values=True)
    assert estimate_credit(scored, GroupRelative(), penalty=None, total=one_rank).returns is None
    returns = estimate_credit(scored, GAE(1.0, 1.0), penalty=None, total=one_rank).returns
    # with gamma = lambda = 1 the return of each token is the reward of its completion
    assert_close(returns, scored.rewards.unsqueeze(1) * scored.completion_mask)


def test_expert_advantages_are_relative_to_their_group(make_scored):
    scored = make_scored(num_problems=3, expert_groups=(2, 0), rewards=[1.0, 0.0, 0.0, 0.0] * 3 + [1.0, 0.0])
    penalty = torch.zeros(14, 8, dtype=torch.float64)
    penalty[12:] = 9.0  # no penalty applies to rows that the policy did not sample
    estimate = estimate_credit(scored, GroupRelative(scale_by_std=False), penalty=penalty, total=one_rank)
    assert estimate.advantages.shape == (14, 8)
    for row, expected in ((12, 0.75), (13, -0.25)):
        assert_close(estimate.advantages[row], expected * scored.completion_mask[row].double())


def test_credit_ignores_values_outside_completions(make_scored):
    scored = make_scored(with_values=True, with_reference=True)
    dirty = NetworkOutputs(*(torch.where(scored.completion_mask, x, 1e9) for x in scored.scores))
    for advantage in (GroupRelative(), ReinforcePlusPlus(), GAE()):
        clean, other = (
            estimate_credit(x, advantage, penalty=0.1 * reward_kl(x, "k2"), total=one_rank)
            for x in (scored, scored._replace(scores=dirty))
        )
        assert torch.equal(clean.advantages, other.advantages)
