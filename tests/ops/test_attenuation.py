import math

import pytest
import torch

from egspo_lightning.ops.attenuation import ConfidenceAttenuation, ConstantAttenuation, EntropyRatioAttenuation


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


LOGPROBS = doubles([[0.5, 0.9, 1.0, 0.2]]).log()
ENTROPIES = doubles([[0.0, 0.5, 1.0, 3.0]])


def test_confidence_by_hand():
    phi = ConfidenceAttenuation().phi(LOGPROBS, ENTROPIES, torch.tensor(1.0))
    assert phi.tolist() == [pytest.approx([0.25, 0.09, 0.0, 0.16], abs=1e-12)]


def test_constant_by_hand():
    phi = ConstantAttenuation(0.1).phi(LOGPROBS, ENTROPIES, torch.tensor(1.0))
    assert phi.tolist() == [[0.1] * 4]


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        (2.0, [0.0, 0.25, 0.5, 1.0]),
        (0.5, [0.0, 1.0, 1.0, 1.0]),
        (0.0, [0.0, 0.0, 0.0, 0.0]),  # no entropy is below the threshold
        (math.inf, [0.0, 0.0, 0.0, 0.0]),
        (-math.inf, [0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_entropy_ratio_by_hand(threshold, expected):
    for tau in (doubles(threshold), doubles([[threshold]])):
        phi = EntropyRatioAttenuation().phi(LOGPROBS, ENTROPIES, tau)
        assert phi.tolist() == [pytest.approx(expected, abs=1e-12)]


def test_entropy_ratio_uses_the_threshold_of_each_row():
    phi = EntropyRatioAttenuation().phi(LOGPROBS, doubles([[0.5, 1.0]] * 3), doubles([[1.0], [2.0], [math.inf]]))
    assert phi.tolist() == [[0.5, 1.0], [0.25, 0.5], [0.0, 0.0]]


@pytest.mark.parametrize("attenuation", [ConfidenceAttenuation(), ConstantAttenuation(0.3), EntropyRatioAttenuation()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_phi_is_in_unit_interval_and_keeps_dtype(attenuation, dtype):
    torch.manual_seed(0)
    logprobs, entropies = -torch.rand(4, 5, dtype=dtype) * 9, torch.rand(4, 5, dtype=dtype) * 3
    phi = attenuation.phi(logprobs, entropies, torch.tensor(1.0, dtype=dtype))
    assert (phi.shape, phi.dtype) == ((4, 5), dtype)
    assert ((phi >= 0) & (phi <= 1)).all()
