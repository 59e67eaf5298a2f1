import itertools
import random
import statistics

import pytest
import torch

from egspo_lightning.evaluation.metrics import BenchmarkMetric, bootstrap_interval, majority_at_k, pass_at_k
from egspo_lightning.types import Completion, Problem

# pass@k


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets)), (n, c, k)


def test_pass_at_k_of_many_samples():
    assert pass_at_k(1024, 1, 512) == pytest.approx(0.5)
    assert pass_at_k(1024, 0, 1024) == 0.0
    assert pass_at_k(1024, 513, 512) == 1.0


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_refuses_what_cannot_be(n, c, k):
    with pytest.raises(ValueError, match="1 <= k <= num_samples"):
        pass_at_k(n, c, k)


# maj@k


@pytest.mark.parametrize(
    ("answers", "correct", "expected"),
    [
        (["5", "5", "6"], [True, True, False], 1.0),
        (["5", "6", "6"], [True, False, False], 0.0),
        (["5", "6"], [True, False], 0.5),  # a tie
        (["5", "6", "7"], [False, True, False], 1 / 3),
        (["5", "5", "6", "6", "7"], [True, True, False, False, False], 0.5),
        (["5", "1/2", "0.5"], [False, True, True], 2 / 3),  # two spellings of the right answer lead with one wrong
        ([None, None, "5"], [False, False, True], 1.0),  # none does not vote
        ([None, None], [False, False], 0.0),
        ([], [], 0.0),
    ],
)
def test_the_most_frequent_answer_counts(answers, correct, expected):
    assert majority_at_k(answers, correct) == pytest.approx(expected)
    assert majority_at_k(answers[::-1], correct[::-1]) == pytest.approx(expected)


def test_as_many_verdicts_as_answers_are_needed():
    with pytest.raises(ValueError, match=r"shorter|longer"):
        majority_at_k(["5", "6"], [True])


# Bootstrap


def test_the_interval_contains_the_mean_and_narrows_with_more_values():
    rng = random.Random(0)
    widths = []
    for count in (25, 400):
        values = [float(rng.random() < 0.4) for _ in range(count)]
        low, high = bootstrap_interval(values)
        assert low <= statistics.mean(values) <= high
        widths.append(high - low)
    assert widths[0] / widths[1] == pytest.approx(4.0, rel=0.2)  # by the root of the count


def test_the_interval_is_near_the_normal_one():
    values = [float(i % 5 < 2) for i in range(500)]  # mean 0.4
    error = (0.4 * 0.6 / 500) ** 0.5
    for confidence, z in ((0.95, 1.96), (0.8, 1.2816)):
        low, high = bootstrap_interval(values, confidence=confidence, num_resamples=4000)
        assert low == pytest.approx(0.4 - z * error, abs=0.15 * error)
        assert high == pytest.approx(0.4 + z * error, abs=0.15 * error)


def test_the_interval_covers_the_true_mean_as_often_as_it_says():
    rng = random.Random(1)
    num_covering = 0
    for seed in range(200):
        values = [rng.gauss(3.0, 1.0) for _ in range(40)]
        low, high = bootstrap_interval(values, confidence=0.9, num_resamples=200, seed=seed)
        num_covering += low <= 3.0 <= high
    assert 0.83 <= num_covering / 200 <= 0.95  # a standard deviation is 0.021; the percentile method is a bit narrow


def test_the_interval_is_a_function_of_its_seed():
    values = [0.0, 1.0, 1.0, 0.0, 1.0, 0.5, 0.25]
    state = random.getstate()
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert random.getstate() == state
    spread = {bootstrap_interval([0.1 * i for i in range(50)], seed=seed) for seed in range(5)}
    assert len(spread) > 1


def test_values_without_spread_have_an_interval_of_no_width():
    assert bootstrap_interval([0.25] * 4) == (0.25, 0.25)


@pytest.mark.parametrize(("values", "confidence"), [([], 0.95), ([1.0], 0.0), ([1.0], 1.0), ([1.0], 95)])
def test_the_interval_refuses_what_cannot_be(values, confidence):
    with pytest.raises(ValueError, match="need values and 0 < confidence < 1"):
        bootstrap_interval(values, confidence=confidence)


# The metric


def completion(extracted: str | None, correct: bool, length: int, is_truncated: bool = False, status: str = "graded"):
    problem = Problem("1", "1+1=?", "2")
    return Completion(
        problem, [7] * length, [0.0] * length, "", is_truncated, float(correct), correct, extracted, status
    )


GROUPS = [
    # avg 2/3, pass 1, maj 1, length 3
    [completion("2", True, 2), completion("2", True, 3), completion("3", False, 4)],
    # avg 1/3, pass 1, maj 1/3 (a tie of three), length 6
    [completion("2", True, 6), completion("3", False, 5), completion("4", False, 7)],
    # avg 0, pass 0, maj 0, length 9, two of three truncated, one timeout
    [
        completion(None, False, 9, True),
        completion(None, False, 9, True),
        completion("x", False, 9, status="timeout"),
    ],
    # avg 1/3, pass 1, maj 0, length 2
    [completion("2", True, 2), completion("4", False, 2), completion("4", False, 2)],
]
EXPECTED = {
    "avg@3": (2 / 3 + 1 / 3 + 0 + 1 / 3) / 4,
    "pass@3": 3 / 4,
    "maj@3": (1 + 1 / 3 + 0 + 0) / 4,
    "length_mean": (3 + 6 + 9 + 2) / 4,
    "truncated_fraction": 2 / 12,
    "grader_timeouts": 1.0,
    "num_problems": 4.0,
}


@pytest.mark.parametrize("split", [[4], [1, 3], [2, 2], [1, 1, 1, 1], [3, 0, 1]])
def test_the_metric_by_hand_however_it_is_split_into_batches(split):
    metric, start = BenchmarkMetric(num_samples=3), 0
    for size in split:
        metric.update(list(itertools.chain(*GROUPS[start : start + size])))
        start += size
    assert metric.compute() == pytest.approx(EXPECTED)


def test_the_states_of_ranks_add_up():
    ranks = [BenchmarkMetric(num_samples=3) for _ in range(2)]
    for i, group in enumerate(GROUPS):
        ranks[i % 2].update(group)
    whole = BenchmarkMetric(num_samples=3)
    for name in ("sums", "num_problems"):
        assert whole._reductions[name] is torchmetrics_sum()
        setattr(whole, name, getattr(ranks[0], name) + getattr(ranks[1], name))
    whole._update_count = 1
    assert whole.compute() == pytest.approx(EXPECTED)


def torchmetrics_sum():
    from torchmetrics.utilities import dim_zero_sum

    return dim_zero_sum


def test_a_rank_without_problems_adds_nothing():
    metric = BenchmarkMetric(num_samples=3)
    metric.update([])
    assert metric.compute() == pytest.approx(dict.fromkeys(EXPECTED, 0.0))


def test_many_problems_are_counted_exactly():
    metric = BenchmarkMetric(num_samples=1)
    metric.sums.fill_(2.0**24)
    metric.num_problems.fill_(2.0**24)
    metric.update([completion("2", True, 1)])
    assert metric.num_problems.dtype == metric.sums.dtype == torch.float64
    assert metric.compute()["num_problems"] == 2**24 + 1
