"""Bootstrap intervals and counts against hand calculations, exact enumeration and known distributions."""

from itertools import product

import numpy as np
import pytest

from egspo_lightning.analysis.paired_bootstrap import Duels, Estimate, duels, mean_interval, paired_difference


def simulate(rng, *, seeds, problems, effect=0.0):
    """Scores of two methods, (S, P) each: shared effects of seeds and problems, own effects, and noise."""
    level = rng.normal(0.0, 0.5, (seeds, 1)) + rng.normal(0.0, 0.5, (1, problems))
    own = rng.normal(effect, 0.2, (seeds, 1)) + rng.normal(0.0, 0.2, (1, problems))
    return level + own + rng.normal(0.0, 0.1, (seeds, problems)), level


def test_the_bootstrap_equals_exact_enumeration():
    """2 seeds x 2 problems have 16 equally likely resamples."""
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


def test_constant_scores_have_an_interval_of_width_zero():
    assert mean_interval(np.full((3, 5), 0.25)) == Estimate(0.25, 0.25, 0.25)
    assert paired_difference(np.ones((2, 4)), np.zeros((2, 4))) == Estimate(1.0, 1.0, 1.0)


def test_one_seed_gives_the_bootstrap_over_problems():
    """The mean of P draws of 0 or 1 is binomial with known quantiles."""
    scores = np.array([[1.0] * 50 + [0.0] * 50])
    got = mean_interval(scores, num_resamples=40_000)
    assert (got.mean, got.low, got.high) == (0.5, pytest.approx(0.40, abs=0.011), pytest.approx(0.60, abs=0.011))


def test_variances_of_seeds_and_problems_add_up():
    """The resampled mean of x_sp = a_s + b_p has the variance var(a) / S + var(b) / P."""
    rng = np.random.default_rng(3)
    a, b = rng.normal(0, 1, (40, 1)), rng.normal(0, 2, (1, 200))
    got = mean_interval(a + b, num_resamples=40_000)
    half = 1.96 * np.sqrt(a.var() / 40 + b.var() / 200)
    assert (got.high - got.low) / 2 == pytest.approx(half, rel=0.03)


def test_coverage_of_a_known_difference():
    """95 % intervals cover the true effect in about 95 % of 400 experiments, +- 2 points."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        method, baseline = simulate(rng, seeds=16, problems=60, effect=0.3)
        got = paired_difference(method, baseline, num_resamples=1000)
        hits += got.low <= 0.3 <= got.high
    assert 0.90 <= hits / 400 <= 0.98


def test_pairing_removes_shared_variation():
    rng = np.random.default_rng(1)
    method, baseline = simulate(rng, seeds=8, problems=100, effect=0.5)
    paired = paired_difference(method, baseline)
    crossed = paired_difference(method, np.roll(baseline, (3, 7), axis=(0, 1)))
    assert paired.mean == pytest.approx(crossed.mean)
    assert paired.high - paired.low < 0.7 * (crossed.high - crossed.low)
    reverse = paired_difference(baseline, method)
    assert (reverse.mean, reverse.low, reverse.high) == pytest.approx((-paired.mean, -paired.high, -paired.low))


def test_one_good_seed_is_no_evidence():
    """A bootstrap over problems alone would exclude 0, but only one of four seeds won."""
    method = np.zeros((4, 200))
    method[0] = 0.4
    got = paired_difference(method, np.zeros((4, 200)))
    assert got.low == 0.0 < got.mean == pytest.approx(0.1)


def test_wins_and_ties_are_counted_apart():
    baseline = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.1 + 0.2, 0.0]])
    method = np.array([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.3, 0.0]])
    assert duels(method, baseline) == Duels(won=1, tied=2, num_seeds=4)
    assert duels(baseline, method) == Duels(won=1, tied=2, num_seeds=4)
    assert duels(baseline, baseline) == Duels(won=0, tied=4, num_seeds=4)


def test_intervals_are_deterministic():
    scores = np.random.default_rng(5).random((4, 30))
    assert mean_interval(scores) == mean_interval(scores.copy())
    assert mean_interval(scores) != mean_interval(scores, seed=1)


@pytest.mark.parametrize("scores", [np.zeros(3), np.zeros((0, 3)), np.zeros((2, 2, 2))])
def test_invalid_shapes_are_refused(scores):
    with pytest.raises(ValueError, match=r"scores must be \(seeds, problems\)"):
        mean_interval(scores)


def test_unequal_shapes_and_invalid_confidence_are_refused():
    with pytest.raises(ValueError, match="the same seeds and problems"):
        paired_difference(np.zeros((2, 3)), np.zeros((1, 3)))
    with pytest.raises(ValueError, match="confidence"):
        mean_interval(np.zeros((2, 3)), confidence=1.0)
