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
from egspo_lightning.types import Scores

MASK = torch.tensor([[False, True, True, False], [True, False, False, False], [False] * 4])


def alone(values):
    return values


def test_the_reward_stands_at_the_last_token():
    placed = token_rewards(torch.tensor([2.0, -1.0, 7.0]), MASK)
    assert placed.tolist() == [[0.0, 0.0, 2.0, 0.0], [-1.0, 0.0, 0.0, 0.0], [0.0] * 4]


def test_the_penalty_is_taken_off_at_each_token():
    placed = token_rewards(torch.tensor([2.0, -1.0, 7.0]), MASK, torch.full((3, 4), 0.25))
    assert placed.tolist() == [[0.0, -0.25, 1.75, 0.0], [-1.25, 0.0, 0.0, 0.0], [0.0] * 4]


@pytest.mark.parametrize(("estimator", "per_token"), [("k1", 0.5), ("abs", 0.5), ("k2", 0.125)])
def test_the_kl_is_that_of_the_policy_that_sampled(make_scored, estimator, per_token):
    scored = make_scored(with_reference=True)
    apart = scored.scores._replace(ref_logprobs=scored.scores.logprobs - 0.5)
    kl = reward_kl(scored._replace(scores=apart), estimator)
    assert_close(kl, per_token * scored.completion_mask.double())
    other_way = scored.scores._replace(ref_logprobs=scored.scores.logprobs + 0.5)
    assert reward_kl(scored._replace(scores=other_way), "k3").max().item() == pytest.approx(math.exp(0.5) - 1.5)


def test_the_penalty_enters_every_advantage(make_scored):
    scored = make_scored(with_values=True, rewards=[1.0] * 8)
    penalty = 0.01 * torch.arange(8 * 8, dtype=torch.float64).view(8, 8)
    for advantage in (GroupRelative(), ReinforcePlusPlus(), GAE()):
        plain = estimate_credit(scored, advantage, penalty=None, total=alone).advantages
        assert not torch.equal(plain, estimate_credit(scored, advantage, penalty=penalty, total=alone).advantages)
    # of equal rewards, the completion that strayed furthest is the worst
    advantages = estimate_credit(scored, GroupRelative(), penalty=penalty, total=alone).advantages
    strayed = torch.where(scored.completion_mask, penalty, 0.0).sum(-1).view(2, 4)
    assert torch.equal(advantages.amin(-1).view(2, 4).argmin(-1), strayed.argmax(-1))


def test_only_a_critic_has_returns(make_scored):
    scored = make_scored(with_values=True)
    assert estimate_credit(scored, GroupRelative(), penalty=None, total=alone).returns is None
    returns = estimate_credit(scored, GAE(1.0, 1.0), penalty=None, total=alone).returns
    # with gamma = lambda = 1 the return of each token is the reward of its completion
    assert_close(returns, scored.rewards.unsqueeze(1) * scored.completion_mask)


def test_experts_come_behind_with_the_advantage_over_their_group(make_scored):
    scored = make_scored(num_problems=3, expert_groups=(2, 0), rewards=[1.0, 0.0, 0.0, 0.0] * 3 + [1.0, 0.0])
    penalty = torch.zeros(14, 8, dtype=torch.float64)
    penalty[12:] = 9.0  # nothing is taken off what the policy did not sample
    estimate = estimate_credit(scored, GroupRelative(scale_by_std=False), penalty=penalty, total=alone)
    assert estimate.advantages.shape == (14, 8)
    for row, expected in ((12, 0.75), (13, -0.25)):
        assert_close(estimate.advantages[row], expected * scored.completion_mask[row].double())


def test_what_lies_outside_the_completions_is_not_looked_at(make_scored):
    scored = make_scored(with_values=True, with_reference=True)
    dirty = Scores(*(torch.where(scored.completion_mask, x, 1e9) for x in scored.scores))
    for advantage in (GroupRelative(), ReinforcePlusPlus(), GAE()):
        clean, other = (
            estimate_credit(x, advantage, penalty=0.1 * reward_kl(x, "k2"), total=alone)
            for x in (scored, scored._replace(scores=dirty))
        )
        assert torch.equal(clean.advantages, other.advantages)
