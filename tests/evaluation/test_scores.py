import itertools

import pytest
import torch

from egspo_lightning.evaluation.answers import Answer
from egspo_lightning.evaluation.metrics import bootstrap_interval
from egspo_lightning.evaluation.scores import BenchmarkMetric, accuracies, by_label, summary
from egspo_lightning.types import Problem

PROBLEMS = [
    Problem("a", "1+1=?", "2", "Sums", "1"),
    Problem("b", "1+2=?", "3", "Sums", "2"),
    Problem("c", "2*2=?", "4", "Products", "1"),
    Problem("d", "2*3=?", "6", "Products"),
]


def group(problem: Problem, *answers: tuple) -> list[Answer]:
    """Answers as (class, correct, length[, is_truncated, status])."""
    return [
        Answer(problem, i, "", None, found, correct, (*rest, False, "graded")[1], length, (*rest, False)[0])
        for i, (found, correct, length, *rest) in enumerate(answers)
    ]


GROUPS = [
    # avg 2/3, pass@2 1, maj 1, length 3
    group(PROBLEMS[0], (0, True, 2), (0, True, 3), (1, False, 4)),
    # avg 1/3, pass@2 2/3, maj 1/3 (a tie of three), length 6
    group(PROBLEMS[1], (0, True, 6), (1, False, 5), (2, False, 7)),
    # avg 0, pass@2 0, maj 0, length 9, two of three truncated, a timeout and a crash
    group(
        PROBLEMS[2],
        (None, False, 9, True, "timeout"),
        (None, False, 9, True, "no_answer"),
        (0, False, 9, False, "crashed"),
    ),
    # avg 1/3, pass@2 2/3, maj 0, length 2
    group(PROBLEMS[3], (0, True, 2), (1, False, 2), (1, False, 2)),
]
EXPECTED = {
    "avg@3": (2 / 3 + 1 / 3 + 0 + 1 / 3) / 4,
    "avg@3_se": (2 / 9 / 3 / 4) ** 0.5,  # deviations 1/3, 0, -1/3, 0
    "pass@1": (2 / 3 + 1 / 3 + 0 + 1 / 3) / 4,
    "pass@2": (1 + 2 / 3 + 0 + 2 / 3) / 4,
    "pass@3": 3 / 4,
    "maj@3": (1 + 1 / 3 + 0 + 0) / 4,
    "length_mean": (3 + 6 + 9 + 2) / 4,
    "truncated_fraction": 2 / 12,
    "grader_timeouts": 1.0,
    "grader_crashes": 1.0,
    "num_problems": 4.0,
}


@pytest.mark.parametrize("split", [[4], [1, 3], [2, 2], [1, 1, 1, 1], [3, 0, 1]])
def test_benchmark_metric_by_hand_for_any_split_into_batches(split):
    metric, start = BenchmarkMetric(PROBLEMS, num_samples=3), 0
    for size in split:
        metric.update(list(itertools.chain(*GROUPS[start : start + size])))
        start += size
    assert summary(metric.compute(), 3) == pytest.approx(EXPECTED)


@pytest.mark.parametrize("shares", [[[0, 2], [1, 3]], [[3, 1, 0], [2]], [[0, 1, 2, 3], []]])
def test_benchmark_metric_states_of_ranks_add_up(shares):
    from torchmetrics.utilities import dim_zero_sum

    ranks = [BenchmarkMetric(PROBLEMS, num_samples=3) for _ in shares]
    for metric, share in zip(ranks, shares, strict=True):
        metric.update([answer for i in share for answer in GROUPS[i]])
        assert metric._reductions == {"table": dim_zero_sum}  # the reduction that torchmetrics applies over ranks
    assert summary(sum(metric.table for metric in ranks), 3) == pytest.approx(EXPECTED)


def test_repeated_problem_is_counted_once():
    metric = BenchmarkMetric(PROBLEMS, num_samples=3)
    for i in (0, 1, 0, 2, 3, 3):
        metric.update(GROUPS[i])
    assert summary(metric.compute(), 3) == pytest.approx(EXPECTED)


def test_rank_without_problems_has_zero_summary():
    metric = BenchmarkMetric(PROBLEMS, num_samples=3)
    metric.update([])
    empty = summary(metric.compute(), 3)
    assert empty == dict.fromkeys(EXPECTED.keys() - {"avg@3_se"}, 0.0)


def test_one_problem_has_no_standard_error():
    metric = BenchmarkMetric(PROBLEMS[:1], num_samples=3)
    metric.update(GROUPS[0])
    assert "avg@3_se" not in summary(metric.compute(), 3)


def test_token_counts_above_float32_precision_are_exact():
    metric = BenchmarkMetric(PROBLEMS, num_samples=3)
    metric.update([answer._replace(length=2**24 + answer.sample) for answer in GROUPS[0]])
    assert metric.table.dtype == torch.float64
    assert summary(metric.compute(), 3)["length_mean"] == 2**24 + 1


def test_too_few_answers_to_a_problem_raise_assertion_error():
    with pytest.raises(AssertionError, match="a: 2 of 3 answers"):
        BenchmarkMetric(PROBLEMS, num_samples=3).update(GROUPS[0][:2])


def full_table():
    metric = BenchmarkMetric(PROBLEMS, num_samples=3)
    metric.update(list(itertools.chain(*GROUPS)))
    return metric.compute()


def test_scores_by_subject_and_level_by_hand():
    subjects = by_label(full_table(), [p.subject for p in PROBLEMS], 3)
    assert list(subjects) == ["Products", "Sums"]
    assert {name: (part["avg@3"], part["num_problems"]) for name, part in subjects.items()} == pytest.approx(
        {"Products": pytest.approx((1 / 6, 2)), "Sums": pytest.approx((1 / 2, 2))}
    )
    levels = by_label(full_table(), [p.level for p in PROBLEMS], 3)
    assert {name: (part["avg@3"], part["num_problems"]) for name, part in levels.items()} == {
        "1": pytest.approx((1 / 3, 2)),
        "2": pytest.approx((1 / 3, 1)),
    }


@pytest.mark.parametrize("label", ["", "Sums"])
def test_by_label_with_a_single_label_is_empty(label):
    assert by_label(full_table(), [label] * 4, 3) == {}


def test_score_interval_is_over_problems():
    assert accuracies(full_table(), 3) == pytest.approx([2 / 3, 1 / 3, 0, 1 / 3])
    low, high = bootstrap_interval(accuracies(full_table(), 3))
    assert 0 < low < EXPECTED["avg@3"] < high < 2 / 3
