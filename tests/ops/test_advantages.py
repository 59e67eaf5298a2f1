"""Advantage functions against hand calculations and slow loops over tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from egspo_lightning.ops.advantages import against_group, gae, group_relative, leave_one_out, reinforce_plus_plus

EXACT = {"rtol": 1e-10, "atol": 1e-10}


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
def test_group_with_equal_rewards_has_advantage_zero(value, estimate):
    rewards = torch.tensor([value] * 6 + [1.0, 0.0, 0.0], dtype=torch.float32)
    advantages = estimate(rewards, 3)
    assert advantages[:6].tolist() == [0.0] * 6
    assert advantages[6] > 0 > advantages[7]


@pytest.mark.parametrize(("rewards", "group_size"), [([1.0, 2.0, 3.0], 2), ([1.0, 2.0], 1), ([[1.0, 2.0]], 2)])
def test_rewards_that_do_not_form_groups_are_refused(rewards, group_size):
    for estimate in (group_relative, leave_one_out):
        with pytest.raises(ValueError, match="group_size"):
            estimate(rewards, group_size)


def test_against_group_by_hand():
    # (1, 0, 0, 0): mean 1/4, std 1/2; (1, 1, 1, 1) and (0, 0, 0, 0) have no scale; (0, 2, 0, 2): std 2 / sqrt(3)
    groups = [[1.0, 0.0, 0.0, 0.0], [1.0] * 4, [0.0] * 4, [0.0, 2.0, 0.0, 2.0]]
    experts = [1.0, 1.0, 1.0, 0.5]
    plain = against_group(experts, groups, scale_by_std=False)
    assert plain.tolist() == pytest.approx([0.75, 0.0, 1.0, -0.5], abs=1e-12)
    scaled = against_group(experts, groups, eps=0.0)
    assert scaled.tolist() == pytest.approx([1.5, 0.0, 1.0, -(3**0.5) / 4], abs=1e-12)
    assert against_group([1.0], [[1.0, 0.0, 0.0, 0.0]], eps=0.5).tolist() == pytest.approx([0.75], abs=1e-12)


def test_gae_by_hand():
    # one row, gamma 1/2 and lambda 1/2; V = (1, 2, 4), r = (0, 1, 3); the prompt token is masked
    # delta_3 = 3 - 4 = -1; delta_2 = 1 + 2 - 2 = 1; delta_1 = 0 + 1 - 1 = 0
    # A_3 = -1; A_2 = 1 - 1/4 = 3/4; A_1 = 0 + 3/16; returns A + V
    rewards, values, mask = [[9.0, 0.0, 1.0, 3.0]], [[9.0, 1.0, 2.0, 4.0]], [[0, 1, 1, 1]]
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    assert returns[0].tolist() == pytest.approx([0.0, 1.1875, 2.75, 3.0], abs=1e-12)
    mean = (3 / 16 + 3 / 4 - 1) / 3
    std = (sum((a - mean) ** 2 for a in (3 / 16, 3 / 4, -1)) / 2 + 1e-8) ** 0.5
    whitened = [0.0, *((a - mean) / std for a in (3 / 16, 3 / 4, -1))]
    assert advantages[0].tolist() == pytest.approx(whitened, abs=1e-12)


def test_reinforce_plus_plus_by_hand():
    # to go with gamma 1/2: (0 + 1/2 (0 + 1/2 * 4), 2, 4) = (1, 2, 4): mean 7/3, unbiased variance 7/3
    advantages = reinforce_plus_plus([[7.0, 0.0, 0.0, 4.0]], [[0, 1, 1, 1]], gamma=0.5)
    deviation = (7 / 3 + 1e-8) ** 0.5
    expected = [0.0, (1 - 7 / 3) / deviation, (2 - 7 / 3) / deviation, (4 - 7 / 3) / deviation]
    assert advantages[0].tolist() == pytest.approx(expected, abs=1e-12)


def slow_whiten(rows, mask):
    """Whiten the entries of ``rows`` inside the mask; 0 outside."""
    kept = [x for xs, ms in zip(rows, mask, strict=True) for x, m in zip(xs, ms, strict=True) if m]
    mean = sum(kept) / max(len(kept), 1)
    variance = sum((x - mean) ** 2 for x in kept) / max(len(kept) - 1, 1)
    return [
        [(x - mean) / (variance + 1e-8) ** 0.5 if m else 0.0 for x, m in zip(xs, ms, strict=True)]
        for xs, ms in zip(rows, mask, strict=True)
    ]


def slow_gae(rewards, values, mask, gamma, lam):
    """``A_t = sum_k (gamma lam)^k delta_{t+k}`` over the tokens of a row inside the mask."""
    raw, returns = ([[0.0] * len(mask[0]) for _ in mask] for _ in range(2))
    for b, row in enumerate(mask):
        tokens = [t for t, m in enumerate(row) if m]
        deltas = []
        for i, t in enumerate(tokens):
            following = values[b][tokens[i + 1]] if i + 1 < len(tokens) else 0.0
            deltas.append(rewards[b][t] + gamma * following - values[b][t])
        for i, t in enumerate(tokens):
            raw[b][t] = sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[i:]))
            returns[b][t] = raw[b][t] + values[b][t]
    return slow_whiten(raw, mask), returns


def slow_to_go(rewards, mask, gamma):
    raw = [[0.0] * len(mask[0]) for _ in mask]
    for b, row in enumerate(mask):
        tokens = [t for t, m in enumerate(row) if m]
        for i, t in enumerate(tokens):
            raw[b][t] = sum(gamma**k * rewards[b][u] for k, u in enumerate(tokens[i:]))
    return slow_whiten(raw, mask)


shapes = st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(0, 10_000), st.sampled_from(["holes", "prompt"]))
units = st.sampled_from([0.0, 0.5, 0.95, 1.0])


def random_inputs(shape):
    """Random rewards and values, NaN outside the mask. The mask has holes or a prompt; a third of its rows is empty."""
    rows, width, seed, kind = shape
    generator = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(rows, width, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(rows, width, generator=generator) < 0.7
    if kind == "prompt":
        start, end = (torch.randint(0, width + 1, (rows, 1), generator=generator) for _ in range(2))
        mask = (torch.arange(width) >= start) & (torch.arange(width) < end)
    mask &= torch.rand(rows, 1, generator=generator) < 2 / 3
    return [torch.where(mask, x, torch.nan) for x in (rewards, values)], mask


@settings(max_examples=60, deadline=None)
@given(shapes, units, units)
def test_gae_matches_slow_loop(shape, gamma, lam):
    (rewards, values), mask = random_inputs(shape)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    expected = slow_gae(rewards.tolist(), values.tolist(), mask.tolist(), gamma, lam)
    assert_close(returns, torch.tensor(expected[1], dtype=torch.float64), **EXACT)
    assert_close(advantages, torch.tensor(expected[0], dtype=torch.float64), rtol=1e-6, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(shapes, units)
def test_reinforce_plus_plus_matches_slow_loop(shape, gamma):
    (rewards, _), mask = random_inputs(shape)
    expected = torch.tensor(slow_to_go(rewards.tolist(), mask.tolist(), gamma), dtype=torch.float64)
    assert_close(reinforce_plus_plus(rewards, mask, gamma=gamma), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 3), (2, 3)])
def test_advantages_of_an_empty_mask_are_zero(shape):
    nothing, values = torch.zeros(shape, dtype=torch.bool), torch.full(shape, torch.nan)
    advantages, returns = gae(values, values, nothing, gamma=1.0, lam=0.95)
    for result in (advantages, returns, reinforce_plus_plus(values, nothing, gamma=1.0)):
        assert torch.equal(result, torch.zeros(shape))


def test_single_token_has_advantage_zero():
    advantages, returns = gae([[0.0, 3.0]], [[0.0, 1.0]], [[0, 1]], gamma=1.0, lam=1.0)
    assert (advantages.tolist(), returns.tolist()) == ([[0.0, 0.0]], [[0.0, 3.0]])
    assert reinforce_plus_plus([[0.0, 3.0]], [[0, 1]], gamma=1.0).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("value", [0.1, 0.7, 1.1, -7.7])
def test_reinforce_plus_plus_of_equal_rewards_is_exactly_zero(value):
    # a rounding error in the mean, divided by sqrt(1e-8), would be noise of 1e-3
    rewards = torch.zeros(997, 3)
    rewards[:, -1] = value
    advantages = reinforce_plus_plus(rewards, torch.ones_like(rewards), gamma=1.0)
    assert torch.equal(advantages, torch.zeros_like(rewards))


def test_integer_rewards_are_accepted():
    halved = [[0.25, 0.5, 1.0]]
    assert gae([[0, 0, 1]], [[0, 0, 0]], [[1, 1, 1]], gamma=0.5, lam=1.0)[1].tolist() == halved
    to_go = reinforce_plus_plus([[0, 0, 1]], [[1, 1, 1]], gamma=0.5)
    assert_close(to_go, reinforce_plus_plus(halved, [[1, 1, 1]], gamma=0.0), **EXACT)
    assert against_group([1], [[0, 1]], scale_by_std=False).tolist() == [0.5]
