"""Per-token losses and their gradients against hand calculations."""

import math

import pytest
import torch
from torch.testing import assert_close

from egspo_lightning.ops.losses import clipped_tokens, kl_penalty, log_ratio, off_policy, ppo_clip, value_clip


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


def gradient(per_token, leaf):
    (grad,) = torch.autograd.grad(per_token.sum(), leaf)
    return grad.tolist()


# ratio, A, loss, d loss / d log pi with clip_low 0.2 and clip_high 0.28
PPO = [
    (1.0, 2.0, -2.0, -2.0),
    (1.1, 2.0, -2.2, -2.2),
    (1.5, 2.0, -2.56, 0.0),  # above the range with A > 0: clipped
    (0.5, 2.0, -1.0, -1.0),  # below the range with A > 0: not clipped
    (1.0, -2.0, 2.0, 2.0),
    (1.5, -2.0, 3.0, 3.0),
    (0.5, -2.0, 1.6, 0.0),
    (1.5, 0.0, 0.0, 0.0),
]


def test_ppo_clip_by_hand():
    ratios, advantages, losses, gradients = (doubles(column) for column in zip(*PPO, strict=True))
    old = torch.full_like(ratios, -3.0)
    logprobs = (old + ratios.log()).requires_grad_()
    per_token = ppo_clip(logprobs, old, advantages, clip_low=0.2, clip_high=0.28)
    assert_close(per_token.detach(), losses, rtol=1e-12, atol=1e-12)
    assert gradient(per_token, logprobs) == pytest.approx(gradients.tolist(), abs=1e-12)
    below, above = clipped_tokens(logprobs.detach(), old, advantages, clip_low=0.2, clip_high=0.28)
    assert below.tolist() == [False] * 6 + [True, False]
    assert above.tolist() == [False, False, True] + [False] * 5


def test_dual_clip_bounds_the_loss_only_for_negative_advantages():
    logprobs = doubles([math.log(5.0), math.log(5.0), math.log(2.0)]).requires_grad_()
    held = ppo_clip(logprobs, torch.zeros(3), doubles([-2.0, 2.0, -2.0]), clip_low=0.2, clip_high=0.2, dual_clip=3.0)
    assert held.tolist() == pytest.approx([6.0, -2.4, 4.0], abs=1e-12)
    assert gradient(held, logprobs) == pytest.approx([0.0, 0.0, 4.0], abs=1e-12)


def test_log_ratios_are_clamped_against_overflow():
    assert log_ratio([1000.0, -1000.0, 1.0], [0.0, 0.0, 0.5]).tolist() == [20.0, -20.0, 0.5]
    assert ppo_clip([1000.0], [0.0], [-1.0], clip_low=0.2, clip_high=0.2).isfinite().all()


# V, V_old, R, loss, d loss / d V with clip 0.2
VALUE = [
    (1.1, 1.0, 3.0, 0.5 * 1.9**2, -1.9),  # within the clip range: the plain error
    (2.0, 1.0, 3.0, 0.5 * 1.8**2, 0.0),  # moved towards R beyond the clip range: error at 1.2, no gradient
    (2.0, 1.0, 0.0, 0.5 * 2.0**2, 2.0),  # moved away from R: the plain error is larger
    (0.0, 1.0, -1.0, 0.5 * 1.8**2, 0.0),
]


def test_value_clip_by_hand():
    values, old, returns, losses, gradients = (doubles(column) for column in zip(*VALUE, strict=True))
    values.requires_grad_()
    per_token = value_clip(values, old, returns, clip=0.2)
    assert_close(per_token.detach(), losses, rtol=1e-12, atol=1e-12)
    assert gradient(per_token, values) == pytest.approx(gradients.tolist(), abs=1e-12)
    free = value_clip(values, old, returns, clip=None)
    assert_close(free.detach(), 0.5 * (values.detach() - returns) ** 2, rtol=1e-12, atol=1e-12)
    assert gradient(free, values) == pytest.approx((values.detach() - returns).tolist(), abs=1e-12)


def test_off_policy_by_hand():
    # p = 1/4, gamma = 1/4: f = 1/2, f' = gamma / (p + gamma)^2 = 1, d f / d log p = p f' = 1/4; p = 3/4: f = 3/4
    logprobs = doubles([0.25, 0.25, 0.75]).log().requires_grad_()
    per_token = off_policy(logprobs, doubles([2.0, -2.0, 1.0]), shaping=0.25)
    assert per_token.tolist() == pytest.approx([-1.0, 1.0, -0.75], abs=1e-12)
    assert gradient(per_token, logprobs) == pytest.approx([-0.5, 0.5, -0.75 * 0.25], abs=1e-12)


def test_off_policy_shaping_favors_unlikely_tokens():
    logits = doubles([-4.0, 0.0, 4.0]).requires_grad_()  # two-token vocabulary
    p = torch.sigmoid(logits)
    shaped = doubles(gradient(off_policy(p.log(), doubles([1.0] * 3), shaping=0.1), logits)).abs()
    plain = doubles(gradient(-torch.sigmoid(logits), logits)).abs()
    assert (shaped / plain).diff().lt(0).all()


def test_k3_plus_has_the_value_of_k3_and_the_gradient_of_k2():
    logprobs = doubles([-1.0, -2.0, -0.3]).requires_grad_()
    reference = doubles([-1.5, -1.0, -0.3])
    k3_plus = kl_penalty(logprobs, reference, "k3+")
    expected = [math.exp(-0.5) + 0.5 - 1, math.exp(1.0) - 1.0 - 1, 0.0]
    assert k3_plus.tolist() == pytest.approx(expected, abs=1e-12)
    assert gradient(k3_plus, logprobs) == pytest.approx([0.5, -1.0, 0.0], abs=1e-12)


def test_k3_is_bounded_and_an_unknown_estimator_names_the_known_ones():
    assert kl_penalty([-50.0, 0.0], [0.0, -1000.0], "k3").tolist() == [10.0, 10.0]
    with pytest.raises(ValueError, match=r"k1, abs, k2, k3, k3\+"):
        kl_penalty([0.0], [0.0], "k4")


@pytest.mark.parametrize("estimator", ["k1", "abs", "k2", "k3"])
def test_mean_of_kl_estimators_is_the_kl(estimator):
    # pi = (1/2, 1/2), reference (0.55, 0.45): KL = -1/2 log(4 * 0.55 * 0.45), to which k1 and k3 are exact
    p, q = doubles([0.5, 0.5]), doubles([0.55, 0.45])
    mean = (p * kl_penalty(p.log(), q.log(), estimator)).sum().item()
    exact = -0.5 * math.log(4 * 0.55 * 0.45)
    expected = 0.5 * math.log(0.55 / 0.5) + 0.5 * math.log(0.5 / 0.45) if estimator == "abs" else exact
    assert mean == pytest.approx(expected, abs=1e-4 if estimator == "k2" else 1e-12)
