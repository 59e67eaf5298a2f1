import pytest
import torch

from egspo_lightning.ops.advantages import GroupRelative, LeaveOneOut, group_relative, leave_one_out


def test_group_relative_by_hand():
    # mean 1/4, unbiased std of (1, 0, 0, 0) is 1/2
    expected = [1.5, -0.5, -0.5, -0.5]
    assert group_relative([1.0, 0.0, 0.0, 0.0], 4, eps=0.0).tolist() == pytest.approx(expected, abs=1e-12)
    assert group_relative([1.0, 0.0, 0.0, 0.0], 4, scale_by_std=False).tolist() == pytest.approx(
        [0.75, -0.25, -0.25, -0.25], abs=1e-12
    )


def test_leave_one_out_by_hand():
    assert leave_one_out([1.0, 0.0, 0.5], 3).tolist() == pytest.approx([0.75, -0.75, 0.0], abs=1e-12)


@pytest.mark.parametrize("value", [0.0, 0.1, 1.0, 0.3333333, -7.7])
@pytest.mark.parametrize("estimate", [group_relative, leave_one_out])
def test_a_group_without_spread_gets_exactly_zero(value, estimate):
    rewards = torch.tensor([value] * 6 + [1.0, 0.0, 0.0], dtype=torch.float32)
    advantages = estimate(rewards, 3)
    assert advantages[:6].tolist() == [0.0] * 6
    assert advantages[6] > 0 > advantages[7]


@pytest.mark.parametrize("estimator", [GroupRelative(), GroupRelative(scale_by_std=False), LeaveOneOut()])
def test_estimators_look_at_one_group_at_a_time(estimator):
    torch.manual_seed(0)
    rewards = torch.rand(12)
    whole = estimator.estimate(rewards, 4)
    apart = torch.cat([estimator.estimate(group, 4) for group in rewards.split(4)])
    assert torch.equal(whole, apart)
    assert whole.view(-1, 4).sum(-1).abs().max() < 1e-5


@pytest.mark.parametrize(("rewards", "group_size"), [([1.0, 2.0, 3.0], 2), ([1.0, 2.0], 1), ([[1.0, 2.0]], 2)])
def test_what_is_no_row_of_groups_is_refused(rewards, group_size):
    with pytest.raises(ValueError, match="group_size"):
        group_relative(rewards, group_size)
