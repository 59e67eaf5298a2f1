"""Surrogates and token weights of other methods: selection over all ranks, draws, and HAPO by hand.

``test_rivals`` checks the formulas against reference implementations.
"""

import math
from collections import Counter

import pytest
import torch
from torch.testing import assert_close

from egspo_lightning.errors import UserError
from egspo_lightning.ops.entropy_advantages import gtpo_rewards
from egspo_lightning.ops.hapo import HAPO, relative_entropies
from egspo_lightning.ops.surrogates import CEGPPO, CISPO, GSPO, SAPO, KLCov
from egspo_lightning.ops.token_view import Statistics, TokenView
from egspo_lightning.ops.token_weight_methods import STEER, AdvantageReweighting, ClipCov

EXACT = {"rtol": 1e-12, "atol": 1e-13}
SURROGATES = [CISPO(), GSPO(), GSPO(level="token"), SAPO(), CEGPPO(), KLCov(0.2), HAPO()]
WEIGHTS = [
    STEER(),
    STEER("linear"),
    AdvantageReweighting(negative_weight=0.5),
    ClipCov(0.2, -1.0, 50.0),
    ClipCov(1.0, -1.0, 50.0),
]
METHODS = pytest.mark.parametrize("method", SURROGATES + WEIGHTS, ids=str)


def tokens_of(rows=8, width=9, seed=0, group_size=4):
    """Random tokens in float64; rows have 1 to ``width`` of them."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    old = -randn(rows, width).abs() - 0.05
    lengths = torch.randint(1, width + 1, (rows, 1), generator=generator)
    return TokenView(
        logprobs=old + 0.4 * randn(rows, width),
        old_logprobs=old,
        entropies=randn(rows, width).abs(),
        current_entropies=randn(rows, width).abs(),
        advantages=randn(rows, 1).expand(rows, width),
        mask=torch.arange(width) < lengths,
        rewards=randn(rows),
        is_truncated=torch.zeros(rows, dtype=torch.bool),
        groups=torch.arange(rows) // group_size,
        members=torch.arange(rows) % group_size,
        number=0,
        ref_logprobs=None,
        threshold=torch.zeros(rows, 1, dtype=torch.float64),
        over_ranks=Statistics(),
    )


def split(tokens, *parts):
    """The rows of each part, as the view of one rank."""
    return [tokens._make(value[rows] if torch.is_tensor(value) else value for value in tokens) for rows in parts]


def result(method, tokens):
    """What a method gives each token, 0 outside the mask."""
    values = method.per_token(tokens) if hasattr(method, "per_token") else method.weights(tokens)
    return torch.where(tokens.mask, values, 0.0)


@METHODS
def test_same_on_two_ranks(method, on_ranks):
    tokens = tokens_of()
    parts = [[0, 1, 2, 3, 4, 5], [6, 7]]

    def work(rank, part):
        return result(method, part._replace(over_ranks=Statistics(rank.sum_over_ranks, rank.gather_over_ranks)))

    assert_close(torch.cat(on_ranks(work, split(tokens, *parts))), result(method, tokens), **EXACT)


@METHODS
def test_ignores_tokens_outside_the_mask(method):
    tokens = tokens_of()
    changed = {
        name: torch.where(tokens.mask, getattr(tokens, name), value)
        for name, value in {"logprobs": -3.0, "old_logprobs": -0.1, "entropies": 9.0, "current_entropies": 9.0}.items()
    }
    assert_close(result(method, tokens._replace(**changed)), result(method, tokens), **EXACT)


@METHODS
@pytest.mark.parametrize("empty", [False, True], ids=["some", "no tokens"])
def test_gradient_is_finite_with_zeros_outside_the_mask(method, empty):
    """Rollout batches have log-probability and entropy 0 there. One token has a flat batch's statistics."""
    tokens, mask = tokens_of(), torch.zeros(8, 9, dtype=torch.bool)
    mask[0, 0] = not empty
    zeroed = {name: getattr(tokens, name) * mask for name in ("old_logprobs", "entropies", "current_entropies")}
    logprobs = (tokens.logprobs * mask).requires_grad_()
    tokens = tokens._replace(mask=mask, logprobs=logprobs, **zeroed)
    if hasattr(method, "per_token"):
        torch.where(mask, method.per_token(tokens), 0.0).sum().backward()
        assert logprobs.grad.isfinite().all()
    else:
        weights = method.weights(tokens)
        assert not weights.requires_grad
        assert (weights[mask] >= 0).all()
        assert weights.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_min": 1.5}, "STEER.weight_min = 1.5 must be below 1, the weight of no change"),
        ({"mapping": "linear", "weight_min": 1.3}, "STEER.weight_min = 1.3 must be below STEER.weight_max = 1.2"),
    ],
)
def test_steer_weights_in_the_wrong_order_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        STEER(**settings)


