import math

import pytest
import torch
from torch.testing import assert_close

from egspo_lightning.ops.attenuation import ConfidenceAttenuation
from egspo_lightning.ops.gate import (
    AbsoluteGate,
    Entropies,
    OpenGate,
    QuantileGate,
    confidence_phi,
    high_entropy_mask,
    quantile_threshold,
    soft_share,
    token_weights,
)


def pool(values, mask=None):
    """The input of a gate on a single rank."""
    rows = torch.as_tensor(values, dtype=torch.float64)
    mask = torch.ones_like(rows, dtype=torch.bool) if mask is None else torch.tensor(mask).bool()
    return Entropies(rows, mask, rows[mask])


def test_quantile_by_hand():
    # five tokens, top 40 %: position 0.6 * 4 = 2.4 of the sorted values
    entropies = [[5.0, 1.0, 9.0], [3.0, 2.0, 9.0]]
    mask = [[1, 1, 0], [1, 1, 0]]
    assert quantile_threshold(entropies, mask, 0.4).item() == pytest.approx(2 + 0.8 * 1, abs=1e-12)
    assert quantile_threshold([1.0, 2.0, 3.0, 4.0, 5.0], [1] * 5, 0.4).item() == pytest.approx(3.4, abs=1e-12)


@pytest.mark.parametrize("top_fraction", [0.01, 0.2, 0.5, 1.0])
def test_quantile_threshold_matches_torch_quantile(top_fraction):
    torch.manual_seed(0)
    for size in (1, 2, 7, 1000):
        values = torch.rand(size, dtype=torch.float64)
        ours = quantile_threshold(values, torch.ones(size), top_fraction)
        assert_close(ours, torch.quantile(values, 1 - top_fraction), rtol=1e-12, atol=1e-12)


def test_empty_mask_makes_no_token_high():
    threshold = quantile_threshold(torch.ones(2, 3), torch.zeros(2, 3), 0.2)
    assert threshold.item() == math.inf
    assert not high_entropy_mask(torch.ones(2, 3), torch.zeros(2, 3), threshold).any()


def test_token_at_the_threshold_is_high_and_masked_tokens_are_not():
    assert high_entropy_mask([[0.5, 0.4, 0.9]], [[1, 1, 0]], 0.5).tolist() == [[True, False, False]]


def test_token_weights_are_one_or_phi():
    weights = token_weights(torch.tensor([0.9, 0.1, 0.5]), 0.5, torch.tensor([0.2, 0.2, 0.2]))
    assert weights.tolist() == pytest.approx([1.0, 0.2, 1.0])


def test_confidence_phi_by_hand():
    assert confidence_phi([math.log(0.5), math.log(0.9), 0.0]).tolist() == pytest.approx([0.25, 0.09, 0.0], abs=1e-12)


def test_soft_gate_by_hand():
    # (H - tau) / width = -log 3, 0, log 3: sigmoid 1/4, 1/2, 3/4
    entropies = 2.0 + 0.5 * torch.tensor([-math.log(3), 0.0, math.log(3)], dtype=torch.float64)
    assert soft_share(entropies, 2.0, 0.5).tolist() == pytest.approx([0.25, 0.5, 0.75], abs=1e-12)


@pytest.mark.parametrize("width", [1e-3, 1e-6, 1e-300])
def test_soft_gate_with_tiny_width_equals_hard_gate(width):
    entropies = torch.tensor([0.0, 0.4, 0.6, 5.0], dtype=torch.float64)
    assert_close(soft_share(entropies, 0.5, width), (entropies >= 0.5).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("threshold", "share"), [(math.inf, 0.0), (-math.inf, 1.0)])
def test_infinite_threshold_closes_or_opens_the_gate(threshold, share):
    for tau in (threshold, torch.full((2, 1), threshold)):
        assert soft_share(torch.tensor([[0.0, 3.0]] * 2), tau, 0.1).tolist() == [[share, share]] * 2


