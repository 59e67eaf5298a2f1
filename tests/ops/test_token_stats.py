import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from egspo_lightning.ops.token_stats import token_stats, token_stats_from_logits


def make(dtype, bias=True):
    torch.manual_seed(0)
    hidden = torch.randn(3, 7, 5, dtype=dtype, requires_grad=True)
    return hidden, nn.Linear(5, 11, bias=bias).to(dtype), torch.randint(11, (3, 7))


def test_token_stats_by_hand():
    # p = (1/4, 3/4): log p = log 1/4; H = 1/4 log 4 + 3/4 log 4/3
    stats = token_stats_from_logits(torch.tensor([[0.0, math.log(3)]], dtype=torch.float64), torch.tensor([0]))
    assert stats.logprobs.item() == pytest.approx(-math.log(4), abs=1e-12)
    assert stats.entropies.item() == pytest.approx(math.log(4) / 4 + 0.75 * math.log(4 / 3), abs=1e-12)


def test_temperature_divides_the_logits():
    hot = token_stats_from_logits(torch.tensor([[0.0, 2.0]]), torch.tensor([1]), temperature=2.0)
    assert hot.logprobs.item() == pytest.approx(-math.log1p(math.exp(-1)), abs=1e-6)


@pytest.mark.parametrize(("chunk_size", "vocab_chunk_size"), [(1, None), (4, 3), (100, 1), (None, 4), (None, None)])
@pytest.mark.parametrize("bias", [True, False])
def test_chunked_values_and_gradients_equal_unchunked(chunk_size, vocab_chunk_size, bias):
    hidden, head, ids = make(torch.float64, bias)
    ours = token_stats(hidden, head, ids, temperature=0.7, chunk_size=chunk_size, vocab_chunk_size=vocab_chunk_size)
    naive = token_stats_from_logits(head(hidden), ids, temperature=0.7)
    assert_close(ours, naive, rtol=1e-12, atol=1e-12)
    leaves = [hidden, *head.parameters()]
    pull = torch.randn(2, 3, 7, dtype=torch.float64)
    ours_grad, naive_grad = (
        torch.autograd.grad((pull[0] * s.logprobs).sum() + (pull[1] * s.entropies).sum(), leaves) for s in (ours, naive)
    )
    assert_close(ours_grad, naive_grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("part", ["logprobs", "entropies"])
def test_gradient_of_a_single_output_matches_autograd(part):
    hidden, head, ids = make(torch.float64)
    leaves = [hidden, *head.parameters()]
    ours = torch.autograd.grad(getattr(token_stats(hidden, head, ids, chunk_size=3), part).sum(), leaves)
    naive = torch.autograd.grad(getattr(token_stats_from_logits(head(hidden), ids), part).sum(), leaves)
    assert_close(ours, naive, rtol=1e-10, atol=1e-12)


def test_token_stats_pass_gradcheck():
    hidden, head, ids = make(torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: token_stats(h, w, ids, chunk_size=4), (hidden, head.weight))


def test_low_precision_is_computed_in_float32():
    hidden, head, ids = make(torch.bfloat16)
    stats = token_stats(hidden, head, ids)
    assert stats.logprobs.dtype == torch.float32
    naive = token_stats_from_logits(head(hidden).float(), ids)
    assert_close(stats, naive, rtol=1e-6, atol=1e-6)


def test_autocast_gives_gradients_in_the_dtype_of_the_weights():
    hidden, head, ids = make(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stats = token_stats(hidden, head, ids)
        naive = token_stats_from_logits(head(hidden), ids)
    assert_close(stats, naive, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(stats.logprobs.sum(), head.weight)
    assert gradient.dtype == torch.float32


@pytest.mark.parametrize("sizes", [{}, {"chunk_size": 3, "vocab_chunk_size": 5}], ids=["one tile", "tiles"])
def test_autocast_gradients_match_float32_within_bfloat16_precision(sizes):
    hidden, head, ids = make(torch.float32)
    weights = torch.linspace(-1, 1, ids.numel()).view(ids.shape)

    def gradients(statistics):
        loss = (statistics.logprobs * weights).sum() + (statistics.entropies * weights.flip(0)).sum()
        return torch.autograd.grad(loss, (hidden, head.weight))

    expected = gradients(token_stats_from_logits(head(hidden), ids))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(token_stats(hidden, head, ids, **sizes))
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= 0.02 * theirs.norm()


def test_float64_is_unchanged_under_autocast():
    hidden, head, ids = make(torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stats = token_stats(hidden, head, ids)
    assert_close(stats, token_stats(hidden, head, ids), rtol=0, atol=0)


def test_zero_tokens_give_zero_gradients():
    hidden, head, _ = make(torch.float32)
    stats = token_stats(hidden[0, :0], head, torch.zeros(0, dtype=torch.long))
    stats.logprobs.sum().backward()
    assert torch.equal(head.weight.grad, torch.zeros_like(head.weight))


def test_sharp_distribution_has_finite_values_and_gradients():
    logits = torch.tensor([[200.0, -200.0, 0.0]], requires_grad=True)
    stats = token_stats_from_logits(logits, torch.tensor([1]))
    assert stats.logprobs.item() == pytest.approx(-400.0)
    assert stats.entropies.item() == pytest.approx(0.0, abs=1e-6)
    (stats.logprobs + stats.entropies).sum().backward()
    assert logits.grad.isfinite().all()


def test_tokens_with_zero_upstream_gradient_are_skipped_in_backward():
    hidden, head, ids = make(torch.float64)
    pull = torch.randn(3, 7, dtype=torch.float64)
    pull[0], pull[2, 3:] = 0.0, 0.0
    leaves = [hidden, *head.parameters()]
    ours, naive = token_stats(hidden, head, ids, chunk_size=4), token_stats_from_logits(head(hidden), ids)
    of_ours, of_naive = (torch.autograd.grad((pull * stats.logprobs).sum(), leaves) for stats in (ours, naive))
    assert_close(of_ours, of_naive, rtol=1e-10, atol=1e-12)
    assert of_naive[0][1].abs().min() > 0
    assert not of_ours[0][0].any()


def test_chunked_entropies_of_large_logits_stay_accurate():
    """A running sum of probability times logit would be off by 1e-4 at logits of 1000."""
    torch.manual_seed(0)
    hidden, weight = torch.full((6, 1), 1.0), 1000 + torch.randn(50, 1)
    ids = torch.randint(50, (6,))
    exact = token_stats_from_logits((hidden @ weight.T).double(), ids)
    ours = token_stats(hidden, weight, ids, vocab_chunk_size=7)
    assert_close(ours.entropies.double(), exact.entropies, rtol=0, atol=2e-6)
    assert_close(ours.logprobs.double(), exact.logprobs, rtol=0, atol=2e-6)


def test_float32_chunked_gradients_match_unchunked():
    torch.manual_seed(0)
    hidden = torch.randn(40, 64, requires_grad=True)
    head, ids, pull = nn.Linear(64, 3000, bias=False), torch.randint(3000, (40,)), torch.randn(2, 40)
    ours, naive = (
        torch.autograd.grad((pull[0] * s.logprobs + pull[1] * s.entropies).sum(), [hidden, head.weight])
        for s in (
            token_stats(hidden, head, ids, chunk_size=16, vocab_chunk_size=700),
            token_stats_from_logits(head(hidden), ids),
        )
    )
    for mine, theirs in zip(ours, naive, strict=True):
        assert ((mine - theirs).abs().max() / theirs.abs().max()).item() < 1e-5


def test_frozen_head_gets_no_gradient_and_changes_no_other():
    torch.manual_seed(0)
    hidden = torch.randn(9, 6, requires_grad=True)
    head, input_ids = torch.nn.Linear(6, 11), torch.randint(11, (9,))
    gradients = []
    for is_trained in (True, False):
        head.requires_grad_(is_trained)
        stats = token_stats(hidden, head, input_ids, temperature=0.7)
        hidden.grad = None
        (stats.logprobs.sum() + 0.3 * stats.entropies.sum()).backward()
        gradients.append(hidden.grad)
        assert (head.weight.grad is not None) == is_trained
        head.weight.grad = None
    assert torch.equal(*gradients)
    assert gradients[0].any()


def test_backward_twice_gives_the_same_gradients():
    hidden, head, ids = make(torch.float64)
    pull = torch.randn(3, 7, dtype=torch.float64)
    pull[1] = 0.0
    stats = token_stats(hidden, head, ids, temperature=0.7)
    leaves = [hidden, *head.parameters()]
    once, twice = (torch.autograd.grad((pull * stats.logprobs).sum(), leaves, retain_graph=True) for _ in range(2))
    naive = token_stats_from_logits(head(hidden), ids, temperature=0.7)
    assert_close(once, twice, rtol=0, atol=0)
    assert_close(once, torch.autograd.grad((pull * naive.logprobs).sum(), leaves), rtol=1e-10, atol=1e-12)