@pytest.mark.parametrize("name", ["seed", "number"])
def test_clip_cov_draws_evenly_by_seed_and_rollout_batch(name):
    """400 draws of 4 out of about 36 candidates: each is drawn about equally often (5 standard deviations)."""
    tokens = tokens_of()
    candidates = ClipCov(0.1, -5.0, 50.0).candidates(tokens)
    num = int(0.1 * tokens.mask.sum())
    counts = Counter()
    for number in range(400):
        seed, version = (number, 0) if name == "seed" else (0, number)
        method = ClipCov(0.1, -5.0, 50.0, seed=seed)
        dropped = method.weights(tokens._replace(number=version)) == 0
        assert dropped.sum() == num
        assert not (dropped & ~candidates).any()
        counts.update(map(tuple, dropped.nonzero().tolist()))
    share = num / candidates.sum().item()
    spread = 5 * math.sqrt(400 * share * (1 - share))
    assert len(counts) == candidates.sum()
    assert all(abs(count - 400 * share) < spread for count in counts.values())


def test_hapo_by_hand():
    """Log-entropies 0 to -4 and the quantile 0.75, -1: h is 1, 0, -1/3, -2/3, -1."""
    logs = torch.tensor([[0.0, -1.0, -2.0, -3.0, -4.0]], dtype=torch.float64)
    mask = torch.ones_like(logs, dtype=torch.bool)
    h = relative_entropies(logs.exp(), mask, pivot=0.75, over_ranks=Statistics())
    assert_close(h, torch.tensor([[1.0, 0.0, -1 / 3, -2 / 3, -1.0]], dtype=torch.float64), **EXACT)
    ratios = torch.tensor([[1.3, 1.0, 1.0, 0.7, 0.7]], dtype=torch.float64)
    tokens = tokens_of(1, 5)._replace(
        logprobs=ratios.log().requires_grad_(),
        old_logprobs=torch.zeros_like(ratios),
        current_entropies=logs.exp(),
        advantages=torch.tensor([[1.0, 1.0, 1.0, 1.0, -1.0]], dtype=torch.float64),
        mask=mask,
    )
    loss = HAPO(pivot=0.75, clip_alpha=1.0, advantage_beta=0.5, epsilon_low=0.2, epsilon_high=0.2).per_token(tokens)
    # 1.3 is beyond half of the width 0.4, so A is 1.5, and below the clip at 1.4. The second is near with h = 0, the
    # third near with A = 1 - 0.5 / 3. The fourth is not near: 1 - 0.7 > 0.2 * (1 + 2/3) / 2. Nor is the last, and it
    # is above the clip at 1 - 0.4.
    assert_close(loss, torch.tensor([[-1.95, -1.0, -5 / 6, -0.7, 0.7]], dtype=torch.float64), **EXACT)
    (grad,) = torch.autograd.grad(loss.sum(), tokens.logprobs)
    assert_close(grad, torch.tensor([[-1.95, -1.0, -5 / 6, -0.7, 0.7]], dtype=torch.float64), **EXACT)


def test_steer_leaves_small_changes_alone():
    """Weight 0.8 ** (0.005 / 0.02) at a change of 0.005, although it is the largest: A p (1 - p) (ln p + H) / p."""
    tokens = tokens_of(1, 1)._replace(
        logprobs=torch.tensor([[0.5]], dtype=torch.float64).log(),
        old_logprobs=torch.tensor([[0.5]], dtype=torch.float64).log(),
        entropies=torch.tensor([[math.log(2) + 0.1]], dtype=torch.float64),
        advantages=torch.tensor([[-0.1]], dtype=torch.float64),
    )
    assert_close(STEER().weights(tokens), torch.tensor([[0.8**0.25]], dtype=torch.float64), **EXACT)
    assert_close(STEER("linear", 0.8, 1.2).weights(tokens), torch.tensor([[1.0]], dtype=torch.float64), **EXACT)


def test_gtpo_reward_by_hand():
    """A group of two right answers of reward 2 and one wrong one, with the second position in the first two alone."""
    mask = torch.tensor([[True, True], [True, True], [True, False]])
    entropies = torch.tensor([[0.1, 0.0], [0.3, 0.0], [0.0, 5.0]], dtype=torch.float64)
    ours = gtpo_rewards([2.0, 2.0, 0.0], entropies, mask, 3, alpha1=0.9, alpha2=0.1)
    assert_close(ours[0, 0].item(), 0.9 * 2 + 0.1 * 2 * 0.25)
    assert_close(ours[1, 0].item(), 0.9 * 2 + 0.1 * 2 * 0.75)
    assert_close(ours[:2, 1].tolist(), [1.8, 1.8])  # entropies of 0 have no shares
    assert_close(ours[2, 0].item(), -1.0)  # the only wrong answer