def test_gate_and_attenuation_carry_no_gradient():
    logprobs = torch.tensor([[-0.5, -1.0]], requires_grad=True)
    entropies = torch.tensor([[0.1, 0.9]], requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    seen = Entropies(entropies, mask, entropies[mask])
    thresholds = [QuantileGate(0.5).threshold(seen), QuantileGate(0.5, over="sequence").threshold(seen)]
    thresholds += [QuantileGate(0.5, running_decay=0.5).threshold(seen), AbsoluteGate(1.0).threshold(seen)]
    phi = ConfidenceAttenuation().phi(logprobs, entropies, thresholds[0])
    share = soft_share(entropies, thresholds[0], 0.1)
    weights = token_weights(entropies, thresholds[0], logprobs.exp())
    assert not any(value.requires_grad for value in (*thresholds, share, phi, weights, confidence_phi(logprobs)))


def test_gates_by_hand():
    entropies = pool(torch.linspace(0, 1, 11).view(1, -1))
    assert QuantileGate(0.2).threshold(entropies).item() == pytest.approx(0.8)
    assert AbsoluteGate(0.3).threshold(entropies).item() == pytest.approx(0.3)
    assert OpenGate().threshold(entropies).item() == -math.inf
    assert high_entropy_mask(entropies.rows, entropies.mask, OpenGate().threshold(entropies)).all()


def test_quantile_over_batch_uses_tokens_of_all_ranks():
    mine = torch.tensor([[0.0, 1.0]])
    seen = Entropies(mine, torch.ones_like(mine, dtype=torch.bool), torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]))
    assert QuantileGate(0.5).threshold(seen).item() == pytest.approx(2.0)


def test_quantile_over_sequence_gives_each_row_a_threshold():
    rows = [[9.0, 1.0, 2.0, 3.0], [0.1, 0.2, 0.3, 9.0], [7.0, 7.0, 7.0, 7.0]]
    mask = [[0, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]]
    tau = QuantileGate(0.5, over="sequence").threshold(pool(rows, mask))
    assert tau.shape == (3, 1)
    assert tau.flatten().tolist() == pytest.approx([2.0, 0.2, math.inf])


def test_running_threshold_by_hand():
    gate = QuantileGate(1.0, running_decay=0.75)  # the threshold is the lowest entropy
    assert gate.threshold(pool([[4.0, 5.0]])).item() == pytest.approx(4.0)
    assert gate.threshold(pool([[8.0, 9.0]])).item() == pytest.approx(0.75 * 4 + 0.25 * 8)  # 5
    nothing = pool([[8.0, 9.0]], [[0, 0]])
    assert gate.threshold(nothing).item() == pytest.approx(5.0)
    assert gate.threshold(pool([[1.0, 9.0]])).item() == pytest.approx(0.75 * 5 + 0.25 * 1)  # 4
    assert QuantileGate(1.0, running_decay=0.75).threshold(nothing).item() == math.inf


def test_running_threshold_with_decay_zero_uses_only_the_current_batch():
    gate, plain = QuantileGate(0.4, running_decay=0.0), QuantileGate(0.4)
    for seed in range(3):
        torch.manual_seed(seed)
        entropies = pool(torch.rand(2, 5))
        assert gate.threshold(entropies).item() == plain.threshold(entropies).item()


def test_running_threshold_resumes_from_its_state():
    gate, resumed = (QuantileGate(1.0, running_decay=0.5) for _ in range(2))
    gate.threshold(pool([[4.0]]))
    resumed.load_state_dict(gate.state_dict())
    assert gate.threshold(pool([[8.0]])).item() == resumed.threshold(pool([[8.0]])).item() == pytest.approx(6.0)
    fresh = QuantileGate(1.0, running_decay=0.5)
    fresh.load_state_dict(QuantileGate(1.0, running_decay=0.5).state_dict())
    assert fresh.threshold(pool([[8.0]])).item() == pytest.approx(8.0)
