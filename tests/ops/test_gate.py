import math

import pytest
import torch
from torch.testing import assert_close

from egspo_lightning.errors import UserError
from egspo_lightning.ops.gate import (
    AbsoluteGate,
    ConfidenceAttenuation,
    ConstantAttenuation,
    OpenGate,
    QuantileGate,
    confidence_phi,
    high_entropy_mask,
    quantile_threshold,
    token_weights,
)


def test_quantile_by_hand():
    # five tokens, top 40 %: position 0.6 * 4 = 2.4 of the sorted values
    entropies = [[5.0, 1.0, 9.0], [3.0, 2.0, 9.0]]
    mask = [[1, 1, 0], [1, 1, 0]]
    assert quantile_threshold(entropies, mask, 0.4).item() == pytest.approx(2 + 0.8 * 1, abs=1e-12)
    assert quantile_threshold([1.0, 2.0, 3.0, 4.0, 5.0], [1] * 5, 0.4).item() == pytest.approx(3.4, abs=1e-12)


@pytest.mark.parametrize("top_fraction", [0.01, 0.2, 0.5, 1.0])
def test_quantile_agrees_with_torch(top_fraction):
    torch.manual_seed(0)
    for size in (1, 2, 7, 1000):
        values = torch.rand(size, dtype=torch.float64)
        ours = quantile_threshold(values, torch.ones(size), top_fraction)
        assert_close(ours, torch.quantile(values, 1 - top_fraction), rtol=1e-12, atol=1e-12)


def test_an_empty_mask_makes_nothing_high():
    threshold = quantile_threshold(torch.ones(2, 3), torch.zeros(2, 3), 0.2)
    assert threshold.item() == math.inf
    assert not high_entropy_mask(torch.ones(2, 3), torch.zeros(2, 3), threshold).any()


def test_a_token_at_the_threshold_is_high_and_masked_ones_never_are():
    assert high_entropy_mask([[0.5, 0.4, 0.9]], [[1, 1, 0]], 0.5).tolist() == [[True, False, False]]


def test_token_weights_are_one_or_phi():
    weights = token_weights(torch.tensor([0.9, 0.1, 0.5]), 0.5, torch.tensor([0.2, 0.2, 0.2]))
    assert weights.tolist() == pytest.approx([1.0, 0.2, 1.0])


def test_confidence_phi_by_hand():
    assert confidence_phi([math.log(0.5), math.log(0.9), 0.0]).tolist() == pytest.approx([0.25, 0.09, 0.0], abs=1e-12)


def test_nothing_in_the_gate_carries_a_gradient():
    logprobs = torch.tensor([-0.5, -1.0], requires_grad=True)
    entropies = torch.tensor([0.1, 0.9], requires_grad=True)
    threshold = QuantileGate(0.5).threshold(entropies)
    phi = ConfidenceAttenuation().phi(logprobs, entropies, threshold)
    weights = token_weights(entropies, threshold, logprobs.exp())
    assert not any(value.requires_grad for value in (threshold, phi, weights, confidence_phi(logprobs)))


def test_gates():
    entropies = torch.linspace(0, 1, 11)
    assert QuantileGate(0.2).threshold(entropies).item() == pytest.approx(0.8)
    assert AbsoluteGate(0.3).threshold(entropies).item() == pytest.approx(0.3)
    assert high_entropy_mask(entropies, torch.ones(11), OpenGate().threshold(entropies)).all()
    assert ConstantAttenuation(0.1).phi(entropies, entropies, torch.tensor(0.5)).tolist() == pytest.approx([0.1] * 11)


@pytest.mark.parametrize("top_fraction", [0, -0.1, 1.1])
def test_top_fraction_out_of_range(top_fraction):
    with pytest.raises(UserError, match=r"top_fraction must be in \(0, 1\]"):
        QuantileGate(top_fraction)


def test_other_values_out_of_range():
    with pytest.raises(UserError, match="nats must be at least 0"):
        AbsoluteGate(-1)
    with pytest.raises(UserError, match=r"value must be in \[0, 1\]"):
        ConstantAttenuation(1.5)
