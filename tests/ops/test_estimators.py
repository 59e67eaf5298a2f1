"""Advantage estimators: the function that each one calls, and the inputs that it may read."""

import pytest
import torch
from torch.testing import assert_close

from egspo_lightning.ops.advantages import gae, group_relative, leave_one_out, reinforce_plus_plus
from egspo_lightning.ops.entropy_advantages import grpo_s, gtpo, token_group_relative
from egspo_lightning.ops.entropy_estimators import GRPOS, GTPO, TokenGroupRelative
from egspo_lightning.ops.estimators import (
    GAE,
    Experience,
    GroupRelative,
    LeaveOneOut,
    ReinforcePlusPlus,
    estimate_credit,
)
from egspo_lightning.ops.expert_methods import HPT

ALL = [
    GroupRelative(),
    GroupRelative(scale_by_std=False),
    LeaveOneOut(),
    ReinforcePlusPlus(),
    ReinforcePlusPlus(0.9),
    GAE(),
    GAE(0.9, 0.5),
    TokenGroupRelative(),
    HPT(),
    GTPO(),
    GRPOS(),
]
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def make(rows=12, group_size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn():
        return torch.randn(rows, 5, generator=generator, dtype=torch.float64)

    mask = (torch.arange(5) >= 1) & (torch.arange(5) < torch.randint(2, 6, (rows, 1), generator=generator))
    return Experience(randn() * mask, mask, randn() * mask, group_size, lambda values: values, randn().abs() * mask)


@pytest.mark.parametrize("scale_by_std", [True, False])
def test_group_estimators_sum_rewards_per_row_and_spread_the_advantage_over_tokens(scale_by_std):
    experience = make()
    rewards = [
        sum(r for r, m in zip(*row, strict=True) if m)
        for row in zip(*(x.tolist() for x in experience[:2]), strict=True)
    ]
    assert experience.rewards.tolist() == pytest.approx(rewards, abs=1e-12)
    for estimator, per_row in (
        (GroupRelative(scale_by_std), group_relative(rewards, 4, scale_by_std=scale_by_std)),
        (LeaveOneOut(), leave_one_out(rewards, 4)),
    ):
        estimate = estimator.estimate(experience)
        assert_close(estimate.advantages, per_row.unsqueeze(1) * experience.mask, **EXACT)
        assert estimate.returns is None
        assert (estimator.min_generations, estimator.needs_values) == (2, False)


def test_entropy_estimators_pass_on_their_settings():
    experience = make()
    rewards, entropies, mask = experience.rewards, experience.entropies, experience.mask
    for estimator, expected in (
        (GTPO(0.5, 0.3), gtpo(rewards, entropies, mask, 4, alpha1=0.5, alpha2=0.3)),
        (GRPOS(0.5, 0.3), grpo_s(rewards, entropies, mask, 4, beta1=0.5, beta2=0.3).unsqueeze(1) * mask),
        (TokenGroupRelative(False), token_group_relative(rewards, mask, 4, scale_by_std=False).unsqueeze(1) * mask),
    ):
        assert_close(estimator.estimate(experience).advantages, expected, **EXACT)
        assert (estimator.min_generations, estimator.needs_values) == (2, False)


def test_credit_shows_estimators_the_entropies_of_sampled_rows(make_scored):
    scored = make_scored(rewards=[1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    estimate = estimate_credit(scored, GTPO(), penalty=None, total=lambda values: values)
    expected = gtpo(scored.rewards, scored.scores.entropies, scored.completion_mask, 4)
    assert_close(estimate.advantages, expected, **EXACT)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.0, 1.0)])
def test_gae_and_reinforce_plus_plus_pass_on_gamma_and_lam(gamma, lam):
    rewards, mask, values, *_ = experience = make()
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    estimate = GAE(gamma, lam).estimate(experience)
    assert_close(estimate.advantages, advantages, **EXACT)
    assert_close(estimate.returns, returns, **EXACT)
    to_go = ReinforcePlusPlus(gamma).estimate(experience)
    assert_close(to_go.advantages, reinforce_plus_plus(rewards, mask, gamma=gamma), **EXACT)
    assert to_go.returns is None
    assert GAE().needs_values
    assert not ReinforcePlusPlus().needs_values
    assert GAE().min_generations == ReinforcePlusPlus().min_generations == 1


@pytest.mark.parametrize("estimator", [*ALL[:3], *ALL[-4:]])
def test_group_estimators_use_one_group_at_a_time(estimator):
    whole = make()
    apart = [
        estimator.estimate(whole._replace(token_rewards=r, mask=m, entropies=h)).advantages
        for r, m, h in zip(*(x.split(4) for x in (whole.token_rewards, whole.mask, whole.entropies)), strict=True)
    ]
    assert_close(estimator.estimate(whole).advantages, torch.cat(apart), **EXACT)


@pytest.mark.parametrize("estimator", ALL)
def test_estimators_ignore_values_outside_the_mask(estimator):
    clean = make()
    names = ("token_rewards", "values", "entropies")
    dirty = clean._replace(**{name: torch.where(clean.mask, getattr(clean, name), torch.nan) for name in names})
    for ours, expected in zip(estimator.estimate(dirty), estimator.estimate(clean), strict=True):
        assert (ours is None and expected is None) or torch.equal(ours, expected)
    assert torch.equal(
        estimator.estimate(clean).advantages[~clean.mask], torch.zeros(int((~clean.mask).sum())).double()
    )


@pytest.mark.parametrize("estimator", ALL)
@pytest.mark.parametrize("rows", [0, 4])
@pytest.mark.filterwarnings("ignore:std")
def test_empty_mask_gives_zeros(estimator, rows):
    nothing = torch.zeros(rows, 5)
    estimate = estimator.estimate(Experience(nothing, nothing.bool(), nothing, 4, lambda values: values, nothing))
    assert torch.equal(estimate.advantages, nothing)


def test_expert_advantage_is_relative_to_sampled_completions():
    rewards, groups = torch.tensor([1.0, 1.0]), torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    scaled = GroupRelative().estimate_expert(rewards, groups)
    assert scaled.tolist() == pytest.approx([1.5, 1.0], abs=1e-5)
    for estimator in (GroupRelative(scale_by_std=False), LeaveOneOut()):
        assert estimator.estimate_expert(rewards, groups).tolist() == pytest.approx([0.75, 1.0], abs=1e-7)
    assert not any(hasattr(estimator, "estimate_expert") for estimator in (GAE(), ReinforcePlusPlus()))
