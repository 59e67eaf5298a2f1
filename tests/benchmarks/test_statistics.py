"""Intervals and shares against hand calculations, exact enumerations and known distributions."""

from itertools import product

import numpy as np
import pytest

from comparison.statistics import Estimate, mean_interval, paired_difference, share_won


def simulate(rng, *, seeds, problems, effect=0.0):
    """Two methods, (S, P) each: a common seed effect, a common difficulty of each problem, and independent noise."""
    level = rng.normal(0.0, 0.5, (seeds, 1)) + rng.normal(0.0, 0.5, (1, problems))
    own = rng.normal(effect, 0.2, (seeds, 1)) + rng.normal(0.0, 0.2, (1, problems))
    return level + own + rng.normal(0.0, 0.1, (seeds, problems)), level


def test_the_bootstrap_distribution_is_that_of_all_draws():
    """2 seeds x 2 problems have 16 equally likely draws; quantiles are compared with their exact distribution."""
    scores = np.array([[1.0, 0.0], [1.0, 1.0]])
    draws = [
        np.mean([scores[s, p] for s in seeds for p in problems])
        for seeds in product(range(2), repeat=2)
        for problems in product(range(2), repeat=2)
    ]
    for confidence in (0.5, 0.8, 0.9):
        tail = (1 - confidence) / 2
        exact = np.quantile(np.repeat(draws, 1000), [tail, 1 - tail])
        got = mean_interval(scores, confidence=confidence, num_resamples=20_000)
        np.testing.assert_allclose((got.low, got.high), exact, atol=1e-12)
    assert mean_interval(scores).mean == 0.75


def test_by_hand_where_nothing_varies():
    assert mean_interval(np.full((3, 5), 0.25)) == Estimate(0.25, 0.25, 0.25)
    assert paired_difference(np.ones((2, 4)), np.zeros((2, 4))) == Estimate(1.0, 1.0, 1.0)


def test_one_seed_is_the_bootstrap_over_problems():
    """The mean of P draws of 0 or 1 is binomial; its quantiles are known."""
    scores = np.array([[1.0] * 50 + [0.0] * 50])
    got = mean_interval(scores, num_resamples=40_000)
    assert (got.mean, got.low, got.high) == (0.5, pytest.approx(0.40, abs=0.011), pytest.approx(0.60, abs=0.011))


def test_variance_is_that_of_seeds_and_of_problems():
    """Of x_sp = a_s + b_p the resampled mean has the variance var(a) / S + var(b) / P; +- 1.96 of it for 95 %."""
    rng = np.random.default_rng(3)
    a, b = rng.normal(0, 1, (40, 1)), rng.normal(0, 2, (1, 200))
    got = mean_interval(a + b, num_resamples=40_000)
    half = 1.96 * np.sqrt(a.var() / 40 + b.var() / 200)
    assert (got.high - got.low) / 2 == pytest.approx(half, rel=0.03)


def test_coverage_of_a_known_difference():
    """95 % intervals hold the true effect in about 95 of 100 experiments (400 of them: +- 2 points)."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        method, baseline = simulate(rng, seeds=16, problems=60, effect=0.3)
        got = paired_difference(method, baseline, num_resamples=1000)
        hits += got.low <= 0.3 <= got.high
    assert 0.90 <= hits / 400 <= 0.98


def test_pairing_takes_out_what_the_methods_share():
    rng = np.random.default_rng(1)
    method, baseline = simulate(rng, seeds=8, problems=100, effect=0.5)
    paired = paired_difference(method, baseline)
    crossed = paired_difference(method, np.roll(baseline, (3, 7), axis=(0, 1)))
    assert paired.mean == pytest.approx(crossed.mean)
    assert paired.high - paired.low < 0.7 * (crossed.high - crossed.low)
    reverse = paired_difference(baseline, method)
    assert (reverse.mean, reverse.low, reverse.high) == pytest.approx((-paired.mean, -paired.high, -paired.low))


def test_one_good_seed_is_no_evidence():
    """Problems alone would give an interval far from 0; of the seeds only one in four won."""
    method = np.zeros((4, 200))
    method[0] = 0.4
    got = paired_difference(method, np.zeros((4, 200)))
    assert got.low == 0.0 < got.mean == pytest.approx(0.1)


def test_ties_count_half():
    baseline = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.1 + 0.2, 0.0]])
    method = np.array([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.3, 0.0]])
    assert share_won(method, baseline) == (1 + 0.5 + 0 + 0.5) / 4
    assert share_won(baseline, baseline) == 0.5


def test_the_same_data_give_the_same_interval():
    scores = np.random.default_rng(5).random((4, 30))
    assert mean_interval(scores) == mean_interval(scores.copy())
    assert mean_interval(scores) != mean_interval(scores, seed=1)


@pytest.mark.parametrize("scores", [np.zeros(3), np.zeros((0, 3)), np.zeros((2, 2, 2))])
def test_other_shapes_are_refused(scores):
    with pytest.raises(ValueError, match=r"scores must be \(seeds, problems\)"):
        mean_interval(scores)


def test_unequal_pairs_and_confidences_are_refused():
    with pytest.raises(ValueError, match="the same seeds and problems"):
        paired_difference(np.zeros((2, 3)), np.zeros((1, 3)))
    with pytest.raises(ValueError, match="confidence"):
        mean_interval(np.zeros((2, 3)), confidence=1.0)
