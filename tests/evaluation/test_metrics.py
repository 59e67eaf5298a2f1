import itertools
import random
import statistics

import pytest

from egspo_lightning.evaluation.metrics import (
    bootstrap_interval,
    majority_at_k,
    pass_at_k,
    reported_ks,
    standard_error,
)

# pass@k


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets)), (n, c, k)


def test_pass_at_k_of_many_samples():
    assert pass_at_k(1024, 1, 512) == pytest.approx(0.5)
    assert pass_at_k(1024, 0, 1024) == 0.0
    assert pass_at_k(1024, 513, 512) == 1.0


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_refuses_invalid_counts(n, c, k):
    with pytest.raises(ValueError, match="1 <= k <= num_samples"):
        pass_at_k(n, c, k)


@pytest.mark.parametrize(
    ("n", "ks"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (9, [1, 2, 4, 8, 9]), (32, [1, 2, 4, 8, 16, 32])],
)
def test_pass_at_k_is_reported_at_powers_of_two_and_at_n(n, ks):
    assert reported_ks(n) == ks


# maj@k


@pytest.mark.parametrize(
    ("answers", "correct", "expected"),
    [
        (["5", "5", "6"], [True, True, False], 1.0),
        (["5", "6", "6"], [True, False, False], 0.0),
        (["5", "6"], [True, False], 0.5),  # a tie
        (["5", "6", "7"], [False, True, False], 1 / 3),
        (["5", "5", "6", "6", "7"], [True, True, False, False, False], 0.5),
        ([0, 1, 1], [False, True, True], 1.0),  # classes of equivalent answers
        ([0, 0, 1], [True, False, False], 0.5),  # the grader failed on one of two equal answers
        ([None, None, "5"], [False, False, True], 1.0),  # None does not vote
        ([None, None], [False, False], 0.0),
        ([], [], 0.0),
    ],
)
def test_majority_at_k_takes_the_most_frequent_answer(answers, correct, expected):
    assert majority_at_k(answers, correct) == pytest.approx(expected)
    assert majority_at_k(answers[::-1], correct[::-1]) == pytest.approx(expected)


def test_majority_at_k_refuses_unequal_lengths():
    with pytest.raises(ValueError, match=r"shorter|longer"):
        majority_at_k(["5", "6"], [True])


# Standard error


def test_standard_error_by_hand():
    assert standard_error([1.0, 0.0, 0.0, 1.0, 0.0]) == pytest.approx((0.3 / 5) ** 0.5)  # variance 0.3 with P - 1
    assert standard_error([0.25, 0.75]) == pytest.approx(0.25)
    assert standard_error([0.5, 0.5, 0.5]) == 0.0
    with pytest.raises(ValueError, match="at least two data points"):
        standard_error([1.0])


def test_standard_error_is_clustered_by_problem():
    """Equation 4 of arXiv 2411.00640 over single samples, times P / (P - 1)."""
    samples = [[1, 1, 1, 0], [0, 0, 1, 0], [1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]]
    count, mean = 20, 9 / 20
    within = sum((a - mean) * (b - mean) for group in samples for a in group for b in group)
    expected = (within / count**2 * 5 / 4) ** 0.5
    assert standard_error([sum(group) / 4 for group in samples]) == pytest.approx(expected)


# Bootstrap


def test_bootstrap_interval_contains_the_mean_and_narrows_with_more_values():
    rng = random.Random(0)
    widths = []
    for count in (25, 400):
        values = [float(rng.random() < 0.4) for _ in range(count)]
        low, high = bootstrap_interval(values)
        assert low <= statistics.mean(values) <= high
        widths.append(high - low)
    assert widths[0] / widths[1] == pytest.approx(4.0, rel=0.2)  # the width falls with the square root of the count


def test_bootstrap_interval_is_close_to_the_normal_interval():
    values = [float(i % 5 < 2) for i in range(500)]  # mean 0.4
    error = (0.4 * 0.6 / 500) ** 0.5
    for confidence, z in ((0.95, 1.96), (0.8, 1.2816)):
        low, high = bootstrap_interval(values, confidence=confidence, num_resamples=4000)
        assert low == pytest.approx(0.4 - z * error, abs=0.15 * error)
        assert high == pytest.approx(0.4 + z * error, abs=0.15 * error)


def test_bootstrap_interval_has_its_nominal_coverage():
    rng = random.Random(1)
    num_covering = 0
    for seed in range(200):
        values = [rng.gauss(3.0, 1.0) for _ in range(40)]
        low, high = bootstrap_interval(values, confidence=0.9, num_resamples=200, seed=seed)
        num_covering += low <= 3.0 <= high
    assert 0.83 <= num_covering / 200 <= 0.95  # standard deviation 0.021; percentile intervals are slightly narrow


def test_bootstrap_interval_depends_only_on_its_seed():
    values = [0.0, 1.0, 1.0, 0.0, 1.0, 0.5, 0.25]
    state = random.getstate()
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert random.getstate() == state
    spread = {bootstrap_interval([0.1 * i for i in range(50)], seed=seed) for seed in range(5)}
    assert len(spread) > 1


def test_bootstrap_interval_of_equal_values_has_width_zero():
    assert bootstrap_interval([0.25] * 4) == (0.25, 0.25)


@pytest.mark.parametrize(("values", "confidence"), [([], 0.95), ([1.0], 0.0), ([1.0], 1.0), ([1.0], 95)])
def test_bootstrap_interval_refuses_invalid_arguments(values, confidence):
    with pytest.raises(ValueError, match="need values and 0 < confidence < 1"):
        bootstrap_interval(values, confidence=confidence)
